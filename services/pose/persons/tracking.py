"""Which detected person is which through a clip: by where people were heading, what they look like, and their masks.

Frames come one at a time; what is kept is a box, a speed and two colour histograms per person. Everything is
deterministic and does not depend on the order of the detections. Boxes are left, top, right, bottom in pixels. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.pose.people import Frame, largest
from services.pose.persons.assignment import assign

Floats = npt.NDArray[np.float64]

NOBODY = -1

_MaskBoxes = Sequence[Floats | None] | None
"""The box of each place's mask, None for an empty one; None altogether where there are no masks."""

_BINS = (12, 12, 5)
"""Of red against green, of yellow against blue, and of brightness."""
_COLOUR_RANGE = 0.6
"""Colour differences reach from minus this to this."""
_DARK = 48
"""Sum of the levels at which a pixel's colour counts half: that of dark ones is mostly noise."""
_REGIONS = ((0.25, 0.08, 0.75, 0.5), (0.25, 0.5, 0.75, 0.92))
"""Parts of a box that a histogram is made of: what is worn above and below, with little of what is behind."""
_MAX_SAMPLES = 48
"""Pixels along a side of a region that are looked at."""
_MASK_SHARE = 0.02
"""So much of a mask may lie beyond each side of its box: specks elsewhere must not widen it."""
_MIN_MASK = 1e-4
"""Share of a frame below which a mask is empty."""


@dataclass(frozen=True)
class TrackingConfig:
    """How much what counts. A pair of a person and a detection costs between 0 (alike in every way) and 1.

    Attributes:
        appearance_weight: of the difference in colours, next to a weight of 1 for the distance from the expected box; of
            a detection that others overlap it is less, by the share that they overlap.
        mask_weight: of the distance from the person's mask, where there is one.
        max_cost: what costs more is no pair.
        reach: how far somebody may be from the expected place, in heights.
        reach_growth: by how much that grows with each frame unseen.
        position_memory_frames: after so many frames unseen the expected place counts half; from then on a person may
            come back anywhere.
        max_return_difference: but then must differ in colours by no more than this.
        occlusion: what somebody looks like, and how fast they move, is not learnt from a box of which others overlap more.
        histogram_rate, speed_rate: share of the latest frame in what is learnt.
        speed_decay: of somebody unseen, per frame.
    """

    appearance_weight: float = 2.0
    mask_weight: float = 2.0
    max_cost: float = 0.7
    reach: float = 0.75
    reach_growth: float = 0.1
    position_memory_frames: int = 10
    max_return_difference: float = 0.45
    occlusion: float = 0.15
    histogram_rate: float = 0.1
    speed_rate: float = 0.4
    speed_decay: float = 0.9


@dataclass(frozen=True)
class _Detections:
    """The people found in one frame: boxes [n, 4], histograms [n, 2, bins], and the share of each that others overlap."""

    boxes: Floats
    histograms: Floats
    overlapped: Floats


@dataclass
class _Person:
    """What is known of one person.

    box: where they were last seen, or have moved to since. speed: of the box's centre, pixels per frame.
    clean: whether the histogram was learnt without others in the way.
    """

    box: Floats
    speed: Floats
    histogram: Floats
    clean: bool
    unseen_frames: int = 0


