"""Pairing of rows with columns, against trying out every way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from services.pose.persons.assignment import assign

SIZES = st.tuples(st.integers(0, 4), st.integers(0, 5))
COSTS = st.floats(0, 1, width=16) | st.just(float("inf"))


def total(costs: np.ndarray, columns: Sequence[int], unpaired: float) -> float:
    return sum(costs[row, column] if column >= 0 else unpaired for row, column in enumerate(columns))


@given(arrays.arrays(np.float64, SIZES, elements=COSTS), st.floats(0, 1, width=16))
def test_no_other_way_is_cheaper(costs: np.ndarray, unpaired: float) -> None:
    columns = assign(costs, unpaired)
    taken = [column for column in columns if column >= 0]
    assert len(set(taken)) == len(taken)
    ways = itertools.product(range(-1, costs.shape[1]), repeat=costs.shape[0])
    valid = (way for way in ways if len({c for c in way if c >= 0}) == sum(c >= 0 for c in way))
    assert total(costs, columns, unpaired) == pytest.approx(min(total(costs, way, unpaired) for way in valid))


def test_a_row_gives_way_where_that_is_cheaper_for_all() -> None:
    assert assign(np.array([[0.1, 0.2], [0.1, 0.9]]), 1.0) == [1, 0]


def test_a_row_stays_alone_rather_than_pair_at_a_high_cost() -> None:
    assert assign(np.array([[0.8], [0.3]]), 0.5) == [-1, 0]


def test_an_impossible_pair_is_never_made() -> None:
    assert assign(np.array([[np.inf]]), 100.0) == [-1]
