"""Jobs and events in the database: order, idempotency, claims, cancelling, watching, restarts, outages."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import sqlalchemy as sa

from bunraku.errors import Busy, Conflict, InvalidRequest, NotFound, NotReady, WrongState
from bunraku.v1 import gateway_pb2 as pb
from gateway.jobs import claims, watching
from gateway.jobs.database import Database
from gateway.jobs.job import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, Job, generation_id
from gateway.jobs.store import JobStore
from gateway.jobs.tables import EVENTS
from tests.gateway.jobs.jobs import claimed, created, step, told, video

NEVER_S = 60.0  # a poll that only a broken wake-up would wait for


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
async def store(where: Path | str) -> AsyncIterator[JobStore]:
    store = JobStore(where, poll_s=NEVER_S)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def other(store: JobStore, where: Path | str) -> AsyncIterator[JobStore]:
    """A second store on the same database: what another process sees."""
    other = JobStore(where, poll_s=0.01)
    await other.open()
    yield other
    await other.close()


async def watched(store: JobStore, job: Job, after: int = 0) -> list[pb.WatchGenerationResponse]:
    async with asyncio.timeout(5):
        return [event async for event in store.watch(job.id, after)]


async def states_seen(store: JobStore, job: Job) -> list[int]:
    return [event.generation.state for event in await store.events_after(job.id) if event.HasField("generation")]


# Creating and reading


async def test_a_created_generation_waits_with_its_request(store: JobStore) -> None:
    before_us = time.time_ns() // 1000
    job = await created(store, "r-1", priority=3)
    read = await store.get(job.id)
    assert read == job
    assert (read.state, read.attempts, read.cancel_requested) == (QUEUED, 0, False)
    assert (read.request.request_id, read.request.animate.prompt, read.request.priority) == ("r-1", "a dancer", 3)
    assert before_us <= read.create_time_us <= time.time_ns() // 1000
    assert (read.start_time_us, read.end_time_us, read.video, read.error) == (None, None, None, None)


async def test_the_same_request_id_and_digest_gives_the_same_generation(store: JobStore) -> None:
    first = await created(store, "r-1")
    assert await created(store, "r-1") == first
    assert (await store.counts())[QUEUED] == 1


async def test_the_same_request_id_with_another_digest_is_a_conflict(store: JobStore) -> None:
    await created(store, "r-1", digest="one")
    with pytest.raises(Conflict, match="r-1"):
        await created(store, "r-1", digest="two")


async def test_an_earlier_call_is_found_by_its_request_id(store: JobStore) -> None:
    await created(store)
    job = await created(store, "r-1", digest="one")
    assert await store.admit("r-1", "one") == job
    assert await store.admit("r-2", "one") is None
    assert await store.admit("", "d") is None
    with pytest.raises(Conflict):
        await store.admit("r-1", "two")


async def test_calls_without_request_id_make_a_generation_each(store: JobStore) -> None:
    assert (await created(store)).id != (await created(store)).id


async def test_simultaneous_calls_with_one_request_id_make_one_generation(store: JobStore, other: JobStore) -> None:
    jobs = await asyncio.gather(*[created(s, "r-1") for s in (store, other) * 5])
    assert len({job.id for job in jobs}) == 1
    assert (await store.counts())[QUEUED] == 1


async def test_a_full_queue_is_busy_but_still_knows_earlier_requests(path: Path) -> None:
    store = JobStore(path, max_queued=1)
    await store.open()
    first = await created(store, "r-1")
    with pytest.raises(Busy) as refused:
        await created(store, "r-2")
    assert refused.value.retry_after_s is not None
    assert await created(store, "r-1") == first
    await store.close()


async def test_an_unknown_generation_is_not_found(store: JobStore) -> None:
    for call in (store.get, store.request_cancel, store.delete):
        with pytest.raises(NotFound):
            await call("0" * 32)
    with pytest.raises(NotFound):
        await anext(store.watch("0" * 32, 0))


async def test_the_proto_shows_name_trace_times_and_outcome(store: JobStore) -> None:
    request = pb.CreateGenerationRequest(model="tiny")
    await store.create(request, request_digest="d", trace_parent=f"00-{'ab' * 16}-{'cd' * 8}-01")
    job = await store.claims.next_job()
    progress = pb.GenerationProgress(fraction=0.5, stages=[pb.StageProgress(stage="text")])
    await store.claims.report(job, told([], progress))
    proto = (await store.claims.finish(job, video=video())).to_proto()
    assert proto.name == f"generations/{job.id}"
    assert generation_id(proto.name) == job.id
    assert proto.request == request
    assert proto.trace_id == "ab" * 16
    assert proto.video == video()
    assert proto.progress == progress
    assert proto.attempts == 1
    times = [t.ToMicroseconds() for t in (proto.create_time, proto.start_time, proto.end_time)]
    assert times == sorted(times)
    assert times[0] > 0


async def test_the_proto_of_a_waiting_generation_has_no_later_times_and_no_outcome(store: JobStore) -> None:
    proto = (await created(store)).to_proto()
    assert not any(proto.HasField(field) for field in ("start_time", "end_time", "error", "video"))
    assert proto.trace_id == ""


@pytest.mark.parametrize("name", ["", "generations/", "generations/A" + "0" * 31, "assets/" + "0" * 32, "0" * 32])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        generation_id(name)
    assert refused.value.violations[0][0] == "name"


# Listing


async def test_pages_go_from_the_newest_to_the_oldest_without_repeating(store: JobStore) -> None:
    jobs = [await created(store) for _ in range(5)]
    ids, token, sizes = [], "", []
    while True:
        page, token = await store.list_jobs(2, token)
        ids += [job.id for job in page]
        sizes.append(len(page))
        await created(store)  # what comes meanwhile does not move the pages
        if not token:
            break
    assert ids == [job.id for job in reversed(jobs)]
    assert sizes == [2, 2, 1]


async def test_a_page_that_ends_exactly_at_the_oldest_is_the_last(store: JobStore) -> None:
    for _ in range(2):
        await created(store)
    assert (await store.list_jobs(2))[1] == ""


async def test_a_list_holds_only_the_states_asked_for(store: JobStore) -> None:
    running = await claimed(store)
    cancelled = await store.request_cancel((await created(store)).id)
    await created(store)
    page, _ = await store.list_jobs(states=[RUNNING, CANCELLED])
    assert [job.id for job in page] == [cancelled.id, running.id]


@pytest.mark.parametrize(("size", "token", "field"), [(1001, "", "page_size"), (1, "x", "page_token")])
async def test_a_bad_page_is_refused(store: JobStore, size: int, token: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await store.list_jobs(size, token)
    assert refused.value.violations[0][0] == field


# Claiming and working


async def test_claims_go_by_priority_then_by_age(store: JobStore) -> None:
    low, first, second, high = [await created(store, priority=p) for p in (0, 5, 5, 9)]
    order = []
    while (job := await store.claims.claim_next()) is not None:
        order.append(job.id)
    assert order == [high.id, first.id, second.id, low.id]


async def test_a_claim_begins_an_attempt(store: JobStore) -> None:
    job = await claimed(store)
    assert (job.state, job.attempts) == (RUNNING, 1)
    assert job.start_time_us is not None


async def test_no_two_workers_get_the_same_job(store: JobStore, other: JobStore) -> None:
    for _ in range(10):
        await created(store)
    jobs = await asyncio.gather(*[s.claims.claim_next() for s in (store, other) * 6])
    ids = [job.id for job in jobs if job is not None]
    assert len(ids) == len(set(ids)) == 10


async def test_a_waiting_worker_gets_a_new_job_at_once(store: JobStore) -> None:
    worker = asyncio.create_task(store.claims.next_job())
    await asyncio.sleep(0.05)
    job = await created(store)
    async with asyncio.timeout(5):
        assert (await worker).id == job.id


async def test_a_waiting_worker_finds_the_job_that_another_process_queued(store: JobStore, other: JobStore) -> None:
    worker = asyncio.create_task(other.claims.next_job())
    await asyncio.sleep(0.03)
    job = await created(store)
    async with asyncio.timeout(5):
        assert (await worker).id == job.id


async def test_success_failure_and_cancelling_are_told_by_what_finish_is_given(store: JobStore) -> None:
    error = pb.GenerationError(status="UNAVAILABLE", reason="STAGE_UNAVAILABLE", stage="denoiser")
    succeeded = await store.claims.finish(await claimed(store), video=video())
    failed = await store.claims.finish(await claimed(store), error=error)
    cancelled = await store.claims.finish(await claimed(store))
    assert [job.state for job in (succeeded, failed, cancelled)] == [SUCCEEDED, FAILED, CANCELLED]
    assert (succeeded.video, succeeded.error) == (video(), None)
    assert (failed.video, failed.error) == (None, error)
    assert all(job.end_time_us is not None for job in (succeeded, failed, cancelled))
    with pytest.raises(ValueError, match="not with both"):
        await store.claims.finish(await claimed(store), video=video(), error=error)


async def test_an_ended_job_takes_nothing_more(store: JobStore) -> None:
    job = await claimed(store)
    ended = await store.claims.finish(job)
    writes: list[Callable[[], object]] = [
        lambda: store.claims.finish(job, video=video()),
        lambda: store.claims.report(job, told([step(1)])),
        lambda: store.claims.report(job, told([], pb.GenerationProgress(fraction=1))),
    ]
    for write in writes:
        with pytest.raises(WrongState, match="attempt 1"):
            await write()  # type: ignore[misc]  # each gives an awaitable
    assert await store.get(job.id) == ended


async def test_writes_of_an_earlier_attempt_are_refused(store: JobStore) -> None:
    left_behind = await claimed(store)
    await store.claims.take_back()
    successor = await store.claims.next_job()
    assert (successor.id, successor.attempts) == (left_behind.id, 2)
    with pytest.raises(WrongState):
        await store.claims.finish(left_behind, video=video())
    with pytest.raises(WrongState):
        await store.claims.report(left_behind, told([step(1)]))
    assert (await store.claims.finish(successor, video=video())).state == SUCCEEDED


# Cancelling


async def test_a_waiting_generation_is_cancelled_at_once(store: JobStore) -> None:
    job = await store.request_cancel((await created(store)).id)
    assert (job.state, job.cancel_requested) == (CANCELLED, True)
    assert job.end_time_us is not None
    assert await store.claims.claim_next() is None


async def test_a_running_generation_is_told_and_ends_cancelled_whatever_its_worker_says(store: JobStore) -> None:
    outcomes = [{"video": video()}, {"error": pb.GenerationError(reason="X")}, {}]
    for outcome in outcomes:
        job = await claimed(store)
        asked = await store.request_cancel(job.id)
        assert (asked.state, asked.cancel_requested) == (RUNNING, True)
        ended = await store.claims.finish(job, **outcome)  # type: ignore[arg-type]  # each is one of its keywords
        assert (ended.state, ended.video, ended.error) == (CANCELLED, None, None)
        assert ended.end_time_us is not None


async def test_an_ended_generation_stays_as_it_is_when_cancelled(store: JobStore) -> None:
    ended = await store.claims.finish(await claimed(store), video=video())
    assert await store.request_cancel(ended.id) == ended


async def test_the_worker_hears_of_a_cancel_at_once_and_not_before(store: JobStore) -> None:
    job = await claimed(store)
    waiting = asyncio.create_task(store.claims.wait_for_stop(job))
    await store.claims.report(job, told([step(1)]))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await store.request_cancel(job.id)
    async with asyncio.timeout(5):
        await waiting


async def test_the_worker_hears_of_a_cancel_by_another_process(store: JobStore, other: JobStore) -> None:
    job = await claimed(other)
    waiting = asyncio.create_task(other.claims.wait_for_stop(job))
    await asyncio.sleep(0.03)
    await store.request_cancel(job.id)
    async with asyncio.timeout(5):
        await waiting


async def test_waiting_for_cancel_ends_with_the_claim(store: JobStore) -> None:
    job = await claimed(store)
    waiting = asyncio.create_task(store.claims.wait_for_stop(job))
    await asyncio.sleep(0.03)
    await store.claims.finish(job, video=video())
    async with asyncio.timeout(5):
        await waiting


# Events


async def test_events_are_numbered_from_one_without_gaps_and_show_every_state(store: JobStore) -> None:
    job = await claimed(store)
    assert [await store.claims.report(job, told([step(i)])) for i in (1, 2)] == [3, 4]
    await store.claims.finish(job, video=video())
    events = await watched(store, job)
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert [event.WhichOneof("event") for event in events] == ["generation"] * 2 + ["progress"] * 2 + ["generation"]
    assert [events[i].generation.state for i in (0, 1, 4)] == [QUEUED, RUNNING, SUCCEEDED]
    assert events[4].generation.video == video()
    assert [event.progress.completed for event in events[2:4]] == [1, 2]
    times = [event.time.ToMicroseconds() for event in events]
    assert times == sorted(times)
    assert times[0] > 0


async def test_simultaneous_events_leave_no_gaps(store: JobStore, other: JobStore) -> None:
    job = await claimed(store)
    numbers = await asyncio.gather(*[s.claims.report(job, told([step(i)])) for i, s in enumerate((store, other) * 10)])
    assert sorted(numbers) == list(range(3, 23))


async def test_appending_leaves_the_callers_event_alone(store: JobStore) -> None:
    event = step(1)
    await store.claims.report(await claimed(store), told([event]))
    assert event == step(1)


async def test_a_watch_goes_on_after_the_last_sequence_seen(store: JobStore) -> None:
    job = await claimed(store)
    await store.claims.finish(job)
    assert [event.sequence for event in await watched(store, job, after=1)] == [2, 3]
    assert await watched(store, job, after=3) == []


async def test_a_watcher_sees_events_at_once_as_they_come(store: JobStore) -> None:
    job = await claimed(store)
    async with asyncio.timeout(5), aclosing(store.watch(job.id, 2)) as events:
        for number in range(1, 4):
            coming = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.02)  # the watcher waits already
            assert not coming.done()
            await store.claims.report(job, told([step(number)]))
            assert (await coming).progress.completed == number


async def test_a_watcher_in_another_process_sees_events_by_polling(store: JobStore, other: JobStore) -> None:
    job = await claimed(store)
    watching = asyncio.create_task(watched(other, job))
    await asyncio.sleep(0.03)
    await store.claims.report(job, told([step(1)]))
    await store.claims.finish(job)
    assert [event.sequence for event in await watching] == [1, 2, 3, 4]


async def test_a_watcher_far_behind_gets_every_event(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "EVENTS_PER_READ", 2)
    job = await claimed(store)
    for number in range(4):
        await store.claims.report(job, told([step(number)]))
    assert len(await store.events_after(job.id)) == 2
    await store.claims.finish(job)
    assert [event.sequence for event in await watched(store, job)] == [1, 2, 3, 4, 5, 6, 7]


async def test_who_waits_asks_the_database_only_when_there_is_news(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await claimed(store)
    asked: list[str] = []

    def count(part: object, name: str) -> None:
        ask = getattr(part, name)

        async def counted(*args: object) -> object:
            asked.append(name)
            return await ask(*args)

        monkeypatch.setattr(part, name, counted)

    for part, name in ((store.claims, "_anything_waits"), (store.claims, "_stop"), (store._watching, "_news_of")):
        count(part, name)
    waiting = [asyncio.create_task(wait) for wait in (store.claims.next_job(), store.claims.wait_for_stop(job))]
    watching = asyncio.create_task(watched(store, job))
    await asyncio.sleep(0.2)
    assert sorted(asked) == ["_anything_waits", "_news_of", "_stop"]
    await store.claims.report(job, told([step(1)]))
    await asyncio.sleep(0.2)
    assert sorted(asked) == ["_anything_waits", "_news_of", "_news_of", "_stop"]
    await store.request_cancel(job.id)  # a signal to all but who waits for work
    await store.claims.finish(job)
    await asyncio.gather(watching, waiting[1])
    waiting[0].cancel()
    await asyncio.wait(waiting)


async def test_requeued_work_wakes_a_worker_at_once(store: JobStore) -> None:
    job = await claimed(store)
    worker = asyncio.create_task(store.claims.next_job())
    await asyncio.sleep(0.05)
    await store.claims.take_back()
    async with asyncio.timeout(5):
        assert (await worker).id == job.id


async def test_nothing_is_kept_for_generations_that_nobody_watches(store: JobStore) -> None:
    job = await claimed(store)
    watching = asyncio.create_task(watched(store, job))
    stopping = asyncio.create_task(store.claims.wait_for_stop(job))
    await asyncio.sleep(0.03)
    assert len(store._signals._listeners) == 2
    await store.claims.finish(job)
    await asyncio.gather(watching, stopping)
    abandoned = asyncio.create_task(store.claims.next_job())
    await asyncio.sleep(0.03)
    abandoned.cancel()
    await asyncio.wait([abandoned])
    assert not store._signals._listeners


# Deleting


async def test_deleting_takes_the_events_along_and_names_the_video(store: JobStore) -> None:
    job = await store.claims.finish(await claimed(store), video=video())
    assert await store.delete(job.id) == video().sha256
    with pytest.raises(NotFound):
        await store.get(job.id)
    async with store.database.reading() as connection:
        assert await connection.scalar(sa.select(sa.func.count()).select_from(EVENTS)) == 0


async def test_a_video_that_another_generation_has_too_is_not_given_up(store: JobStore) -> None:
    first = await store.claims.finish(await claimed(store), video=video())
    second = await store.claims.finish(await claimed(store), video=video())
    assert await store.delete(first.id) is None
    assert await store.delete(second.id) == video().sha256


async def test_deleting_a_generation_without_video_gives_none(store: JobStore) -> None:
    job = await store.claims.finish(await claimed(store))
    assert await store.delete(job.id) is None


async def test_a_generation_that_has_not_ended_is_not_deleted(store: JobStore) -> None:
    running = await claimed(store)
    waiting = await created(store)
    for job in (running, waiting):
        with pytest.raises(WrongState):
            await store.delete(job.id)
    assert (await store.get(running.id)).state == RUNNING


async def test_a_request_id_is_free_again_after_deletion(store: JobStore) -> None:
    job = await store.request_cancel((await created(store, "r-1", digest="one")).id)
    await store.delete(job.id)
    assert (await created(store, "r-1", digest="two")).id != job.id


# Restarts and other processes


async def test_what_one_process_writes_the_other_sees(store: JobStore, other: JobStore) -> None:
    job = await created(store)
    assert (await other.get(job.id)) == job
    mine = await other.claims.claim_next()
    assert mine is not None
    assert (await store.get(job.id)).state == RUNNING
    await other.claims.finish(mine, video=video())
    assert (await store.get(job.id)).video == video()


async def test_a_restart_keeps_jobs_and_queues_the_running_ones_again(store: JobStore, where: Path | str) -> None:
    ended = await store.claims.finish(await claimed(store), video=video())
    running = await claimed(store)
    await store.claims.report(running, told([], pb.GenerationProgress(fraction=0.5)))
    waiting = await created(store)
    await store.close()

    again = JobStore(where)
    await again.open()
    assert [job.id for job in await again.claims.take_back()] == [running.id]
    assert await again.get(ended.id) == ended
    back = await again.get(running.id)
    assert (back.state, back.attempts, back.progress.fraction) == (QUEUED, 1, 0)
    assert await states_seen(again, running) == [QUEUED, RUNNING, QUEUED]
    first, second = await again.claims.next_job(), await again.claims.next_job()
    assert (first.id, first.attempts, second.id) == (running.id, 2, waiting.id)  # at its old place
    assert first.start_time_us == running.start_time_us
    await again.close()


async def test_what_was_to_be_cancelled_is_cancelled_at_a_restart(store: JobStore) -> None:
    job = await claimed(store)
    await store.request_cancel(job.id)
    assert await store.claims.take_back() == []
    assert (await store.get(job.id)).state == CANCELLED
    assert await states_seen(store, job) == [QUEUED, RUNNING, CANCELLED]


async def test_a_job_in_which_gateways_died_too_often_fails(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "MAX_LOST_LEASES", 2)
    job = await claimed(store)
    assert len(await store.claims.take_back()) == 1
    await store.claims.next_job()
    assert await store.claims.take_back() == []
    failed = await store.get(job.id)
    assert failed.state == FAILED
    assert failed.error is not None
    assert failed.error.reason == "TOO_MANY_ATTEMPTS"
    assert failed.end_time_us is not None


_CREATE_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from bunraku.v1 import gateway_pb2 as pb
from gateway.jobs.store import JobStore

async def main():
    where = sys.argv[1]
    store = JobStore(where if where.startswith("postgresql") else Path(where))
    await store.open()
    while True:
        job = await store.create(pb.CreateGenerationRequest(), request_digest="d")
        print(job.id, flush=True)

asyncio.run(main())
"""


