"""Training steps that run without the host: Muon and AdamW, a running average of the weights, steps as CUDA graphs.

At the sizes of the tiny bundle a step is some thousand small kernels, which the host cannot launch as fast as the GPU
finishes them. So everything that changes from step to step (data, noise, learning rate) is drawn or kept on the
device, and the whole step is recorded once and replayed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_WARM_UP_STEPS = 3  # run as they are before recording, so that allocations and tuning are over


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate: a linear rise, its full height, a linear fall.

    Attributes:
        steps: of the whole training.
        warm_up_steps: until the full rate.
        decay_from: share of the steps after which it falls.
        final: share of the full rate that is left at the end.
    """

    steps: int
    warm_up_steps: int
    decay_from: float
    final: float

    def factor(self, step: int) -> float:
        """What the full rate is multiplied by in the step of this number, counted from 0."""
        begun = min(1.0, (step + 1) / self.warm_up_steps)
        ending = max(0.0, (step / self.steps - self.decay_from) / (1 - self.decay_from))
        return begun * (1 - (1 - self.final) * min(1.0, ending))


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with all their singular values brought near 1, in bfloat16.

    Source: the Newton-Schulz iteration of Muon, Jordan 2024 (https://kellerjordan.github.io/posts/muon).
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon:
    """Momentum, orthogonalised, for weights of two and more axes: those of a convolution count as one matrix.

    Weights of one shape take their steps together. An update has the size that AdamW's would have on average, so both
    share a learning rate (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(self, weights: Sequence[nn.Parameter], rate: float, momentum: float = 0.95) -> None:
        self._rate, self._momentum = rate, momentum
        self._groups: defaultdict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for weight in weights:
            self._groups[weight.shape[0], weight[0].numel()].append(weight)
        self._averages = {shape: [torch.zeros_like(w) for w in group] for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self, factor: Tensor) -> None:
        """Moves the weights; `factor` [] on their device multiplies the rate."""
        for (rows, columns), weights in self._groups.items():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            averages = self._averages[rows, columns]
            torch._foreach_lerp_(averages, gradients, 1 - self._momentum)
            ahead = torch._foreach_lerp(gradients, averages, self._momentum)
            updates = orthogonalised(torch.stack([update.reshape(rows, columns) for update in ahead])).float()
            updates = updates * (-self._rate * 0.2 * math.sqrt(max(rows, columns)) * factor)
            shaped = [update.view_as(weight) for update, weight in zip(updates, weights, strict=True)]
            torch._foreach_add_([weight.data for weight in weights], shaped)

    def tensors(self) -> list[Tensor]:
        """What it remembers from step to step."""
        return [average for group in self._averages.values() for average in group]


class Optimiser:
    """Muon on some weights and AdamW on the rest, after clipping the gradient's length to 1."""

    def __init__(self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], rate: float) -> None:
        """
        Args:
            matrices: weights of hidden layers, for Muon.
            others: what is no matrix, or is one only by its form: tables, inputs and outputs.
            rate: full learning rate of both.
        """
        self._parameters = [*matrices, *others]
        device = self._parameters[0].device
        self.factor = torch.ones((), device=device)
        self._rate = rate
        self._muon = Muon(matrices, rate)
        on_gpu = device.type == "cuda"
        self._adam_rate = torch.full((), rate, device=device)
        self._adam = torch.optim.AdamW(
            others, lr=self._adam_rate, betas=(0.9, 0.95), weight_decay=0.0, capturable=on_gpu, fused=on_gpu
        )

    def step(self, loss: Tensor) -> None:
        """Differentiates `loss` and moves the weights."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        for parameter in self._parameters:
            if parameter.grad is None:  # a layer that this kind of sample does not pass
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._muon.step(self.factor)
        self._adam_rate.copy_(self.factor * self._rate)
        self._adam.step()

    def tensors(self) -> dict[str, Tensor]:
        """Its memory as named tensors, for a checkpoint; it exists after the first step."""
        named = {f"muon.{number}": tensor for number, tensor in enumerate(self._muon.tensors())}
        for number, state in self._adam.state_dict()["state"].items():
            named |= {f"adam.{number}.{name}": value for name, value in state.items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` gave, in place, so that a recorded step goes on with it."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])


class Average:
    """The exponential moving average of weights, which is what is used after training."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self.weights = [parameter.detach().clone() for parameter in self._parameters]
        self._decay = torch.full((), decay, device=self.weights[0].device)
        self._steps = torch.zeros((), device=self.weights[0].device)

    @torch.no_grad()
    def update(self) -> None:
        # young averages forget faster, so that the first weights leave no trace
        decay = torch.minimum(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        torch._foreach_mul_(self.weights, decay)
        torch._foreach_add_(self.weights, torch._foreach_mul([p.detach() for p in self._parameters], 1 - decay))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the average and the weights; called twice, nothing has changed."""
        for average, parameter in zip(self.weights, self._parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        return {"steps": self._steps} | {str(number): tensor for number, tensor in enumerate(self.weights)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


class RecordedStep:
    """A training step that is recorded as a CUDA graph after a few runs, and from then on replayed.

    The step takes nothing and draws what it needs from the device's default generator, whose state goes on from replay
    to replay; it gives its loss, a tensor that the next call overwrites. On a CPU it is simply called.
    """

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        self._step, self._on_gpu = step, device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.zeros((), device=device)
        self._calls = 0

    def __call__(self) -> Tensor:
        self._calls += 1
        if self._graph is not None:
            self._graph.replay()
            return self._loss
        if not self._on_gpu or self._calls <= _WARM_UP_STEPS:
            return self._aside() if self._on_gpu else self._step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._step()
        self._graph = graph
        graph.replay()  # recording computes nothing
        return self._loss

    def _aside(self) -> Tensor:
        """A run on another stream, as the one that will be recorded must not meet work of the default stream."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch does not annotate it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._step()
        torch.cuda.current_stream().wait_stream(stream)
        return loss
