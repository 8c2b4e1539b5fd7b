"""The one thread of a stage that computes. The event loop only waits.

A coroutine that is cancelled (client gone, deadline passed, CancelGeneration) stops the work that it waits for: the
work looks at `raise_if_cancelled` between blocks (`gate_blocks` puts that in front of them from outside), the iterator
is closed on the same thread, and only then does the coroutine go on, so that memory is free when the next request runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bunraku.errors import BunrakuError, NotReady, OutOfMemory, StageBroken
from runtime.memory import release_cached_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")
_log = logging.getLogger(__name__)
_END: Any = object()

# How the device says that memory is short, beside torch.OutOfMemoryError: pinned host memory and driver allocations,
# the handles of cuBLAS and cuDNN, and torch's allocator on the CPU
_OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


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


@dataclass(eq=False)
class _Job(Generic[T]):
    """A piece of work and what it came to; it runs in the context (and so in the trace) of whoever asked for it."""

    work: Callable[[], T]
    cancelled: threading.Event
    context: Context
    is_cleanup: bool = False
    future: Future[T] = field(default_factory=Future)


class GpuThread:
    """Runs work one piece after another on a thread of its own.

    Args:
        name: of the thread.
        on_fault: called (on the thread) when the device is broken, before the error goes on.
    """

    def __init__(self, name: str = "gpu", on_fault: Callable[[StageBroken], None] | None = None) -> None:
        self._on_fault = on_fault
        self._stopping = False
        self._ended = False
        self._current: _Job[Any] | None = None
        # both may be entered again by the same thread: the garbage collector calls GpuStream.__del__ anywhere
        self._jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._lock = threading.RLock()
        # a daemon, because a device that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._work_off, name=name, daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` and gives its result.

        Raises:
            OutOfMemory: the device has too little memory for it.
            StageBroken: the device failed.
            NotReady: the thread was shut down.
        """
        return await self._finished(self._submit(_Job(work, threading.Event(), copy_context())))

    def stream(self, iterator: Callable[[], Iterator[T]]) -> GpuStream[T]:
        """Gives the items of an iterator that is made, advanced and closed on the thread, one item ahead.

        Other work may run between two items. Raises as `run`.
        """
        return GpuStream(self, iterator)

    def shutdown(self, timeout_s: float | None = None) -> bool:
        """Stops the current work at its next look at `raise_if_cancelled`, gives up what waits, and ends the thread.

        Args:
            timeout_s: how long to wait for that; None: as long as it takes.

        Returns:
            Whether the thread has ended; if not, it is left behind.
        """
        was_stopping, self._stopping = self._stopping, True
        current = self._current
        if current is not None:
            current.cancelled.set()
        if not was_stopping:
            self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _submit(self, job: _Job[T]) -> _Job[T]:
        with self._lock:
            if self._ended:
                _refuse(job)
            else:
                self._jobs.put(job)
        return job

    async def _finished(self, job: _Job[T]) -> T:
        """What a job came to; if the caller is cancelled, when the job no longer uses the device."""
        waiting = asyncio.wrap_future(job.future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            job.cancelled.set()
            # one that waits is taken back; one that runs stops at its next look at the flag
            if job.is_cleanup or not job.future.cancel():
                # looked at, so that asyncio does not report it as missed
                waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
                await asyncio.wait([waiting])
            raise

    def _work_off(self) -> None:
        while not self._ended:
            self._current = job = self._jobs.get()
            if job is None:
                self._end_when_idle()
            elif self._stopping and not job.is_cleanup:
                _refuse(job)
            elif job.future.set_running_or_notify_cancel():
                self._do(job)
            # a result must not live until the next job comes
            self._current = job = None

    def _end_when_idle(self) -> None:
        with self._lock:
            self._ended = self._jobs.empty()
            if not self._ended:
                self._jobs.put(None)

    def _do(self, job: _Job[T]) -> None:
        try:
            result = job.context.run(self._guarded, job)
        except BaseException as error:
            _free_locals(error)
            if isinstance(error, OutOfMemory):
                release_cached_memory()
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def _guarded(self, job: _Job[T]) -> T:
        _work.cancelled = job.cancelled
        try:
            if not job.is_cleanup:
                raise_if_cancelled()
            return job.work()
        except BunrakuError:
            raise
        except WorkCancelled:
            if self._stopping:
                raise _stopped() from None
            raise
        except StopIteration as error:
            # asyncio cannot hand it on: the coroutine would wait for ever
            raise RuntimeError("the work raised StopIteration") from error
        except Exception as error:
            fault = device_fault(error)
            if fault is None:
                raise
            if isinstance(fault, StageBroken) and self._on_fault is not None:
                self._on_fault(fault)
            raise fault from error
        finally:
            _work.cancelled = None


class GpuStream(AsyncIterator[T]):
    """The items of an iterator that lives on a GpuThread; see GpuThread.stream.

    Whoever leaves it early closes it with `aclose`, or just drops it: either way the iterator is closed before any
    work that is asked for later.
    """

    def __init__(self, thread: GpuThread, make: Callable[[], Iterator[T]]) -> None:
        self._thread = thread
        self._source: _Source[T] = _Source(make)
        self._context = copy_context()
        self._cancelled = threading.Event()
        self._closed = False
        self._ahead: _Job[T] | None = None
        self._closing: _Job[None] | None = None

    async def __anext__(self) -> T:
        if self._closed:
            raise StopAsyncIteration
        if self._ahead is None:
            self._ahead = self._advance()
        try:
            item = await self._thread._finished(self._ahead)
        except BaseException:
            try:
                await self.aclose()
            except Exception:
                _log.exception("an iterator could not be closed")
            raise
        if item is _END:
            await self.aclose()
            raise StopAsyncIteration
        self._ahead = self._advance()
        return item

    async def aclose(self) -> None:
        """Stops the work and closes the iterator; returns when the device is free of both."""
        self._close()
        if self._closing is not None:
            await self._thread._finished(self._closing)

    def __del__(self) -> None:
        self._close()

    def _advance(self) -> _Job[T]:
        return self._thread._submit(_Job(self._source.advance, self._cancelled, self._context))

    def _close(self) -> None:
        was_closed, self._closed = self._closed, True
        if self._ahead is not None and not was_closed:
            self._cancelled.set()
            closing = _Job(self._source.close, threading.Event(), self._context, is_cleanup=True)
            self._closing = self._thread._submit(closing)


class _Source(Generic[T]):
    """The iterator of a stream. Apart from it, so that work on the thread does not keep an abandoned stream alive."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self._make = make
        self._items: Iterator[T] | None = None

    def advance(self) -> T:
        if self._items is None:
            self._items = self._make()
        return next(self._items, _END)

    def close(self) -> None:
        close = getattr(self._items, "close", None)
        self._items = None
        if close is not None:
            close()


def device_fault(error: Exception) -> BunrakuError | None:
    """OutOfMemory or StageBroken if the error comes from the device, None if it is a bug of ours."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    of_device = "AcceleratorError" in names or (isinstance(error, RuntimeError) and "CUDA error" in text)
    if (
        {"OutOfMemoryError", "MemoryError"} & names
        or (of_device and any(sign in text for sign in _OUT_OF_MEMORY))
        or (isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY[1:]))
    ):
        return OutOfMemory(f"the request does not fit the memory of the device: {error}")
    if of_device:
        return StageBroken(f"the device failed: {error}", reason="DEVICE_FAULT")
    return None


def gate_blocks(
    blocks: Iterable[nn.Module], device: torch.device, check: Callable[[], None] = raise_if_cancelled
) -> Callable[[], None]:
    """Makes a model stop within one block when its work is cancelled (`check` raises then); returns what undoes it.

    On a GPU kernels are queued far ahead of the device, so a flag alone would stop only what is not yet queued: each
    block is therefore queued when the device has finished the one before. The device then waits for the first kernel
    of a block, some 0.1 ms beside the 130 ms of a block at full size (benchmarks/denoiser.py).
    """
    import torch

    finished: deque[torch.cuda.Event] = deque(maxlen=1)

    def before(module: nn.Module, arguments: Any) -> None:
        if finished:
            finished.pop().synchronize()
        check()

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            finished.append(event)

    handles = []
    for block in blocks:
        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _free_locals(error: BaseException | None) -> None:
    """Drops the local variables of the frames that an error passed through: tensors, which it would keep alive."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _refuse(job: _Job[Any]) -> None:
    if not job.future.set_running_or_notify_cancel():
        return
    if job.is_cleanup:
        job.future.set_result(None)
    else:
        job.future.set_exception(_stopped())


def _stopped() -> NotReady:
    return NotReady("the stage is stopping", reason="STAGE_DRAINING")
