"""The life of a stage process: what ends it, and with which status."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from bunraku.errors import NotReady, StageBroken
from runtime import server as server_module
from runtime.server import ServerSettings, run
from runtime.stage import StageRuntime, State
from runtime.tensors import WireTensor
from tests.runtime.fakes import BUNDLE, FakeVae, Tensors, client, encode, stage, until, zeros


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_END_OF_WORK_S", 0.05)


class Process:
    """`run` in a task of this process."""

    def __init__(self, runtime: StageRuntime, grace_s: float = 10.0) -> None:
        self.runtime, self.service = runtime, FakeVae(runtime)
        self.servers: list[server_module.StageServer] = []
        self.settings = ServerSettings(grace_s=grace_s)

    def start(self) -> asyncio.Task[int]:
        return asyncio.create_task(run(self.service, self.runtime, self.settings))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.servers[0].port}"

    async def serving(self) -> None:
        await until(lambda: self.runtime.state == State.STAGE_STATE_SERVING)


@pytest_asyncio.fixture
async def process(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Process]:
    started = Process(StageRuntime("vae", BUNDLE))

    class Noted(server_module.StageServer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.servers.append(self)

    monkeypatch.setattr(server_module, "StageServer", Noted)
    yield started


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_stage_well(process: Process, signal_number: int) -> None:
    task = process.start()
    await process.serving()
    os.kill(os.getpid(), signal_number)
    assert await task == 0
    assert process.runtime.draining


async def test_work_in_flight_is_finished_after_a_signal(process: Process) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work(tensors: Tensors) -> list[WireTensor]:
        begun.set()
        assert go_on.wait(10)
        return [zeros(3)]

    process.service.encode_work = work
    task = process.start()
    await process.serving()
    async with client(process.address) as caller:
        call = asyncio.create_task(encode(caller, zeros(1)))
        await until(begun.is_set)
        terminate()
        await until(lambda: process.runtime.draining)
        go_on.set()
        assert [tensor.size_bytes for tensor in await call] == [3]
    assert await task == 0


async def test_a_signal_while_loading_does_not_wait_for_the_load(process: Process) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def load() -> None:
        begun.set()
        go_on.wait(10)

    process.service.load_work = load
    task = process.start()
    await until(begun.is_set)
    terminate()
    async with asyncio.timeout(5):
        assert await task == 0
    go_on.set()


async def test_a_failed_load_ends_the_process_with_1(process: Process, caplog: pytest.LogCaptureFixture) -> None:
    def load() -> None:
        raise FileNotFoundError("vae.safetensors")

    process.service.load_work = load
    assert await process.start() == 1
    assert "vae: vae.safetensors" in caplog.text


async def test_a_broken_device_ends_the_process_with_1(process: Process) -> None:
    def work(tensors: Tensors) -> list[WireTensor]:
        raise RuntimeError("CUDA error: unspecified launch failure")

    process.service.encode_work = work
    task = process.start()
    await process.serving()
    async with client(process.address) as caller:
        with pytest.raises(StageBroken, match="the device failed"):
            await encode(caller, zeros(1))
        assert await task == 1
        with pytest.raises(NotReady):
            await encode(caller, zeros(1))
    assert process.runtime.state == State.STAGE_STATE_BROKEN


async def test_an_address_that_is_taken_ends_the_process(process: Process) -> None:
    async with stage() as other:
        process.settings = ServerSettings(other.address)
        with pytest.raises(OSError, match="cannot listen on"):
            await process.start()
