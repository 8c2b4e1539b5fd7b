"""A few trials of each reliability scenario, with real processes; the figures themselves are `benchmarks.reliability`'s."""

from __future__ import annotations

import pytest

from benchmarks.reliability.cancels import cancel
from benchmarks.reliability.faults import kill, outage
from benchmarks.reliability.loads import events, fairness, overload, urgent
from benchmarks.reliability.system import Table
from tests.postgresql import MISSING, programs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
needs_postgresql = pytest.mark.skipif(programs() is None, reason=MISSING)


def number(table: Table, name: str) -> float:
    value = table.rows[name]
    assert isinstance(value, int | float)
    return value


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=needs_postgresql)])
def test_killed_and_frozen_processes_lose_and_repeat_nothing(database: str) -> None:
    found = kill(database, trials=4, seed=2)
    for what in ("lost", "results twice", "results that differ from the undisturbed", "finished stages repeated"):
        assert number(found, what) == 0, found
    assert number(found, "oldest checkpoint that a denoise went on from, steps") <= 10
    assert number(found, "from the fault to the denoiser going on, longest, s") <= 30


@needs_postgresql
def test_work_goes_on_while_the_database_is_away_and_submits_are_refused() -> None:
    found = outage(seed=2)
    assert number(found, "of them that succeeded") == number(found, "generations running or waiting"), found
    assert number(found, "begun more than once") == 0
    assert number(found, "steps of the denoiser meanwhile") > 0
    assert number(found, "refusal, slowest, ms") <= 1000


def test_cancels_leave_nothing_behind() -> None:
    found = cancel(trials=30, seed=2)
    for what in ("calls in the stages", "outputs of generations under way"):
        assert number(found, f"{what}, after") == 0, found
    assert number(found, "temporary directories, after") <= number(found, "temporary directories, before")


def test_ten_times_the_load_loses_nothing_that_was_accepted() -> None:
    found = overload(seconds=10, seed=2)
    assert number(found, "refused") > 0
    assert number(found, "of them that succeeded") == number(found, "accepted"), found
    assert number(found, "told to come back after at least, s") >= 1


def test_three_callers_share_alike_whatever_they_offer() -> None:
    assert number(fairness(generations=8, seed=2), "Jain index") >= 0.95


def test_an_urgent_generation_does_not_wait_for_a_low_one() -> None:
    found = urgent(trials=2, seed=2)
    # a low one has 57 steps to go; a loaded machine makes the one step that is waited for a long one
    assert number(found, "from ready for the denoiser to the denoiser, longest, ms") < 15 * number(
        found, "one step, ms"
    )


def test_a_hundred_watchers_see_every_event_once() -> None:
    found = events(watchers=100, seed=2)
    assert number(found, "100 watchers: without gap or repeat") == 100, found
