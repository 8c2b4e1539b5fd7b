"""Pictures and videos in files <-> pixels: uint8 [height, width, 3], RGB.

What callers send is bounded in bytes, pixels, frames and seconds before it is decoded, and what is wrong with it names
the field that it came in. Everything here computes: callers run it in threads.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from bunraku.errors import InvalidRequest
from bunraku.v1 import gateway_pb2 as pb
from gateway.assets import HEAD_BYTES, full_disk_is_not_ready, media_type

Frame = npt.NDArray[np.uint8]  # [height, width, 3]

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
# The demuxer is chosen by what the content is. Left to itself FFmpeg would also take playlists, which name other files.
_DEMUXERS = {"video/mp4": "mov", "video/quicktime": "mov", "video/webm": "matroska", "video/matroska": "matroska"}


@dataclass(frozen=True)
class MediaLimits:
    """What is still read."""

    max_image_bytes: int = 64 << 20
    max_image_pixels: int = 50_000_000  # the cameras of telephones have 48 million
    max_video_bytes: int = 2 << 30
    max_video_pixels: int = 4096 * 2304  # of a frame
    max_video_frames: int = 20_000
    max_video_seconds: float = 600
    max_frames_per_second: int = 240


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, as it is shown: a turned telephone's video has its height and width turned.

    Attributes:
        num_frames: as the container tells; decoding may give fewer where the file is damaged.
        frames_per_second: average.
        height: in pixels.
        width: in pixels.
        duration_s: num_frames / frames_per_second.
    """

    num_frames: int
    frames_per_second: Fraction
    height: int
    width: int

    @property
    def duration_s(self) -> float:
        return float(self.num_frames / self.frames_per_second)


def read_image(path: Path, field: str, limits: MediaLimits = MediaLimits()) -> Frame:
    """A picture, PNG, JPEG or WebP, turned as its EXIF data say; of an animated one the first frame.

    What is transparent becomes white: that is what a cut-out picture is looked at on, and dark hair and outlines stay
    visible, which on black they do not.

    Args:
        field: the field of the request that names the picture.

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        InvalidRequest: it is empty, damaged, of another kind or over a limit.
    """
    _require_size(path, limits.max_image_bytes, field)
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            _require_pixels(image.height, image.width, limits.max_image_pixels, field)
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except InvalidRequest:
        raise
    except UnidentifiedImageError as error:
        raise InvalidRequest((field, "is not a PNG, JPEG or WebP picture")) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequest((field, f"has more than {limits.max_image_pixels} pixels")) from error
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        raise InvalidRequest((field, f"is a damaged picture: {error}")) from error


