"""Memory of a CUDA device as its driver counts it: a cap that this process keeps, and what it took at most.

PyTorch's allocator counts the blocks that it holds. The driver counts besides what no allocator sees, the CUDA context
and loaded kernels; a budget is for both, as it is what others on the device can rely on. On a device without memory of
its own (a CPU) nothing is capped and nothing is counted.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import lru_cache
from typing import Any

import torch

from runtime.budget import DoesNotFit

# Context, kernels of PyTorch, cuBLAS, cuDNN and Triton: 0.76 GiB on an H100 after all of them ran (benchmarks/vae.py)
OVERHEAD_BYTES = 832 * 1024**2
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SAMPLE_EVERY_S = 0.01
_MOST_PROCESSES = 64
_GIB = 1024**3
_UNKNOWN = 2**64 - 1  # what NVML says where it does not know


def cap_memory(device: torch.device, budget_bytes: int, overhead_bytes: int = OVERHEAD_BYTES) -> int:
    """Keeps this process within `budget_bytes` of a device, by the driver's count.

    The allocator gets what is left beside `overhead_bytes`, or beside what is outside it already if that is more. When
    it is short it first gives back what it only caches, then lets cuDNN and others do with smaller workspaces, and then
    raises torch.OutOfMemoryError. Its blocks grow and shrink from now on, so that gaps between them take next to
    nothing; memory that it holds already keeps the old form, so cap before weights are loaded.

    An earlier cap (`vram_fraction`) is never raised; `torch.cuda.set_per_process_memory_fraction(1.0)` lifts it.

    Returns:
        Bytes that the allocator may take; the budget on a device that is not capped.

    Raises:
        DoesNotFit: nothing would be left for the allocator.
    """
    if device.type != "cuda":
        return budget_bytes
    use_growing_blocks()
    _, total = torch.cuda.mem_get_info(device)
    outside = max(overhead_bytes, outside_allocator(device) or 0)
    earlier = torch.cuda.get_per_process_memory_fraction(device)
    if budget_bytes <= outside:
        raise DoesNotFit(
            f"the CUDA context and loaded kernels take {outside / _GIB:.2f} GiB; the budget is {budget_bytes / _GIB:.2f} GiB"
        )
    fraction = min((budget_bytes - outside) / total, earlier)
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    return int(fraction * total)


def use_growing_blocks() -> None:
    """Makes the allocator's blocks expandable, unless the environment has settings for it.

    On an H100 a pass of the VAE held 1.7 times what it used with blocks of fixed sizes, 1.1 times with these.
    """
    if not any(os.environ.get(name) for name in _ALLOCATOR_SETTINGS):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def outside_allocator(device: torch.device) -> int | None:
    """Bytes that this process takes of a CUDA device besides the allocator's; None: the driver does not tell."""
    used = process_bytes(device)
    return None if used is None else max(0, used - torch.cuda.memory_reserved(device))


def process_bytes(device: torch.device) -> int | None:
    """All bytes that this process takes of a CUDA device; None: the driver does not tell processes apart.

    So it is in a container that does not see the host's process numbers, on a part of a device (MIG) and on Windows.
    """
    nvml = _nvml()
    if nvml is None:
        return None
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return None
    count, processes = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
    if nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), processes):
        return None
    own = os.getpid()
    return next((entry.used for entry in processes[: count.value] if entry.pid == own and entry.used < _UNKNOWN), None)


def most_bytes(device: torch.device) -> int | None:
    """The most that this process has taken of a CUDA device so far; None: the driver does not tell."""
    outside = outside_allocator(device)  # which only grows
    return None if outside is None else outside + torch.cuda.max_memory_reserved(device)


def device_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that are taken, by whomever."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


class Peak:
    """The most that is taken of a device within a `with` block.

    Attributes:
        allocated_bytes: of tensors.
        reserved_bytes: of the allocator, with what it caches.
        driver_bytes: of the process, by the driver's count; of all processes, where it does not tell them apart.
        is_own: whether `driver_bytes` is this process' alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_counted = device.type == "cuda"
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="peak", daemon=True)
        self.allocated_bytes = self.reserved_bytes = self.driver_bytes = 0
        self.is_own = False

    def __enter__(self) -> Peak:
        if self._is_counted:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.is_own = process_bytes(self._device) is not None
            self._note()
            self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_counted:
            return
        self._ended.set()
        self._sampler.join()
        self.allocated_bytes = torch.cuda.max_memory_allocated(self._device)
        self.reserved_bytes = torch.cuda.max_memory_reserved(self._device)
        # what comes and goes between two samples is the allocator's; the rest only grows
        outside = self._note() - torch.cuda.memory_reserved(self._device)
        self.driver_bytes = max(self.driver_bytes, outside + self.reserved_bytes)

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_EVERY_S):
            self._note()

    def _note(self) -> int:
        used = (process_bytes(self._device) or 0) if self.is_own else device_bytes(self._device)
        self.driver_bytes = max(self.driver_bytes, used)
        return used


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


@lru_cache(maxsize=1)
def _nvml() -> Any:
    """The driver's library, ready; None where there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        is_complete = library.nvmlDeviceGetComputeRunningProcesses_v3 is not None  # drivers before 2021 lack it
        return library if is_complete and library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None
