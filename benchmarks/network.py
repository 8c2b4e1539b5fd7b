"""Gateway and stages in two network namespaces with a bad line between them: delay, loss, and a cut in mid-denoise.

`sudo python -m benchmarks.network [--jobs N] [--delay-ms 50] [--loss 0.01] [--cut-s 60]` needs root, `ip` and
/dev/net/tun, and touches nothing but the two namespaces that it makes. The line is a pair of TUN devices whose packets
this process carries from one to the other, each later by the delay and some not at all (where the kernel has
sch_netem, `tc` would do; this needs no module). The gateway listens on a Unix socket, which namespaces share.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import fcntl
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bunraku.client import AsyncClient
from bunraku.errors import NotReady
from bunraku.v1 import gateway_pb2 as pb
from tests.k8s.pods import STAGES
from tests.system.media import read_video, write_picture, write_pose_video

ROOT = Path(__file__).resolve().parent.parent
GATEWAY_SIDE, STAGE_SIDE = "bunraku-net-gateway", "bunraku-net-stages"
# of a block for documentation (RFC 5737): nobody has them
ADDRESSES = {GATEWAY_SIDE: "192.0.2.1", STAGE_SIDE: "192.0.2.2"}
DEVICE = "tun0"
SIDE, FRAMES = 64, 17
STEPS, STEPS_OF_CUT = 4, 60
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LARGEST_PACKET = 65_536
_START_S = 180.0


@dataclass
class Line:
    """The line between two TUN devices.

    Attributes:
        delay_s: of each packet, each way.
        loss: share of packets that do not arrive.
        cut: nothing arrives.
        carried, lost: packets so far.
    """

    ends: tuple[int, int]
    delay_s: float = 0.0
    loss: float = 0.0
    cut: bool = False
    carried: int = 0
    lost: int = 0

    def open(self) -> None:
        """Carries packets on the running event loop from now on."""
        loop = asyncio.get_running_loop()
        for here, there in (self.ends, self.ends[::-1]):
            loop.add_reader(here, self._carry, here, there)

    def close(self) -> None:
        for end in self.ends:
            asyncio.get_running_loop().remove_reader(end)
            os.close(end)

    def _carry(self, here: int, there: int) -> None:
        packet = os.read(here, _LARGEST_PACKET)
        if self.cut or random.random() < self.loss:
            self.lost += 1
            return
        self.carried += 1
        asyncio.get_running_loop().call_later(self.delay_s, self._arrive, there, packet)

    def _arrive(self, there: int, packet: bytes) -> None:
        with suppress(OSError):  # closed meanwhile, or its queue is full
            os.write(there, packet)


@contextmanager
def namespaces() -> Iterator[tuple[int, int]]:
    """Two network namespaces; gives the ends of the line as file descriptors."""
    for name in ADDRESSES:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
    try:
        ends = []
        for name, address in ADDRESSES.items():
            subprocess.run(["ip", "netns", "add", name], check=True)
            ends.append(opened_device(name))
            for command in (
                f"addr add {address}/30 dev {DEVICE}",
                f"link set {DEVICE} up txqueuelen 5000",
                "link set lo up",
            ):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield ends[0], ends[1]
    finally:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def opened_device(namespace: str) -> int:
    """A new TUN device in a namespace. A thread enters it, which belongs to no other namespace afterwards, and ends."""
    found: list[int] = []

    def enter() -> None:
        with Path(f"/run/netns/{namespace}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"the namespace {namespace} cannot be entered")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        found.append(device)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return found[0]


def started(directory: Path) -> list[subprocess.Popen[bytes]]:
    """The stages on their side, the gateway on its own."""
    shared = {**os.environ, "BUNRAKU_BUNDLE": str(ROOT / "bundles" / "tiny"), "OMP_NUM_THREADS": "1"}
    stages = {stage: f"{ADDRESSES[STAGE_SIDE]}:{50050 + number}" for number, stage in enumerate(STAGES)}
    processes = [
        process(STAGE_SIDE, f"services.{stage}", directory, {**shared, "BUNRAKU_ADDRESS": address})
        for stage, address in stages.items()
    ]
    gateway = {
        **shared,
        "BUNRAKU_ADDRESS": gateway_address(directory),
        "BUNRAKU_DATA": str(directory / "data"),
        # two hosts have no memory in common, and these two are to be two hosts
        "BUNRAKU_SHARED_MEMORY": "false",
        "BUNRAKU_STAGE_PATIENCE_S": "600",
        "BUNRAKU_OUTPUT_CACHE_BYTES": "0",  # every generation goes over the line in full
        **{f"BUNRAKU_{stage.upper()}": address for stage, address in stages.items()},
    }
    return [*processes, process(GATEWAY_SIDE, "gateway", directory, gateway)]


def process(namespace: str, module: str, directory: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (directory / f"{module}.log").open("wb") as log:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", module]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def gateway_address(directory: Path) -> str:
    return f"unix:{directory}/gateway.sock"


async def until_up(client: AsyncClient) -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            await client.connect(timeout_s=2)
            stages = (await client.status()).stages
            if len(stages) == len(STAGES) and all(stage.reachable and stage.status.state == 2 for stage in stages):
                return
        except NotReady:
            pass
        if time.monotonic() > until:
            raise TimeoutError("the system did not start")
        await asyncio.sleep(0.5)


class Measuring:
    """Jobs over the line."""

    def __init__(self, client: AsyncClient, directory: Path) -> None:
        self._client, self._directory = client, directory
        self._picture = write_picture(directory / "ref.png", SIDE, SIDE)
        self._pose = write_pose_video(directory / "pose.mp4", FRAMES, SIDE, SIDE)

    async def create(self, seed: int, steps: int) -> pb.Generation:
        return await self._client.animate(
            reference_image=self._picture,
            pose_video=self._pose,
            prompt="a figure dances",
            seed=seed,
            num_inference_steps=steps,
            height=SIDE,
            width=SIDE,
        )

    async def jobs(self, count: int) -> tuple[list[float], int]:
        """Seconds of each generation, one after another, and how many did not succeed."""
        seconds, failed = [], 0
        for number in range(count):
            began = time.monotonic()
            ended = await self._client.wait((await self.create(number, STEPS)).name)
            seconds.append(time.monotonic() - began)
            failed += ended.state != pb.GENERATION_STATE_SUCCEEDED
        return seconds, failed

    async def frames(self, generation: pb.Generation) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """The frames of its video, uint8 [num_frames, height, width, 3]."""
        path = self._directory / f"{generation.name.rpartition('/')[2]}.mp4"
        await self._client.download(generation.video, path)
        return read_video(path)

    async def cut(self, line: Line, seconds: float) -> list[str]:
        """Cuts the line in the middle of a denoise; rows of what came of it."""
        undisturbed = await self._client.wait((await self.create(7, STEPS_OF_CUT)).name)
        generation = await self.create(7, STEPS_OF_CUT)
        async for event in self._client.watch(generation.name):
            if event.progress.stage == "denoise" and event.progress.completed >= STEPS_OF_CUT // 3:
                break
        step = event.progress.completed
        line.cut = True
        print(f"cut for {seconds:g} s at step {step} of {STEPS_OF_CUT}", flush=True)
        await asyncio.sleep(seconds)
        line.cut, healed = False, time.monotonic()
        ended = await self._client.wait(generation.name)
        after_s = time.monotonic() - healed
        if ended.state != pb.GENERATION_STATE_SUCCEEDED:
            return [f"| cut of {seconds:g} s at step {step} of {STEPS_OF_CUT} | failed: {ended.error.message} |"]
        difference = np.abs((await self.frames(undisturbed)).astype(int) - await self.frames(ended))
        equal = "equal" if not difference.any() else f"DIFFERENT: by up to {difference.max()}"
        return [
            f"| cut of {seconds:g} s at step {step} of {STEPS_OF_CUT} | succeeded, {after_s:.0f} s after the line was back |",
            f"| its frames and those of an undisturbed run | {equal} |",
        ]


async def measured(directory: Path, line: Line, arguments: argparse.Namespace) -> list[str]:
    """Rows of the table."""
    line.open()
    try:
        async with AsyncClient(gateway_address(directory), stream_timeout_s=1200) as client:
            await until_up(client)
            measuring = Measuring(client, directory)
            good, failed_before = await measuring.jobs(arguments.jobs)
            line.delay_s, line.loss = arguments.delay_ms / 1000, arguments.loss
            bad, failed = await measuring.jobs(arguments.jobs)
            bad_line = f"{arguments.delay_ms:g} ms each way, {100 * arguments.loss:g} % loss"
            rows = [
                f"| {len(good)} generations on a good line: failed; median, longest | {failed_before}; {figures(good)} |",
                f"| {len(bad)} generations with {bad_line}: failed; median, longest | {failed}; {figures(bad)} |",
                f"| packets carried, lost | {line.carried}, {line.lost} |",
            ]
            return rows + (await measuring.cut(line, arguments.cut_s) if arguments.cut_s else [])
    finally:
        line.close()


def figures(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--delay-ms", type=float, default=50)
    parser.add_argument("--loss", type=float, default=0.01)
    parser.add_argument("--cut-s", type=float, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bunraku-net-") as name, namespaces() as ends:
        processes = started(Path(name))
        try:
            rows = asyncio.run(measured(Path(name), Line(ends), arguments))
        except BaseException:
            for log in Path(name).glob("*.log"):
                print(f"--- {log.name}", *log.read_text().splitlines()[-10:], sep="\n", file=sys.stderr)
            raise
        finally:
            for each in processes:
                each.terminate()
            for each in processes:
                each.wait(60)
    print("| | |\n| --- | --- |", *rows, sep="\n")
    return 1 if any("DIFFERENT" in row or "| failed:" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
