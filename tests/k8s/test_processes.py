"""Each process starts with exactly what its manifest gives it, answers its probes, shows its metrics and drains."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path

import pytest

from runtime import telemetry
from tests.k8s.pods import STAGES, Place, Pod
from tests.k8s.rendered import Container, containers, overlay


def found(manifests: str) -> dict[str, Container]:
    return {container.name: container for container in containers(overlay(manifests))}


def place(data: Path) -> Place:
    """The gateway calls stages that are not there: it must serve all the same."""
    return Place({stage: [f"127.0.9.{number}"] for number, stage in enumerate(STAGES, start=2)}, data)


async def lives(pod: Pod) -> None:
    """From its start to its end by probes alone."""
    try:
        await pod.start()
        await pod.until_ready()
        assert await pod.probe("livenessProbe")
        port = pod.container.port("BUNRAKU_METRICS_ADDRESS")
        address = f"http://{pod.host}:{port}/metrics"
        metrics = await asyncio.to_thread(lambda: urllib.request.urlopen(address, timeout=5).read().decode())
        expected = telemetry.GENERATIONS if pod.container.module == "gateway" else telemetry.STAGE_STATE
        assert f"# TYPE {expected.name} gauge" in metrics
        if pod.container.module != "gateway":
            assert f'{telemetry.STAGE_STATE.name}{{stage="{pod.container.name}",state="serving"}} 1.0' in metrics
        await pod.stop()
        assert not await pod.probe("readinessProbe")
    finally:
        await pod.kill()
    for line in pod.log.read_text().splitlines():
        assert json.loads(line)["program"] == pod.container.name


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
async def test_stage_lives_by_its_manifest(name: str, tmp_path: Path) -> None:
    await lives(Pod(found("base")[name], "127.0.8.1", place(tmp_path)))


@pytest.mark.slow
async def test_gateway_lives_by_its_manifest(tmp_path: Path) -> None:
    await lives(Pod(found("base")["gateway"], "127.0.8.2", place(tmp_path)))


@pytest.mark.slow
async def test_the_containers_of_one_pod_live_side_by_side(tmp_path: Path) -> None:
    pods = [Pod(container, "127.0.0.1", place(tmp_path)) for container in found("one-gpu").values()]
    async with asyncio.TaskGroup() as group:
        for pod in pods:
            group.create_task(lives(pod))
