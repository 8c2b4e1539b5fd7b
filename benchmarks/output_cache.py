"""What it takes to find an output that was made before: real files, and a stage that would have cost something.

`python -m benchmarks.output_cache` prints the milliseconds of a hit for outputs of several sizes (16 MiB are the
embeddings of a prompt and a negative prompt in float32 in the released models), with the search for the stage's
revision and the reading of the file, whether every bit is the same, and how often the encoder was called.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.stub_stages import stub_stages
from gateway.blobs import DirectoryBlobs
from gateway.outputs import OutputStore, Recipe, StageOutput
from gateway.stages import Stages, Work, connect
from runtime.client import Budget
from runtime.tensors import WireTensor
from tests.gateway.test_animate import Told

MIB = 2**20
SIZES_MIB = (1, 4, 16, 64)
TARGET_MS = 10.0
ENCODER_S = 0.05


async def measure(addresses: dict[str, list[str]], directory: Path, rounds: int) -> None:
    stages = connect(addresses, None)
    store = OutputStore(DirectoryBlobs(directory))
    try:
        print("| | median, ms | 95th percentile, ms | bit-identical | encoder called |")
        print("| --- | ---: | ---: | --- | ---: |")
        await through_the_stage(stages, store, rounds)
        for size_mib in SIZES_MIB:
            await of_size(stages, store, size_mib, rounds)
    finally:
        await stages.close()


async def through_the_stage(stages: Stages, store: OutputStore, rounds: int) -> None:
    """`encode_text` as a pipeline calls it: made once, found ever after."""

    def work(job: int) -> Work:
        outputs = store.of_job(f"{job:032x}", caller="", claim="1")
        return Work(f"generations/{job}", Budget.of(600), Told(), outputs=outputs)

    begun = time.perf_counter()
    made = await stages.encoder.encode_text(work(0), "a dance", "blurry")
    print(f"| text, made (the encoder takes {1000 * ENCODER_S:.0f} ms) | {since_ms(begun):.1f} | | | 1 |")
    times, found = [], []
    for job in range(rounds):
        begun = time.perf_counter()
        found.append(await stages.encoder.encode_text(work(job + 1), "a dance", "blurry"))
        times.append(since_ms(begun))
    line("text, found", times, all(same(each, made) for each in found), 0)


async def of_size(stages: Stages, store: OutputStore, size_mib: int, rounds: int) -> None:
    outputs = store.of_job("1", caller="", claim="1")
    content = np.random.default_rng(0).integers(0, 256, size_mib * MIB, np.uint8)
    revisions = await stages.encoder.client.revisions()
    made = StageOutput({"x": WireTensor.from_numpy("x", content)}, {}, next(iter(revisions)))
    recipe = Recipe("encoder", "EncodeText", size_mib.to_bytes(4))
    await outputs.keep(recipe, made)
    times, equal = [], True
    for _ in range(rounds):
        begun = time.perf_counter()
        found = await outputs.find(recipe, await stages.encoder.client.revisions())
        times.append(since_ms(begun))
        equal = equal and found is not None and same(found, made)
    line(f"{size_mib} MiB, found", times, equal, 0)


def same(one: StageOutput, other: StageOutput) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        np.array_equal(tensor.data, other.tensors[name].data) for name, tensor in one.tensors.items()
    )


def since_ms(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000


def line(name: str, times: Sequence[float], equal: bool, calls: int) -> None:
    median = statistics.median(times)
    tail = statistics.quantiles(times, n=20)[-1]
    verdict = "" if median <= TARGET_MS else f" (**above {TARGET_MS:g}**)"
    print(f"| {name} | {median:.2f}{verdict} | {tail:.2f} | {'yes' if equal else '**no**'} | {calls} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory, stub_stages({"EncodeText": ENCODER_S}, 9) as stubs:
        addresses = {stage: [address] for stage, address in stubs.addresses.items()}
        asyncio.run(measure(addresses, Path(directory), rounds))
        calls = len(stubs.spans()["encoder"])
    assert calls == 1, f"the encoder was called {calls} times"


if __name__ == "__main__":
    main()
