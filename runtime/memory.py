"""How much memory there is and how much this process uses, in bytes."""

from __future__ import annotations

import gc
import resource
import sys
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class MemoryUse:
    """A memory in bytes: all there is, what nobody uses, what this process uses now and has used at most."""

    total_bytes: int = 0
    free_bytes: int = 0
    used_bytes: int = 0
    peak_bytes: int = 0


def host_memory() -> MemoryUse:
    """RAM of the host and of this process."""
    host = psutil.virtual_memory()
    return MemoryUse(host.total, host.available, psutil.Process().memory_info().rss, peak_rss_bytes())


def peak_rss_bytes() -> int:
    """The most resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory(device: str) -> MemoryUse:
    """Memory of a CUDA device and of this process on it; all zero for another device."""
    if not device.startswith("cuda"):
        return MemoryUse()
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return MemoryUse(total, free, torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device))


def release_cached_memory() -> None:
    """Gives back memory that no tensor uses any more: what is left of work that failed must not make the next fail."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def device_name(device: str) -> str:
    """What the device calls itself."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return "CPU"
