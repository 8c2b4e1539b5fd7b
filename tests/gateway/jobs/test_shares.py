"""Whose turn it is: priority, fair shares of GPU seconds, age; and the same order foretold."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.jobs.shares import Waiting, in_order
from gateway.jobs.store import JobStore
from tests.gateway.jobs.jobs import created, ended, told


@pytest.fixture
async def store(where: Path | str) -> AsyncIterator[JobStore]:
    store = JobStore(where)
    await store.open()
    yield store
    await store.close()


async def worked_off(store: JobStore, jobs: int, gpu_seconds: dict[str, float]) -> list[str]:
    """The callers of the next jobs, one at a time, when those of a caller take so long."""
    callers = []
    for _ in range(jobs):
        job = await store.claims.claim_next()
        assert job is not None
        await store.claims.report(job, told([], gpu_seconds=gpu_seconds[job.caller]))
        await store.claims.finish(job)
        callers.append(job.caller)
    return callers


async def test_a_caller_with_many_jobs_gets_no_more_than_one_with_few(store: JobStore) -> None:
    for _ in range(10):
        await created(store, caller="heavy")
    for caller in ("light", "lighter"):
        for _ in range(3):
            await created(store, caller=caller)
    callers = await worked_off(store, 9, {"heavy": 5, "light": 5, "lighter": 5})
    assert Counter(callers) == {"heavy": 3, "light": 3, "lighter": 3}


async def test_shares_are_of_seconds_and_not_of_jobs(store: JobStore) -> None:
    for _ in range(12):
        for caller in ("long", "short"):
            await created(store, caller=caller)
    callers = await worked_off(store, 15, {"long": 40, "short": 10})
    assert Counter(callers)["short"] == pytest.approx(4 * Counter(callers)["long"], abs=2)


async def test_a_caller_of_twice_the_weight_gets_twice_the_share(store: JobStore) -> None:
    for _ in range(9):
        await created(store, caller="one", weight=1)
        await created(store, caller="two", weight=2)
    callers = Counter(await worked_off(store, 12, {"one": 10, "two": 10}))
    assert callers == {"one": 4, "two": 8}


async def test_who_was_idle_has_saved_nothing_up(store: JobStore) -> None:
    for _ in range(8):
        await created(store, caller="busy")
    await worked_off(store, 4, {"busy": 100})
    for _ in range(4):
        await created(store, caller="idle")
    callers = await worked_off(store, 4, {"busy": 100, "idle": 100})
    assert Counter(callers) == {"busy": 2, "idle": 2}


async def test_several_that_are_begun_before_any_has_ended_are_shared_too(store: JobStore) -> None:
    for _ in range(5):
        await created(store, caller="heavy")
    for _ in range(2):
        await created(store, caller="light")
    begun = [await store.claims.claim_next() for _ in range(4)]
    assert Counter(job.caller for job in begun if job is not None) == {"heavy": 2, "light": 2}


async def test_priority_goes_before_shares(store: JobStore) -> None:
    await created(store, caller="heavy")
    await ended(store, gpu_seconds=1000)
    await created(store, caller="light")
    urgent = await created(store, caller="heavy", priority=1)
    first = await store.claims.claim_next()
    assert first is not None
    assert first.id == urgent.id


async def test_what_a_job_that_was_put_back_has_used_stays_charged_and_the_rest_is_not(store: JobStore) -> None:
    for _ in range(2):
        await created(store, caller="a")
    await created(store, caller="b")
    job = await store.claims.claim_next()
    assert job is not None
    await store.claims.report(job, told([], gpu_seconds=3))
    back = await store.claims.give_back(job)
    assert back.gpu_seconds == 3
    # a has used 3 seconds, b none
    nexts = [await store.claims.claim_next() for _ in range(2)]
    assert [job.caller for job in nexts if job is not None] == ["b", "a"]


async def test_seconds_of_later_attempts_are_added(store: JobStore) -> None:
    await created(store)
    for _ in range(2):
        job = await store.claims.claim_next()
        assert job is not None
        await store.claims.report(job, told([], gpu_seconds=2))
        await store.claims.report(job, told([], gpu_seconds=5))
        back = await store.claims.give_back(job)
    assert back.gpu_seconds == 10


# The order foretold


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.sampled_from([1.0, 2.0]), st.integers(1, 30)),
        max_size=12,
    )
)
def test_the_order_foretold_is_a_reordering_by_priority_and_age_within_a_caller(
    jobs: list[tuple[str, int, float, int]],
) -> None:
    waiting = [Waiting(str(n), n, caller, w, p, float(s)) for n, (caller, p, w, s) in enumerate(jobs)]
    ordered = in_order(waiting, {"a": 3.0}, 1.0)
    assert sorted(each.number for each in ordered) == list(range(len(jobs)))
    assert [each.priority for each in ordered] == sorted((each.priority for each in waiting), reverse=True)
    for caller in "abc":
        for priority in range(3):
            own = [each.number for each in ordered if (each.caller, each.priority) == (caller, priority)]
            assert own == sorted(own)


async def test_the_order_foretold_is_the_order_in_which_they_are_begun(store: JobStore) -> None:
    await created(store, caller="a")
    await ended(store, gpu_seconds=15)
    for caller, priority, weight in [("a", 0, 1), ("b", 0, 1), ("a", 0, 1), ("b", 0, 1), ("c", 1, 1), ("d", 0, 3)] * 2:
        await created(store, caller=caller, priority=priority, weight=weight)
    places = {job.id: await store.place(job) for job in (await store.list_jobs())[0]}
    foretold = sorted((place.position, job_id) for job_id, place in places.items() if place is not None)
    begun = []
    while (job := await store.claims.claim_next()) is not None:
        begun.append(job.id)
    assert [job_id for _, job_id in foretold] == begun
    assert [position for position, _ in foretold] == list(range(1, 13))
