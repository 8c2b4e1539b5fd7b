"""Generations and their events in a database: what outlives the gateway process.

In go requests that have been checked, events and results; out come `Job`s and the events of each, numbered from 1
without gaps. A generation goes QUEUED -> RUNNING -> SUCCEEDED, FAILED or CANCELLED, back from RUNNING to QUEUED, or from
QUEUED to CANCELLED or FAILED; the statements themselves refuse every other way. Every change of state writes its event
in the same transaction.

Times are microseconds since 1970. Every method raises NotReady when the database is locked, full or away; those that
submit a generation do so within a second.
"""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from bunraku.errors import Busy, Conflict, InvalidRequest, WrongState
from bunraku.v1 import gateway_pb2 as pb
from gateway.callers.identity import EVERYBODY, Caller
from gateway.callers.ownership import was_sent
from gateway.callers.quotas import check_quotas
from gateway.jobs.claims import LEASE_S, Claims
from gateway.jobs.costs import Costs
from gateway.jobs.database import Database, promptly, to_its_end
from gateway.jobs.job import CANCELLED, ENDED, QUEUED, RUNNING, Job, request_key
from gateway.jobs.queue import Place, Queue
from gateway.jobs.records import (
    COLUMN,
    WORK,
    change,
    events_of,
    existing,
    first,
    insert_events,
    now_us,
    stop_of,
    visible_to,
)
from gateway.jobs.signals import Signals
from gateway.jobs.tables import EVENTS, GENERATIONS, SCHEDULE, SHARES
from gateway.jobs.watching import Watching

DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE = 50, 1000
# Deleted in one transaction: others wait no longer than for so many
CLEANED_AT_ONCE = 100

# A queue that was full is not looked at again for so long: who floods the gateway is refused at little cost
_FULL_S = 0.1

_PAGE_TOKEN = re.compile(r"[0-9]{1,18}")
_ASSET_NAME = re.compile(rb"assets/([0-9a-f]{64})")


@dataclass(frozen=True)
class Usage:
    """What a caller uses.

    Attributes:
        active: generations that wait or run.
        gpu_seconds: of those that run, and of those that have ended since the time asked for.
    """

    active: int
    gpu_seconds: float