async def test_every_generation_that_was_acknowledged_survives_a_kill(store: JobStore, where: Path | str) -> None:
    writer = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-c", _CREATE_UNTIL_KILLED, str(where)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    ids = [await asyncio.to_thread(writer.stdout.readline) for _ in range(5)]
    writer.send_signal(signal.SIGKILL)
    ids += (await asyncio.to_thread(writer.communicate))[0].splitlines()
    for job_id in ids:
        assert (await store.get(job_id.strip())).state == QUEUED


async def test_what_was_acknowledged_is_synced_to_the_disk_and_what_can_be_lost_is_not(path: Path) -> None:
    database = Database(path)
    settings = []
    for durable in (True, False, False, True):
        async with database.writing(durable=durable) as connection:
            settings.append(
                [await connection.scalar(sa.text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous")]
            )
    full, normal = ["wal", 2], ["wal", 1]
    assert settings == [full, normal, normal, full]
    await database.close()


async def test_cancelled_calls_leave_the_store_usable_and_events_whole(store: JobStore) -> None:
    for i in range(40):
        call = asyncio.create_task(created(store))
        await asyncio.sleep(i * 0.0005)
        call.cancel()
        await asyncio.wait([call])
    job = await created(store)
    jobs, _ = await store.list_jobs(1000)
    assert jobs[0] == job
    for each in jobs:
        assert [event.sequence for event in await store.events_after(each.id)] == [1]


async def test_closing_waits_for_a_call_whose_caller_is_gone(store: JobStore, where: Path | str) -> None:
    call = asyncio.create_task(created(store, "r-1"))
    await asyncio.sleep(0)  # it begins
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait([call])
    await store.close()
    again = JobStore(where)
    assert await again.admit("r-1", "d") is not None
    await again.close()
    assert not store.database._calls


# Outages


async def test_a_locked_database_is_not_ready_for_writes_and_still_read(path: Path) -> None:
    store = JobStore(path, busy_timeout_s=0.05)
    await store.open()
    job = await created(store)
    locker = sqlite3.connect(path, isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    with pytest.raises(NotReady) as refused:
        await created(store)
    assert refused.value.reason == "DATABASE_UNAVAILABLE"
    assert refused.value.retry_after_s is not None
    assert await store.get(job.id) == job
    locker.execute("ROLLBACK")
    locker.close()
    await created(store)
    assert (await store.counts())[QUEUED] == 2
    await store.close()


async def test_a_full_database_is_not_ready_and_keeps_what_it_has(path: Path) -> None:
    store = JobStore(path)
    await store.open()
    job = await created(store)
    async with store.database.writing() as connection:
        await connection.execute(sa.text("PRAGMA max_page_count = 1"))
    request = pb.CreateGenerationRequest(request_id="r-1")
    request.animate.prompt = "x" * 100_000
    with pytest.raises(NotReady, match="full"):
        await store.create(request, request_digest="d")
    assert await store.get(job.id) == job
    assert (await store.counts())[QUEUED] == 1
    await store.close()


async def test_counts_are_zero_for_states_that_none_is_in(store: JobStore) -> None:
    await created(store)
    counts = await store.counts()
    assert (counts[QUEUED], counts[RUNNING]) == (1, 0)
