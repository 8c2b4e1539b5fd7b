"""The people found in a frame: whom to take, and the picture of them that the 3D estimator is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Frame = npt.NDArray[np.uint8]

COMPONENTS = ("person_detector", "whole_body_keypoints", "joints_3d")
"""Of a bundle, without which people are not found in videos."""
MAX_PEOPLE = 5
"""Of a clip, who are followed and drawn."""
_MARGIN_X, _MARGIN_Y = 0.025, 0.05
"""By how much of the frame's width and height a person's box grows on each side before the 3D estimator sees it."""


@dataclass(frozen=True)
class People:
    """n people in one frame; x and y as fractions of its width and height, invisible hand and face points (-1, -1).

    boxes [n, 4] left, top, right, bottom, best score first; bodies [n, 24, 2] OpenPose's 18 points and six of the feet,
    known even where not visible; visible [n, 24]; faces [n, 68, 2]; hands [n, 2, 21, 2] left, right.
    Where nobody was detected, boxes is [0, 4]; there may still be points, of the whole frame taken for a person.
    """

    boxes: Floats
    bodies: Floats
    visible: npt.NDArray[np.bool_]
    faces: Floats
    hands: Floats

    def __len__(self) -> int:
        return len(self.bodies)

    @property
    def detected(self) -> bool:
        return len(self.boxes) > 0

    def pick(self, indices: Sequence[int]) -> People:
        """These people, in this order. Of a frame in which nobody was detected, the boxes stay none."""
        chosen = list(indices)
        boxes = self.boxes[chosen] if self.detected else self.boxes
        return People(boxes, self.bodies[chosen], self.visible[chosen], self.faces[chosen], self.hands[chosen])


def pair_hands(stacked: Floats, hands: Literal["own", "stacked"]) -> Floats:
    """Gives each person two hands.

    Args:
        stacked: [2n, 21, 2], first the left hands of everybody, then the right ones.
        hands: PoseQuirks.hands.

    Returns:
        [n, 2, 21, 2].
    """
    count = len(stacked) // 2
    if hands == "stacked":
        return stacked.reshape(count, 2, *stacked.shape[1:])
    return stacked.reshape(2, count, *stacked.shape[1:]).swapaxes(0, 1)


def largest(boxes: Floats, count: int) -> list[int]:
    """Indices of the `count` boxes [n, 4] of the largest area, largest first; of equal ones the earlier."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return [int(index) for index in np.argsort(-areas, kind="stable")[:count]]


def grown_rectangle(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """A person's box (fractions) with its margin, in whole pixels inside the frame: left, top, right, bottom.

    Source: zai-org/SCAIL-Pose 830da75 NLFPoseExtract/extract_nlfpose_batch.py.
    """
    left, top, right, bottom = (float(value) for value in box)
    return (
        max(0, math.floor(left * width - _MARGIN_X * width)),
        max(0, math.floor(top * height - _MARGIN_Y * height)),
        min(width, math.ceil(right * width + _MARGIN_X * width)),
        min(height, math.ceil(bottom * height + _MARGIN_Y * height)),
    )


def only_inside(frame: Frame, box: Sequence[float]) -> Frame:
    """The frame [H, W, 3] with everything black but one person's grown rectangle: the camera stays that of the frame."""
    left, top, right, bottom = grown_rectangle(box, *frame.shape[:2])
    alone = np.zeros_like(frame)
    alone[top:bottom, left:right] = frame[top:bottom, left:right]
    return alone
