"""Reading video files, bounded before anything is decoded. Needs no torch.

A file comes as bytes (an asset that travelled as a tensor) or as a path; frames are RGB, uint8 [height, width, 3], turned
upright.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream

from bunraku.errors import InvalidRequest

Frame = npt.NDArray[np.uint8]
Source = Path | memoryview


@dataclass(frozen=True)
class VideoLimits:
    """What is read at most.

    Attributes:
        max_pixels: of a frame.
        max_frames: frames that are looked at; a longer video is read up to here.
    """

    max_pixels: int = 4096 * 4096
    max_frames: int = 10_000


@dataclass(frozen=True)
class VideoInfo:
    """What a video is.

    Attributes:
        num_frames: frames that can be decoded, up to the limit.
        frames_per_second: average; exact as a fraction.
    """

    num_frames: int
    frames_per_second: Fraction
    height: int
    width: int


def read_info(source: Source, field: str, limits: VideoLimits = VideoLimits()) -> VideoInfo:
    """Decodes a video once to see what it holds.

    Args:
        source: the file.
        field: what to call it in an error.
        limits: bounds.

    Raises:
        InvalidRequest: it is empty, corrupt, no video, over the limits, or changes its size.
    """
    count, height, width, rate = 0, 0, 0, Fraction(0)
    with _Reader(source, field, limits) as reader:
        rate = reader.rate
        for frame in reader.frames():
            count, (height, width) = count + 1, _upright_size(frame)
    if count == 0:
        raise InvalidRequest((field, "holds no frame that can be decoded"))
    return VideoInfo(count, rate, height, width)


def read_frames(source: Source, field: str, limits: VideoLimits = VideoLimits()) -> Iterator[Frame]:
    """The frames of a video, one at a time. Arguments and errors as in `read_info`."""
    with _Reader(source, field, limits) as reader:
        for frame in reader.frames():
            yield _upright(frame)


class _Reader:
    """An open video file; errors of the decoder become InvalidRequest."""

    def __init__(self, source: Source, field: str, limits: VideoLimits) -> None:
        self._field, self._limits = field, limits
        self._container: InputContainer
        try:
            self._container = av.open(str(source) if isinstance(source, Path) else io.BytesIO(source), mode="r")
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise InvalidRequest((field, f"is not a video that can be read ({_reason(error)})")) from error

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()

    @property
    def _stream(self) -> VideoStream:
        if not self._container.streams.video:
            raise InvalidRequest((self._field, "has no video stream"))
        return self._container.streams.video[0]

    @property
    def rate(self) -> Fraction:
        rate = self._stream.average_rate or self._stream.base_rate
        if not rate or not 0 < rate <= 1000:
            raise InvalidRequest((self._field, "has no usable frame rate"))
        return Fraction(rate)

    def frames(self) -> Iterator[av.VideoFrame]:
        stream = self._stream
        self._check_pixels(stream.codec_context.height, stream.codec_context.width)
        stream.thread_type = "AUTO"
        first: tuple[int, int] | None = None
        try:
            for count, frame in enumerate(self._container.decode(stream)):
                if count == self._limits.max_frames:
                    return
                size = (frame.height, frame.width)
                self._check_pixels(*size)
                first = first or size
                if size != first:
                    raise InvalidRequest(
                        (
                            self._field,
                            f"changes its size from {first[1]}x{first[0]} to {size[1]}x{size[0]} at frame {count}",
                        )
                    )
                yield frame
        except av.error.FFmpegError as error:
            raise InvalidRequest((self._field, f"cannot be decoded ({_reason(error)})")) from error

    def _check_pixels(self, height: int, width: int) -> None:
        if height * width > self._limits.max_pixels:
            text = f"has frames of {width}x{height}, more than {self._limits.max_pixels} pixels"
            raise InvalidRequest((self._field, text))


def _upright(frame: av.VideoFrame) -> Frame:
    picture = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, k=_quarter_turns(frame)))


def _upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    size = (frame.height, frame.width)
    return size if _quarter_turns(frame) % 2 == 0 else (size[1], size[0])


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise turns that bring a frame upright; telephones film lying and say so in the file."""
    return round(frame.rotation / 90) % 4


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
