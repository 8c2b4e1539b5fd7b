"""A driving clip as the steps of an extraction see it: frames of the size of the video to be made, a few at a time.

Where a mask video says where people are to be looked for, all else is black, as in deepbeepmeep/Wan2GP 8681e9f.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from runtime.gpu import raise_if_cancelled
from services.pose.fit import cover_whole
from services.pose.threads import ahead

Frame = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Fit = Literal["lanczos", "bicubic"]

CLIPS_AT_A_TIME = 2  # unless BUNRAKU_MAX_CONCURRENT says otherwise
_TOGETHER, _TOGETHER_ON_GPU, _PIXELS_TOGETHER = 16, 32, 32 * 512 * 896
_FRAMES_AHEAD = 16
_BRIGHT = 127
"""Levels above this are within a mask."""
_ROUNDS = 3
"""A mask is grown by so many steps of the width that is asked for."""


@dataclass(frozen=True)
class Batch:
    """How much of a clip is worked on at once; less takes less memory and more time, and finds and draws the same.

    Attributes:
        frames: that are in memory, looked at and drawn together.
        crops: of people, that are located in 3D together; None: as many as the estimator likes.
        tiles: of pictures, that are drawn together; None: what suits the device.
    """

    frames: int
    crops: int | None = None
    tiles: int | None = None


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
        with closing(ahead(self._sources(repeat(None)), _FRAMES_AHEAD, self._shown)) as shown:
            yield from shown

    def batches(self, size: int, change: Callable[[int, Frame], Frame] | None = None) -> Iterator[list[Frame]]:
        """The frames as people are looked for in them, so many at a time: black outside the region.

        While a batch is worked on, the next is decoded and scaled.

        Args:
            change: makes something else of the frame with this number, in another thread.
        """

        def shown_of(numbered: tuple[int, tuple[Frame, Frame | None]]) -> Frame:
            number, source = numbered
            return self._shown(source) if change is None else change(number, self._shown(source))

        regions = repeat(None) if self.read_region is None else self.read_region()
        numbered = (one for one in enumerate(self._sources(regions)))
        with closing(ahead(numbered, size, shown_of)) as shown:
            while batch := list(islice(shown, size)):
                yield batch

    def _sources(self, regions: Iterator[Frame | None]) -> Generator[tuple[Frame, Frame | None]]:
        """The frames as they are in their video, with their regions."""
        yield from zip(islice(self.read(), self.num_frames), regions, strict=False)

    def _shown(self, source: tuple[Frame, Frame | None]) -> Frame:
        frame, region = source
        fitted = covering(frame, self.height, self.width, self.fit)
        if region is None:
            return fitted
        mask = grown(bright(region, *frame.shape[:2]), self.grow_px)
        return np.where(mask_covering(mask, self.height, self.width)[..., None], fitted, np.uint8(0))


def whole_batch(height: int, width: int, *, on_gpu: bool) -> Batch:
    """How much is worked on at once where memory is not short."""
    return Batch(frames_together(height, width, on_gpu=on_gpu))


def frames_together(height: int, width: int, *, on_gpu: bool) -> int:
    """How many frames are in memory, and worked on, together: what keeps a GPU busy; fewer where they are large."""
    return max(1, min(_TOGETHER_ON_GPU if on_gpu else _TOGETHER, _PIXELS_TOGETHER // (height * width)))


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
