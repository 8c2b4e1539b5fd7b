"""Solvers of rectified flow: noise levels and the state after each step.

A sample at noise level sigma is (1 - sigma) * x0 + sigma * noise and the model predicts velocity = noise - x0, so
x0 = sample - sigma * velocity. A solver is its tables; what changes from step to step is a `SolverState`, a plain value,
so that a run can be stored after any step and continued bit for bit. Samples are float32 on the device of the latents,
coefficients float32 on the CPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

_TRAIN_TIMESTEPS = 1000  # the scale of the timesteps the models were trained with


@dataclass(frozen=True)
class SolverState:
    """Where a solver is: everything the next step needs besides the velocity."""

    latents: Tensor  # the sample at sigmas[step]
    step: int = 0  # steps done
    previous_x0: tuple[Tensor, ...] = ()  # clean predictions of the last steps, newest first
    previous_latents: Tensor | None = None  # the sample that the last step started from (corrected, if the solver does)
    last_order: int = 0  # order of the last step, 0 before the first
    reused_latents: Tensor | None = None  # what the model saw at the step whose computation the next one reuses, if so

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The state as named float32 tensors and named integers."""
        tensors = {"latents": self.latents}
        tensors |= {f"previous_x0.{age}": x0 for age, x0 in enumerate(self.previous_x0)}
        if self.previous_latents is not None:
            tensors["previous_latents"] = self.previous_latents
        if self.reused_latents is not None:
            tensors["reused_latents"] = self.reused_latents
        return tensors, {"step": self.step, "last_order": self.last_order}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> SolverState:
        """The state that `to_tensors` described.

        Raises:
            ValueError: a name is missing or unknown, or a tensor is not float32 or not shaped like the latents.
        """
        history = [f"previous_x0.{age}" for age in range(sum(name.startswith("previous_x0.") for name in tensors))]
        _check_names("tensor", {"latents", *history}, {"previous_latents", "reused_latents"}, set(tensors))
        _check_names("counter", {"step", "last_order"}, set(), set(counters))
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or tensor.shape != tensors["latents"].shape:
                raise ValueError(
                    f"checkpoint tensor {name} must be float32 {list(tensors['latents'].shape)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        return cls(
            latents=tensors["latents"],
            step=counters["step"],
            previous_x0=tuple(tensors[name] for name in history),
            previous_latents=tensors.get("previous_latents"),
            last_order=counters["last_order"],
            reused_latents=tensors.get("reused_latents"),
        )


class Solver(ABC):
    """Tables of one run and the rule for a step.

    Attributes:
        highest_order: of a step; the first and the last one are of order 1.
        sigmas: [num_inference_steps + 1] float32, CPU, falling to 0; the state after step i is at sigmas[i].
        timesteps: [num_inference_steps], CPU: what the model is given; int64 where the solver truncates, else float32.
    """

    name: ClassVar[str]
    highest_order: ClassVar[int]
    sigmas: Tensor
    timesteps: Tensor

    def __init__(self, num_inference_steps: int, shift: float) -> None:
        """
        Args:
            num_inference_steps: at least 1.
            shift: above 1, more of the steps are spent at high noise; 1 is even.

        Raises:
            ValueError: an argument is outside these bounds.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift must be finite and above 0, got {shift}")
        self.num_inference_steps = num_inference_steps
        self.sigmas, self.timesteps = self.tables(num_inference_steps, shift)
        if not bool((self.sigmas.diff() < 0).all()):
            raise ValueError(f"shift {shift} leaves no {num_inference_steps} distinct noise levels")

    @abstractmethod
    def tables(self, num_inference_steps: int, shift: float) -> tuple[Tensor, Tensor]:
        """The sigmas and the timesteps."""

    @abstractmethod
    def step(self, state: SolverState, velocity: Tensor) -> SolverState:
        """One step, given the model's velocity at state.latents and timesteps[state.step]."""

    @abstractmethod
    def history(self, step: int) -> tuple[int, bool]:
        """After `step` steps: how many clean predictions the state holds, and whether it holds previous latents."""

    def order(self, i: int) -> int:
        """Order of the step from sigmas[i]."""
        return 1 if i in (0, self.num_inference_steps - 1) else self.highest_order

    def start(self, noise: Tensor) -> SolverState:
        return SolverState(noise)

    def check(self, state: SolverState) -> None:
        """Raises ValueError unless this solver, with its number of steps, can have left `state`."""
        if not 0 <= state.step <= self.num_inference_steps:
            raise ValueError(f"checkpoint step must be 0 to {self.num_inference_steps}, got {state.step}")
        held = (len(state.previous_x0), state.previous_latents is not None)
        if held != self.history(state.step):
            raise ValueError(f"the checkpoint's history is not that of {self.name} after step {state.step}")
        last_order = self.order(state.step - 1) if state.step else 0
        if state.last_order != last_order:
            raise ValueError(
                f"checkpoint last_order must be {last_order} after step {state.step}, got {state.last_order}"
            )


