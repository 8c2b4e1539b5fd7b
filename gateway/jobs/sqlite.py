"""SQLite's own module on a thread, in the form that SQLAlchemy's asyncio dialect asks for: one hop per statement.

aiosqlite hops to its thread and back for every cursor, execute, fetch, close and commit of a statement, which made up
half of what the gateway's processor did for a request. Here a statement runs and is fetched in one hop, the BEGIN of a
transaction goes with its first statement, and what has nothing to do goes nowhere.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
Parameters = Sequence[Any]


class Connection:
    """What SQLAlchemy takes for a connection of aiosqlite."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        # the name under which SQLAlchemy looks whether it is still open
        self._connection: sqlite3.Connection | None = connection
        self._thread = thread
        self._begin: list[str] = []
        self._synchronous = "FULL"

    @classmethod
    async def open(cls, path: Path, pragmas: Iterable[str], timeout_s: float) -> Connection:
        """Opens a file, which is made when it does not exist."""

        def connect() -> sqlite3.Connection:
            # isolation_level None: the module begins no transactions of its own
            connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
            for pragma in pragmas:
                connection.execute(f"PRAGMA {pragma}").close()
            return connection

        thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        try:
            return cls(await asyncio.get_running_loop().run_in_executor(thread, connect), thread)
        except BaseException:
            thread.shutdown(wait=False)
            raise

    def cursor(self) -> Cursor:
        return Cursor(self)

    def begin(self, statement: str) -> None:
        """Begins a transaction with its first statement."""
        self._begin.append(statement)

    def synchronise(self, how: str) -> None:
        """How the next transaction is committed: FULL waits for the disk, NORMAL leaves it to the next one that does.

        Without the wait it is there after the process was killed, but perhaps not after a power cut.
        """
        if how != self._synchronous:
            self._synchronous = how
            self._begin = [f"PRAGMA synchronous = {how}"]

    async def run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Runs work on the connection's thread, in the transaction that was begun."""
        connection, begin = self._opened(), self._begin
        self._begin = []

        def call() -> Result:
            for statement in begin:
                connection.execute(statement).close()
            return work(connection)

        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def commit(self) -> None:
        await self._end(sqlite3.Connection.commit)

    async def rollback(self) -> None:
        await self._end(sqlite3.Connection.rollback)

    async def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await asyncio.get_running_loop().run_in_executor(self._thread, connection.close)
            self._thread.shutdown(wait=False)

    def stop(self) -> None:
        """Closes without waiting."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            self._thread.submit(connection.close)
            self._thread.shutdown(wait=False)

    async def create_function(self, *arguments: Any, **options: Any) -> None:
        await self.run(lambda connection: connection.create_function(*arguments, **options))

    async def _end(self, how: Callable[[sqlite3.Connection], None]) -> None:
        self._begin = [statement for statement in self._begin if not statement.startswith("BEGIN")]
        if self._opened().in_transaction:
            await self.run(how)

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.OperationalError("connection closed")
        return self._connection


class Cursor:
    """What SQLAlchemy takes for a cursor of aiosqlite: a statement runs to its end, with all its rows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: list[Any] = []
        self.description: Any = None
        self.rowcount, self.lastrowid, self.arraysize = -1, 0, 1

    async def __aenter__(self) -> Cursor:
        return self

    async def execute(self, statement: str, parameters: Parameters = ()) -> Cursor:
        if statement.startswith("BEGIN"):
            self._connection.begin(statement)
            return self
        return await self._run(lambda cursor: cursor.execute(statement, parameters))

    async def executemany(self, statement: str, parameters: Iterable[Parameters]) -> Cursor:
        return await self._run(lambda cursor: cursor.executemany(statement, parameters))

    async def fetchall(self) -> list[Any]:
        return self._rows

    async def close(self) -> None:
        """Nothing is left open."""

    async def _run(self, execute: Callable[[sqlite3.Cursor], object]) -> Cursor:
        def work(connection: sqlite3.Connection) -> None:
            cursor = connection.cursor()
            try:
                execute(cursor)
                self.description, self.rowcount = cursor.description, cursor.rowcount
                self.lastrowid = cursor.lastrowid or 0
                self._rows = cursor.fetchall() if cursor.description else []
            finally:
                cursor.close()

        await self._connection.run(work)
        return self
