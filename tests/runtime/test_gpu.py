"""The thread that computes: order, cancelling, closing, faults of the device."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from bunraku.errors import BunrakuError, InvalidRequest, NotReady, OutOfMemory, StageBroken
from runtime.gpu import GpuThread, WorkCancelled, device_fault, raise_if_cancelled
from tests.runtime.fakes import until


@pytest_asyncio.fixture
async def gpu() -> AsyncIterator[GpuThread]:
    thread = GpuThread("test-gpu")
    yield thread
    assert await asyncio.to_thread(thread.shutdown, 5.0)


class Items:
    """An iterator that notes what happens to it, and on which thread."""

    def __init__(self, count: int = 10) -> None:
        self.count = count
        self.made = 0
        self.closed_on: str | None = None
        self.closed = threading.Event()

    def __call__(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                raise_if_cancelled()
                self.made += 1
                yield number
        finally:
            self.closed_on = threading.current_thread().name
            self.closed.set()


def not_cancelled() -> str:
    raise_if_cancelled()
    return "done"


def hanging(begun: threading.Event, free: threading.Event) -> bool:
    """Work that does not look whether it is cancelled."""
    begun.set()
    return free.wait(5)


def working(begun: threading.Event) -> None:
    """Work that never ends unless it is cancelled."""
    begun.set()
    while True:
        raise_if_cancelled()
        time.sleep(0.001)


async def test_work_runs_in_order_on_the_one_thread(gpu: GpuThread) -> None:
    done: list[tuple[int, str]] = []
    work = [lambda number=number: done.append((number, threading.current_thread().name)) for number in range(5)]
    await asyncio.gather(*(gpu.run(each) for each in work))
    assert done == [(number, "test-gpu") for number in range(5)]


async def test_a_result_and_an_error_come_back(gpu: GpuThread) -> None:
    assert await gpu.run(lambda: 42) == 42
    with pytest.raises(InvalidRequest, match="wrong"):
        await gpu.run(lambda: (_ for _ in ()).throw(InvalidRequest(("field", "wrong"))))


async def test_the_event_loop_runs_while_the_thread_works(gpu: GpuThread) -> None:
    free = threading.Event()
    work = asyncio.create_task(gpu.run(lambda: free.wait(5)))
    await asyncio.sleep(0)
    free.set()
    assert await work


async def test_work_that_raises_stop_iteration_is_an_error_not_a_hang(gpu: GpuThread) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await gpu.run(lambda: next(iter(())))


async def test_work_runs_in_the_context_of_its_caller(gpu: GpuThread) -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("the caller's")
    assert await gpu.run(variable.get) == "the caller's"
    assert [item async for item in gpu.stream(lambda: iter([variable.get()]))] == ["the caller's"]


async def test_a_result_does_not_outlive_its_caller(gpu: GpuThread) -> None:
    class Result:
        pass

    gone = weakref.ref(await gpu.run(Result))
    await until(lambda: gone() is None)


async def test_cancelled_work_stops_before_its_caller_goes_on(gpu: GpuThread) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def work() -> None:
        try:
            working(begun)
        finally:
            stopped.set()

    task = asyncio.create_task(gpu.run(work))
    await until(begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stopped.is_set()


async def test_work_that_still_waits_is_taken_back_at_once(gpu: GpuThread) -> None:
    free, ran = threading.Event(), threading.Event()
    first = asyncio.create_task(gpu.run(lambda: free.wait(5)))
    second = asyncio.create_task(gpu.run(ran.set))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert not first.done()
    free.set()
    await first
    await gpu.run(lambda: None)
    assert not ran.is_set()


async def test_cancelling_one_piece_of_work_leaves_the_next_alone(gpu: GpuThread) -> None:
    begun = threading.Event()
    first = asyncio.create_task(gpu.run(lambda: working(begun)))
    second = asyncio.create_task(gpu.run(not_cancelled))
    await until(begun.is_set)
    first.cancel()
    assert await second == "done"
    assert first.cancelled()


def test_nothing_is_cancelled_outside_the_thread() -> None:
    raise_if_cancelled()


async def test_a_stream_gives_its_items_in_order_and_closes_on_the_thread(gpu: GpuThread) -> None:
    items = Items(5)
    assert [item async for item in gpu.stream(items)] == [0, 1, 2, 3, 4]
    assert items.closed_on == "test-gpu"


async def test_a_stream_that_is_not_read_makes_nothing(gpu: GpuThread) -> None:
    items = Items()
    stream = gpu.stream(items)
    await gpu.run(lambda: None)
    await stream.aclose()
    assert items.made == 0
    assert [item async for item in stream] == []


async def test_a_stream_works_one_item_ahead_and_no_further(gpu: GpuThread) -> None:
    items = Items()
    stream = gpu.stream(items)
    assert await anext(stream) == 0
    await until(lambda: items.made == 2)
    await gpu.run(lambda: None)
    assert items.made == 2
    await stream.aclose()


async def test_other_work_runs_between_two_items(gpu: GpuThread) -> None:
    stream = gpu.stream(Items())
    await anext(stream)
    assert await gpu.run(lambda: "between") == "between"
    assert await anext(stream) == 1
    await stream.aclose()


async def test_leaving_a_stream_closes_it_before_later_work(gpu: GpuThread) -> None:
    items = Items()
    async for _ in gpu.stream(items):
        break
    # nothing was awaited since: the close is first in the queue because the stream was dropped
    assert await gpu.run(items.closed.is_set)
    assert items.closed_on == "test-gpu"


async def test_a_stream_left_by_an_abandoned_generator_is_closed_before_later_work(gpu: GpuThread) -> None:
    items = Items()

    async def service() -> AsyncIterator[int]:
        async for item in gpu.stream(items):
            yield item

    answers = service()
    await anext(answers)
    await answers.aclose()  # type: ignore[attr-defined]
    assert await gpu.run(items.closed.is_set)


async def test_cancelling_while_an_item_is_computed_stops_and_closes(gpu: GpuThread) -> None:
    begun, closed = threading.Event(), threading.Event()

    def endless() -> Iterator[int]:
        try:
            yield 0
            working(begun)
        finally:
            closed.set()

    async def consume() -> None:
        async for _ in gpu.stream(endless):
            pass

    task = asyncio.create_task(consume())
    await until(begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()


async def test_cancelling_while_the_consumer_waits_elsewhere_stops_and_closes(gpu: GpuThread) -> None:
    """As when a client does not read: the coroutine is suspended in a write, not in the stream."""
    begun, items_closed = threading.Event(), threading.Event()

    def endless() -> Iterator[int]:
        try:
            yield 0
            working(begun)
        finally:
            items_closed.set()

    async def consume() -> None:
        async for _ in gpu.stream(endless):
            await asyncio.Event().wait()

    task = asyncio.create_task(consume())
    await until(begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()
    await gpu.run(lambda: None)
    assert items_closed.is_set()


async def test_cancelling_twice_does_not_lose_the_close(gpu: GpuThread) -> None:
    begun, free, closed = threading.Event(), threading.Event(), threading.Event()

    def stubborn() -> Iterator[int]:
        try:
            begun.set()
            free.wait(5)  # does not look at the flag
            yield 0
        finally:
            closed.set()

    async def consume() -> None:
        async for _ in gpu.stream(stubborn):
            pass

    task = asyncio.create_task(consume())
    await until(begun.is_set)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gpu.run(lambda: None)
    assert closed.is_set()


async def test_cancelling_twice_does_not_leave_an_error_behind(gpu: GpuThread) -> None:
    begun, free = threading.Event(), threading.Event()

    def stubborn() -> None:
        begun.set()
        free.wait(5)
        raise_if_cancelled()

    task = asyncio.create_task(gpu.run(stubborn))
    await until(begun.is_set)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    assert task.cancelled()
    free.set()
    await gpu.run(lambda: None)


async def test_an_error_of_an_item_comes_when_it_is_its_turn(gpu: GpuThread) -> None:
    def failing() -> Iterator[int]:
        yield 0
        raise InvalidRequest(("field", "wrong"))

    stream = gpu.stream(failing)
    assert await anext(stream) == 0
    with pytest.raises(InvalidRequest):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_an_error_of_an_item_that_nobody_waits_for_is_dropped(gpu: GpuThread) -> None:
    failed = threading.Event()

    def failing() -> Iterator[int]:
        yield 0
        failed.set()
        raise InvalidRequest(("field", "wrong"))

    stream = gpu.stream(failing)
    await anext(stream)
    await until(failed.is_set)
    await stream.aclose()


async def test_an_iterator_that_cannot_be_made_is_an_error(gpu: GpuThread) -> None:
    def failing() -> Iterator[int]:
        raise InvalidRequest(("field", "wrong"))

    with pytest.raises(InvalidRequest):
        await anext(gpu.stream(failing))


async def test_an_error_while_closing_does_not_hide_the_cancellation(
    gpu: GpuThread, caplog: pytest.LogCaptureFixture
) -> None:
    begun = threading.Event()

    def failing() -> Iterator[int]:
        try:
            begun.set()
            while not begun.wait(0.001):
                pass
            time.sleep(0.02)
            yield 0
        finally:
            raise ValueError("cannot close")

    task = asyncio.create_task(gpu.stream(failing).__anext__())
    await until(begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "could not be closed" in caplog.text


async def test_what_failed_work_held_is_freed_while_its_error_lives(gpu: GpuThread) -> None:
    class Big:
        pass

    held: list[weakref.ref[Big]] = []

    def work() -> None:
        big = Big()
        held.append(weakref.ref(big))
        raise TornError("kept by whoever waits")

    with pytest.raises(TornError) as error:
        await gpu.run(work)
    assert held[0]() is None
    assert error.value.__traceback__ is not None


class TornError(Exception):
    """A bug of ours."""


class OutOfMemoryError(RuntimeError):
    """Named as torch.OutOfMemoryError is."""


class AcceleratorError(RuntimeError):
    """Named as torch.AcceleratorError is."""


FAULTS: dict[str, tuple[Exception, type[BunrakuError] | None]] = {
    "cuda out of memory": (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemory),
    "pinned memory": (AcceleratorError("CUDA error: out of memory"), OutOfMemory),
    "cublas": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), OutOfMemory),
    "host": (MemoryError("Unable to allocate 8 GiB"), OutOfMemory),
    "torch on the host": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
    "device assert": (AcceleratorError("CUDA error: device-side assert triggered"), StageBroken),
    "illegal address": (RuntimeError("CUDA error: an illegal memory access was encountered"), StageBroken),
    "launch": (AcceleratorError("CUDA error: unspecified launch failure"), StageBroken),
    "a bug": (RuntimeError("shapes cannot be multiplied"), None),
    "a bug that mentions memory": (RuntimeError("the table is out of memory of past rows"), None),
    "another kind": (ValueError("CUDA error"), None),
}


@pytest.mark.parametrize("case", FAULTS)
async def test_a_fault_of_the_device_is_told_from_a_bug(case: str) -> None:
    error, kind = FAULTS[case]
    faults: list[StageBroken] = []
    gpu = GpuThread(on_fault=faults.append)

    def work() -> None:
        raise error

    with pytest.raises(kind or type(error)) as raised:
        await gpu.run(work)
    if kind is StageBroken:
        assert raised.value is faults[0]
        assert faults[0].reason == "DEVICE_FAULT"
        assert str(error) in faults[0].message
    else:
        assert faults == []
    if kind is not None:
        assert raised.value.__cause__ is error
    gpu.shutdown()


async def test_errors_of_ours_pass_as_they_are(gpu: GpuThread) -> None:
    known = NotReady("busy")
    assert device_fault(known) is None

    def work() -> None:
        raise known

    with pytest.raises(NotReady) as error:
        await gpu.run(work)
    assert error.value is known


async def test_shutdown_ends_current_work_and_refuses_the_rest() -> None:
    gpu, begun, items = GpuThread(), threading.Event(), Items()
    stream = gpu.stream(items)
    await anext(stream)
    await until(lambda: items.made == 2)
    current = asyncio.create_task(gpu.run(lambda: working(begun)))
    waiting = asyncio.create_task(gpu.run(lambda: None))
    await until(begun.is_set)
    assert gpu.shutdown(5.0)
    for task in (current, waiting):
        with pytest.raises(NotReady, match="stopping") as error:
            await task
        assert error.value.reason == "STAGE_DRAINING"
    with pytest.raises(NotReady):
        await gpu.run(lambda: None)
    assert await anext(stream) == 1
    with pytest.raises(NotReady):
        await anext(stream)


async def test_streams_are_still_closed_on_the_thread_while_it_shuts_down() -> None:
    gpu, begun, free, items = GpuThread("last-gpu"), threading.Event(), threading.Event(), Items()
    stream = gpu.stream(items)
    await anext(stream)
    await until(lambda: items.made == 2)
    work = asyncio.create_task(gpu.run(lambda: hanging(begun, free)))
    await until(begun.is_set)
    assert not gpu.shutdown(0.0)
    closing = asyncio.create_task(stream.aclose())
    await asyncio.sleep(0)
    free.set()
    await closing
    assert items.closed_on == "last-gpu"
    assert await work
    assert gpu.shutdown(5.0)


async def test_a_close_that_waits_is_not_taken_back_with_its_caller(gpu: GpuThread) -> None:
    begun, free, items = threading.Event(), threading.Event(), Items()
    stream = gpu.stream(items)
    await anext(stream)
    await until(lambda: items.made == 2)
    work = asyncio.create_task(gpu.run(lambda: hanging(begun, free)))
    await until(begun.is_set)
    closing = asyncio.create_task(stream.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.sleep(0)
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert await work
    assert items.closed_on == "test-gpu"


async def test_a_thread_that_is_shut_down_twice_while_it_works_ends() -> None:
    gpu, begun, free = GpuThread(), threading.Event(), threading.Event()
    work = asyncio.create_task(gpu.run(lambda: hanging(begun, free)))
    await until(begun.is_set)
    assert not gpu.shutdown(0.0)
    assert not gpu.shutdown(0.0)
    free.set()
    await work
    assert gpu.shutdown(5.0)


async def test_a_device_that_hangs_does_not_keep_the_thread_owner_waiting() -> None:
    gpu, begun, free = GpuThread(), threading.Event(), threading.Event()
    work = asyncio.create_task(gpu.run(lambda: hanging(begun, free)))
    await until(begun.is_set)
    assert not gpu.shutdown(0.01)
    free.set()
    await work


async def test_closing_a_stream_after_the_end_of_the_thread_does_not_hang() -> None:
    gpu, items = GpuThread(), Items()
    stream = gpu.stream(items)
    await anext(stream)
    assert gpu.shutdown(5.0)
    await stream.aclose()


def test_cancelled_work_is_an_ordinary_exception_so_that_models_clean_up() -> None:
    assert issubclass(WorkCancelled, Exception)


@pytest.mark.parametrize(("error", "times"), [(MemoryError(), 1), (ValueError("a bug"), 0)])
async def test_memory_is_given_back_after_work_that_had_too_little(
    gpu: GpuThread, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
) -> None:
    given_back: list[str] = []
    monkeypatch.setattr("runtime.gpu.release_cached_memory", lambda: given_back.append(threading.current_thread().name))

    def fails() -> None:
        raise error

    with pytest.raises((OutOfMemory, ValueError)):
        await gpu.run(fails)
    assert len(given_back) == times
    assert threading.current_thread().name not in given_back
