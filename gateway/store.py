"""Generations and their events in a database: what outlives the gateway process.

In go requests that have been checked, events and results; out come `Job`s and the events of each, numbered from 1
without gaps. A generation goes QUEUED -> RUNNING -> SUCCEEDED, FAILED or CANCELLED, or from QUEUED to CANCELLED; the
statements themselves refuse every other way, so a worker that was left behind can change nothing. Every change of
state writes its event in the same transaction.

Times are microseconds since 1970. Every method raises NotReady when the database is locked, full or away.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from bunraku.errors import Busy, Conflict, InvalidRequest, NotFound, NotReady, WrongState
from bunraku.v1 import gateway_pb2 as pb

QUEUED, RUNNING = pb.GENERATION_STATE_QUEUED, pb.GENERATION_STATE_RUNNING
SUCCEEDED, FAILED = pb.GENERATION_STATE_SUCCEEDED, pb.GENERATION_STATE_FAILED
CANCELLED = pb.GENERATION_STATE_CANCELLED
ENDED = (SUCCEEDED, FAILED, CANCELLED)

DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE = 50, 1000
# Events may hold previews: a watcher that is far behind reads them in portions.
EVENTS_PER_READ = 100

_GENERATION_NAME = re.compile(r"generations/([0-9a-f]{32})")
_PAGE_TOKEN = re.compile(r"[0-9]{1,18}")

_METADATA = sa.MetaData()

_GENERATIONS = sa.Table(
    "generations",
    _METADATA,
    # The order of creation, which page tokens hold too.
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    sa.Column("request_id", sa.String(64), unique=True),
    sa.Column("request_digest", sa.String(64), nullable=False),
    sa.Column("request", sa.LargeBinary, nullable=False),  # pb.CreateGenerationRequest
    sa.Column("state", sa.SmallInteger, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("progress", sa.LargeBinary, nullable=False),  # pb.GenerationProgress
    sa.Column("error", sa.LargeBinary),  # pb.GenerationError
    sa.Column("video", sa.LargeBinary),  # pb.Asset
    sa.Column("video_asset_id", sa.String(64), index=True),
    sa.Column("trace_parent", sa.String(64), nullable=False),
    sa.Column("create_time_us", sa.BigInteger, nullable=False),
    sa.Column("start_time_us", sa.BigInteger),
    sa.Column("end_time_us", sa.BigInteger),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    sa.Index("generations_queue", "state", "priority", "number"),
)

_EVENTS = sa.Table(
    "events",
    _METADATA,
    sa.Column("generation_id", sa.ForeignKey(_GENERATIONS.c.id, ondelete="CASCADE"), primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("event", sa.LargeBinary, nullable=False),  # pb.WatchGenerationResponse
)

_COLUMN = _GENERATIONS.c


@dataclass(frozen=True)
class Job:
    """A generation as it was when it was read.

    Attributes:
        request: as checked, with the defaults filled in.
        cancel_requested: the caller wants it stopped; it ends CANCELLED whatever the worker reports.
        attempts: times that work was begun. Together with the id it is the worker's claim: once another attempt has
            begun, writes of the earlier one are refused.
        trace_parent: W3C traceparent of the call that created it, empty where tracing is off.
        start_time_us: when work began first, None before.
        end_time_us: when it ended, None before.
    """

    id: str
    request: pb.CreateGenerationRequest
    state: pb.GenerationState.ValueType
    cancel_requested: bool
    attempts: int
    progress: pb.GenerationProgress
    error: pb.GenerationError | None
    video: pb.Asset | None
    trace_parent: str
    create_time_us: int
    start_time_us: int | None
    end_time_us: int | None

    @property
    def name(self) -> str:
        """`generations/{id}`."""
        return f"generations/{self.id}"

    def to_proto(self) -> pb.Generation:
        """The generation as callers see it."""
        generation = pb.Generation(
            name=self.name,
            request=self.request,
            state=self.state,
            progress=self.progress,
            error=self.error,
            video=self.video,
            attempts=self.attempts,
            trace_id=self.trace_parent.split("-")[1] if self.trace_parent else "",
        )
        generation.create_time.FromMicroseconds(self.create_time_us)
        if self.start_time_us is not None:
            generation.start_time.FromMicroseconds(self.start_time_us)
        if self.end_time_us is not None:
            generation.end_time.FromMicroseconds(self.end_time_us)
        return generation


def generation_id(name: str) -> str:
    """The id in `generations/{id}`.

    Raises:
        InvalidRequest: the name has another form.
    """
    match = _GENERATION_NAME.fullmatch(name)
    if match is None:
        raise InvalidRequest(("name", f"must be generations/ and 32 hexadecimal digits, got {name[:100]!r}"))
    return match[1]


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _to_its_end(
    method: Callable[Concatenate[JobStore, Parameters], Coroutine[object, object, Result]],
) -> Callable[Concatenate[JobStore, Parameters], Coroutine[object, object, Result]]:
    """Lets a method go on to its end when its caller is cancelled, as it is whenever a client hangs up.

    A connection that is dropped in the middle of a transaction would keep the database locked.
    """

    @wraps(method)
    async def call(store: JobStore, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        task = asyncio.create_task(method(store, *args, **kwargs))
        store._calls.add(task)
        task.add_done_callback(store._calls.discard)
        return await asyncio.shield(task)

    return call


class JobStore:
    """Generations in an SQLite file, which several processes may have open.

    Methods that a worker calls (`report`, `finish`) take the job that `claim_next` gave it and
    raise WrongState once that claim is over.

    Args:
        path: the file; made when it does not exist.
        busy_timeout_s: how long a statement waits for a lock that another process holds before it is NotReady.
        poll_s: how long after they happen changes made by other processes are seen at the latest; those of this one
            are seen at once.
        max_queued: generations that may wait; one more is refused as Busy.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = 5.0, poll_s: float = 1.0, max_queued: int = 1000) -> None:
        # One connection writes: writers queue in this process, in order, instead of in SQLite's lock, which is not
        # fair. BEGIN IMMEDIATE takes the lock up front; a transaction that reads first and then writes cannot wait.
        self._writer = _engine(path, "BEGIN IMMEDIATE", connections=1, timeout_s=busy_timeout_s)
        self._reader = _engine(path, "BEGIN", connections=4, timeout_s=busy_timeout_s)
        self._poll_s, self._max_queued = poll_s, max_queued
        self._signals = _Signals()
        self._calls: set[asyncio.Task[object]] = set()

    @_to_its_end
    async def open(self) -> None:
        """Creates the tables that are missing; to be called before anything else."""
        async with _transaction(self._writer) as connection:
            await connection.run_sync(_METADATA.create_all)

    async def close(self) -> None:
        """Waits for the calls under way and closes the database."""
        if self._calls:
            await asyncio.wait(self._calls)
        await self._reader.dispose()
        await self._writer.dispose()

    # What callers ask for

    @_to_its_end
    async def create(self, request: pb.CreateGenerationRequest, *, request_digest: str, trace_parent: str = "") -> Job:
        """Queues a generation; with a request_id that was used before, gives the generation of that time.

        Args:
            request: checked, with the defaults filled in.
            request_digest: digest of the request as it came, which tells a repeated call from another one.
            trace_parent: W3C traceparent of the call, empty where tracing is off.

        Raises:
            Conflict: the request_id was used with another digest.
            Busy: too many generations wait.
        """
        async with _transaction(self._writer) as connection:
            earlier = await _requested(connection, request.request_id, request_digest)
            if earlier is not None:
                return earlier
            waiting = await connection.scalar(sa.select(sa.func.count()).where(_COLUMN.state == QUEUED))
            if waiting is not None and waiting >= self._max_queued:
                raise Busy(f"{waiting} generations are waiting, more are not taken on", retry_after_s=30)
            job = await _insert(connection, request, request_digest, trace_parent)
        self._signals.notify(_WORK)
        return job

    @_to_its_end
    async def find(self, request_id: str, request_digest: str) -> Job | None:
        """The generation that an earlier call with this request_id made; None where there is none, or no request_id.

        Asked before a repeated call is looked into, it is answered even when the files that it names are gone.

        Raises:
            Conflict: the request_id was used with another digest.
        """
        async with _transaction(self._reader) as connection:
            return await _requested(connection, request_id, request_digest)

    @_to_its_end
    async def get(self, job_id: str) -> Job:
        """A generation as it stands.

        Raises:
            NotFound: there is none with this id.
        """
        async with _transaction(self._reader) as connection:
            return await _existing(connection, job_id)

    @_to_its_end
    async def list_jobs(
        self, page_size: int = 0, page_token: str = "", states: Collection[pb.GenerationState.ValueType] = ()
    ) -> tuple[list[Job], str]:
        """A page of generations, newest first, and the token of the next page, empty after the last.

        Args:
            page_size: 1 to 1000, 0: 50.
            page_token: what the call before gave, empty: the first page.
            states: only generations in one of these, empty: all.

        Raises:
            InvalidRequest: page_size or page_token is none of these.
        """
        if page_size > MAX_PAGE_SIZE:
            raise InvalidRequest(("page_size", f"must be 0 to {MAX_PAGE_SIZE}, got {page_size}"))
        if page_token and not _PAGE_TOKEN.fullmatch(page_token):
            raise InvalidRequest(("page_token", "is not one that ListGenerations gave"))
        size = page_size or DEFAULT_PAGE_SIZE
        query = sa.select(_GENERATIONS).order_by(_COLUMN.number.desc()).limit(size + 1)
        if page_token:
            query = query.where(_COLUMN.number < int(page_token))
        if states:
            query = query.where(_COLUMN.state.in_(states))
        async with _transaction(self._reader) as connection:
            rows = (await connection.execute(query)).all()
        token = str(rows[size - 1].number) if len(rows) > size else ""
        return [_job(row) for row in rows[:size]], token

    @_to_its_end
    async def request_cancel(self, job_id: str) -> Job:
        """Cancels a generation that waits at once, tells the worker of one that runs, leaves one that has ended.

        Raises:
            NotFound: there is none with this id.
        """
        async with _transaction(self._writer) as connection:
            asked = sa.update(_GENERATIONS).where(_COLUMN.id == job_id, _COLUMN.state == RUNNING)
            await connection.execute(asked.values(cancel_requested=True))
            await _change(
                connection,
                sa.and_(_COLUMN.id == job_id, _COLUMN.state == QUEUED),
                state=CANCELLED,
                cancel_requested=True,
                end_time_us=_now_us(),
            )
            job = await _existing(connection, job_id)
        self._signals.notify(_events_of(job_id))
        self._signals.notify(_cancel_of(job_id))
        return job

    @_to_its_end
    async def delete(self, job_id: str) -> str | None:
        """Deletes a generation that has ended, with its events.

        Returns:
            id of its video, to be deleted too; None where it has none or another generation has the same one.

        Raises:
            NotFound: there is none with this id.
            WrongState: it has not ended.
        """
        async with _transaction(self._writer) as connection:
            job = await _existing(connection, job_id)
            if job.state not in ENDED:
                raise WrongState(f"{job.name} has not ended: cancel it first")
            gone = sa.delete(_GENERATIONS).where(_COLUMN.id == job_id)
            video: str | None = await connection.scalar(gone.returning(_COLUMN.video_asset_id))
            shared = await _first(connection, _COLUMN.video_asset_id == video)
        self._signals.notify(_events_of(job_id))
        return video if shared is None else None

    @_to_its_end
    async def counts(self) -> Mapping[pb.GenerationState.ValueType, int]:
        """Generations in each state; 0 for a state that none is in."""
        query = sa.select(_COLUMN.state, sa.func.count()).group_by(_COLUMN.state)
        async with _transaction(self._reader) as connection:
            return Counter({row.state: row[1] for row in await connection.execute(query)})

    # What watchers read

    @_to_its_end
    async def events_after(self, job_id: str, sequence: int = 0) -> list[pb.WatchGenerationResponse]:
        """The next events after a sequence number, 100 at most; none where the generation does not exist."""
        async with _transaction(self._reader) as connection:
            return await _events(connection, job_id, sequence)

    async def watch(self, job_id: str, after_sequence: int) -> AsyncGenerator[pb.WatchGenerationResponse]:
        """Events of a generation after a sequence number: those that were, then new ones, until it ends.

        Raises:
            NotFound: there is none with this id, or it was deleted meanwhile.
        """
        sequence = after_sequence
        with self._signals.listen(_events_of(job_id)) as signal:
            while True:
                signal.clear()  # before reading: what comes after is signalled again
                state, events = await self._state_and_events(job_id, sequence)
                for event in events:
                    yield event
                    sequence = event.sequence
                if len(events) == EVENTS_PER_READ:
                    continue
                if state in ENDED:
                    return
                await _wait(signal, self._poll_s)

    @_to_its_end
    async def _state_and_events(self, job_id: str, sequence: int) -> tuple[int, list[pb.WatchGenerationResponse]]:
        async with _transaction(self._reader) as connection:
            state: int | None = await connection.scalar(sa.select(_COLUMN.state).where(_COLUMN.id == job_id))
            if state is None:
                raise _not_found(job_id)
            return state, await _events(connection, job_id, sequence)

    # What workers do

    @_to_its_end
    async def claim_next(self) -> Job | None:
        """Begins the generation with the highest priority, of these the oldest; None where none waits."""
        oldest = (
            sa.select(_COLUMN.number)
            .where(_COLUMN.state == QUEUED)
            .order_by(_COLUMN.priority.desc(), _COLUMN.number)
            .limit(1)
            .with_for_update(skip_locked=True)  # left out by SQLite, where a writer is alone
        )
        async with _transaction(self._writer) as connection:
            jobs = await _change(
                connection,
                _COLUMN.number == oldest.scalar_subquery(),
                state=RUNNING,
                attempts=_COLUMN.attempts + 1,
                start_time_us=sa.func.coalesce(_COLUMN.start_time_us, _now_us()),
            )
        for job in jobs:
            self._signals.notify(_events_of(job.id))
        return jobs[0] if jobs else None

    async def next_job(self) -> Job:
        """As `claim_next`, but waits until there is one."""
        with self._signals.listen(_WORK) as signal:
            while True:
                signal.clear()
                job = await self.claim_next()
                if job is not None:
                    return job
                await _wait(signal, self._poll_s)

    async def wait_for_cancel(self, job: Job) -> None:
        """Returns once a claimed job is to be stopped: cancel was requested, or the claim is over."""
        with self._signals.listen(_cancel_of(job.id)) as signal:
            while True:
                signal.clear()
                if await self._is_to_stop(job):
                    return
                await _wait(signal, self._poll_s)

    @_to_its_end
    async def _is_to_stop(self, job: Job) -> bool:
        query = sa.select(_COLUMN.id).where(_claim(job), sa.not_(_COLUMN.cancel_requested))
        async with _transaction(self._reader) as connection:
            return await connection.scalar(query) is None

    @_to_its_end
    async def report(
        self, job: Job, events: Sequence[pb.WatchGenerationResponse], progress: pb.GenerationProgress
    ) -> int:
        """Adds events and stores how far a job has come, in one transaction: one wait for the disk for all of them.

        The events' sequence and time are set here.

        Returns:
            the sequence number of the last event.

        Raises:
            WrongState: the claim is over.
        """
        counted = sa.update(_GENERATIONS).where(_claim(job))
        counted = counted.values(
            last_sequence=_COLUMN.last_sequence + len(events), progress=progress.SerializeToString()
        )
        async with _transaction(self._writer) as connection:
            last: int | None = await connection.scalar(counted.returning(_COLUMN.last_sequence))
            if last is None:
                raise _claim_over(job)
            await _insert_events(connection, job.id, last - len(events) + 1, events)
        self._signals.notify(_events_of(job.id))
        return last

    @_to_its_end
    async def finish(self, job: Job, *, video: pb.Asset | None = None, error: pb.GenerationError | None = None) -> Job:
        """Ends a job: SUCCEEDED with a video, FAILED with an error, CANCELLED with neither.

        If cancel was requested it is CANCELLED all the same, and the video, if any, is not its own: the caller looks at
        the state of what is returned and deletes it.

        Raises:
            WrongState: the claim is over.
        """
        if video is not None and error is not None:
            raise ValueError("a job ends with a video or with an error, not with both")
        end: dict[str, object] = {"state": CANCELLED}
        if video is not None:
            end = {"state": SUCCEEDED, "video": video.SerializeToString(), "video_asset_id": video.sha256}
        if error is not None:
            end = {"state": FAILED, "error": error.SerializeToString()}
        now = _now_us()
        async with _transaction(self._writer) as connection:
            wanted = sa.and_(_claim(job), sa.not_(_COLUMN.cancel_requested))
            jobs = await _change(connection, wanted, end_time_us=now, **end)
            jobs = jobs or await _change(connection, _claim(job), end_time_us=now, state=CANCELLED)
            if not jobs:
                raise _claim_over(job)
        self._signals.notify(_events_of(job.id))
        self._signals.notify(_cancel_of(job.id))
        return jobs[0]

    @_to_its_end
    async def requeue_running(self, max_attempts: int = 10) -> list[Job]:
        """Takes back what was running when the gateway died; to be called at its start, before any claim.

        What was to be cancelled is CANCELLED. What has been begun `max_attempts` times is FAILED, as it may be the
        reason why the gateway dies. The rest is QUEUED again, at its old place.

        Returns:
            the jobs that are queued again.
        """
        error = pb.GenerationError(
            status="INTERNAL",
            reason="TOO_MANY_ATTEMPTS",
            message=f"the gateway stopped in the middle of it {max_attempts} times",
        )
        running, now = _COLUMN.state == RUNNING, _now_us()
        async with _transaction(self._writer) as connection:
            cancelled = sa.and_(running, _COLUMN.cancel_requested)
            await _change(connection, cancelled, state=CANCELLED, end_time_us=now)
            failed = sa.and_(running, _COLUMN.attempts >= max_attempts)
            await _change(connection, failed, state=FAILED, end_time_us=now, error=error.SerializeToString())
            jobs = await _change(connection, running, state=QUEUED, progress=b"")
        self._signals.notify(_WORK)
        return jobs


