"""What a caller may take: generations at the same time, and seconds of GPU in a day.

Both are checked in the transaction that creates a generation. The GPU seconds of a generation that has ended are kept by
the hour, apart from it, so that deleting it gives nothing back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from bunraku.errors import Busy
from gateway.callers.identity import Caller
from gateway.callers.tables import GPU_USAGE, insert
from gateway.jobs.job import QUEUED, RUNNING
from gateway.jobs.tables import GENERATIONS

_HOUR_S = 3600
_HOURS_PER_DAY = 24
# There is no telling when a generation of the caller's own will end
_ACTIVE_RETRY_S = 10.0


async def check_quotas(connection: AsyncConnection, caller: Caller, now_s: float | None = None) -> None:
    """Checks that a caller may create one more generation.

    Args:
        now_s: seconds since 1970; None: now.

    Raises:
        Busy: it has as many as it may have, or has used up its GPU seconds; says when to come back.
    """
    limits, now_s = caller.limits, now_s or time.time()
    if limits.max_active_generations is None and limits.gpu_seconds_per_day is None:
        return
    if connection.dialect.name == "postgresql":
        # two gateways must not both find one place left; in SQLite a writer is alone
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(caller.name))))
    active, running_s = await _active(connection, caller.name)
    if limits.max_active_generations is not None and active >= limits.max_active_generations:
        text = f"{active} generations of {caller.name} wait or run, more are not taken on"
        raise Busy(text, reason="TOO_MANY_GENERATIONS", retry_after_s=_ACTIVE_RETRY_S)
    if limits.gpu_seconds_per_day is not None:
        used = [*await _by_hour(connection, caller.name, now_s), (_hour(now_s), running_s)]
        _check_gpu_seconds(caller.name, used, limits.gpu_seconds_per_day, now_s)


async def charge(connection: AsyncConnection, caller: str, gpu_seconds: float, now_s: float | None = None) -> None:
    """Adds what a generation of a caller has used; nothing for a caller without a name."""
    if not caller or gpu_seconds <= 0:
        return
    values = {"caller": caller, "hour": _hour(now_s or time.time()), "seconds": gpu_seconds}
    added = insert(connection, GPU_USAGE).values(values)
    total = GPU_USAGE.c.seconds + added.excluded.seconds
    key = [GPU_USAGE.c.caller, GPU_USAGE.c.hour]
    await connection.execute(added.on_conflict_do_update(index_elements=key, set_={"seconds": total}))


async def remove_old_usage(connection: AsyncConnection, now_s: float | None = None) -> None:
    """Removes what no quota counts any longer."""
    await connection.execute(
        sa.delete(GPU_USAGE).where(GPU_USAGE.c.hour <= _hour(now_s or time.time()) - _HOURS_PER_DAY)
    )


async def _active(connection: AsyncConnection, caller: str) -> tuple[int, float]:
    """How many generations of a caller wait or run, and the GPU seconds that they have used so far."""
    columns = GENERATIONS.c
    counted = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(columns.gpu_seconds), 0.0))
    counted = counted.where(columns.caller == caller, columns.state.in_((QUEUED, RUNNING)))
    row = (await connection.execute(counted)).one()
    return row[0], row[1]


async def _by_hour(connection: AsyncConnection, caller: str, now_s: float) -> list[tuple[int, float]]:
    """The hours of the last day, the oldest first, and the GPU seconds of generations that ended in each."""
    query = sa.select(GPU_USAGE.c.hour, GPU_USAGE.c.seconds).where(GPU_USAGE.c.caller == caller)
    query = query.where(GPU_USAGE.c.hour > _hour(now_s) - _HOURS_PER_DAY).order_by(GPU_USAGE.c.hour)
    return [(row.hour, row.seconds) for row in await connection.execute(query)]


def _check_gpu_seconds(caller: str, hours: Sequence[tuple[int, float]], limit_s: float, now_s: float) -> None:
    used_s = sum(seconds for _, seconds in hours)
    if used_s < limit_s:
        return
    forgotten_s = accumulate(seconds for _, seconds in hours)  # the oldest hours go first
    enough = next(hour for (hour, _), gone_s in zip(hours, forgotten_s, strict=True) if used_s - gone_s < limit_s)
    retry_after_s = (enough + _HOURS_PER_DAY) * _HOUR_S - now_s
    text = f"{caller} has used {used_s:.0f} of its {limit_s:.0f} GPU seconds of 24 hours"
    raise Busy(text, reason="GPU_QUOTA_SPENT", retry_after_s=retry_after_s)


def _hour(now_s: float) -> int:
    return int(now_s) // _HOUR_S
