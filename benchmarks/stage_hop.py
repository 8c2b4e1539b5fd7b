"""What handing 20 MB from one process to another costs: the conditioning of a large clip on its way to the denoiser.

`python -m benchmarks.stage_hop [--rounds N]` sends it through shared memory and over TCP, in turn with a bare byte
stream over gRPC and with one copy in memory, and holds the medians against the targets. See benchmarks.tensor_stream for
what each of these is and for other sizes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics

from benchmarks.tensor_stream import Costs, in_turn, payload, two_processes, ways_to_send
from runtime.tensors import CHUNK_BYTES

SIZE_BYTES = 20_000_000
SHARED_TARGET_MS = 5.0
TCP_TARGET = 1.3


async def measure(rounds: int) -> None:
    async with two_processes(CHUNK_BYTES) as sender:
        costs = await in_turn(sender, ways_to_send(sender, payload(SIZE_BYTES)), rounds)
    print(f"{SIZE_BYTES / 1e6:.0f} MB from process to process, {rounds} rounds in turn, milliseconds:\n")
    print("| | median | best | 95th percentile |\n| --- | ---: | ---: | ---: |")
    for name, taken in costs.items():
        times = [1000 * cost.wall_s for cost in taken]
        tail = statistics.quantiles(times, n=20)[-1]
        print(f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} | {tail:.1f} |")
    shared_ms = 1000 * statistics.median(cost.wall_s for cost in costs["shared"])
    print("\n| target | measured | |\n| --- | ---: | --- |")
    print(
        f"| shared memory: at most {SHARED_TARGET_MS:g} ms | {shared_ms:.1f} ms | {met(shared_ms, SHARED_TARGET_MS)} |"
    )
    for bare in ("bare", "bare, kept"):
        factor = slower(costs, bare)
        print(f"| TCP: at most {TCP_TARGET} times {bare} | {factor:.2f} times | {met(factor, TCP_TARGET)} |")


def slower(costs: Costs, bare: str) -> float:
    """How many times as long as a bare stream the project's takes: the median over the rounds."""
    pairs = zip(costs["tensors"], costs[bare], strict=True)
    return statistics.median(ours.wall_s / theirs.wall_s for ours, theirs in pairs)


def met(measured: float, target: float) -> str:
    return "met" if measured <= target else "**missed**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
