"""What a caller may take at the same time and in a day."""

from __future__ import annotations

import pytest

from bunraku.errors import Busy
from gateway.callers.identity import Caller, CallerLimits, Scope
from gateway.callers.quotas import charge, check_quotas, remove_old_usage
from gateway.jobs.database import Database
from gateway.jobs.job import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED
from tests.gateway.callers.rows import generation

HOUR_S = 3600
NOON_S = 1_700_000_000 // HOUR_S * HOUR_S + 1800.0  # half past some hour


def caller(**limits: float) -> Caller:
    return Caller("studio", frozenset(Scope), limits=CallerLimits(**limits))  # type: ignore[arg-type]


async def used(database: Database, *, hours_ago: float, gpu_seconds: float, name: str = "studio") -> None:
    async with database.writing() as connection:
        await charge(connection, name, gpu_seconds, NOON_S - hours_ago * HOUR_S)


async def check(database: Database, limited: Caller) -> None:
    async with database.writing() as connection:
        await check_quotas(connection, limited, NOON_S)


async def test_without_limits_nothing_is_refused(database: Database) -> None:
    await used(database, hours_ago=0, gpu_seconds=1e9)
    await generation(database, "studio", QUEUED)
    await check(database, caller())


async def test_one_more_than_the_active_generations_is_refused(database: Database) -> None:
    await generation(database, "studio", QUEUED)
    for name, state in (("rival", QUEUED), ("studio", SUCCEEDED), ("studio", FAILED), ("studio", CANCELLED)):
        await generation(database, name, state)
    await check(database, caller(max_active_generations=2))
    await generation(database, "studio", RUNNING)
    with pytest.raises(Busy) as raised:
        await check(database, caller(max_active_generations=2))
    assert raised.value.reason == "TOO_MANY_GENERATIONS"
    assert raised.value.retry_after_s


async def test_gpu_seconds_add_up_until_they_are_spent(database: Database) -> None:
    limited = caller(gpu_seconds_per_day=100.0)
    for _ in range(3):
        await used(database, hours_ago=0, gpu_seconds=33.0)
    await check(database, limited)
    await used(database, hours_ago=0, gpu_seconds=1.0)
    with pytest.raises(Busy) as raised:
        await check(database, limited)
    assert raised.value.reason == "GPU_QUOTA_SPENT"
    assert "100 of its 100 GPU seconds" in raised.value.message


async def test_what_runs_counts_with_what_it_has_used_so_far(database: Database) -> None:
    await used(database, hours_ago=1, gpu_seconds=60)
    await generation(database, "studio", SUCCEEDED, gpu_seconds=500.0)  # counted when it ended
    await generation(database, "studio", RUNNING, gpu_seconds=30.0)
    await check(database, caller(gpu_seconds_per_day=100.0))
    await generation(database, "studio", RUNNING, gpu_seconds=10.0)
    with pytest.raises(Busy) as raised:
        await check(database, caller(gpu_seconds_per_day=100.0))
    assert raised.value.retry_after_s == 23 * HOUR_S - 1800  # when the 60 are forgotten


async def test_what_was_used_a_day_ago_counts_no_longer(database: Database) -> None:
    await used(database, hours_ago=24, gpu_seconds=500)
    await check(database, caller(gpu_seconds_per_day=100.0))
    await used(database, hours_ago=23, gpu_seconds=100)
    with pytest.raises(Busy):
        await check(database, caller(gpu_seconds_per_day=100.0))


async def test_the_wait_lasts_until_enough_hours_are_forgotten(database: Database) -> None:
    for hours_ago, gpu_seconds in ((23, 10), (20, 60), (1, 80)):
        await used(database, hours_ago=hours_ago, gpu_seconds=gpu_seconds)
    for limit, hours in ((145.0, 1), (140.0, 4), (100.0, 4), (50.0, 23)):
        with pytest.raises(Busy) as raised:
            await check(database, caller(gpu_seconds_per_day=limit))
        assert raised.value.retry_after_s == hours * HOUR_S - 1800  # at the end of that hour


async def test_callers_are_counted_apart(database: Database) -> None:
    await used(database, hours_ago=0, gpu_seconds=500, name="rival")
    await used(database, hours_ago=0, gpu_seconds=500, name="")  # keys were off
    await check(database, caller(gpu_seconds_per_day=1.0))


async def test_old_usage_is_removed_and_what_counts_is_kept(database: Database) -> None:
    await used(database, hours_ago=24, gpu_seconds=500)
    await used(database, hours_ago=23, gpu_seconds=100)
    async with database.writing() as connection:
        await remove_old_usage(connection, NOON_S)
        rows = (await connection.exec_driver_sql("SELECT seconds FROM gpu_usage")).all()
    assert [row[0] for row in rows] == [100]
