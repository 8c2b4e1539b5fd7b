"""Too much work, unequal callers, many watchers: refusals, shares, waiting of what is urgent, event lag."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing

import psutil

from benchmarks.reliability.system import (
    COSTS,
    FRAMES,
    SIDE,
    Inputs,
    System,
    Table,
    any_seed,
    percentile,
    running_system,
    uploaded,
)
from bunraku.client import AsyncClient, Retry
from bunraku.errors import Busy, NotReady
from bunraku.v1 import gateway_pb2 as pb
from gateway.callers.keys import KeyStore
from gateway.jobs.database import Database
from tests.system.media import write_picture, write_pose_video

SUCCEEDED = pb.GENERATION_STATE_SUCCEEDED
_QUICK = {**dict.fromkeys(COSTS, 0.0), "Denoise": 0.02}
_QUICK_STEPS = 5
_STEPS = 10
_CALLERS = ("heavy", "light", "lighter")


def overload(seconds: float, seed: int) -> Table:
    """Ten times as many submits as the denoiser can work off, with a queue of 20."""
    with running_system("sqlite", max_running=3, max_queued=20) as system:
        return asyncio.run(_overload(system, uploaded(system), seconds, random.Random(seed)))


async def _overload(system: System, inputs: Inputs, seconds: float, rng: random.Random) -> Table:
    client = AsyncClient(system.gateways[0], retry=Retry(attempts=1))
    begun = time.monotonic()
    for name in [(await client.create(inputs.request(any_seed(rng), _STEPS))).name for _ in range(10)]:
        async for _ in client.watch(name):
            pass
    capacity = 10 / (time.monotonic() - begun)
    gateway = psutil.Process(system.processes["gateway-0"].pid)
    memory = [gateway.memory_info().rss]
    accepted: list[str] = []
    refused: list[float] = []
    told: list[float] = []
    unavailable: list[float] = []

    async def submit() -> None:
        asked = time.monotonic()
        try:
            accepted.append((await client.create(inputs.request(any_seed(rng), _STEPS))).name)
        except Busy as error:
            refused.append(time.monotonic() - asked)
            told.append(error.retry_after_s or 0.0)
        except NotReady:  # too slow to tell whether there is room
            unavailable.append(time.monotonic() - asked)

    begun, number = time.monotonic(), 0
    async with asyncio.TaskGroup() as group:
        while (now := time.monotonic()) - begun < seconds:
            group.create_task(submit())
            number += 1
            if number % 50 == 0:
                memory.append(gateway.memory_info().rss)
            await asyncio.sleep(max(0.0, begun + number / (10 * capacity) - now))
    states: Counter[int] = Counter()
    for name in accepted:
        async for _ in client.watch(name):
            pass
        states[(await client.get(name)).state] += 1
    memory.append(gateway.memory_info().rss)
    await client.close()
    mib = [size / 2**20 for size in memory]
    return Table(
        "ten times the load, a queue of 20",
        {
            "capacity, generations/s": capacity,
            "seconds": seconds,
            "submits": number,
            "accepted": len(accepted),
            "of them that succeeded": states[SUCCEEDED],
            "refused": len(refused),
            "refusal, p50, ms": 1000 * percentile(refused, 0.5),
            "refusal, p99, ms": 1000 * percentile(refused, 0.99),
            "answered UNAVAILABLE": len(unavailable),
            "told to come back after at least, s": min(told),
            "told to come back after at most, s": max(told),
            "memory of the gateway at the begin, MiB": mib[0],
            "in the middle, MiB": mib[len(mib) // 2],
            "at the end, MiB": mib[-1],
        },
    )


def fairness(generations: int, seed: int) -> Table:
    """Three callers that offer 10 : 1 : 1, all more than their share."""
    with running_system("sqlite", costs=_QUICK, max_running=2, require_keys=True) as system:
        return asyncio.run(_fairness(system, generations, random.Random(seed)))


def urgent(trials: int, seed: int) -> Table:
    """One of high priority comes while one of low priority is denoised."""
    with running_system("sqlite", max_running=2, checkpoint_every_steps=2) as system:
        return asyncio.run(_urgent(system, uploaded(system), trials, random.Random(seed)))


async def _fairness(system: System, generations: int, rng: random.Random) -> Table:
    """Steps of the denoiser that each caller gets until one of those with little to do has got all it wanted."""
    clients = await _callers(system)
    callers: dict[str, str] = {}
    names = dict[str, list[str]]()
    offers = {"heavy": 10 * generations, "light": generations, "lighter": generations}
    for caller, client in clients.items():
        inputs = await _uploaded(system, client)
        requests = [inputs.request(any_seed(rng), _QUICK_STEPS) for _ in range(offers[caller])]
        callers |= {str(request.sampling.seed): caller for request in requests}
        names[caller] = [(await client.create(request)).name for request in requests]
    begun = time.monotonic()
    waiting = [asyncio.create_task(_all_ended(clients[caller], names[caller])) for caller in ("light", "lighter")]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    until = time.monotonic()
    log = [(of.split()[0], when) for when, what, of in system.stage_log() if what == "step"]
    steps = Counter(callers[seed] for seed, when in log if begun < when < until)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for client in clients.values():
        await client.close()
    shares = [steps[caller] for caller in _CALLERS]
    jain = sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))
    return Table(
        "three callers offer 10 : 1 : 1",
        {
            "generations offered": " : ".join(str(offers[caller]) for caller in _CALLERS),
            "steps of the denoiser given": " : ".join(map(str, shares)),
            "Jain index": jain,
        },
    )


async def _callers(system: System) -> dict[str, AsyncClient]:
    """A client with a key for each caller."""
    keys = KeyStore(Database(system.directory / "data" / "gateway.sqlite"))
    clients = {}
    for caller in _CALLERS:
        _, secret = await keys.create(caller)
        clients[caller] = AsyncClient(system.gateways[0], api_key=secret)
    await keys.database.close()
    return clients


async def _uploaded(system: System, client: AsyncClient) -> Inputs:
    picture = await client.upload(write_picture(system.directory / "ref.png", SIDE, SIDE))
    pose = await client.upload(write_pose_video(system.directory / "pose.mp4", FRAMES, SIDE, SIDE))
    return Inputs(picture.name, pose.name)


async def _all_ended(client: AsyncClient, names: list[str]) -> None:
    for name in names:
        async for _ in client.watch(name):
            pass


async def _urgent(system: System, inputs: Inputs, trials: int, rng: random.Random) -> Table:
    """How long the denoiser goes on with a low one when a high one is ready for it."""
    client = AsyncClient(system.gateways[0])
    waits = []
    for _ in range(trials):
        low = (await client.create(inputs.request(any_seed(rng), 60))).name
        await _steps_of(client, low, 3)
        seed = any_seed(rng)
        high = (await client.create(inputs.request(seed, 10, priority=9))).name
        async for _ in client.watch(high):
            pass
        waits.append(_waited(system.stage_log(), seed))
        async for _ in client.watch(low):
            pass
        assert (await client.get(low)).state == SUCCEEDED
    await client.close()
    return Table(
        "urgent generation while a low one is denoised",
        {
            "trials": trials,
            "from ready for the denoiser to the denoiser, p50, ms": 1000 * percentile(waits, 0.5),
            "from ready for the denoiser to the denoiser, longest, ms": 1000 * max(waits),
            "one step, ms": 1000 * COSTS["Denoise"],
        },
    )


async def _steps_of(client: AsyncClient, name: str, count: int) -> None:
    async with aclosing(client.watch(name)) as events:
        async for event in events:
            if event.progress.stage == "denoise" and event.progress.completed >= count:
                return


def _waited(log: list[tuple[float, str, str]], seed: int) -> float:
    """From the end of the last encoding to the begin of the denoise."""
    begun = next(when for when, what, of in log if what == "begin Denoise" and of == str(seed))
    return begun - max(when for when, what, _ in log if what.startswith("end Encode") and when < begun)


def events(watchers: int, seed: int) -> Table:
    """How late events are for one watcher, and for many on one generation, each of which reopens its watch once."""
    rng, rows = random.Random(seed), dict[str, int | float | str]()
    # so many are told of steps as long as those of a real model
    for count, costs, steps in ((1, COSTS, 100), (watchers, {**COSTS, "Denoise": 1.0}, 20)):
        with running_system("sqlite", costs=costs) as system:
            lags, whole = asyncio.run(_watched(system, uploaded(system), count, steps, rng))
        rows[f"{count} watchers: lag, p50, ms"] = 1000 * percentile(lags, 0.5)
        rows[f"{count} watchers: lag, p99, ms"] = 1000 * percentile(lags, 0.99)
        rows[f"{count} watchers: without gap or repeat"] = whole
    return Table("from the end of a step to the watcher", rows)


async def _watched(
    system: System, inputs: Inputs, count: int, steps: int, rng: random.Random
) -> tuple[list[float], int]:
    """Seconds from each step's end to each watcher, and how many saw every event once."""
    # channels of their own, as watchers on other machines have
    clients = [AsyncClient(system.gateways[0], retry=Retry(attempts=1)) for _ in range(max(1, count // 100))]
    seed, seen = any_seed(rng), {}
    name = (await clients[0].create(inputs.request(seed, steps))).name
    arrivals: list[tuple[int, float]] = []

    async def watch(number: int) -> None:
        sequences: list[int] = []
        reopen_after, client = rng.randrange(3, 20), clients[number % len(clients)]
        for part in (reopen_after, None):
            async with aclosing(client.watch(name, after_sequence=sequences[-1] if sequences else 0)) as events:
                async for event in events:
                    if event.WhichOneof("event") == "queue":
                        continue
                    sequences.append(event.sequence)
                    if event.progress.stage == "denoise" and 0 < event.progress.completed < steps:
                        arrivals.append((event.progress.completed, time.monotonic()))
                    if part is not None and len(sequences) >= part:
                        break
        seen[number] = sequences

    await asyncio.gather(*[watch(number) for number in range(count)])
    for client in clients:
        await client.close()
    ended = {
        int(of.split()[1]): when
        for when, what, of in system.stage_log()
        if what == "step" and of.split()[0] == str(seed)
    }
    whole = sum(sequences == list(range(1, len(sequences) + 1)) for sequences in seen.values())
    return [when - ended[step] for step, when in arrivals], whole
