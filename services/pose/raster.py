"""Lines, discs and filled polygons as whole pixels: exactly those that OpenCV 4 draws without anti-aliasing.

The 2D overlay is part of what the model was trained on, at one or two pixels of thickness, so its pixels are matched.
Everything is computed for many shapes at once, in closed form where the library steps from pixel to pixel. Coordinates
are int64, x first. Pixels come back as three arrays: number of the shape, y and x; each lies inside the picture, one
shape's after the other's, and may be named more than once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Pixels = tuple[Ints, Ints, Ints]

_ONE = 1 << 16
"""Fixed-point coordinates have 16 bits behind the point."""
_HALF = _ONE >> 1


def spread(counts: Ints) -> tuple[Ints, Ints]:
    """Numbers every element of lists of these lengths: the list, and the place in it. [3, 0, 2] -> 00022, 01201."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def join(*parts: Pixels) -> Pixels:
    """All pixels of several results for the same shapes."""
    which, y, x = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(which, kind="stable")
    return which[order], y[order], x[order]


def inside(pixels: Pixels, height: int, width: int) -> Pixels:
    """Those of the pixels that are in the picture."""
    which, y, x = pixels
    keep = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return which[keep], y[keep], x[keep]


def lines(starts: Ints, ends: Ints, height: int, width: int) -> Pixels:
    """Lines [n, 2] to [n, 2], one pixel thick, 8-connected (Bresenham), drawn from left to right."""
    which, starts, ends = _clip(starts, ends, height, width)
    swapped = (ends[:, 0] < starts[:, 0])[:, None]
    starts, ends = np.where(swapped, ends, starts), np.where(swapped, starts, ends)
    delta = ends - starts
    size = np.abs(delta)
    steep = size[:, 1] > size[:, 0]
    major, minor = np.where(steep, size[:, 1], size[:, 0]), np.where(steep, size[:, 0], size[:, 1])
    owner, step = spread(major + 1)
    # exactly half way between two pixels the line stays on the nearer one to its start
    aside = (2 * minor[owner] * step + major[owner] - 1) // np.maximum(2 * major[owner], 1)
    along, steep = step, steep[owner]
    x = starts[owner, 0] + np.where(steep, aside, along)
    y = starts[owner, 1] + np.where(steep, along, aside) * np.sign(delta[owner, 1])
    return which[owner], y, x


def thick_lines(starts: Ints, ends: Ints, height: int, width: int) -> Pixels:
    """Lines two pixels thick: a rectangle of half that width to each side, and discs of radius 1 on its ends."""
    delta = (ends - starts).astype(np.float64)
    length = np.hypot(delta[:, 0], delta[:, 1])
    across = np.rint(delta[:, ::-1] * (_ONE / np.where(length > 0, length, np.inf))[:, None]).astype(np.int64)
    across *= np.array([1, -1])
    starts_fixed, ends_fixed = starts * _ONE, ends * _ONE
    corners = [starts_fixed + across, starts_fixed - across, ends_fixed - across, ends_fixed + across]
    body = _fill(np.stack(corners, axis=1), height, width, _fixed_lines)
    return join(body, discs(starts, 1, height, width), discs(ends, 1, height, width))


def discs(centres: Ints, radius: int, height: int, width: int) -> Pixels:
    """Filled circles about [n, 2]."""
    offsets = _disc(radius)
    count, area = len(centres), len(offsets)
    x = (centres[:, None, 0] + offsets[:, 0]).ravel()
    y = (centres[:, None, 1] + offsets[:, 1]).ravel()
    return inside((np.repeat(np.arange(count), area), y, x), height, width)


def polygons(corners: Ints, height: int, width: int) -> Pixels:
    """Filled convex polygons [n, k, 2], outline included; corners may coincide, but not all of them."""
    return _fill(corners * _ONE, height, width, _whole_lines)


def ellipses(centres: Ints, axes: Ints, degrees: Ints) -> Ints:
    """Outlines of ellipses as polygons [n, 361, 2], a corner per degree: half axes [n, 2], turned by whole degrees [n]."""
    sines = _sines()
    turn = degrees % 360
    sin, cos = sines[turn][:, None], sines[(90 - turn) % 360][:, None]
    angle = np.arange(361) % 360
    x = axes[:, :1] * sines[(90 - angle) % 360]
    y = axes[:, 1:] * sines[angle]
    corners = np.stack([x * cos - y * sin, x * sin + y * cos], axis=-1) + centres[:, None]
    return np.rint(corners).astype(np.int64)


@cache
def _sines() -> npt.NDArray[np.float64]:
    """Of whole degrees, to seven digits in float32 as in the library's table: a corner may lie half way."""
    return np.sin(np.radians(np.arange(360))).round(7).astype(np.float32).astype(np.float64)


@cache
def _disc(radius: int) -> Ints:
    """Pixels (x, y) of a disc about (0, 0), by the midpoint circle."""
    reach = np.zeros(radius + 1, np.int64)
    error, x, y = 0, radius, 0
    while x >= y:
        reach[y] = max(reach[y], x)
        reach[x] = max(reach[x], y)
        error += 2 * y + 1
        y += 1
        if error > 0:
            error -= 2 * x - 1
            x -= 1
    rows = [(x, y) for y in range(-radius, radius + 1) for x in range(-reach[abs(y)], reach[abs(y)] + 1)]
    return np.array(rows, np.int64)


