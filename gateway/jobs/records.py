"""Statements on generations and events that both sides, callers and workers, are made of; each in a transaction."""

from __future__ import annotations

import time
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from bunraku.errors import NotFound
from bunraku.v1 import gateway_pb2 as pb
from gateway.callers.quotas import charge
from gateway.jobs.job import ENDED, Job
from gateway.jobs.tables import EVENTS, GENERATIONS

COLUMN = GENERATIONS.c
WORK = "work"

Row = sa.Row[tuple[object, ...]]


def events_of(job_id: str) -> str:
    """The signal that a generation has new events."""
    return f"events/{job_id}"


def stop_of(job_id: str) -> str:
    """The signal that whoever works on a generation may have to stop."""
    return f"stop/{job_id}"


def now_us() -> int:
    """The time of this process."""
    return time.time_ns() // 1000


def not_found(job_id: str) -> NotFound:
    return NotFound(f"there is no generations/{job_id}")


async def first(connection: AsyncConnection, condition: sa.ColumnElement[bool], *, lock: bool = False) -> Row | None:
    """A generation that meets the condition; locked until the end of the transaction if asked for."""
    query = sa.select(GENERATIONS).where(condition).limit(1)
    return (await connection.execute(query.with_for_update() if lock else query)).one_or_none()


async def existing(connection: AsyncConnection, job_id: str, owner: str | None = None, *, lock: bool = False) -> Job:
    """A generation that a caller may see. Raises NotFound."""
    row = await first(connection, sa.and_(COLUMN.id == job_id, visible_to(owner)), lock=lock)
    if row is None:
        raise not_found(job_id)
    return Job.of(row)


def visible_to(owner: str | None) -> sa.ColumnElement[bool]:
    """What a caller sees: its own; with None everything."""
    return sa.true() if owner is None else COLUMN.caller == owner


async def change(connection: AsyncConnection, condition: sa.ColumnElement[bool], **values: object) -> list[Row]:
    """Changes the state of the generations that meet the condition, and writes the event of each; gives their rows.

    What those that end have used is charged to their callers.
    """
    update = sa.update(GENERATIONS).where(condition).values(last_sequence=COLUMN.last_sequence + 1, **values)
    rows = list((await connection.execute(update.returning(GENERATIONS))).all())
    for row in rows:
        event = pb.WatchGenerationResponse(generation=Job.of(row).to_proto())
        await insert_events(connection, row.id, row.last_sequence, [event])
        if row.state in ENDED:
            await charge(connection, row.caller, row.gpu_seconds)
    return rows


async def insert_events(
    connection: AsyncConnection, job_id: str, first_sequence: int, events: Sequence[pb.WatchGenerationResponse]
) -> None:
    """Adds events, numbered from `first_sequence` on; their time is now."""
    rows = []
    for sequence, event in enumerate(events, start=first_sequence):
        stored = pb.WatchGenerationResponse()
        stored.CopyFrom(event)
        stored.sequence = sequence
        stored.time.FromMicroseconds(now_us())
        rows.append({"generation_id": job_id, "sequence": sequence, "event": stored.SerializeToString()})
    if rows:
        await connection.execute(sa.insert(EVENTS), rows)
