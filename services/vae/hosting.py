"""What tiles remember of earlier frames, in host memory while it is not their turn.

Each layer's frames come to the device shortly before the layer and leave shortly after it, by copies that run beside
the computation in both directions: the device holds those of a few layers of one tile, whatever the number of tiles.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from services.vae.model import Grid, Past

_AHEAD = 2  # layers, of the one that computes
Key: TypeAlias = tuple[Hashable, nn.Module]  # of a tile, and a layer


class HostedPast(Past):
    """Of a clip whose tiles, and be it one that is the whole frame, leave what they remember in host memory."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._shuttle = Shuttle()

    @property
    def is_in_tiles(self) -> bool:
        return True

    def tile(self, key: Hashable) -> Past:
        return self._kept(key, lambda: _TilePast(self.grid, self._shuttle, key))

    def part(self, key: Hashable) -> Past:
        return self._kept(key, lambda: HostedPast(self.grid))

    def hosted(self) -> Iterator[Tensor]:
        """What is in host memory, of all tiles."""
        yield from self._shuttle.hosted()
        for part in self._parts.values():
            if isinstance(part, HostedPast | _TilePast):
                yield from part.hosted()


class _TilePast(Past):
    def __init__(self, grid: Grid, shuttle: Shuttle, key: Hashable) -> None:
        super().__init__(grid)
        self._shuttle, self._key = shuttle, key
        self._stand_ins: list[Tensor] = []

    def recall(self, layer: nn.Module) -> Tensor | None:
        return self._shuttle.recall((self._key, layer))

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        self._shuttle.keep((self._key, layer), frames)

    def as_large_as(self, other: Past) -> None:
        assert isinstance(other, _TilePast)
        self._stand_ins = [torch.empty_like(frames) for frames in self._shuttle.hosted(other._key)]

    def hosted(self) -> list[Tensor]:
        """What stands for what would be in host memory."""
        return self._stand_ins


@dataclass(eq=False)
class _Entry:
    hosted: Tensor
    left: Any = None  # when the copy in host memory is whole
    here: Tensor | None = None
    came: Any = None  # when the copy on the device is whole


class Lanes(Protocol):
    """Ways for copies beside the computation. Moments are the lanes' own; None is past."""

    def host_like(self, tensor: Tensor) -> Tensor:
        """Room in host memory."""
        ...

    def out(self, target: Tensor, source: Tensor) -> Any:
        """Copies what the device has computed when it has come where it is now; returns the moment when that is done."""
        ...

    def into(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copies to the device when it has come where it is now and `after` is past; returns when that is done."""
        ...

    def wait(self, moment: Any) -> None:
        """Lets the computation go on from here when a moment is past."""
        ...

    def close(self) -> None:
        """Lets the computation go on from here when all copies are done."""
        ...


class Shuttle:
    """Takes tensors of a device to pinned host memory and back, in the order in which they were kept at first.

    One of them is in use: from its `recall` or `keep` to that of another. On the device are besides it those that come
    next and the one that leaves. A tensor is given back to the allocator when the computation waits for the copy that
    reads it, so the allocator needs to know nothing of the streams of copies.
    """

    def __init__(self, lanes: Lanes | None = None) -> None:
        """lanes: None: those of the device of the first tensor."""
        self._lanes = lanes
        self._entries: dict[Key, _Entry] = {}
        self._order: list[_Entry] = []
        self._places: dict[_Entry, int] = {}
        self._used: _Entry | None = None
        self._leaving: tuple[Tensor, Any] | None = None
        self._device = torch.device("cpu")

    def recall(self, key: Key) -> Tensor | None:
        """The tensor of a key, on the device, to be read and written; None: none was kept."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry is not self._used:
            self._put_away()
            self._fetch(entry)
            self._of_device.wait(entry.came)
            self._used = entry
            for ahead in range(1, min(_AHEAD + 1, len(self._order))):
                self._fetch(self._order[(self._places[entry] + ahead) % len(self._order)])
        return entry.here

    def keep(self, key: Key, tensor: Tensor) -> None:
        """Keeps a tensor of a new key. Its values may yet be written, as may those of one that is recalled."""
        assert key not in self._entries
        self._put_away()
        self._device = tensor.device
        self._lanes = self._lanes or (_Streams(tensor.device) if tensor.is_cuda else AT_ONCE)
        entry = _Entry(self._lanes.host_like(tensor), here=tensor)
        self._places[entry] = len(self._order)
        self._order.append(entry)
        self._entries[key] = self._used = entry

    def hosted(self, tile: Hashable = None) -> list[Tensor]:
        """The copies in host memory; of one tile, if it is said which."""
        return [entry.hosted for (each, _), entry in self._entries.items() if tile in (None, each)]

    @property
    def _of_device(self) -> Lanes:
        assert self._lanes is not None
        return self._lanes

    def _put_away(self) -> None:
        entry, self._used = self._used, None
        if entry is None:
            return
        assert entry.here is not None
        entry.left = self._of_device.out(entry.hosted, entry.here)
        leaving, self._leaving = self._leaving, (entry.here, entry.left)
        entry.here = None
        if leaving is not None:
            self._of_device.wait(leaving[1])  # the computation may write there from now on

    def _fetch(self, entry: _Entry) -> None:
        if entry.here is None:
            entry.here = torch.empty_like(entry.hosted, device=self._device)
            entry.came = self._of_device.into(entry.here, entry.hosted, entry.left)

    def __del__(self) -> None:
        # of a clip that ends early: nothing is given back to the allocator that a copy still uses
        if self._lanes is not None:
            self._lanes.close()


class _AtOnce:
    """Copies that are done when their call returns."""

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)

    def out(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def into(self, target: Tensor, source: Tensor, after: None) -> None:
        target.copy_(source)

    def wait(self, moment: None) -> None:
        pass

    def close(self) -> None:
        pass


AT_ONCE: Lanes = _AtOnce()


class _Streams:
    """Of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._incoming, self._outgoing = _streams(device)

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def out(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        return self._copy(self._outgoing, target, source)

    def into(self, target: Tensor, source: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        if after is not None:
            self._incoming.wait_event(after)
        return self._copy(self._incoming, target, source)

    def wait(self, moment: torch.cuda.Event | None) -> None:
        if moment is not None:
            torch.cuda.current_stream(self._device).wait_event(moment)

    def close(self) -> None:
        for stream in (self._incoming, self._outgoing):
            torch.cuda.current_stream(self._device).wait_stream(stream)

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> torch.cuda.Event:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()


@lru_cache(maxsize=8)
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Beside the one that computes."""
    incoming, outgoing = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
    return incoming, outgoing
