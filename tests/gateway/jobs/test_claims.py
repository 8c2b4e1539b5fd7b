"""Claims under leases: renewing, taking over, fencing, handing back, setting aside, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from bunraku.errors import WrongState
from gateway.jobs.claims import Stop
from gateway.jobs.database import Database
from gateway.jobs.job import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, Job
from gateway.jobs.store import JobStore
from gateway.jobs.tables import GENERATIONS
from tests.gateway.jobs.jobs import claimed, created, step, told, video
from tests.postgresql import Server


@pytest.fixture
async def store(where: Path | str) -> AsyncIterator[JobStore]:
    async for opened in _open(where):
        yield opened


@pytest.fixture
async def other(store: JobStore, where: Path | str) -> AsyncIterator[JobStore]:
    """Another gateway."""
    async for opened in _open(where):
        yield opened


async def _open(where: Path | str) -> AsyncIterator[JobStore]:
    store = JobStore(where, poll_s=0.02)
    store.claims._after_restart_s = 0  # the server of the tests has just been started
    await store.open()
    yield store
    await store.close()


async def passed(store: JobStore, job: Job, time: str) -> None:
    """As if a time of a job, such as the end of its lease, were over."""
    async with store.database.writing() as connection:
        values = {time: store.database.now_us - 1}
        await connection.execute(sa.update(GENERATIONS).where(GENERATIONS.c.id == job.id).values(values))


async def lease_of(store: JobStore, job: Job) -> float:
    """Seconds that are left of it."""
    query = sa.select(GENERATIONS.c.lease_until_us - store.database.now_us).where(GENERATIONS.c.id == job.id)
    async with store.database.reading() as connection:
        return (await connection.scalar(query) or 0) / 1e6


async def test_time_of_the_database_is_microseconds_that_go_on(where: Path | str) -> None:
    database = Database(where)
    async with database.reading() as connection:
        first = await connection.scalar(sa.select(database.now_us))
        await asyncio.sleep(0.05)
        second = await connection.scalar(sa.select(database.now_us))
    await database.close()
    assert first is not None
    assert second is not None
    assert 1.7e15 < first < 1e16
    assert 40_000 < second - first < 5_000_000


async def test_what_is_not_renewed_is_taken_over_after_the_lease_and_not_before(
    store: JobStore, other: JobStore
) -> None:
    job = await claimed(store)
    assert 5 < await lease_of(store, job) <= 10
    assert await other.claims.sweep() == []
    await passed(store, job, "lease_until_us")
    assert [taken.id for taken in await other.claims.sweep()] == [job.id]
    again = await other.claims.next_job()
    assert (again.id, again.attempts, again.state) == (job.id, 2, RUNNING)
    assert again.claim_token != job.claim_token


async def test_what_is_renewed_is_not_taken_over(store: JobStore, other: JobStore) -> None:
    job = await claimed(store)
    await passed(store, job, "lease_until_us")
    await store.claims.renew()
    assert 5 < await lease_of(store, job) <= 10
    assert await other.claims.sweep() == []


async def test_a_lease_runs_out_by_itself(where: Path | str, store: JobStore) -> None:
    short = JobStore(where, lease_s=0.05)
    await claimed(short)
    await asyncio.sleep(0.06)
    assert len(await store.claims.sweep()) == 1
    await short.close()


async def test_a_gateway_that_keeps_its_claims_renews_them_and_takes_over_others(
    store: JobStore, other: JobStore
) -> None:
    mine, theirs = await claimed(store), await claimed(other)
    for job in (mine, theirs):
        await passed(store, job, "lease_until_us")
    keeping = asyncio.create_task(store.claims.keep())
    async with asyncio.timeout(5):
        assert (await store.claims.next_job()).id == theirs.id
    assert await lease_of(store, mine) > 5
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_gateway_does_not_take_over_from_itself(store: JobStore) -> None:
    job = await claimed(store)
    await passed(store, job, "lease_until_us")
    assert await store.claims.sweep() == []
    assert await store.claims.holds(job)


async def test_who_was_left_behind_can_change_nothing(store: JobStore, other: JobStore) -> None:
    frozen = await claimed(store)
    await passed(store, frozen, "lease_until_us")
    await other.claims.sweep()
    successor = await other.claims.next_job()
    await store.claims.renew()  # what a gateway does first when it thaws
    assert not await store.claims.holds(frozen)
    assert await store.claims.wait_for_stop(frozen) is Stop.LOST
    for write in (
        lambda: store.claims.report(frozen, told([step(1)])),
        lambda: store.claims.finish(frozen, video=video()),
        lambda: store.claims.give_back(frozen),
    ):
        with pytest.raises(WrongState) as refused:
            await write()
        assert refused.value.reason == "CLAIM_OVER"
    assert (await other.claims.finish(successor, video=video("b" * 64))).video == video("b" * 64)


async def test_a_claim_of_the_same_attempt_with_another_token_is_refused(store: JobStore) -> None:
    job = await claimed(store)
    await store.claims.hand_back()
    again = await store.claims.next_job()
    await store.claims.report(again, told([step(1)]))
    with pytest.raises(WrongState):
        await store.claims.report(job, told([step(2)]))


async def test_handed_back_work_goes_on_elsewhere_at_once_and_counts_as_nobodys_fault(
    store: JobStore, other: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.jobs.claims.MAX_LOST_LEASES", 1)
    mine, theirs = await claimed(store), await claimed(other)
    waiting = asyncio.create_task(other.claims.next_job())
    await asyncio.sleep(0.05)
    await store.claims.hand_back()
    async with asyncio.timeout(2):
        assert (await waiting).id == mine.id
    assert await other.claims.holds(theirs)


async def test_handing_back_ends_what_was_to_be_cancelled(store: JobStore) -> None:
    job = await claimed(store)
    await store.request_cancel(job.id)
    await store.claims.hand_back()
    assert (await store.get(job.id)).state == CANCELLED


async def test_a_cancelled_job_of_a_dead_gateway_is_cancelled_and_not_begun_again(
    store: JobStore, other: JobStore
) -> None:
    job = await claimed(store)
    await other.request_cancel(job.id)
    await passed(store, job, "lease_until_us")
    assert await other.claims.sweep() == []
    assert (await other.get(job.id)).state == CANCELLED


async def test_a_job_that_gateways_die_of_fails_in_the_end(
    store: JobStore, other: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.jobs.claims.MAX_LOST_LEASES", 2)
    job = await claimed(store)
    await passed(store, job, "lease_until_us")
    assert len(await other.claims.sweep()) == 1
    await store.claims.next_job()
    await passed(store, job, "lease_until_us")
    assert await other.claims.sweep() == []
    failed = await other.get(job.id)
    assert failed.state == FAILED
    assert failed.error is not None
    assert failed.error.reason == "TOO_MANY_ATTEMPTS"


@pytest.mark.parametrize("where", ["postgresql"], indirect=True)
async def test_when_the_database_has_just_come_back_gateways_have_time_to_renew(
    postgresql: Server, store: JobStore
) -> None:
    cautious = JobStore(postgresql.url)
    cautious.claims._after_restart_s = 1e6
    await passed(store, await claimed(store), "lease_until_us")
    assert await cautious.claims.sweep() == []
    assert len(await store.claims.take_back()) == 1
    await cautious.close()


# Deadlines


async def test_what_waits_past_its_deadline_is_never_begun_and_fails(store: JobStore) -> None:
    late, patient = [await created(store, timeout_s=60) for _ in range(2)]
    await passed(store, late, "deadline_us")
    begun = await store.claims.claim_next()
    assert begun is not None
    assert begun.id == patient.id
    await store.claims.sweep()
    failed = await store.get(late.id)
    assert (failed.state, failed.attempts) == (FAILED, 0)
    assert failed.error is not None
    assert failed.error.status == "DEADLINE_EXCEEDED"
    assert failed.end_time_us is not None


async def test_the_deadline_is_the_time_of_creation_and_what_it_was_given(store: JobStore) -> None:
    job = await created(store, timeout_s=2.5)
    assert job.deadline_us == job.create_time_us + 2_500_000
    assert (await created(store)).deadline_us is None


async def test_what_runs_is_not_given_up_by_others_at_its_deadline(store: JobStore, other: JobStore) -> None:
    job = await claimed(store)
    await passed(store, job, "deadline_us")
    await other.claims.sweep()
    assert (await other.get(job.id)).state == RUNNING


# Setting aside


async def test_the_least_urgent_that_holds_a_denoiser_is_set_aside_and_only_once(
    store: JobStore, other: JobStore
) -> None:
    jobs = []
    for priority in (1, 0, 0, 5):
        await created(store, priority=priority)
    for _ in range(4):
        jobs.append(await store.claims.next_job())
    high, low, first, _ = jobs
    for job in (high, low, first):
        await store.claims.report(job, told([], denoising=True))
    assert low.number < first.number
    assert await other.claims.ask_to_set_aside(below_priority=9) == first.id  # of two the later one
    assert await other.claims.ask_to_set_aside(below_priority=9) is None
    async with asyncio.timeout(2):
        assert await store.claims.wait_for_stop(first) is Stop.SET_ASIDE


async def test_nothing_of_the_same_priority_is_set_aside(store: JobStore) -> None:
    await created(store, priority=5)
    job = await store.claims.next_job()
    await store.claims.report(job, told([], denoising=True))
    assert await store.claims.ask_to_set_aside(below_priority=5) is None
    assert await store.claims.ask_to_set_aside(below_priority=6) == job.id


async def test_what_holds_no_denoiser_is_not_set_aside(store: JobStore) -> None:
    job = await claimed(store)
    await store.claims.report(job, told([]))
    assert await store.claims.ask_to_set_aside(below_priority=9) is None


async def test_what_is_set_aside_waits_again_at_its_old_place(store: JobStore) -> None:
    job = await claimed(store)
    later = await created(store)
    back = await store.claims.give_back(job)
    assert (back.state, back.attempts) == (QUEUED, 1)
    first, second = await store.claims.next_job(), await store.claims.next_job()
    assert [first.id, second.id] == [job.id, later.id]
    assert (await store.claims.finish(first, video=video())).state == SUCCEEDED


async def test_only_what_is_more_urgent_is_begun_beyond_the_limit(store: JobStore) -> None:
    await created(store, priority=3)
    assert await store.claims.claim_next(above_priority=3) is None
    urgent = await created(store, priority=4)
    job = await store.claims.claim_next(above_priority=3)
    assert job is not None
    assert job.id == urgent.id


async def test_a_worker_that_may_not_begin_anything_now_waits(store: JobStore) -> None:
    limit: list[int | None] = [None]
    await created(store, priority=1)
    waiting = asyncio.create_task(store.claims.next_job(lambda: limit[0]))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    limit[0] = 0
    async with asyncio.timeout(2):
        assert (await waiting).priority == 1


async def test_a_worker_that_is_told_to_look_again_does_not_wait_for_the_next_poll(where: Path | str) -> None:
    store = JobStore(where, poll_s=60.0)
    await store.open()
    limit: list[int | None] = [None]
    await created(store)
    waiting = asyncio.create_task(store.claims.next_job(lambda: limit[0]))
    await asyncio.sleep(0.1)
    limit[0] = -1
    store.claims.look_again()
    async with asyncio.timeout(5):
        await waiting
    await store.close()


# Several gateways


async def test_other_gateways_hear_of_work_cancels_and_events_without_polling(postgresql: Server) -> None:
    postgresql.empty()
    stores = [JobStore(postgresql.url, poll_s=60.0) for _ in range(2)]
    for store in stores:
        await store.open()
    await asyncio.sleep(0.2)  # they listen
    here, there = stores
    async with asyncio.timeout(5):
        working = asyncio.create_task(there.claims.next_job())
        await asyncio.sleep(0.05)
        job = await created(here)
        claim = await working
        stopping = asyncio.create_task(there.claims.wait_for_stop(claim))
        events = here.watch(job.id, 2)
        coming = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.05)
        await there.claims.report(claim, told([step(1)]))
        assert (await coming).progress.completed == 1
        await events.aclose()
        await here.request_cancel(job.id)
        assert await stopping is Stop.CANCELLED
    for store in stores:
        await store.close()
