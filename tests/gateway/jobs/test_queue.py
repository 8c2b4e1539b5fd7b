"""Admission and what is foretold: measured costs, places in the queue, when to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from bunraku.errors import Busy
from gateway.jobs.costs import Cost
from gateway.jobs.store import JobStore
from tests.gateway.jobs.jobs import animation, claimed, created, video


@pytest.fixture
async def store(where: Path | str) -> AsyncIterator[JobStore]:
    store = JobStore(where, max_queued=3, parallel=2)
    await store.open()
    yield store
    await store.close()


async def measured(store: JobStore, step_seconds: float = 2.0, other_seconds: float = 4.0) -> None:
    """One of 10 steps has ended that took so long."""
    await store.claims.finish(await claimed(store), video=video(), cost=Cost(step_seconds, other_seconds))


async def test_nothing_is_foretold_of_a_model_that_was_never_measured(store: JobStore) -> None:
    job = await created(store)
    assert job.estimated_seconds is None
    place = await store.place(job)
    assert place is not None
    assert (place.position, place.remaining_s) == (1, None)


async def test_the_same_again_is_foretold_as_measured(store: JobStore) -> None:
    await measured(store)
    assert (await created(store)).estimated_seconds == pytest.approx(10 * 2 + 4)


async def test_more_steps_and_more_pixels_take_longer_in_proportion(store: JobStore) -> None:
    await measured(store)
    more_steps = await store.create(animation(steps=20), request_digest="d")
    more_pixels = await store.create(animation(side=128), request_digest="d")
    assert more_steps.estimated_seconds == pytest.approx(20 * 2 + 4)
    assert more_pixels.estimated_seconds == pytest.approx(4 * (10 * 2 + 4))


async def test_steps_of_which_less_is_computed_are_measured_apart(store: JobStore) -> None:
    cached, half = animation(), animation()
    cached.sampling.step_cache, cached.sampling.step_cache_speedup = "mag", 2.0
    half.sampling.guidance_end = 0.5
    for request, step_seconds in ((animation(), 4.0), (cached, 2.0), (half, 3.0)):
        await store.create(request, request_digest="d")
        await store.claims.finish(await store.claims.next_job(), video=video(), cost=Cost(step_seconds, 0.0))
    for request, step_seconds in ((animation(), 4.0), (cached, 2.0), (half, 3.0)):
        job = await store.create(request, request_digest="d")
        assert job.estimated_seconds == pytest.approx(10 * step_seconds)


async def test_measurements_are_averaged_and_the_newest_counts_most(store: JobStore) -> None:
    await measured(store, 2.0, 0.0)
    await measured(store, 4.0, 0.0)
    assert (await created(store)).estimated_seconds == pytest.approx(10 * (2.0 + 0.3 * 2.0))


async def test_measurements_survive_a_restart(where: Path | str, store: JobStore) -> None:
    await measured(store)
    again = JobStore(where)
    await again.open()
    assert (await created(again)).estimated_seconds == pytest.approx(24)
    await again.close()


async def test_what_waits_is_told_its_place_and_time(store: JobStore) -> None:
    await measured(store)
    running = await claimed(store)
    jobs = [await created(store) for _ in range(3)]
    places = [await store.place(job) for job in jobs]
    assert [place.position for place in places if place] == [1, 2, 3]
    # two at a time: 24 s of the one that runs and of those before it are shared by two
    assert [place.remaining_s for place in places if place] == pytest.approx([24 / 2 + 24, 48 / 2 + 24, 72 / 2 + 24])
    assert await store.place(running) is None


async def test_a_full_queue_says_when_a_place_becomes_free(store: JobStore) -> None:
    await measured(store)
    for _ in range(3):
        await created(store)
    for refused in (created(store), store.admit("", "d")):
        with pytest.raises(Busy) as raised:
            await refused
        assert raised.value.retry_after_s == pytest.approx(24 / 2)


async def test_a_full_queue_answers_a_repeated_call(store: JobStore) -> None:
    first = await created(store, "r-1")
    for _ in range(2):
        await created(store)
    assert await store.admit("r-1", "d") == first
    assert await created(store, "r-1") == first


async def test_a_watcher_is_told_its_place_while_it_waits_and_again_when_it_moves_up(store: JobStore) -> None:
    first, second = [await created(store) for _ in range(2)]
    async with asyncio.timeout(8), aclosing(store.watch(second.id, 0)) as events:
        queued, told = await anext(events), await anext(events)
        assert (queued.sequence, queued.WhichOneof("event")) == (1, "generation")
        assert (told.sequence, told.queue.position) == (1, 2)  # it is no event of the record
        assert not told.queue.HasField("remaining")
        await store.request_cancel(first.id)
        moved = await anext(events)
        assert (moved.sequence, moved.queue.position) == (1, 1)
        await store.request_cancel(second.id)
        ended = await anext(events)
        assert (ended.sequence, ended.WhichOneof("event")) == (2, "generation")


async def test_the_same_request_id_of_two_callers_makes_two_generations(store: JobStore) -> None:
    mine, theirs = await created(store, "r-1", caller="me"), await created(store, "r-1", caller="them")
    assert mine.id != theirs.id
    assert (await created(store, "r-1", caller="me")).id == mine.id
