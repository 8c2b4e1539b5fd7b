"""The pods of a LeaderWorkerSet, started with what its manifest and its controller give them, denoise together."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bunraku.v1 import denoiser_pb2 as pb
from bunraku.v1 import denoiser_pb2_grpc
from runtime.client import Budget, StageClient
from runtime.tensors import WireTensor
from runtime.torch_tensors import from_torch
from services.denoiser.conditioning import seeded_noise
from tests.k8s.pods import Place, Pod
from tests.k8s.rendered import base_with, containers, of_kind

LEADER = "127.0.8.3"


def group(data: Path) -> list[Pod]:
    """Leader and workers, on a loopback address each, with the variables that the controller of LeaderWorkerSet adds."""
    manifests = base_with("leader-worker-set")
    size = of_kind(manifests, "LeaderWorkerSet")["denoiser-group"]["spec"]["leaderWorkerTemplate"]["size"]
    leader, worker = [container for container in containers(manifests) if container.name == "denoiser"]
    place = Place({}, data)
    pods = []
    for index in range(size):
        added = {"LWS_LEADER_ADDRESS": LEADER, "LWS_GROUP_SIZE": str(size), "LWS_WORKER_INDEX": str(index)}
        host = LEADER if index == 0 else f"127.0.8.{3 + index}"
        # gloo, which is there in place of NCCL, would ask for an address of the machine's name
        pods.append(Pod(worker if index else leader, host, place, added | {"GLOO_SOCKET_IFNAME": "lo"}))
    return pods


def tiny_clip() -> list[WireTensor]:
    """Conditioning of 64x64 pixels and 5 frames for the embedded bundle."""
    shapes = {
        "prompt_embeds": (1, 4, 64),
        "negative_prompt_embeds": (1, 4, 64),
        "image_embeds": (1, 5, 96),
        "reference_latents": (1, 16, 1, 8, 8),
        "pose_latents": (1, 16, 2, 4, 4),
    }
    return [from_torch(name, seeded_noise(shape, 1)) for name, shape in shapes.items()]


async def denoise_once(address: str) -> list[WireTensor]:
    """The tensors that come back."""
    parameters = pb.DenoiseParameters(height=64, width=64, num_frames=5, num_inference_steps=2, seed=7)
    client: StageClient[Any] = StageClient("denoiser", denoiser_pb2_grpc.DenoiserServiceStub, [address])
    try:
        async with client.call(Budget.of(60)) as call:
            request = pb.DenoiseRequest(parameters=parameters)
            items = [item async for item in call.stream(call.stub.Denoise, request, tiny_clip())]
    finally:
        await client.close()
    return [item for item in items if isinstance(item, WireTensor)]


@pytest.mark.slow
async def test_a_group_lives_by_its_manifest(tmp_path: Path) -> None:
    pods = group(tmp_path)
    try:
        for pod in pods:
            await pod.start()
        for pod in pods:
            await pod.until_ready()
            assert await pod.probe("livenessProbe")
        [latents] = await denoise_once(pods[0].address)
        assert (latents.name, latents.shape) == ("latents", (1, 16, 2, 8, 8))
        await asyncio.gather(*(pod.stop() for pod in pods))
    finally:
        for pod in pods:
            await pod.kill()
