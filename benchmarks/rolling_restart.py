"""Restarts every part of the system under load, one pod after another, and counts the generations that were lost.

`python -m benchmarks.rolling_restart [--jobs N] [--clients N] [--replicas N]`: the pods are processes of this machine
with the commands, environment, probes, preStop and grace periods of k8s/base (tests/k8s/pods.py). Clients create
generations one after another and follow each to its end; meanwhile each pod is ended as Kubernetes ends it and started
again, the next one when it is ready, round after round until the last generation has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bunraku.client import AsyncClient
from bunraku.errors import BunrakuError, NotReady
from bunraku.v1 import gateway_pb2 as pb
from tests.k8s.pods import STAGES, Place, Pod
from tests.k8s.rendered import Container, containers, overlay
from tests.system.media import write_picture, write_pose_video

SIDE, FRAMES, STEPS = 64, 5, 2
GATEWAY_HOST = "127.0.3.1"


@dataclass
class Tally:
    """What became of the generations and of the pods."""

    wanted: int
    begun: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    restarts: Counter[str] = field(default_factory=Counter)
    stop_s: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2, help="of each stage")
    arguments = parser.parse_args()
    tally = asyncio.run(measured(arguments.jobs, arguments.clients, arguments.replicas))
    show(tally)
    return 0 if tally.ends == Counter({"SUCCEEDED": tally.wanted}) and not tally.problems else 1


async def measured(jobs: int, clients: int, replicas: int) -> Tally:
    """Starts the pods, restarts them under load, stops them."""
    tally = Tally(jobs)
    with tempfile.TemporaryDirectory(prefix="bunraku-rolling-") as name:
        directory = Path(name)
        pods = made(directory, replicas)
        try:
            await asyncio.gather(*(pod.start() for pod in pods))
            await asyncio.gather(*(pod.until_ready() for pod in pods))
            print(f"{len(pods)} pods are ready", flush=True)
            restarting = asyncio.create_task(restart_for_ever(pods, tally))
            working = asyncio.create_task(load(pods[-1].address, directory, clients, tally))
            await asyncio.wait({restarting, working}, return_when=asyncio.FIRST_COMPLETED)
            restarting.cancel()
            await asyncio.gather(working, return_exceptions=True)
            tally.problems += [repr(task.exception()) for task in (restarting, working) if failed(task)]
        finally:
            await asyncio.gather(*(pod.kill() for pod in pods))
    return tally


def failed(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


def made(directory: Path, replicas: int) -> list[Pod]:
    """The pods of k8s/base, so many of each stage; the gateway last."""
    found: dict[str, Container] = {container.name: container for container in containers(overlay("base"))}
    hosts = {
        stage: [f"127.0.{3 + replica}.{number}" for replica in range(replicas)]
        for number, stage in enumerate(STAGES, start=10)
    }
    place = Place(hosts, directory)
    pods = [Pod(found[stage], host, place) for stage in STAGES for host in hosts[stage]]
    return [*pods, Pod(found["gateway"], GATEWAY_HOST, place)]


async def restart_for_ever(pods: list[Pod], tally: Tally) -> None:
    """One pod after another: ended, started, ready."""
    while True:
        for pod in pods:
            name = pod.container.name
            took_s = await pod.stop()
            tally.stop_s.setdefault(name, []).append(took_s)
            await pod.start()
            await pod.until_ready()
            tally.restarts[name] += 1
            print(f"{pod.container.name} {pod.host} restarted; {dict(tally.ends)}", flush=True)


async def load(address: str, directory: Path, clients: int, tally: Tally) -> None:
    """So many clients, each with one generation at a time."""
    picture = write_picture(directory / "ref.png", SIDE, SIDE)
    pose = write_pose_video(directory / "pose.mp4", FRAMES, SIDE, SIDE)
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(work(client, picture, pose, tally))


async def work(client: AsyncClient, picture: Path, pose: Path, tally: Tally) -> None:
    """One generation after another; a gateway that is away is called again, as every caller does."""
    while tally.begun < tally.wanted:
        number = tally.begun
        tally.begun += 1
        began = time.monotonic()
        ended = await one(client, picture, pose, number)
        tally.seconds.append(time.monotonic() - began)
        if isinstance(ended, pb.Generation):
            tally.ends[pb.GenerationState.Name(ended.state).removeprefix("GENERATION_STATE_")] += 1
            tally.attempts[ended.attempts] += 1
            if ended.HasField("error"):
                tally.problems.append(f"{ended.name}: {ended.error.message}")
        else:
            tally.ends["LOST"] += 1
            tally.problems.append(f"job {number}: {ended}")


async def one(client: AsyncClient, picture: Path, pose: Path, number: int) -> pb.Generation | BunrakuError:
    """The generation once it has ended; every call is tried for as long as a gateway may take to come back."""
    until = time.monotonic() + 300
    request: pb.CreateGenerationRequest | None = None
    name = ""
    while True:
        try:
            if request is None:
                request = await client.prepare(
                    reference_image=picture,
                    pose_video=pose,
                    seed=number,
                    prompt=f"figure {number}",
                    num_inference_steps=STEPS,
                    height=SIDE,
                    width=SIDE,
                )
            name = name or (await client.create(request)).name
            async for _ in client.watch(name):
                pass
            return await client.get(name)
        except NotReady as error:
            if time.monotonic() > until:
                return error
            await asyncio.sleep(0.5)
        except BunrakuError as error:
            return error


def show(tally: Tally) -> None:
    """The tally as a table."""
    again = sum(count for attempts, count in tally.attempts.items() if attempts > 1)
    print("| | |\n| --- | ---: |")
    print(f"| generations | {tally.wanted} |")
    for end, count in sorted(tally.ends.items()):
        print(f"| {end.lower()} | {count} |")
    print(f"| taken up again by a restarted gateway | {again} |")
    print(f"| restarts of pods | {sum(tally.restarts.values())} ({dict(tally.restarts)}) |")
    for name, seconds in tally.stop_s.items():
        print(f"| {name}: end of a pod, preStop included, s, longest | {max(seconds):.1f} |")
    if tally.seconds:
        longest = max(tally.seconds)
        print(f"| a generation, s, median and longest | {statistics.median(tally.seconds):.1f}, {longest:.1f} |")
    for problem in tally.problems[:20]:
        print(problem)


if __name__ == "__main__":
    sys.exit(main())
