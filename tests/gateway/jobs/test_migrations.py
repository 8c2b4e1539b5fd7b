"""Databases of earlier versions come up to this one with what is in them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from bunraku.v1 import gateway_pb2 as pb
from gateway.jobs.database import Database
from gateway.jobs.job import QUEUED, SUCCEEDED
from gateway.jobs.store import JobStore
from gateway.jobs.tables import METADATA
from tests.gateway.jobs.jobs import claimed, video
from tests.postgresql import Server

# The statements with which the gateway made its tables before there were migrations
FIRST_SCHEMA = """
CREATE TABLE generations (
    number INTEGER NOT NULL, id VARCHAR(32) NOT NULL, request_id VARCHAR(64), request_digest VARCHAR(64) NOT NULL,
    request BLOB NOT NULL, state SMALLINT NOT NULL, cancel_requested BOOLEAN NOT NULL, priority SMALLINT NOT NULL,
    attempts INTEGER NOT NULL, progress BLOB NOT NULL, error BLOB, video BLOB, video_asset_id VARCHAR(64),
    trace_parent VARCHAR(64) NOT NULL, create_time_us BIGINT NOT NULL, start_time_us BIGINT, end_time_us BIGINT,
    last_sequence BIGINT NOT NULL, PRIMARY KEY (number), UNIQUE (id), UNIQUE (request_id)
);
CREATE INDEX generations_queue ON generations (state, priority, number);
CREATE INDEX ix_generations_video_asset_id ON generations (video_asset_id);
CREATE TABLE events (
    generation_id VARCHAR(32) NOT NULL, sequence BIGINT NOT NULL, event BLOB NOT NULL,
    PRIMARY KEY (generation_id, sequence), FOREIGN KEY(generation_id) REFERENCES generations (id) ON DELETE CASCADE
);
"""
ENDED, WAITING = "e" * 32, "f" * 32


@pytest.fixture
def first_version(tmp_path: Path) -> Path:
    """A database of the first version with a generation that has ended and one that waits."""
    path = tmp_path / "gateway.sqlite"
    request = pb.CreateGenerationRequest(model="tiny", request_id="r-1").SerializeToString()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(FIRST_SCHEMA)
        for number, (job_id, request_id, state) in enumerate(((ENDED, None, SUCCEEDED), (WAITING, "r-1", QUEUED)), 1):
            values = (
                number,
                job_id,
                request_id,
                "d",
                request,
                state,
                0,
                0,
                0,
                b"",
                None,
                None,
                None,
                "",
                5,
                None,
                6,
                2,
            )
            connection.execute(f"INSERT INTO generations VALUES ({','.join('?' * len(values))})", values)
            for sequence in (1, 2):
                event = pb.WatchGenerationResponse(sequence=sequence).SerializeToString()
                connection.execute("INSERT INTO events VALUES (?, ?, ?)", (job_id, sequence, event))
    return path


async def test_what_the_first_version_wrote_is_all_there(first_version: Path) -> None:
    store = JobStore(first_version)
    await store.open()
    for job_id, state in ((ENDED, SUCCEEDED), (WAITING, QUEUED)):
        job = await store.get(job_id)
        assert (job.state, job.caller, job.weight, job.deadline_us, job.gpu_seconds) == (state, "", 1.0, None, 0.0)
        assert [event.sequence for event in await store.events_after(job_id)] == [1, 2]
    assert (await store.admit("r-1", "d")) == await store.get(WAITING)
    claim = await store.claims.next_job()
    assert claim.id == WAITING
    assert (await store.claims.finish(claim, video=video())).state == SUCCEEDED
    await store.close()


async def test_opening_again_changes_nothing(first_version: Path) -> None:
    for _ in range(2):
        store = JobStore(first_version)
        await store.open()
        job = await claimed(store)
        await store.close()
    assert job.number > 2


async def differences(database: Database) -> list[object]:
    def compared(connection: sa.Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": bool(database.postgresql_url)})
        found: list[object] = compare_metadata(context, METADATA)
        return [change for change in found if not _of_another_part(change)]

    await database.migrate()
    async with database.reading() as connection:
        found = await connection.run_sync(compared)
    await database.close()
    return found


def _of_another_part(change: object) -> bool:
    """Tables that other parts of the gateway declare."""
    return isinstance(change, tuple) and change[0] == "remove_table"


async def test_an_old_database_becomes_exactly_what_the_code_declares(first_version: Path) -> None:
    assert await differences(Database(first_version)) == []


async def test_a_new_database_is_exactly_what_the_code_declares(tmp_path: Path) -> None:
    assert await differences(Database(tmp_path / "new.sqlite")) == []


async def test_a_new_postgresql_database_is_exactly_what_the_code_declares(postgresql: Server) -> None:
    postgresql.drop()
    assert await differences(Database(postgresql.url)) == []


async def test_events_still_go_with_their_generation(first_version: Path) -> None:
    store = JobStore(first_version)
    await store.open()
    await store.delete(ENDED)
    assert await store.events_after(ENDED) == []
    assert len(await store.events_after(WAITING)) == 2
    await store.close()
