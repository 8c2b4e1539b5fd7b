"""The loop that trains any of the networks for so many seconds, from where it last stopped."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from training.pose_models.pictures import Pictures

_LOGGED_STEPS, _SAVED_S = 50, 30.0


class Task(Protocol):
    """A network, how far it is off on a batch of pictures, and how good it is."""

    model: nn.Module

    def loss(self, pictures: Pictures, generator: torch.Generator, progress: float) -> Tensor:
        """`progress` through the training, 0 to 1."""
        ...

    def scores(self, pictures: Pictures, generator: torch.Generator) -> dict[str, float]: ...


@dataclass(frozen=True)
class Schedule:
    """AdamW: the learning rate rises over `warmup_steps`, then falls along a cosine to nothing at the end of `seconds`."""

    seconds: float
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.02
    max_gradient: float = 5.0

    def rate(self, step: int, progress: float) -> float:
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (1 + math.cos(math.pi * progress)) / 2


def train(
    task: Task, pictures: Pictures, held_out: Pictures, schedule: Schedule, directory: Path, seed: int = 0
) -> None:
    """Trains `task.model`, which is on the pictures' device, and leaves `checkpoint.pt` and `log.json` in `directory`.

    If these are there already, it goes on from them; the seconds are those of all runs together.
    """
    directory.mkdir(parents=True, exist_ok=True)
    device = pictures.frames.device
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.0, weight_decay=schedule.weight_decay)
    run = _Run(task.model, optimizer, directory / "checkpoint.pt")
    log = run.resume(device)
    generator = torch.Generator(device).manual_seed(seed + run.step)
    task.model.train()
    losses: list[Tensor] = []
    began, saved = time.monotonic() - run.seconds, time.monotonic()
    while (progress := run.seconds / schedule.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(run.step, progress)
        loss = task.loss(pictures, generator, progress)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        nn.utils.clip_grad_norm_(task.model.parameters(), schedule.max_gradient)
        optimizer.step()
        losses.append(loss.detach())
        run.step += 1
        if len(losses) == _LOGGED_STEPS:
            # the only wait for the device
            entry = {"step": run.step, "seconds": run.seconds, "loss": float(torch.stack(losses).mean())}
            log.append(entry)
            losses.clear()
            if run.step % (10 * _LOGGED_STEPS) == 0:
                log[-1] |= _scored(task, held_out, device, seed)
                print(json.dumps(log[-1]), flush=True)
        run.seconds = time.monotonic() - began
        if time.monotonic() - saved > _SAVED_S:
            run.save(log)
            saved = time.monotonic()
    log.append({"step": run.step, "seconds": run.seconds} | _scored(task, held_out, device, seed))
    print(json.dumps(log[-1]), flush=True)
    run.save(log)
    (directory / "log.json").write_text(json.dumps(log, indent=1), encoding="utf-8")


def _scored(task: Task, held_out: Pictures, device: torch.device, seed: int) -> dict[str, float]:
    """Scores on the same batch every time."""
    task.model.eval()
    scores = task.scores(held_out, torch.Generator(device).manual_seed(seed))
    task.model.train()
    return scores


class _Run:
    """How far a training has come, on disk and off it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
        self._model, self._optimizer, self._path = model, optimizer, path
        self.step, self.seconds = 0, 0.0

    def resume(self, device: torch.device) -> list[dict[str, float]]:
        """The log so far."""
        if not self._path.exists():
            return []
        saved = torch.load(self._path, map_location=device, weights_only=True)
        self._model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        log: list[dict[str, float]] = saved["log"]
        return log

    def save(self, log: list[dict[str, float]]) -> None:
        """All or nothing: the old file stays until the new one is whole."""
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict(), "log": log}
        new = self._path.with_suffix(".new")
        torch.save(state | {"step": self.step, "seconds": self.seconds}, new)
        new.replace(self._path)
