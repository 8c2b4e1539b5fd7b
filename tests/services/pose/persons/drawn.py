"""Drawn clips of people who walk about, with all that a detector and a mask maker would say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HEIGHT, WIDTH = 120, 240
BODY_WIDTH, BODY_HEIGHT = 24, 72

RED, BLUE, GREEN, BROWN = (200, 40, 40), (40, 60, 200), (40, 170, 60), (120, 80, 40)


@dataclass(frozen=True)
class Walker:
    """Somebody in a shirt and trousers; `xs` is the middle of the body in each frame, far outside where not there."""

    shirt: tuple[int, int, int]
    trousers: tuple[int, int, int]
    xs: Sequence[float]
    top: float = 30
    depth: float = 0
    """The larger, the farther away: drawn first, and hidden by the nearer."""


@dataclass(frozen=True)
class Drawn:
    """One frame: the picture; detections in no particular order, and who each is; everybody's mask."""

    frame: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float64]
    who: list[int]
    masks: npt.NDArray[np.float32]


def draw(walkers: Sequence[Walker], *, seed: int = 0, seen_share: float = 0.4, jitter: float = 1.0) -> list[Drawn]:
    """The clip; the detector finds whoever shows at least `seen_share` of the body, a few pixels off."""
    rng = np.random.default_rng(seed)
    wall = rng.integers(90, 150, (HEIGHT, WIDTH, 1)).repeat(3, axis=2)
    return [_draw_frame(walkers, index, wall, rng, seen_share, jitter) for index in range(len(walkers[0].xs))]


def _draw_frame(
    walkers: Sequence[Walker],
    index: int,
    wall: npt.NDArray[np.int64],
    rng: np.random.Generator,
    seen_share: float,
    jitter: float,
) -> Drawn:
    picture = wall + rng.integers(-6, 7, wall.shape)
    masks = np.zeros((len(walkers), HEIGHT, WIDTH), np.float32)
    for person in sorted(range(len(walkers)), key=lambda person: -walkers[person].depth):
        left, top, right, bottom = _body(walkers[person], index)
        middle = (top + bottom) // 2
        picture[top:middle, left:right] = walkers[person].shirt
        picture[middle:bottom, left:right] = walkers[person].trousers
        masks[:, top:bottom, left:right] = 0
        masks[person, top:bottom, left:right] = 1
    boxes, who = [], []
    for person in rng.permutation(len(walkers)):
        if masks[person].sum() >= seen_share * BODY_WIDTH * BODY_HEIGHT:
            ys, xs = masks[person].nonzero()
            box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            boxes.append(box + rng.normal(0, jitter, 4))
            who.append(int(person))
    frame = np.clip(picture + rng.integers(-10, 11, picture.shape), 0, 255).astype(np.uint8)
    return Drawn(frame, np.array(boxes).reshape(-1, 4), who, masks)


def _body(walker: Walker, index: int) -> tuple[int, int, int, int]:
    left, top = round(walker.xs[index] - BODY_WIDTH / 2), round(walker.top)
    xs = np.clip([left, left + BODY_WIDTH], 0, WIDTH)
    ys = np.clip([top, top + BODY_HEIGHT], 0, HEIGHT)
    return int(xs[0]), int(ys[0]), int(xs[1]), int(ys[1])


def walk(*stops: tuple[int, float]) -> list[float]:
    """Straight from stop (frame, x) to stop; one x per frame, up to the last stop's frame."""
    frames, xs = zip(*stops, strict=True)
    return np.interp(np.arange(frames[-1] + 1), frames, xs).tolist()
