"""A simulated week of arrivals through the scaling rules of k8s/components/keda, against fixed fleets.

`python -m benchmarks.scaling [--plot FILE] [--seed N]` prints GPU hours and waiting times and draws the week. Every 15
simulated seconds the rules see what Prometheus would: generations that wait or run, times what one costs each stage.
Thresholds, bounds and policies are read from the manifests. A replica that is asked for serves after its node has come
and its weights are loaded; one that is let go finishes what it has. A stage's GPU counts from its request to its end.

Costs of a generation of 81 frames at 896x512 in 30 steps with guidance, on an H100: the denoiser and the VAE as
measured (docs/figures.md); encoder and pose are assumed, as they were not measured at full size on a GPU.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KEDA = Path(__file__).resolve().parent.parent / "k8s/components/keda/scaled-objects.yaml"
HOUR_S, DAY_S, WEEK_S = 3600.0, 86_400.0, 7 * 86_400.0
STAGES = ("encoder", "pose", "denoiser", "vae")

# Seconds of one window of 81 frames
ENCODER_S = 1.0  # assumed
POSE_S = 3.0  # assumed
VAE_ENCODE_S = 1.81 / 4 + 0.1  # measured at full size; pose frames are half as wide and high
DENOISE_S = 30 * 2 * 6.24  # measured: 30 steps, two forwards each
DECODE_S = 2.92  # measured
# Share of a GPU that a replica takes: MIG 2g.20gb, 1g.10gb, a whole one
GPU_SHARE = {"encoder": 2 / 7, "pose": 1 / 7, "denoiser": 1.0, "vae": 2 / 7}
# A node of the pool comes in 3 minutes; the weights come over the network at 200 MB/s
START_S = {"encoder": 180 + 63, "pose": 180 + 12, "denoiser": 180 + 83, "vae": 180 + 5}
# Windows of a generation and how often they are asked for
WINDOWS = ((1, 0.7), (2, 0.2), (4, 0.1))
MEAN_WINDOWS = sum(windows * share for windows, share in WINDOWS)
MEAN_S = {
    "encoder": ENCODER_S,
    "pose": POSE_S * MEAN_WINDOWS,
    "denoiser": DENOISE_S * MEAN_WINDOWS,
    "vae": (VAE_ENCODE_S + DECODE_S) * MEAN_WINDOWS,
}
# Generations per hour of a working day, by its hours, and bursts on top: day, hour, hours, per hour
BY_HOUR = (3, 2, 2, 2, 2, 4, 8, 18, 36, 48, 52, 50, 44, 48, 52, 50, 46, 40, 32, 26, 20, 14, 8, 5)
WEEKEND = 0.35
BURSTS = ((1, 14, 0.5, 120), (3, 10, 1.0, 80), (5, 20, 0.5, 100))


@dataclass(frozen=True)
class Rule:
    """A ScaledObject."""

    minimum: int
    maximum: int
    threshold_s: float
    polling_s: float
    cooldown_s: float
    stabilization_s: float
    up_percent: float
    up_pods: int
    up_period_s: float
    down_pods: int
    down_period_s: float

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Rule:
        spec = manifest["spec"]
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        percent, pods = behavior["scaleUp"]["policies"]
        (down,) = behavior["scaleDown"]["policies"]
        return cls(
            spec["minReplicaCount"],
            spec["maxReplicaCount"],
            float(spec["triggers"][0]["metadata"]["threshold"]),
            spec["pollingInterval"],
            spec["cooldownPeriod"],
            behavior["scaleDown"]["stabilizationWindowSeconds"],
            percent["value"],
            pods["value"],
            pods["periodSeconds"],
            down["value"],
            down["periodSeconds"],
        )


def rules() -> dict[str, Rule]:
    """The rules of the manifests by stage."""
    return {each["metadata"]["name"]: Rule.of(each) for each in yaml.safe_load_all(KEDA.read_text())}


@dataclass
class Fleet:
    """The replicas of a stage and the work that waits for them.

    Attributes:
        replicas: that are asked for.
        ready: of them, those that have come up.
        busy: replicas in work, those that leave afterwards included.
        leaving: were let go and finish their work.
    """

    stage: str
    replicas: int
    ready: int
    busy: int = 0
    leaving: int = 0
    waiting: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)
    gpu_seconds: float = 0.0
    counted_at: float = 0.0

    def count(self, now: float) -> None:
        """Adds what the replicas have cost since the last time, those that finish their work included."""
        self.gpu_seconds += (self.replicas + self.leaving) * GPU_SHARE[self.stage] * (now - self.counted_at)
        self.counted_at = now


@dataclass
class Autoscaler:
    """Follows a rule as KEDA and the HorizontalPodAutoscaler do."""

    rule: Rule
    wanted: deque[tuple[float, int]] = field(default_factory=deque)
    active_at: float = 0.0
    changed: deque[tuple[float, int]] = field(default_factory=deque)  # when, and by how many

    def replicas(self, now: float, current: int, work_s: float) -> int:
        """How many there should be."""
        rule = self.rule
        if work_s > 0:
            self.active_at = now
        wanted = min(rule.maximum, max(rule.minimum, math.ceil(work_s / rule.threshold_s)))
        if current and abs(work_s / (rule.threshold_s * current) - 1) <= 0.1:
            wanted = current  # the tolerance of the HorizontalPodAutoscaler
        self.wanted.append((now, wanted))
        while self.wanted[0][0] < now - rule.stabilization_s:
            self.wanted.popleft()
        while self.changed and self.changed[0][0] < now - max(rule.up_period_s, rule.down_period_s):
            self.changed.popleft()
        if wanted > current:
            base = current - self._within(now, rule.up_period_s, 1)
            limit = max(base + rule.up_pods, math.ceil(base * (1 + rule.up_percent / 100)))
            result = min(wanted, max(current, limit))
        else:
            highest = max(count for _, count in self.wanted)
            allowed = rule.down_pods - self._within(now, rule.down_period_s, -1)
            idle = work_s == 0 and now - self.active_at >= rule.cooldown_s
            lowest = rule.minimum if idle else max(1, rule.minimum)
            result = max(lowest, min(current, highest), current - max(0, allowed)) if current else current
        if result != current:
            self.changed.append((now, result - current))
        return result

    def _within(self, now: float, period_s: float, sign: int) -> int:
        return sum(abs(by) for at, by in self.changed if at > now - period_s and by * sign > 0)


@dataclass
class Result:
    """A week: GPU hours, the wait of each generation for its denoiser beyond what it computes, and the GPUs over time."""

    gpu_hours: float = 0.0
    waits: list[tuple[float, float]] = field(default_factory=list)  # arrival, seconds
    gpus: list[tuple[float, float]] = field(default_factory=list)


class Simulation:
    """One week of one fleet.

    Args:
        arrivals: when generations come and their windows.
        fixed: replicas of each stage; None: as the rules say.
    """

    def __init__(self, arrivals: list[tuple[float, int]], fixed: dict[str, int] | None) -> None:
        self._arrivals, self._fixed = arrivals, fixed
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now, self._outstanding = 0.0, 0
        self._scalers = {stage: Autoscaler(rule) for stage, rule in rules().items()} if fixed is None else {}
        start = fixed or {stage: scaler.rule.minimum for stage, scaler in self._scalers.items()}
        self._fleets = {stage: Fleet(stage, start[stage], start[stage]) for stage in STAGES}
        self._result = Result()

    def run(self) -> Result:
        """Until the last generation of the week has ended."""
        for at, windows in self._arrivals:
            self._at(at, lambda windows=windows: self._arrive(windows))  # type: ignore[misc]  # a default binds it
        if self._scalers:
            self._at(0.0, self._scale)
        while self._events and (self._outstanding or self._now < WEEK_S):
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        for fleet in self._fleets.values():
            fleet.count(self._now)
        self._result.gpu_hours = sum(fleet.gpu_seconds for fleet in self._fleets.values()) / HOUR_S
        return self._result

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    def _arrive(self, windows: int) -> None:
        self._outstanding += 1
        arrived, missing = self._now, 3
        computing_s = max(ENCODER_S, POSE_S * windows) + windows * (DENOISE_S + DECODE_S)

        def conditioned() -> None:
            nonlocal missing
            missing -= 1
            if missing == 0:
                self._do("denoiser", DENOISE_S * windows, lambda: self._do("vae", DECODE_S * windows, ended))

        def ended() -> None:
            self._outstanding -= 1
            self._result.waits.append((arrived, max(0.0, self._now - arrived - computing_s)))

        self._do("encoder", ENCODER_S, conditioned)
        self._do("pose", POSE_S * windows, conditioned)
        self._do("vae", VAE_ENCODE_S * windows, conditioned)

    def _do(self, stage: str, seconds: float, then: Callable[[], None]) -> None:
        self._fleets[stage].waiting.append((seconds, then))
        self._begin(self._fleets[stage])

    def _begin(self, fleet: Fleet) -> None:
        while fleet.waiting and fleet.busy - fleet.leaving < fleet.ready:
            seconds, then = fleet.waiting.popleft()
            fleet.busy += 1
            self._at(self._now + seconds, lambda then=then: self._end(fleet, then))  # type: ignore[misc]  # binds it

    def _end(self, fleet: Fleet, then: Callable[[], None]) -> None:
        fleet.count(self._now)
        fleet.busy -= 1
        fleet.leaving -= bool(fleet.leaving)  # whichever ends first is the one that leaves
        then()
        self._begin(fleet)

    def _scale(self) -> None:
        for stage, scaler in self._scalers.items():
            fleet = self._fleets[stage]
            fleet.count(self._now)
            wanted = scaler.replicas(self._now, fleet.replicas, self._outstanding * MEAN_S[stage])
            for _ in range(wanted - fleet.replicas):
                self._at(self._now + START_S[stage], lambda fleet=fleet: self._ready(fleet))  # type: ignore[misc]  # binds
            if wanted < fleet.replicas:
                self._let_go(fleet, fleet.replicas - wanted)
            fleet.replicas = wanted
        gpus = sum((fleet.replicas + fleet.leaving) * GPU_SHARE[stage] for stage, fleet in self._fleets.items())
        self._result.gpus.append((self._now, gpus))
        self._at(self._now + min(scaler.rule.polling_s for scaler in self._scalers.values()), self._scale)

    def _let_go(self, fleet: Fleet, count: int) -> None:
        """Replicas that have nothing to do go first; others finish what they have."""
        for _ in range(min(count, fleet.ready)):
            fleet.ready -= 1
            fleet.leaving += fleet.busy - fleet.leaving > fleet.ready

    def _ready(self, fleet: Fleet) -> None:
        if fleet.ready < fleet.replicas:  # not let go before it came up
            fleet.ready += 1
            self._begin(fleet)


def arrivals(seed: int) -> list[tuple[float, int]]:
    """A week of generations: when each comes, and how many windows it has."""
    draw = random.Random(seed)
    edges = list(itertools.accumulate(share for _, share in WINDOWS))
    highest = max(BY_HOUR) + max(rate for *_, rate in BURSTS)
    found, now = [], 0.0
    while (now := now + draw.expovariate(highest / HOUR_S)) < WEEK_S:
        # a Poisson process of a rate that changes, by thinning one of the highest rate
        if draw.random() < rate_at(now) / highest:
            windows = WINDOWS[min(bisect_right(edges, draw.random()), len(WINDOWS) - 1)][0]
            found.append((now, windows))
    return found


def rate_at(now: float) -> float:
    """Generations per hour."""
    day, hour = int(now // DAY_S), now % DAY_S / HOUR_S
    following = BY_HOUR[(int(hour) + 1) % 24]
    usual = BY_HOUR[int(hour)] + (following - BY_HOUR[int(hour)]) * (hour % 1)
    bursts = sum(rate for on, at, hours, rate in BURSTS if on == day and at <= hour < at + hours)
    return usual * (WEEKEND if day >= 5 else 1.0) + bursts


def fixed_fleet(denoisers: int) -> dict[str, int]:
    """So many denoisers, and enough of the others never to hold them up."""
    return {
        stage: denoisers if stage == "denoiser" else math.ceil(1.5 * denoisers * MEAN_S[stage] / MEAN_S["denoiser"])
        for stage in STAGES
    }


def compared(seed: int) -> Iterator[tuple[str, Result]]:
    """The rules, then a fixed fleet for the mean load, for twice the mean, and for as short a wait as the rules give."""
    week = arrivals(seed)
    scaled = Simulation(week, None).run()
    yield "scaled by the rules", scaled
    mean = math.ceil(sum(windows for _, windows in week) * DENOISE_S / WEEK_S)
    wait_s = percentile([wait for _, wait in scaled.waits], 95)
    for denoisers in itertools.count(mean):
        result = Simulation(week, fixed_fleet(denoisers)).run()
        enough = percentile([wait for _, wait in result.waits], 95) <= wait_s
        if enough or denoisers in (mean, 2 * mean):
            yield f"fixed, {denoisers} denoisers", result
        if enough:
            return


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="PNG file")
    arguments = parser.parse_args()
    results = list(compared(arguments.seed))
    print("| fleet | generations | GPU hours | wait: median, s | 95th percentile, s | longest, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, result in results:
        waits = [wait for _, wait in result.waits]
        figures = f"{statistics.median(waits):.0f} | {percentile(waits, 95):.0f} | {max(waits):.0f}"
        print(f"| {name} | {len(waits)} | {result.gpu_hours:,.0f} | {figures} |")
    if arguments.plot:
        plot(arrivals(arguments.seed), results, arguments.plot)
    return 0


def plot(week: list[tuple[float, int]], results: list[tuple[str, Result]], path: Path) -> None:
    """Arrivals, GPUs and waits over the week."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, 1, figsize=(11, 8), sharex=True, constrained_layout=True)
    hours = [hour / 2 for hour in range(int(2 * WEEK_S / HOUR_S) + 1)]
    top.hist([at / DAY_S for at, _ in week], bins=[hour / 24 for hour in hours], color="0.6", weights=[2.0] * len(week))
    top.set_ylabel("generations per hour")
    (scaled_name, scaled), *fixed = results
    middle.step(
        [at / DAY_S for at, _ in scaled.gpus], [count for _, count in scaled.gpus], where="post", label=scaled_name
    )
    for number, (name, result) in enumerate(fixed, start=1):
        middle.axhline(result.gpu_hours * HOUR_S / WEEK_S, color=f"C{number}", linestyle="--", label=name)
    middle.set_ylabel("GPUs")
    for number, (name, result) in enumerate(results):
        by_hour: dict[int, list[float]] = {}
        for at, wait in result.waits:
            by_hour.setdefault(int(at / HOUR_S), []).append(wait)
        points = sorted((hour / 24, statistics.fmean(waits) / 60) for hour, waits in by_hour.items())
        bottom.plot([at for at, _ in points], [wait for _, wait in points], color=f"C{number}", label=name)
    bottom.set_ylabel("mean wait of an hour, min")
    bottom.set_yscale("symlog", linthresh=1)
    bottom.set_ylim(bottom=0)
    bottom.set_xticks(range(8), ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun", ""])
    bottom.set_xlim(0, 7)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside upper center", ncols=len(results))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
