"""Stopping a model between its blocks, from outside."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from torch import nn

from runtime.gpu import GpuThread, gate_blocks

CPU = torch.device("cpu")


class Block(nn.Module):
    """Counts its runs; the second run of all waits until it is let go on."""

    def __init__(self, runs: list[int], begun: threading.Event, go_on: threading.Event) -> None:
        super().__init__()
        self.runs, self.begun, self.go_on = runs, begun, go_on

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.runs.append(1)
        if len(self.runs) == 2:
            self.begun.set()
            self.go_on.wait(5)
        return hidden + 1


class Model:
    def __init__(self, blocks: int = 6) -> None:
        self.runs: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.blocks = nn.ModuleList(Block(self.runs, self.begun, self.go_on) for _ in range(blocks))

    def __call__(self) -> torch.Tensor:
        hidden = torch.zeros(1)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


async def cancelled_in_the_second_block(model: Model) -> None:
    gpu = GpuThread()
    task = asyncio.create_task(gpu.run(model))
    assert await asyncio.to_thread(model.begun.wait, 5)
    task.cancel()
    await asyncio.sleep(0)
    model.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    gpu.shutdown()


async def test_a_gated_model_stops_after_the_block_it_is_in() -> None:
    model = Model()
    gate_blocks(model.blocks, CPU)
    await cancelled_in_the_second_block(model)
    assert len(model.runs) == 2


async def test_a_model_runs_on_once_its_gates_are_undone() -> None:
    model = Model()
    gate_blocks(model.blocks, CPU)()
    await cancelled_in_the_second_block(model)
    assert len(model.runs) == 6


async def test_gates_change_nothing_of_what_is_computed() -> None:
    model = Model()
    model.go_on.set()
    gate_blocks(model.blocks, CPU)
    assert model().item() == 6
    gpu = GpuThread()
    assert (await gpu.run(model)).item() == 6
    gpu.shutdown()
