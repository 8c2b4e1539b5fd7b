"""The whole system as five real processes on this machine, as `bunraku serve` starts it; the embedded bundle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from bunraku.client import Client
from bunraku.errors import NotReady

ROOT = Path(__file__).resolve().parent.parent.parent
_START_S = 110.0


@dataclass
class System:
    """A running `bunraku serve`."""

    process: subprocess.Popen[bytes]
    address: str
    data: Path
    stage_pids: dict[str, int] = field(default_factory=dict)

    def pid(self, module: str) -> int:
        """Process id of one of the programs, such as `services.denoiser`."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().decode().split("\0")
                    environment = (entry / "environ").read_bytes().decode()
                except OSError:
                    continue
                if module in command and str(self.data) in environment + str(self._family(int(entry.name))):
                    return int(entry.name)
        raise AssertionError(f"{module} does not run")

    def _family(self, pid: int) -> str:
        """The data directory, if a process was started by this system."""
        parent = int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
        return str(self.data) if parent == self.process.pid else ""


def start_system(data: Path, **environment: str) -> System:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bunraku.cli", "serve", "--port", str(port), "--data", str(data)]
    settings = {**os.environ, "BUNRAKU_BUNDLE": str(ROOT / "bundles" / "tiny"), "OMP_NUM_THREADS": "1", **environment}
    log = (data / "serve.log").open("wb")
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=log, stderr=log)
    log.close()
    return System(process, f"127.0.0.1:{port}", data)


def wait_until_up(system: System) -> None:
    until = time.monotonic() + _START_S
    with Client(system.address) as client:
        while True:
            assert system.process.poll() is None, (system.data / "serve.log").read_text()
            assert time.monotonic() < until, (system.data / "serve.log").read_text()
            try:
                client.connect(timeout_s=1)
                if all(stage.reachable and stage.status.state == 2 for stage in client.status().stages):
                    return
            except NotReady:
                time.sleep(0.2)
            time.sleep(0.1)


def stop_system(system: System) -> None:
    system.process.send_signal(signal.SIGTERM)
    try:
        system.process.wait(30)
    finally:
        system.process.kill()
        system.process.wait()


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OpenTelemetry collector that keeps (service, span name) by trace id."""

    def __init__(self) -> None:
        self.spans: dict[str, set[tuple[str, str]]] = defaultdict(set)

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans[span.trace_id.hex()].add((names["service.name"], span.name))
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture(scope="session")
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector and its address."""
    kept = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory, collector: tuple[Collector, str]) -> Iterator[System]:
    """Started once for all tests."""
    running = start_system(tmp_path_factory.mktemp("system"), BUNRAKU_OTLP_ENDPOINT=collector[1])
    try:
        wait_until_up(running)
        yield running
    finally:
        stop_system(running)


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    with Client(system.address) as connected:
        yield connected
