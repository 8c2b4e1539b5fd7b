"""A gateway process that is killed in the middle of a generation: the next one goes on where it was, and no further back."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from bunraku.client import AsyncClient
from bunraku.errors import NotReady
from bunraku.v1 import gateway_pb2 as pb
from gateway.blobs import BlobStore, open_blobs
from tests.gateway.buckets import KEY, S3Server, s3_server
from tests.gateway.fake_stages import FakeStages, serving
from tests.system.media import read_video, write_picture, write_pose_video

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 4


class HeldStages(FakeStages):
    """Holds the denoiser before a step, counted over all windows."""

    def __init__(self) -> None:
        super().__init__(num_frames=41, revision="r1")
        self.steps, self.hold_at = 0, -1
        self.held, self.go_on = asyncio.Event(), asyncio.Event()

    async def compute(self, rpc: str) -> None:
        if rpc == "Denoise":
            self.steps += 1
            if self.steps == self.hold_at:
                self.held.set()
                await self.go_on.wait()

    def counts(self) -> dict[str, int]:
        return {rpc: len(calls) for rpc, calls in self.calls.items() if calls}


@dataclass
class GatewayProcess:
    """`python -m gateway` on a socket in a directory."""

    directory: Path
    stages: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"unix:{self.directory}/gateway.sock"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.subprocess.Process]:
        environment = {
            **os.environ,
            "BUNRAKU_ADDRESS": self.address,
            "BUNRAKU_DATA": str(self.directory / "data"),
            "BUNRAKU_BUNDLE": str(ROOT / "bundles" / "tiny"),
            "BUNRAKU_CHECKPOINT_EVERY_STEPS": "1",
            **{f"BUNRAKU_{stage.upper()}": address for stage, address in self.stages.items()},
            **self.environment,
        }
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", cwd=ROOT, env=environment)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(params=["directory", pytest.param("bucket", marks=pytest.mark.slow)])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, str], BlobStore]:
    """Settings of the gateway, and where it keeps outputs."""
    if request.param == "directory":
        return {}, open_blobs(tmp_path / "data" / "outputs")
    server: S3Server = request.getfixturevalue("server")
    server.blobs()
    bucket = server.buckets[-1]
    settings = {f"AWS_{name.upper()}": value for name, value in KEY.items()}
    settings |= {"BUNRAKU_STORAGE": f"s3://{bucket}/bunraku", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}
    return settings, server.open(bucket, "bunraku/outputs")


async def connected(client: AsyncClient) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await client.connect(timeout_s=1)
                return
            except NotReady:
                await asyncio.sleep(0.05)


async def ended(client: AsyncClient, name: str) -> pb.Generation:
    async with asyncio.timeout(40):
        async for _ in client.watch(name):
            pass
    generation = await client.get(name)
    assert generation.state == pb.GENERATION_STATE_SUCCEEDED, generation.error
    return generation


async def until_kept(blobs: BlobStore, ending: str) -> None:
    async with asyncio.timeout(10):
        while not any(ending in blob.name for blob in await blobs.under("jobs/")):
            await asyncio.sleep(0.02)


async def until_gone(blobs: BlobStore) -> None:
    """A generation has ended before what was kept for it is removed."""
    async with asyncio.timeout(10):
        while await blobs.under("jobs/"):
            await asyncio.sleep(0.02)


async def test_a_killed_gateway_repeats_no_stage_that_was_finished(
    kept: tuple[dict[str, str], BlobStore], tmp_path: Path
) -> None:
    settings, blobs = kept
    fake = HeldStages()  # type: ignore[abstract]  # the rpcs that are not there yet
    picture = write_picture(tmp_path / "ref.png", 32, 32)
    pose_video = write_pose_video(tmp_path / "pose.mp4", 41, 32, 32)
    async with serving(fake) as addresses:
        gateway = GatewayProcess(tmp_path, {stage: each[0] for stage, each in addresses.items()}, settings)
        async with gateway.running() as process, AsyncClient(gateway.address) as client:
            await connected(client)

            async def animate(prompt: str) -> pb.Generation:
                return await client.animate(
                    reference_image=picture,
                    pose_video=pose_video,
                    prompt=prompt,
                    num_inference_steps=STEPS,
                    height=32,
                    width=32,
                    num_frames=41,
                )

            undisturbed = await ended(client, (await animate("one dance")).name)
            await client.download(undisturbed.video, tmp_path / "undisturbed.mp4")
            windows = len(fake.calls["Denoise"])
            fake.calls.clear()
            fake.steps, fake.hold_at = 0, STEPS * (windows - 1) + 3  # in the last window, after two of its steps
            generation = await animate("another dance")
            await fake.held.wait()
            await until_kept(blobs, "/00002-")
            process.kill()
            await process.wait()
        fake.go_on.set()
        async with gateway.running(), AsyncClient(gateway.address) as client:
            await connected(client)
            generation = await ended(client, generation.name)
            await client.download(generation.video, tmp_path / "killed.mp4")
    assert windows > 1
    assert generation.attempts == 2
    assert fake.counts() == {"EncodeText": 1, "Denoise": windows + 1, "Decode": windows}
    assert [call.start_from.completed_steps for call in fake.calls["Denoise"]] == [0] * windows + [2]
    assert np.array_equal(read_video(tmp_path / "undisturbed.mp4"), read_video(tmp_path / "killed.mp4"))
    await until_gone(blobs)
