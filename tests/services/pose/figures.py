"""A figure to draw, for the tests of this folder."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.pose.people import People
from services.pose.skeleton import SLOT_JOINTS

STANDING = (
    (0, -560), (0, -450), (-170, -400), (-260, -150), (-280, 90), (170, -400), (260, -150), (280, 90),
    (-100, 60), (-120, 470), (-130, 880), (100, 60), (120, 470), (130, 880),
)  # fmt: skip


def standing(frames: int = 1, people: int = 1, distance: float = 3000) -> npt.NDArray[np.float32]:
    """Joints [frames, people, 24, 3]: people beside each other who move a little from frame to frame."""
    joints = np.zeros((frames, people, 24, 3), np.float32)
    joints[..., SLOT_JOINTS, :2] = np.array(STANDING, np.float32)
    phase = np.arange(frames)[:, None, None] / 3 + np.arange(24)
    joints[..., 0] += 40 * np.sin(phase) + 500 * np.arange(people)[:, None]
    joints[..., 2] = distance + 90 * np.cos(phase) + 400 * np.arange(people)[:, None]
    return joints


def person(count: int = 1, seed: int = 0, detected: bool = True) -> People:
    """That many people with points at random places of the middle of the frame."""
    generator = np.random.default_rng(seed)

    def points(*shape: int) -> npt.NDArray[np.float64]:
        return generator.uniform(0.3, 0.7, (count, *shape, 2))

    boxes = np.sort(generator.uniform(0.1, 0.9, (count, 2, 2)), axis=1).reshape(count, 4)
    bodies, faces, hands = points(24), points(68), points(2, 21)
    return People(boxes if detected else boxes[:0], bodies, np.ones((count, 24), np.bool_), faces, hands)
