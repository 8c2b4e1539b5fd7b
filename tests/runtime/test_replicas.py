"""Which replica takes a call: free slots, calls of others, replicas that are full, load, leave, freeze or die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bunraku.errors import NotReady, StageBroken
from runtime import client as client_module
from runtime import replicas
from runtime import server as server_module
from runtime.client import LOST_AT_WORK, Budget, Retry, StageClient, retrying
from runtime.gpu import raise_if_cancelled
from runtime.replicas import Endpoint, Load, stage_status
from runtime.server import SERVER_OPTIONS
from runtime.stage import Limits
from runtime.tensors import WireTensor
from tests.runtime.fakes import FIRST_ENCODE, Stage, Tensors, client, decode, encode, stage, until, zeros
from tests.runtime.processes import running

PATIENT = Retry(attempts=20, first_wait_s=20, longest_wait_s=20)
QUICK_PINGS = {"grpc.keepalive_time_ms": 300, "grpc.keepalive_timeout_ms": 300, "grpc.http2.ping_timeout_ms": 300}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def endpoint(**known: Any) -> Endpoint:
    return Endpoint("127.0.0.1:1", None, **known)  # type: ignore[arg-type]  # nothing is sent


@asynccontextmanager
async def gated(**limits: int) -> AsyncIterator[tuple[Stage, threading.Event]]:
    """A stage whose calls wait for an event."""
    go_on = threading.Event()

    def waits(tensors: Tensors) -> list[WireTensor]:
        assert go_on.wait(20)
        return []

    async with stage(limits=Limits(**limits)) as serving:
        serving.service.encode_work = waits
        try:
            yield serving, go_on
        finally:
            go_on.set()


def retried(caller: StageClient[Any], retry: Retry, seconds: float = 10) -> Awaitable[list[WireTensor]]:
    async def attempt(number: int) -> list[WireTensor]:
        return await encode(caller, zeros(1))

    return retrying(attempt, Budget.of(seconds), retry)


@pytest.mark.parametrize(
    ("calls", "load", "free"),
    [
        (0, None, 1),
        (2, None, -1),
        (0, Load(slots=4, busy=1, ours=0), 3),
        (2, Load(slots=4, busy=1, ours=0), 1),  # two of ours since
        (1, Load(slots=4, busy=3, ours=3), 3),  # two of ours have ended since
        (3, Load(slots=4, busy=0, ours=2), 1),  # what we know to be under way counts, whatever it said
    ],
)
def test_free_slots_are_those_it_told_of_less_what_was_sent_since(calls: int, load: Load | None, free: int) -> None:
    assert endpoint(calls=calls, load=load).free_slots == free


async def test_calls_fill_the_free_slots_of_unequal_replicas() -> None:
    async with (
        gated(max_concurrent=3) as (wide, go_wide),
        gated(max_concurrent=1) as (narrow, go_narrow),
        client(narrow.address, wide.address) as caller,
    ):
        calls = [asyncio.create_task(encode(caller, zeros(1))) for _ in range(4)]
        await until(lambda: wide.service.begun + narrow.service.begun == 4)
        assert (wide.service.begun, narrow.service.begun) == (3, 1)
        go_wide.set()
        go_narrow.set()
        await asyncio.gather(*calls)


async def test_calls_of_others_are_seen() -> None:
    async with (
        gated(max_concurrent=2) as (busy, go_on),
        stage(limits=Limits(max_concurrent=2)) as idle,
        client(busy.address) as other,
        client(busy.address, idle.address) as caller,
    ):
        theirs = [asyncio.create_task(encode(other, zeros(1))) for _ in range(2)]
        await until(lambda: busy.service.begun == 2)
        for _ in range(4):
            await encode(caller, zeros(1))
        assert (busy.service.begun, idle.service.begun) == (2, 4)
        go_on.set()
        await asyncio.gather(*theirs)


async def test_an_answer_tells_how_busy_its_stage_is() -> None:
    async with gated(max_concurrent=2) as (busy, go_on), client(busy.address) as other, client(busy.address) as caller:
        theirs = asyncio.create_task(encode(other, zeros(1)))
        await until(lambda: busy.service.begun == 1)
        ours = asyncio.create_task(encode(caller, zeros(1)))
        await until(lambda: busy.service.begun == 2)
        go_on.set()
        await asyncio.gather(theirs, ours)
        [known] = await caller.endpoints()
        assert known.load == Load(slots=2, busy=2, ours=1)
        assert known.revision == busy.runtime.revision != ""


async def test_a_call_that_finds_a_replica_full_goes_to_another_at_once() -> None:
    async with (
        gated(max_concurrent=1, max_queued=0) as (full, go_on),
        stage() as free,
        client(full.address) as other,
        client(full.address, free.address) as caller,
    ):
        for each in await caller.endpoints():
            # as if it had been asked a moment before the others' call came
            each.load, each.asked_at = Load(2 if each.address == full.address else 1, 0, 0), time.monotonic()
        theirs = asyncio.create_task(encode(other, zeros(1)))
        await until(lambda: full.service.begun == 1)
        async with asyncio.timeout(5):
            await retried(caller, PATIENT)
        assert free.service.begun == 1
        go_on.set()
        await theirs


async def test_when_all_replicas_are_full_calls_wait_before_they_try_again() -> None:
    async with (
        gated(max_concurrent=1, max_queued=0) as (one, go_one),
        gated(max_concurrent=1, max_queued=0) as (two, go),
        client(one.address, two.address) as caller,
    ):
        held = [asyncio.create_task(encode(caller, zeros(1))) for _ in range(2)]
        await until(lambda: one.service.begun + two.service.begun == 2)
        tried = 0

        async def attempt(number: int) -> list[WireTensor]:
            nonlocal tried
            tried += 1
            return await encode(caller, zeros(1))

        with pytest.raises(NotReady):
            await retrying(attempt, Budget.of(10), Retry(attempts=4, first_wait_s=0.05, longest_wait_s=0.05))
        assert tried == 4
        go_one.set()
        go.set()
        await asyncio.gather(*held)


async def test_a_replica_that_loads_is_left_alone() -> None:
    async with stage(load=False) as loading, stage() as ready, client(loading.address, ready.address) as caller:
        for _ in range(4):
            await encode(caller, zeros(1))
        assert ready.service.begun == 4


async def test_an_address_that_is_gone_gets_no_more_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gated(max_concurrent=4) as (leaving, go_on), client(leaving.address) as caller:
        held = asyncio.create_task(encode(caller, zeros(1)))
        await until(lambda: leaving.service.begun == 1)
        [known] = await caller.endpoints()
        async with stage() as new:
            caller._replicas._addresses = (new.address,)
            monkeypatch.setattr(replicas, "_RESOLVE_INTERVAL_S", 0.0)
            for _ in range(3):
                await encode(caller, zeros(1))
            assert (leaving.service.begun, new.service.begun) == (1, 3)
            assert known.gone
            go_on.set()
            await held  # the call under way went on
            assert [each.address for each in await caller.endpoints()] == [new.address]


async def test_a_name_without_an_address_yet_is_looked_up_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_RESOLVE_AGAIN_S", 0.0)
    async with stage() as serving, client("no.such.host.invalid:1") as caller:
        with pytest.raises(NotReady, match="no address at present"):
            await encode(caller, zeros(1))
        caller._replicas._addresses = (serving.address,)
        await encode(caller, zeros(1))
        assert serving.service.begun == 1


async def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*arguments: object, **options: object) -> object:
        return await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", never)
    monkeypatch.setattr(replicas, "_RESOLVE_TIMEOUT_S", 0.02)
    async with client("vae:50053") as caller, asyncio.timeout(5):
        with pytest.raises(NotReady, match="no address at present"):
            await encode(caller, zeros(1))


async def test_revisions_are_those_of_the_replicas_and_of_what_answers() -> None:
    async with stage() as old, stage() as new, client(old.address, new.address) as caller:
        new.runtime.revision = "new"
        assert await caller.revisions() == {old.runtime.revision, "new"}
        told = set()
        for _ in range(4):
            async with caller.call(Budget.of(5)) as call:
                stream = call.stream(call.stub.Encode, FIRST_ENCODE, [zeros(1)])
                assert [item async for item in stream]
                told.add((call.revision, call.endpoint.address))
        assert told == {(old.runtime.revision, old.address), ("new", new.address)}


async def test_a_process_that_was_started_again_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage() as first, client(first.address) as caller:
        assert await caller.revisions() == {first.runtime.revision}
        await first.server.drain(0)
        with pytest.raises(NotReady):
            await encode(caller, zeros(1))
        monkeypatch.setattr(replicas, "_REST_S", 0.0)
        async with stage(port=first.server.port) as second:
            second.runtime.revision = "second"
            [known] = await caller.endpoints()
            known.rests_until = 0
            async with asyncio.timeout(10):
                while await caller.revisions() != {"second"}:
                    await asyncio.sleep(0.05)


async def test_what_kills_every_stage_that_works_on_it_is_given_up() -> None:
    async def lost(number: int) -> None:
        raise NotReady("gone", reason=LOST_AT_WORK, stage="vae")

    with pytest.raises(StageBroken, match="died 3 times") as raised:
        await retrying(lost, Budget.of(5), Retry(losses=3, first_wait_s=0.001, longest_wait_s=0.002))
    assert raised.value.reason == LOST_AT_WORK
    assert raised.value.stage == "vae"


async def test_a_stage_that_is_killed_at_work_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    port = free_port()
    async with client(f"127.0.0.1:{port}") as caller:
        with pytest.raises(NotReady) as absent:
            await encode(caller, zeros(1))
        async with running("serve", port, tmp_path) as process:
            await until_serving(caller)
            held = asyncio.create_task(take_all(caller))
            await asyncio.sleep(0.2)
            await process.kill()
            with pytest.raises(NotReady) as killed:
                await held
    assert [absent.value.reason, killed.value.reason] == ["NOT_READY", LOST_AT_WORK]


async def test_a_frozen_stage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = tuple((name, QUICK_PINGS.get(name, value)) for name, value in client_module.CHANNEL_OPTIONS)
    monkeypatch.setattr(client_module, "CHANNEL_OPTIONS", options)
    port = free_port()
    async with running("serve", port, tmp_path) as process, client(f"127.0.0.1:{port}") as caller:
        await until_serving(caller)
        held = asyncio.create_task(take_all(caller))
        await asyncio.sleep(0.2)
        os.kill(process.process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(NotReady) as raised:
            await held
        assert raised.value.reason == LOST_AT_WORK
        assert time.monotonic() - begun < 5


async def test_a_frozen_caller_does_not_keep_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = tuple((name, QUICK_PINGS.get(name, value)) for name, value in SERVER_OPTIONS)
    monkeypatch.setattr(server_module, "SERVER_OPTIONS", options)

    def endless(tensors: Tensors) -> Iterator[WireTensor]:
        while True:
            raise_if_cancelled()
            time.sleep(0.001)
            yield zeros(2**16)

    async with stage() as serving:
        serving.service.decode_work = endless
        async with running("call", serving.server.port, tmp_path) as caller:
            assert len(serving.runtime.status().work) == 1
            os.kill(caller.process.pid, signal.SIGSTOP)
            begun = time.monotonic()
            await until(lambda: not serving.runtime.status().work)
            assert time.monotonic() - begun < 5


@pytest.mark.parametrize("options", [client_module.CHANNEL_OPTIONS, SERVER_OPTIONS])
def test_either_side_gives_up_the_other_before_a_job_has_stood_still_for_30_seconds(
    options: tuple[tuple[str, int], ...],
) -> None:
    known = dict(options)
    timeout = max(known["grpc.keepalive_timeout_ms"], known["grpc.http2.ping_timeout_ms"])
    assert known["grpc.keepalive_time_ms"] + timeout <= 18_000


async def until_serving(caller: StageClient[Any]) -> None:
    async with asyncio.timeout(20):
        while True:
            [known] = await caller.endpoints()
            try:
                if (await stage_status(known)).state == 2:
                    return
            except NotReady:
                await asyncio.sleep(0.05)


async def take_all(caller: StageClient[Any]) -> None:
    """A Decode that never ends by itself."""
    async for _ in decode(caller):
        pass
