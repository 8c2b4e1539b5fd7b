"""Stages that answer at once with tensors of the right shapes, over real gRPC; they count and remember their calls."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import numpy as np

from bunraku.errors import BunrakuError
from bunraku.v1 import (
    denoiser_pb2,
    denoiser_pb2_grpc,
    encoder_pb2,
    encoder_pb2_grpc,
    pose_pb2,
    pose_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
    vae_pb2,
    vae_pb2_grpc,
)
from runtime.server import build_server
from runtime.telemetry import METADATA_LOAD, METADATA_REVISION
from runtime.tensors import WireTensor, receive, receive_call, send_tensors

STAGES = ("encoder", "pose", "denoiser", "vae")
Context = grpc.aio.ServicerContext[Any, Any]


def zeros(name: str, *shape: int, dtype: str = "float32") -> WireTensor:
    return WireTensor.from_numpy(name, np.zeros(shape, dtype))


class FakeStages(
    encoder_pb2_grpc.EncoderServiceServicer,
    pose_pb2_grpc.PoseServiceServicer,
    denoiser_pb2_grpc.DenoiserServiceServicer,
    vae_pb2_grpc.VaeServiceServicer,
):
    """All four stages in one servicer.

    Attributes:
        num_frames: frames that a pose video has.
        calls: parameters of every call, by rpc.
        fail_next: errors that the next calls of an rpc raise, one each; None: that one passes.
        pause: rpcs that wait for `resume` before they answer; `pose frames`: before the frames.
        revision: of what they compute, told with every answer; empty: nothing of theirs can be kept.
        forward_passes: what a run of the denoiser says that it computes; None: it does not say.
    """

    def __init__(self, num_frames: int = 9, revision: str = "") -> None:
        self.revision = revision
        self.forward_passes: denoiser_pb2.ForwardPasses | None = None
        self.num_frames = num_frames
        self.calls: dict[str, list[Any]] = defaultdict(list)
        self.tensors: dict[str, list[dict[str, WireTensor]]] = defaultdict(list)
        self.fail_next: dict[str, list[BunrakuError | None]] = defaultdict(list)
        self.pause: set[str] = set()
        self.resume = asyncio.Event()
        self.running: dict[str, int] = defaultdict(int)
        self.most_running: dict[str, int] = defaultdict(int)

    @asynccontextmanager
    async def call(self, rpc: str, parameters: Any) -> AsyncIterator[None]:
        self.calls[rpc].append(parameters)
        self.running[rpc] += 1
        self.most_running["any"] = max(self.most_running["any"], sum(self.running.values()))
        try:
            if self.fail_next[rpc] and (failure := self.fail_next[rpc].pop(0)):
                raise failure
            if rpc in self.pause:
                await self.resume.wait()
            if rpc != "Denoise":
                await self.compute(rpc)
            yield
        finally:
            self.running[rpc] -= 1

    async def compute(self, rpc: str) -> None:
        """What an answer, or a step of the denoiser, costs: nothing here."""

    async def EncodeText(self, request: encoder_pb2.EncodeTextRequest, context: Context) -> AsyncIterator[Any]:
        async with self.call("EncodeText", request):
            yield encoder_pb2.EncodeTextResponse(info=encoder_pb2.TextInfo(prompt_tokens=1))
            names = ["prompt_embeds", *(["negative_prompt_embeds"] if request.HasField("negative_prompt") else [])]
            for message in send_tensors(encoder_pb2.EncodeTextResponse, [zeros(name, 1, 8, 16) for name in names]):
                yield message

    async def EncodeImage(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        first, tensors = await receive_call(requests, ["image"])
        async with self.call("EncodeImage", first.parameters):
            self.tensors["EncodeImage"].append(tensors)
            for message in send_tensors(encoder_pb2.EncodeImageResponse, [zeros("image_embeds", 1, 5, 16)]):
                yield message

    async def FitPoseVideo(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        first, _ = await receive_call(requests, ["video"])
        p = first.parameters
        async with self.call("FitPoseVideo", p):
            messages = self._pose_messages(pose_pb2.FitPoseVideoResponse, p)
            yield next(messages)
            if "pose frames" in self.pause:
                await self.resume.wait()
            for message in messages:
                yield message

    async def ExtractPose(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        first, tensors = await receive_call(requests, ["video", "reference_image", "mask_video"])
        p = first.parameters
        self.tensors["ExtractPose"].append(tensors)
        async with self.call("ExtractPose", p):
            messages = self._pose_messages(pose_pb2.ExtractPoseResponse, p)
            yield next(messages)
            progress = pose_pb2.PoseProgress(step="detect", completed_frames=9, total_frames=9)
            yield pose_pb2.ExtractPoseResponse(progress=progress)
            for message in messages:
                yield message

    def _pose_messages(self, response: Any, p: Any) -> Iterator[Any]:
        count = min(self.num_frames, p.max_frames or self.num_frames)
        yield response(info=pose_pb2.PoseInfo(num_frames=count, frames_per_second=12, source_frames=self.num_frames))
        frames = np.zeros((count, p.height // 2, p.width // 2, 3), np.float16)
        frames[:] = np.arange(count)[:, None, None, None]
        for start in range(0, count, 7):
            yield from send_tensors(response, [WireTensor.from_numpy("pose_frames", frames[start : start + 7])])

    async def Encode(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        items = receive(requests)
        p = (await anext(items)).parameters  # type: ignore[union-attr]
        async with self.call("Encode", p):
            frames = [item.numpy() async for item in items if isinstance(item, WireTensor)]
            self.tensors["Encode"].append({"frames": WireTensor.from_numpy("frames", np.concatenate(frames))})
            latents = zeros("latents", 1, 16, (p.num_frames - 1) // 4 + 1, p.height // 8, p.width // 8)
            for message in send_tensors(vae_pb2.EncodeResponse, [latents]):
                yield message

    async def Denoise(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        names = ["prompt_embeds", "negative_prompt_embeds", "image_embeds", "reference_latents", "pose_latents"]
        first, tensors = await receive_call(requests, [*names, "history_latents", "checkpoint."])
        p = first.parameters
        self.tensors["Denoise"].append(tensors)
        response = denoiser_pb2.DenoiseResponse
        begun = p.start_from.completed_steps
        async with self.call("Denoise", p):
            plan = denoiser_pb2.DenoisePlan(num_inference_steps=p.num_inference_steps, completed_steps=begun)
            if self.forward_passes is not None:
                plan.forward_passes.CopyFrom(self.forward_passes)
            yield response(plan=plan)
            for step in range(begun + 1, p.num_inference_steps + 1):
                await self.compute("Denoise")
                yield response(step=denoiser_pb2.DenoiseStep(completed_steps=step))
                if p.checkpoint_every_steps and step % p.checkpoint_every_steps == 0:
                    checkpoint = denoiser_pb2.Checkpoint(completed_steps=step, run_digest="d", tensors=["latents"])
                    yield response(checkpoint=checkpoint)
                    for message in send_tensors(response, [zeros("checkpoint.latents", 1, 2)]):
                        yield message
                if self.fail_next["after a step"] and (failure := self.fail_next["after a step"].pop(0)):
                    raise failure
            latents = zeros("latents", 1, 16, (p.num_frames - 1) // 4 + 1, p.height // 8, p.width // 8)
            for message in send_tensors(response, [latents]):
                yield message

    async def Decode(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        first, tensors = await receive_call(requests, ["latents", "color_reference"])
        p = first.parameters
        self.tensors["Decode"].append(tensors)
        async with self.call("Decode", p):
            _, _, latent_frames, h, w = tensors["latents"].shape
            numbers = range(p.skip_frames, 4 * (latent_frames - 1) + 1)
            for start in range(0, len(numbers), 4):
                frames = np.stack([np.full((h * 8, w * 8, 3), n, np.uint8) for n in numbers[start : start + 4]])
                for message in send_tensors(vae_pb2.DecodeResponse, [WireTensor.from_numpy("frames", frames)]):
                    yield message
                if self.fail_next["after frames"] and (failure := self.fail_next["after frames"].pop(0)):
                    raise failure


class FakeStatus(stage_pb2_grpc.StageServiceServicer):
    """Tells what the fake's answers tell too."""

    def __init__(self, fake: FakeStages) -> None:
        self._fake = fake

    async def GetStatus(self, request: stage_pb2.GetStatusRequest, context: Context) -> stage_pb2.GetStatusResponse:
        return stage_pb2.GetStatusResponse(
            state=stage_pb2.StageState.STAGE_STATE_SERVING, revision=self._fake.revision, max_concurrent_requests=100
        )


@asynccontextmanager
async def serving(fake: FakeStages, port: int = 0) -> AsyncIterator[Mapping[str, Sequence[str]]]:
    """Serves the fake; gives the address of every stage, which is the same."""

    @asynccontextmanager
    async def greeted(method: str, context: Context) -> AsyncIterator[None]:
        if fake.revision:
            load = f"{sum(fake.running.values())}/0/100"
            await context.send_initial_metadata(((METADATA_REVISION, fake.revision), (METADATA_LOAD, load)))
        yield

    async with AsyncExitStack() as stack:
        server = build_server(greeted)
        if fake.revision:
            stage_pb2_grpc.add_StageServiceServicer_to_server(FakeStatus(fake), server)  # type: ignore[abstract]  # no shared memory
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(fake, server)
        pose_pb2_grpc.add_PoseServiceServicer_to_server(fake, server)
        denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(fake, server)
        vae_pb2_grpc.add_VaeServiceServicer_to_server(fake, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        stack.push_async_callback(server.stop, None)
        yield {stage: [f"127.0.0.1:{bound}"] for stage in STAGES}
