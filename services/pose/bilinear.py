"""Pictures read at places between their pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.floating[Any]]
Frame = npt.NDArray[np.uint8]


def bilinear(frame: Frame, rows: Floats, columns: Floats, outside: Literal["edge", "black"]) -> Frame:
    """A grid of places in a picture, each mixed from the four pixels around it; scaling down does not blur first.

    Args:
        frame: uint8 [H, W, C].
        rows, columns: [h] and [w], places in pixels; whole numbers are the middles of pixels.
        outside: what lies beyond the picture: its own outermost pixels, or black.

    Returns:
        uint8 [h, w, C], rounded.

    Source: OpenCV's INTER_LINEAR with exact weights. OpenCV 4, and resize in OpenCV 5, take weights of 11 bits or 1/32
    pixel instead and differ by a level or, in warps, a few.
    """
    height, width, channels = frame.shape
    above, below, row_weights = _taps(rows, height, outside)
    left, right, column_weights = _taps(columns, width, outside)
    # pixels and channels as one axis: numpy gathers from a flat row several times faster than triples
    flat = frame.reshape(height, width * channels)
    mixed = flat[above] * row_weights[0][:, None] + flat[below] * row_weights[1][:, None]
    channel = np.arange(channels)
    left, right = ((first[:, None] * channels + channel).ravel() for first in (left, right))
    column_weights = np.repeat(column_weights, channels, axis=1)
    mixed = np.take(mixed, left, axis=1) * column_weights[0] + np.take(mixed, right, axis=1) * column_weights[1]
    levels: Frame = np.rint(mixed).astype(np.uint8).reshape(len(rows), len(columns), channels)
    return levels


def bilinear_on_device(
    frames: Tensor, which: Tensor, rows: Floats, columns: Floats, outside: Literal["edge", "black"]
) -> Tensor:
    """As `bilinear`, to the last bit, of pictures on any device.

    Args:
        frames: uint8 [N, H, W, C].
        which: int64 [n], on the host: the picture that each grid is read from.
        rows, columns: [n, h] and [n, w].

    Returns:
        uint8 [n, h, w, C], on the device.
    """
    _, height, width, channels = frames.shape

    def taps(places: Floats, size: int) -> Iterator[Tensor]:
        """Indices int64 [n, k] of the pixels before and after, and their weights float32 [n, k]."""
        before, after, weights = _taps(places, size, outside)
        return (torch.from_numpy(values).to(frames.device) for values in (before, after, *weights))

    above, below, above_weight, below_weight = taps(rows, height)
    left, right, left_weight, right_weight = (values[:, None, :, None] for values in taps(columns, width))
    # one row after the other of all pictures; separate operations, since a fused one rounds once less
    picture = which.to(frames.device)[:, None] * height
    flat = frames.reshape(-1, width * channels)
    mixed = flat[picture + above] * above_weight[..., None] + flat[picture + below] * below_weight[..., None]
    mixed = torch.unflatten(mixed, -1, (width, channels))  # [n, h, W, C]
    size = (*mixed.shape[:2], left.shape[2], channels)
    left_pixels, right_pixels = (mixed.gather(2, index.expand(size)) for index in (left, right))
    return (left_pixels * left_weight + right_pixels * right_weight).round().to(torch.uint8)


def _taps(
    places: Floats, size: int, outside: Literal["edge", "black"]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Indices of the pixels before and after each place on an axis of `size`, and their weights, float32 [2, ...]."""
    floor = np.floor(places)
    after = places - floor
    weights = np.stack([1 - after, after])
    indices = np.stack([floor, floor + 1])
    if outside == "black":
        weights = np.where((indices >= 0) & (indices < size), weights, 0)
    before, behind = np.clip(indices, 0, size - 1).astype(np.intp)
    return before, behind, weights.astype(np.float32)
