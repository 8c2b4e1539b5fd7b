"""A stage, or a caller of one, in a process of its own: `python -m tests.runtime.processes serve|call ...`.

A process says `ready ...` on its standard output when a test may go on.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.gpu import raise_if_cancelled
from runtime.server import ServerSettings, run
from runtime.shared_memory import SharedMemory
from runtime.stage import StageRuntime
from runtime.tensors import WireTensor
from tests.runtime.fakes import BUNDLE, FakeVae, Tensors, client, decode, echo, zeros

SIZE = 2**20


class Holding(FakeVae):
    """Keeps all that it is sent; its Decode never ends."""

    kept: list[Tensors]

    def load(self) -> None:
        self.kept = []
        self.encode_work = self._keep
        self.decode_work = self._endless
        print("ready", flush=True)

    def _keep(self, tensors: Tensors) -> list[WireTensor]:
        self.kept.append(dict(tensors))
        return list(echo(tensors))

    def _endless(self, tensors: Tensors) -> Iterator[WireTensor]:
        while True:
            raise_if_cancelled()
            time.sleep(0.001)
            yield zeros(SIZE)


async def serve(port: str, directory: str) -> int:
    """Serves until SIGTERM."""
    runtime = StageRuntime("vae", BUNDLE, shared_memory=SharedMemory(Path(directory)))
    return await run(Holding(runtime), runtime, ServerSettings(f"127.0.0.1:{port}", grace_s=5))


async def call(port: str, directory: str) -> int:
    """Takes one tensor of a Decode, keeps it and reads no further."""
    async with client(f"127.0.0.1:{port}", shared_memory=SharedMemory(Path(directory))) as caller:
        answers = decode(caller)
        kept = await anext(answers)
        print("ready", kept.size_bytes, flush=True)
        await asyncio.Event().wait()
    return 0


@dataclass(frozen=True)
class Running:
    """A process that has said `ready`."""

    process: asyncio.subprocess.Process

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def terminate(self) -> int:
        """SIGTERM; gives the exit status."""
        self.process.terminate()
        return await self.process.wait()


@asynccontextmanager
async def running(mode: str, port: int, directory: Path) -> AsyncIterator[Running]:
    """This module as a process; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, mode, str(port), str(directory), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        assert line.startswith(b"ready"), line
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


if __name__ == "__main__":
    sys.exit(asyncio.run({"serve": serve, "call": call}[sys.argv[1]](*sys.argv[2:])))
