"""A driving clip as the steps of an extraction see it: frames of the size of the video to be made, a few at a time.

Where a mask video says where people are to be looked for, all else is black, as in deepbeepmeep/Wan2GP 8681e9f.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from runtime.gpu import raise_if_cancelled
from services.pose.fit import cover_whole

Frame = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Fit = Literal["lanczos", "bicubic"]

_BRIGHT = 127
"""Levels above this are within a mask."""
_ROUNDS = 3
"""A mask is grown by so many steps of the width that is asked for."""


@dataclass(frozen=True)
class Clip:
    """The driving video.

    Attributes:
        read: gives its num_frames frames, uint8 [h, w, 3] of any one size, from the first on, whenever it is called.
        height, width: of the video to be made.
        frames_per_second: of the driving video.
        fit: how frames are brought to that size.
        read_region: the same for a video that is bright where people are to be looked for; None: everywhere.
        grow_px: pixels that the bright region is grown by, less than 0 to shrink it.
    """

    read: Callable[[], Iterator[Frame]]
    num_frames: int
    height: int
    width: int
    frames_per_second: float = 16.0
    fit: Fit = "lanczos"
    read_region: Callable[[], Iterator[Frame]] | None = None
    grow_px: int = 0

    def frames(self) -> Iterator[Frame]:
        """The frames, uint8 [height, width, 3], whole."""
        for frame in islice(self.read(), self.num_frames):
            raise_if_cancelled()
            yield covering(frame, self.height, self.width, self.fit)

    def batches(self, size: int) -> Iterator[list[Frame]]:
        """The frames as people are looked for in them, so many at a time: black outside the region."""
        frames = self.frames() if self.read_region is None else self._inside(self.read_region())
        while batch := list(islice(frames, size)):
            yield batch

    def _inside(self, regions: Iterator[Frame]) -> Iterator[Frame]:
        for frame, region in zip(islice(self.read(), self.num_frames), regions, strict=False):
            raise_if_cancelled()
            mask = grown(bright(region, *frame.shape[:2]), self.grow_px)
            fitted = covering(frame, self.height, self.width, self.fit)
            yield np.where(mask_covering(mask, self.height, self.width)[..., None], fitted, np.uint8(0))


def covering(frame: Frame, height: int, width: int, fit: Fit = "lanczos") -> Frame:
    """A frame [h, w, 3] scaled to cover height x width and cropped at its centre.

    Source: `lanczos` deepbeepmeep/Wan2GP 8681e9f models/wan/scail (on 8-bit frames); `bicubic` zai-org/SCAIL-Pose
    830da75 (antialiased, to whole pixels, which are then cropped).
    """
    if frame.shape[:2] == (height, width):
        return frame
    if fit == "bicubic":
        return cover_whole(frame, height, width)
    return np.asarray(ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.LANCZOS))


def mask_covering(mask: Mask, height: int, width: int) -> Mask:
    """A mask [h, w] as `covering`, without values in between."""
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.NEAREST)).astype(bool)


def bright(region: Frame, height: int, width: int) -> Mask:
    """Where a frame of a mask video [h, w, 3] is bright, at another size: [height, width]."""
    grey = np.asarray(Image.fromarray(region).convert("L").resize((width, height), Image.Resampling.NEAREST))
    return np.asarray(grey > _BRIGHT)


def grown(mask: Mask, pixels: int) -> Mask:
    """A mask [H, W] whose edge is moved outward (inward below 0) by an elliptic brush of that width, three times."""
    if pixels == 0:
        return mask
    inside = mask if pixels > 0 else ~mask
    brush = _brush(abs(pixels))
    for _ in range(_ROUNDS):
        raise_if_cancelled()
        inside = _brushed(inside, brush)
    return inside if pixels > 0 else ~inside


def _brush(size: int) -> list[tuple[int, int, int]]:
    """Of each row of a disc of that width: rows below the middle, and its first and last column right of the middle.

    The disc is OpenCV's MORPH_ELLIPSE, its middle at size // 2.
    """
    radius = size // 2
    rows = []
    for row in range(-radius, size - radius):
        # within half a pixel of a size of 1 there is only the middle
        reach = round(radius * np.sqrt(1 - (row / radius) ** 2)) if radius else 0
        rows.append((row, -reach, min(reach, size - radius - 1)))
    return rows


def _brushed(inside: Mask, brush: Sequence[tuple[int, int, int]]) -> Mask:
    """Every pixel that has one of the mask [H, W] under the brush about it."""
    height, width = inside.shape
    reach = max(max(-left, right) for _, left, right in brush)
    counts = np.zeros((height, width + 2 * reach + 1), np.int32)
    np.cumsum(np.pad(inside, ((0, 0), (reach, reach))), axis=1, out=counts[:, 1:])
    result = np.zeros_like(inside)
    for row, left, right in brush:
        if abs(row) >= height:
            continue
        start, stop = reach + left, reach + right + 1
        hit = counts[:, stop : stop + width] > counts[:, start : start + width]
        source, target = slice(max(row, 0), height + min(row, 0)), slice(max(-row, 0), height + min(-row, 0))
        result[target] |= hit[source]
    return result
