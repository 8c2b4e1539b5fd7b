"""Finding people: the picture that the detector sees, and what is read from its answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.pose.detect import YoloxConfig, YoloxDetector, candidates, iou, letterbox, suppress
from services.pose.onnx import OnnxNetwork, OnnxSettings
from services.pose.onnx_file import WrongNetwork
from training.tiny_onnx import PERSON_SCORE, Graph, detector, whole_body

SETTINGS = OnnxSettings(device="cpu", num_threads=1)
CELLS = 64 + 16 + 4  # of 64x64 pixels


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], OnnxNetwork]:
    def load(content: bytes) -> OnnxNetwork:
        path = tmp_path / "network.onnx"
        path.write_bytes(content)
        return OnnxNetwork.load(path, SETTINGS)

    return load


def figure(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    frame = np.full((height, width, 3), 20, np.uint8)
    frame[top:bottom, left:right] = (200, 90, 160)
    return frame


def raw_with(cell: int, values: list[float]) -> np.ndarray:
    """An answer for 64x64 pixels and 3 classes with one cell that says something."""
    raw = np.zeros((CELLS, 8), np.float32)
    raw[cell, : len(values)] = values
    return raw


def test_a_frame_lies_in_the_top_left_corner_of_a_grey_canvas() -> None:
    canvas, ratio = letterbox(np.full((30, 60, 3), 200, np.uint8), 64, 48)
    assert ratio == pytest.approx(0.8)
    assert (canvas[:24, :48] == 200).all()
    assert (canvas[24:] == 114).all()


def test_scaled_sizes_are_rounded_down() -> None:
    # 33 x 64 / 50 = 42.24 would also round to 42, 34 x 64 / 50 = 43.52 would not to 43
    canvas, _ = letterbox(np.full((50, 34, 3), 200, np.uint8), 64, 64)
    assert (canvas[0] == 200).all(axis=1).sum() == 43


def test_the_frame_fills_its_part_of_the_canvas_after_rounding() -> None:
    # 34 columns on 43 that could have been 43.52: the last of them shows the last column alone
    frame = np.zeros((50, 34, 3), np.uint8)
    frame[:, -1] = 100
    canvas, _ = letterbox(frame, 64, 64)
    assert (canvas[:, 42] == 100).all()


def test_a_sliver_keeps_a_row() -> None:
    canvas, _ = letterbox(np.full((1, 200, 3), 9, np.uint8), 64, 64)
    assert (canvas[0] == 9).all()
    assert (canvas[1] == 114).all()


def test_scaling_down_mixes_two_pixels_and_no_more() -> None:
    # columns 0 to 7 to a quarter: places 1.5 and 5.5, so columns 1, 2 and 5, 6
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[:, [1, 6]] = 100
    frame[:, [0, 3, 4, 7]] = 255
    canvas, _ = letterbox(frame, 2, 2)
    assert (canvas == 50).all()


@pytest.mark.parametrize(
    ("cell", "stride", "x", "y"), [(8 * 2 + 5, 8, 5, 2), (64 + 4 * 3 + 1, 16, 1, 3), (64 + 16 + 1, 32, 1, 0)]
)
def test_a_cell_speaks_of_its_place_in_its_own_grid(cell: int, stride: int, x: int, y: int) -> None:
    raw = raw_with(cell, [0.25, 0.75, np.log(2), np.log(3), 0.8, 0.5])
    (box,) = candidates(raw, 64, 64, ratio=0.5)
    middle_x, middle_y = (x + 0.25) * stride, (y + 0.75) * stride
    expected = [middle_x - stride, middle_y - 1.5 * stride, middle_x + stride, middle_y + 1.5 * stride]
    np.testing.assert_allclose(box, [*(2 * np.array(expected)), 0.4], rtol=1e-6)


def test_grids_follow_the_proportions_of_the_network() -> None:
    raw = np.zeros((2 * 4 + 1 * 2, 6), np.float32)  # 16 x 32 pixels in strides of 8 and 16
    raw[9] = [0, 0, 0, 0, 1, 1]
    (box,) = candidates(raw, 16, 32, 1.0, YoloxConfig(strides=(8, 16)))
    np.testing.assert_allclose(box[:4], [16 - 8, -8, 16 + 8, 8])


def test_other_classes_are_no_people() -> None:
    raw = raw_with(3, [0, 0, 0, 0, 1, 0.05, 0.9])
    assert len(candidates(raw, 64, 64, 1.0)) == 0
    assert len(candidates(raw, 64, 64, 1.0, YoloxConfig(person=1))) == 1


def test_candidates_score_above_a_tenth() -> None:
    for score, count in ((0.1, 0), (0.1001, 1)):
        assert len(candidates(raw_with(3, [0, 0, 0, 0, 1, score]), 64, 64, 1.0)) == count


def test_corners_belong_to_their_box() -> None:
    box = np.array([0, 0, 1, 9, 1], np.float32)
    others = np.array([[1, 0, 2, 9, 1], [0, 0, 1, 9, 1], [5, 0, 6, 9, 1]], np.float32)
    # two columns each, one of three in common
    np.testing.assert_allclose(iou(box, others), [1 / 3, 1, 0])


def test_the_better_of_two_that_overlap_stays() -> None:
    boxes = np.array([[0, 0, 9, 9, 0.5], [0, 2, 9, 11, 0.9], [30, 0, 39, 9, 0.7]], np.float32)
    np.testing.assert_array_equal(suppress(boxes, 0.45), boxes[[1, 2]])


def test_boxes_that_overlap_by_exactly_the_limit_both_stay() -> None:
    boxes = np.array([[0, 0, 1, 9, 0.9], [0, 0, 1, 4, 0.8]], np.float32)
    assert len(suppress(boxes, 0.5)) == 2
    assert len(suppress(boxes, 0.49)) == 1


def test_a_suppressed_box_suppresses_nothing() -> None:
    boxes = np.array([[0, 0, 9, 9, 0.9], [4, 0, 13, 9, 0.8], [8, 0, 17, 9, 0.7]], np.float32)
    # neighbours overlap by 60 of 140, the outer two by 20 of 180
    np.testing.assert_array_equal(suppress(boxes, 0.4), boxes[[0, 2]])


def test_people_score_above_three_tenths(load: Callable[[bytes], OnnxNetwork]) -> None:
    found = {}
    for threshold in (PERSON_SCORE - 0.01, PERSON_SCORE + 0.01):
        people = YoloxDetector(load(detector(64, 64)), YoloxConfig(threshold=threshold))
        found[threshold] = len(people.detect([figure(64, 64, 10, 10, 40, 30)])[0])
    assert list(found.values()) == [1, 0]
    assert YoloxConfig().threshold == 0.3


@pytest.mark.parametrize(("shift", "people"), [(15, 1), (16, 2)])
def test_two_boxes_are_one_person_from_an_overlap_of_45_percent(
    load: Callable[[bytes], OnnxNetwork], shift: int, people: int
) -> None:
    # both 40 pixels wide: 25 of 55 in common, or 24 of 56
    size = [np.log(39 / 8), np.log(39 / 8), 1]
    raw = raw_with(0, [2, 2, *size, 0.8])
    raw[7] = [2 - 7 + shift / 8, 2, *size, 0.7, 0, 0]
    graph = Graph()
    nothing = graph.times(graph.add("ReduceSum", "images", keepdims=0), 0)
    graph.add("Add", graph.constant(raw[None]), nothing, output="output")
    content = graph.model({"images": (1, 3, 64, 64)}, {"output": (1, CELLS, 8)})
    (found,) = YoloxDetector(load(content)).detect([np.zeros((64, 64, 3), np.uint8)])
    assert len(found) == people


@pytest.mark.parametrize("batch", [1, "batch"])
def test_figures_are_found_where_they_stand_in_frames_of_any_size(
    load: Callable[[bytes], OnnxNetwork], batch: int | str
) -> None:
    people = YoloxDetector(load(detector(160, 128, batch)))
    frames = [
        figure(160, 128, 20, 30, 90, 60),
        np.zeros((90, 40, 3), np.uint8),
        figure(320, 200, 100, 40, 300, 120),
        figure(45, 64, 5, 10, 40, 33),
    ]
    whole, none, halved, doubled = people.detect(frames)
    np.testing.assert_allclose(whole, [[30, 20, 60, 90, PERSON_SCORE]], atol=1e-3)
    assert none.shape == (0, 5)
    # within a pixel of the network's picture
    np.testing.assert_allclose(halved, [[40, 100, 120, 300, PERSON_SCORE]], atol=2)
    np.testing.assert_allclose(doubled, [[10, 5, 33, 40, PERSON_SCORE]], atol=0.6)


def test_the_network_sees_blue_first(load: Callable[[bytes], OnnxNetwork], monkeypatch: pytest.MonkeyPatch) -> None:
    people = YoloxDetector(load(detector(64, 64)))
    seen: list[Any] = []
    answer = people.network.run

    def watched(pictures: Any) -> Any:
        seen.append(pictures)
        return answer(pictures)

    monkeypatch.setattr(people.network, "run", watched)
    people.detect([np.broadcast_to(np.array([10, 20, 30], np.uint8), (64, 64, 3))])
    assert seen[0][0, :, 0, 0].tolist() == [30, 20, 10]


def test_no_frames_give_no_boxes(load: Callable[[bytes], OnnxNetwork]) -> None:
    assert YoloxDetector(load(detector(64, 64))).detect([]) == []


def test_another_kind_of_network_is_named_with_what_it_gives(load: Callable[[bytes], OnnxNetwork]) -> None:
    with pytest.raises(WrongNetwork, match=r"network\.onnx.*\[n, 84, 5 \+ at least 1.*simcc_x \[n, 133, 128\]"):
        YoloxDetector(load(whole_body(64, 64)))


def test_a_detector_without_the_class_is_refused(load: Callable[[bytes], OnnxNetwork]) -> None:
    graph = Graph()
    graph.add("Reshape", "images", graph.integers(1, 32 * 64, 6), output="output")
    content = graph.model({"images": (1, 3, 64, 64)}, {"output": (1, 2048, 6)})
    with pytest.raises(WrongNetwork, match=r"output \[n, 2048, 6\]"):
        YoloxDetector(load(content))
    with pytest.raises(WrongNetwork, match="at least 81 classes"):
        YoloxDetector(load(detector(64, 64)), YoloxConfig(person=80))
