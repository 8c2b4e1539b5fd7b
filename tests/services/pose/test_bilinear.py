"""Reading pictures between their pixels."""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
import pytest

from services.pose.bilinear import bilinear


def slow(frame: np.ndarray, row: float, column: float, outside: str) -> np.ndarray:
    """One place, by the definition."""
    height, width = frame.shape[:2]
    mixed = np.zeros(frame.shape[2])
    for y, x in product(
        (int(np.floor(row)), int(np.floor(row)) + 1), (int(np.floor(column)), int(np.floor(column)) + 1)
    ):
        weight = (1 - abs(row - y)) * (1 - abs(column - x))
        inside = 0 <= y < height and 0 <= x < width
        if inside or outside == "edge":
            mixed += weight * frame[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
    return mixed


@pytest.mark.parametrize("outside", ["edge", "black"])
def test_every_place_is_the_mean_of_the_four_pixels_around_it(outside: Literal["edge", "black"]) -> None:
    generator = np.random.default_rng(0)
    frame = generator.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    rows, columns = generator.uniform(-2, 9, 11), generator.uniform(-2, 7, 13)
    read = bilinear(frame, rows, columns, outside)
    expected = np.array([[slow(frame, row, column, outside) for column in columns] for row in rows])
    # half a level of rounding
    assert np.abs(read - expected).max() < 0.501


def test_whole_places_give_the_pixels_themselves() -> None:
    frame = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    assert (bilinear(frame, np.array([3.0, 0.0]), np.array([1.0]), "black") == frame[[3, 0], 1:]).all()


def test_a_grey_picture_may_have_any_number_of_channels() -> None:
    frame = np.array([[[0], [100]]], np.uint8)
    assert bilinear(frame, np.array([0.0]), np.array([0.25]), "edge").tolist() == [[[25]]]
