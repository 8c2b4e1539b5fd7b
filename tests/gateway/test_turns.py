"""Turns at the denoisers: order, giving up, denoisers that come and go."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from gateway import turns as turns_module
from gateway.turns import Turn, Turns


@dataclass
class Denoisers:
    """Those that there are, and who has them."""

    count: int = 1
    having: list[int] = field(default_factory=list)
    had: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turns = Turns(self._counted)
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def _counted(self) -> int:
        return self.count

    async def wants(self, number: int, priority: int = 0) -> Turn:
        turn = Turn(priority, number)
        self._tasks[number] = asyncio.create_task(self._take(turn))
        await asyncio.sleep(0.01)
        return turn

    async def _take(self, turn: Turn) -> None:
        async with self.turns.taken(turn):
            self.having.append(turn.number)
            self.had.append(turn.number)
            try:
                await asyncio.Event().wait()
            finally:
                self.having.remove(turn.number)

    async def leaves(self, number: int) -> None:
        task = self._tasks.pop(number)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.01)

    async def close(self) -> None:
        for number in list(self._tasks):
            await self.leaves(number)


async def test_turns_go_by_priority_then_by_number() -> None:
    denoisers = Denoisers()
    for number, priority in ((4, 0), (3, 0), (2, 5), (1, 0)):
        await denoisers.wants(number, priority)
    for number in (4, 2, 1, 3):
        assert denoisers.having == [number]
        await denoisers.leaves(number)


async def test_as_many_as_there_are_denoisers_have_a_turn() -> None:
    denoisers = Denoisers(count=2)
    for number in (1, 2, 3):
        await denoisers.wants(number)
    assert denoisers.having == [1, 2]
    await denoisers.close()


async def test_the_least_urgent_is_asked_to_give_up_for_one_that_is_more_urgent() -> None:
    denoisers = Denoisers(count=3)
    holders = [await denoisers.wants(number, priority) for number, priority in ((1, 1), (2, 0), (3, 0))]
    assert not any(holder.set_aside.is_set() for holder in holders)
    await denoisers.wants(4, priority=1)
    assert [holder.set_aside.is_set() for holder in holders] == [False, False, True]
    await denoisers.wants(5, priority=2)
    assert [holder.set_aside.is_set() for holder in holders] == [False, True, True]
    await denoisers.leaves(3)
    assert denoisers.having == [1, 2, 5]
    await denoisers.close()


async def test_nobody_gives_up_for_the_same_priority() -> None:
    denoisers = Denoisers()
    holder = await denoisers.wants(1, priority=3)
    await denoisers.wants(2, priority=3)
    assert not holder.set_aside.is_set()
    await denoisers.close()


async def test_one_who_waits_and_leaves_takes_nobodys_turn() -> None:
    denoisers = Denoisers()
    for number in (1, 2, 3):
        await denoisers.wants(number)
    await denoisers.leaves(2)
    await denoisers.leaves(1)
    assert denoisers.having == [3]
    await denoisers.close()


async def test_a_new_denoiser_is_taken_by_who_waits_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_COUNTED_AGAIN_S", 0.01)
    denoisers = Denoisers()
    for number in (1, 2):
        await denoisers.wants(number)
    denoisers.count = 2
    await asyncio.sleep(0.05)
    assert denoisers.having == [1, 2]
    await denoisers.close()


async def test_without_any_denoiser_one_goes_on_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    denoisers = Denoisers(count=0)
    await denoisers.wants(1)
    assert denoisers.having == [1]
    await denoisers.close()
