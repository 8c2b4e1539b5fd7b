"""A gateway that makes no videos: it records calls, and breaks where a test asks for it.

As a program (`python -m tests.bunraku.fake_gateway`) it is the gateway of a system of fake stages.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from bunraku.errors import BunrakuError, NotFound, NotReady, to_status
from bunraku.v1 import gateway_pb2 as pb
from bunraku.v1 import gateway_pb2_grpc, stage_pb2

Context = grpc.aio.ServicerContext[Any, Any]
NAME = "generations/0123"
VIDEO = bytes(range(256)) * 4096  # 1 MiB: several messages
CHUNK_BYTES = 64 * 1024


def asset(content: bytes) -> pb.Asset:
    sha256 = hashlib.sha256(content).hexdigest()
    return pb.Asset(name=f"assets/{sha256}", size_bytes=len(content), sha256=sha256)


def stage_event(stage: str, completed: int, total: int, *, done: bool = False) -> pb.WatchGenerationResponse:
    state = pb.STAGE_PROGRESS_STATE_DONE if done else pb.STAGE_PROGRESS_STATE_RUNNING
    progress = pb.StageProgress(stage=stage, state=state, completed=completed, total=total, seconds=1.5)
    return pb.WatchGenerationResponse(progress=progress)


@dataclass
class FakeGateway(gateway_pb2_grpc.GatewayServiceServicer):
    """What it is to do, and what it was asked.

    Attributes:
        failures: of the rpc of that name, raised by one call each, first things first.
        break_upload_at, break_download_at: bytes of the file after which calls of that kind break off, one after another.
        lose_upload_answer: uploads are stored, and break off before it is said so.
        events: of the one generation, without sequence numbers.
        break_watch_after: numbers of events, one for each call of WatchGeneration that breaks off after so many.
        end_watch_quietly: such a call ends as if there was nothing more to come.
        hold_upload: uploads are not answered.
        hold_create: the next CreateGeneration does not answer.
        hold_watch: a WatchGeneration that has nothing more to say does not end.
        damaged: assets are given with a byte changed.
    """

    assets: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    failures: dict[str, list[BunrakuError]] = field(default_factory=dict)
    break_upload_at: list[int] = field(default_factory=list)
    lose_upload_answer: bool = False
    break_download_at: list[int] = field(default_factory=list)
    events: list[pb.WatchGenerationResponse] = field(default_factory=list)
    break_watch_after: list[int] = field(default_factory=list)
    end_watch_quietly: bool = False
    hold_upload: bool = False
    hold_create: bool = False
    hold_watch: bool = False
    damaged: bool = False
    generation: pb.Generation = field(default_factory=lambda: pb.Generation(name=NAME))
    pages: list[list[pb.Generation]] = field(default_factory=list)
    models: list[pb.Model] = field(default_factory=list)
    stages: list[pb.StageEndpoint] = field(default_factory=list)
    uploading: threading.Event = field(default_factory=threading.Event)
    upload_left: threading.Event = field(default_factory=threading.Event)
    watching: threading.Event = field(default_factory=threading.Event)
    creating: threading.Event = field(default_factory=threading.Event)

    def requests(self, rpc: str) -> list[Any]:
        """What the rpc was asked, in order."""
        return [request for name, request in self.calls if name == rpc]

    def succeed(self) -> None:
        """The generation has a video and its events lead there."""
        self.assets[asset(VIDEO).name] = VIDEO
        output = pb.OutputParameters(width=832, height=480, num_frames=81, frames_per_second=16)
        self.generation.request.CopyFrom(
            pb.CreateGenerationRequest(output=output, sampling=pb.SamplingParameters(seed=42))
        )
        self.generation.state = pb.GENERATION_STATE_SUCCEEDED
        self.generation.video.CopyFrom(asset(VIDEO))
        self.generation.start_time.FromSeconds(100)
        self.generation.end_time.FromSeconds(107)
        self.generation.progress.stages.add(
            stage="denoise", state=pb.STAGE_PROGRESS_STATE_RUNNING, completed=1, total=8
        )
        queued = pb.Generation(name=NAME, state=pb.GENERATION_STATE_QUEUED)
        self.events = [
            pb.WatchGenerationResponse(generation=queued),
            stage_event("text", 0, 0),
            stage_event("text", 1, 1, done=True),
            stage_event("denoise", 3, 8),
            stage_event("denoise", 8, 8, done=True),
            pb.WatchGenerationResponse(generation=self.generation),
        ]

    async def UploadAsset(
        self, request_iterator: AsyncIterator[pb.UploadAssetRequest], context: Context
    ) -> pb.UploadAssetResponse:
        metadata = (await anext(request_iterator)).metadata
        await self._called("UploadAsset", metadata, context)
        self.uploading.set()
        if self.hold_upload:
            try:
                await asyncio.sleep(60)
            finally:
                self.upload_left.set()
        received = self.uploads.setdefault(metadata.upload_id, bytearray())
        assert metadata.offset_bytes == len(received)
        async for request in request_iterator:
            received.extend(request.data)
            if self.break_upload_at and len(received) >= self.break_upload_at[0]:
                self.break_upload_at.pop(0)
                await _fail(NotReady("broken off"), context)
        stored = asset(bytes(received))
        self.assets[stored.name] = bytes(received)
        if self.lose_upload_answer:
            await _fail(NotReady("broken off"), context)
        return pb.UploadAssetResponse(asset=stored)

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.GetUploadResponse:
        await self._called("GetUpload", request, context)
        if request.upload_id not in self.uploads:
            await _fail(NotFound("no such upload"), context)
        return pb.GetUploadResponse(received_bytes=len(self.uploads[request.upload_id]))

    async def GetAsset(self, request: pb.GetAssetRequest, context: Context) -> pb.GetAssetResponse:
        await self._called("GetAsset", request, context)
        if request.name not in self.assets:
            await _fail(NotFound(f"there is no {request.name}"), context)
        return pb.GetAssetResponse(asset=asset(self.assets[request.name]))

    async def DownloadAsset(
        self, request: pb.DownloadAssetRequest, context: Context
    ) -> AsyncIterator[pb.DownloadAssetResponse]:
        await self._called("DownloadAsset", request, context)
        content = self.assets[request.name]
        yield pb.DownloadAssetResponse(asset=asset(content))
        if self.damaged:
            content = content[:-1] + b"\0"
        for start in range(request.offset_bytes, len(content), CHUNK_BYTES):
            if self.break_download_at and start >= self.break_download_at[0]:
                self.break_download_at.pop(0)
                await _fail(NotReady("broken off"), context)
            yield pb.DownloadAssetResponse(data=content[start : start + CHUNK_BYTES])

    async def CreateGeneration(
        self, request: pb.CreateGenerationRequest, context: Context
    ) -> pb.CreateGenerationResponse:
        await self._called("CreateGeneration", request, context)
        self.creating.set()
        if self.hold_create:
            self.hold_create = False
            await asyncio.sleep(60)
        return pb.CreateGenerationResponse(generation=self.generation)

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Context) -> pb.GetGenerationResponse:
        await self._called("GetGeneration", request, context)
        return pb.GetGenerationResponse(generation=self.generation)

    async def ListGenerations(self, request: pb.ListGenerationsRequest, context: Context) -> pb.ListGenerationsResponse:
        await self._called("ListGenerations", request, context)
        number = int(request.page_token or 0)
        more = str(number + 1) if number + 1 < len(self.pages) else ""
        return pb.ListGenerationsResponse(generations=self.pages[number], next_page_token=more)

    async def WatchGeneration(
        self, request: pb.WatchGenerationRequest, context: Context
    ) -> AsyncIterator[pb.WatchGenerationResponse]:
        await self._called("WatchGeneration", request, context)
        limit = self.break_watch_after.pop(0) if self.break_watch_after else None
        for sequence, event in enumerate(self.events[request.after_sequence :], request.after_sequence + 1):
            if limit is not None and sequence - request.after_sequence > limit:
                if self.end_watch_quietly:
                    return
                await _fail(NotReady("broken off"), context)
            event.sequence = sequence
            yield event
        self.watching.set()
        if self.hold_watch:
            await asyncio.sleep(60)

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        await self._called("CancelGeneration", request, context)
        if self.generation.state != pb.GENERATION_STATE_SUCCEEDED:
            self.generation.state = pb.GENERATION_STATE_CANCELLED
        return pb.CancelGenerationResponse(generation=self.generation)

    async def DeleteGeneration(
        self, request: pb.DeleteGenerationRequest, context: Context
    ) -> pb.DeleteGenerationResponse:
        await self._called("DeleteGeneration", request, context)
        return pb.DeleteGenerationResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        await self._called("ListModels", request, context)
        return pb.ListModelsResponse(models=self.models)

    async def GetSystemStatus(self, request: pb.GetSystemStatusRequest, context: Context) -> pb.GetSystemStatusResponse:
        await self._called("GetSystemStatus", request, context)
        return pb.GetSystemStatusResponse(stages=self.stages, version="1.2", running_generations=1)

    async def _called(self, rpc: str, request: Any, context: Context) -> None:
        self.calls.append((rpc, request))
        if self.failures.get(rpc):
            await _fail(self.failures[rpc].pop(0), context)


async def _fail(error: BunrakuError, context: Context) -> None:
    await context.abort_with_status(rpc_status.to_status(to_status(error)))  # type: ignore[attr-defined]  # not in stubs


def serving_stage(stage: str) -> pb.StageEndpoint:
    """A stage as GetSystemStatus shows it when all is well."""
    status = stage_pb2.GetStatusResponse(
        stage=stage,
        state=stage_pb2.STAGE_STATE_SERVING,
        device="cuda:0",
        device_name="H100",
        vram=stage_pb2.Memory(
            total_bytes=80 * 10**9, free_bytes=70 * 10**9, used_bytes=3 * 10**9, peak_bytes=5 * 10**9
        ),
        ram=stage_pb2.Memory(total_bytes=64 * 10**9, free_bytes=20 * 10**9, used_bytes=2 * 10**9, peak_bytes=4 * 10**9),
        max_queued_requests=8,
    )
    return pb.StageEndpoint(stage=stage, address="127.0.0.1:1", reachable=True, status=status)


class GatewayThread:
    """Serves a FakeGateway from a thread; may be stopped and started again on the same port."""

    def __init__(self, fake: FakeGateway) -> None:
        self.fake = fake
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self) -> None:
        self._wait(asyncio.run_coroutine_threadsafe(self._start(), self._loop))

    def stop(self) -> None:
        """Cuts every connection."""
        assert self._server is not None
        self._wait(asyncio.run_coroutine_threadsafe(self._server.stop(0), self._loop))

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self.fake, self._server)
        self.port = self._server.add_insecure_port(self.address)
        await self._server.start()

    @staticmethod
    def _wait(future: Future[None]) -> None:
        future.result(10)


async def serve() -> None:
    """Serves until killed, like the gateway of a system."""
    fake = FakeGateway()
    fake.succeed()
    healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in its stubs
    await healthy.set("bunraku.v1.GatewayService", health_pb2.HealthCheckResponse.ServingStatus.SERVING)
    server = grpc.aio.server()
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(fake, server)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    server.add_insecure_port(os.environ["BUNRAKU_ADDRESS"])
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