def _clip(starts: Ints, ends: Ints, height: int, width: int) -> tuple[Ints, Ints, Ints]:
    """Cuts lines to the picture as Cohen and Sutherland do: first to its rows, then to its columns.

    Returns the numbers of the lines of which something is left, and their ends; coordinates are truncated.
    """
    which = np.arange(len(starts))
    last = np.array([width - 1, height - 1])
    if all(bool(((points >= 0) & (points <= last)).all()) for points in (starts, ends)):
        return which, starts, ends
    for axis in (1, 0):
        a, b = starts[:, axis], ends[:, axis]
        keep = ~((a < 0) & (b < 0) | (a > last[axis]) & (b > last[axis]))
        which, starts, ends = which[keep], starts[keep], ends[keep]
        starts = _cut(starts, starts, ends, axis, last[axis])
        ends = _cut(ends, starts, ends, axis, last[axis])
    return which, starts, ends


def _cut(points: Ints, starts: Ints, ends: Ints, axis: int, last: int) -> Ints:
    """Moves those points of lines that are outside 0 to `last` along an axis to its edge."""
    at = points[:, axis]
    edge = np.clip(at, 0, last)
    delta = (ends - starts).astype(np.float64)
    rise = np.where(edge != at, delta[:, axis], 1)
    moved = points.copy()
    moved[:, axis] = edge
    moved[:, 1 - axis] += ((edge - at) * delta[:, 1 - axis] / rise).astype(np.int64)
    return moved


def _fixed_lines(starts: Ints, ends: Ints, height: int, width: int) -> Pixels:
    """Lines between fixed-point coordinates, by adding a fixed-point slope (the outline of thick lines)."""
    which, starts, ends = _clip(starts, ends, height * _ONE, width * _ONE)
    delta = ends - starts
    steep = (np.abs(delta[:, 0]) <= np.abs(delta[:, 1])).astype(np.int64)
    rows = np.arange(len(which))
    swapped = (delta[rows, steep] < 0)[:, None]
    starts, ends = np.where(swapped, ends, starts), np.where(swapped, starts, ends)
    delta = ends - starts
    slope = _divide(delta[rows, 1 - steep] * _ONE, np.abs(delta[rows, steep]) | 1)
    owner, step = spread((delta[rows, steep] >> 16) + 1)
    row, steep = owner, steep[owner]
    major = ((starts[row, steep] + _HALF) >> 16) + step
    minor = (starts[row, 1 - steep] + _HALF + step * slope[row]) >> 16
    last = (ends + _HALF) >> 16
    drawn = which[owner], np.where(steep, major, minor), np.where(steep, minor, major)
    return inside(join(drawn, (which, last[:, 1], last[:, 0])), height, width)


def _whole_lines(starts: Ints, ends: Ints, height: int, width: int) -> Pixels:
    return lines(starts >> 16, ends >> 16, height, width)


def _divide(a: Ints, b: Ints) -> Ints:
    """Integer division that truncates towards zero; b > 0."""
    return np.sign(a) * (np.abs(a) // b)


def _fill(corners: Ints, height: int, width: int, outline: Callable[[Ints, Ints, int, int], Pixels]) -> Pixels:
    """Fixed-point convex polygons [n, k, 2]: their outlines, and on each row all that lies between two edges."""
    count, sides = corners.shape[:2]
    starts, ends = corners.reshape(-1, 2), np.roll(corners, -1, axis=1).reshape(-1, 2)
    sides_used = (starts != ends).any(axis=1)
    shape = np.repeat(np.arange(count), sides)[sides_used]
    starts, ends = starts[sides_used], ends[sides_used]
    which, y, x = outline(starts, ends, height, width)
    spans = _spans(shape, starts, ends, height, width)
    return join((shape[which], y, x), spans)


def _spans(shape: Ints, starts: Ints, ends: Ints, height: int, width: int) -> Pixels:
    """Rows between the left and the right edge of each polygon; edge i of `starts` to `ends` belongs to `shape[i]`."""
    down = (starts[:, 1] <= ends[:, 1])[:, None]
    upper, lower = np.where(down, starts, ends), np.where(down, ends, starts)
    first, last = (upper[:, 1] + _HALF) >> 16, (lower[:, 1] + _HALF) >> 16
    rises = last > first
    shape, upper, lower, first, last = shape[rises], upper[rises], lower[rises], first[rises], last[rises]
    slope = _divide((lower[:, 0] - upper[:, 0]) * 2 + (last - first), 2 * (last - first))
    # the row of a corner belongs to the edge that starts there; the last row is left to the outline
    begin, stop = np.maximum(first, 0), np.minimum(last, height)
    owner, step = spread(np.maximum(stop - begin, 0))
    row = begin[owner] + step
    at = upper[owner, 0] + slope[owner] * (row - first[owner])
    span, place = np.unique(shape[owner] * height + row, return_inverse=True)
    left, right = np.full(len(span), np.iinfo(np.int64).max), np.full(len(span), np.iinfo(np.int64).min)
    np.minimum.at(left, place, at)
    np.maximum.at(right, place, at)
    left, right = np.maximum((left + _HALF) >> 16, 0), np.minimum((right + _HALF) >> 16, width - 1)
    owner, step = spread(np.maximum(right - left + 1, 0))
    return (span // height)[owner], (span % height)[owner], left[owner] + step
