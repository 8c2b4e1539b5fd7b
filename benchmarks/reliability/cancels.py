"""Random cancels: how soon the stage is free again, and whether anything is left behind."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict

import psutil

from benchmarks.reliability.system import COSTS, Inputs, System, Table, percentile, running_system, uploaded
from bunraku.client import AsyncClient
from bunraku.v1 import gateway_pb2 as pb

_STEPS = 20
_JOB_S = 2.0  # about what one takes alone, its time in the queue aside
_AT_ONCE = 4
_ENDED = (pb.GENERATION_STATE_SUCCEEDED, pb.GENERATION_STATE_FAILED, pb.GENERATION_STATE_CANCELLED)


def cancel(trials: int, seed: int) -> Table:
    """So many cancels, four generations at a time."""
    rng = random.Random(seed)
    with running_system("sqlite", max_running=3) as system:
        inputs = uploaded(system)
        asyncio.run(_cancelled(system, inputs, 4, rng))
        before = left_behind(system)
        cancels = asyncio.run(_cancelled(system, inputs, trials, rng))
        time.sleep(3)  # what was cancelled last is let go of
        after = left_behind(system)
        lags = freed_after(system.stage_log(), cancels)
    rows: dict[str, int | float | str] = {
        "cancels": trials,
        "stage calls that they met": len(lags),
        "cancel to free slot, p50, ms": 1000 * percentile(lags, 0.5),
        "cancel to free slot, p99, ms": 1000 * percentile(lags, 0.99),
        "one step and 100 ms, ms": 1000 * (COSTS["Denoise"] + 0.1),
    }
    for what in before:
        rows[f"{what}, before"], rows[f"{what}, after"] = before[what], after[what]
    return Table("cancel at a random moment", rows)


async def _cancelled(system: System, inputs: Inputs, trials: int, rng: random.Random) -> dict[str, float]:
    """When each generation, by what the stages know it as, was cancelled."""
    cancels: dict[str, float] = {}
    rooms = asyncio.Semaphore(_AT_ONCE)
    async with system.async_client() as client, asyncio.TaskGroup() as group:
        for number in range(trials):
            await rooms.acquire()
            group.create_task(_one(client, inputs, rng.randrange(1, 2**31), rng.random() * _JOB_S, rooms, cancels))
            if number % 100 == 99:
                print(f"{number + 1} of {trials}", flush=True)
    return cancels


async def _one(
    client: AsyncClient,
    inputs: Inputs,
    seed: int,
    after_s: float,
    rooms: asyncio.Semaphore,
    cancels: dict[str, float],
) -> None:
    try:
        generation = await client.create(inputs.request(seed, _STEPS))
        await asyncio.sleep(after_s)
        when = time.monotonic()
        await client.cancel(generation.name)
        cancels[str(seed)] = when
        async for _ in client.watch(generation.name):
            pass
        assert (await client.get(generation.name)).state in _ENDED
    finally:
        rooms.release()


def freed_after(log: list[tuple[float, str, str]], cancels: dict[str, float]) -> list[float]:
    """Seconds from each cancel to the end of the calls of its generation that were under way."""
    begun: dict[tuple[str, str], float] = {}
    lags = []
    for when, what, of in log:
        kind, _, rpc = what.partition(" ")
        seed = of.removeprefix("seed ")
        if kind == "begin":
            begun[rpc, seed] = when
        elif kind == "left" and seed in cancels and begun.get((rpc, seed), when) < cancels[seed] < when:
            lags.append(when - cancels[seed])
    return lags


def left_behind(system: System) -> dict[str, int]:
    """What there is of everything that could leak."""
    found: defaultdict[str, int] = defaultdict(int)
    for name, process in system.processes.items():
        running = psutil.Process(process.pid)
        role = "gateway" if name.startswith("gateway") else "stages"
        found[f"threads of the {role}"] += running.num_threads()
        found[f"open files of the {role}"] += running.num_fds()
    found["temporary directories"] = len(list((system.directory / "tmp").iterdir()))
    found["outputs of generations under way"] = len(list((system.directory / "data" / "outputs").glob("jobs/*/*")))
    found["shared memory segments"] = len(list(system.shared_memory.iterdir()))
    with system.client() as client:
        stages = client.status().stages
        found["calls in the stages"] = sum(len(stage.status.work) for stage in stages)
    return dict(found)
