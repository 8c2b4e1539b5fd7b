"""People per frame, streamed; and one person bridged through a clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.pose.detect import YoloxDetector
from services.pose.keypoints import WholeBodyEstimator
from services.pose.onnx import OnnxNetwork, OnnxSettings
from services.pose.whole_body import Person, as_people, bridge, find_people
from training.tiny_onnx import PERSON_SCORE, colours, write_networks

NOSE, HEIGHT, WIDTH = 0, 80, 120


@pytest.fixture
def networks(tmp_path: Path) -> tuple[YoloxDetector, WholeBodyEstimator]:
    write_networks(tmp_path)
    settings = OnnxSettings(device="cpu", num_threads=1)
    return (
        YoloxDetector(OnnxNetwork.load(tmp_path / "detector.onnx", settings)),
        WholeBodyEstimator(OnnxNetwork.load(tmp_path / "whole_body.onnx", settings)),
    )


def frame_with_nose(x: int, y: int) -> np.ndarray:
    """A figure of 40 x 60 pixels at (30, 10) with a spot in the colour of the nose."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[10:70, 30:70] = 140
    frame[y - 2 : y + 3, x - 2 : x + 3] = colours()[NOSE]
    return frame


EMPTY = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


def person(x: float, scores: float = 0.9, box_score: float = 0.8) -> Person:
    keypoints = np.full((134, 3), x, np.float32)
    keypoints[:, 2] = scores
    return Person(np.array([x, 0, x + 0.2, 1], np.float32), box_score, keypoints)


def test_people_are_found_frame_by_frame_in_fractions_of_the_frame(
    networks: tuple[YoloxDetector, WholeBodyEstimator],
) -> None:
    noses = [(40, 20), (60, 30), (50, 60)]
    frames = [frame_with_nose(*noses[0]), EMPTY, frame_with_nose(*noses[1]), frame_with_nose(*noses[2])]
    found = list(find_people(frames, *networks, batch_frames=3))
    assert [len(people) for people in found] == [1, 0, 1, 1]
    for (x, y), (somebody,) in zip(noses, filter(None, found), strict=True):
        np.testing.assert_allclose(somebody.box, [30 / WIDTH, 10 / HEIGHT, 70 / WIDTH, 70 / HEIGHT], atol=0.01)
        assert somebody.score == pytest.approx(PERSON_SCORE)
        assert somebody.detected
        np.testing.assert_allclose(somebody.keypoints[NOSE, :2], [x / WIDTH, y / HEIGHT], atol=0.05)
        assert somebody.keypoints[NOSE, 2] > 0.8


def test_the_number_of_frames_looked_at_together_changes_nothing(
    networks: tuple[YoloxDetector, WholeBodyEstimator],
) -> None:
    frames = [frame_with_nose(35 + 3 * index, 30) for index in range(5)]
    together, alone = (list(find_people(frames, *networks, batch_frames=count)) for count in (8, 1))
    for (one,), (other,) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.keypoints, other.keypoints)
        np.testing.assert_array_equal(one.box, other.box)


def test_no_more_frames_are_taken_than_are_looked_at_together(
    networks: tuple[YoloxDetector, WholeBodyEstimator],
) -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield EMPTY

    found = find_people(endless(), *networks, batch_frames=3)
    for _ in range(4):
        next(found)
    assert taken == 6


def test_an_empty_frame_has_a_phantom_only_on_request(networks: tuple[YoloxDetector, WholeBodyEstimator]) -> None:
    assert list(find_people([EMPTY], *networks)) == [[]]
    ((somebody,), (phantom,)) = find_people([frame_with_nose(40, 20), EMPTY], *networks, phantom=True)
    assert somebody.detected
    assert not phantom.detected
    np.testing.assert_array_equal(phantom.box, [0, 0, 1, 1])
    assert phantom.keypoints.shape == (134, 3)


def test_people_by_part_keep_their_own_hands() -> None:
    people = as_people([person(0.25), person(0.75)], "own")
    assert people.detected
    np.testing.assert_allclose(people.boxes[:, 0], [0.25, 0.75])
    np.testing.assert_allclose(people.hands[:, :, 0, 0], [[0.25, 0.25], [0.75, 0.75]])
    np.testing.assert_allclose(as_people([person(0.25), person(0.75)], "stacked").hands[:, :, 0, 0], [[0.25, 0.75]] * 2)


def test_a_phantom_has_points_and_no_box() -> None:
    people = as_people([person(0.0, box_score=0.0)], "own")
    assert (len(people), len(people.boxes), people.detected) == (1, 0, False)


def test_nobody_is_nobody() -> None:
    people = as_people([], "own")
    assert (len(people), people.boxes.shape, people.hands.shape) == (0, (0, 4), (0, 2, 21, 2))


def test_missing_frames_are_bridged_in_a_straight_line() -> None:
    clip = [person(0.0), None, None, None, person(0.4)]
    bridged, missing = bridge(clip)
    assert missing == [1, 2, 3]
    np.testing.assert_allclose([one.keypoints[7, 0] for one in bridged], [0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)
    np.testing.assert_allclose([one.box[2] for one in bridged], [0.2, 0.3, 0.4, 0.5, 0.6], atol=1e-6)


def test_each_gap_is_bridged_from_its_own_neighbours() -> None:
    bridged, missing = bridge([person(0.0), None, person(0.2), None, person(0.8)])
    assert missing == [1, 3]
    np.testing.assert_allclose([bridged[1].box[0], bridged[3].box[0]], [0.1, 0.5], atol=1e-6)


def test_before_the_first_and_after_the_last_a_person_stands_still() -> None:
    first, last = person(0.3), person(0.5)
    bridged, missing = bridge([None, None, first, last, None])
    assert missing == [0, 1, 4]
    assert bridged[0] is bridged[1] is bridged[2] is first
    assert bridged[4] is bridged[3] is last


def test_a_point_seen_on_one_side_only_is_not_seen_in_between() -> None:
    seen, unseen = person(0.0, scores=0.9, box_score=0.9), person(0.4, scores=0.1, box_score=0.5)
    for clip in ([seen, None, unseen], [unseen, None, seen]):
        middle = bridge(clip)[0][1]
        np.testing.assert_allclose(middle.keypoints[:, 2], 0.1)
        assert middle.score == 0.5


def test_what_is_known_stays_as_it_is() -> None:
    clip = [person(0.1), None, person(0.2)]
    bridged, _ = bridge(clip)
    assert bridged[0] is clip[0]
    assert bridged[2] is clip[2]
    assert bridge([clip[0]]) == ([clip[0]], [])


def test_bridging_does_not_change_the_neighbours() -> None:
    clip = [person(0.0, scores=0.9), None, person(0.4, scores=0.1)]
    bridge(clip)
    assert clip[0] is not None
    assert (clip[0].keypoints[:, 2] == np.float32(0.9)).all()


def test_a_person_who_is_nowhere_cannot_be_bridged() -> None:
    with pytest.raises(ValueError, match="in no frame"):
        bridge([None, None])
