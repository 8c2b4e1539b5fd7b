"""A stage's real service on a real server in this process, a client of it, and a bundle small enough for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from bunraku.errors import InvalidRequest
from bunraku.v1 import (
    denoiser_pb2_grpc,
    encoder_pb2_grpc,
    pose_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
    vae_pb2_grpc,
)
from runtime.bundles import Bundle, load_bundle
from runtime.client import Budget, StageClient, open_channel
from runtime.server import Service, StageServer
from runtime.shared_memory import SharedMemory
from runtime.stage import Limits, StageRuntime
from runtime.tensors import WireTensor
from training.random_bundle import write_image_encoder, write_text_encoder, write_transformer, write_vae

S = TypeVar("S", bound=Service)
STUBS: dict[str, Callable[..., Any]] = {
    "encoder": encoder_pb2_grpc.EncoderServiceStub,
    "pose": pose_pb2_grpc.PoseServiceStub,
    "denoiser": denoiser_pb2_grpc.DenoiserServiceStub,
    "vae": vae_pb2_grpc.VaeServiceStub,
}
# whole numbers stand where others write 2.0
BUNDLE_TOML = """
name = "test"
task = "animate"
family = "scail"
description = "random weights"
preset = "official"
[components.transformer]
files = ["transformer.safetensors"]
quantization = "quanto-int8"
sha256 = ["ab12"]
[components.transformer.config]
in_dim = 20
out_dim = 16
dim = 48
ffn_dim = 64
num_heads = 2
num_layers = 2
freq_dim = 16
text_dim = 24
text_len = 12
image_dim = 16
pose = true
[components.vae]
files = ["vae.pth"]
[components.vae.config]
dim = 4
[components.text_encoder]
files = ["text.pth"]
tokenizer = "tokenizer"
[components.text_encoder.config]
vocab = 512
dim = 24
dim_attn = 32
dim_ffn = 40
num_heads = 4
num_layers = 2
text_len = 12
[components.image_encoder]
files = ["image.pth"]
[components.image_encoder.config]
image_size = 28
patch_size = 14
dim = 16
num_heads = 2
num_layers = 3
[sampling]
num_inference_steps = 4
guidance_scale = 2
shift = 3
solver = "dpm++"
[video]
height = 64
width = 64
window_frames = 17
window_overlap_frames = 5
max_pixels = 4096
max_frames = 81
size_multiple = 32
frames_per_second = 16
[presets.official]
pose_time_origin = 1
image_resize = "bicubic"
"""


def write_bundle(directory: Path, num_layers: int = 2) -> Bundle:
    """Writes bundle.toml and every file that it names; num_layers: of the transformer."""
    toml = BUNDLE_TOML.replace(
        "ffn_dim = 64\nnum_heads = 2\nnum_layers = 2", f"ffn_dim = 64\nnum_heads = 2\nnum_layers = {num_layers}"
    )
    (directory / "bundle.toml").write_text(toml, encoding="utf-8")
    bundle = load_bundle(directory)
    for write in (write_transformer, write_vae, write_text_encoder, write_image_encoder):
        write(bundle)
    return bundle


@dataclass(frozen=True)
class Served(Generic[S]):
    """A stage that listens, and a client of it."""

    service: S
    runtime: StageRuntime
    server: StageServer
    client: StageClient[Any]

    async def ask(
        self,
        rpc: str,
        first: Any,
        tensors: Iterable[WireTensor] | AsyncIterable[WireTensor] = (),
        *,
        seconds: float = 60.0,
        generation: str = "",
        into: Answers | None = None,
    ) -> Answers:
        """Calls a rpc whose request is a stream; `into` keeps what came before an error."""
        answers = into or Answers()
        async with self.client.call(Budget.of(seconds), generation=generation) as call:
            async for item in call.stream(getattr(call.stub, rpc), first, tensors):
                answers.items.append(item)
        return answers

    async def refused(self, rpc: str, first: Any, tensors: Iterable[WireTensor] = ()) -> tuple[tuple[str, str], ...]:
        """The violations (field, text) for which a call is an INVALID_ARGUMENT."""
        with pytest.raises(InvalidRequest) as error:
            await self.ask(rpc, first, tensors)
        return error.value.violations

    async def status(self) -> stage_pb2.GetStatusResponse:
        """What GetStatus answers."""
        channel = open_channel(f"127.0.0.1:{self.server.port}")
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        try:
            return await stub.GetStatus(stage_pb2.GetStatusRequest())
        finally:
            await channel.close(None)


@dataclass
class Answers:
    """What a call gave, in order."""

    items: list[Any] = field(default_factory=list)

    @property
    def tensors(self) -> list[WireTensor]:
        return [item for item in self.items if isinstance(item, WireTensor)]

    def messages(self, kind: str) -> list[Any]:
        """The messages of one kind, such as `step`."""
        messages = [item for item in self.items if not isinstance(item, WireTensor)]
        return [getattr(message, kind) for message in messages if message.WhichOneof("message") == kind]

    def named(self, name: str) -> list[WireTensor]:
        """The series of tensors of a name."""
        return [tensor for tensor in self.tensors if tensor.name == name]

    def one(self, name: str) -> WireTensor:
        """The only tensor of a name."""
        [tensor] = self.named(name)
        return tensor


@asynccontextmanager
async def serving(
    stage: str,
    make_service: Callable[[StageRuntime, Bundle], S],
    bundle: Bundle,
    *,
    limits: Limits | None = None,
    shared_memory: Path | None = None,
    load: bool = True,
) -> AsyncIterator[Served[S]]:
    """A stage on a free port, and a client.

    Args:
        shared_memory: directory through which both hand tensors over; None: only bytes.
        load: False: it still has to load.
    """
    memories = [SharedMemory(shared_memory) if shared_memory else None for _ in range(2)]
    runtime = StageRuntime(stage, bundle, limits=limits or Limits(), shared_memory=memories[0])
    service = make_service(runtime, bundle)
    server = StageServer(service, runtime)
    await server.start("127.0.0.1:0")
    address = f"127.0.0.1:{server.port}"
    client: StageClient[Any] = StageClient(stage, STUBS[stage], [address], shared_memory=memories[1])
    try:
        if load:
            await server.load()
        yield Served(service, runtime, server, client)
    finally:
        await client.close()
        await server.drain(0)
        if memories[1] is not None:
            memories[1].close()


async def until(holds: Callable[[], Any]) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.002)
