"""Reading video files, bounded in bytes, pixels, frames and seconds before they are decoded. Needs no torch.

A file comes as bytes (an asset that travelled as a tensor) or as a path; frames are RGB, uint8 [height, width, 3],
turned as the file says. What is wrong names the field that the file came in. Everything here computes: callers run it
in threads.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream

from bunraku.errors import InvalidRequest
from runtime.media_type import HEAD_BYTES, media_type

Frame = npt.NDArray[np.uint8]
Source = Path | memoryview

# The demuxer is chosen by what the content is. Left to itself FFmpeg would also take playlists, which name other files.
_DEMUXERS = {"video/mp4": "mov", "video/quicktime": "mov", "video/webm": "matroska", "video/matroska": "matroska"}


@dataclass(frozen=True)
class VideoLimits:
    """What is still read; max_pixels is that of a frame."""

    max_bytes: int = 2 << 30
    max_pixels: int = 4096 * 2304
    max_frames: int = 20_000
    max_seconds: float = 600
    max_frames_per_second: int = 240


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, as it is shown: a turned telephone's video has its height and width turned.

    Attributes:
        num_frames: as the container tells (`probe_video`), or as many as could be decoded (`read_info`).
        frames_per_second: average.
        height: in pixels.
        width: in pixels.
    """

    num_frames: int
    frames_per_second: Fraction
    height: int
    width: int

    @property
    def duration_s(self) -> float:
        return float(self.num_frames / self.frames_per_second)


def probe_video(source: Source, field: str, limits: VideoLimits = VideoLimits()) -> VideoInfo:
    """What a video is, MP4, QuickTime, WebM or Matroska; its first frame is decoded to see that it can be.

    What the container tells of itself is checked before that. It need not be true: frames are counted where it tells no
    number, and whoever decodes all of them counts them again.

    Args:
        field: the field of the request that names the video.

    Raises:
        InvalidRequest: it is empty, damaged, of another kind, has no video stream or is over a limit.
    """
    with open_video(source, field, limits) as (container, stream):
        rate = _frames_per_second(stream, field, limits)
        _require_length(stream.frames, rate, field, limits)
        packets, first = 0, None
        for packet in container.demux(stream):
            packets += packet.size > 0  # the last packet is empty: it makes the decoder give up what it holds
            if first is None:
                first = next(iter(packet.decode()), None)
            if packets > limits.max_frames or (first is not None and stream.frames):
                break
        if first is None:
            raise InvalidRequest((field, "is a video without frames"))
        height, width, _ = _upright(first).shape
        info = VideoInfo(stream.frames or packets, rate, height, width)
    _require_length(info.num_frames, rate, field, limits)
    return info


def read_info(source: Source, field: str, limits: VideoLimits = VideoLimits()) -> VideoInfo:
    """What a video is, found by decoding all of it; a video longer than `limits.max_frames` is read up to there.

    Raises:
        InvalidRequest: as `probe_video`, or it is damaged further on, or changes its size.
    """
    with open_video(source, field, limits) as (container, stream):
        rate = _frames_per_second(stream, field, limits)
        count, height, width = 0, 0, 0
        for frame in _decoded(container, stream, field, limits):
            turned = _quarter_turns(frame) % 2
            count, height, width = count + 1, *((frame.width, frame.height) if turned else (frame.height, frame.width))
    if count == 0:
        raise InvalidRequest((field, "is a video without frames"))
    return VideoInfo(count, rate, height, width)


def read_frames(source: Source, field: str, limits: VideoLimits = VideoLimits()) -> Iterator[Frame]:
    """The frames of a video one by one, up to `limits.max_frames`. Raises as `read_info`."""
    with open_video(source, field, limits) as (container, stream):
        for frame in _decoded(container, stream, field, limits):
            yield _upright(frame)


@contextmanager
def open_video(
    source: Source, field: str, limits: VideoLimits = VideoLimits()
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """An open video and its stream; what the decoder finds wrong inside the block becomes InvalidRequest."""
    size = source.nbytes if isinstance(source, memoryview) else source.stat().st_size
    if size == 0:
        raise InvalidRequest((field, "is empty"))
    if size > limits.max_bytes:
        raise InvalidRequest((field, f"must have at most {limits.max_bytes} bytes, has {size}"))
    kind = media_type(_head(source))
    if kind not in _DEMUXERS:
        raise InvalidRequest((field, f"is not an MP4, QuickTime, WebM or Matroska video but {kind}"))
    # Also keeps decoders from larger pictures further on. Twice: they count the rows and columns that are not shown.
    options = {"max_pixels": str(2 * limits.max_pixels)}
    file = io.BytesIO(source) if isinstance(source, memoryview) else source
    try:
        with av.open(file, "r", format=_DEMUXERS[kind], options=options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise InvalidRequest((field, "has no video stream"))
            if stream.codec_context is None:
                raise InvalidRequest((field, "is a video of a kind that cannot be decoded"))
            _require_pixels(stream.height, stream.width, field, limits)
            stream.codec_context.options = options
            yield container, stream
    except av.FFmpegError as error:
        raise InvalidRequest((field, f"is a damaged video: {error.strerror}")) from error


def _decoded(
    container: InputContainer, stream: VideoStream, field: str, limits: VideoLimits
) -> Iterator[av.VideoFrame]:
    stream.thread_type = "AUTO"
    size: tuple[int, int] | None = None
    for count, frame in enumerate(container.decode(stream)):
        if count == limits.max_frames:
            return
        _require_pixels(frame.height, frame.width, field, limits)
        if size not in (None, (frame.height, frame.width)):
            raise InvalidRequest((field, f"changes its size at frame {count}"))
        size = (frame.height, frame.width)
        yield frame


def _head(source: Source) -> bytes:
    if isinstance(source, memoryview):
        return bytes(source[:HEAD_BYTES])
    with source.open("rb") as file:
        return file.read(HEAD_BYTES)


def _frames_per_second(stream: VideoStream, field: str, limits: VideoLimits) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not 0 < rate <= limits.max_frames_per_second:
        text = f"must have at most {limits.max_frames_per_second} frames per second, has {rate or 'no frame rate'}"
        raise InvalidRequest((field, text))
    return rate


def _require_length(num_frames: int, rate: Fraction, field: str, limits: VideoLimits) -> None:
    if num_frames > limits.max_frames:
        raise InvalidRequest((field, f"must have at most {limits.max_frames} frames, has {num_frames}"))
    duration_s = float(num_frames / rate)
    if duration_s > limits.max_seconds:
        raise InvalidRequest((field, f"must last at most {limits.max_seconds:g} seconds, lasts {duration_s:.1f}"))


def _upright(frame: av.VideoFrame) -> Frame:
    pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    return np.ascontiguousarray(np.rot90(pixels, _quarter_turns(frame)))


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Anticlockwise, as np.rot90 counts them too."""
    return frame.rotation // 90


def _require_pixels(height: int, width: int, field: str, limits: VideoLimits) -> None:
    if height * width > limits.max_pixels:
        raise InvalidRequest((field, f"must have at most {limits.max_pixels} pixels, has {height}x{width}"))
