"""Databases of both kinds, with their tables, for stores of callers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.jobs.database import Database


@pytest.fixture
async def database(where: Path | str) -> AsyncIterator[Database]:
    kept = Database(where)
    await kept.migrate()
    yield kept
    await kept.close()
