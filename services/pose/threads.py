"""Pictures worked on beside each other: numpy holds no interpreter lock while it mixes pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

_MAX_THREADS = 8


def beside_each_other(function: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """What map(function, *arguments) gives, on several cores where there are several."""
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    if threads < 2:
        return list(map(function, *arguments))
    return list(_pool(threads).map(function, *arguments))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Lives as long as the process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="pictures")
