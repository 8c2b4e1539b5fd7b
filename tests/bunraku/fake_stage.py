"""A stage that has no model: it serves grpc.health.v1 and does what its environment tells it.

FAKE_LOAD_UNTIL: file that must be there before it is ready. FAKE_EXIT: what it says before it exits instead. FAKE_STOP_S: seconds that it
takes to stop after SIGTERM. FAKE_STUBBORN: it does not stop. FAKE_NOTES: file to which it appends what happens to it.
FAKE_CHILD: it starts a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE = "fake.Service"


def note(text: str) -> None:
    path = os.environ.get("FAKE_NOTES")
    if path is not None:
        with Path(path).open("a") as file:
            file.write(f"{os.environ['BUNRAKU_ADDRESS']} {text}\n")


def main() -> None:
    if os.environ.get("FAKE_EXIT"):
        sys.exit(os.environ["FAKE_EXIT"])
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    if os.environ.get("FAKE_CHILD"):
        sleeper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        note(f"child {sleeper.pid}")
    service = os.environ.get("FAKE_SERVICE", SERVICE)
    healthy = health.HealthServicer()
    healthy.set(service, health_pb2.HealthCheckResponse.ServingStatus.NOT_SERVING)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    server.add_insecure_port(os.environ["BUNRAKU_ADDRESS"])
    server.start()
    print("a line of its log", flush=True)
    note(f"started {os.getpid()}")
    while not stopped.is_set() and not Path(os.environ.get("FAKE_LOAD_UNTIL", "/")).exists():
        time.sleep(0.02)
    healthy.set(service, health_pb2.HealthCheckResponse.ServingStatus.SERVING)
    stopped.wait()
    while os.environ.get("FAKE_STUBBORN"):
        time.sleep(1)
    note("stopping")
    time.sleep(float(os.environ.get("FAKE_STOP_S", "0")))
    note("stopped")
    server.stop(0)


if __name__ == "__main__":
    main()
