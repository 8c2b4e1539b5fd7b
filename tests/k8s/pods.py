"""Containers of the manifests as processes of this machine: their command, environment and probes, as they stand there.

Only what names a place differs: each process listens on a loopback address of its own in place of 0.0.0.0, so that the
ports stay those of the manifests; host names of Services become those addresses; and the images' directories become
the repository's and a temporary one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.k8s.rendered import ROOT, Container

STAGES = ("encoder", "pose", "denoiser", "vae")


@dataclass(frozen=True)
class Place:
    """Where the processes are.

    Attributes:
        hosts: loopback addresses of each program's pods, such as `{"vae": ["127.0.1.4"]}`.
        data: directory in place of the gateway's volume.
    """

    hosts: Mapping[str, Sequence[str]]
    data: Path

    def environment(self, container: Container, host: str, extra: Mapping[str, str]) -> dict[str, str]:
        """What the process gets: nothing of this process but what Python and the machine need."""
        environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", "OMP_NUM_THREADS": "1", **extra}
        for name, value in container.environment.items():
            if name.endswith("ADDRESS"):
                value = value.replace("0.0.0.0", host)
            elif name.removeprefix("BUNRAKU_").lower() in STAGES:
                service, _, port = value.rpartition(":")
                value = ",".join(f"{address}:{port}" for address in self.hosts.get(service, [service]))
            environment[name] = value.replace("/app", str(ROOT)).replace("/data", str(self.data))
        return environment


class Pod:
    """A process in place of a pod."""

    def __init__(self, container: Container, host: str, place: Place, extra: Mapping[str, str] | None = None) -> None:
        self.container, self.host, self.log = container, host, place.data / f"{container.name}-{host}.log"
        self._environment = place.environment(container, host, extra or {})
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        """Of its own service."""
        return f"{self.host}:{self.container.port('BUNRAKU_ADDRESS')}"

    async def start(self) -> None:
        """Starts the command of the manifest."""
        _, *arguments = self.container.spec["command"]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )

    async def probe(self, name: str) -> bool:
        """One look as the kubelet takes it, by the words of the manifest."""
        settings = self.container.spec[name]
        request = health_pb2.HealthCheckRequest(service=settings["grpc"].get("service", ""))
        async with grpc.aio.insecure_channel(f"{self.host}:{settings['grpc']['port']}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await stub.Check(request, timeout=settings.get("timeoutSeconds", 1))
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def until_ready(self) -> None:
        """Follows startupProbe and readinessProbe; TimeoutError when Kubernetes would kill the pod."""
        settings = self.container.spec["startupProbe"]
        until = time.monotonic() + settings["periodSeconds"] * settings["failureThreshold"]
        while not await self.probe("startupProbe"):
            assert self._process is not None
            if self._process.returncode is not None or time.monotonic() > until:
                raise TimeoutError(f"{self.container.name} did not start: {self.log.read_text()[-2000:]}")
            await asyncio.sleep(0.2)
        while not await self.probe("readinessProbe"):
            await asyncio.sleep(0.2)

    async def stop(self) -> float:
        """As Kubernetes ends a pod: preStop, SIGTERM, and SIGKILL when the grace period is over.

        Returns:
            Seconds that it took.

        Raises:
            TimeoutError: it had to be killed.
        """
        assert self._process is not None
        begun = time.monotonic()
        await asyncio.sleep(self.container.spec["lifecycle"]["preStop"]["sleep"]["seconds"])
        self._process.send_signal(signal.SIGTERM)
        left_s = self.container.pod["terminationGracePeriodSeconds"] - (time.monotonic() - begun)
        async with asyncio.timeout(left_s):
            status = await self._process.wait()
        assert status == 0, f"{self.container.name} ended with {status}: {self.log.read_text()[-2000:]}"
        return time.monotonic() - begun

    async def kill(self) -> None:
        """Ends what is left of it."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
