"""Small pictures and pose videos for the system's tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image


def write_picture(path: Path, height: int = 96, width: int = 96) -> Path:
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 90)], axis=-1)
    Image.fromarray(picture.astype(np.uint8)).save(path)
    return path


def write_pose_video(path: Path, num_frames: int = 9, height: int = 96, width: int = 96, rate: int = 12) -> Path:
    """A bar that moves over black."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(num_frames):
            frame = np.zeros((height, width, 3), np.uint8)
            left = 4 + (number * 7) % (width - 16)
            frame[10:-10, left : left + 8] = (255, 85, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def read_video(path: Path) -> npt.NDArray[np.uint8]:
    """[frames, height, width, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