class PersonTracker:
    """Gives each person of a clip a place, and keeps it.

    Somebody who is none of those known gets the free place of the mask that they are in; without masks free places are
    given by area, largest first.

    Args:
        max_people: places there are.
    """

    def __init__(self, max_people: int, config: TrackingConfig | None = None) -> None:
        self.config = config or TrackingConfig()
        self._people: list[_Person | None] = [None] * max_people

    def update(self, frame: Frame, boxes: npt.ArrayLike, masks: npt.ArrayLike | None = None) -> list[int]:
        """Recognises the people of the next frame.

        Args:
            frame: uint8 [H, W, 3].
            boxes: [n, 4], of the detected people.
            masks: [max_people, H, W], 0 to 1, of the people by place; all zeros for somebody who is not in sight.

        Returns:
            for each place the row of `boxes` that is this person, NOBODY where there is none.
        """
        seen = _look(frame, np.asarray(boxes, np.float64).reshape(-1, 4))
        mask_boxes = None if masks is None else [mask_box(mask) for mask in np.asarray(masks)]
        found = self._recognise(seen, mask_boxes)
        for place, row in self._welcome(found, seen, mask_boxes):
            found[place] = row
        for place, (person, row) in enumerate(zip(self._people, found, strict=True)):
            if person is None:
                self._people[place] = None if row == NOBODY else self._meet(row, seen)
            elif row == NOBODY:
                self._miss(person)
            else:
                self._learn(person, row, seen)
        return found

    def _recognise(self, seen: _Detections, mask_boxes: _MaskBoxes) -> list[int]:
        """For each place the row that the person known there is."""
        costs = np.full((len(self._people), len(seen.boxes)), np.inf)
        for place, person in enumerate(self._people):
            for row in range(len(seen.boxes) if person else 0):
                assert person is not None
                costs[place, row] = self._cost(person, mask_boxes[place] if mask_boxes else None, row, seen)
        return assign(costs, self.config.max_cost)

    def _welcome(self, found: Sequence[int], seen: _Detections, mask_boxes: _MaskBoxes) -> list[tuple[int, int]]:
        """Free places and the rows of those that get them."""
        free = [place for place, person in enumerate(self._people) if person is None]
        strangers = [row for row in largest(seen.boxes, len(seen.boxes)) if row not in found]
        if mask_boxes is None:
            return list(zip(free, strangers, strict=False))
        costs = np.full((len(free), len(strangers)), np.inf)
        for index, place in enumerate(free):
            if (box := mask_boxes[place]) is not None:
                costs[index] = [1 - iou(box, seen.boxes[row]) for row in strangers]
        columns = assign(costs, self.config.max_cost)
        return [(place, strangers[column]) for place, column in zip(free, columns, strict=True) if column >= 0]

    def _cost(self, person: _Person, mask: Floats | None, row: int, seen: _Detections) -> float:
        """Of taking a detection for a person, infinite where it cannot be."""
        config, box = self.config, seen.boxes[row]
        expected = _shifted(person.box, person.speed)
        difference = _difference(person.histogram, seen.histograms[row])
        forgotten = person.unseen_frames / config.position_memory_frames
        near = _distance(expected, box) <= config.reach + config.reach_growth * person.unseen_frames
        returned = forgotten >= 1 and difference <= config.max_return_difference
        masked = mask is not None and iou(mask, box) > 0
        if not (near or returned or masked):
            return float("inf")
        costs = [1 - iou(expected, box), difference]
        weights = [max(0.5**forgotten, 1e-9), config.appearance_weight * (1 - seen.overlapped[row])]
        if mask is not None:
            costs.append(1 - iou(mask, box))
            weights.append(config.mask_weight)
        return float(np.average(costs, weights=weights))

    def _meet(self, row: int, seen: _Detections) -> _Person:
        clean = bool(seen.overlapped[row] <= self.config.occlusion)
        return _Person(seen.boxes[row], np.zeros(2), seen.histograms[row], clean)

    def _miss(self, person: _Person) -> None:
        person.box = _shifted(person.box, person.speed)
        person.speed = person.speed * self.config.speed_decay
        person.unseen_frames += 1

    def _learn(self, person: _Person, row: int, seen: _Detections) -> None:
        box, histogram = seen.boxes[row], seen.histograms[row]
        if seen.overlapped[row] <= self.config.occlusion:
            rate = self.config.histogram_rate if person.clean else 1.0
            person.histogram = person.histogram + rate * (histogram - person.histogram)
            person.clean = True
            if person.unseen_frames == 0:
                moved = _centre(box) - _centre(person.box)
                person.speed = person.speed + self.config.speed_rate * (moved - person.speed)
        person.box = box
        person.unseen_frames = 0


