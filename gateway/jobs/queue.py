"""Where generations stand in the queue and when they will have ended, foretold from what others took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.jobs.costs import Costs
from gateway.jobs.database import Database, to_its_end
from gateway.jobs.job import QUEUED, RUNNING
from gateway.jobs.shares import UNKNOWN_SECONDS, Waiting, in_order, seconds_to_come
from gateway.jobs.tables import GENERATIONS, SCHEDULE, SHARES

_FRESH_S = 1.0
_LEAST_RETRY_S, _LONGEST_RETRY_S = 1.0, 600.0
_COLUMN = GENERATIONS.c


@dataclass(frozen=True)
class Place:
    """Of a generation that waits.

    Attributes:
        position: 1 for the one that is begun next.
        remaining_s: until it will have ended; None where nothing like it was measured.
    """

    position: int
    remaining_s: float | None


class Queue:
    """What waits, looked at no more than once a second however many ask.

    Args:
        parallel: generations that the GPUs work on at the same time.
    """

    def __init__(self, database: Database, costs: Costs, *, parallel: int) -> None:
        self.database = database
        self._costs, self._parallel = costs, parallel
        self._places: Mapping[str, Place] = {}
        self._looked_at = -_FRESH_S
        self._looking = asyncio.Lock()

    async def place(self, job_id: str) -> Place | None:
        """Where a generation stands; None where it does not wait."""
        async with self._looking:
            if time.monotonic() - self._looked_at >= _FRESH_S:
                self._places = await self._look()
                self._looked_at = time.monotonic()
        return self._places.get(job_id)

    async def retry_after_s(self, connection: AsyncConnection) -> float:
        """When a place in a full queue becomes free: what waits is worked off one by one."""
        estimate = sa.func.coalesce(_COLUMN.estimated_seconds, UNKNOWN_SECONDS)
        mean = await connection.scalar(sa.select(sa.func.avg(estimate)).where(_COLUMN.state.in_((QUEUED, RUNNING))))
        return min(_LONGEST_RETRY_S, max(_LEAST_RETRY_S, float(mean or UNKNOWN_SECONDS) / self._parallel))

    @to_its_end
    async def _look(self) -> Mapping[str, Place]:
        query = sa.select(
            _COLUMN.id,
            _COLUMN.number,
            _COLUMN.state,
            _COLUMN.caller,
            _COLUMN.weight,
            _COLUMN.priority,
            _COLUMN.gpu_seconds,
            _COLUMN.estimated_seconds,
        ).where(_COLUMN.state.in_((QUEUED, RUNNING)))
        async with self.database.reading() as connection:
            await self._costs.load(connection)
            rows = (await connection.execute(query)).all()
            virtual = {row.caller: row.virtual_seconds for row in await connection.execute(sa.select(SHARES))}
            present = await connection.scalar(sa.select(SCHEDULE.c.virtual_seconds)) or 0.0
        to_come = {row.id: seconds_to_come(row.estimated_seconds, row.gpu_seconds) for row in rows}
        known = {row.id for row in rows if row.estimated_seconds is not None}
        waiting = [
            Waiting(row.id, row.number, row.caller, row.weight, row.priority, to_come[row.id])
            for row in rows
            if row.state == QUEUED
        ]
        before_s = sum(to_come[row.id] for row in rows if row.state == RUNNING)
        places = {}
        for position, each in enumerate(in_order(waiting, virtual, present), start=1):
            remaining_s = before_s / self._parallel + each.seconds
            places[each.id] = Place(position, remaining_s if each.id in known else None)
            before_s += each.seconds
        return places
