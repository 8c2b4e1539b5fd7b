"""What the training programs share: the loop over steps, its log, and a state from which it goes on."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from training.optimise import Average, Optimiser, RecordedStep, Schedule

_LOG_EVERY_STEPS = 25


@dataclass(frozen=True)
class Progress:
    """How far a training has come; the next step is number `step`."""

    step: int = 0
    seconds: float = 0.0


class Log:
    """Losses as they fall, a line for every few steps: a CSV file with the columns stage, step, seconds, loss."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            path.write_text("stage,step,seconds,loss\n", encoding="utf-8")

    def add(self, stage: str, progress: Progress, loss: float) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{stage},{progress.step},{progress.seconds:.1f},{loss:.6f}\n")
        print(f"{stage} step {progress.step} {progress.seconds:.0f} s loss {loss:.5f}", flush=True)

    def draw(self, title: str) -> None:
        """Leaves a picture of the loss beside the file: SVG, a colour per stage, the same for the same losses."""
        with self._path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.size": 8}):
            figure = Figure(figsize=(5, 2.6), layout="constrained")
            axes = figure.subplots()
            for stage in dict.fromkeys(row["stage"] for row in rows):
                points = [(float(row["step"]), float(row["loss"])) for row in rows if row["stage"] == stage]
                axes.plot(*zip(*points, strict=True), linewidth=0.8, label=stage)
            axes.set(title=f"{title}: loss", xlabel="step", yscale="log")
            axes.legend()
            figure.savefig(self._path.with_suffix(".svg"), metadata={"Date": None})


def run_steps(
    step: RecordedStep,
    optimiser: Optimiser,
    schedule: Schedule,
    progress: Progress,
    *,
    until_step: int,
    deadline: float,
    stage: str,
    log: Log,
) -> Progress:
    """Takes steps until `until_step` is next or the clock (`time.monotonic`) is past `deadline`.

    Raises:
        FloatingPointError: the loss is no number any more.
    """
    begun, number = time.monotonic(), progress.step
    while number < until_step:
        optimiser.factor.fill_(schedule.factor(number))
        loss = step()
        number += 1
        if number % _LOG_EVERY_STEPS and number < until_step:
            continue
        value = float(loss)  # waits for the device, which the host may otherwise leave far behind
        now = Progress(number, progress.seconds + time.monotonic() - begun)
        if value != value:
            raise FloatingPointError(f"{stage}: the loss is not a number after step {number}")
        log.add(stage, now, value)
        if time.monotonic() > deadline:
            break
    return Progress(number, progress.seconds + time.monotonic() - begun)


@dataclass(frozen=True)
class State:
    """Everything that a training has to remember to go on."""

    modules: Mapping[str, nn.Module]
    optimiser: Optimiser
    average: Average

    def save(self, path: Path, progress: Progress) -> None:
        """Writes a file that appears only when it is complete."""
        content = {
            "progress": {"step": progress.step, "seconds": progress.seconds},
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimiser": self.optimiser.tensors(),
            "average": self.average.tensors(),
            "random": _random_states(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(content, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> Progress:
        """Goes back to what was saved; the optimiser must have taken a step already, so that its memory exists."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(content["modules"][name])
        self.optimiser.restore(content["optimiser"])
        self.average.restore(content["average"])
        torch.set_rng_state(content["random"]["cpu"])
        if "cuda" in content["random"]:
            torch.cuda.set_rng_state(content["random"]["cuda"])
        return Progress(**content["progress"])


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
