"""What workers do with jobs: claim the next one, keep the claim alive, report, and end it or give it back.

A claim is a lease with a token. The gateway renews its leases while it lives; another takes over what was not renewed
for `lease_s`, on the database's clock. Every write shows the token, in the same transaction: a worker that was frozen
and left behind can change nothing.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from bunraku.errors import NotReady, WrongState
from bunraku.v1 import gateway_pb2 as pb
from gateway.jobs import shares
from gateway.jobs.costs import Cost, Costs
from gateway.jobs.database import Database, to_its_end
from gateway.jobs.job import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, Job
from gateway.jobs.records import COLUMN, WORK, Row, change, events_of, insert_events, now_us, stop_of
from gateway.jobs.signals import Signals, wait
from gateway.jobs.tables import GENERATIONS

LEASE_S = 10.0
_RENEWALS_PER_LEASE = 4
# After so many gateways that died or froze in the middle of it, the generation itself may be the reason
MAX_LOST_LEASES = 10

_RELEASED: dict[str, object] = {
    "owner": None,
    "claim_token": None,
    "lease_until_us": None,
    "set_aside": False,
    "denoising": False,
}
_log = logging.getLogger(__name__)


class Stop(enum.Enum):
    """Why a worker is to stop."""

    CANCELLED = "cancel was requested"
    SET_ASIDE = "one of higher priority needs the GPU"
    LOST = "the claim is over"


@dataclass(frozen=True)
class Told:
    """What a worker has to tell of a job.

    Attributes:
        events: new ones, in order.
        progress: how far it has come.
        gpu_seconds: used since the claim.
        denoising: whether it holds the denoiser.
    """

    events: Sequence[pb.WatchGenerationResponse]
    progress: pb.GenerationProgress
    gpu_seconds: float = 0.0
    denoising: bool = False


class Claims:
    """The jobs that this gateway works on. `report`, `finish` and `give_back` raise WrongState once a claim is over.

    Args:
        poll_s: how often other gateways' changes are looked for where no signal tells of them.
        lease_s: how long a claim holds without being renewed.
    """

    def __init__(self, database: Database, signals: Signals, costs: Costs, *, poll_s: float, lease_s: float) -> None:
        self.database = database
        self._signals, self._costs = signals, costs
        self._poll_s, self._lease_s = poll_s, lease_s
        self._after_restart_s = lease_s
        self._gateway = uuid.uuid4().hex

    # Beginning

    async def next_job(self, above_priority: Callable[[], int | None] = lambda: -1) -> Job:
        """As `claim_next`, but waits until there is one.

        Args:
            above_priority: asked before each claim; None: not now. `look_again` says that its answer has changed.
        """
        with self._signals.listen(WORK) as signal:
            while True:
                signalled = signal.is_set()
                signal.clear()
                above = above_priority()
                # a poll reads only: it must not take the lock that claims are made under
                if above is not None and (signalled or await self._anything_waits(above)):
                    job = await self.claim_next(above)
                    if job is not None:
                        return job
                await wait(signal, self._poll_s)

    def look_again(self) -> None:
        """Has `next_job` ask again what it may begin."""
        self._signals.wake(WORK)

    @property
    def shared(self) -> bool:
        """Whether other gateways may work on the same jobs."""
        return bool(self.database.postgresql_url)

    @to_its_end
    async def claim_next(self, above_priority: int = -1) -> Job | None:
        """Begins the generation whose turn it is, of those with a higher priority; None where none waits."""
        # a claim that a power cut takes back was not there: the generation waits again, and the token is worth nothing
        async with self.database.writing(durable=False) as connection:
            choice = await shares.choose(connection, self.database.now_us, above_priority)
            if choice is None:
                return None
            (row,) = await change(
                connection,
                COLUMN.number == choice.number,
                state=RUNNING,
                attempts=COLUMN.attempts + 1,
                start_time_us=sa.func.coalesce(COLUMN.start_time_us, now_us()),
                owner=self._gateway,
                claim_token=uuid.uuid4().hex,
                lease_until_us=self._lease_end(),
                charged_seconds=choice.charged_seconds,
            )
        self._signals.notify(events_of(row.id))
        return Job.of(row)

    @to_its_end
    async def _anything_waits(self, above_priority: int) -> bool:
        query = sa.select(COLUMN.number).where(COLUMN.state == QUEUED, COLUMN.priority > above_priority).limit(1)
        async with self.database.reading() as connection:
            return await connection.scalar(query) is not None

    # Working

    async def wait_for_stop(self, job: Job) -> Stop:
        """Returns once work on a claimed job is to stop."""
        with self._signals.listen(stop_of(job.id)) as signal:
            while True:
                signal.clear()
                try:
                    stop = await self._stop(job)
                except NotReady:
                    stop = None  # work goes on while the database is away
                if stop is not None:
                    return stop
                await wait(signal, self._poll_s)

    @to_its_end
    async def _stop(self, job: Job) -> Stop | None:
        query = sa.select(COLUMN.cancel_requested, COLUMN.set_aside).where(_claim(job))
        async with self.database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return Stop.LOST
        if row.cancel_requested:
            return Stop.CANCELLED
        return Stop.SET_ASIDE if row.set_aside else None

    @to_its_end
    async def report(self, job: Job, told: Told) -> int:
        """Adds events and stores how far a job has come, in one transaction: one wait for the disk for all of them.

        The events' sequence and time are set here.

        Returns:
            the sequence number of the last event.

        Raises:
            WrongState: the claim is over.
        """
        async with self.database.writing() as connection:
            last = await _take_in(connection, job, told)
        self._signals.notify(events_of(job.id))
        return last

    @to_its_end
    async def finish(
        self,
        job: Job,
        *,
        video: pb.Asset | None = None,
        error: pb.GenerationError | None = None,
        told: Told | None = None,
        cost: Cost | None = None,
    ) -> Job:
        """Ends a job: SUCCEEDED with a video, FAILED with an error, CANCELLED with neither.

        If cancel was requested it is CANCELLED all the same, and the video, if any, is not its own: the caller looks at
        the state of what is returned and deletes it.

        Args:
            told: what came since the last report.
            cost: what it took, to foretell what others like it will.

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
        now = now_us()
        async with self.database.writing() as connection:
            if told is not None:
                await _take_in(connection, job, told)
            wanted = sa.and_(_claim(job), sa.not_(COLUMN.cancel_requested))
            rows = await change(connection, wanted, end_time_us=now, **_RELEASED, **end)
            rows = rows or await change(connection, _claim(job), end_time_us=now, state=CANCELLED, **_RELEASED)
            if not rows:
                raise _claim_over(job)
            await shares.settle(connection, rows)
            if cost is not None:
                await self._costs.learn(connection, job.request, cost)
        self._signals.notify(events_of(job.id), stop_of(job.id))
        return Job.of(rows[0])

    @to_its_end
    async def give_back(self, job: Job, told: Told | None = None) -> Job:
        """Puts a job that was set aside back into the queue, at its old place; CANCELLED if cancel was requested.

        Args:
            told: what came since the last report.

        Raises:
            WrongState: the claim is over.
        """
        async with self.database.writing() as connection:
            if told is not None:
                await _take_in(connection, job, told)
            rows = await self._requeue(connection, _claim(job))
            if not rows:
                raise _claim_over(job)
        self._notify_requeued(rows)
        return Job.of(rows[0])

    @to_its_end
    async def holds(self, job: Job) -> bool:
        """Whether a claim is not over: what is written outside the database is asked for before it is written."""
        async with self.database.reading() as connection:
            return await connection.scalar(sa.select(COLUMN.id).where(_claim(job))) is not None

    @to_its_end
    async def ask_to_set_aside(self, below_priority: int) -> str | None:
        """Asks for the least urgent job that holds a denoiser to be set aside, in whatever gateway it runs.

        Returns:
            its id; None where none of a lower priority does, or one was asked for already.
        """
        holding = sa.and_(COLUMN.state == RUNNING, COLUMN.denoising)
        least = (
            sa.select(COLUMN.number)
            .where(holding, COLUMN.priority < below_priority, sa.not_(COLUMN.cancel_requested))
            .order_by(COLUMN.priority, COLUMN.number.desc())
            .limit(1)
        )
        asked = sa.update(GENERATIONS).where(COLUMN.number == least.scalar_subquery(), sa.not_(COLUMN.set_aside))
        async with self.database.writing() as connection:
            job_id: str | None = await connection.scalar(asked.values(set_aside=True).returning(COLUMN.id))
        if job_id is not None:
            self._signals.notify(stop_of(job_id))
        return job_id

    # Leases

    async def keep(self) -> None:
        """Renews this gateway's leases and takes over those of gateways that are gone, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(self.renew, self._lease_s / _RENEWALS_PER_LEASE))
            group.create_task(self._again(self.sweep, self._poll_s))

    async def _again(self, work: Callable[[], Awaitable[object]], interval_s: float) -> None:
        while True:
            begun = asyncio.get_running_loop().time()
            try:
                await work()
            except NotReady as error:
                _log.warning("%s", error.message)
            took_s = asyncio.get_running_loop().time() - begun
            if took_s > self._lease_s / 2:
                _log.warning("a lease of %g s was not renewed for %.1f s", self._lease_s, took_s)
            await asyncio.sleep(max(0.0, interval_s - took_s))

    @to_its_end
    async def renew(self) -> None:
        """Keeps this gateway's claims for another lease; those that were taken over already stay away."""
        mine = sa.and_(COLUMN.state == RUNNING, COLUMN.owner == self._gateway)
        async with self.database.writing(durable=False) as connection:
            await connection.execute(sa.update(GENERATIONS).where(mine).values(lease_until_us=self._lease_end()))

    @to_its_end
    async def sweep(self) -> list[Job]:
        """Gives up what waited past its deadline and takes over what gateways that are gone have left.

        Returns:
            the jobs that are queued again.
        """
        now = self.database.now_us
        late = sa.and_(COLUMN.state == QUEUED, COLUMN.deadline_us <= now)
        left = sa.and_(COLUMN.state == RUNNING, COLUMN.lease_until_us <= now, COLUMN.owner != self._gateway)
        if self.database.postgresql_url:
            # when the database was away nobody could renew: its gateways have a lease's time to come back
            up_since = sa.func.extract("epoch", sa.func.pg_postmaster_start_time()) * 1_000_000
            left = sa.and_(left, up_since <= now - int(self._after_restart_s * 1e6))
        query = sa.select(COLUMN.id).where(sa.or_(late, left)).limit(1)
        async with self.database.reading() as connection:
            if await connection.scalar(query) is None:
                return []
        async with self.database.writing() as connection:
            error = _error("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "it waited past its deadline")
            ended = await change(connection, late, state=FAILED, end_time_us=now_us(), error=error)
            rows = await self._take_over(connection, left)
        self._notify_requeued([*ended, *rows])
        return [Job.of(row) for row in rows if row.state == QUEUED]

    @to_its_end
    async def take_back(self) -> list[Job]:
        """Queues again whatever was running; at the start of the only gateway that uses the database.

        Returns:
            the jobs that are queued again.
        """
        async with self.database.writing() as connection:
            rows = await self._take_over(connection, COLUMN.state == RUNNING)
        self._notify_requeued(rows)
        return [Job.of(row) for row in rows if row.state == QUEUED]

    @to_its_end
    async def hand_back(self) -> None:
        """Puts all that this gateway works on back into the queue: others go on with it at once."""
        async with self.database.writing() as connection:
            mine = sa.and_(COLUMN.state == RUNNING, COLUMN.owner == self._gateway)
            rows = await self._requeue(connection, mine)
        self._notify_requeued(rows)

    async def _take_over(self, connection: AsyncConnection, left: sa.ColumnElement[bool]) -> list[Row]:
        """Queues again what a gateway has left, unless that has happened too often."""
        text = f"{MAX_LOST_LEASES} times a gateway stopped in the middle of it"
        often = sa.and_(left, COLUMN.lost_leases >= MAX_LOST_LEASES - 1, sa.not_(COLUMN.cancel_requested))
        error = _error("INTERNAL", "TOO_MANY_ATTEMPTS", text)
        failed = await change(connection, often, state=FAILED, end_time_us=now_us(), error=error, **_RELEASED)
        await shares.settle(connection, failed)
        requeued = await self._requeue(connection, left, lost_leases=COLUMN.lost_leases + 1)
        return [*failed, *requeued]

    async def _requeue(
        self, connection: AsyncConnection, condition: sa.ColumnElement[bool], **values: object
    ) -> list[Row]:
        """Back into the queue, except for what was to be cancelled: that is."""
        cancelled = sa.and_(condition, COLUMN.cancel_requested)
        rows = await change(connection, cancelled, state=CANCELLED, end_time_us=now_us(), **_RELEASED)
        rows += await change(connection, condition, state=QUEUED, progress=b"", **_RELEASED, **values)
        await shares.settle(connection, rows)
        return rows

    def _notify_requeued(self, rows: Sequence[Row]) -> None:
        if rows:
            self._signals.notify(WORK, *(key for row in rows for key in (events_of(row.id), stop_of(row.id))))

    def _lease_end(self) -> sa.ColumnElement[int]:
        return self.database.now_us + int(self._lease_s * 1e6)


async def _take_in(connection: AsyncConnection, job: Job, told: Told) -> int:
    """Stores what a worker tells; gives the sequence number of its last event."""
    counted = sa.update(GENERATIONS).where(_claim(job))
    counted = counted.values(
        last_sequence=COLUMN.last_sequence + len(told.events),
        progress=told.progress.SerializeToString(),
        gpu_seconds=job.gpu_seconds + told.gpu_seconds,
        denoising=told.denoising,
    )
    last: int | None = await connection.scalar(counted.returning(COLUMN.last_sequence))
    if last is None:
        raise _claim_over(job)
    await insert_events(connection, job.id, last - len(told.events) + 1, told.events)
    return last


def _claim(job: Job) -> sa.ColumnElement[bool]:
    """The generation is still in the claim that the worker with this job has made."""
    return sa.and_(COLUMN.id == job.id, COLUMN.claim_token == job.claim_token, COLUMN.state == RUNNING)


def _claim_over(job: Job) -> WrongState:
    return WrongState(f"attempt {job.attempts} of {job.name} is over", reason="CLAIM_OVER")


def _error(status: str, reason: str, message: str) -> bytes:
    return pb.GenerationError(status=status, reason=reason, message=message).SerializeToString()
