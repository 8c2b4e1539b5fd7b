"""The five processes with a bundle, and what is asked of them: whole animations, and single stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.quality.suite import Case, read_video
from bunraku.client import AnimateArguments, AsyncClient
from bunraku.supervisor import STAGES, Supervisor, SystemSettings, system_programs
from bunraku.v1 import pose_pb2, pose_pb2_grpc, vae_pb2, vae_pb2_grpc
from runtime.client import Budget, StageClient
from runtime.tensors import WireTensor

_AT_ONCE = 2
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Services:
    """A system that runs.

    Attributes:
        directory: where videos are put.
        vae, pose: clients of these stages.
    """

    client: AsyncClient
    vae: StageClient[Any]
    pose: StageClient[Any]
    directory: Path

    async def animate(
        self, cases: Sequence[Case], motions: Sequence[Path], *, named: str, steps: int | None = None, **arguments: Any
    ) -> list[Tensor]:
        """Videos uint8 [T, H, W, 3] of the cases' characters and captions, moving as files say: raw driving clips, or
        ready pose videos where their names say so.

        Args:
            named: of the files.
            arguments: of AsyncClient.animate.
        """
        free = asyncio.Semaphore(_AT_ONCE)

        async def one(number: int, case: Case, motion: Path) -> Tensor:
            kind = "pose_video" if motion.stem.endswith("pose") else "driving_video"
            asked: AnimateArguments = {"reference_image": case.reference, "prompt": case.caption, "seed": number}
            given: Any = {**asked, kind: motion, "num_inference_steps": steps, **arguments}
            video = self.directory / f"{named}-{number:03}.mp4"
            async with free:
                generation = await self.client.animate(**given)
                generation = await self.client.wait(generation.name, timeout_s=_TIMEOUT_S)
                await self.client.download(generation.video, video)
            frames = read_video(video)
            if frames.shape != case.truth.clip.shape:
                raise ValueError(f"{video.name} is {tuple(frames.shape)}, not of the size of the reference and clip")
            return frames

        pairs = enumerate(zip(cases, motions, strict=True))
        return await asyncio.gather(*(one(number, case, motion) for number, (case, motion) in pairs))

    async def reconstruct(self, frames: Tensor) -> Tensor:
        """Frames uint8 [T, H, W, 3] through the VAE's encoder and decoder."""
        num_frames, height, width, _ = frames.shape
        encode = vae_pb2.EncodeRequest(
            parameters=vae_pb2.EncodeParameters(num_frames=num_frames, height=height, width=width)
        )
        given = [WireTensor.from_numpy("frames", frames.numpy())]
        [latents] = [item async for item in self._stream(self.vae, "Encode", encode, given) if item.name == "latents"]
        rounding = vae_pb2.PIXEL_ROUNDING_NEAREST
        decode = vae_pb2.DecodeRequest(parameters=vae_pb2.DecodeParameters(rounding=rounding))
        decoded = [item.numpy().copy() async for item in self._stream(self.vae, "Decode", decode, [latents])]
        return torch.from_numpy(np.concatenate(decoded))

    async def extract(self, case: Case) -> Tensor:
        """The joints that the pose stage finds in a case's driving clip: float32 [T, 24, 3]."""
        side = case.truth.side
        first = pose_pb2.ExtractPoseRequest(
            parameters=pose_pb2.ExtractPoseParameters(height=side, width=side, people=1, give_joints=True)
        )
        reference = np.asarray(Image.open(case.reference).convert("RGB"))
        given = [
            WireTensor.from_bytes("video", case.driving.read_bytes()),
            WireTensor.from_numpy("reference_image", reference),
        ]
        [joints] = [
            item async for item in self._stream(self.pose, "ExtractPose", first, given) if item.name == "joints"
        ]
        return torch.from_numpy(joints.numpy().copy())[:, 0]

    async def _stream(
        self, stage: StageClient[Any], method: str, first: Any, tensors: Sequence[WireTensor]
    ) -> AsyncIterator[WireTensor]:
        """The tensors that a call answers."""
        async with stage.call(Budget.of(_TIMEOUT_S), generation="benchmark", attempt=1) as call:
            async for item in call.stream(getattr(call.stub, method), first, tensors):
                if isinstance(item, WireTensor):
                    yield item


@asynccontextmanager
async def running(bundle: Path, data: Path, precision: str | None = None) -> AsyncIterator[Services]:
    """Starts the five processes with a bundle on this machine; stops them at the end. precision: of the denoiser."""
    chosen = {} if precision is None else {"BUNRAKU_PRECISION": precision}
    programs = [
        replace(program, environment={**program.environment, **chosen}) if program.name == "denoiser" else program
        for program in system_programs(SystemSettings(bundle=bundle, data=data, port=0))
    ]
    addresses = {program.name: program.address for program in programs}
    assert addresses.keys() >= set(STAGES)
    async with Supervisor(programs, data=data) as supervisor, AsyncClient(supervisor.address) as client:
        vae: StageClient[Any] = StageClient("vae", vae_pb2_grpc.VaeServiceStub, [addresses["vae"]])
        pose: StageClient[Any] = StageClient("pose", pose_pb2_grpc.PoseServiceStub, [addresses["pose"]])
        try:
            yield Services(client, vae, pose, data)
        finally:
            await vae.close()
            await pose.close()
