"""Stages with the real contracts, admission and device thread, whose work is to sleep: each rpc costs what it is told.

They run in a process of their own; `stub_stages` starts one and tells where each stage listens and, at the end, when
each device was at work.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from bunraku.v1 import (
    denoiser_pb2,
    denoiser_pb2_grpc,
    encoder_pb2,
    encoder_pb2_grpc,
    pose_pb2,
    pose_pb2_grpc,
    vae_pb2,
    vae_pb2_grpc,
)
from runtime.bundles import Bundle, load_bundle
from runtime.server import StageServer
from runtime.stage import Limits, StageRuntime
from tests.gateway.fake_stages import FakeStages

ROOT = Path(__file__).resolve().parent.parent
# As the real stages have them
SLOTS = {"encoder": 4, "pose": 2, "denoiser": 1, "vae": 2}
_REGISTER: Mapping[str, tuple[Any, Callable[[Any, grpc.aio.Server], None]]] = {
    "encoder": (encoder_pb2.DESCRIPTOR, encoder_pb2_grpc.add_EncoderServiceServicer_to_server),
    "pose": (pose_pb2.DESCRIPTOR, pose_pb2_grpc.add_PoseServiceServicer_to_server),
    "denoiser": (denoiser_pb2.DESCRIPTOR, denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server),
    "vae": (vae_pb2.DESCRIPTOR, vae_pb2_grpc.add_VaeServiceServicer_to_server),
}
Spans = dict[str, list[tuple[float, float]]]


class StubStage(FakeStages):
    """One stage.

    Args:
        costs: seconds of device time by rpc; of the denoiser, for a step.
    """

    def __init__(self, stage: str, runtime: StageRuntime, costs: Mapping[str, float], num_frames: int) -> None:
        super().__init__(num_frames)
        descriptor, self._register = _REGISTER[stage]
        self.full_name = next(iter(descriptor.services_by_name.values())).full_name
        self.spans: list[tuple[float, float]] = []
        self._runtime, self._costs = runtime, costs

    def load(self) -> None:
        """Nothing."""

    def add_to(self, server: grpc.aio.Server) -> None:
        self._register(self, server)

    async def compute(self, rpc: str) -> None:
        await self._runtime.gpu.run(lambda: self._sleep(self._costs.get(rpc, 0.0)))

    def _sleep(self, seconds: float) -> None:
        begun = time.monotonic()
        time.sleep(seconds)
        self.spans.append((begun, time.monotonic()))


@dataclass(frozen=True)
class Stubs:
    """The running process.

    Attributes:
        addresses: by stage.
    """

    addresses: Mapping[str, str]
    connection: Connection

    def spans(self) -> Spans:
        """When each device was at work, in monotonic seconds of this host; asked once, at the end."""
        self.connection.send("end")
        spans: Spans = self.connection.recv()
        return spans


@contextmanager
def stub_stages(costs: Mapping[str, float], num_frames: int) -> Iterator[Stubs]:
    """All four stages in one process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, dict(costs), num_frames), daemon=True)
    process.start()
    try:
        yield Stubs(ours.recv(), ours)
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection, costs: Mapping[str, float], num_frames: int) -> None:
    asyncio.run(_serve_until_told(connection, costs, num_frames))


async def _serve_until_told(connection: Connection, costs: Mapping[str, float], num_frames: int) -> None:
    bundle: Bundle = load_bundle(ROOT / "bundles" / "tiny")
    stages: dict[str, StubStage] = {}
    addresses: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        for stage, slots in SLOTS.items():
            runtime = StageRuntime(stage, bundle, limits=Limits(max_concurrent=slots, max_queued=100))
            stages[stage] = StubStage(stage, runtime, costs, num_frames)  # type: ignore[abstract]  # not all rpcs
            server = StageServer(stages[stage], runtime)
            await server.start("127.0.0.1:0")
            await server.load()
            stack.push_async_callback(server.drain, 0)
            addresses[stage] = f"127.0.0.1:{server.port}"
        connection.send(addresses)
        await asyncio.to_thread(connection.recv)
        spans: Spans = defaultdict(list)
        for stage, stub in stages.items():
            spans[stage] = stub.spans
        connection.send(dict(spans))
