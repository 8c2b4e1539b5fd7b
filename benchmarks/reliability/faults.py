"""Processes killed or frozen at random moments, and the database away: what is lost, repeated or late."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.reliability.system import Inputs, System, Table, any_seed, percentile, running_system, uploaded
from bunraku.client import AsyncClient, Retry
from bunraku.errors import BunrakuError, NotReady
from bunraku.v1 import gateway_pb2 as pb
from tests.system.media import read_video

_STEPS = 30
_JOBS_PER_TRIAL = 2
_TRIAL_S = 5.0  # about what the generations of a trial take
_FROZEN_S = 14.0  # longer than a lease
_CHECKPOINT_EVERY = 5
_PATIENCE_S = 90.0
_SETTLED_S = 0.5  # what ended less than this before a kill may not have been kept yet
_OUTAGE_S = 10.0
SUCCEEDED, RUNNING = pb.GENERATION_STATE_SUCCEEDED, pb.GENERATION_STATE_RUNNING


@dataclass
class Tally:
    """What was counted over all trials."""

    generations: int = 0
    lost: int = 0
    twice: int = 0
    different: int = 0
    stages_repeated: int = 0
    oldest_checkpoint: int = 0
    resumed_s: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def table(self, title: str, trials: int) -> Table:
        rows: dict[str, int | float | str] = {"trials": trials, "generations": self.generations}
        rows |= dict(sorted(self.faults.items()))
        rows |= {
            "lost": self.lost,
            "results twice": self.twice,
            "results that differ from the undisturbed": self.different,
            "finished stages repeated": self.stages_repeated,
            "oldest checkpoint that a denoise went on from, steps": self.oldest_checkpoint,
            "from the fault to the denoiser going on, longest, s": max(self.resumed_s, default=0.0),
        }
        return Table(title, rows)


def kill(database: str, trials: int, seed: int) -> Table:
    """One process is killed or frozen in each trial, at a random moment; two gateways on PostgreSQL."""
    gateways = 2 if database == "postgresql" else 1
    tally = Tally()
    with running_system(database, gateways=gateways, checkpoint_every_steps=_CHECKPOINT_EVERY) as system:
        asyncio.run(_trials(system, uploaded(system), trials, random.Random(seed), tally))
    return tally.table(f"kill -9 or SIGSTOP, {database}, {gateways} gateway(s)", trials)


async def _trials(system: System, inputs: Inputs, trials: int, rng: random.Random, tally: Tally) -> None:
    clients = [
        AsyncClient(address, retry=Retry(attempts=60, longest_wait_s=0.5), call_timeout_s=5.0)
        for address in system.gateways
    ]
    try:
        seeds = [any_seed(rng) for _ in range(_JOBS_PER_TRIAL)]
        expected = {}
        for seed in seeds:
            generation = await _ended(clients, (await clients[0].create(inputs.request(seed, _STEPS))).name)
            expected[seed] = await _frames(clients[0], generation)
        for number in range(trials):
            await _trial(system, inputs, clients, expected, rng, tally)
            if number % 10 == 9:
                print(f"{number + 1} of {trials}: {tally}", flush=True)
    finally:
        for client in clients:
            await client.close()


async def _trial(
    system: System,
    inputs: Inputs,
    clients: list[AsyncClient],
    expected: dict[int, npt.NDArray[np.uint8]],
    rng: random.Random,
    tally: Tally,
) -> None:
    requests = {seed: inputs.request(seed, _STEPS) for seed in expected}
    for request in requests.values():
        request.animate.prompt += f" {time.monotonic()}"  # nothing of an earlier trial is found in the cache
    begun = time.monotonic()
    names = {}
    for seed, request in requests.items():
        names[seed] = (await rng.choice(clients).create(request)).name
    victim = rng.choice(list(system.processes))
    frozen = rng.random() < 0.3
    await asyncio.sleep(rng.random() * _TRIAL_S)
    system.processes[victim].send(signal.SIGSTOP if frozen else signal.SIGKILL)
    fault = time.monotonic()
    kind = "gateway" if victim.startswith("gateway") else victim
    tally.faults[f"{'SIGSTOP' if frozen else 'kill -9'} of {kind}"] += 1
    thawing = asyncio.create_task(_thaw(system, victim)) if frozen else None
    living = [c for n, c in enumerate(clients) if not (frozen and victim == f"gateway-{n}")] or clients
    for seed, name in names.items():
        tally.generations += 1
        try:
            async with asyncio.timeout(_PATIENCE_S):
                generation = await _ended(living, name)
            if generation.state != SUCCEEDED:
                tally.lost += 1
                print(f"{name} after {kind}: {generation.error}", flush=True)
                continue
            if not np.array_equal(await _frames(living[0], generation), expected[seed]):
                tally.different += 1
        except (TimeoutError, BunrakuError) as error:
            tally.lost += 1
            print(f"{name} after {kind}: {error!r}", flush=True)
            continue
        events = [event async for event in living[0].watch(name)]
        tally.twice += sum(event.generation.state == SUCCEEDED for event in events) - 1
    if thawing is not None:
        await thawing
        await asyncio.sleep(2)  # it finds out that it was left behind
    _count_repeated(system, requests, begun, fault, tally)


def _count_repeated(
    system: System, requests: dict[int, pb.CreateGenerationRequest], begun: float, fault: float, tally: Tally
) -> None:
    log = [entry for entry in system.stage_log() if entry[0] >= begun]
    prompts = {request.animate.prompt for request in requests.values()}
    ended = Counter(of for when, what, of in log if what == "end EncodeText" and when < fault - _SETTLED_S)
    again = Counter(of for when, what, of in log if what == "begin EncodeText" and when > fault)
    tally.stages_repeated += sum(1 for prompt in prompts if ended[prompt] and again[prompt])
    for seed in map(str, requests):
        reached = max((int(step) for when, step in _told(log, "step", seed) if when < fault), default=0)
        starts = [(when, int(step)) for when, step in _told(log, "start", seed) if when > fault]
        if reached and starts:
            tally.oldest_checkpoint = max(tally.oldest_checkpoint, reached - starts[0][1])
        if reached and (later := [when for when, _ in starts or _told(log, "step", seed) if when > fault]):
            tally.resumed_s.append(min(later) - fault)


def _told(log: list[tuple[float, str, str]], what: str, seed: str) -> list[tuple[float, str]]:
    """When the denoiser told something of a seed, and the step that it was about."""
    return [(when, of.split()[1]) for when, told, of in log if told == what and of.split()[0] == seed]


async def _thaw(system: System, victim: str) -> None:
    await asyncio.sleep(_FROZEN_S)
    system.processes[victim].send(signal.SIGCONT)


async def _ended(clients: list[AsyncClient], name: str) -> pb.Generation:
    """A generation once it has ended, asked of whichever gateway answers."""
    while True:
        for client in clients:
            with contextlib.suppress(BunrakuError):
                generation = await client.get(name)
                if generation.end_time.seconds:
                    return generation
        await asyncio.sleep(0.1)


async def _frames(client: AsyncClient, generation: pb.Generation) -> npt.NDArray[np.uint8]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "video.mp4"
        await client.download(generation.video, path)
        return read_video(path)


def outage(seed: int) -> Table:
    """PostgreSQL is stopped for ten seconds under running and waiting generations of two gateways."""
    with running_system("postgresql", gateways=2, max_running=3) as system:
        return asyncio.run(_outage(system, uploaded(system), random.Random(seed)))


async def _outage(system: System, inputs: Inputs, rng: random.Random) -> Table:
    assert system.postgresql is not None
    clients = [AsyncClient(address, retry=Retry(attempts=1)) for address in system.gateways]
    names = [(await clients[n % 2].create(inputs.request(any_seed(rng), 60))).name for n in range(8)]
    await asyncio.sleep(3)
    steps_before = sum(what == "step" for _, what, _ in system.stage_log())
    await asyncio.to_thread(system.postgresql.stop)
    stopped = time.monotonic()
    refusals: list[float] = []
    while time.monotonic() - stopped < _OUTAGE_S:
        begun = time.monotonic()
        try:
            await rng.choice(clients).create(inputs.request(any_seed(rng), 5))
            raise AssertionError("a submit was taken while the database was away")
        except NotReady:
            refusals.append(time.monotonic() - begun)
        await asyncio.sleep(0.05)
    steps_meanwhile = sum(what == "step" for _, what, _ in system.stage_log()) - steps_before
    await asyncio.to_thread(system.postgresql.start)
    back = time.monotonic()
    while True:
        with contextlib.suppress(NotReady):
            await clients[0].create(inputs.request(any_seed(rng), 5))
            break
        await asyncio.sleep(0.05)
    taken_s = time.monotonic() - back
    async with asyncio.timeout(240):
        ends = [await _ended(clients, name) for name in names]
    for client in clients:
        await client.close()
    return Table(
        "PostgreSQL away for 10 s, two gateways",
        {
            "generations running or waiting": len(names),
            "of them that succeeded": sum(end.state == SUCCEEDED for end in ends),
            "begun more than once": sum(end.attempts > 1 for end in ends),
            "steps of the denoiser meanwhile": steps_meanwhile,
            "submits refused": len(refusals),
            "refusal, p50, ms": 1000 * percentile(refusals, 0.5),
            "refusal, slowest, ms": 1000 * max(refusals),
            "next submit taken after it was back, ms": 1000 * taken_s,
        },
    )
