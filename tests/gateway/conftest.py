"""Databases for the tests of jobs: an SQLite file, and a real PostgreSQL server where there is one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.jobs import database
from gateway.jobs.database import Database
from tests.postgresql import MISSING, Server, programs


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no database that is away; what is, `test_outages` tests with the real value."""
    monkeypatch.setattr(database, "PROMPT_S", 20.0)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """One server for all tests; what it holds need not survive the machine."""
    if programs() is None:
        pytest.skip(MISSING)
    server = Server({"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"})
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with its tables, to be copied: making them takes longer than most tests."""
    path = tmp_path_factory.mktemp("empty") / "jobs.sqlite"

    async def migrated() -> None:
        opened = Database(path)
        await opened.migrate()
        await opened.close()

    asyncio.run(migrated())
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path, empty_sqlite: Path) -> Path | str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return Path(shutil.copy(empty_sqlite, tmp_path / "jobs.sqlite"))
    server: Server = request.getfixturevalue("postgresql")
    server.empty()
    return server.url
