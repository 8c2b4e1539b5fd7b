"""Whether the denoiser is kept busy, and what a job costs the gateway: a real gateway process, stages of fixed cost.

`python -m benchmarks.pipeline [--jobs N]` queues N jobs at once and prints how much of the time the denoiser was at
work from the start of the second job's denoise to the end of the last one's, how long the other stages were, and the
gateway's processor time per job, beside that of the same tensors sent and received without anything around them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from benchmarks.gateway_overhead import gateway_address, until_up
from benchmarks.stub_stages import ROOT, Spans, Stubs, stub_stages
from bunraku.client import Client
from bunraku.v1 import denoiser_pb2
from bunraku.v1 import gateway_pb2 as pb
from gateway.stages import Conditioning, Decoding, Frames, Stages, Work, connect
from runtime.client import Budget
from tests.gateway.fake_stages import zeros
from tests.gateway.test_animate import Told
from tests.system.media import write_picture, write_pose_video

SIDE, FRAMES, STEPS = 64, 9, 5
# Seconds; in the proportions of real models the denoiser has still more of the whole
COSTS = {
    "EncodeText": 0.05,
    "EncodeImage": 0.05,
    "FitPoseVideo": 0.1,
    "Encode": 0.1,
    "Denoise": 0.2,
    "Decode": 0.2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as directory, stub_stages(COSTS, FRAMES) as stubs:
        cpu_s, wall_s = worked_off(Path(directory), stubs, jobs)
        transport_s = asyncio.run(transport(stubs, jobs))
        spans = stubs.spans()
    alone_s = sum(COSTS.values()) + (STEPS - 1) * COSTS["Denoise"] + COSTS["Encode"]
    print(f"{jobs} jobs in {wall_s:.1f} s; one after another their stages would take {jobs * alone_s:.1f} s\n")
    print("| | |\n| --- | ---: |")
    print(f"| **denoiser at work** | {100 * busy(spans, jobs):.1f} % |")
    print(f"| gateway's processor time per job | {1000 * cpu_s / jobs:.1f} ms |")
    print(f"| of it transport: the same calls and tensors, bare | {1000 * transport_s / jobs:.1f} ms |")
    print(f"| **gateway's processor time per job without transport** | {1000 * (cpu_s - transport_s) / jobs:.1f} ms |")


def worked_off(directory: Path, stubs: Stubs, jobs: int) -> tuple[float, float]:
    """Seconds of the gateway's processor time, and seconds that passed, for so many jobs that are queued at once."""
    picture = write_picture(directory / "ref.png", SIDE, SIDE)
    pose = write_pose_video(directory / "pose.mp4", FRAMES, SIDE, SIDE)
    gateway = start_gateway(directory, stubs.addresses)
    try:
        with Client(gateway_address(directory)) as client:
            until_up(client, gateway)
            reference, driving = client.upload(picture), client.upload(pose)

            def create(number: int) -> pb.Generation:
                return client.animate(
                    reference_image=reference,
                    pose_video=driving,
                    prompt=f"dance {number}",
                    num_inference_steps=STEPS,
                    guidance_scale=1.0,
                    height=SIDE,
                    width=SIDE,
                )

            process = psutil.Process(gateway.pid)
            before, begun = sum(process.cpu_times()[:2]), time.monotonic()
            for generation in [create(number) for number in range(jobs)]:
                for event in client.watch(generation.name):
                    if event.generation.state == pb.GENERATION_STATE_FAILED:
                        raise RuntimeError(event.generation.error.message)
            return sum(process.cpu_times()[:2]) - before, time.monotonic() - begun
    finally:
        gateway.terminate()
        gateway.wait(20)


def start_gateway(directory: Path, addresses: Mapping[str, str]) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "BUNRAKU_ADDRESS": gateway_address(directory),
        "BUNRAKU_DATA": str(directory / "data"),
        "BUNRAKU_BUNDLE": str(ROOT / "bundles" / "tiny"),
        "BUNRAKU_LOG_LEVEL": "WARNING",
        # every job is to need every stage
        "BUNRAKU_OUTPUT_CACHE_BYTES": "0",
        **{f"BUNRAKU_{stage.upper()}": address for stage, address in addresses.items()},
    }
    return subprocess.Popen([sys.executable, "-m", "gateway"], cwd=ROOT, env=environment)


def busy(spans: Spans, jobs: int) -> float:
    """Share of the time that the denoiser was at work, from the second job's first step to the last one's last."""
    steps = sorted(spans["denoiser"])[: jobs * STEPS][STEPS:]
    return sum(end - begun for begun, end in steps) / (steps[-1][1] - steps[0][0])


async def transport(stubs: Stubs, jobs: int) -> float:
    """Seconds of this process's processor time for the calls of so many jobs, with nothing around them."""
    stages = connect({stage: [address] for stage, address in stubs.addresses.items()}, None)
    work = Work("generations/bare", Budget.of(600), Told())
    picture = zeros("image", SIDE, SIDE, 3, dtype="uint8").numpy()
    try:
        await calls(stages, work, picture)
        begun = time.process_time()
        for _ in range(jobs):
            await calls(stages, work, picture)
        return time.process_time() - begun
    finally:
        await stages.close()


async def calls(stages: Stages, work: Work, picture: Frames) -> None:
    """What one job sends and receives."""

    async def drop(frames: Frames) -> None:
        """Frames are not kept."""

    text = await stages.encoder.encode_text(work, "a dance", None)
    image = await stages.encoder.encode_image(work, picture, "bicubic")
    reference = await stages.vae.encode(work, "reference", picture[None])
    async for _ in stages.pose.fit(work, b"a video", SIDE, SIDE, FRAMES, 1):
        pass
    half = zeros("frames", FRAMES, SIDE // 2, SIDE // 2, 3, dtype="uint8")
    pose = await stages.vae.encode_once(work, half.shape[:3], [half], 1)
    tensors = {
        **text.tensors,
        **image.tensors,
        "reference_latents": reference.tensors["latents"].named("reference_latents"),
        "pose_latents": pose.tensors["latents"].named("pose_latents"),
    }
    parameters = denoiser_pb2.DenoiseParameters(
        height=SIDE, width=SIDE, num_frames=FRAMES, num_inference_steps=STEPS, checkpoint_every_steps=5
    )
    denoised = await stages.denoiser.denoise(work, parameters, Conditioning(tensors, {"all": ""}))
    await stages.vae.decode(work, denoised.tensors["latents"], Decoding("nearest"), drop)


if __name__ == "__main__":
    main()
