"""Whom to draw, whose hands they have, and what the 3D estimator is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tests.parity.pose_render  # noqa: F401 (registers the checks)
from services.pose.people import grown_rectangle, largest, only_inside, pair_hands
from tests.parity.cases import Case
from tests.parity.families import check_for
from tests.services.pose.figures import person

GOLDENS = Path(__file__).parents[2] / "goldens"


def test_stored_case_passes() -> None:
    check = check_for("pose-pick")
    assert check is not None
    assert [each.name for each in check(Case("pose-pick", GOLDENS)) if not each.verdict()[0]] == []


def test_largest_boxes_come_first_and_equal_ones_keep_their_order() -> None:
    boxes = np.array([[0, 0, 0.2, 0.5], [0, 0, 0.5, 0.5], [0.1, 0.1, 0.6, 0.6], [0, 0, 0.9, 0.1]])
    assert largest(boxes, 3) == [1, 2, 0]
    assert largest(boxes, 9) == [1, 2, 0, 3]
    assert largest(boxes[:0], 2) == []


@pytest.mark.parametrize(
    ("setting", "rows"), [("own", [[0, 3], [1, 4], [2, 5]]), ("stacked", [[0, 1], [2, 3], [4, 5]])]
)
def test_hands_belong_to_their_person_or_are_read_as_the_references_do(setting: str, rows: list[list[int]]) -> None:
    stacked = np.arange(6, dtype=np.float64)[:, None, None] * np.ones((1, 21, 2))
    paired = pair_hands(stacked, "own" if setting == "own" else "stacked")
    assert paired.shape == (3, 2, 21, 2)
    assert paired[:, :, 0, 0].tolist() == rows


def test_one_persons_hands_are_the_same_either_way() -> None:
    stacked = np.random.default_rng(0).normal(size=(2, 21, 2))
    assert (pair_hands(stacked, "own") == pair_hands(stacked, "stacked")).all()


def test_rectangle_grows_more_in_height_and_stays_in_the_frame() -> None:
    assert grown_rectangle((0.5, 0.5, 0.6, 0.6), 100, 200) == (95, 45, 125, 65)
    assert grown_rectangle((0.01, 0.01, 0.99, 0.99), 100, 200) == (0, 0, 200, 100)
    # edges between pixels go outwards
    assert grown_rectangle((0.501, 0.501, 0.601, 0.601), 100, 200) == (95, 45, 126, 66)


def test_everything_outside_the_rectangle_is_black_and_the_frame_is_left_alone() -> None:
    frame = np.full((20, 40, 3), 9, np.uint8)
    alone = only_inside(frame, (0.5, 0.5, 0.75, 0.75))
    assert alone.shape == frame.shape
    assert (alone[9:16, 19:31] == 9).all()
    assert alone.sum() == 9 * 7 * 12 * 3
    assert (frame == 9).all()


def test_picking_keeps_the_order_asked_for_and_detects_nobody_where_nobody_was() -> None:
    three = person(3)
    picked = three.pick([2, 0])
    assert (picked.bodies == three.bodies[[2, 0]]).all()
    assert (picked.boxes == three.boxes[[2, 0]]).all()
    assert picked.detected
    assert not person(1, detected=False).pick([0]).detected
    assert len(three.pick([])) == 0
