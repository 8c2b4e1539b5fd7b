"""What survives: `python -m benchmarks.reliability SCENARIO [--scale S] [--seed N]`.

Real gateways, stages with the real contracts whose work is to sleep, real databases; each scenario prints its table.
With --scale 1 the numbers of trials are those that docs/reliability.md is to show; less is quicker.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks.reliability.cancels import cancel
from benchmarks.reliability.faults import kill, outage
from benchmarks.reliability.loads import events, fairness, overload, urgent
from benchmarks.reliability.system import Table

SCENARIOS: dict[str, Callable[[float, int], Table]] = {
    "cancel": lambda scale, seed: cancel(max(1, round(1000 * scale)), seed),
    "kill-sqlite": lambda scale, seed: kill("sqlite", max(1, round(200 * scale)), seed),
    "kill-postgresql": lambda scale, seed: kill("postgresql", max(1, round(200 * scale)), seed),
    "outage": lambda scale, seed: outage(seed),
    "overload": lambda scale, seed: overload(max(5.0, 60 * scale), seed),
    "fairness": lambda scale, seed: fairness(max(5, round(40 * scale)), seed),
    "urgent": lambda scale, seed: urgent(max(3, round(30 * scale)), seed),
    "events": lambda scale, seed: events(max(10, round(1000 * scale)), seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=[*SCENARIOS, "all"])
    parser.add_argument("--scale", type=float, default=1.0, help="part of the trials")
    parser.add_argument("--seed", type=int, default=1, help="of what is chosen at random")
    arguments = parser.parse_args()
    for name in SCENARIOS if arguments.scenario == "all" else [arguments.scenario]:
        print(f"{SCENARIOS[name](arguments.scale, arguments.seed)}\n", flush=True)


if __name__ == "__main__":
    main()
