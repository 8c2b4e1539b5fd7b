"""Weights that live in host memory and come to the device when their turn is near.

The weights of a block are one piece of (pinned) host memory, and are copied as a whole, on a stream of their own, while
the block before computes: two places on the device hold the block that computes and the one after it. What is large and
rarely used comes when it is called.

With an offload folder the pieces are files instead: a thread reads the next one into a place in pinned memory, and copies
it on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.mapped import MappedPages
from runtime.offload import FilePiece
from runtime.pinned import pinned_memory

PLACES = 2
_READ_S = 120.0  # the longest that a disk may take for a block
_ALIGNMENT = 256  # bytes: what kernels that load vectors ask of a tensor's address
Weight = tuple[nn.Module, str, Tensor]  # whose it is, its name there, and it itself
Undo = Callable[[], None]


def weights_of(module: nn.Module, apart: Iterable[nn.Module] = ()) -> Iterator[Weight]:
    """Parameters and buffers of a module and what it holds, but for modules that are set apart."""
    left_out = {inner for module in apart for inner in module.modules()}
    for owner in module.modules():
        if owner not in left_out:
            tensors = {**owner._parameters, **owner._buffers}
            yield from ((owner, name, tensor) for name, tensor in tensors.items() if tensor is not None)


def size_of(weights: Iterable[Weight]) -> int:
    """Bytes of a piece that holds these weights."""
    return sum(_aligned(tensor.nbytes) for _, _, tensor in weights)


class Piece:
    """Weights moved into one piece of host memory, or into a file; their modules use views of it, or of a copy.

    Args:
        weights: wherever they are.
        home: uint8 [size_of(weights)], or a file of this size, which they are copied to.
    """

    def __init__(self, weights: Sequence[Weight], home: Tensor | FilePiece) -> None:
        self.file = home if isinstance(home, FilePiece) else None
        self.host = home.tensor if isinstance(home, FilePiece) else home
        self._parts: list[_Part] = []
        offset = 0
        for owner, name, tensor in weights:
            self._parts.append(_Part(owner, name, offset, tensor.shape, tensor.dtype))
            offset += _aligned(tensor.nbytes)
        for part, (_, _, tensor) in zip(self._parts, weights, strict=True):
            part.view(self.host).copy_(tensor.detach())
        self.use(self.host)
        if self.file is not None:
            self.file.drop()

    def on(self, device: torch.device) -> Tensor:
        """A copy on a device."""
        if self.file is None:
            return self.host.to(device, non_blocking=True)
        return self.file.read(torch.empty_like(self.host)).to(device)

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


def home_of(size: int, device: torch.device, folder: Path | None) -> Tensor | FilePiece:
    """Host memory for so many bytes, pinned for `device`, or with a folder a file in it."""
    return pinned_memory(size, device) if folder is None else FilePiece(size, folder)


def into_host_memory(module: nn.Module, device: torch.device, folder: Path | None = None) -> Piece:
    """Moves a module's weights to their home; pages of the file they came from are dropped."""
    weights = list(weights_of(module))
    mapped = MappedPages(tensor for _, _, tensor in weights)
    piece = Piece(weights, home_of(size_of(weights), device, folder))
    mapped.drop()
    return piece


def stream_blocks(blocks: Sequence[tuple[nn.Module, Piece]], device: torch.device) -> Undo:
    """Brings blocks to the device, one ahead of the one that computes; returns what ends that.

    Args:
        blocks: in the order in which they are called, over and over, with their weights.
        device: a CUDA device, or the CPU, where copies are made at once.
    """
    streamer = BlockStreamer([piece for _, piece in blocks], device)
    return undoing([*(_hooked(block, streamer, index) for index, (block, _) in enumerate(blocks)), streamer.close])


def bring_for_calls(module: nn.Module, piece: Piece, device: torch.device) -> Undo:
    """Copies a module's weights, and its inputs if they are elsewhere, to the device for each call, and drops the weights
    after it, also where it fails; returns what ends that.
    """

    def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        piece.use(piece.on(device))
        return tuple(argument.to(device) for argument in arguments)

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        piece.use(piece.host)

    return with_hooks(module, before, after, also_after_errors=True)


class BlockStreamer:
    """The places on the device, and which block's weights each of them holds."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self._pieces = pieces
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        largest = max((len(piece.host) for piece in pieces), default=0)
        count = min(PLACES, len(pieces))
        self._places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(count)]
        self._held: list[int | None] = [None] * count
        self._ready: list[torch.cuda.Event | None] = [None] * count
        self._reading: list[Future[None] | None] = [None] * count
        self._reader: ThreadPoolExecutor | None = None
        if any(piece.file is not None for piece in pieces):
            self._reader = ThreadPoolExecutor(1, "offload")
            # of the places' sizes: a piece is read while the one before it is copied
            self._read = [pinned_memory(largest, device) for _ in range(count)]

    def close(self) -> None:
        """Ends the thread that reads files."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def before(self, index: int) -> None:
        """The block's weights are on the device when what is queued from now on runs.

        Raises OSError where a file cannot be read, and TimeoutError where that takes too long.
        """
        due = [(index + ahead) % len(self._pieces) for ahead in range(len(self._places))]
        if not set(due) <= set(self._held):  # the first call, or the first after a run that was cancelled half-way
            for place, following in enumerate(due):
                self._load(following, place)
        place = self._held.index(index)
        if (reading := self._reading[place]) is not None:
            try:
                reading.result(_READ_S)
            except BaseException as error:
                self._held[place] = None  # the next call tries again
                if isinstance(error, TimeoutError) and not reading.done():
                    raise TimeoutError(f"an offloaded piece was not read within {_READ_S:g} s") from error
                raise
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
        self._held[place] = index
        # what still uses the place runs first
        free = None if self._copying is None else torch.cuda.current_stream(self._device).record_event()
        if piece.file is None or self._reader is None:
            self._copy(piece.host, place, free)
        else:
            self._reading[place] = self._reader.submit(self._read_and_copy, piece.file, len(piece.host), place, free)

    def _read_and_copy(self, file: FilePiece, size: int, place: int, free: torch.cuda.Event | None) -> None:
        if (copied := self._ready[place]) is not None:
            copied.synchronize()
        self._copy(file.read(self._read[place][:size]), place, free)

    def _copy(self, host: Tensor, place: int, free: torch.cuda.Event | None) -> None:
        target = self._places[place][: len(host)]
        if self._copying is None or free is None:
            target.copy_(host)
            return
        self._copying.wait_event(free)
        with torch.cuda.stream(self._copying):
            target.copy_(host, non_blocking=True)
            self._ready[place] = self._copying.record_event()


def _hooked(block: nn.Module, streamer: BlockStreamer, index: int) -> Undo:
    def before(module: nn.Module, arguments: Any) -> None:
        streamer.before(index)

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        streamer.after(index)

    return with_hooks(block, before, after)


def with_hooks(
    module: nn.Module, before: Callable[..., Any], after: Callable[..., Any], *, also_after_errors: bool = False
) -> Undo:
    """Hooks before and after a module's forward; returns what takes them off."""
    handles = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=also_after_errors),
    ]
    return undoing([handle.remove for handle in handles])


def undoing(each: Iterable[Undo]) -> Undo:
    """All of them in one."""
    kept = list(each)

    def undo() -> None:
        for one in kept:
            one()

    return undo


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
