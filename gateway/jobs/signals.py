"""Wakes whoever waits for something to change: in this process at once, in other gateways through PostgreSQL's NOTIFY.

A wake-up says only where to look. One that is lost, as it may be while the database is away, costs the time until the
next poll and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
import sqlalchemy as sa

from bunraku.errors import NotReady
from gateway.jobs.database import Database

_log = logging.getLogger(__name__)
_CHANNEL = "bunraku"
# Each commit that notifies takes one lock of the whole database: those of a moment are sent together
_COLLECTING_S = 0.01
_RECONNECT_S = 0.5


class Signals:
    """Keys that can be waited for; keeps nothing for keys that nobody waits for."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sender = uuid.uuid4().hex[:8]
        self._listeners: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._outgoing: set[str] = set()
        self._has_outgoing = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        """Begins to exchange signals with other gateways, where there can be any."""
        if self._database.postgresql_url and not self._tasks:
            self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._send())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextmanager
    def listen(self, key: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the key is notified."""
        signal = asyncio.Event()
        self._listeners[key].add(signal)
        try:
            yield signal
        finally:
            self._listeners[key].discard(signal)
            if not self._listeners[key]:
                del self._listeners[key]

    def notify(self, *keys: str) -> None:
        """Wakes whoever waits for one of the keys, in every gateway."""
        for key in keys:
            self.wake(key)
        if self._tasks:
            self._outgoing.update(keys)
            self._has_outgoing.set()

    def wake(self, key: str) -> None:
        """Wakes whoever waits for a key in this process."""
        for signal in self._listeners.get(key, ()):
            signal.set()

    async def _receive(self) -> None:
        while True:
            try:
                # a connection of its own: one that listens cannot be lent to others
                url = self._database.postgresql_url
                async with await psycopg.AsyncConnection.connect(url, autocommit=True, connect_timeout=2) as connection:
                    await connection.execute(f"LISTEN {_CHANNEL}")
                    for key in list(self._listeners):
                        self.wake(key)  # what was told while nobody listened
                    async for message in connection.notifies():
                        sender, _, key = message.payload.partition(":")
                        if sender != self._sender:
                            self.wake(key)
            except (psycopg.Error, OSError) as error:
                _log.warning("no wake-ups from other gateways: %s", str(error).strip())
            await asyncio.sleep(_RECONNECT_S)

    async def _send(self) -> None:
        notify = sa.text("SELECT pg_notify(:channel, message) FROM unnest(CAST(:messages AS text[])) AS message")
        while True:
            await self._has_outgoing.wait()
            self._has_outgoing.clear()
            messages = [f"{self._sender}:{key}" for key in self._outgoing]
            self._outgoing.clear()
            with suppress(NotReady):  # polls find it
                async with self._database.writing() as connection:
                    await connection.execute(notify, {"channel": _CHANNEL, "messages": messages})
            await asyncio.sleep(_COLLECTING_S)


async def wait(signal: asyncio.Event, timeout_s: float) -> None:
    """Waits for a signal, or for as long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await signal.wait()
