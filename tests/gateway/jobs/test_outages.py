"""The database stops, freezes or is locked: callers hear of it at once, work waits and goes on."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from pathlib import Path

import pytest

from bunraku.errors import NotReady
from gateway.jobs import database
from gateway.jobs.claims import Stop
from gateway.jobs.job import QUEUED, SUCCEEDED
from gateway.jobs.store import JobStore
from gateway.worker import stored
from tests.gateway.jobs.jobs import claimed, created, step, told, video
from tests.postgresql import MISSING, Server, programs

PROMPT_S = database.PROMPT_S


@pytest.fixture(autouse=True)
def impatience(patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "PROMPT_S", PROMPT_S)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of these tests' own, to be stopped."""
    if programs() is None:
        pytest.skip(MISSING)
    server = Server({"fsync": "off"})
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
async def store(server: Server) -> AsyncIterator[JobStore]:
    if server.process is None:
        server.start()
    store = JobStore(server.url, poll_s=0.1)
    await store.open()
    yield store
    await store.close()


async def test_a_submit_is_refused_within_a_second_when_the_server_is_gone_and_again_taken_when_it_is_back(
    store: JobStore, server: Server
) -> None:
    job = await created(store)
    await asyncio.to_thread(server.stop)
    for _ in range(3):
        begun = time.monotonic()
        with pytest.raises(NotReady) as refused:
            await created(store)
        assert time.monotonic() - begun < 1
        assert refused.value.reason == "DATABASE_UNAVAILABLE"
    await asyncio.to_thread(server.start)
    again = await created(store)
    assert [found.id for found in (await store.list_jobs(2))[0]] == [again.id, job.id]


async def test_a_submit_is_refused_within_a_second_when_the_server_is_frozen_and_leaves_nothing_behind(
    store: JobStore, server: Server
) -> None:
    before = (await store.counts())[QUEUED]
    server.freeze()
    begun = time.monotonic()
    outcomes = await asyncio.gather(*[created(store) for _ in range(12)], return_exceptions=True)
    assert time.monotonic() - begun < 1
    assert all(isinstance(outcome, NotReady) for outcome in outcomes)
    server.thaw()
    while store.database._calls:
        await asyncio.sleep(0.05)
    assert (await store.counts())[QUEUED] == before


async def test_work_and_watchers_ride_out_an_outage(store: JobStore, server: Server) -> None:
    job = await claimed(store)
    keeping = asyncio.create_task(store.claims.keep())
    stopping = asyncio.create_task(store.claims.wait_for_stop(job))
    async with aclosing(store.watch(job.id, 2)) as events:
        coming = asyncio.ensure_future(anext(events))
        while not (feed := store._watching._feeds.get(job.id)) or not feed.last_sequence:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(server.stop)
        reporting = asyncio.create_task(stored(lambda: store.claims.report(job, told([step(1)]))))
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in (coming, reporting, keeping, stopping))
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(15):
            assert (await coming).progress.completed == 1
    await reporting
    assert (await store.claims.finish(job, video=video())).state == SUCCEEDED
    assert await stopping is Stop.LOST  # it has ended
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_gateway_frozen_inside_a_transaction_does_not_stop_the_others(
    store: JobStore, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = database._POSTGRESQL_OPTIONS.replace("session_timeout=5000", "session_timeout=300")
    monkeypatch.setattr(database, "_POSTGRESQL_OPTIONS", options)
    frozen = JobStore(server.url)
    job = await claimed(store)
    transaction = frozen.database.writing()
    connection = await transaction.__aenter__()
    await connection.exec_driver_sql("SELECT * FROM generations FOR UPDATE")
    async with asyncio.timeout(4):
        assert await stored(lambda: store.claims.report(job, told([step(1)]))) == 3
    with pytest.raises(NotReady):
        await transaction.__aexit__(None, None, None)
    await frozen.close()


async def test_a_submit_to_a_locked_file_is_refused_within_a_second_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore(path)
    await store.open()
    with closing(sqlite3.connect(path, isolation_level=None)) as locker:
        locker.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        outcomes = await asyncio.gather(*[created(store) for _ in range(3)], return_exceptions=True)
        assert time.monotonic() - begun < 1
        assert all(isinstance(outcome, NotReady) for outcome in outcomes)
        locker.execute("ROLLBACK")
    while store.database._calls:
        await asyncio.sleep(0.05)
    assert (await store.counts())[QUEUED] == 0
    await store.close()
