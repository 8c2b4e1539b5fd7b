"""Puts a loaded transformer where a memory mode and a budget say, and knows which clips fit then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from runtime.budget import DoesNotFit
from runtime.vram import cap_memory, most_bytes, process_bytes
from services.denoiser.chunking import run_in_pieces
from services.denoiser.glue import PLAIN
from services.denoiser.model import Block, DiffusionTransformer
from services.denoiser.plan import DEVICE_OVERHEAD_BYTES, GIB, MemoryPlan, Weights, plan_memory
from services.denoiser.precision import EXACT, set_precision
from services.denoiser.quantisation import QuantizedWeight
from services.denoiser.streaming import HostModel, of_every_step, of_the_context, of_the_request, of_the_step

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
        if needed.resident < self.plan.resident or needed.is_whole < self.plan.is_whole:
            room, placed = (_blocks(plan) for plan in (needed, self.plan))
            raise DoesNotFit(f"{clip} leave room for {room} on the device where {placed} were placed {advice}")
        at_once = min(self.plan.tokens_at_once or tokens, tokens)
        if 0 < needed.tokens_at_once < at_once:
            raise DoesNotFit(f"{clip} fit {needed.tokens_at_once} at once where {at_once} would be computed {advice}")

    def excess(self, device: torch.device) -> int:
        """Bytes that the process has taken of a CUDA device beyond its budget: above 0 is a bug of the plan."""
        if self.budget is None or device.type != "cuda":
            return 0
        return max(0, (most_bytes(device) or 0) - self.budget)

    def __str__(self) -> str:
        return self.plan.words(self.weights.num_blocks)


def _blocks(plan: MemoryPlan) -> str:
    return "all weights" if plan.is_whole else f"{plan.resident} blocks"


def place(
    model: DiffusionTransformer,
    device: torch.device,
    budget: int | None,
    tokens: int,
    cached_branches: int = 0,
    precision: str = EXACT,
    folder: Path | None = None,
) -> Placement:
    """Gives a model whose weights are in host memory its precision and places it (without a budget: from anywhere).

    With a budget, the allocator is held to it, and weights go block by block from the file to their place: the process
    never has them twice.

    Args:
        budget: bytes that the process may use on the device, by the driver's count; None: everything goes there.
        tokens: of the longest clip to plan for.
        cached_branches: as of `plan_memory`.
        precision: of `precision.PRECISIONS`.
        folder: with a budget: for the files that streamed blocks wait in; None: in host memory.

    Raises:
        DoesNotFit: no plan is within the budget; the model cannot be used then.
    """
    if budget is None:
        set_precision(model, precision, device)
        model.to(device)
        weights = weights_of(model)
        return Placement(model, weights, plan_memory(weights, model.config, tokens, None, cached_branches), None)
    cap_memory(device, budget, DEVICE_OVERHEAD_BYTES)

    def prepare(take: Callable[[Block], None]) -> None:
        set_precision(model, precision, device, take)

    host = HostModel(model, device, prepare, folder)
    weights = weights_of(model)
    plan = plan_memory(weights, model.config, tokens, budget, cached_branches)
    if plan.is_whole:
        model.to(device)
    else:
        host.stream(plan.resident)
    if plan.tokens_at_once:
        run_in_pieces(model, plan.tokens_at_once)
    return Placement(model, weights, plan, budget)


def free_budget(device: torch.device) -> int:
    """Bytes of a device, by the driver's count, that this process may take where nobody says: what others leave of it,
    at most the fraction that PyTorch is held to (`vram_fraction`).
    """
    free, total = torch.cuda.mem_get_info(device)
    own = process_bytes(device) or torch.cuda.memory_reserved(device)
    return min(free + own, int(total * torch.cuda.get_per_process_memory_fraction(device)))


def weights_of(model: DiffusionTransformer) -> Weights:
    """Bytes of a model's parts, wherever they are; on the meta device too."""
    blocks = list(model.blocks)
    of_step = [_size(part) for part in of_the_step(model)]
    on_demand = [*of_step, *(_size(part) for part in of_the_request(model))]
    context = [part for block in blocks for part in of_the_context(block)]
    of_context = {inner for part in context for inner in part.modules()}
    return Weights(
        block=max(sum(tensor.nbytes for _, _, tensor in of_every_step(block)) for block in blocks),
        context=max(sum(_size(part) for part in of_the_context(block)) for block in blocks),
        context_linear=max(_size(part) + max(map(_dequantised, part.modules())) for part in context),
        rest=_size(model) - sum(_size(block) for block in blocks) - sum(on_demand),
        on_demand=max(on_demand),
        on_demand_together=sum(on_demand),
        each_step=sum(of_step),
        dequantised=max(_dequantised(part) for block in blocks for part in block.modules() if part not in of_context),
        num_blocks=len(blocks),
        is_fused=all(isinstance(block, Block) and block.glue is not PLAIN for block in blocks),
    )


def _dequantised(module: nn.Module) -> int:
    """Bytes of what int8 weights become: numbers in the dtype of their scale."""
    return module._data.numel() * module.dtype.itemsize if isinstance(module, QuantizedWeight) else 0


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))
