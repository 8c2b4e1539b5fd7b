"""The cap on a device's memory and the count of what was taken, on a device that is made up and, if there is one, on a real one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime import vram
from runtime.budget import DoesNotFit
from runtime.vram import OVERHEAD_BYTES, Peak, cap_memory, most_bytes, outside_allocator, process_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB = 1024**2
TOTAL = 1000 * MIB


class Driver:
    """Stands for a device of 1000 MiB, its allocator and NVML."""

    def __init__(self) -> None:
        self.fraction = 1.0
        self.reserved = self.most_reserved = self.outside = 0
        self.others = 300 * MIB
        self.settings: list[str] = []
        self.processes = [(os.getpid() + 1, self.others), (os.getpid(), None)]
        self.fails = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in vram._ALLOCATOR_SETTINGS:
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "mem_get_info": lambda device: (TOTAL - self.used - self.others, TOTAL),
            "memory_reserved": lambda device: self.reserved,
            "max_memory_reserved": lambda device: self.most_reserved,
            "max_memory_allocated": lambda device: self.most_reserved - MIB,
            "reset_peak_memory_stats": lambda device: None,
            "synchronize": lambda device: None,
            "get_per_process_memory_fraction": lambda device: self.fraction,
            "set_per_process_memory_fraction": self.set_fraction,
            "get_device_properties": lambda device: SimpleNamespace(uuid="4711"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.settings.append)
        monkeypatch.setattr(vram, "_nvml", lambda: self)

    @property
    def used(self) -> int:
        return self.reserved + self.outside

    def set_fraction(self, fraction: float, device: torch.device) -> None:
        assert 0 <= fraction <= 1
        self.fraction = fraction

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        assert uuid == b"GPU-4711"
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, processes: Any) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = len(self.processes)
        for entry, (pid, used) in zip(processes, self.processes, strict=False):
            entry.pid, entry.used = pid, self.used if used is None else used
        return int(self.fails)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    driver.install(monkeypatch)
    return driver


def test_the_allocator_gets_what_is_beside_the_drivers_own(driver: Driver) -> None:
    driver.outside = 40 * MIB
    assert cap_memory(CUDA, 500 * MIB, overhead_bytes=100 * MIB) == 400 * MIB
    assert driver.fraction == 0.4
    assert driver.settings == ["expandable_segments:True"]


def test_what_is_outside_the_allocator_already_counts_if_it_is_more(driver: Driver) -> None:
    driver.outside, driver.reserved = 150 * MIB, 70 * MIB
    assert outside_allocator(CUDA) == 150 * MIB
    assert cap_memory(CUDA, 500 * MIB, overhead_bytes=100 * MIB) == 350 * MIB


def test_the_most_is_what_the_allocator_held_and_what_is_outside_of_it(driver: Driver) -> None:
    driver.outside, driver.reserved, driver.most_reserved = 150 * MIB, 70 * MIB, 200 * MIB
    assert most_bytes(CUDA) == 350 * MIB
    driver.fails = True
    assert most_bytes(CUDA) is None


def test_a_cap_is_never_raised(driver: Driver) -> None:
    driver.fraction = 0.25
    assert cap_memory(CUDA, 900 * MIB, overhead_bytes=100 * MIB) == 250 * MIB
    assert driver.fraction == 0.25


def test_a_budget_smaller_than_the_overhead_is_refused_with_the_numbers(driver: Driver) -> None:
    with pytest.raises(DoesNotFit, match=r"loaded kernels take 0\.81 GiB; the budget is 0\.49 GiB"):
        cap_memory(CUDA, 500 * MIB)
    assert driver.fraction == 1  # as it was
    assert OVERHEAD_BYTES == 832 * MIB


def test_settings_of_the_operator_stay(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    cap_memory(CUDA, 500 * MIB, overhead_bytes=100 * MIB)
    assert driver.settings == []
    assert driver.fraction == 0.4


def test_a_cpu_is_not_capped_and_not_counted() -> None:
    assert cap_memory(CPU, 123) == 123
    with Peak(CPU) as peak:
        pass
    assert (peak.allocated_bytes, peak.reserved_bytes, peak.driver_bytes, peak.is_own) == (0, 0, 0, False)


@pytest.mark.parametrize("why", ["no library", "not listed", "failed", "not known"])
def test_a_driver_may_not_tell_processes_apart(driver: Driver, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    driver.outside = 200 * MIB
    assert process_bytes(CUDA) == 200 * MIB
    if why == "no library":
        monkeypatch.setattr(vram, "_nvml", lambda: None)
    elif why == "not listed":
        driver.processes.pop()
    elif why == "not known":
        driver.processes[1] = (os.getpid(), 2**64 - 1)
    driver.fails = why == "failed"
    assert process_bytes(CUDA) is None
    assert outside_allocator(CUDA) is None
    # nothing is known, so the overhead is what was said
    assert cap_memory(CUDA, 500 * MIB, overhead_bytes=100 * MIB) == 400 * MIB
    with Peak(CUDA) as peak:
        pass
    assert not peak.is_own
    assert peak.driver_bytes == driver.used + driver.others


def test_peak_is_the_process_own_and_more_than_a_sample_may_see(driver: Driver) -> None:
    driver.outside, driver.reserved = 50 * MIB, 10 * MIB
    with Peak(CUDA) as peak:
        # a block that came and went, and a kernel that was loaded and stays
        driver.most_reserved, driver.outside = 200 * MIB, 60 * MIB
    assert peak.is_own
    assert peak.reserved_bytes == 200 * MIB
    assert peak.allocated_bytes == 199 * MIB
    assert peak.driver_bytes == 260 * MIB


def test_peak_is_sampled_while_it_lasts(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vram, "_SAMPLE_EVERY_S", 0.001)
    with Peak(CUDA) as peak:
        driver.outside = 90 * MIB
        while peak.driver_bytes < 90 * MIB:
            pass
        driver.outside = 0
    assert peak.driver_bytes == 90 * MIB
    assert not peak._sampler.is_alive()


def test_structure_has_the_size_that_nvml_expects() -> None:
    assert ctypes.sizeof(vram._Process) == 24
    assert vram._Process.used.offset == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_device_takes_no_more_than_the_cap() -> None:
    program = """
import torch
from runtime.vram import Peak, cap_memory
device, budget = torch.device("cuda", 0), 2 * 1024**3
allowed = cap_memory(device, budget)
with Peak(device) as peak:
    pieces, refused = [], False
    for mebibytes in (100, 300, 20, 500):  # sizes that leave gaps
        pieces.append(torch.ones(mebibytes * 2**20, dtype=torch.uint8, device=device))
        pieces = pieces[-1:]
    try:
        pieces.append(torch.ones(allowed, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        refused = True
    pieces.append(torch.ones(allowed - 600 * 2**20, dtype=torch.uint8, device=device))
assert refused
assert peak.allocated_bytes <= peak.reserved_bytes <= allowed
assert peak.reserved_bytes < peak.driver_bytes <= budget, peak.driver_bytes
"""
    subprocess.run([sys.executable, "-c", program], check=True)
