"""`python -m services.X` as real processes: health, status, SIGTERM, and what a wrong bundle ends them with."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bunraku.v1 import stage_pb2, stage_pb2_grpc
from runtime.bundles import Bundle
from runtime.client import open_channel

SERVICES = {"encoder": "EncoderService", "pose": "PoseService", "denoiser": "DenoiserService", "vae": "VaeService"}
_PATIENCE_S = 100.0  # importing torch takes a second, or half a minute on a machine that is busy
COMPONENTS = {
    "encoder": ["text_encoder", "image_encoder"],
    "pose": [],
    "denoiser": ["transformer"],
    "vae": ["vae"],
}


@dataclass(frozen=True)
class Process:
    """A stage as a process."""

    stage: str
    address: str
    process: asyncio.subprocess.Process

    async def ended(self) -> tuple[int, str]:
        """Its exit status and its log."""
        async with asyncio.timeout(_PATIENCE_S):
            log, _ = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, log.decode()

    async def status(self) -> stage_pb2.GetStatusResponse:
        """What GetStatus answers once it is healthy."""
        channel = open_channel(self.address)
        health: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=f"bunraku.v1.{SERVICES[self.stage]}")
        try:
            async with asyncio.timeout(_PATIENCE_S):
                answers = health.Watch(request, wait_for_ready=True)
                async for answer in answers:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        break
                answers.cancel()
                stub: Any = stage_pb2_grpc.StageServiceStub(channel)
                response: stage_pb2.GetStatusResponse = await stub.GetStatus(stage_pb2.GetStatusRequest())
                return response
        finally:
            await channel.close(None)


@asynccontextmanager
async def started(stage: str, bundle: Path, shared_memory: Path) -> AsyncIterator[Process]:
    """A stage process on a free port; killed at the end if it is still there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("BUNRAKU_", "OTEL_"))},
        "OMP_NUM_THREADS": "1",
        "BUNRAKU_ADDRESS": address,
        "BUNRAKU_BUNDLE": str(bundle),
        "BUNRAKU_DEVICE": "cpu",
        "BUNRAKU_SHARED_MEMORY_DIRECTORY": str(shared_memory),
        "BUNRAKU_MAX_QUEUED": "3",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"services.{stage}"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Process(stage, address, process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def check_lives(stages: Sequence[str], bundle: Bundle, tmp_path: Path) -> None:
    """Each becomes healthy, answers and ends with status 0 on SIGTERM."""
    directory = bundle.component("vae").files[0].parent
    async with AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(started(stage, directory, tmp_path)) for stage in stages]
        for process, status in zip(processes, await asyncio.gather(*(p.status() for p in processes)), strict=True):
            assert (status.stage, status.state) == (process.stage, stage_pb2.STAGE_STATE_SERVING)
            assert (status.bundle, status.bundle_revision) == ("test", bundle.revision)
            assert (status.device, status.max_queued_requests) == ("cpu", 3)
            assert [component.name for component in status.components] == COMPONENTS[process.stage]
            process.process.send_signal(signal.SIGTERM)
        for process in processes:
            returncode, log = await process.ended()
            assert returncode == 0, log
            assert f"{process.stage}: loaded in" in log
            assert "Traceback" not in log
            assert "ERROR" not in log
    assert os.listdir(tmp_path) == []


async def test_the_stage_without_torch_serves_and_ends_on_sigterm(bundle: Bundle, tmp_path: Path) -> None:
    await check_lives(["pose"], bundle, tmp_path)


@pytest.mark.slow
async def test_the_stages_with_torch_serve_and_end_on_sigterm(bundle: Bundle, tmp_path: Path) -> None:
    await check_lives(["encoder", "denoiser", "vae"], bundle, tmp_path)


@pytest.mark.slow
async def test_a_bundle_that_does_not_fit_ends_a_stage_with_a_reason(bundle: Bundle, tmp_path: Path) -> None:
    directory = bundle.component("vae").files[0].parent
    incomplete, wrong = tmp_path / "incomplete", tmp_path / "wrong"
    incomplete.mkdir()
    wrong.mkdir()
    for target in (incomplete, wrong):
        shutil.copy(directory / "bundle.toml", target)
    tensors = torch.load(directory / "vae.pth", weights_only=True)
    torch.save({**tensors, "decoder.surplus.weight": torch.zeros(3)}, wrong / "vae.pth")
    async with started("denoiser", incomplete, tmp_path) as lacking, started("vae", wrong, tmp_path) as surplus:
        returncode, log = await lacking.ended()
        assert returncode == 1, log
        assert f"transformer: not there: {incomplete / 'transformer.safetensors'}" in log
        assert "Traceback" not in log  # what is missing is all that there is to say
        returncode, log = await surplus.ended()
        assert returncode == 1, log
        assert "vae.pth does not fit Vae: 1 unknown (decoder.surplus.weight)" in log


async def test_a_directory_without_a_bundle_ends_a_stage_with_a_reason(tmp_path: Path) -> None:
    async with started("pose", tmp_path / "nowhere", tmp_path) as process:
        returncode, log = await process.ended()
    assert returncode == 2, log
    assert f"{tmp_path / 'nowhere' / 'bundle.toml'}" in log
    assert "Traceback" not in log
