"""Whether kernels in Triton can be used: they are compiled on the machine that runs them, at their first use."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

_log = logging.getLogger(__name__)


def can_compile(device: torch.device, oldest: tuple[int, int]) -> bool:
    """Whether this machine can make kernels for a device, if that is a GPU of at least this compute capability."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < oldest:
        return False
    return importlib.util.find_spec("triton") is not None and has_compiler()


@cache
def has_compiler() -> bool:
    """Triton builds the function that starts a kernel with a C compiler, the one that CC names, gcc or clang, and with
    Python's headers, which some systems have in a package of their own.
    """
    missing = None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing = "C compiler"
    elif not (headers := _headers()).is_file():
        missing = str(headers)
    if missing:
        _log.warning("no %s: Triton cannot build its kernels here, and slower operations stand in for them", missing)
    return missing is None


def _headers() -> Path:
    """Where Triton looks for them (triton.runtime.build)."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme), "Python.h")
