"""Pictures and videos in files <-> pixels: uint8 [height, width, 3], RGB.

What callers send is bounded in bytes, pixels, frames and seconds before it is decoded, and what is wrong with it names
the field that it came in. Everything here computes: callers run it in threads.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageOps, UnidentifiedImageError

from bunraku.errors import InvalidRequest
from bunraku.v1 import gateway_pb2 as pb
from gateway.blobs import full_disk_is_not_ready
from runtime.video import VideoLimits, open_video

Frame = npt.NDArray[np.uint8]  # [height, width, 3]

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class ImageLimits:
    """What is still read."""

    max_bytes: int = 64 << 20
    max_pixels: int = 50_000_000  # the cameras of telephones have 48 million


@dataclass(frozen=True)
class InputLimits:
    """What is still taken of the files of a request."""

    images: ImageLimits = ImageLimits()
    videos: VideoLimits = VideoLimits()  # noqa: RUF009  # frozen


def read_image(path: Path, field: str, limits: ImageLimits = ImageLimits()) -> Frame:
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
    _require_size(path, limits.max_bytes, field)
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            _require_pixels(image.height, image.width, limits.max_pixels, field)
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except InvalidRequest:
        raise
    except UnidentifiedImageError as error:
        raise InvalidRequest((field, "is not a PNG, JPEG or WebP picture")) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequest((field, f"has more than {limits.max_pixels} pixels")) from error
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


def read_metadata(path: Path, field: str) -> dict[str, object]:
    """The settings that VideoWriter wrote into a video; empty where there are none.

    Raises:
        InvalidRequest: it is not a video that can be read.
    """
    with open_video(path, field) as (container, _):
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
        # x264's AVX-512 code for its macroblock tree reads beyond narrow frames: equal frames gave up to 185 videos in 300
        # (64 pixels wide, libx264 165). Without the tree files are a third larger and 0.3 dB better at the same crf.
        options = {"crf": str(crf), "mbtree": "0"}
        stream = self._container.add_stream("libx264", rate=frames_per_second, options=options)
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


def _require_size(path: Path, max_bytes: int, field: str) -> None:
    size = path.stat().st_size
    if size == 0:
        raise InvalidRequest((field, "is empty"))
    if size > max_bytes:
        raise InvalidRequest((field, f"must have at most {max_bytes} bytes, has {size}"))


def _require_pixels(height: int, width: int, max_pixels: int, field: str) -> None:
    if height * width > max_pixels:
        raise InvalidRequest((field, f"must have at most {max_pixels} pixels, has {height}x{width}"))
