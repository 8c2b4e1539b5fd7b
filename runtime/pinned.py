"""Host memory that a GPU copies from and to by itself, in exactly the sizes that are asked for.

PyTorch's own pinned memory comes in powers of two: 299 MB of a block's weights would take 512.
"""

from __future__ import annotations

import logging
import mmap
from contextlib import suppress

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def pinned_memory(size: int, device: torch.device) -> Tensor:
    """uint8 [size] in host memory, pinned if `device` is a CUDA device; given back to the system with the last view.

    Where the driver refuses to pin, the memory is an ordinary one: copies are right then, but work waits for them.
    """
    pages = _Pages(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that has no huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults when it is filled
    memory = torch.frombuffer(pages, dtype=torch.uint8)[:size]
    if device.type == "cuda":
        pages.register(memory.data_ptr(), device)
    return memory


class _Pages(mmap.mmap):
    """Pages of memory, registered with the driver until the last tensor on them is gone."""

    _registered = 0  # address

    def register(self, address: int, device: torch.device) -> None:
        error = torch.cuda.cudart().cudaHostRegister(address, len(self), _PORTABLE)  # type: ignore[no-untyped-call]
        if int(error):
            _log.warning("%d bytes of host memory could not be pinned: CUDA error %d", len(self), int(error))
            _forget_error(device)
        else:
            self._registered = address

    def __del__(self) -> None:
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered)  # type: ignore[no-untyped-call]


def _forget_error(device: torch.device) -> None:
    """CUDA remembers the error of a call, and PyTorch raises it when the next kernel is launched, which is this one."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)
