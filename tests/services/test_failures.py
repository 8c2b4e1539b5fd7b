"""A request that fails in a stage fails alone: the next is served by the same process, and no memory stays behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bunraku.errors import OutOfMemory, StageBroken
from bunraku.v1 import stage_pb2
from runtime.bundles import Bundle
from services.denoiser.service import DenoiserService
from services.encoder.service import EncoderService
from services.vae.service import VaeService
from tests.services.denoiser import test_service as denoiser
from tests.services.encoder import test_service as encoder
from tests.services.serving import Served, serving
from tests.services.vae import test_service as vae

SERVICES: dict[str, Any] = {"encoder": EncoderService, "denoiser": DenoiserService, "vae": VaeService}
# What is asked, by stage and rpc, and the model that answers it
ASKS: dict[str, tuple[str, Callable[[Served[Any]], Awaitable[Any]], Callable[[Any], nn.Module]]] = {
    "EncodeText": ("encoder", lambda s: encoder.encode_text(s, "a dance"), lambda s: s._text.model),
    "EncodeImage": ("encoder", encoder.encode_image, lambda s: next(iter(s._image.values())).model),
    "Denoise": ("denoiser", denoiser.run, lambda s: s._model),
    "Encode": ("vae", lambda s: vae.encode(s, vae.clip(5)), lambda s: s._vae.conv1),
    "Decode": ("vae", lambda s: vae.decode(s, vae.some_latents(2)), lambda s: s._vae.conv2),
}


@pytest.fixture(params=ASKS)
def rpc(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def served(rpc: str, bundle: Bundle) -> AsyncIterator[tuple[Served[Any], nn.Module]]:
    """The stage of a rpc, and the module that its answer comes from."""
    stage, _, model_of = ASKS[rpc]
    async with serving(stage, SERVICES[stage], bundle) as running:
        yield running, model_of(running.service)


@contextmanager
def once(model: nn.Module, outcome: Callable[[Tensor], Any]) -> Iterator[list[weakref.ref[Tensor]]]:
    """The first module in `model` that runs gives what `outcome` makes of a tensor of 64 MiB, whose references are given."""
    held: list[weakref.ref[Tensor]] = []

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        if held:
            return output
        activations = torch.zeros(16 << 20)
        held.append(weakref.ref(activations))
        cycle: list[Any] = [activations]  # as frameworks leave them: nothing but the garbage collector frees it
        cycle.append(cycle)
        return outcome(activations) if not isinstance(output, Tensor) else outcome(activations) or output * torch.nan

    leaf = next(module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd))
    handle = leaf.register_forward_hook(hook)
    try:
        yield held
    finally:
        handle.remove()


def out_of_memory(activations: Tensor) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB")


def bug(activations: Tensor) -> Any:
    raise ValueError("a bug of the model")


async def check_that_the_next_is_served(rpc: str, running: Served[Any], held: list[weakref.ref[Tensor]]) -> None:
    assert [reference() for reference in held] == [None]
    assert (await running.status()).state == stage_pb2.STAGE_STATE_SERVING
    assert not running.runtime.broken.is_set()
    await ASKS[rpc][1](running)
    assert not running.runtime.status().work


async def test_a_device_out_of_memory_fails_that_request_only_and_its_memory_is_freed_at_once(
    rpc: str, bundle: Bundle
) -> None:
    async with served(rpc, bundle) as (running, model):
        with once(model, out_of_memory) as held, pytest.raises(OutOfMemory, match="does not fit the memory"):
            await ASKS[rpc][1](running)
        await check_that_the_next_is_served(rpc, running, held)


async def test_a_bug_fails_that_request_only(rpc: str, bundle: Bundle) -> None:
    async with served(rpc, bundle) as (running, model):
        with once(model, bug) as held, pytest.raises(StageBroken, match="a bug of the model") as raised:
            await ASKS[rpc][1](running)
        assert raised.value.reason == "BUG"
        gc.collect()
        await check_that_the_next_is_served(rpc, running, held)


async def test_what_is_no_number_fails_that_request_only(rpc: str, bundle: Bundle) -> None:
    async with served(rpc, bundle) as (running, model):
        with once(model, lambda activations: None) as held, pytest.raises(StageBroken, match="not finite") as raised:
            await ASKS[rpc][1](running)
        assert raised.value.reason.endswith("_NOT_FINITE")
        gc.collect()
        await check_that_the_next_is_served(rpc, running, held)
