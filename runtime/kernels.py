"""Whether kernels in Triton can be used: they are compiled on the machine that runs them, at their first use."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from functools import cache

import torch

_log = logging.getLogger(__name__)


def can_compile(device: torch.device, oldest: tuple[int, int]) -> bool:
    """Whether this machine can make kernels for a device, if that is a GPU of at least this compute capability."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < oldest:
        return False
    return importlib.util.find_spec("triton") is not None and has_compiler()


@cache
def has_compiler() -> bool:
    """Triton builds the function that starts a kernel with a C compiler: the one that CC names, gcc or clang."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return True
    _log.warning("no C compiler: Triton cannot build its kernels here, and slower operations stand in for them")
    return False
