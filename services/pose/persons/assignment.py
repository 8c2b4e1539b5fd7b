"""The cheapest way to pair rows with columns: the Hungarian method."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def assign(costs: npt.NDArray[np.float64], unpaired: float) -> list[int]:
    """Pairs each row with at most one column and each column with at most one row, at the smallest total cost.

    Args:
        costs: [rows, columns]; infinite where a pair is out of the question.
        unpaired: what it costs to leave a row without a column.

    Returns:
        the column of each row, -1 for none. Of equally cheap ways always the same one is taken.

    Source: shortest augmenting paths with potentials, Jonker and Volgenant 1987.
    """
    rows, columns = costs.shape
    # every row may take a column of its own that stands for none
    padded = np.hstack([costs, np.full((rows, rows), unpaired, np.float64)])
    total = columns + rows
    row_of = np.full(total + 1, -1)  # the last column is where each search starts
    row_potential, column_potential = np.zeros(rows), np.zeros(total + 1)
    for row in range(rows):
        row_of[total] = row
        came_from, column = _shortest_path(padded, row_of, row_potential, column_potential)
        while column != total:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    result = [-1] * rows
    for column in range(columns):
        if row_of[column] >= 0:
            result[row_of[column]] = column
    return result


def _shortest_path(
    costs: npt.NDArray[np.float64],
    row_of: npt.NDArray[np.int64],
    row_potential: npt.NDArray[np.float64],
    column_potential: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.int64], int]:
    """From the row that waits at the last column to a free column; keeps the potentials right.

    Returns:
        the column before each column on the path, and the free column.
    """
    total = costs.shape[1]
    distance = np.full(total, np.inf)
    came_from = np.full(total + 1, total)
    done = np.zeros(total + 1, bool)
    column = total
    while row_of[column] >= 0:
        done[column] = True
        row = row_of[column]
        through = costs[row] - row_potential[row] - column_potential[:total]
        shorter = ~done[:total] & (through < distance)
        distance[shorter] = through[shorter]
        came_from[:total][shorter] = column
        nearest = int(np.where(done[:total], np.inf, distance).argmin())
        step = distance[nearest]
        visited = np.flatnonzero(done)
        row_potential[row_of[visited]] += step
        column_potential[visited] -= step
        distance[~done[:total]] -= step
        column = nearest
    return came_from, column
