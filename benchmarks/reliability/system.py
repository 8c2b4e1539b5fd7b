"""Real processes to be killed, frozen and flooded: gateways, a stage each, and the database; restarted when they die."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.stub_stages import ROOT, SLOTS
from bunraku.client import AsyncClient, Client, Retry
from bunraku.errors import BunrakuError, Unauthenticated
from bunraku.v1 import gateway_pb2 as pb
from runtime.shared_memory import DIRECTORY
from tests.postgresql import Server
from tests.system.media import write_picture, write_pose_video

SIDE, FRAMES = 32, 9
# Seconds of device time by rpc; of the denoiser, for a step
COSTS = {"EncodeText": 0.05, "EncodeImage": 0.05, "FitPoseVideo": 0.1, "Encode": 0.05, "Denoise": 0.05, "Decode": 0.1}
_STAGE = (sys.executable, "-m", "benchmarks.reliability.stages")
_RESTART_S = 0.5
_UP_WITHIN_S = 60.0


@dataclass
class Process:
    """A program that is started again when it dies, as Kubernetes and `bunraku serve` do."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.command, cwd=ROOT, env={**os.environ, **self.environment}, stdout=log, stderr=log
            )

    def send(self, number: signal.Signals) -> None:
        assert self.running is not None
        with suppress(ProcessLookupError):
            self.running.send_signal(number)

    @property
    def pid(self) -> int:
        assert self.running is not None
        return self.running.pid


@dataclass
class System:
    """What runs, and where."""

    directory: Path
    shared_memory: Path
    gateways: list[str]
    processes: dict[str, Process]
    postgresql: Server | None
    keeping: bool = True
    _keeper: threading.Thread | None = field(default=None, repr=False)

    def stage_log(self) -> list[tuple[float, str, str]]:
        """What all stages have told, in order: monotonic seconds, what, of what."""
        lines = []
        for stage in SLOTS:
            path = self.directory / f"{stage}.told"
            if path.exists():
                for line in path.read_text().splitlines():
                    when, what, of = line.split("\t")
                    lines.append((float(when), what, of))
        return sorted(lines)

    def client(self, number: int = 0) -> Client:
        return Client(self.gateways[number % len(self.gateways)])

    def async_client(self, number: int = 0, *, attempts: int = 1) -> AsyncClient:
        """One that does not try again, so that what is measured is the answer."""
        return AsyncClient(self.gateways[number % len(self.gateways)], retry=Retry(attempts=attempts))

    def keep(self) -> None:
        while self.keeping:
            for process in self.processes.values():
                if process.running is not None and process.running.poll() is not None:
                    time.sleep(_RESTART_S)
                    if self.keeping:
                        process.start()
            time.sleep(0.05)

    def start(self) -> None:
        for process in self.processes.values():
            process.start()
        self._keeper = threading.Thread(target=self.keep, daemon=True)
        self._keeper.start()
        until = time.monotonic() + _UP_WITHIN_S
        for number in range(len(self.gateways)):
            while not self._is_up(number):
                if time.monotonic() > until:
                    raise RuntimeError(f"the system did not come up; its logs are in {self.directory}")
                time.sleep(0.2)

    def stop(self) -> None:
        self.keeping = False
        if self._keeper is not None:
            self._keeper.join()
        for process in self.processes.values():
            process.send(signal.SIGCONT)
            process.send(signal.SIGKILL)
            if process.running is not None:
                process.running.wait()
        if self.postgresql is not None:
            self.postgresql.close()

    def _is_up(self, number: int) -> bool:
        try:
            with self.client(number) as client:
                client.connect(timeout_s=1)
                return all(stage.reachable for stage in client.status().stages)
        except Unauthenticated:  # it wants a key, so it is up
            return True
        except BunrakuError:
            return False


