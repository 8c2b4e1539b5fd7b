"""What `bunraku pose` does: sends a video to a pose stage, shows how far it is, writes the frames that come back.

Besides what a client installs it needs numpy, PyAV and Pillow, which the `runtime` extra brings.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import grpc
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from bunraku.cli.display import Display, Row
from bunraku.client import CHUNK_BYTES
from bunraku.errors import InvalidRequest, StageBroken, from_rpc_error
from bunraku.tls import NO_TLS, TlsFiles
from bunraku.v1 import pose_pb2 as pb
from bunraku.v1 import pose_pb2_grpc, tensor_pb2

Frames = npt.NDArray[np.uint8]

_SIZE_MULTIPLE = 32
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES), ("grpc.keepalive_time_ms", 30_000))
_FULL = "pose_frames_full"
_OPTION_OF_FIELD = {
    "video": "VIDEO",
    "people": "--people",
    "preset": "--preset",
    "reference_image": "--image",
    "mask_video": "--mask-video",
    "mask_expand": "--mask-expand",
    "mask_backend": "--masks",
    "height": "--size",
    "width": "--size",
    "max_frames": "--frames",
}


@dataclass(frozen=True)
class Extraction:
    """One call of the command: files, and the fields of ExtractPoseParameters; no height and width: the video's own."""

    video: Path
    output: Path
    overlay: bool
    people: int
    preset: str
    image: Path | None
    mask_video: Path | None
    mask_expand: int
    mask_backend: str
    height: int | None
    width: int | None
    max_frames: int
    crf: int

    async def run(self, address: str, display: Display, tls: TlsFiles = NO_TLS) -> str:
        """Does it with the pose stage at `address`, and says in words what came out.

        Raises:
            BunrakuError: the stage refuses, or cannot be reached.
        """
        steps = Steps(display)
        async with _channel(address, tls) as channel:
            stub: Any = pose_pb2_grpc.PoseServiceStub(channel)
            answers = _whole(stub.ExtractPose(self._messages(), wait_for_ready=False))
            try:
                info = await anext(answers)
                if not isinstance(info, pb.PoseInfo):
                    raise StageBroken("the pose stage did not say first what it found", stage="pose")
                with VideoFile(self.output, info.frames_per_second, self.crf) as file:
                    async for item in answers:
                        if isinstance(item, pb.PoseProgress):
                            steps.show(item)
                        elif isinstance(item, np.ndarray):
                            await asyncio.to_thread(file.add, item)
            except grpc.aio.AioRpcError as error:
                raise _in_options(from_rpc_error(error, stage="pose")) from error
        rate = f"{info.frames_per_second:.6g} frames/s"
        return "\n".join([f"{self.output}: {info.num_frames} frames, {rate}", *steps.missing()])

    def _messages(self) -> Iterator[pb.ExtractPoseRequest]:
        height, width = self._size()
        yield pb.ExtractPoseRequest(
            parameters=pb.ExtractPoseParameters(
                height=height,
                width=width,
                max_frames=self.max_frames,
                people=self.people,
                preset=self.preset,
                mask_expand=self.mask_expand,
                mask_backend=self.mask_backend,
                full_size=True,
                over_source=self.overlay,
            )
        )
        yield from _sent("video", self.video.read_bytes())
        if self.image is not None:
            with Image.open(self.image) as picture:
                upright = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
            yield from _sent("reference_image", upright.tobytes(), upright.shape)
        if self.mask_video is not None:
            yield from _sent("mask_video", self.mask_video.read_bytes())

    def _size(self) -> tuple[int, int]:
        """Height and width to ask for: what was said, or the video's to the nearest multiples of 32."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        try:
            with av.open(str(self.video)) as container:
                frame = next(container.decode(video=0))
        except (av.FFmpegError, StopIteration, IndexError):
            return _SIZE_MULTIPLE, _SIZE_MULTIPLE  # the stage says what is wrong with it
        sides = (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
        height, width = (max(1, round(side / _SIZE_MULTIPLE)) * _SIZE_MULTIPLE for side in sides)
        return height, width


def _channel(address: str, tls: TlsFiles) -> grpc.aio.Channel:
    if tls:
        return grpc.aio.secure_channel(address, tls.channel_credentials(), options=_CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


class Steps:
    """One row per step; and what is known to be missing of the people."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._begun: dict[str, float] = {}
        self._people: Sequence[pb.PersonGaps] = ()

    def show(self, progress: pb.PoseProgress) -> None:
        """Shows how far a step is."""
        now = time.monotonic()
        begun = self._begun.setdefault(progress.step, now)
        done = progress.completed_frames >= progress.total_frames
        row = Row(
            label=progress.step,
            state="done" if done else "running",
            amount=f"{progress.completed_frames} of {progress.total_frames} frames",
            fraction=progress.completed_frames / max(progress.total_frames, 1),
            seconds=now - begun,
            ticking=not done,
        )
        self._display.show(progress.step, row)
        if progress.people:
            self._people = list(progress.people)

    def missing(self) -> list[str]:
        """Lines on who was not found where."""
        lines = []
        for number, gaps in enumerate(self._people, start=1):
            for frames, what in (
                (gaps.bridged_frames, "not found, bridged from the frames around"),
                (gaps.absent_frames, "not there"),
            ):
                if frames:
                    lines.append(f"person {number} {what}: frames {_ranges(frames)}")
        return lines


