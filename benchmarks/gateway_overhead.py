"""What the gateway itself costs per request: a real gateway process, stages that answer at once in another.

`python -m benchmarks.gateway_overhead [--requests N]` animates a small picture N times, one after another, and prints
the time from CreateGeneration to the event that says SUCCEEDED, beside what cannot be left out: as many bare gRPC calls
as a request makes, decoding its picture and its pose video's first frame, and encoding its MP4.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from bunraku.client import Client
from bunraku.errors import NotReady
from bunraku.v1 import gateway_pb2 as pb
from gateway.media import VideoWriter, read_image
from runtime.video import probe_video
from tests.gateway.fake_stages import FakeStages, serving
from tests.system.media import write_picture, write_pose_video

ROOT = Path(__file__).resolve().parent.parent
SIDE, FRAMES = 64, 9
CALLS = 8  # CreateGeneration, WatchGeneration, and six calls to stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=40)
    requests = parser.parse_args().requests
    with tempfile.TemporaryDirectory() as directory:
        picture = write_picture(Path(directory) / "ref.png", SIDE, SIDE)
        pose = write_pose_video(Path(directory) / "pose.mp4", FRAMES, SIDE, SIDE)
        whole, call = measured(Path(directory), picture, pose, requests)
        parts = {
            f"{CALLS} bare gRPC calls": CALLS * call,
            "decode picture and probe video, as at creation": median_ms(lambda: looked_at(picture, pose), requests),
            "decode the picture again, as at work": median_ms(lambda: read_image(picture, "image"), requests),
            f"encode an MP4 of {FRAMES} frames": median_ms(lambda: encoded(Path(directory) / "out.mp4"), requests),
        }
    floor = sum(parts.values())
    print("| | ms |\n| --- | --- |")
    for name, milliseconds in parts.items():
        print(f"| {name} | {milliseconds:.1f} |")
    print(f"| **floor: their sum** | {floor:.1f} |")
    print(f"| **request with instant stages**, median of {requests} | {statistics.median(whole):.1f} |")
    print(f"| 95th percentile | {statistics.quantiles(whole, n=20)[-1]:.1f} |")
    print(f"| median / floor | {statistics.median(whole) / floor:.2f} |")


def measured(directory: Path, picture: Path, pose: Path, requests: int) -> tuple[list[float], float]:
    """Milliseconds of each request, and of one bare call."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    stages = context.Process(target=serve_stages, args=(theirs,), daemon=True)
    stages.start()
    address = ours.recv()
    gateway = start_gateway(directory, address)
    try:
        with Client(gateway_address(directory)) as client:
            until_up(client, gateway)
            reference, driving = client.upload(picture), client.upload(pose)

            def animate() -> None:
                generation = client.animate(
                    reference_image=reference, pose_video=driving, num_inference_steps=4, height=SIDE, width=SIDE
                )
                for event in client.watch(generation.name):
                    if event.generation.state == pb.GENERATION_STATE_FAILED:
                        raise RuntimeError(event.generation.error.message)

            for _ in range(3):
                animate()
            times = [timed_ms(animate) for _ in range(requests)]
            return times, median_ms(client.models, requests)
    finally:
        gateway.terminate()
        gateway.wait(10)
        stages.terminate()


def serve_stages(connection: Connection) -> None:
    """All four stages in one process; sends their address."""

    async def serve() -> None:
        async with serving(FakeStages(FRAMES)) as addresses:  # type: ignore[abstract]  # the rpcs that are not there yet
            connection.send(addresses["vae"][0])
            await asyncio.Event().wait()

    asyncio.run(serve())


def gateway_address(directory: Path) -> str:
    return f"unix:{directory}/gateway.sock"


def start_gateway(directory: Path, stages: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "BUNRAKU_ADDRESS": gateway_address(directory),
        "BUNRAKU_DATA": str(directory / "data"),
        "BUNRAKU_BUNDLE": str(ROOT / "bundles" / "tiny"),
        "BUNRAKU_LOG_LEVEL": "WARNING",
        **{f"BUNRAKU_{stage}": stages for stage in ("ENCODER", "POSE", "DENOISER", "VAE")},
    }
    return subprocess.Popen([sys.executable, "-m", "gateway"], cwd=ROOT, env=environment)


def until_up(client: Client, gateway: subprocess.Popen[bytes]) -> None:
    while True:
        if gateway.poll() is not None:
            raise RuntimeError("the gateway ended")
        try:
            client.connect(timeout_s=1)
            return
        except NotReady:
            time.sleep(0.1)


def looked_at(picture: Path, pose: Path) -> None:
    read_image(picture, "image")
    probe_video(pose, "video")


def encoded(path: Path) -> None:
    with VideoWriter(path, height=SIDE, width=SIDE, frames_per_second=Fraction(12)) as writer:
        writer.add(np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8))


def timed_ms(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


def median_ms(work: Callable[[], object], repeats: int) -> float:
    return statistics.median(timed_ms(work) for _ in range(repeats))


if __name__ == "__main__":
    main()
