"""Keypoints: the crop that the network sees, what is read from its answer, and OpenPose's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.pose.keypoints import (
    WholeBodyEstimator,
    crop,
    crop_transforms,
    crop_windows,
    decode_simcc,
    normalised,
    openpose,
    split,
    to_frame,
)
from services.pose.onnx import OnnxNetwork, OnnxSettings
from services.pose.onnx_file import WrongNetwork
from training.tiny_onnx import Graph, colours, detector, whole_body

# OpenPose's body, by the names of COCO's; the neck has none there
COCO = [
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee"),
    *("left_ankle", "right_ankle"),
]
OPENPOSE = [
    *("nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist"),
    *("right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle"),
    *("right_eye", "left_eye", "right_ear", "left_ear"),
]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., OnnxNetwork]:
    def load(content: bytes, max_batch: int = 8) -> OnnxNetwork:
        path = tmp_path / "network.onnx"
        path.write_bytes(content)
        return OnnxNetwork.load(path, OnnxSettings(device="cpu", num_threads=1, max_batch=max_batch))

    return load


def dotted(height: int, width: int, dots: Mapping[int, tuple[int, int]]) -> np.ndarray:
    """A black frame with squares of 5 pixels in the colours of these points (of the network's order), at x, y."""
    frame = np.zeros((height, width, 3), np.uint8)
    for point, (x, y) in dots.items():
        frame[y - 2 : y + 3, x - 2 : x + 3] = colours()[point]
    return frame


def test_windows_are_larger_than_boxes_and_of_the_networks_proportions() -> None:
    boxes = np.array([[10, 20, 30, 100], [0, 0, 80, 8]])
    middles, sizes = crop_windows(boxes, aspect=0.75)
    np.testing.assert_allclose(middles, [[20, 60], [40, 4]])
    # the tall one is widened, the wide one heightened
    np.testing.assert_allclose(sizes, np.array([[75, 100], [100, 400 / 3]]))


def test_a_window_fills_the_crop() -> None:
    middles, sizes = np.array([[20.0, 60.0]]), np.array([[75.0, 100.0]])
    transforms = crop_transforms(middles, sizes, width=72)
    corners = np.stack([middles - sizes / 2, middles, middles + sizes / 2], axis=1)
    in_crop = corners @ transforms[0, :, :2].T + transforms[0, :, 2]
    np.testing.assert_allclose(in_crop[0], [[0, 0], [36, 48], [72, 96]], atol=1e-12)
    np.testing.assert_allclose(to_frame(in_crop, transforms), corners)


def test_crops_are_zoomed_and_black_beyond_the_frame() -> None:
    frame = np.full((4, 4, 3), 100, np.uint8)
    frame[1, 2] = 250
    # twice as large, the frame's pixel 0 on the crop's 3
    transform = np.array([[2.0, 0, 3], [0, 2, 3]])
    seen = crop(frame, transform, 14, 12)
    assert (seen[5, 7] == 250).all()
    assert (seen[5, 6] == 175).all()
    assert (seen[3:10, 3] == 100).all()
    assert (seen[3:10, 2] == 50).all()
    assert (seen[:, :2] == 0).all()
    assert (seen[11:] == 0).all()


def test_levels_are_normalised_channel_by_channel() -> None:
    np.testing.assert_allclose(
        normalised(np.array([255, 0, 128], np.uint8)),
        np.array([(255 - 123.675) / 58.395, -116.28 / 57.12, (128 - 103.53) / 57.375]),
        rtol=1e-6,
    )


def test_a_point_is_at_its_best_bins_and_as_certain_as_the_worse_axis() -> None:
    simcc_x, simcc_y = np.zeros((1, 2, 8), np.float32), np.zeros((1, 2, 12), np.float32)
    simcc_x[0, 0, 5], simcc_y[0, 0, 11] = 0.9, 0.4
    simcc_x[0, 1, [2, 6]], simcc_y[0, 1, 3] = 0.2, 0.7
    places, scores = decode_simcc(simcc_x, simcc_y, 2.0)
    np.testing.assert_allclose(places[0], [[2.5, 5.5], [1.0, 1.5]])
    np.testing.assert_allclose(scores[0], [0.4, 0.2])


def test_a_point_that_fits_nowhere_lies_half_a_pixel_outside() -> None:
    simcc_x, simcc_y = np.zeros((1, 1, 8), np.float32), np.ones((1, 1, 12), np.float32)
    places, scores = decode_simcc(simcc_x, simcc_y, 2.0)
    assert places.tolist() == [[[-0.5, -0.5]]]
    assert scores.tolist() == [[0]]


def test_body_points_come_in_the_order_of_openpose_and_the_others_stay() -> None:
    places = np.stack([np.arange(133.0), np.arange(133.0)], axis=-1)[None]
    points = openpose(places, np.ones((1, 133)))[0]
    assert len(points) == 134
    for place, name in enumerate(OPENPOSE):
        if name != "neck":
            assert points[place, 0] == COCO.index(name), name
    np.testing.assert_array_equal(points[18:, 0], np.arange(17, 133))


def test_the_neck_is_between_the_shoulders_and_visible_if_both_are() -> None:
    places = np.zeros((1, 133, 2))
    places[0, COCO.index("left_shoulder")], places[0, COCO.index("right_shoulder")] = (10, 40), (30, 20)
    for left, right, neck in ((0.31, 0.9, 1), (0.3, 0.9, 0), (0.9, 0.3, 0)):
        scores = np.full((1, 133), 0.5)
        scores[0, COCO.index("left_shoulder")], scores[0, COCO.index("right_shoulder")] = left, right
        np.testing.assert_allclose(openpose(places, scores)[0, 1], [20, 30, neck])


def test_scores_are_cut_off_at_0_and_1() -> None:
    scores = np.full((1, 133), 0.5)
    scores[0, :2] = 1.7, -0.2
    points = openpose(np.zeros((1, 133, 2)), scores)[0]
    assert points[OPENPOSE.index("nose"), 2] == 1
    assert points[OPENPOSE.index("left_eye"), 2] == 0


def numbered(people: int) -> np.ndarray:
    """Points whose x is their own number plus 1000 times their person, all visible."""
    points = np.ones((people, 134, 3), np.float32)
    points[..., 0] = np.arange(134) + 1000 * np.arange(people)[:, None]
    return points


def test_parts_are_the_body_with_feet_the_face_and_two_hands() -> None:
    parts = split(numbered(1))
    assert parts.bodies[0, :, 0].tolist() == list(range(24))
    assert parts.faces[0, :, 0].tolist() == list(range(24, 92))
    assert parts.hands[:, :, 0].tolist() == [list(range(92, 113)), list(range(113, 134))]


def test_hands_are_stacked_left_ones_first() -> None:
    assert split(numbered(2)).hands[:, 0, 0].tolist() == [92, 1092, 113, 1113]


def test_what_is_not_visible_is_taken_out_of_faces_and_hands_only() -> None:
    points = numbered(1)
    points[0, [5, 40, 100, 120], 2] = 0.29
    parts = split(points)
    assert not parts.visible[0, 5]
    assert parts.visible.sum() == 23
    assert parts.bodies[0, 5, 0] == 5
    for part, place in ((parts.faces[0], 40 - 24), (parts.hands[0], 100 - 92), (parts.hands[1], 120 - 113)):
        assert part[place].tolist() == [-1, -1]
        assert (part[:, 0] == -1).sum() == 1


def test_a_score_of_three_tenths_is_visible_in_faces_and_hands_but_not_in_bodies() -> None:
    points = numbered(1)
    points[..., 2] = 0.3
    parts = split(points)
    assert not parts.visible.any()
    assert (parts.faces[..., 0] >= 0).all()
    assert (parts.hands[..., 0] >= 0).all()


def test_nobody_has_parts_too() -> None:
    parts = split(np.zeros((0, 134, 3), np.float32))
    assert (parts.bodies.shape, parts.faces.shape, parts.hands.shape) == ((0, 24, 2), (0, 68, 2), (0, 21, 2))


@pytest.mark.parametrize("batch", [1, "batch"])
def test_points_are_found_in_the_frame_for_each_box(load: Callable[..., OnnxNetwork], batch: int | str) -> None:
    estimator = WholeBodyEstimator(load(whole_body(96, 72, batch), max_batch=2))
    # nose, left wrist, and the last point of the right hand; one frame larger than the crop, one smaller, one without
    dots = [{0: (60, 40), 9: (90, 100), 132: (70, 70)}, {}, {0: (20, 15), 9: (35, 30), 132: (15, 40)}]
    frames = [dotted(150, 200, dots[0]), dotted(60, 50, dots[1]), dotted(60, 50, dots[2])]
    boxes = [np.array([[50, 25, 100, 110], [20, 0, 130, 150]]), np.zeros((0, 5)), np.array([[5, 5, 45, 50, 0.9]])]
    found = estimator.estimate(frames, boxes)
    assert [points.shape for points in found] == [(2, 134, 3), (0, 134, 3), (1, 134, 3)]
    for expected, people in zip(dots, found, strict=True):
        for points in people:
            for place, point in ((0, 0), (OPENPOSE.index("left_wrist"), 9), (133, 132)):
                assert np.abs(points[place, :2] - expected[point]).max() < 4
                assert points[place, 2] > 0.8
            assert points[OPENPOSE.index("right_knee"), 2] == 0


def test_the_network_sees_blue_first_with_the_numbers_of_red(
    load: Callable[..., OnnxNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = WholeBodyEstimator(load(whole_body(96, 72)))
    seen: list[Any] = []
    answer = estimator.network.run

    def watched(pictures: Any) -> Any:
        seen.append(pictures)
        return answer(pictures)

    monkeypatch.setattr(estimator.network, "run", watched)
    frame = np.broadcast_to(np.array([10, 20, 30], np.uint8), (200, 200, 3))
    estimator.estimate([frame], [np.array([[80, 80, 120, 120]])])
    expected = [(30 - 123.675) / 58.395, (20 - 116.28) / 57.12, (10 - 103.53) / 57.375]
    np.testing.assert_allclose(seen[0][0, :, 48, 36], expected, rtol=1e-5)


def test_no_frames_give_no_keypoints(load: Callable[..., OnnxNetwork]) -> None:
    assert WholeBodyEstimator(load(whole_body(96, 72))).estimate([], []) == []


def test_another_kind_of_network_is_named_with_what_it_gives(load: Callable[..., OnnxNetwork]) -> None:
    with pytest.raises(WrongNetwork, match=r"network\.onnx.*simcc_x \[n, 133, 128\].*output \[n, 84, 85\]"):
        WholeBodyEstimator(load(detector(64, 64)))


def test_outputs_may_have_any_names(load: Callable[..., OnnxNetwork]) -> None:
    content = whole_body(96, 72).replace(b"simcc_x", b"heatmap").replace(b"simcc_y", b"outputs")
    assert set(WholeBodyEstimator(load(content)).network.shapes) == {"heatmap", "outputs"}


def test_outputs_in_the_wrong_order_are_refused(load: Callable[..., OnnxNetwork]) -> None:
    graph = Graph()
    nothing = graph.times(graph.add("ReduceSum", "input", keepdims=0), 0)
    for name, bins in (("y", 192), ("x", 144)):
        graph.add("Add", graph.constant(np.zeros((1, 133, bins), np.float32)), nothing, output=name)
    content = graph.model({"input": (1, 3, 96, 72)}, {"y": (1, 133, 192), "x": (1, 133, 144)})
    with pytest.raises(WrongNetwork, match=r"y \[n, 133, 192\], x \[n, 133, 144\]"):
        WholeBodyEstimator(load(content))
