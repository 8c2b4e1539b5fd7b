"""Programs for supervisors under test, and a look at the processes of this machine.

As a program (`python -m tests.bunraku.processes DATA`) it is a supervisor of two fake stages that prints their process
ids once they are ready.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bunraku.supervisor import Program, Supervisor
from tests.bunraku.fake_stage import SERVICE

FAKE_STAGE = (sys.executable, "-m", "tests.bunraku.fake_stage")
FAKE_GATEWAY = (sys.executable, "-m", "tests.bunraku.fake_gateway")


def fake_program(name: str, **environment: str) -> Program:
    """A fake stage on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    return Program(name, FAKE_STAGE, address, SERVICE, {"BUNRAKU_ADDRESS": address, **environment})


def alive(pid: int) -> bool:
    """Whether there is such a process; one that is dead and that nobody has asked about is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: Iterable[int], within_s: float = 5.0) -> bool:
    """Whether all of them end in time."""
    wanted = list(pids)
    assert wanted
    return eventually(lambda: not any(map(alive, wanted)), within_s)


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Whether a condition comes true in time."""
    ends_at = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > ends_at:
            return False
        time.sleep(0.02)
    return True


async def supervise(data: Path) -> None:
    """Runs a system until it is killed."""
    programs = [fake_program("vae", FAKE_STUBBORN="1"), fake_program("gateway")]
    async with Supervisor(programs, data=data) as supervisor:
        print(*(child.process.pid for child in supervisor.children if child.process), flush=True)
        await supervisor.watch()


if __name__ == "__main__":
    asyncio.run(supervise(Path(sys.argv[1])))
