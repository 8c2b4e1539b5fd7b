"""One SQLite file or one PostgreSQL database, for all that the gateway remembers.

SQLite needs nothing to be installed and serves one gateway; PostgreSQL serves several. What stands on this is written
once for both. A database that is locked, full or away is NotReady, soon: no call waits for it without an end.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from bunraku.errors import InvalidRequest, NotReady
from gateway.jobs import sqlite
from gateway.jobs.migrations import upgrade

# What a caller is answered within when the database is away; the call itself may go on a little longer.
PROMPT_S = 0.8

_READERS = 4
_POSTGRESQL_CONNECTIONS = 8
# A gateway that is frozen inside a transaction must not hold its locks for longer than a lease
_POSTGRESQL_OPTIONS = (
    "-c statement_timeout=5000 -c lock_timeout=4000 -c idle_in_transaction_session_timeout=5000 "
    "-c application_name=bunraku-gateway"
)
# The peer is given up when it has not answered for so long, whatever the kernel's own patience
_POSTGRESQL_NETWORK = {
    "connect_timeout": 2,
    "tcp_user_timeout": 5000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
}
_AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError, OSError)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class HasDatabase(Protocol):
    """What has methods that are calls to a database."""

    database: Database


Owner = TypeVar("Owner", bound=HasDatabase)
Method = Callable[Concatenate[Owner, Parameters], Coroutine[object, object, Result]]


def to_its_end(method: Method[Owner, Parameters, Result]) -> Method[Owner, Parameters, Result]:
    """Lets a method go on to its end when its caller is cancelled, as it is whenever a client hangs up.

    A connection that is dropped in the middle of a transaction would keep an SQLite file locked.
    """

    @wraps(method)
    async def call(self: Owner, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return await asyncio.shield(self.database.begin_call(method(self, *args, **kwargs)))

    return call


def promptly(method: Method[Owner, Parameters, Result]) -> Method[Owner, Parameters, Result]:
    """As `to_its_end`, for what submits: NotReady after PROMPT_S, and nothing is committed after that."""

    @wraps(method)
    async def call(self: Owner, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        task = self.database.begin_call(method(self, *args, **kwargs))
        done, _ = await asyncio.wait({task}, timeout=PROMPT_S)
        if not done:
            self.database.abandon(task)
            raise _not_ready(f"it has not answered within {PROMPT_S:g} s")
        return task.result()

    return call


class Database:
    """Where jobs are kept.

    Args:
        where: SQLite file, made when it does not exist, or `postgresql://user:password@host:port/name`.
        busy_timeout_s: how long a statement waits for a lock on the SQLite file that another process holds.
    """

    def __init__(self, where: Path | str, *, busy_timeout_s: float = 5.0) -> None:
        self.postgresql_url = "" if isinstance(where, Path) else _postgresql_url(where)
        if self.postgresql_url:
            self._writer = self._reader = _postgresql_engine(self.postgresql_url, busy_timeout_s)
            self.now_us: sa.ColumnElement[int] = sa.cast(
                sa.func.extract("epoch", sa.func.clock_timestamp()) * 1_000_000, sa.BigInteger
            )
        else:
            assert isinstance(where, Path)
            # One connection writes: writers queue in this process, in order, instead of in SQLite's lock, which is not
            # fair. BEGIN IMMEDIATE takes the lock up front; a transaction that reads first and then writes cannot wait.
            self._writer = _sqlite_engine(where, "BEGIN IMMEDIATE", connections=1, timeout_s=busy_timeout_s)
            self._reader = _sqlite_engine(where, "BEGIN", connections=_READERS, timeout_s=busy_timeout_s)
            # unixepoch('subsec') is NULL, without an error, before SQLite 3.42
            self.now_us = sa.cast((sa.func.julianday("now") - 2440587.5) * 86_400_000_000.0, sa.BigInteger)
        self._calls: set[asyncio.Task[object]] = set()
        self._abandoned: weakref.WeakSet[asyncio.Task[object]] = weakref.WeakSet()

    @asynccontextmanager
    async def writing(self, *, durable: bool = True) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes. Raises NotReady when the database cannot.

        Args:
            durable: waits for the disk, so that it is there after a power cut. What is not survives the process being
                killed, and is lost only together with all that came after it.
        """
        async with self._transaction(self._writer, durable=durable) as connection:
            yield connection

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that reads. Raises NotReady when the database cannot."""
        async with self._transaction(self._reader) as connection:
            yield connection

    async def migrate(self) -> None:
        """Brings the tables to this version, whatever version they are of; the data stay."""
        async with self._translated(), self._writer.connect() as connection:
            if self.postgresql_url:
                # gateways that start together: one migrates, the others find it done
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            await connection.run_sync(upgrade)
            await connection.commit()

    async def close(self) -> None:
        """Waits for the calls under way and closes the connections."""
        if self._calls:
            await asyncio.wait(self._calls)
        await self._reader.dispose()
        await self._writer.dispose()

    def begin_call(self, coroutine: Coroutine[object, object, Result]) -> asyncio.Task[Result]:
        """Begins a call that is waited for when the database is closed."""
        task = asyncio.create_task(coroutine)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return task

    def abandon(self, task: asyncio.Task[Result]) -> None:
        """Nobody waits for a call any longer: it is rolled back instead of committed."""
        self._abandoned.add(task)
        task.add_done_callback(_forget)

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine, *, durable: bool = True) -> AsyncIterator[AsyncConnection]:
        async with self._translated(), engine.connect() as connection:
            if engine is self._writer and not self.postgresql_url:
                opened = (await connection.get_raw_connection()).driver_connection
                assert isinstance(opened, sqlite.Connection)
                opened.synchronise("FULL" if durable else "NORMAL")
            async with connection.begin():
                if self.postgresql_url and not durable:
                    await connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")
                yield connection
                if asyncio.current_task() in self._abandoned:
                    raise _not_ready("it answered too late")

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except _AWAY as error:
            raise _not_ready(str(getattr(error, "orig", None) or error)) from error


_MIGRATION_LOCK = 0x62756E72616B75  # any number that nobody else takes: "bunraku"


def _forget(task: asyncio.Task[Result]) -> None:
    """Looks at how an abandoned call ended, lest asyncio complain that nobody did."""
    with suppress(asyncio.CancelledError):
        task.exception()


def _not_ready(reason: str) -> NotReady:
    return NotReady(
        f"the gateway's database is not available: {reason}", reason="DATABASE_UNAVAILABLE", retry_after_s=1
    )


def _postgresql_url(where: str) -> str:
    try:
        url = sa.engine.make_url(where)
    except sa.exc.ArgumentError:
        url = None
    if url is None or url.get_backend_name() != "postgresql":
        raise InvalidRequest(("database", "must be postgresql://user:password@host:port/name"))
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def _postgresql_engine(url: str, timeout_s: float) -> AsyncEngine:
    return create_async_engine(
        sa.engine.make_url(url).set(drivername="postgresql+psycopg"),
        connect_args={"options": _POSTGRESQL_OPTIONS, **_POSTGRESQL_NETWORK},
        pool_size=_POSTGRESQL_CONNECTIONS,
        max_overflow=0,
        pool_timeout=timeout_s,
        # a connection that died while nobody used it is replaced instead of failing the next call
        pool_pre_ping=True,
    )


# FULL: what a caller was told is queued survives a power cut
_PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON")


def _sqlite_engine(path: Path, begin: str, *, connections: int, timeout_s: float) -> AsyncEngine:
    engine = create_async_engine(
        sa.URL.create("sqlite+aiosqlite", database=str(path)),
        connect_args={"async_creator_fn": lambda *_, **__: sqlite.Connection.open(path, _PRAGMAS, timeout_s)},
        pool_size=connections,
        max_overflow=0,
        pool_timeout=timeout_s,
    )

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine
