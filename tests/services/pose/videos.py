"""Small video files, made in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

Frame = npt.NDArray[np.uint8]


def noise(num_frames: int, height: int, width: int, seed: int = 0) -> list[Frame]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(num_frames)]


def lossless_mp4(frames: Sequence[Frame], rate: int = 16) -> bytes:
    """An MP4 whose frames are decoded as they are given here, bit for bit."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=rate, options={"qp": "0"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def changing_size(*sizes: tuple[int, int]) -> bytes:
    """A QuickTime file with five JPEG pictures of each (height, width)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("mjpeg", rate=16)
        (stream.height, stream.width), stream.pix_fmt = sizes[0], "yuvj420p"
        for number, frame in enumerate(frame for height, width in sizes for frame in noise(5, height, width)):
            picture = io.BytesIO()
            Image.fromarray(frame).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, 16)
            packet.pts = packet.dts = number
            container.mux(packet)
    return file.getvalue()


def sound_only() -> bytes:
    """An MP4 without pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
