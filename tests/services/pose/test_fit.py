"""Fitting frames: covering, cropping, halving, whole latents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.pose.fit import Frame, cover, halve, whole_latents
from tests.services.pose.videos import noise


def test_a_frame_of_the_right_size_stays_as_it_is() -> None:
    [frame] = noise(1, 32, 64)
    assert np.array_equal(cover(frame, 32, 64), frame)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 8), st.integers(1, 8))
def test_a_frame_of_any_size_covers_any_size(height: int, width: int, rows: int, columns: int) -> None:
    fitted = cover(np.full((height, width, 3), 130, np.uint8), 32 * rows, 32 * columns)
    assert fitted.shape == (32 * rows, 32 * columns, 3)
    assert fitted.dtype == np.uint8
    # nothing is put beside the picture
    assert (fitted == 130).all()


@pytest.mark.parametrize(
    ("height", "width", "wanted"), [(107, 49, (96, 128)), (49, 107, (128, 96)), (1, 4096, (64, 32))]
)
def test_a_frame_whose_scale_is_no_short_number_covers_too(height: int, width: int, wanted: tuple[int, int]) -> None:
    assert cover(np.zeros((height, width, 3), np.uint8), *wanted).shape == (*wanted, 3)


def marked(height: int, width: int, rows: slice, columns: slice) -> Frame:
    """White where the slices are."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[rows, columns] = 255
    return frame


def test_what_is_too_wide_is_cropped_at_both_sides_alike() -> None:
    frame = noise(1, 32, 96)[0]
    assert np.array_equal(cover(frame, 32, 32), frame[:, 32:64])


def test_what_is_too_high_is_cropped_above_and_below_alike() -> None:
    frame = noise(1, 100, 32)[0]
    assert np.array_equal(cover(frame, 32, 32), frame[34:66])


def test_a_frame_is_scaled_evenly_until_it_covers() -> None:
    # 60 rows become 120, 40 columns 80, and the outer 12 rows on each side are cut off
    fitted = cover(marked(60, 40, slice(20, 40), slice(0, 20)), 96, 80)
    rows, columns = np.nonzero(fitted[..., 0] > 127)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (28, 67, 0, 39)


def test_scaling_is_bicubic() -> None:
    # which goes beyond the levels on both sides of an edge, as a linear one does not
    edge = np.where(np.arange(32) < 16, 100, 200).astype(np.uint8)
    fitted = cover(np.broadcast_to(edge[None, :, None], (32, 32, 3)).copy(), 64, 64)
    assert 90 < fitted.min() < 97
    assert 203 < fitted.max() < 210


def test_halving_gives_the_exact_means_of_squares() -> None:
    [frame] = noise(1, 64, 32)
    halved = halve(frame)
    assert halved.dtype == np.float16
    assert halved.shape == (32, 16, 3)
    for row, column, channel in np.ndindex(32, 16, 3):
        square = [int(frame[2 * row + i, 2 * column + j, channel]) for i in (0, 1) for j in (0, 1)]
        assert float(halved[row, column, channel]) == sum(square) / 4


def test_every_mean_of_four_levels_is_a_float16() -> None:
    sums = np.arange(4 * 255 + 1)
    # four levels of which the first three are as even as can be
    levels = np.stack([(sums + i) // 4 for i in range(4)]).astype(np.uint8)
    frame = levels.reshape(2, 2, -1, 1).transpose(0, 2, 1, 3).reshape(2, -1, 1)
    assert np.array_equal(halve(frame)[0, :, 0].astype(np.float64), sums / 4)


def test_a_clip_is_cut_down_to_whole_latents() -> None:
    assert [whole_latents(n) for n in (1, 4, 5, 6, 8, 9, 81, 84)] == [1, 1, 5, 5, 5, 9, 81, 81]
    assert [whole_latents(n, limit=13) for n in (5, 12, 13, 14, 100)] == [5, 9, 13, 13, 13]
