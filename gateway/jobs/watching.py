"""Events of generations to whoever watches: the database is read once for all who watch the same generation.

A `_Feed` per watched generation keeps its newest events in memory; a watcher that is further behind reads those from
the database, at its own pace. The database may go away meanwhile: watchers wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from bunraku.errors import BunrakuError, NotReady
from bunraku.v1 import gateway_pb2 as pb
from gateway.jobs.database import Database, to_its_end
from gateway.jobs.job import ENDED, QUEUED
from gateway.jobs.queue import Place, Queue
from gateway.jobs.records import COLUMN, events_of, not_found
from gateway.jobs.signals import Signals, wait
from gateway.jobs.tables import EVENTS

# Events may hold previews: a watcher that is far behind reads them in portions.
EVENTS_PER_READ = 100
_EVENTS_KEPT = 50
# How often a watcher of a generation that waits is told where it stands, and from when on
_QUEUE_INTERVAL_S = 1.0


class _Feed:
    """The newest events of one generation."""

    def __init__(self) -> None:
        self.watchers = 0
        self.state: int = pb.GENERATION_STATE_UNSPECIFIED
        self.last_sequence = 0
        self.failure: BunrakuError | None = None
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._events: list[pb.WatchGenerationResponse] = []

    def take(self, state: int, events: Sequence[pb.WatchGenerationResponse]) -> None:
        """Adds events and wakes the watchers."""
        self.state = state
        self._events += events
        if len(self._events) > 2 * _EVENTS_KEPT:
            del self._events[:-_EVENTS_KEPT]
        if events:
            self.last_sequence = events[-1].sequence
        self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def after(self, sequence: int) -> list[pb.WatchGenerationResponse] | None:
        """The events after a sequence number; None where some of them are in the database only."""
        if sequence >= self.last_sequence:
            return []
        if not self._events or self._events[0].sequence > sequence + 1:
            return None
        return self._events[sequence + 1 - self._events[0].sequence :]  # they are numbered without gaps


class Watching:
    """Gives events as they come."""

    def __init__(self, database: Database, signals: Signals, queue: Queue, *, poll_s: float) -> None:
        self.database = database
        self._signals, self._queue, self._poll_s = signals, queue, poll_s
        self._feeds: dict[str, _Feed] = {}

    async def watch(self, job_id: str, after_sequence: int) -> AsyncGenerator[pb.WatchGenerationResponse]:
        """Events of a generation after a sequence number: those that were, then new ones, until it ends.

        While it waits it is told where it stands in the queue, in events that carry the number of the one before.

        Raises:
            NotFound: there is none with this id, or it was deleted meanwhile.
            NotReady: the database is away at the beginning.
        """
        feed = self._joined(job_id)
        sequence, told = after_sequence, _Told()
        try:
            while True:
                changed, ended = feed.changed, feed.state in ENDED  # before reading: what comes after sets it again
                events = feed.after(sequence)
                if events is None:
                    events = await self.events_after(job_id, sequence)
                for event in events:
                    yield event
                    sequence = event.sequence
                if events:
                    continue
                if ended:
                    return
                if feed.failure is not None:
                    raise feed.failure
                if feed.state == QUEUED and (place := await self._news(job_id, told)) is not None:
                    yield _queue_event(place, sequence)
                await wait(changed, _QUEUE_INTERVAL_S if feed.state == QUEUED else 3600.0)
        finally:
            await self._left(job_id, feed)

    @to_its_end
    async def events_after(self, job_id: str, sequence: int = 0) -> list[pb.WatchGenerationResponse]:
        """The next events after a sequence number, 100 at most; none where the generation does not exist."""
        async with self.database.reading() as connection:
            return await _events(connection, job_id, sequence)

    def _joined(self, job_id: str) -> _Feed:
        feed = self._feeds.get(job_id)
        if feed is None:
            feed = self._feeds[job_id] = _Feed()
            feed.task = asyncio.create_task(self._read(job_id, feed))
        feed.watchers += 1
        return feed

    async def _left(self, job_id: str, feed: _Feed) -> None:
        feed.watchers -= 1
        if feed.watchers == 0 and feed.task is not None:
            if self._feeds.get(job_id) is feed:
                del self._feeds[job_id]
            feed.task.cancel()
            with suppress(asyncio.CancelledError):
                await feed.task

    async def _read(self, job_id: str, feed: _Feed) -> None:
        """Keeps a feed up to date until its generation ends."""
        with self._signals.listen(events_of(job_id)) as signal:
            while feed.state not in ENDED:
                signal.clear()  # before reading: what comes after is signalled again
                try:
                    await self._catch_up(job_id, feed)
                except BunrakuError as error:
                    if not (isinstance(error, NotReady) and feed.last_sequence):
                        feed.failure = error
                        self._feeds.pop(job_id, None)  # who comes next begins anew
                        feed.wake()
                        return
                if feed.state not in ENDED:
                    await wait(signal, self._poll_s)

    async def _catch_up(self, job_id: str, feed: _Feed) -> None:
        """Reads what is new, in portions; of a long record that nobody has read yet only the end."""
        more = True
        while more:
            state, last_sequence, events = await self._news_of(job_id, feed.last_sequence or None)
            more = bool(events) and events[-1].sequence < last_sequence
            feed.take(feed.state if more else state, events)
            if not more:  # also when the events of one that ended long ago are gone
                feed.last_sequence = max(feed.last_sequence, last_sequence)

    @to_its_end
    async def _news_of(
        self, job_id: str, after_sequence: int | None
    ) -> tuple[int, int, list[pb.WatchGenerationResponse]]:
        """State, number of the last event, and the events after a sequence number; None: the last ones."""
        query = sa.select(COLUMN.state, COLUMN.last_sequence).where(COLUMN.id == job_id)
        async with self.database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
            if row is None:
                raise not_found(job_id)
            if after_sequence is None:
                after_sequence = max(0, row.last_sequence - _EVENTS_KEPT)
            if after_sequence >= row.last_sequence:
                return row.state, row.last_sequence, []
            return row.state, row.last_sequence, await _events(connection, job_id, after_sequence)

    async def _news(self, job_id: str, told: _Told) -> Place | None:
        """Where a generation that waits stands now, if that is new."""
        if not told.due():
            return None
        with suppress(NotReady):
            return told.new(await self._queue.place(job_id))
        return None


class _Told:
    """What a watcher was told about the queue."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _QUEUE_INTERVAL_S / 2  # what is begun at once never waits
        self._position = 0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def new(self, place: Place | None) -> Place | None:
        """The place, if its position is not the one that was told last."""
        self._next = time.monotonic() + _QUEUE_INTERVAL_S
        if place is None or place.position == self._position:
            return None
        self._position = place.position
        return place


async def _events(connection: AsyncConnection, job_id: str, sequence: int) -> list[pb.WatchGenerationResponse]:
    query = (
        sa.select(EVENTS.c.event)
        .where(EVENTS.c.generation_id == job_id, EVENTS.c.sequence > sequence)
        .order_by(EVENTS.c.sequence)
        .limit(EVENTS_PER_READ)
    )
    return [pb.WatchGenerationResponse.FromString(event) for event in await connection.scalars(query)]


def _queue_event(place: Place, sequence: int) -> pb.WatchGenerationResponse:
    event = pb.WatchGenerationResponse(sequence=sequence, queue=pb.QueuePlace(position=place.position))
    event.time.GetCurrentTime()
    if place.remaining_s is not None:
        event.queue.remaining.FromMilliseconds(round(place.remaining_s * 1000))
    return event
