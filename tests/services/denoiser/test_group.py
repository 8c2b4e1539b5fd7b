"""A leader and its workers as processes: they answer as one, and end together."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bunraku.errors import NotReady, StageBroken, WrongState
from bunraku.v1 import denoiser_pb2_grpc
from runtime.bundles import Bundle
from runtime.client import Budget, StageClient
from runtime.tensors import INT64, WireTensor
from services.denoiser.__main__ import GroupSettings
from services.denoiser.group import GroupBroken, Leader, Link, Message, Patience, Place
from services.denoiser.model import DiffusionTransformer
from services.denoiser.service import DenoiserService
from tests.services.denoiser.test_service import CONDITIONING, checkpoints, first, latents, resume, run, stage, wired
from tests.services.denoiser.tiny import SCAIL
from tests.services.serving import Answers

ROOT = Path(__file__).resolve().parents[3]
SERVICE = DenoiserService.full_name


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Process:
    """One process of a group."""

    def __init__(self, directory: Path, rank: int, variables: Mapping[str, str]) -> None:
        self.address, self.health = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.log = directory / f"rank-{rank}.log"
        self._variables = {**variables, "BUNRAKU_ADDRESS": self.address, "BUNRAKU_HEALTH_ADDRESS": self.health}
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "services.denoiser", cwd=ROOT, env=keep | self._variables, stdout=log, stderr=log
            )

    async def is_serving(self, service: str = SERVICE) -> bool:
        async with grpc.aio.insecure_channel(self.health) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=2)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def until_serving(self) -> None:
        async with asyncio.timeout(60):
            while not await self.is_serving():
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Group:
    """A leader and workers that serve, and a client of the leader."""

    processes: list[Process]
    client: StageClient[Any]

    async def ask(self, into: Answers | None = None, tensors: Any = None, **changes: Any) -> Answers:
        answers = into or Answers()
        given = wired(CONDITIONING) if tensors is None else tensors
        async with self.client.call(Budget.of(60)) as call:
            async for item in call.stream(call.stub.Denoise, first(**changes), given):
                answers.items.append(item)
        return answers

    async def statuses(self) -> list[int]:
        """Exit statuses of all processes, which have to end."""
        async with asyncio.timeout(30):
            return [await each.process.wait() for each in self.processes]


def processes_of(directory: Path, bundle: Bundle, world_size: int) -> list[Process]:
    shared = {
        "BUNRAKU_BUNDLE": str(bundle.component("transformer").files[0].parent),
        "BUNRAKU_GRACE_S": "20",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [Process(directory, rank, {**shared, "RANK": str(rank)}) for rank in range(world_size)]


@asynccontextmanager
async def group(directory: Path, bundle: Bundle, world_size: int = 2) -> AsyncIterator[Group]:
    processes = processes_of(directory, bundle, world_size)
    client: StageClient[Any] = StageClient("denoiser", denoiser_pb2_grpc.DenoiserServiceStub, [processes[0].address])
    try:
        for each in processes:
            await each.start()
        for each in processes:
            await each.until_serving()
        yield Group(processes, client)
    finally:
        await client.close()
        for each in processes:
            if each.process.returncode is None:
                each.process.kill()
                await each.process.wait()


async def until_step(answers: Answers, number: int) -> None:
    async with asyncio.timeout(30):
        while len(answers.messages("step")) < number:
            await asyncio.sleep(0.005)


@pytest.mark.slow
async def test_a_group_lives_as_one_stage_until_a_worker_dies(bundle: Bundle, tmp_path: Path) -> None:
    async with stage(bundle) as alone:
        expected = latents(await run(alone))
        unguided = latents(await run(alone, guidance_scale=1))
    async with group(tmp_path, bundle) as together:
        answers = await together.ask(checkpoint_every_steps=2)
        assert torch.allclose(latents(answers), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(latents(await together.ask(guidance_scale=1)), unguided, rtol=1e-4, atol=1e-5)

        [stored] = checkpoints(answers)
        resumed = await together.ask(tensors=[*wired(CONDITIONING), *stored.tensors], start_from=stored.message)
        assert torch.equal(latents(resumed), latents(answers))
        assert len(resumed.messages("step")) == 2

        poisoned = {**CONDITIONING, "prompt_embeds": torch.full((1, 12, 24), torch.nan)}
        with pytest.raises(StageBroken, match="latents are not finite after step 1"):
            await together.ask(tensors=wired(poisoned))

        for _ in range(5):  # most of them in the middle of a step
            part = Answers()
            cancelled = asyncio.create_task(together.ask(into=part, num_inference_steps=100))
            await until_step(part, 2)
            cancelled.cancel()
            await asyncio.wait([cancelled])
        assert torch.equal(latents(await together.ask()), latents(answers))

        part = Answers()
        failing = asyncio.create_task(together.ask(into=part, num_inference_steps=100))
        await until_step(part, 2)
        begun = time.monotonic()
        together.processes[1].process.kill()
        with pytest.raises(NotReady, match="worker 1 of the group is gone") as error:
            await failing
        assert error.value.reason == "GROUP_BROKEN"
        assert await together.statuses() == [1, -signal.SIGKILL]
        assert time.monotonic() - begun < 15

    async with stage(bundle) as alone:
        with pytest.raises(WrongState, match="the checkpoint of another run"):
            await resume(alone, stored)


@pytest.mark.slow
async def test_workers_end_when_the_leader_dies(bundle: Bundle, tmp_path: Path) -> None:
    async with group(tmp_path, bundle) as together:
        together.processes[0].process.kill()
        assert await together.statuses() == [-signal.SIGKILL, 1]
        assert "the leader of the group is gone" in together.processes[1].log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
async def test_a_group_of_which_one_is_told_to_end_hands_out_a_checkpoint(
    bundle: Bundle, tmp_path: Path, told: int
) -> None:
    answers = Answers()
    async with group(tmp_path, bundle) as together:
        call = asyncio.create_task(together.ask(into=answers, num_inference_steps=100))
        await until_step(answers, 2)
        together.processes[told].process.send_signal(signal.SIGTERM)
        with pytest.raises(NotReady, match="draining; go on from the checkpoint"):
            await call
        assert await together.statuses() == [0, 0]
    [stored] = checkpoints(answers)
    assert stored.message.completed_steps == len(answers.messages("step"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_process_that_waits_for_the_others_is_alive_and_can_be_told_to_end(
    bundle: Bundle, tmp_path: Path, rank: int
) -> None:
    alone = processes_of(tmp_path, bundle, 2)[rank]
    await alone.start()
    async with asyncio.timeout(60):
        while not await alone.is_serving(""):
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)
        assert await alone.is_serving("")
        assert not await alone.is_serving()
        alone.process.send_signal(signal.SIGTERM)
        assert await alone.process.wait() in (0, 1)


@dataclass
class Heard:
    """What one end of a link was told."""

    messages: list[Message] = field(default_factory=list)
    ends: SimpleQueue[str] = field(default_factory=SimpleQueue)


Linked = Callable[[Patience], tuple[Link, Heard, socket.socket]]


@pytest.fixture
def linked() -> Iterator[Linked]:
    """Makes links that are followed, and the other end of their connection."""
    others: list[socket.socket] = []

    def make(patience: Patience) -> tuple[Link, Heard, socket.socket]:
        heard = Heard()
        with socket.create_server(("127.0.0.1", 0)) as server:
            others.append(socket.create_connection(server.getsockname()))
            link = Link(server.accept()[0], patience)
        link.follow(heard.messages.append, heard.ends.put)
        return link, heard, others[-1]

    yield make
    for other in others:
        other.close()


def test_a_link_carries_parameters_and_tensors_bit_for_bit(linked: Linked) -> None:
    patience = Patience(silence_s=5.0, beat_s=0.01)
    _, heard, other = linked(patience)
    sender = Link(other, patience)
    tensors = [*wired(CONDITIONING), WireTensor("empty", INT64, (0, 3), np.empty(0, np.uint8))]
    sender.send("begin", parameters=b"\x00\xff", tensors=tensors, call=3)
    sender.send("end", call=3)
    until = time.monotonic() + 5
    while len(heard.messages) < 2 and time.monotonic() < until:
        time.sleep(0.001)
    begin, end = heard.messages
    assert (begin.kind, begin.fields, begin.parameters) == ("begin", {"call": 3}, b"\x00\xff")
    assert list(begin.tensors) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        got = begin.tensors[tensor.name]
        assert (got.dtype, got.shape, got.data.tobytes()) == (tensor.dtype, tensor.shape, tensor.data.tobytes())
    assert (end.kind, end.tensors) == ("end", {})
    assert heard.ends.empty()


def test_a_link_notices_an_end_at_once_and_silence_after_its_patience(linked: Linked) -> None:
    _, heard, other = linked(Patience(silence_s=30.0))
    begun = time.monotonic()
    other.close()
    assert heard.ends.get(timeout=5) == "is gone"
    _, heard, other = linked(Patience(silence_s=0.2))
    assert heard.ends.get(timeout=5) == "has been silent for 0.2 s"
    # and in the middle of a message
    _, heard, other = linked(Patience(silence_s=0.2))
    other.sendall(b"\x00\x00\x00\x09{")
    assert heard.ends.get(timeout=5) == "has been silent for 0.2 s"
    assert time.monotonic() - begun < 5


def leader() -> Leader:
    return Leader(Place(0, 2, "", 1, Patience(join_s=0.3)))


async def test_a_call_ends_with_its_group_even_if_what_computes_does_not() -> None:
    broken = leader()

    async def stuck() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(60)

    items = broken.watched(stuck())
    assert await anext(items) == 1
    asyncio.get_running_loop().call_later(0.01, broken._lost, 1, "has been silent for 30 s")
    with pytest.raises(GroupBroken, match="worker 1 of the group has been silent for 30 s"):
        await anext(items)


def test_a_worker_with_other_weights_or_none_is_refused(linked: Linked) -> None:
    other, slow = leader(), leader()
    model = DiffusionTransformer(SCAIL)
    other._links[1] = slow._links[1] = linked(Patience())[0]
    other._heard(1, Message("ready", {"weights": "abc exact"}))
    with pytest.raises(GroupBroken, match="worker 1 of the group has loaded other weights or settings: abc exact, not"):
        other.ready(model, "abc balanced")
    with pytest.raises(GroupBroken, match=r"workers \[1\] of the group have not loaded"):
        slow.ready(model, "abc exact")


def test_an_error_of_a_worker_is_that_of_the_group() -> None:
    failed = leader()
    failed._heard(1, Message("failed", {"text": "OutOfMemoryError: CUDA out of memory"}))
    failed._lost(1, "is gone")
    assert failed.broken.result().message == "worker 1 of the group failed: OutOfMemoryError: CUDA out of memory"


def test_the_group_is_read_from_the_names_of_either_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GroupSettings().place().world_size == 1
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    assert GroupSettings().place() == Place(3, 4, "10.0.0.1", 1234)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ValueError, match="the rank must be below the world size, 4, got 4"):
        GroupSettings()
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("LWS_GROUP_SIZE", "2")
    monkeypatch.setenv("LWS_WORKER_INDEX", "1")
    with pytest.raises(ValueError, match="a worker needs the leader's address"):
        GroupSettings()
    monkeypatch.setenv("LWS_LEADER_ADDRESS", "denoiser-group-0.denoiser-group.bunraku")
    assert GroupSettings().place() == Place(1, 2, "denoiser-group-0.denoiser-group.bunraku", 29500)
