"""The one thread of a stage that computes. The event loop only waits.

A coroutine that is cancelled (client gone, deadline passed, CancelGeneration) stops the work that it waits for: the
work looks at `raise_if_cancelled` between blocks (`gate_blocks` puts that in front of them from outside), the iterator
is closed on the same thread, and only then does the coroutine go on, so that memory is free when the next request runs.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from bunraku.errors import BunrakuError, OutOfMemory, StageBroken

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")
_END: Any = object()


class WorkCancelled(Exception):
    """Raised inside work whose caller no longer waits for it; never leaves the thread."""


class _Work(threading.local):
    """The cancellation flag of what the current thread works on."""

    cancelled: threading.Event | None = None


_work = _Work()


def raise_if_cancelled() -> None:
    """Ends the current work if nobody waits for it any more. Does nothing outside a GpuThread."""
    if _work.cancelled is not None and _work.cancelled.is_set():
        raise WorkCancelled


class GpuThread:
    """Runs work one piece after another on a thread of its own.

    Args:
        name: of the thread.
        on_fault: called (on the thread) when the device is broken, before the error goes on.
    """

    def __init__(self, name: str = "gpu", on_fault: Callable[[StageBroken], None] | None = None) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._on_fault = on_fault

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` and gives its result.

        Raises:
            OutOfMemory: the device has too little memory for it.
            StageBroken: the device failed.
        """
        cancelled = threading.Event()
        return await self._submit(work, cancelled)

    async def stream(self, iterator: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
        """Gives the items of an iterator that is made, advanced and closed on the thread, one item ahead.

        Other work may run between two items. Raises as `run`.
        """
        cancelled = threading.Event()
        items = await self._submit(iterator, cancelled)
        ahead: asyncio.Task[T] | None = None
        try:
            ahead = asyncio.ensure_future(self._submit(lambda: next(items, _END), cancelled))
            while (item := await ahead) is not _END:
                ahead = asyncio.ensure_future(self._submit(lambda: next(items, _END), cancelled))
                yield item
        finally:
            cancelled.set()
            if ahead is not None and not ahead.done():
                ahead.cancel()
            await asyncio.shield(asyncio.ensure_future(self._close(items)))

    def shutdown(self) -> None:
        """Waits for the current work and ends the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    async def _submit(self, work: Callable[[], T], cancelled: threading.Event) -> T:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, self._guarded, work, cancelled)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            cancelled.set()
            # the thread stops at its next look at the flag; until then the device is not free
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()
            raise

    async def _close(self, items: Iterator[Any]) -> None:
        close = getattr(items, "close", None)
        if close is not None:
            await asyncio.get_running_loop().run_in_executor(self._executor, close)

    def _guarded(self, work: Callable[[], T], cancelled: threading.Event) -> T:
        _work.cancelled = cancelled
        try:
            raise_if_cancelled()
            return work()
        except (BunrakuError, WorkCancelled):
            raise
        except Exception as error:
            fault = device_fault(error)
            if fault is None:
                raise
            if isinstance(fault, StageBroken) and self._on_fault is not None:
                self._on_fault(fault)
            raise fault from error
        finally:
            _work.cancelled = None


def device_fault(error: Exception) -> BunrakuError | None:
    """OutOfMemory or StageBroken if the error comes from the device, None if it is a bug of ours."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return OutOfMemory(f"the request does not fit the memory of the device: {error}")
    if "AcceleratorError" in names or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):
        return StageBroken(f"the device failed: {error}", reason="DEVICE_FAULT")
    return None


def gate_blocks(blocks: Iterable[nn.Module], device: torch.device) -> Callable[[], None]:
    """Makes a model stop within one block when its work is cancelled; returns what undoes it.

    On a GPU kernels are queued far ahead of the device, so a flag alone would stop only what is not yet queued: each
    block therefore waits until the device has finished the block before the last one, which leaves one block queued
    and the device never idle.
    """
    import torch

    finished: deque[torch.cuda.Event] = deque(maxlen=2)

    def before(module: nn.Module, arguments: Any) -> None:
        raise_if_cancelled()
        if device.type == "cuda" and len(finished) == 2:
            finished[0].synchronize()
            raise_if_cancelled()

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        if device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            finished.append(event)

    handles = []
    for block in blocks:
        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
