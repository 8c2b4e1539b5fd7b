"""A stage that computes what a test tells it to, in this process or in one of its own, and a client of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from bunraku.v1 import stage_pb2, stage_pb2_grpc, vae_pb2, vae_pb2_grpc
from runtime.bundles import Bundle, Quirks, Sampling, Video
from runtime.client import Budget, StageClient, open_channel
from runtime.server import StageServer
from runtime.shared_memory import SharedMemory
from runtime.stage import Limits, StageRuntime
from runtime.tensors import WireTensor

BUNDLE = Bundle(
    name="tiny",
    task="animate",
    family="scail",
    description="",
    revision="0123456789ab",
    components={},
    sampling=Sampling(4, 1.0, 5.0, "unipc"),
    video=Video(64, 64, 17, 5, 4096, 81, 16, 16.0),
    preset="official",
    presets={"official": Quirks()},
)
Tensors = dict[str, WireTensor]


async def until(holds: Callable[[], Any]) -> None:
    """Lets the event loop run until something holds that another thread or process brings about."""
    async with asyncio.timeout(10):
        while not holds():  # nobody there could set an event of this loop
            await asyncio.sleep(0.002)


def nothing() -> None:
    """Loads no model."""


def echo(tensors: Tensors) -> Iterable[WireTensor]:
    """Every tensor of the request, under the name `latents`."""
    return [tensor.named("latents") for tensor in tensors.values()]


def zeros(size_bytes: int, name: str = "frames") -> WireTensor:
    return WireTensor.from_numpy(name, np.zeros(size_bytes, np.uint8))


class FakeVae(vae_pb2_grpc.VaeServiceServicer):
    """Encode computes in one piece, Decode item by item; `begun` counts the calls that were let in."""

    full_name = vae_pb2.DESCRIPTOR.services_by_name["VaeService"].full_name

    def __init__(self, runtime: StageRuntime) -> None:
        self.runtime = runtime
        self.load_work: Callable[[], None] = nothing
        self.encode_work: Callable[[Tensors], Iterable[WireTensor]] = echo
        self.decode_work: Callable[[Tensors], Iterator[WireTensor]] = lambda tensors: iter(echo(tensors))
        self.begun = 0

    def load(self) -> None:
        self.load_work()

    def add_to(self, server: grpc.aio.Server) -> None:
        vae_pb2_grpc.add_VaeServiceServicer_to_server(self, server)

    async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self.begun += 1
        _, tensors = await self.runtime.receive_call(requests, context, ["frames", "extra."])
        answers = await self.runtime.gpu.run(lambda: self.encode_work(tensors))
        tensors.clear()
        yield vae_pb2.EncodeResponse(progress=vae_pb2.VaeProgress(completed_frames=1, total_frames=1))
        for message in self.runtime.send(vae_pb2.EncodeResponse, answers, context):
            yield message

    async def Decode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self.begun += 1
        _, tensors = await self.runtime.receive_call(requests, context, ["latents"])
        async for tensor in self.runtime.gpu.stream(lambda: self.decode_work(tensors)):
            for message in self.runtime.send(vae_pb2.DecodeResponse, [tensor], context):
                yield message


@dataclass(frozen=True)
class Stage:
    """A stage that listens."""

    service: FakeVae
    runtime: StageRuntime
    server: StageServer

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@asynccontextmanager
async def stage(
    *,
    port: int = 0,
    kind: type[FakeVae] = FakeVae,
    load: bool = True,
    limits: Limits | None = None,
    shared_memory: SharedMemory | None = None,
) -> AsyncIterator[Stage]:
    """A fake stage on a free port; `load=False`: it still has to load."""
    runtime = StageRuntime("vae", BUNDLE, limits=limits or Limits(), shared_memory=shared_memory)
    service = kind(runtime)
    server = StageServer(service, runtime)
    await server.start(f"127.0.0.1:{port}")
    if load:
        await server.load()
    try:
        yield Stage(service, runtime, server)
    finally:
        await server.drain(0)


@asynccontextmanager
async def client(*addresses: str, **options: Any) -> AsyncIterator[StageClient[Any]]:
    """A client of the stage at these addresses."""
    of_stage: StageClient[Any] = StageClient("vae", vae_pb2_grpc.VaeServiceStub, addresses, **options)
    try:
        yield of_stage
    finally:
        await of_stage.close()


@asynccontextmanager
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A bare channel with this system's options."""
    opened = open_channel(address)
    try:
        yield opened
    finally:
        await opened.close(None)


async def status_of(address: str) -> Any:
    """What GetStatus answers."""
    async with channel(address) as opened:
        return await stage_pb2_grpc.StageServiceStub(opened).GetStatus(stage_pb2.GetStatusRequest())


FIRST_ENCODE = vae_pb2.EncodeRequest(parameters=vae_pb2.EncodeParameters(height=16, width=16, num_frames=1))
FIRST_DECODE = vae_pb2.DecodeRequest(parameters=vae_pb2.DecodeParameters())


async def encode(of_stage: StageClient[Any], *tensors: WireTensor, seconds: float = 20.0) -> list[WireTensor]:
    """The tensors that one Encode gives."""
    async with of_stage.call(Budget.of(seconds)) as call:
        items = [item async for item in call.stream(call.stub.Encode, FIRST_ENCODE, tensors)]
    return [item for item in items if isinstance(item, WireTensor)]


async def decode(of_stage: StageClient[Any], *tensors: WireTensor, seconds: float = 20.0) -> AsyncIterator[WireTensor]:
    """The tensors that one Decode gives, as they come."""
    async with of_stage.call(Budget.of(seconds)) as call:
        async for item in call.stream(call.stub.Decode, FIRST_DECODE, tensors):
            assert isinstance(item, WireTensor)
            yield item
