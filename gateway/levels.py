"""What the gateway's metrics tell of the database: generations that wait and run."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from bunraku.errors import BunrakuError
from bunraku.v1 import gateway_pb2 as pb
from gateway.jobs.store import JobStore
from runtime import telemetry

_STATES = {"queued": pb.GENERATION_STATE_QUEUED, "running": pb.GENERATION_STATE_RUNNING}


async def publish_levels(store: JobStore, interval_s: float = 5.0) -> None:
    """Keeps the metrics up to date until it is cancelled; while the database is away they stay as they are."""
    while True:
        with suppress(BunrakuError):
            counts = await store.counts()
            for name, state in _STATES.items():
                telemetry.GENERATIONS.put(counts[state], state=name)
        await asyncio.sleep(interval_s)
