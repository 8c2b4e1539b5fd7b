"""A real PostgreSQL server from Debian's packages, for the tests of what several gateways share."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import sql

MISSING = "no PostgreSQL server is installed: apt-get install postgresql"
_ACCOUNT = "postgres"  # the server refuses to run as root
_STARTS_WITHIN_S = 30


def programs() -> Path | None:
    """Directory of the server's programs, the newest there is; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return None if on_path is None else Path(on_path).resolve().parent


@dataclass
class Server:
    """A server with one database, in a directory of its own; `start` and `stop` may be called again."""

    options: Mapping[str, str] = field(default_factory=dict)
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="bunraku-pg-")))
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        found = programs()
        assert found is not None, MISSING
        self._programs = found
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        if os.getuid() == 0:
            shutil.chown(self.directory, _ACCOUNT)
        create = ["initdb", "--no-sync", "--auth=trust", "--username=bunraku", "-D", str(self.directory / "data")]
        subprocess.run([str(found / create[0]), *create[1:]], check=True, stdout=subprocess.DEVNULL, **_account())

    @property
    def url(self) -> str:
        return f"postgresql://bunraku@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [str(self._programs / "postgres"), "-D", str(self.directory / "data"), "-p", str(self.port)]
        command += ["-k", str(self.directory), "-h", "127.0.0.1"]
        for name, value in self.options.items():
            command += ["-c", f"{name}={value}"]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **_account())
        until = time.monotonic() + _STARTS_WITHIN_S
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert self.process.poll() is None, (self.directory / "log").read_text()
                assert time.monotonic() < until, (self.directory / "log").read_text()
                time.sleep(0.05)

    def stop(self) -> None:
        """As a fail-over looks to clients: connections are cut at once."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(_STARTS_WITHIN_S)
            self.process = None

    def drop(self) -> None:
        """Deletes every table."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")

    def empty(self) -> None:
        """Deletes what a gateway has written and keeps its tables."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
            # deleting from small tables is many times faster than truncating them
            for (table,) in sorted(tables, key=lambda row: row[0] == "generations"):
                if table == "schedule":
                    connection.execute("UPDATE schedule SET virtual_seconds = 0")
                elif table != "alembic_version":
                    connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(table)))

    def freeze(self) -> None:
        """As a host that is cut off looks to clients: nothing answers."""
        for pid in self._processes():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self._processes():
            os.kill(pid, signal.SIGCONT)

    def _processes(self) -> list[int]:
        assert self.process is not None
        return [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children())]

    def close(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(_STARTS_WITHIN_S)
        shutil.rmtree(self.directory, ignore_errors=True)


def _account() -> dict[str, Any]:
    return {"user": _ACCOUNT, "group": _ACCOUNT} if os.getuid() == 0 else {}
