"""A transformer whose weights are in host memory: which of its parts stay on the device, and when the others come.

Blocks that do not stay are streamed, one ahead of the one that computes. What computes once per request or step (the
projections of the context and of the timestep) comes when it is called. The keys and values of the context, which are
made once per request, wait in host memory and come while their block's self-attention computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.mapped import MappedPages
from runtime.streaming import (
    Piece,
    Undo,
    Weight,
    bring_for_calls,
    home_of,
    into_host_memory,
    size_of,
    stream_blocks,
    undoing,
    weights_of,
    with_hooks,
)
from services.denoiser.model import Block, Context, CrossAttention, DiffusionTransformer

Pairs = tuple[tuple[Tensor, Tensor], ...]
_ALWAYS_THERE = ("patch_embedding", "pose_patch_embedding", "head")


def of_the_request(model: DiffusionTransformer) -> list[nn.Module]:
    """Large parts outside the blocks that compute once per request."""
    return [model.text_embedding, *([model.img_emb] if hasattr(model, "img_emb") else [])]


def of_the_step(model: DiffusionTransformer) -> list[nn.Module]:
    """Large parts outside the blocks that compute once per step, for a timestep or two."""
    return [model.time_embedding, model.time_projection]


def of_the_context(block: nn.Module) -> list[nn.Module]:
    """Linears of a block that compute once per request."""
    assert isinstance(block, Block)
    return [getattr(block.cross_attn, name) for name in ("k", "v", "k_img", "v_img") if hasattr(block.cross_attn, name)]


def of_every_step(block: nn.Module) -> list[Weight]:
    """All other weights of a block."""
    return list(weights_of(block, apart=of_the_context(block)))


@dataclass(frozen=True)
class HostBlock:
    """A block whose weights are in host memory."""

    block: Block
    every_step: Piece
    context: tuple[tuple[nn.Module, Piece], ...]  # of each linear that computes once per request


class HostModel:
    """A transformer whose large parts are in pinned host memory, or its blocks in files.

    Args:
        model: loaded; what is small outside the blocks stays where it is until `stream`.
        device: where it will compute.
        prepare: is called once with a function that is to be given each block when its weights are what they are going
            to be, wherever they are; so that they go from file to host memory block by block.
        folder: for the blocks' files; None: they are in host memory.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        device: torch.device,
        prepare: Callable[[Callable[[Block], None]], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._model, self._device = model, device
        self.blocks: list[HostBlock] = []
        mapped = {block: MappedPages([*block.parameters(), *block.buffers()]) for block in model.blocks}

        def take(block: Block) -> None:
            self.blocks.append(_taken(block, device, folder))
            mapped[block].drop()

        if prepare is None:
            for block in model.blocks:
                assert isinstance(block, Block)
                take(block)
        else:
            prepare(take)
        parts = [*of_the_request(model), *of_the_step(model)]
        self._on_demand = [(part, into_host_memory(part, device)) for part in parts]

    def stream(self, resident: int) -> Undo:
        """Brings the model to where it computes, with `resident` blocks on the device for good.

        The blocks that stay are spread evenly, so that the copies go on at an even rate. Returns what takes the hooks
        off; once, as host memory of the blocks that stay is given back.

        Raises:
            ValueError: `resident` is not 0 to the number of blocks.
        """
        count = len(self.blocks)
        if not 0 <= resident <= count:
            raise ValueError(f"resident must be 0 to {count}, got {resident}")
        staying = {index * count // resident for index in range(resident)}
        for index in staying:
            piece = self.blocks[index].every_step
            piece.use(piece.on(self._device))  # and the host memory or the file goes with the piece
        streamed = [host for index, host in enumerate(self.blocks) if index not in staying]
        undo = [stream_blocks([(host.block, host.every_step) for host in streamed], self._device)]
        parts = [*self._on_demand, *(part for host in self.blocks for part in host.context)]
        undo += [bring_for_calls(module, piece, self._device) for module, piece in parts]
        keys = ContextKeys(self._device)
        undo += [keys.attach(host.block) for host in self.blocks]
        for name in _ALWAYS_THERE:
            if hasattr(self._model, name):
                self._model.get_submodule(name).to(self._device)
        self.blocks, self._on_demand = [], []
        return undoing(undo)


def stream_weights(model: DiffusionTransformer, device: torch.device, resident: int) -> Undo:
    """`HostModel.stream` of a loaded model."""
    return HostModel(model, device).stream(resident)


class ContextKeys:
    """Keys and values of the context: made once per request, then in host memory; on the device for their block.

    One place on the device is enough, as a block's self-attention takes longer than the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ready: torch.cuda.Event | None = None
        self._place: Tensor | None = None
        self._request: Context | None = None  # what the block was given

    def attach(self, block: Block) -> Undo:
        """Gives a block, whenever it is called, a context that has its keys on the device."""

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens, time, context, rope = arguments
            self._request = context
            return tokens, time, self._brought(block.cross_attn, context), rope

        def after(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if self._request is not None and block.cross_attn not in self._request.made:
                made = arguments[2].made.get(block.cross_attn)
                if made is not None:
                    self._request.made[block.cross_attn] = self._kept(made)
            self._request = None

        def wait(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if self._ready is not None:
                torch.cuda.current_stream(self._device).wait_event(self._ready)

        return undoing([with_hooks(block, before, after), block.cross_attn.register_forward_pre_hook(wait).remove])

    def _brought(self, layer: CrossAttention, context: Context) -> Context:
        if layer not in context.made:
            return replace(context, made={})
        kept = context.made[layer]
        place = self._place_for(kept)
        if self._copying is None:
            _copy(kept, place)
        else:
            self._copying.wait_stream(torch.cuda.current_stream(self._device))  # the block before uses the place
            with torch.cuda.stream(self._copying):
                _copy(kept, place)
                self._ready = self._copying.record_event()
        return replace(context, made={layer: place})

    def _place_for(self, kept: Pairs) -> Pairs:
        size, dtype = _numel(kept), kept[0][0].dtype
        if self._place is None or len(self._place) < size or self._place.dtype != dtype:
            self._place = torch.empty(size, dtype=dtype, device=self._device)
        return _like(kept, self._place)

    def _kept(self, made: Pairs) -> Pairs:
        """In pinned host memory, which PyTorch keeps for the next request."""
        host = torch.empty(_numel(made), dtype=made[0][0].dtype, pin_memory=self._device.type == "cuda")
        kept = _like(made, host)
        _copy(made, kept)
        return kept


def _numel(pairs: Pairs) -> int:
    return sum(tensor.numel() for pair in pairs for tensor in pair)


def _like(pairs: Pairs, memory: Tensor) -> Pairs:
    """Tensors of the same shapes, one after another in `memory`."""
    shapes = [tensor.shape for pair in pairs for tensor in pair]
    ends = list(accumulate(shape.numel() for shape in shapes))
    views = [memory[end - shape.numel() : end].view(shape) for shape, end in zip(shapes, ends, strict=True)]
    return tuple(zip(views[::2], views[1::2], strict=True))


def _copy(source: Pairs, target: Pairs) -> None:
    for one, other in zip(source, target, strict=True):
        for tensor, place in zip(one, other, strict=True):
            place.copy_(tensor, non_blocking=True)


def _taken(block: Block, device: torch.device, folder: Path | None) -> HostBlock:
    """A block's weights in pieces of host memory, so that the one of every step can be given back alone."""
    linears = of_the_context(block)
    weights = [list(weights_of(linear)) for linear in linears]
    homes = [home_of(size_of(each), device, folder) for each in weights]
    context = [(linear, Piece(each, home)) for linear, each, home in zip(linears, weights, homes, strict=True)]
    every_step = of_every_step(block)
    return HostBlock(block, Piece(every_step, home_of(size_of(every_step), device, folder)), tuple(context))