class VideoFile:
    """Frames to an H.264 file that appears under its name once it is whole."""

    def __init__(self, path: Path, frames_per_second: float, crf: int) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.part")
        self._container = av.open(str(self._partial), "w", format="mp4", options={"movflags": "+faststart"})
        rate = Fraction(frames_per_second).limit_denominator(1001)
        self._stream = self._container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        self._stream.pix_fmt = "yuv420p"
        self._sized = False

    def __enter__(self) -> Self:
        return self

    def add(self, frames: Frames) -> None:
        """Frames uint8 [n, H, W, 3], all of the same size."""
        if not self._sized:
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._sized = True
        for frame in frames:
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()
            if kind is None:
                os.replace(self._partial, self._path)
            else:
                self._partial.unlink(missing_ok=True)


@dataclass
class _Arriving:
    """A tensor of which some bytes are there."""

    header: tensor_pb2.TensorHeader
    data: bytearray = field(default_factory=bytearray)

    def frames(self) -> Frames | None:
        """The tensor, once it is whole and where it is one of frames."""
        if len(self.data) < self.header.size_bytes or self.header.name != _FULL:
            return None
        return np.frombuffer(self.data, np.uint8).reshape(tuple(self.header.shape))


async def _whole(
    answers: AsyncIterator[pb.ExtractPoseResponse],
) -> AsyncIterator[pb.PoseInfo | pb.PoseProgress | Frames]:
    """The answers of a stage; of tensors only frames of full size, each portion once it has come whole."""
    arriving: _Arriving | None = None
    async for answer in answers:
        match answer.WhichOneof("message"):
            case "info":
                yield answer.info
            case "progress":
                yield answer.progress
            case "tensor":
                arriving = _Arriving(answer.tensor)
            case "tensor_data":
                assert arriving is not None
                arriving.data += answer.tensor_data
                if (frames := arriving.frames()) is not None:
                    yield frames


def _sent(name: str, data: bytes, shape: Sequence[int] | None = None) -> Iterator[pb.ExtractPoseRequest]:
    """A tensor of uint8, as messages."""
    header = tensor_pb2.TensorHeader(
        name=name, dtype=tensor_pb2.DATA_TYPE_UINT8, shape=shape or [len(data)], size_bytes=len(data)
    )
    yield pb.ExtractPoseRequest(tensor=header)
    for start in range(0, len(data), CHUNK_BYTES):
        yield pb.ExtractPoseRequest(tensor_data=data[start : start + CHUNK_BYTES])


def _in_options(error: Exception) -> Exception:
    """The error, with the command's options in place of fields."""
    if not isinstance(error, InvalidRequest):
        return error
    return InvalidRequest(*((_OPTION_OF_FIELD.get(name, name), text) for name, text in error.violations))


def _ranges(frames: Sequence[int]) -> str:
    """Ascending numbers in words: `0, 4 to 9, 12`."""
    parts: list[list[int]] = []
    for frame in frames:
        if parts and frame == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], frame]
        else:
            parts.append([frame])
    return ", ".join(" to ".join(map(str, part)) for part in parts)
