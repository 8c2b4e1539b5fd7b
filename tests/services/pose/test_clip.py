"""Frames brought to size, and regions of mask videos."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.nn import functional

from services.pose.clip import Clip, bright, covering, frames_together, grown, mask_covering
from services.pose.fit import halve
from tests.services.pose.videos import noise

Frame = npt.NDArray[np.uint8]


def test_frames_are_covered_with_lanczos_about_their_centre() -> None:
    [frame] = noise(1, 50, 32)
    box = (0, (50 - 32 * 64 / 96) / 2, 32, (50 + 32 * 64 / 96) / 2)
    expected = Image.fromarray(frame).resize((96, 64), Image.Resampling.LANCZOS, box=box)
    np.testing.assert_array_equal(covering(frame, 64, 96), np.asarray(expected))
    [same] = noise(1, 64, 96)
    np.testing.assert_array_equal(covering(same, 64, 96), same)


@pytest.mark.parametrize("size", [(50, 32), (41, 200), (128, 190), (64, 97)])
def test_official_frames_are_scaled_bicubically_to_whole_pixels_and_cropped(size: tuple[int, int]) -> None:
    # smooth, since 8-bit pictures are rounded between the two passes
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 255
    smooth = functional.interpolate(coarse, size, mode="bicubic").clamp(0, 255).to(torch.uint8)
    height, width = 64, 96
    scale = max(height / size[0], width / size[1])
    scaled = [max(least, int(side * scale)) for side, least in zip(size, (height, width), strict=True)]
    resized = functional.interpolate(smooth.float(), scaled, mode="bicubic", antialias=True, align_corners=False)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    expected = resized[0, :, top : top + height, left : left + width].permute(1, 2, 0).clamp(0, 255)
    frame = np.ascontiguousarray(smooth[0].permute(1, 2, 0).numpy())
    found = covering(frame, height, width, "bicubic")
    assert found.shape == (height, width, 3)
    assert np.abs(found - expected.numpy()).max() <= 1.5


def test_a_mask_is_what_is_brighter_than_half() -> None:
    levels = np.repeat(np.array([[0, 127, 128, 255]], np.uint8)[..., None], 3, axis=2)
    assert bright(levels, 1, 4).tolist() == [[False, False, True, True]]
    assert bright(levels, 2, 8)[1].tolist() == [False] * 4 + [True] * 4


# OpenCV 4: getStructuringElement(MORPH_ELLIPSE, (n, n))
ELLIPSES = {
    1: ["1"],
    2: ["01", "11"],
    3: ["010", "111", "010"],
    5: ["00100", "11111", "11111", "11111", "00100"],
}


@pytest.mark.parametrize("size", ELLIPSES)
def test_masks_grow_by_an_ellipse_three_times(size: int) -> None:
    brush = np.array([[int(cell) for cell in row] for row in ELLIPSES[size]], bool)
    expected = np.random.default_rng(size).random((23, 31)) > 0.97
    mask, middle = expected.copy(), size // 2
    for _ in range(3):
        padded = np.pad(expected, size)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size))[size - middle :, size - middle :]
        expected = (windows[:23, :31] & brush).any(axis=(2, 3))
    np.testing.assert_array_equal(grown(mask, size), expected)
    np.testing.assert_array_equal(grown(~mask, -size), ~expected)
    np.testing.assert_array_equal(grown(mask, 0), mask)


def test_a_brush_larger_than_the_picture_covers_it() -> None:
    mask = np.zeros((6, 9), bool)
    mask[3, 4] = True
    assert grown(mask, 50).all()


def test_masks_are_fitted_without_values_in_between() -> None:
    mask = np.zeros((10, 40), bool)
    mask[:, 20:] = True
    assert mask_covering(mask, 20, 20)[:, 10:].all()
    assert not mask_covering(mask, 20, 20)[:, :10].any()


def test_people_are_looked_for_inside_the_region_only_and_frames_stay_whole() -> None:
    frames, region = noise(7, 16, 24), np.zeros((8, 12, 3), np.uint8)
    region[2:6, 3:9] = 255

    def read(pictures: Sequence[Frame]) -> Any:
        def pictures_again() -> Iterator[Frame]:
            return iter(pictures)

        return pictures_again

    clip = Clip(read(frames), 5, 16, 24, read_region=read([region] * 9))
    seen = [frame for batch in clip.batches(2) for frame in batch]
    assert [len(batch) for batch in clip.batches(2)] == [2, 2, 1]
    inside = np.zeros((16, 24, 1), bool)
    inside[4:12, 6:18] = True
    np.testing.assert_array_equal(seen, np.where(inside, frames[:5], 0))
    np.testing.assert_array_equal(list(clip.frames()), frames[:5])
    larger = Clip(read(frames), 5, 16, 24, read_region=read([region] * 9), grow_px=1)
    np.testing.assert_array_equal(next(larger.batches(1))[0], seen[0])


def test_the_next_batch_is_read_and_scaled_while_one_is_looked_at() -> None:
    frames, reads = noise(9, 20, 30), list[int]()
    enough = threading.Event()

    def read() -> Iterator[Frame]:
        for index, frame in enumerate(frames):
            reads.append(index)
            if index == 5:
                enough.set()
            yield frame

    batches = Clip(read, 9, 16, 24).batches(3)
    first = next(batches)
    assert enough.wait(timeout=10)
    assert len(reads) <= 3 + 3 + 1
    np.testing.assert_array_equal(first + list(chain(*batches)), [covering(frame, 16, 24) for frame in frames])


def test_frames_may_be_changed_by_their_numbers() -> None:
    frames = noise(5, 16, 24)
    changed = Clip(lambda: iter(frames), 5, 16, 24).batches(2, lambda number, frame: frame // np.uint8(number + 1))
    np.testing.assert_array_equal(list(chain(*changed)), [frame // (number + 1) for number, frame in enumerate(frames)])


def test_fewer_large_frames_are_in_memory_together() -> None:
    sizes = [(512, 896), (720, 1280), (1088, 1920), (4096, 4096), (64, 64)]
    assert [frames_together(*size, on_gpu=True) for size in sizes] == [32, 15, 7, 1, 32]
    assert [frames_together(*size, on_gpu=False) for size in sizes] == [16, 15, 7, 1, 16]


def test_halves_are_means_to_the_last_bit() -> None:
    [frame] = noise(1, 32, 64)
    frame[:2, :2] = 255
    means = frame.reshape(16, 2, 32, 2, 3).astype(np.float64).mean(axis=(1, 3))
    np.testing.assert_array_equal(halve(frame).astype(np.float64), means)
