"""Colour correction against a plain formula in numpy, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from services.vae.color import match_colors

Picture = npt.NDArray[np.float64]
WHITE = (0.95047, 1.0, 1.08883)
MATRIX = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])


def to_lab(rgb: Picture) -> Picture:
    """One pixel after the other, float64."""
    lab = np.empty_like(rgb)
    for index in np.ndindex(*rgb.shape[:-1]):
        linear = [((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in rgb[index]]
        ratios = MATRIX @ linear / WHITE
        x, y, z = (np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in ratios)
        lab[index] = 116 * y - 16, 500 * (x - y), 200 * (y - z)
    return lab


def to_rgb(lab: Picture) -> Picture:
    rgb = np.empty_like(lab)
    for index in np.ndindex(*lab.shape[:-1]):
        y = (lab[index][0] + 16) / 116
        roots = (y + lab[index][1] / 500, y, max(y - lab[index][2] / 200, 0))
        xyz = [w * (r**3 if r > 0.2068966 else (r - 16 / 116) / 7.787) for r, w in zip(roots, WHITE, strict=True)]
        linear = np.linalg.solve(MATRIX, xyz)
        rgb[index] = [1.055 * v ** (1 / 2.4) - 0.055 if v > 0.0031308 else 12.92 * v for v in linear]
    return rgb.clip(0, 1)


def expected(frame: Tensor, reference: Tensor, strength: float) -> npt.NDArray[np.float64]:
    """The corrected frame in levels, not rounded."""
    rgb = frame.numpy() / 255
    lab, goal = to_lab(rgb), to_lab(reference.numpy() / 255)
    for channel in range(3):
        own, other = lab[..., channel], goal[..., channel]
        scale = 0 if np.ptp(own) == 0 else other.std() / own.std()
        lab[..., channel] = (own - own.mean()) * scale + other.mean()
    return ((1 - strength) * rgb + strength * to_rgb(lab)) * 255


def picture(seed: int, low: int = 0, high: int = 256, size: tuple[int, ...] = (9, 7, 3)) -> Tensor:
    return torch.randint(low, high, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize(("low", "high"), [(0, 256), (60, 130), (0, 12), (230, 256)])
def test_frames_take_the_statistics_of_the_reference(low: int, high: int, strength: float) -> None:
    frames = torch.stack([picture(1), picture(2, low, high)])
    reference = picture(3, 40, 200, (5, 6, 3))
    matched = match_colors(frames, reference, strength)
    assert matched.dtype == torch.uint8
    for frame, result in zip(frames, matched, strict=True):
        # half a level for rounding, and float32
        assert np.abs(result.numpy() - expected(frame, reference, strength)).max() < 0.51


def test_dark_reference_gives_the_darks_of_the_formula() -> None:
    frame, reference = picture(1), picture(3, 0, 12)
    matched = match_colors(frame[None], reference, 1.0)[0]
    assert np.abs(matched.numpy() - expected(frame, reference, 1.0)).max() < 0.51


def test_colours_that_the_screen_does_not_have_are_clipped() -> None:
    frame = picture(1)
    black_and_yellow = torch.tensor([[[0, 0, 0]], [[255, 255, 0]]], dtype=torch.uint8)
    goal = expected(frame, black_and_yellow, 1.0)
    assert (goal == 0).any()
    assert (goal == 255).any()
    assert np.abs(match_colors(frame[None], black_and_yellow, 1.0)[0].numpy() - goal).max() < 0.51


def test_strength_zero_changes_nothing() -> None:
    frames = torch.stack([picture(1), torch.full((9, 7, 3), 77, dtype=torch.uint8)])
    assert torch.equal(match_colors(frames, picture(3), 0.0), frames)


def test_frame_matched_to_itself_stays() -> None:
    frame = picture(5, size=(32, 32, 3))
    assert torch.equal(match_colors(frame[None], frame, 1.0)[0], frame)


def test_channel_without_variation_becomes_the_mean_of_the_reference() -> None:
    flat = torch.tensor([200, 30, 90], dtype=torch.uint8).expand(1, 8, 8, 3)
    reference = picture(3, size=(8, 8, 3))
    matched = match_colors(flat, reference, 1.0)[0]
    mean = to_rgb(to_lab(reference.numpy() / 255).mean((0, 1))[None]) * 255
    assert torch.equal(matched, matched[:1, :1].expand_as(matched))
    assert np.abs(matched[0, 0].numpy() - mean[0]).max() < 0.51


def test_each_frame_is_matched_on_its_own() -> None:
    frames, reference = torch.stack([picture(seed, 20 * seed, 255) for seed in range(4)]), picture(9)
    together = match_colors(frames, reference, 1.0)
    alone = [match_colors(frame[None], reference, 1.0)[0] for frame in frames]
    assert torch.equal(together, torch.stack(alone))
