"""Pictures worked on beside each other, and beside what is done with those before them.

numpy holds no interpreter lock while it mixes pixels, nor do decoders, networks and whoever waits for a GPU.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

from runtime.gpu import raise_if_cancelled

S = TypeVar("S")
T = TypeVar("T")

_MAX_THREADS = 8
_END: Any = object()


def beside_each_other(function: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """What map(function, *arguments) gives, on several cores where there are several."""
    threads = _num_threads()
    if threads < 2:
        return list(map(function, *arguments))
    return list(_pool(threads).map(function, *arguments))


def ahead(items: Generator[S], count: int, work: Callable[[S], T]) -> Generator[T]:
    """What map(work, items) gives, up to `count` of it in advance: a thread takes the items, several cores do the work.

    An error of either comes where the result would have. Work that is cancelled stops here, also where the items do not
    look for that themselves: their threads are not that of the work. Whoever stops early waits for the item that is being
    taken and for no other; the items are closed on their thread.
    """
    cores = _pool(_num_threads())
    waiting = deque[Future[Future[T]]]()

    def take() -> Future[T]:
        item: Any = next(items, _END)
        return _END if item is _END else cores.submit(work, item)

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        try:
            while True:
                while len(waiting) <= count:
                    waiting.append(thread.submit(take))
                raise_if_cancelled()
                result = waiting.popleft().result()
                if result is _END:
                    return
                yield result.result()
        finally:
            for future in waiting:
                future.cancel()
            thread.submit(items.close)


def behind(items: Iterable[S], work: Callable[[S], T]) -> Generator[T]:
    """What map(work, items) gives: the work on each is done by another thread while the next item is made by this one.

    One piece of work follows the other, so it may carry something on. At most one item waits for it.
    """
    thread = _pool(_num_threads())
    last: Future[T] | None = None
    try:
        for item in items:
            if last is not None:
                yield last.result()
            last = thread.submit(work, item)
        if last is not None:
            yield last.result()
    finally:
        if last is not None:
            wait([last])


def _num_threads() -> int:
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Lives as long as the process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="pictures")
