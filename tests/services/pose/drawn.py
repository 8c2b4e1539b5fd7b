"""Clips in which people are rectangles, and models that read from their colours who they are: nothing is estimated.

Red tells the person, green the number of the frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from bunraku.errors import OutOfMemory
from services.pose.clip import Batch
from services.pose.nlf.config import NlfQuirks
from services.pose.people import largest
from services.pose.persons.masks import PersonMasks
from services.pose.whole_body import Person
from tests.services.pose.figures import standing

Frame = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

HEIGHT, WIDTH = 64, 96
ANN, BEN = 200, 90
ANN_BOX, BEN_BOX = (10, 8, 40, 60), (60, 20, 80, 60)
_GREEN_PER_FRAME = 8


def picture(number: int, people: Mapping[int, Box]) -> Frame:
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for who, (left, top, right, bottom) in people.items():
        frame[top:bottom, left:right] = (who, number * _GREEN_PER_FRAME, who)
    return frame


def walking(num_frames: int, *, without: Sequence[int] = ()) -> list[Frame]:
    """Ann goes to the right, a pixel per frame, and cannot be seen in some of the frames."""
    left, top, right, bottom = ANN_BOX
    return [
        picture(number, {} if number in without else {ANN: (left + number, top, right + number, bottom)})
        for number in range(num_frames)
    ]


def joints_of(who: int, number: int) -> npt.NDArray[np.float32]:
    """[24, 3]: the figure of the tests, further right for Ben."""
    joints: npt.NDArray[np.float32] = standing(number + 1)[number, 0]
    return joints + np.array([300 if who == BEN else 0, 0, 0], np.float32)


def keypoints_in(left: float, top: float, right: float, bottom: float) -> npt.NDArray[np.float32]:
    """[134, 3]: points all over a box, all of them seen."""
    points = np.random.default_rng(3).uniform(0.1, 0.9, (134, 2)) * [right - left, bottom - top] + [left, top]
    return np.concatenate([points, np.full((134, 1), 0.9)], axis=1).astype(np.float32)


@dataclass
class DrawnModels:
    """Models of an extraction; they remember what they were asked.

    Attributes:
        scores: of the boxes of each person.
        unlocated: numbers of frames in which nobody's joints are found.
        together: how much they are asked at once.
        refusing: what they say of clips, that have no room then.
    """

    scores: Mapping[int, float] = field(default_factory=lambda: {ANN: 0.8, BEN: 0.9})
    unlocated: Sequence[int] = ()
    masks: Mapping[str, PersonMasks] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    together: Batch = field(default_factory=lambda: Batch(4))
    refusing: str = ""
    batches: list[int] = field(default_factory=list)
    phantoms: list[bool] = field(default_factory=list)
    shown: list[Frame] = field(default_factory=list)
    quirks: list[NlfQuirks] = field(default_factory=list)

    def batch(self, height: int, width: int) -> Batch:
        if self.refusing:
            raise OutOfMemory(self.refusing)
        return self.together

    def people(self, frames: Sequence[Frame], *, phantom: bool) -> list[list[Person]]:
        self.batches.append(len(frames))
        self.phantoms.append(phantom)
        return [self._people(frame) or [self._phantom()][: int(phantom)] for frame in frames]

    def joints(self, frames: Sequence[Frame], quirks: NlfQuirks) -> npt.NDArray[np.float32]:
        self.batches.append(len(frames))
        self.quirks.append(quirks)
        self.shown += frames
        return np.stack([self._joints(frame) for frame in frames])

    def warm_up(self, height: int, width: int) -> None:
        """Has nothing to prepare."""

    def _people(self, frame: Frame) -> list[Person]:
        found = []
        height, width = frame.shape[:2]
        for who in sorted(
            {int(level) for level in np.unique(frame[..., 0])} & {ANN, BEN}, key=lambda w: -self.scores[w]
        ):
            y, x = (frame[..., 0] == who).nonzero()
            box = (x.min() / width, y.min() / height, (x.max() + 1) / width, (y.max() + 1) / height)
            found.append(Person(np.array(box, np.float32), self.scores[who], keypoints_in(*box)))
        return found

    def _phantom(self) -> Person:
        return Person(np.array([0, 0, 1, 1], np.float32), 0.0, keypoints_in(0, 0, 1, 1))

    def _joints(self, frame: Frame) -> npt.NDArray[np.float32]:
        found = self._people(frame)
        if not found:
            return np.zeros((24, 3), np.float32)
        [biggest] = largest(np.stack([person.box for person in found]), 1)
        left, top, right, bottom = found[biggest].box * np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
        red, green, _ = frame[round((top + bottom) / 2), round((left + right) / 2)]
        number = int(green) // _GREEN_PER_FRAME
        return np.zeros((24, 3), np.float32) if number in self.unlocated else joints_of(int(red), number)