def _engine(path: Path, begin: str, *, connections: int, timeout_s: float) -> AsyncEngine:
    engine = create_async_engine(
        sa.URL.create("sqlite+aiosqlite", database=str(path)),
        # isolation_level None: the driver begins no transactions of its own
        connect_args={"isolation_level": None, "timeout": timeout_s},
        pool_size=connections,
        max_overflow=0,
        pool_timeout=timeout_s,
    )

    @sa.event.listens_for(engine.sync_engine, "connect")
    def connected(connection: DBAPIConnection, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")  # what a caller was told is queued survives a power cut
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


@asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    try:
        async with engine.begin() as connection:
            yield connection
    except (sa.exc.OperationalError, sa.exc.TimeoutError) as error:
        reason = getattr(error, "orig", None) or error
        raise NotReady(
            f"the gateway's database is not available: {reason}", reason="DATABASE_UNAVAILABLE", retry_after_s=1
        ) from error


async def _first(connection: AsyncConnection, condition: sa.ColumnElement[bool]) -> sa.Row[tuple[object, ...]] | None:
    return (await connection.execute(sa.select(_GENERATIONS).where(condition).limit(1))).one_or_none()


async def _existing(connection: AsyncConnection, job_id: str) -> Job:
    row = await _first(connection, _COLUMN.id == job_id)
    if row is None:
        raise _not_found(job_id)
    return _job(row)


async def _requested(connection: AsyncConnection, request_id: str, request_digest: str) -> Job | None:
    row = await _first(connection, _COLUMN.request_id == request_id) if request_id else None
    if row is not None and row.request_digest != request_digest:
        raise Conflict(f"request_id {request_id} was used for another request")
    return None if row is None else _job(row)


def _not_found(job_id: str) -> NotFound:
    return NotFound(f"there is no generations/{job_id}")


async def _events(connection: AsyncConnection, job_id: str, sequence: int) -> list[pb.WatchGenerationResponse]:
    query = (
        sa.select(_EVENTS.c.event)
        .where(_EVENTS.c.generation_id == job_id, _EVENTS.c.sequence > sequence)
        .order_by(_EVENTS.c.sequence)
        .limit(EVENTS_PER_READ)
    )
    return [pb.WatchGenerationResponse.FromString(event) for event in await connection.scalars(query)]


async def _insert(
    connection: AsyncConnection, request: pb.CreateGenerationRequest, request_digest: str, trace_parent: str
) -> Job:
    values = {
        "id": uuid.uuid4().hex,
        "request_id": request.request_id or None,
        "request_digest": request_digest,
        "request": request.SerializeToString(),
        "state": QUEUED,
        "cancel_requested": False,
        "priority": request.priority,
        "attempts": 0,
        "progress": b"",
        "trace_parent": trace_parent,
        "create_time_us": _now_us(),
        "last_sequence": 1,
    }
    job = _job((await connection.execute(sa.insert(_GENERATIONS).values(values).returning(_GENERATIONS))).one())
    await _insert_events(connection, job.id, 1, [pb.WatchGenerationResponse(generation=job.to_proto())])
    return job


async def _change(connection: AsyncConnection, condition: sa.ColumnElement[bool], **values: object) -> list[Job]:
    """Changes the state of the generations that meet the condition, and writes the event of each."""
    update = sa.update(_GENERATIONS).where(condition).values(last_sequence=_COLUMN.last_sequence + 1, **values)
    jobs = []
    for row in (await connection.execute(update.returning(_GENERATIONS))).all():
        job = _job(row)
        event = pb.WatchGenerationResponse(generation=job.to_proto())
        await _insert_events(connection, job.id, row.last_sequence, [event])
        jobs.append(job)
    return jobs


async def _insert_events(
    connection: AsyncConnection, job_id: str, first_sequence: int, events: Sequence[pb.WatchGenerationResponse]
) -> None:
    rows = []
    for sequence, event in enumerate(events, start=first_sequence):
        stored = pb.WatchGenerationResponse()
        stored.CopyFrom(event)
        stored.sequence = sequence
        stored.time.FromMicroseconds(_now_us())
        rows.append({"generation_id": job_id, "sequence": sequence, "event": stored.SerializeToString()})
    if rows:
        await connection.execute(sa.insert(_EVENTS), rows)


def _claim(job: Job) -> sa.ColumnElement[bool]:
    """The generation is still in the attempt that the worker with this job has begun."""
    return sa.and_(_COLUMN.id == job.id, _COLUMN.attempts == job.attempts, _COLUMN.state == RUNNING)


def _claim_over(job: Job) -> WrongState:
    return WrongState(f"attempt {job.attempts} of {job.name} is over", reason="CLAIM_OVER")


def _job(row: sa.Row[tuple[object, ...]]) -> Job:
    return Job(
        id=row.id,
        request=pb.CreateGenerationRequest.FromString(row.request),
        state=row.state,
        cancel_requested=row.cancel_requested,
        attempts=row.attempts,
        progress=pb.GenerationProgress.FromString(row.progress),
        error=None if row.error is None else pb.GenerationError.FromString(row.error),
        video=None if row.video is None else pb.Asset.FromString(row.video),
        trace_parent=row.trace_parent,
        create_time_us=row.create_time_us,
        start_time_us=row.start_time_us,
        end_time_us=row.end_time_us,
    )


_WORK = "work"


def _events_of(job_id: str) -> str:
    return f"events/{job_id}"


def _cancel_of(job_id: str) -> str:
    return f"cancel/{job_id}"


class _Signals:
    """Wakes whoever in this process waits for a key; keeps nothing for keys that nobody waits for."""

    def __init__(self) -> None:
        self._listeners: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def listen(self, key: str) -> Iterator[asyncio.Event]:
        signal = asyncio.Event()
        self._listeners[key].add(signal)
        try:
            yield signal
        finally:
            self._listeners[key].discard(signal)
            if not self._listeners[key]:
                del self._listeners[key]

    def notify(self, key: str) -> None:
        for signal in self._listeners.get(key, ()):
            signal.set()


async def _wait(signal: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await signal.wait()


def _now_us() -> int:
    return time.time_ns() // 1000