class UniPC(Solver):
    """UniPC of order 2 in its B2(h) form, predicting x0, with the corrector; first and last step of order 1.

    Source: Zhao et al. 2023 (arXiv:2302.04867), as in Wan-Video/Wan2.2 42bf4cf wan/utils/fm_solvers_unipc.py.
    """

    name = "unipc"
    highest_order = 2

    def tables(self, num_inference_steps: int, shift: float) -> tuple[Tensor, Tensor]:
        highest = float(np.float32(1 - 1 / _TRAIN_TIMESTEPS))
        return _truncated_tables(highest, num_inference_steps, shift)

    def history(self, step: int) -> tuple[int, bool]:
        return min(step, 2), step > 0

    def step(self, state: SolverState, velocity: Tensor) -> SolverState:
        i = state.step
        x0 = state.latents - float(self.sigmas[i]) * velocity  # from the uncorrected sample
        latents = state.latents if i == 0 else self.correct(state, x0)
        order = self.order(i)
        return SolverState(
            latents=self.predict(i, order, latents, x0, state.previous_x0),
            step=i + 1,
            previous_x0=(x0, *state.previous_x0)[:2],
            previous_latents=latents,
            last_order=order,
        )

    def predict(self, i: int, order: int, latents: Tensor, x0: Tensor, previous_x0: tuple[Tensor, ...]) -> Tensor:
        """The sample at sigmas[i + 1] from the corrected one at sigmas[i]."""
        ratio, alpha, h = self.interval(i, i + 1)
        E = torch.expm1(-h)
        predicted = float(ratio) * latents - float(alpha * E) * x0
        if order == 2:
            r = (self.log_snr(i - 1) - self.log_snr(i)) / h
            D1 = (previous_x0[0] - x0) / float(r)
            predicted = predicted - float(alpha * E) * (0.5 * D1)
        return predicted

    def correct(self, state: SolverState, x0: Tensor) -> Tensor:
        """The sample at sigmas[step] once more, now that the model has been asked there; of the last step's order."""
        i = state.step
        assert state.previous_latents is not None  # `check` refuses a stored state that lacks them
        ratio, alpha, h = self.interval(i - 1, i)
        E = torch.expm1(-h)
        last_x0 = state.previous_x0[0]
        corrected = float(ratio) * state.previous_latents - float(alpha * E) * last_x0
        if state.last_order == 1:
            return corrected - float(alpha * E) * (0.5 * (x0 - last_x0))
        phi1 = E / -h - 1
        phi2 = phi1 / -h - 0.5
        r = (self.log_snr(i - 2) - self.log_snr(i - 1)) / h
        R = torch.stack((torch.ones(2), torch.stack((r, torch.ones(())))))
        rho = torch.linalg.solve(R, torch.stack((phi1 / E, 2 * phi2 / E)))
        D1 = (state.previous_x0[1] - last_x0) / float(r)
        return corrected - float(alpha * E) * (float(rho[0]) * D1 + float(rho[1]) * (x0 - last_x0))

    def interval(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """sigma_t / sigma_s, 1 - sigma_t and the step h in log signal-to-noise, of s = sigmas[start], t = sigmas[end]."""
        sigma_s, sigma_t = self.sigmas[start], self.sigmas[end]
        return sigma_t / sigma_s, 1 - sigma_t, self.log_snr(end) - self.log_snr(start)

    def log_snr(self, i: int) -> Tensor:
        """lambda = log((1 - sigma) / sigma); infinite at the ends of the scale."""
        return _log_snr(self.sigmas[i])


class DPMpp2M(Solver):
    """DPM-Solver++ 2M, midpoint form; first and last step of order 1.

    The first sigma is exactly 1, where lambda is -inf: the infinities run through to the right limits.

    Source: Lu et al. 2022 (arXiv:2211.01095), as in Wan-Video/Wan2.2 42bf4cf wan/utils/fm_solvers.py.
    """

    name = "dpm++"
    highest_order = 2

    def tables(self, num_inference_steps: int, shift: float) -> tuple[Tensor, Tensor]:
        return _truncated_tables(1.0, num_inference_steps, shift)

    def history(self, step: int) -> tuple[int, bool]:
        return min(step, 1), False

    def step(self, state: SolverState, velocity: Tensor) -> SolverState:
        i = state.step
        sigma_s, sigma_t = self.sigmas[i], self.sigmas[i + 1]
        x0 = state.latents - float(sigma_s) * velocity
        h = _log_snr(sigma_t) - _log_snr(sigma_s)
        weight = float((1 - sigma_t) * torch.expm1(-h))
        latents = float(sigma_t / sigma_s) * state.latents - weight * x0
        order = self.order(i)
        if order == 2:
            r = (_log_snr(sigma_s) - _log_snr(self.sigmas[i - 1])) / h
            D1 = (x0 - state.previous_x0[0]) / float(r)
            latents = latents - 0.5 * weight * D1
        return SolverState(latents, i + 1, previous_x0=(x0,), last_order=order)


class Euler(Solver):
    """Euler steps; the timesteps run evenly from 1000 to 1 before the shift, and the last step goes to 0.

    Source: deepbeepmeep/Wan2GP 8681e9f shared/utils/euler_scheduler.py.
    """

    name = "euler"
    highest_order = 1

    def tables(self, num_inference_steps: int, shift: float) -> tuple[Tensor, Tensor]:
        even = np.linspace(_TRAIN_TIMESTEPS, 1, num_inference_steps, dtype=np.float32) / np.float32(_TRAIN_TIMESTEPS)
        timesteps = torch.from_numpy(shifted(even, shift)) * _TRAIN_TIMESTEPS
        return torch.cat((timesteps / _TRAIN_TIMESTEPS, torch.zeros(1))), timesteps

    def history(self, step: int) -> tuple[int, bool]:
        return 0, False

    def step(self, state: SolverState, velocity: Tensor) -> SolverState:
        i = state.step
        latents = state.latents + float(self.sigmas[i + 1] - self.sigmas[i]) * velocity
        return SolverState(latents, i + 1, last_order=1)


SOLVERS: dict[str, type[Solver]] = {solver.name: solver for solver in (UniPC, DPMpp2M, Euler)}


def make_solver(name: str, num_inference_steps: int, shift: float) -> Solver:
    """The solver of this name for one run.

    Raises:
        ValueError: there is no such solver, or an argument is outside its bounds.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name}")
    return SOLVERS[name](num_inference_steps, shift)


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Moves noise levels towards 1, more so the larger the shift.

    Source: timestep shifting, Esser et al. 2024 (arXiv:2403.03206).
    """
    moved: np.ndarray = shift * sigmas / (1 + (shift - 1) * sigmas)
    return moved


def _truncated_tables(highest: float, num_inference_steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """Even levels from `highest` to 0, shifted in float64; the model gets whole timesteps, the solver exact sigmas."""
    sigmas = shifted(np.linspace(highest, 0, num_inference_steps + 1), shift)
    timesteps = (sigmas[:-1] * _TRAIN_TIMESTEPS).astype(np.int64)
    return torch.from_numpy(sigmas.astype(np.float32)), torch.from_numpy(timesteps)


def _log_snr(sigma: Tensor) -> Tensor:
    return torch.log(1 - sigma) - torch.log(sigma)


def _check_names(kind: str, required: set[str], optional: set[str], given: set[str]) -> None:
    missing, unknown = sorted(required - given), sorted(given - required - optional)
    if missing or unknown:
        raise ValueError(f"checkpoint {kind}s: missing {missing}, unknown {unknown}")
