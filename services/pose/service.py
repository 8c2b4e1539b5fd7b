"""PoseService: a ready pose video in, pose frames out. Extraction from a raw video is not there yet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Any

import grpc
import numpy as np

from bunraku.errors import InvalidRequest
from bunraku.v1 import pose_pb2 as pb
from bunraku.v1 import pose_pb2_grpc
from runtime.bundles import Bundle
from runtime.checks import Checks
from runtime.gpu import raise_if_cancelled
from runtime.stage import StageRuntime
from runtime.tensors import UINT8, WireTensor, require
from runtime.video import Frame, VideoInfo, VideoLimits, read_frames, read_info
from services.pose.fit import cover, halve, whole_latents

_SIZE_MULTIPLE, _MAX_SIDE, _MAX_FRAMES = 32, 4096, 10_000
# SCAIL was made for two latent frames at least
MIN_FRAMES = 5
_FRAMES_PER_TENSOR = 16
Context = grpc.aio.ServicerContext[Any, Any]


class PoseService(pose_pb2_grpc.PoseServiceServicer):
    """Pose frames; this version takes ready pose videos, the other rpcs answer UNIMPLEMENTED."""

    full_name = pb.DESCRIPTOR.services_by_name["PoseService"].full_name

    def __init__(self, runtime: StageRuntime, bundle: Bundle) -> None:
        self._runtime = runtime

    def add_to(self, server: grpc.aio.Server) -> None:
        pose_pb2_grpc.add_PoseServiceServicer_to_server(self, server)

    def load(self) -> None:
        """Fitting a video needs no model."""

    async def FitPoseVideo(
        self, requests: AsyncIterator[pb.FitPoseVideoRequest], context: Context
    ) -> AsyncIterator[Any]:
        first, tensors = await self._runtime.receive_call(requests, context, ["video"])
        parameters = first.parameters
        _check(parameters)
        video = require(tensors, "video", (None,), (UINT8,)).data.data
        limits = VideoLimits(max_frames=parameters.max_frames or _MAX_FRAMES)
        found = await self._runtime.gpu.run(lambda: read_info(video, "video", limits))
        info = _pose_info(found, parameters.max_frames)
        yield pb.FitPoseVideoResponse(info=info)
        fitted = self._runtime.gpu.stream(lambda: _fitted(video, parameters, info.num_frames))
        async for portion in fitted:
            for message in self._runtime.send(pb.FitPoseVideoResponse, portion, context):
                yield message


def _fitted(video: memoryview, parameters: pb.FitPoseVideoParameters, num_frames: int) -> Iterator[list[WireTensor]]:
    """Pose frames, a few at a time: half size and, if asked for, full size."""
    fitted = _covering(islice(read_frames(video, "video"), num_frames), parameters.height, parameters.width)
    while portion := list(islice(fitted, _FRAMES_PER_TENSOR)):
        tensors = [WireTensor.from_numpy("pose_frames", np.stack([halve(frame) for frame in portion]))]
        if parameters.full_size:
            tensors.append(WireTensor.from_numpy("pose_frames_full", np.stack(portion)))
        yield tensors


def _covering(frames: Iterable[Frame], height: int, width: int) -> Iterator[Frame]:
    for frame in frames:
        raise_if_cancelled()
        yield cover(frame, height, width)


def _check(parameters: pb.FitPoseVideoParameters) -> None:
    checks = Checks()
    for field in ("height", "width"):
        value = getattr(parameters, field)
        if checks.between(field, value, _SIZE_MULTIPLE, _MAX_SIDE):
            checks.multiple(field, value, _SIZE_MULTIPLE)
    limit = parameters.max_frames
    if limit and checks.between("max_frames", limit, 1, _MAX_FRAMES):
        checks.that(limit % 4 == 1, "max_frames", f"must be 4k + 1, got {limit}")
    checks.done()


def _pose_info(found: VideoInfo, max_frames: int) -> pb.PoseInfo:
    if found.num_frames < MIN_FRAMES:
        raise InvalidRequest(("video", f"must have at least {MIN_FRAMES} frames, got {found.num_frames}"))
    return pb.PoseInfo(
        num_frames=whole_latents(found.num_frames, max_frames),
        frames_per_second=float(found.frames_per_second),
        source_height=found.height,
        source_width=found.width,
        source_frames=found.num_frames,
    )
