"""Who calls: set by the interceptor around an rpc, read wherever something is owned, shared out or limited.

With keys off everybody is `EVERYBODY`, whose name is empty and who sees everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum


class Scope(StrEnum):
    """What a caller may do."""

    GENERATE = "generate"  # create, cancel and delete generations
    READ = "read"  # generations, their events and files, models
    UPLOAD = "upload"  # files, also those fetched from a URL
    STATUS = "status"  # the state of the gateway and of its stages
    ADMIN = "admin"  # all of these, on what belongs to anybody


@dataclass(frozen=True)
class CallerLimits:
    """What a caller may take; None is no limit.

    Attributes:
        requests_per_minute: calls of any method; a caller that was quiet may make as many at once.
        max_active_generations: queued and running together.
        gpu_seconds_per_day: of stages' time, in the last 24 hours.
    """

    requests_per_minute: int | None = None
    max_active_generations: int | None = None
    gpu_seconds_per_day: float | None = None


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        name: what generations and files belong to, and what fair shares are counted by; empty: keys are off.
        weight: share of the GPU relative to other callers, above 0.
    """

    name: str
    scopes: frozenset[Scope]
    weight: float = 1.0
    limits: CallerLimits = field(default_factory=CallerLimits)

    def may(self, scope: Scope) -> bool:
        """Whether the caller has a scope; `admin` includes the others."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    @property
    def owner(self) -> str | None:
        """Whose generations and files the caller sees; None: everybody's."""
        return None if Scope.ADMIN in self.scopes else self.name


EVERYBODY = Caller("", frozenset(Scope))
_calling: ContextVar[Caller] = ContextVar("calling", default=EVERYBODY)


def calling() -> Caller:
    """Who makes the call that the running task answers."""
    return _calling.get()


def current_caller() -> str:
    """Name of who makes the call that the running task answers; empty where keys are off."""
    return _calling.get().name


@contextmanager
def acting_for(caller: Caller) -> Iterator[None]:
    """The task, and the tasks that it makes, answer a call of `caller` inside the block."""
    token = _calling.set(caller)
    try:
        yield
    finally:
        _calling.reset(token)
