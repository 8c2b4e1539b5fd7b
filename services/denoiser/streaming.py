"""Weights that live in host memory and come to the device when their turn is near.

Each streamed block is one piece of (pinned) host memory and is copied as a whole, on a stream of its own, while the
block before it computes: two places on the device hold the block that computes and the one after it. What is large and
used once per request or step (the projections of the context and of the timestep) comes when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.denoiser.model import Block, DiffusionTransformer

PLACES = 2
_ALIGNMENT = 256  # bytes: what kernels that load vectors ask of a tensor's address
Undo = Callable[[], None]


def stream_weights(model: DiffusionTransformer, device: torch.device, resident: int) -> Undo:
    """Moves a model that is loaded in host memory to where it computes, with `resident` blocks on the device for good.

    The blocks that stay are spread evenly, so that the copies go on at an even rate. Returns what takes the hooks off.

    Raises:
        ValueError: `resident` is not 0 to the number of blocks.
    """
    blocks = list(model.blocks)
    if not 0 <= resident <= len(blocks):
        raise ValueError(f"resident must be 0 to {len(blocks)}, got {resident}")
    staying = {index * len(blocks) // resident for index in range(resident)}
    streamed = [block for index, block in enumerate(blocks) if index not in staying]
    undo: list[Undo] = []
    for module in [*of_the_request(model), *(part for block in streamed for part in of_the_context(block))]:
        undo.append(_on_demand(module, device))
    streamer = BlockStreamer(streamed, device)
    undo += [_hooked(block, streamer, index) for index, block in enumerate(streamed)]
    for index in staying:
        blocks[index].to(device)
    for name in ("patch_embedding", "pose_patch_embedding", "time_embedding", "head"):
        if hasattr(model, name):
            model.get_submodule(name).to(device)
    model.context_on_host = bool(streamed)

    def undo_all() -> None:
        for each in undo:
            each()

    return undo_all


def of_the_request(model: DiffusionTransformer) -> list[nn.Module]:
    """Large parts outside the blocks that compute once per request or step."""
    return [model.text_embedding, model.time_projection, *([model.img_emb] if hasattr(model, "img_emb") else [])]


def of_the_context(block: nn.Module) -> list[nn.Module]:
    """Linears of a block that compute once per request."""
    assert isinstance(block, Block)
    return [getattr(block.cross_attn, name) for name in ("k", "v", "k_img", "v_img") if hasattr(block.cross_attn, name)]


def of_every_step(block: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """All other weights of a block: whose they are, their name there, and they themselves."""
    apart = {inner for module in of_the_context(block) for inner in module.modules()}
    return list(_weights(block, apart))


class Piece:
    """Weights moved into one piece of host memory; their modules use views of it, or of a copy."""

    def __init__(self, weights: Sequence[tuple[nn.Module, str, Tensor]], device: torch.device) -> None:
        self._parts: list[_Part] = []
        self.size = 0
        for owner, name, tensor in weights:
            self._parts.append(_Part(owner, name, self.size, tensor.shape, tensor.dtype))
            self.size += _aligned(tensor.nbytes)
        # pinned: only then does a copy to the device go on by itself
        self.host = torch.empty(self.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for part, (_, _, tensor) in zip(self._parts, weights, strict=True):
            part.view(self.host).copy_(tensor)
        self.use(self.host)

    def use(self, piece: Tensor) -> None:
        """Makes the modules' weights views of `piece`, which holds the same bytes as `host` or will."""
        for part in self._parts:
            part.assign(part.view(piece))


@dataclass(frozen=True)
class _Part:
    """One tensor of a module, and where it lies in its piece."""

    owner: nn.Module
    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, piece: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return piece[self.offset : self.offset + size].view(self.dtype).view(self.shape)

    def assign(self, value: Tensor) -> None:
        if self.name in self.owner._parameters:
            self.owner._parameters[self.name] = nn.Parameter(value, requires_grad=False)
        else:
            self.owner._buffers[self.name] = value


class BlockStreamer:
    """Brings blocks to the device, one ahead of the one that computes.

    Args:
        blocks: in the order in which they are called, over and over.
        device: a CUDA device, or the CPU, where copies are made at once.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._pieces = [Piece(of_every_step(block), device) for block in blocks]
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        largest = max((piece.size for piece in self._pieces), default=0)
        self._places = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(PLACES, len(self._pieces)))
        ]
        self._held: list[int | None] = [None] * len(self._places)
        self._ready: list[torch.cuda.Event | None] = [None] * len(self._places)

    def before(self, index: int) -> None:
        """The block's weights are on the device when what is queued from now on runs."""
        if index not in self._held:
            self._load(index, 0)  # the first call, or the first after a run that was cancelled half-way
        place = self._held.index(index)
        if (ready := self._ready[place]) is not None:
            torch.cuda.current_stream(self._device).wait_event(ready)
        self._pieces[index].use(self._places[place])

    def after(self, index: int) -> None:
        """The block has been queued: once it has run its place is free for the one after the next."""
        self._pieces[index].use(self._pieces[index].host)
        for ahead in range(1, len(self._places) + 1):
            following = (index + ahead) % len(self._pieces)
            if following not in self._held:
                self._load(following, self._held.index(index))
                return

    def _load(self, index: int, place: int) -> None:
        piece = self._pieces[index]
        target = self._places[place][: piece.size]
        self._held[place] = index
        if self._copying is None:
            target.copy_(piece.host)
            return
        self._copying.wait_stream(torch.cuda.current_stream(self._device))  # what still uses the place runs first
        with torch.cuda.stream(self._copying):
            target.copy_(piece.host, non_blocking=True)
            self._ready[place] = self._copying.record_event()


def _on_demand(module: nn.Module, device: torch.device) -> Undo:
    """Keeps a module's weights in host memory and copies them for each call."""
    piece = Piece(list(_weights(module, set())), device)

    def before(module: nn.Module, arguments: Any) -> None:
        piece.use(piece.host.to(device, non_blocking=True))

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        piece.use(piece.host)

    return _with_hooks(module, before, after)


def _hooked(block: nn.Module, streamer: BlockStreamer, index: int) -> Undo:
    def before(module: nn.Module, arguments: Any) -> None:
        streamer.before(index)

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        streamer.after(index)

    return _with_hooks(block, before, after)


def _with_hooks(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Undo:
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _weights(module: nn.Module, apart: set[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        if owner not in apart:
            tensors = {**owner._parameters, **owner._buffers}
            yield from ((owner, name, tensor) for name, tensor in tensors.items() if tensor is not None)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