@contextmanager
def running_system(
    database: str, *, gateways: int = 1, costs: Mapping[str, float] = COSTS, **settings: object
) -> Iterator[System]:
    """Starts everything.

    Args:
        database: `sqlite` or `postgresql`.
        gateways: how many; several need PostgreSQL.
        settings: of the gateways, by field.
    """
    directory = Path(tempfile.mkdtemp(prefix="bunraku-reliability-"))
    (directory / "tmp").mkdir()
    shared_memory = Path(tempfile.mkdtemp(prefix="bunraku-reliability-", dir=DIRECTORY))
    postgresql = Server() if database == "postgresql" else None
    if postgresql is not None:
        postgresql.start()
    ports = free_ports(len(SLOTS) + gateways)
    stages = dict(zip(SLOTS, ports, strict=False))
    addresses = [f"127.0.0.1:{port}" for port in ports[len(SLOTS) :]]
    processes = {
        stage: Process(
            stage,
            [*_STAGE, stage, str(port), str(directory / f"{stage}.told"), str(shared_memory), json.dumps(dict(costs))],
            {},
            directory / f"{stage}.log",
        )
        for stage, port in stages.items()
    }
    shared = {
        "BUNRAKU_DATA": str(directory / "data"),
        "BUNRAKU_BUNDLE": str(ROOT / "bundles" / "tiny"),
        "BUNRAKU_DATABASE": postgresql.url if postgresql is not None else "",
        "BUNRAKU_LOG_LEVEL": "WARNING",
        "BUNRAKU_GRACE_S": "1",
        "BUNRAKU_SHARED_MEMORY_DIRECTORY": str(shared_memory),
        "TMPDIR": str(directory / "tmp"),
        "OMP_NUM_THREADS": "1",
        **{f"BUNRAKU_{stage.upper()}": f"127.0.0.1:{port}" for stage, port in stages.items()},
        **{f"BUNRAKU_{name.upper()}": str(value) for name, value in settings.items()},
    }
    for number, address in enumerate(addresses):
        name = f"gateway-{number}"
        environment = {**shared, "BUNRAKU_ADDRESS": address}
        processes[name] = Process(name, [sys.executable, "-m", "gateway"], environment, directory / f"{name}.log")
    system = System(directory, shared_memory, addresses, processes, postgresql)
    try:
        system.start()
        yield system
    except BaseException:
        print(f"logs are in {directory}", file=sys.stderr)
        raise
    finally:
        system.stop()
        shutil.rmtree(shared_memory, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


@dataclass(frozen=True)
class Inputs:
    """Assets that generations are made from, uploaded once."""

    picture: str
    pose_video: str

    def request(
        self, seed: int, steps: int, *, priority: int = 0, timeout_seconds: int = 0
    ) -> pb.CreateGenerationRequest:
        """A generation that shares nothing that a stage gives with those of other seeds: it needs every stage."""
        request = pb.CreateGenerationRequest(
            request_id=uuid.uuid4().hex, priority=priority, timeout_seconds=timeout_seconds
        )
        request.animate.reference_image, request.animate.pose_video = self.picture, self.pose_video
        request.animate.prompt = f"seed {seed}"
        request.sampling.seed, request.sampling.num_inference_steps = seed, steps
        request.sampling.guidance_scale = 1.0
        request.output.height = request.output.width = SIDE
        return request


def uploaded(system: System) -> Inputs:
    picture = write_picture(system.directory / "ref.png", SIDE, SIDE)
    pose = write_pose_video(system.directory / "pose.mp4", FRAMES, SIDE, SIDE)
    with system.client() as client:
        return Inputs(client.upload(picture).name, client.upload(pose).name)


@dataclass(frozen=True)
class Table:
    """What a scenario found, by name; units stand in the names."""

    title: str
    rows: Mapping[str, int | float | str]

    def __str__(self) -> str:
        lines = [f"| {self.title} | |", "| --- | ---: |"]
        for name, value in self.rows.items():
            lines.append(
                f"| {name} | {f'{value:.3g}' if isinstance(value, float) and value < 100 else _whole(value)} |"
            )
        return "\n".join(lines)


def _whole(value: float | str) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def percentile(values: list[float], part: float) -> float:
    """The smallest value that so large a part of them is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def any_seed(rng: random.Random) -> int:
    return rng.randrange(1, 2**31)
