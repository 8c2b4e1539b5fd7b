"""Which generation is begun next: by priority, then by fair shares of GPU time over callers, then by age.

Every caller has a virtual time: the seconds of GPU that it was given, divided by its weight. The caller with the least
goes first. A caller that was idle starts from the virtual time of the present and saves nothing up. Work is charged
with an estimate when it is begun and put right when it ends, so that several can be begun before the first has ended.

Source: start-time fair queueing, Goyal, Vin and Cheng 1996.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.jobs.job import QUEUED
from gateway.jobs.tables import GENERATIONS, SCHEDULE, SHARES

# Charged for what nothing is known of; put right when it ends.
UNKNOWN_SECONDS = 10.0
# What is begun again and should have ended already still costs something
_LEAST_SECONDS = 1.0

_COLUMN = GENERATIONS.c


@dataclass(frozen=True)
class Choice:
    """What is begun next.

    Attributes:
        number: of the generation.
        charged_seconds: what it has been charged with in all, once it is begun.
    """

    number: int
    charged_seconds: float


async def choose(connection: AsyncConnection, now_us: sa.ColumnElement[int], above_priority: int) -> Choice | None:
    """Chooses among what waits and charges its caller; None where nothing of a higher priority waits."""
    schedule = sa.select(SCHEDULE.c.virtual_seconds).where(SCHEDULE.c.id == 1).with_for_update()
    present = (await connection.execute(schedule)).scalar_one()
    start = sa.case((SHARES.c.virtual_seconds > present, SHARES.c.virtual_seconds), else_=present)
    query = (
        sa.select(
            _COLUMN.number,
            _COLUMN.caller,
            _COLUMN.weight,
            _COLUMN.gpu_seconds,
            _COLUMN.estimated_seconds,
            start.label("start"),
        )
        .select_from(GENERATIONS.outerjoin(SHARES, SHARES.c.caller == _COLUMN.caller))
        .where(_COLUMN.state == QUEUED, _COLUMN.priority > above_priority)
        .where(sa.or_(_COLUMN.deadline_us.is_(None), _COLUMN.deadline_us > now_us))
        .order_by(_COLUMN.priority.desc(), start, _COLUMN.number)
        .limit(1)
        .with_for_update(of=GENERATIONS, skip_locked=True)  # left out by SQLite, where a writer is alone
    )
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    charge = seconds_to_come(row.estimated_seconds, row.gpu_seconds)
    await connection.execute(sa.update(SCHEDULE).values(virtual_seconds=row.start))
    await _set_virtual(connection, row.caller, row.start + charge / row.weight)
    return Choice(row.number, row.gpu_seconds + charge)


async def settle(connection: AsyncConnection, rows: Iterable[sa.Row[tuple[object, ...]]]) -> None:
    """Puts right what callers were charged for generations whose claims have just ended."""
    for row in rows:
        difference = (row.gpu_seconds - row.charged_seconds) / row.weight
        changed = sa.update(SHARES).where(SHARES.c.caller == row.caller)
        await connection.execute(changed.values(virtual_seconds=SHARES.c.virtual_seconds + difference))


def seconds_to_come(estimated_seconds: float | None, gpu_seconds: float) -> float:
    """What a generation will still take of the GPUs."""
    estimate = UNKNOWN_SECONDS if estimated_seconds is None else estimated_seconds
    return max(_LEAST_SECONDS, estimate - gpu_seconds)


async def _set_virtual(connection: AsyncConnection, caller: str, virtual_seconds: float) -> None:
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    values = {"virtual_seconds": virtual_seconds}
    statement = insert(SHARES).values(caller=caller, **values)
    await connection.execute(statement.on_conflict_do_update(index_elements=["caller"], set_=values))


@dataclass(frozen=True)
class Waiting:
    """A generation that waits, as far as its turn depends on it."""

    id: str
    number: int
    caller: str
    weight: float
    priority: int
    seconds: float


def in_order(waiting: Iterable[Waiting], virtual: Mapping[str, float], present: float) -> list[Waiting]:
    """The order in which `choose` will begin them, if nothing else comes and every one takes what it is thought to.

    Args:
        virtual: virtual time of each caller.
        present: virtual time at which work was begun last.
    """
    ordered: list[Waiting] = []
    times = defaultdict(float, virtual)
    by_priority: defaultdict[int, list[Waiting]] = defaultdict(list)
    for each in sorted(waiting, key=lambda each: each.number):
        by_priority[each.priority].append(each)
    for priority in sorted(by_priority, reverse=True):
        queues: defaultdict[str, deque[Waiting]] = defaultdict(deque)
        for each in by_priority[priority]:
            queues[each.caller].append(each)
        heads = [(max(times[caller], present), queue[0].number, caller) for caller, queue in queues.items()]
        heapq.heapify(heads)
        while heads:
            present, _, caller = heapq.heappop(heads)
            chosen = queues[caller].popleft()
            ordered.append(chosen)
            times[caller] = present + chosen.seconds / chosen.weight
            if queues[caller]:
                heapq.heappush(heads, (times[caller], queues[caller][0].number, caller))
    return ordered
