"""Ready pose videos -> pose frames at the size that the denoiser takes. numpy and Pillow only.

Pose frames are at half the size of the video to be made: the mean of each 2x2 block, as levels in float16, which holds
these means exactly (a quarter is the smallest step, 255 the largest value).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

Frame = npt.NDArray[np.uint8]

_QUARTERS = (np.arange(4 * 255 + 1) / 4).astype(np.float16)


def cover(frame: Frame, height: int, width: int) -> Frame:
    """Scales a frame so that it covers height x width, and crops it at its centre.

    Args:
        frame: uint8 [h, w, 3].

    Returns:
        uint8 [height, width, 3].

    Source: zai-org/SCAIL 33122ea data_video.py (bicubic on 8-bit frames, centre crop).
    """
    source_height, source_width = frame.shape[:2]
    if (source_height, source_width) == (height, width):
        return frame
    # the part of the source that is seen; whole numbers up to the last division, so that it never exceeds the source
    box_height = min(source_height, source_width * height / width)
    box_width = min(source_width, source_height * width / height)
    top, left = (source_height - box_height) / 2, (source_width - box_width) / 2
    box = (left, top, source_width - left, source_height - top)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box))


def cover_whole(frame: Frame, height: int, width: int) -> Frame:
    """As `cover`, but the scaled frame is rounded to whole pixels and whole pixels are cropped.

    Source: zai-org/SCAIL-Pose 830da75 (torchvision's resize of 8-bit frames, antialiased, then its centre crop).
    """
    source_height, source_width = frame.shape[:2]
    scale = max(height / source_height, width / source_width)
    scaled_height, scaled_width = max(height, int(source_height * scale)), max(width, int(source_width * scale))
    scaled = Image.fromarray(frame).resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return np.asarray(scaled)[top : top + height, left : left + width]


def halve(frame: Frame) -> npt.NDArray[np.float16]:
    """uint8 [H, W, 3], H and W even -> float16 [H / 2, W / 2, 3], levels 0 to 255."""
    height, width, channels = frame.shape
    rows = frame[0::2].astype(np.uint16)
    rows += frame[1::2]
    # along whole rows, of which every other pixel is then left out: numpy adds few numbers at a time slowly
    rows = rows.reshape(height // 2, width * channels)
    rows[:, :-channels] += rows[:, channels:]
    sums = np.ascontiguousarray(rows.reshape(height // 2, width // 2, 2, channels)[:, :, 0])
    # float16 is slow to compute with; there are 1021 sums
    return np.take(_QUARTERS, sums, mode="clip")


def whole_latents(num_frames: int, limit: int = 0) -> int:
    """The largest 4k + 1 that is at most `num_frames` and, unless that is 0, `limit`."""
    most = min(num_frames, limit) if limit else num_frames
    return (most - 1) // 4 * 4 + 1
