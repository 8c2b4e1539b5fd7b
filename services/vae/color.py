"""Colour correction: gives frames the colours of a reference frame.

A long video is made window by window, and every window drifts a little in colour from the one before; its frames are
therefore matched to a frame of that one. Frames are uint8 [n, H, W, 3] in sRGB, on any device.

Source: colour transfer by mean and deviation, Reinhard et al. 2001 (doi:10.1109/38.946629), in CIE Lab as Wan2GP does
it, commit 8681e9f; conversions and constants as in scikit-image (sRGB, illuminant D65, 2 degree observer).
"""

from __future__ import annotations

import torch
from torch import Tensor

_XYZ_FROM_RGB = torch.tensor(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
    dtype=torch.float64,
)
_RGB_FROM_XYZ = torch.linalg.inv(_XYZ_FROM_RGB)
_WHITE_XYZ = torch.tensor([0.95047, 1.0, 1.08883])


def match_colors(frames: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Shifts and scales L, a and b of every frame to the mean and deviation that they have in the reference.

    Args:
        frames: uint8 [n, H, W, 3]; one at a time is converted.
        reference: uint8 [H', W', 3].
        strength: 0 leaves the frames as they are, 1 replaces them, between is a blend in RGB.

    Returns:
        uint8 [n, H, W, 3].
    """
    std, mean = _std_mean(_lab_from_rgb(reference / 255))
    matched = torch.empty_like(frames)
    for i, frame in enumerate(frames):
        rgb = frame / 255
        blend = torch.lerp(rgb, _rgb_from_lab(_matched(_lab_from_rgb(rgb), std, mean)), strength)
        matched[i] = (blend * 255).round()
    return matched


def _matched(lab: Tensor, std: Tensor, mean: Tensor) -> Tensor:
    own_std, own_mean = _std_mean(lab)
    # a channel without variation is all mean
    scale = torch.where(own_std == 0, 0, std / own_std)
    return (lab - own_mean) * scale + mean


def _std_mean(lab: Tensor) -> tuple[Tensor, Tensor]:
    return torch.std_mean(lab, dim=(0, 1), correction=0)


def _lab_from_rgb(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> L in [0, 100], a and b about [-100, 100]; [H, W, 3] both."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = _mixed(linear, _XYZ_FROM_RGB) / _WHITE_XYZ.to(rgb)
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def _rgb_from_lab(lab: Tensor) -> Tensor:
    """The inverse of `_lab_from_rgb`; colours that sRGB does not have are clipped."""
    lightness, a, b = lab.unbind(-1)
    y = (lightness + 16) / 116
    roots = torch.stack([a / 500 + y, y, (y - b / 200).clamp_min(0)], dim=-1)
    xyz = torch.where(roots > 0.2068966, roots**3, (roots - 16 / 116) / 7.787) * _WHITE_XYZ.to(lab)
    linear = _mixed(xyz, _RGB_FROM_XYZ).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def _mixed(pixels: Tensor, matrix: Tensor) -> Tensor:
    # not a matrix product: those may be set to TF32 on a GPU, which is too coarse for colours
    return (pixels.unsqueeze(-2) * matrix.to(pixels)).sum(dim=-1)