class JobStore:
    """Generations in a database. `claims` is what workers use of it.

    Args:
        where: SQLite file, made when it does not exist, for one gateway; or `postgresql://...`, for several.
        busy_timeout_s: how long a statement waits for a lock that another process holds before it is NotReady.
        poll_s: how long after they happen changes made by other processes are seen at the latest; those of this one
            are seen at once, and those of other gateways on PostgreSQL nearly so.
        max_queued: generations that may wait; one more is refused as Busy.
        parallel: generations that the GPUs work on at the same time; foretells how long others wait.
        lease_s: how long work of a gateway that does not show any life is left to it.
    """

    def __init__(
        self,
        where: Path | str,
        *,
        busy_timeout_s: float = 5.0,
        poll_s: float = 1.0,
        max_queued: int = 1000,
        parallel: int = 1,
        lease_s: float = LEASE_S,
    ) -> None:
        self.database = Database(where, busy_timeout_s=busy_timeout_s)
        self._max_queued = max_queued
        self._full_until, self._retry_after_s = 0.0, 0.0
        self._signals, self._costs = Signals(self.database), Costs()
        self._queue = Queue(self.database, self._costs, parallel=parallel)
        self._watching = Watching(self.database, self._signals, self._queue, poll_s=poll_s)
        self.claims = Claims(self.database, self._signals, self._costs, poll_s=poll_s, lease_s=lease_s)

    @to_its_end
    async def open(self) -> None:
        """Brings the tables to this version; to be called before anything else."""
        await self.database.migrate()
        async with self.database.reading() as connection:
            await self._costs.load(connection)
        self._signals.open()

    async def close(self) -> None:
        """Waits for the calls under way and closes the database."""
        await self._signals.close()
        await self.database.close()

    # What callers ask for

    @promptly
    async def create(
        self,
        request: pb.CreateGenerationRequest,
        *,
        request_digest: str,
        trace_parent: str = "",
        caller: Caller = EVERYBODY,
        timeout_s: float | None = None,
    ) -> Job:
        """Queues a generation; with a request_id that its caller used before, gives the generation of that time.

        Args:
            request: checked, with the defaults filled in.
            request_digest: digest of the request as it came, which tells a repeated call from another one.
            trace_parent: W3C traceparent of the call, empty where tracing is off.
            caller: whose it is.
            timeout_s: after which it is given up; None: never.

        Raises:
            Conflict: the request_id was used with another digest.
            Busy: too many generations wait, or the caller has or uses as much as it may.
        """
        created_us = now_us()
        values = {
            "request_key": request_key(caller.name, request.request_id),
            "request_digest": request_digest,
            "request": request.SerializeToString(),
            "priority": request.priority,
            "trace_parent": trace_parent,
            "create_time_us": created_us,
            "caller": caller.name,
            "weight": caller.weight,
            "deadline_us": None if timeout_s is None else created_us + int(timeout_s * 1e6),
            "estimated_seconds": self._costs.estimate(request),
        }
        try:
            async with self.database.writing() as connection:
                earlier = await self._admitted(connection, request.request_id, request_digest, caller)
                if earlier is not None:
                    return earlier
                job = await _insert(connection, values)
        except sa.exc.IntegrityError:  # PostgreSQL: another gateway has just created it
            async with self.database.reading() as connection:
                earlier = await _requested(connection, request.request_id, request_digest, caller.name)
            if earlier is None:
                raise
            return earlier
        self._signals.notify(WORK)
        return job

    @promptly
    async def admit(self, request_id: str, request_digest: str, caller: Caller = EVERYBODY) -> Job | None:
        """The generation that an earlier call with this request_id made; None where one is to be created.

        Asked before a call is looked into: a repeated one is answered even when the files that it names are gone, and
        one that comes to a full queue is refused before it has cost anything.

        Raises:
            Conflict: the request_id was used with another digest.
            Busy: too many generations wait, or the caller has or uses as much as it may.
        """
        async with self.database.reading() as connection:
            return await self._admitted(connection, request_id, request_digest, caller)

    @to_its_end
    async def get(self, job_id: str, owner: str | None = None) -> Job:
        """A generation as it stands.

        Args:
            owner: caller who may see its own only; None: one who may see all.

        Raises:
            NotFound: there is none with this id.
        """
        async with self.database.reading() as connection:
            return await existing(connection, job_id, owner)

    async def place(self, job: Job) -> Place | None:
        """Where a generation stands in the queue; None where it does not wait."""
        return await self._queue.place(job.id) if job.state == QUEUED else None

    @to_its_end
    async def list_jobs(
        self,
        page_size: int = 0,
        page_token: str = "",
        states: Collection[pb.GenerationState.ValueType] = (),
        owner: str | None = None,
    ) -> tuple[list[Job], str]:
        """A page of generations, newest first, and the token of the next page, empty after the last.

        Args:
            page_size: 1 to 1000, 0: 50.
            page_token: what the call before gave, empty: the first page.
            states: only generations in one of these, empty: all.
            owner: caller who may see its own only; None: one who may see all.

        Raises:
            InvalidRequest: page_size or page_token is none of these.
        """
        if page_size > MAX_PAGE_SIZE:
            raise InvalidRequest(("page_size", f"must be 0 to {MAX_PAGE_SIZE}, got {page_size}"))
        if page_token and not _PAGE_TOKEN.fullmatch(page_token):
            raise InvalidRequest(("page_token", "is not one that ListGenerations gave"))
        size = page_size or DEFAULT_PAGE_SIZE
        query = sa.select(GENERATIONS).where(visible_to(owner)).order_by(COLUMN.number.desc()).limit(size + 1)
        if page_token:
            query = query.where(COLUMN.number < int(page_token))
        if states:
            query = query.where(COLUMN.state.in_(states))
        async with self.database.reading() as connection:
            rows = (await connection.execute(query)).all()
        token = str(rows[size - 1].number) if len(rows) > size else ""
        return [Job.of(row) for row in rows[:size]], token

    @to_its_end
    async def request_cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Cancels a generation that waits at once, tells the worker of one that runs, leaves one that has ended.

        Raises:
            NotFound: there is none with this id.
        """
        async with self.database.writing() as connection:
            # locked: a worker must not begin it between the look at its state and the change
            job = await existing(connection, job_id, owner, lock=True)
            this = COLUMN.id == job_id
            if job.state == RUNNING:
                await connection.execute(sa.update(GENERATIONS).where(this).values(cancel_requested=True))
            elif job.state == QUEUED:
                await change(connection, this, state=CANCELLED, cancel_requested=True, end_time_us=now_us())
            job = await existing(connection, job_id)
        self._signals.notify(events_of(job_id), stop_of(job_id))
        return job

    @to_its_end
    async def delete(self, job_id: str, owner: str | None = None) -> str | None:
        """Deletes a generation that has ended, with its events.

        Returns:
            id of its video, to be deleted too; None where it has none, or the same file is another generation's or was
            sent by a caller.

        Raises:
            NotFound: there is none with this id.
            WrongState: it has not ended.
        """
        async with self.database.writing() as connection:
            job = await existing(connection, job_id, owner, lock=True)
            if job.state not in ENDED:
                raise WrongState(f"{job.name} has not ended: cancel it first")
            video = await _delete(connection, job_id)
        self._signals.notify(events_of(job_id))
        return video

    @to_its_end
    async def counts(self) -> Mapping[pb.GenerationState.ValueType, int]:
        """Generations in each state; 0 for a state that none is in."""
        query = sa.select(COLUMN.state, sa.func.count()).group_by(COLUMN.state)
        async with self.database.reading() as connection:
            return Counter({row.state: row[1] for row in await connection.execute(query)})

    @to_its_end
    async def usage(self, caller: str, since_us: int) -> Usage:
        """What a caller uses now and has used since a time."""
        active = COLUMN.state.in_((QUEUED, RUNNING))
        counted = sa.select(
            sa.func.count().filter(active),
            sa.func.coalesce(sa.func.sum(COLUMN.gpu_seconds), 0.0),
        ).where(COLUMN.caller == caller, sa.or_(active, COLUMN.end_time_us >= since_us))
        async with self.database.reading() as connection:
            row = (await connection.execute(counted)).one()
        return Usage(row[0], row[1])

    # What watchers read

    def watch(
        self, job_id: str, after_sequence: int, owner: str | None = None
    ) -> AsyncGenerator[pb.WatchGenerationResponse]:
        """Events of a generation after a sequence number: those that were, then new ones, until it ends.

        Raises:
            NotFound: there is none with this id, or it was deleted meanwhile.
        """
        return (
            self._watching.watch(job_id, after_sequence) if owner is None else self._own(job_id, after_sequence, owner)
        )

    async def _own(self, job_id: str, after_sequence: int, owner: str) -> AsyncGenerator[pb.WatchGenerationResponse]:
        await self.get(job_id, owner)
        async with aclosing(self._watching.watch(job_id, after_sequence)) as events:
            async for event in events:
                yield event

    async def events_after(self, job_id: str, sequence: int = 0) -> list[pb.WatchGenerationResponse]:
        """The next events after a sequence number, 100 at most; none where the generation does not exist."""
        return await self._watching.events_after(job_id, sequence)

    # Cleaning

    @to_its_end
    async def delete_old_events(self, before_us: int) -> int:
        """Deletes the events of generations that ended before a time, of so many at once; returns of how many."""
        old = (
            sa.select(COLUMN.id)
            .where(COLUMN.end_time_us < before_us, sa.exists().where(EVENTS.c.generation_id == COLUMN.id))
            .limit(CLEANED_AT_ONCE)
        )
        async with self.database.writing() as connection:
            ids = list(await connection.scalars(old))
            await connection.execute(sa.delete(EVENTS).where(EVENTS.c.generation_id.in_(ids)))
        return len(ids)

    @to_its_end
    async def delete_old(self, before_us: int) -> tuple[int, list[str]]:
        """Deletes generations that ended before a time, so many at once.

        Returns:
            how many, and the ids of their videos that no other generation has, to be deleted too.
        """
        old = sa.select(COLUMN.id).where(COLUMN.end_time_us < before_us).limit(CLEANED_AT_ONCE)
        async with self.database.writing() as connection:
            ids = list(await connection.scalars(old))
            videos = [await _delete(connection, job_id) for job_id in ids]
            # who has been idle for so long starts from the present all the same
            present = sa.select(SCHEDULE.c.virtual_seconds).scalar_subquery()
            await connection.execute(sa.delete(SHARES).where(SHARES.c.virtual_seconds < present))
        return len(ids), [video for video in videos if video is not None]

    @to_its_end
    async def named_assets(self) -> set[str]:
        """Ids of the files that generations name: what they are made from, and their videos."""
        named: set[str] = set()
        page = sa.select(COLUMN.number, COLUMN.request, COLUMN.video_asset_id).order_by(COLUMN.number)
        last = 0
        while True:
            async with self.database.reading() as connection:
                rows = (await connection.execute(page.where(COLUMN.number > last).limit(MAX_PAGE_SIZE))).all()
            if not rows:
                return named
            last = rows[-1].number
            for row in rows:
                # names of files stand in the request as they are; whatever else looks like one is kept as well
                named.update(name.decode() for name in _ASSET_NAME.findall(row.request))
                named.add(row.video_asset_id or "")

    async def _admitted(
        self, connection: AsyncConnection, request_id: str, request_digest: str, caller: Caller
    ) -> Job | None:
        earlier = await _requested(connection, request_id, request_digest, caller.name)
        if earlier is not None:
            return earlier
        if time.monotonic() >= self._full_until:
            waiting = await connection.scalar(sa.select(sa.func.count()).where(COLUMN.state == QUEUED)) or 0
            if waiting < self._max_queued:
                await check_quotas(connection, caller)
                return None
            self._retry_after_s = await self._queue.retry_after_s(connection)
            self._full_until = time.monotonic() + _FULL_S
        text = f"{self._max_queued} generations are waiting, more are not taken on"
        raise Busy(text, retry_after_s=self._retry_after_s)


async def _requested(connection: AsyncConnection, request_id: str, request_digest: str, caller: str) -> Job | None:
    key = request_key(caller, request_id)
    row = None if key is None else await first(connection, COLUMN.request_key == key)
    if row is not None and row.request_digest != request_digest:
        raise Conflict(f"request_id {request_id} was used for another request")
    return None if row is None else Job.of(row)


async def _insert(connection: AsyncConnection, values: Mapping[str, object]) -> Job:
    new = {
        "id": uuid.uuid4().hex,
        "state": QUEUED,
        "cancel_requested": False,
        "attempts": 0,
        "progress": b"",
        "last_sequence": 1,
    }
    statement = sa.insert(GENERATIONS).values({**new, **values}).returning(GENERATIONS)
    job = Job.of((await connection.execute(statement)).one())
    await insert_events(connection, job.id, 1, [pb.WatchGenerationResponse(generation=job.to_proto())])
    return job


async def _delete(connection: AsyncConnection, job_id: str) -> str | None:
    gone = sa.delete(GENERATIONS).where(COLUMN.id == job_id)
    video: str | None = await connection.scalar(gone.returning(COLUMN.video_asset_id))
    if video is None or await first(connection, COLUMN.video_asset_id == video) is not None:
        return None
    return None if await was_sent(connection, video) else video