def _rgb(image: Image.Image) -> Frame:
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def fit_image(image: Frame, height: int, width: int, mode: pb.SizeMode.ValueType) -> Frame:
    """A picture at another size, by Lanczos.

    Args:
        image: uint8 [H, W, 3].
        mode: CROP keeps the aspect ratio and cuts what sticks out, evenly at both sides. BUDGET and FIT, whose sizes
            have the picture's aspect ratio but for rounding, take all of it.

    Returns:
        uint8 [height, width, 3].
    """
    picture = Image.fromarray(image)
    if mode == pb.SIZE_MODE_CROP:
        return np.array(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
    return np.array(picture.resize((width, height), Image.Resampling.LANCZOS))


def jpeg(frame: Frame, quality: int = 85) -> bytes:
    """A JPEG of a frame, uint8 [H, W, 3]; quality 1 to 95."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return file.getvalue()


def probe_video(path: Path, field: str, limits: MediaLimits = MediaLimits()) -> VideoInfo:
    """What a video is, MP4, QuickTime, WebM or Matroska; its first frame is decoded to see that it can be.

    Args:
        field: the field of the request that names the video.

    Raises:
        InvalidRequest: it is empty, damaged, of another kind, has no video stream or is over a limit.
    """
    with _open_video(path, field, limits) as (container, stream):
        packets, first = 0, None
        for packet in container.demux(stream):
            packets += packet.size > 0  # the last packet is empty: it makes the decoder give up what it holds
            if first is None:
                first = next(iter(packet.decode()), None)
            if packets > limits.max_video_frames or (first is not None and stream.frames):
                break
        if first is None:
            raise InvalidRequest((field, "is a video without frames"))
        lies = round(first.rotation / 90) % 2 == 1  # telephones film lying and say so in the file
        info = VideoInfo(
            num_frames=stream.frames or packets,
            frames_per_second=_frames_per_second(stream, field, limits),
            height=first.width if lies else first.height,
            width=first.height if lies else first.width,
        )
    if info.num_frames > limits.max_video_frames:
        raise InvalidRequest((field, f"must have at most {limits.max_video_frames} frames"))
    if info.duration_s > limits.max_video_seconds:
        text = f"must last at most {limits.max_video_seconds:g} seconds, lasts {info.duration_s:.1f}"
        raise InvalidRequest((field, text))
    return info


def read_metadata(path: Path, field: str, limits: MediaLimits = MediaLimits()) -> dict[str, object]:
    """The settings that VideoWriter wrote into a video; empty where there are none.

    Raises:
        InvalidRequest: it is not a video that can be read.
    """
    with _open_video(path, field, limits) as (container, _):
        comment = container.metadata.get("comment", "")
    try:
        settings = json.loads(comment)
    except (ValueError, RecursionError):  # somebody else's comment
        return {}
    return settings if isinstance(settings, dict) else {}


def frame_rate(frames_per_second: float) -> Fraction:
    """The exact rate that a number stands for: 29.97002997 is 30000/1001."""
    return Fraction(frames_per_second).limit_denominator(1001)


class VideoWriter:
    """Writes an MP4 (H.264, yuv420p, BT.709) frame by frame; to be used as a context manager.

    The file appears under its name when the writer is closed and is whole then. An exception inside the `with` block
    leaves nothing. The same frames and settings give the same bytes.

    Args:
        path: where the video goes, in a directory that exists.
        height: in pixels, even: yuv420p stores colour for blocks of 2x2.
        width: in pixels, even.
        frames_per_second: exact, see `frame_rate`.
        crf: quality of H.264, 0 (lossless but for the colour conversion) to 51.
        title: title for players.
        settings: JSON object with what made the video, for `read_metadata`; kept as the file's comment.
    """

    def __init__(
        self,
        path: Path,
        *,
        height: int,
        width: int,
        frames_per_second: Fraction,
        crf: int = 8,
        title: str = "",
        settings: Mapping[str, object] | None = None,
    ) -> None:
        if height % 2 or width % 2 or 0 in (height, width):
            raise ValueError(f"height and width must be even, got {height}x{width}")
        self._path, self._shape = path, (height, width, 3)
        self._partial = path.with_name(f".{uuid.uuid4().hex}.part")
        # faststart: the index goes to the front, so that players begin before they have it all
        self._container = av.open(self._partial, "w", format="mp4", options={"movflags": "+faststart"})
        self._container.metadata.update({"title": title, "comment": json.dumps(settings or {}, sort_keys=True)})
        stream = self._container.add_stream("libx264", rate=frames_per_second, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        context.time_base = self._frame_duration_s = 1 / frames_per_second
        context.colorspace, context.color_range = Colorspace.ITU709.value, ColorRange.MPEG.value
        context.color_primaries, context.color_trc = ColorPrimaries.BT709.value, ColorTrc.BT709.value
        self._stream, self._num_frames = stream, 0

    def add(self, frames: npt.NDArray[np.uint8]) -> None:
        """Writes frames, uint8 [n, height, width, 3], RGB, after those before.

        Raises:
            ValueError: they have another shape or dtype.
            NotReady: the disk is full.
        """
        if frames.shape[1:] != self._shape or frames.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 [n, {self._shape}], got {frames.dtype} {frames.shape}")
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709.value, dst_color_range=ColorRange.MPEG.value
            )
            frame.pts, frame.time_base = self._num_frames, self._frame_duration_s
            self._num_frames += 1
            with full_disk_is_not_ready():
                self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Ends the video and gives it its name.

        Raises:
            ValueError: it has no frames; nothing is left of it.
            NotReady: the disk is full; nothing is left of it.
        """
        if self._num_frames == 0:
            self.abort()
            raise ValueError("a video has at least one frame")
        try:
            with full_disk_is_not_ready():
                self._container.mux(self._stream.encode(None))
                self._container.close()
                with self._partial.open("rb") as file:
                    os.fsync(file.fileno())
                self._partial.replace(self._path)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Gives the video up and removes what there is of it."""
        try:
            self._container.close()
        finally:
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


@contextmanager
def _open_video(path: Path, field: str, limits: MediaLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    _require_size(path, limits.max_video_bytes, field)
    with path.open("rb") as file:
        kind = media_type(file.read(HEAD_BYTES))
    if kind not in _DEMUXERS:
        raise InvalidRequest((field, f"is not an MP4, QuickTime, WebM or Matroska video but {kind}"))
    # Keeps decoders from allocating more while FFmpeg looks into the file. Twice: they count rows and columns that are
    # not shown.
    decoder_options = {"max_pixels": str(2 * limits.max_video_pixels)}
    try:
        with av.open(
            path, "r", format=_DEMUXERS[kind], options=decoder_options, metadata_errors="replace"
        ) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise InvalidRequest((field, "has no video stream"))
            _require_pixels(stream.height, stream.width, limits.max_video_pixels, field)
            stream.codec_context.options = decoder_options
            yield container, stream
    except av.FFmpegError as error:
        raise InvalidRequest((field, f"is a damaged video: {error.strerror}")) from error


def _frames_per_second(stream: VideoStream, field: str, limits: MediaLimits) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not 0 < rate <= limits.max_frames_per_second:
        text = f"must have at most {limits.max_frames_per_second} frames per second, has {rate or 'no frame rate'}"
        raise InvalidRequest((field, text))
    return rate


def _require_size(path: Path, max_bytes: int, field: str) -> None:
    size = path.stat().st_size
    if size == 0:
        raise InvalidRequest((field, "is empty"))
    if size > max_bytes:
        raise InvalidRequest((field, f"must have at most {max_bytes} bytes, has {size}"))


def _require_pixels(height: int, width: int, max_pixels: int, field: str) -> None:
    if height * width > max_pixels:
        raise InvalidRequest((field, f"must have at most {max_pixels} pixels, has {height}x{width}"))
