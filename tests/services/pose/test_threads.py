"""Work on several cores, and what is made in advance of being asked for."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Generator

import pytest

from runtime.gpu import GpuThread
from services.pose.threads import ahead, behind


class Source:
    """Numbers from 0 on; says what was taken of it, when it was closed, and on which threads."""

    def __init__(self, count: int = 1000, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.taken = 0
        self.closed = threading.Event()
        self.threads: set[str] = set()

    def items(self) -> Generator[int]:
        try:
            for number in range(self.count):
                self.threads.add(threading.current_thread().name)
                if number == self.fails_at:
                    raise ValueError(f"no {number}")
                self.taken = number + 1
                yield number
        finally:
            self.threads.add(threading.current_thread().name)
            self.closed.set()


def test_results_come_in_the_order_of_the_items() -> None:
    wait = threading.Event()

    def square(number: int) -> int:
        if number == 0:  # the first is ready last, where there are several cores
            wait.wait(0.05)
        return number * number

    source = Source(7)
    assert list(ahead(source.items(), 3, square)) == [0, 1, 4, 9, 16, 25, 36]
    assert source.closed.is_set()


def test_no_more_is_taken_in_advance_than_was_asked_for() -> None:
    source, done = Source(), threading.Semaphore(0)

    def work(number: int) -> int:
        done.release()
        return number

    results = ahead(source.items(), 2, work)
    for number in range(4):
        assert next(results) == number
        for _ in range(3 if number == 0 else 1):
            assert done.acquire(timeout=10)
        assert source.taken == number + 3
    results.close()


def test_items_are_taken_and_closed_by_one_thread_that_is_not_the_callers() -> None:
    source = Source(5)
    list(ahead(source.items(), 2, str))
    assert len(source.threads) == 1
    assert threading.current_thread().name not in source.threads


@pytest.mark.parametrize("where", ["items", "work"])
def test_an_error_comes_in_the_place_of_its_item(where: str) -> None:
    source = Source(9, fails_at=3 if where == "items" else None)

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("no 3")
        return number

    results = ahead(source.items(), 4, work)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no 3"):
        next(results)
    assert source.closed.is_set()


def test_whoever_stops_early_waits_for_the_item_that_is_being_taken_alone() -> None:
    taken, begun, closed = list[int](), threading.Event(), threading.Event()

    def items() -> Generator[int]:
        try:
            for number in range(1000):
                if number == 1:  # is being taken when the results are closed
                    begun.set()
                while number == 1 and inspect.getgeneratorstate(results) != inspect.GEN_RUNNING:
                    closed.wait(0.001)
                if number == 1:
                    closed.wait(0.1)
                taken.append(number)
                yield number
        finally:
            closed.set()

    results = ahead(items(), 3, str)
    assert next(results) == "0"
    assert begun.wait(timeout=10)
    results.close()
    assert taken == [0, 1]
    assert closed.is_set()


async def test_cancelled_work_stops_although_the_items_do_not_look() -> None:
    source, entered = Source(20_000), threading.Event()

    def work() -> None:
        for _ in ahead(source.items(), 2, int):
            entered.set()

    thread = GpuThread()
    waiting = asyncio.ensure_future(thread.run(work))
    await asyncio.to_thread(entered.wait, 10)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert source.closed.is_set()
    assert source.taken < source.count
    thread.shutdown()


def test_work_is_done_in_turn_while_the_next_item_is_made() -> None:
    made, begun = list[int](), threading.Semaphore(0)
    done = list[int]()

    def items() -> Generator[int]:
        for number in range(5):
            if number:  # the item before is being worked on although nobody has asked for it
                assert begun.acquire(timeout=10)
            made.append(number)
            yield number

    def work(number: int) -> int:
        begun.release()
        done.append(number)
        return number * number

    results = behind(items(), work)
    assert next(results) == 0
    assert made == [0, 1]
    assert list(results) == [1, 4, 9, 16]
    assert done == [0, 1, 2, 3, 4]


def test_no_items_are_no_work() -> None:
    assert list(behind([], str)) == []


def test_an_error_of_the_items_waits_for_the_work_under_way() -> None:
    begun, done = threading.Event(), list[int]()

    def items() -> Generator[int]:
        yield 0
        assert begun.wait(timeout=10)
        raise ValueError("no 1")

    def work(number: int) -> None:
        begun.set()
        threading.Event().wait(0.05)
        done.append(number)

    with pytest.raises(ValueError, match="no 1"):
        list(behind(items(), work))
    assert done == [0]


def test_an_error_of_the_work_comes_in_its_place_and_the_rest_is_not_made() -> None:
    source = Source()

    def work(number: int) -> int:
        if number == 2:
            raise ValueError("no 2")
        return number

    results = behind(source.items(), work)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="no 2"):
        next(results)
    assert source.taken == 4
    assert source.threads == {threading.current_thread().name}
