"""No test of the runtime may leave an error behind that asyncio or grpc could only log."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nothing_is_missed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    gc.collect(1)
    records = [record for when in ("setup", "call") for record in caplog.get_records(when)] + caplog.records
    missed = [
        record.getMessage()
        for record in records
        if record.levelno >= logging.ERROR and record.name.split(".")[0] in ("asyncio", "grpc", "opentelemetry")
    ]
    assert missed == []