def mask_box(mask: npt.ArrayLike) -> Floats | None:
    """The box of a mask [H, W], 0 to 1, without its outermost specks; None where the mask is empty."""
    inside = np.asarray(mask) >= 0.5
    if inside.mean() < _MIN_MASK:
        return None
    sides = []
    for axis in (0, 1):
        share = np.cumsum(inside.sum(axis=axis)) / inside.sum()
        sides.append((int(np.searchsorted(share, _MASK_SHARE)), int(np.searchsorted(share, 1 - _MASK_SHARE)) + 1))
    (left, right), (top, bottom) = sides
    return np.array([left, top, right, bottom], np.float64)


def _look(frame: Frame, boxes: Floats) -> _Detections:
    histograms = np.array([_histograms(frame, box) for box in boxes]).reshape(-1, len(_REGIONS), math.prod(_BINS))
    overlapped = [
        max((_shared(box, other) / _area(box) for j, other in enumerate(boxes) if j != i), default=0.0)
        for i, box in enumerate(boxes)
    ]
    return _Detections(boxes, histograms, np.array(overlapped))


def _histograms(frame: Frame, box: Floats) -> Floats:
    """Colours in the regions of a box: [2, bins], each with the sum 1, or 0 where the region is outside the frame.

    Colour is relative to brightness, and brightness coarse, so that another light changes little. What falls into a bin
    counts for its neighbours too.
    """
    parts = [_cut(frame, box, region).reshape(-1, 3) for region in _REGIONS]
    region = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    red, green, blue = np.ascontiguousarray(np.concatenate(parts).T, np.float64)
    brightness = red + green + blue
    colours = np.stack([red - green, (red + green) / 2 - blue]) / (brightness + _DARK)
    scaled = np.stack([*((colours + _COLOUR_RANGE) / (2 * _COLOUR_RANGE)), brightness / (3 * 255)])
    bins = np.array(_BINS)[:, None]
    places = np.clip((scaled * bins).astype(np.int64), 0, bins - 1)
    shape = (len(parts), *_BINS)
    found = np.bincount(np.ravel_multi_index((region, *places), shape), minlength=math.prod(shape))
    counts: Floats = found.reshape(shape) / 1.0
    for axis in range(1, len(shape)):
        # the outermost bins are their own neighbours
        ends = counts.take([0], axis), counts.take([-1], axis)
        around = np.concatenate([ends[0], counts, ends[1]], axis).swapaxes(0, axis)
        counts = ((around[:-2] + 2 * around[1:-1] + around[2:]) / 4).swapaxes(0, axis)
    counts = counts.reshape(len(parts), -1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _cut(frame: Frame, box: Floats, region: Sequence[float]) -> Frame:
    """Some of the pixels of a part of a box: uint8 [h, w, 3]."""
    origin, size = np.tile(box[:2], 2), np.tile(box[2:] - box[:2], 2)
    height, width = frame.shape[:2]
    left, top, right, bottom = np.clip(origin + size * region, 0, [width, height, width, height]).round().astype(int)
    pixels = frame[top:bottom, left:right]
    steps = [max(1, -(-side // _MAX_SAMPLES)) for side in pixels.shape[:2]]
    return pixels[:: steps[0], :: steps[1]]


def _difference(a: Floats, b: Floats) -> float:
    """Hellinger distance of histograms [2, bins], the regions counting alike: 0 to 1."""
    return float(np.sqrt(max(0.0, 1 - np.sqrt(a * b).sum(axis=-1).mean())))


def _distance(a: Floats, b: Floats) -> float:
    """Of the centres of two boxes, in their mean height."""
    return float(np.hypot(*(_centre(a) - _centre(b))) / max((a[3] - a[1] + b[3] - b[1]) / 2, 1))


def _centre(box: Floats) -> Floats:
    return (box[:2] + box[2:]) / 2


def _shifted(box: Floats, by: Floats) -> Floats:
    return box + np.tile(by, 2)


def iou(a: Floats, b: Floats) -> float:
    """Shared area of two boxes, as a share of what they cover together."""
    shared = _shared(a, b)
    return shared / (_area(a) + _area(b) - shared)


def _shared(a: Floats, b: Floats) -> float:
    return float(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod())


def _area(box: Floats) -> float:
    return max(float((box[2:] - box[:2]).prod()), 1e-9)
