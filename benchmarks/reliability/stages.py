"""`python -m benchmarks.reliability.stages STAGE PORT LOG MEMORY COSTS`: one stage with the real contracts, whose work is to sleep.

What the denoiser gives depends on every step that it ran, so a result tells whether it went on from the right place.
LOG gets a line for all that happens: monotonic seconds of this host, what, and the seed or prompt that it was for.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stub_stages import ROOT, SLOTS, StubStage
from bunraku.v1 import denoiser_pb2, vae_pb2
from runtime.bundles import load_bundle
from runtime.server import ServerSettings, run
from runtime.shared_memory import SharedMemory
from runtime.stage import Limits, StageRuntime
from runtime.tensors import WireTensor, receive_call, send_tensors
from tests.gateway.fake_stages import Context

_MODULUS = 2**31 - 1
_CONDITIONING = ("prompt_embeds", "negative_prompt_embeds", "image_embeds", "reference_latents", "pose_latents")


class CountingStage(StubStage):
    """A stage that tells what it does."""

    def __init__(
        self, stage: str, runtime: StageRuntime, costs: Mapping[str, float], num_frames: int, log: Path
    ) -> None:
        super().__init__(stage, runtime, costs, num_frames)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(self, what: str, of: object = "") -> None:
        os.write(self._log, f"{time.monotonic():.4f}\t{what}\t{of}\n".encode())

    @asynccontextmanager
    async def call(self, rpc: str, parameters: Any) -> AsyncIterator[None]:
        of = getattr(parameters, "prompt", "") or getattr(parameters, "seed", "")
        self.tell(f"begin {rpc}", of)
        try:
            async with super().call(rpc, parameters):
                yield
            self.tell(f"end {rpc}", of)
        finally:
            self.tell(f"left {rpc}", of)

    async def Denoise(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        first, tensors = await receive_call(requests, [*_CONDITIONING, "history_latents", "checkpoint."])
        p, response = first.parameters, denoiser_pb2.DenoiseResponse
        begun, state = p.start_from.completed_steps, p.seed % _MODULUS
        if begun:
            state = int(tensors["checkpoint.state"].numpy()[0])
        async with self.call("Denoise", p):
            self.tell("start", f"{p.seed} {begun}")
            yield response(
                plan=denoiser_pb2.DenoisePlan(num_inference_steps=p.num_inference_steps, completed_steps=begun)
            )
            for step in range(begun + 1, p.num_inference_steps + 1):
                await self.compute("Denoise")
                state = (state * 48271 + step) % _MODULUS
                self.tell("step", f"{p.seed} {step}")
                yield response(step=denoiser_pb2.DenoiseStep(completed_steps=step))
                if p.checkpoint_every_steps and step % p.checkpoint_every_steps == 0:
                    checkpoint = denoiser_pb2.Checkpoint(
                        completed_steps=step, run_digest=str(p.seed), tensors=["state"]
                    )
                    yield response(checkpoint=checkpoint)
                    kept = WireTensor.from_numpy("checkpoint.state", np.array([state], np.int64))
                    for message in send_tensors(response, [kept]):
                        yield message
            shape = (1, 16, (p.num_frames - 1) // 4 + 1, p.height // 8, p.width // 8)
            latents = np.full(shape, state % 251, np.float32)
            for message in send_tensors(response, [WireTensor.from_numpy("latents", latents)]):
                yield message

    async def Decode(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        first, tensors = await receive_call(requests, ["latents", "color_reference"])
        p = first.parameters
        latents = tensors["latents"].numpy()
        _, _, latent_frames, h, w = latents.shape
        async with self.call("Decode", p):
            for number in range(p.skip_frames, 4 * (latent_frames - 1) + 1):
                shade = (int(latents[0, 0, 0, 0, 0]) + 16 * number) % 256
                frame = np.full((1, h * 8, w * 8, 3), shade, np.uint8)
                for message in send_tensors(vae_pb2.DecodeResponse, [WireTensor.from_numpy("frames", frame)]):
                    yield message


async def _serve(stage: str, port: int, log: Path, memory: Path, costs: Mapping[str, float]) -> int:
    bundle = load_bundle(ROOT / "bundles" / "tiny")
    limits = Limits(max_concurrent=SLOTS[stage], max_queued=100)
    runtime = StageRuntime(stage, bundle, limits=limits, shared_memory=SharedMemory.create(memory))
    service = CountingStage(stage, runtime, costs, 9, log)  # type: ignore[abstract]  # not all rpcs
    return await run(service, runtime, ServerSettings(f"127.0.0.1:{port}", grace_s=1.0))


if __name__ == "__main__":
    name, number, told, shared, seconds = sys.argv[1:]
    sys.exit(asyncio.run(_serve(name, int(number), Path(told), Path(shared), json.loads(seconds))))
