"""Copies beside the computation never run too early or too late, however late a device takes them up."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from services.vae import hosting
from services.vae.convolution import Form
from services.vae.hosting import HostedPast, Shuttle
from services.vae.model import Grid
from tests.services.vae.test_tiles import both_ways, precise, some_frames

WAYS = list(product([False, True], repeat=2))  # whether copies in, and copies out, run as late as they may
KINDS = ["into", "out"]


@dataclass(eq=False)
class Copy:
    target: weakref.ref[Tensor]
    source: weakref.ref[Tensor]
    after: Copy | None
    is_done: bool = False

    def run(self) -> None:
        target, source = self.target(), self.source()
        assert target is not None, "given back before it was written"
        assert source is not None, "given back before it was read"
        target.copy_(source)
        self.is_done = True


class Simulated:
    """Lanes whose copies run at once, or not before somebody waits for them. What computes, computes at once."""

    def __init__(self, late_in: bool, late_out: bool) -> None:
        self._is_late = {"into": late_in, "out": late_out}
        self._queues: dict[str, list[Copy]] = {kind: [] for kind in KINDS}
        self.waits = self.bytes_out = 0

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, torch.nan)

    def out(self, target: Tensor, source: Tensor) -> Copy:
        self.bytes_out += source.nbytes
        return self._queued("out", target, source, None)

    def into(self, target: Tensor, source: Tensor, after: Copy | None) -> Copy:
        return self._queued("into", target.fill_(torch.nan), source, after)

    def wait(self, moment: Copy | None) -> None:
        self.waits += 1
        for kind in KINDS:
            if moment in self._queues[kind]:
                self._run(kind, moment)

    def close(self) -> None:
        for kind in KINDS:
            self._run(kind, None)

    def _queued(self, kind: str, target: Tensor, source: Tensor, after: Copy | None) -> Copy:
        copy = Copy(weakref.ref(target), weakref.ref(source), after)
        self._queues[kind].append(copy)
        if not self._is_late[kind]:
            self._run(kind, copy)
        return copy

    def _run(self, kind: str, last: Copy | None) -> None:
        """A lane's copies in their order, up to `last`."""
        queue = self._queues[kind]
        while queue and (last is None or not last.is_done):
            copy = queue[0]
            if copy.after is not None and not copy.after.is_done:
                self.wait(copy.after)
            copy.run()
            queue.pop(0)


@pytest.mark.parametrize(("late_in", "late_out"), WAYS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_each_finds_what_it_left(count: int, late_in: bool, late_out: bool) -> None:
    lanes = Simulated(late_in, late_out)
    shuttle, keys = Shuttle(lanes), [("tile", nn.Identity()) for _ in range(count)]
    for number, key in enumerate(keys):
        tensor = torch.empty(3)
        shuttle.keep(key, tensor)
        tensor.fill_(number)
        del tensor
    for turn in range(4):
        for number, key in enumerate(keys):
            found = shuttle.recall(key)
            assert found is not None
            assert found.tolist() == [number + 10.0 * turn] * 3
            found += 10
            del found
    del shuttle  # with copies under way, of which none may be left behind
    assert not any(lanes._queues.values())


def test_what_the_next_layers_need_is_on_its_way_while_one_computes() -> None:
    lanes = Simulated(late_in=True, late_out=False)
    shuttle, keys = Shuttle(lanes), [("tile", nn.Identity()) for _ in range(5)]
    for key in keys:
        shuttle.keep(key, torch.zeros(3))
    for key in keys * 2:
        shuttle.recall(key)
        assert len(lanes._queues["into"]) == 2


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 3)])
@pytest.mark.parametrize(("late_in", "late_out"), WAYS)
def test_clips_are_the_same_however_late_copies_are(
    grid: Grid, late_in: bool, late_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = precise("flat", Form.PICTURES)
    frames = some_frames(vae, 9)
    whole = both_ways(vae, frames)
    lanes = Simulated(late_in, late_out)
    monkeypatch.setattr(hosting, "AT_ONCE", lanes)
    for tiled, expected in zip(both_ways(vae, frames, partial(HostedPast, grid)), whole, strict=True):
        assert (tiled - expected).abs().max() < 1e-12
    assert lanes.waits > 0
    assert lanes.bytes_out > 0


def test_a_copy_that_is_not_waited_for_is_noticed() -> None:
    """Of the simulation itself."""
    lanes = Simulated(True, True)
    device, host = torch.ones(1), torch.zeros(1)
    moment = lanes.out(host, device)
    del device
    with pytest.raises(AssertionError, match="given back before it was read"):
        lanes.wait(moment)


def test_a_late_copy_has_the_values_of_when_it_runs() -> None:
    """Of the simulation itself."""
    lanes = Simulated(True, False)
    device, host = torch.empty(1), torch.zeros(1)
    moment = lanes.into(device, host, None)
    host += 1
    assert device.isnan().all()
    lanes.wait(moment)
    assert device.item() == 1
