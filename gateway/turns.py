"""Turns at the denoisers, which work for minutes: by priority, then in the order in which generations were created.

A generation waits here, in the gateway, rather than in the denoiser's own queue, where nothing could overtake it. Who
has a turn and a lower priority than one who waits is asked to give it up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.jobs.signals import wait

# Denoisers come and go
_COUNTED_AGAIN_S = 2.0


@dataclass(eq=False)
class Turn:
    """What one generation needs to know of its turn.

    Attributes:
        priority: 0 to 9, higher first.
        number: of the generation; lower first.
        set_aside: set when it is to give its turn up.
    """

    priority: int
    number: int
    set_aside: asyncio.Event = field(default_factory=asyncio.Event)
    granted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def order(self) -> tuple[int, int]:
        """Least first."""
        return -self.priority, self.number


class Turns:
    """As many turns at the same time as there are denoisers.

    Args:
        count: how many there are at present.
    """

    def __init__(self, count: Callable[[], Awaitable[int]]) -> None:
        self._count = count
        self._slots = 1
        self._waiting: list[Turn] = []
        self._holding: list[Turn] = []

    @asynccontextmanager
    async def taken(self, turn: Turn) -> AsyncIterator[None]:
        """Waits for a turn and has it inside the block."""
        turn.granted.clear()
        self._waiting.append(turn)
        try:
            while not turn.granted.is_set():
                self._slots = max(1, await self._count())
                self._grant()
                if not turn.granted.is_set():
                    self._make_room()
                    await wait(turn.granted, _COUNTED_AGAIN_S)
            yield
        finally:
            for turns in (self._waiting, self._holding):
                if turn in turns:
                    turns.remove(turn)
            self._grant()

    def _grant(self) -> None:
        while self._waiting and len(self._holding) < self._slots:
            first = min(self._waiting, key=lambda turn: turn.order)
            self._waiting.remove(first)
            self._holding.append(first)
            first.granted.set()

    def _make_room(self) -> None:
        """Has as many set aside as more urgent ones wait, beginning with the least urgent."""
        coming = sum(holder.set_aside.is_set() for holder in self._holding)
        for turn in sorted(self._waiting, key=lambda turn: turn.order)[coming:]:
            lower = [h for h in self._holding if h.priority < turn.priority and not h.set_aside.is_set()]
            if lower:
                max(lower, key=lambda holder: holder.order).set_aside.set()
