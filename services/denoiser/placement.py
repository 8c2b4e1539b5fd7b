"""Puts a loaded transformer where a memory mode and a budget say, and knows which clips fit then."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from services.denoiser.chunking import run_in_pieces
from services.denoiser.model import DiffusionTransformer
from services.denoiser.plan import GIB, DoesNotFit, MemoryPlan, Weights, plan_memory
from services.denoiser.streaming import of_every_step, of_the_context, of_the_request, stream_weights

GPU_ONLY, HYBRID, CPU_ONLY = "gpu_only", "hybrid", "cpu_only"
MEMORY_MODES = (GPU_ONLY, HYBRID, CPU_ONLY)


@dataclass(frozen=True)
class Placement:
    """Where a transformer's weights are, and the budget that was planned for."""

    model: DiffusionTransformer
    weights: Weights
    plan: MemoryPlan
    budget: int | None  # bytes; None: as much as there is

    def check(self, tokens: int, cached_branches: int = 0) -> None:
        """Raises DoesNotFit, with the numbers, if a clip of so many tokens would exceed the budget.

        cached_branches: as of `plan_memory`.
        """
        needed = plan_memory(self.weights, self.model.config, tokens, self.budget, cached_branches)
        clip = f"{tokens} tokens" + (" with a step cache" if cached_branches else "")
        advice = f"({self.plan.device_bytes / GIB:.2f} GiB); plan for more when the stage starts"
        if needed.resident < self.plan.resident:
            room, placed = needed.resident, self.plan.resident
            raise DoesNotFit(f"{clip} leave room for {room} blocks on the device where {placed} were placed {advice}")
        at_once = min(self.plan.tokens_at_once or tokens, tokens)
        if 0 < needed.tokens_at_once < at_once:
            raise DoesNotFit(f"{clip} fit {needed.tokens_at_once} at once where {at_once} would be computed {advice}")

    def __str__(self) -> str:
        plan, blocks = self.plan, self.weights.num_blocks
        pieces = f", {plan.tokens_at_once} tokens at once" if plan.tokens_at_once else ""
        streamed = f", {plan.streamed_bytes / GIB:.1f} GiB streamed in each pass" if plan.streamed_bytes else ""
        return f"{plan.resident} of {blocks} blocks on the device{pieces}{streamed}, {plan.device_bytes / GIB:.2f} GiB"


def place(
    model: DiffusionTransformer, device: torch.device, budget: int | None, tokens: int, cached_branches: int = 0
) -> Placement:
    """Places a model whose weights are in host memory (or, without a budget, on the device already).

    Args:
        budget: bytes that the process may use on the device; None: everything goes there.
        tokens: of the longest clip to plan for.
        cached_branches: as of `plan_memory`.

    Raises:
        DoesNotFit: no plan is within the budget; the model is as it was then.
    """
    weights = weights_of(model)
    plan = plan_memory(weights, model.config, tokens, budget, cached_branches)
    if plan.resident < weights.num_blocks:
        stream_weights(model, device, plan.resident)
    else:
        model.to(device)
    if plan.tokens_at_once:
        run_in_pieces(model, plan.tokens_at_once)
    return Placement(model, weights, plan, budget)


def weights_of(model: DiffusionTransformer) -> Weights:
    """Bytes of a model's parts, wherever they are; on the meta device too."""
    blocks = list(model.blocks)
    parts = of_the_request(model)
    on_demand = [_size(part) for part in parts]
    return Weights(
        block=max(sum(tensor.nbytes for _, _, tensor in of_every_step(block)) for block in blocks),
        context=max(sum(_size(part) for part in of_the_context(block)) for block in blocks),
        context_linear=max(_size(part) for block in blocks for part in of_the_context(block)),
        rest=_size(model) - sum(_size(block) for block in blocks) - sum(on_demand),
        on_demand=max(on_demand),
        num_blocks=len(blocks),
    )


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))
