"""Rows of generations, without a gateway that makes them."""

from __future__ import annotations

import uuid

import sqlalchemy as sa

from gateway.jobs.database import Database
from gateway.jobs.tables import GENERATIONS


async def generation(database: Database, caller: str, state: int, **columns: object) -> None:
    """Adds a generation of a caller."""
    values = {
        "id": uuid.uuid4().hex,
        "request_digest": "",
        "request": b"",
        "state": state,
        "cancel_requested": False,
        "priority": 0,
        "attempts": 1,
        "progress": b"",
        "trace_parent": "",
        "create_time_us": 0,
        "last_sequence": 0,
        "caller": caller,
        **columns,
    }
    async with database.writing() as connection:
        await connection.execute(sa.insert(GENERATIONS).values(values))
