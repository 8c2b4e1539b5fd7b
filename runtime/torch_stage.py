"""What the stages that compute with torch share."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from bunraku.errors import OutOfMemory, StageBroken
from runtime.bundles import BundleComponent
from runtime.gpu import device_fault
from runtime.memory import release_cached_memory
from runtime.stage import LoadedComponent, StageRuntime

_log = logging.getLogger(__name__)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, most of which are slower in bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextmanager
def warming_up(runtime: StageRuntime) -> Iterator[None]:
    """Around what a stage computes with its loaded models before it is ready; the status says how long that took.

    What it leaves in the allocator's cache is given back, as stages that start later plan with what is free.
    """
    runtime.state_detail = f"warming up {runtime.bundle.name}"
    begun = time.perf_counter()
    yield
    if runtime.device.startswith("cuda"):
        torch.cuda.synchronize(runtime.device)
        release_cached_memory()
    runtime.warm_up_s = time.perf_counter() - begun
    _log.info("%s: warmed up in %.1f s", runtime.stage, runtime.warm_up_s)


@contextmanager
def where_it_fits(what: str) -> Iterator[None]:
    """Around what a stage computes as large as it is usually asked for, before it is ready.

    Too little memory for that is no reason not to start: smaller requests may fit, and those that do not are refused one
    by one.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OutOfMemory) and not isinstance(device_fault(error), OutOfMemory):
            raise
        _log.warning("%s: %s", what, error)
        traceback.clear_frames(error.__traceback__)  # of the tensors in them
        release_cached_memory()


def require_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, after checking that it holds numbers: what comes after would only spread what is none.

    Raises:
        StageBroken: it holds NaN or infinity. The next request may well be served.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise StageBroken(f"{name} are not finite", reason=f"{name.upper()}_NOT_FINITE")
    return tensor


def loaded_component(component: BundleComponent, module: nn.Module) -> LoadedComponent:
    """What the status says of a model that has been loaded."""
    tensors: Iterable[torch.Tensor] = [*chain(module.parameters(), module.buffers())]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return LoadedComponent(
        component.name,
        parameters=sum(tensor.numel() for tensor in tensors),
        size_bytes=sum(tensor.nbytes for tensor in tensors),
        dtype="+".join(dtypes),
        sha256=",".join(component.sha256),
        loras=tuple(map(str, component.loras)),
    )
