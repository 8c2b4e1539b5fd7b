"""Frames -> the people in each, with their keypoints, a few frames at a time; and what is missing bridged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from services.pose.bilinear import Frame
from services.pose.detect import Boxes, YoloxDetector
from services.pose.keypoints import NUM_KEYPOINTS, WholeBodyEstimator, split
from services.pose.people import People, pair_hands
from services.pose.upload import Upload

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Person:
    """One person in one frame; x and y as fractions of its width and height.

    Attributes:
        box: float32 [4]: left, top, right, bottom; may reach beyond the frame.
        score: of the box, 0 where it is the whole frame because nobody was detected.
        keypoints: float32 [134, 3]: x, y, score; see services.pose.keypoints.
    """

    box: Floats
    score: float
    keypoints: Floats

    @property
    def detected(self) -> bool:
        return self.score > 0


def find_people(
    frames: Iterable[Frame],
    detector: YoloxDetector,
    estimator: WholeBodyEstimator,
    *,
    batch_frames: int = 8,
    phantom: bool = False,
    upload: Upload | None = None,
) -> Iterator[list[Person]]:
    """People per frame, best box first; at most `batch_frames` frames are held.

    Args:
        frames: uint8 RGB [H, W, 3].
        batch_frames: frames that are looked at together.
        phantom: where nobody is detected, take the whole frame for a person of score 0, as both references do. The
            default is not to: the network then puts 134 points on scenery, some of them with scores as if it had seen
            them, and hands and a face without a body are drawn.
        upload: brings frames, of one size then, to the device that both networks are on: the networks' pictures are made
            there. None: they are made by the processor, and any device is given them.
    """
    waiting = iter(frames)
    while together := list(islice(waiting, batch_frames)):
        pictures = together if upload is None else upload.of(together)
        boxes = detector.detect(pictures)
        if phantom:
            boxes = [rows if len(rows) else _whole(frame) for frame, rows in zip(together, boxes, strict=True)]
        keypoints = estimator.estimate(pictures, boxes)
        for frame, rows, points in zip(together, boxes, keypoints, strict=True):
            yield _people(frame, rows, points)


def _whole(frame: Frame) -> Boxes:
    height, width = frame.shape[:2]
    return np.array([[0, 0, width, height, 0]], np.float32)


def _people(frame: Frame, boxes: Boxes, keypoints: Floats) -> list[Person]:
    height, width = frame.shape[:2]
    return [
        Person(
            box=(box[:4] / [width, height, width, height]).astype(np.float32),
            score=float(box[4]),
            keypoints=(points / [width, height, 1]).astype(np.float32),
        )
        for box, points in zip(boxes, keypoints, strict=True)
    ]


def as_people(found: Sequence[Person], hands: Literal["own", "stacked"]) -> People:
    """The people of one frame by part, as they are picked, aligned and drawn.

    Args:
        hands: PoseQuirks.hands.
    """
    keypoints = np.array([person.keypoints for person in found], np.float32).reshape(-1, NUM_KEYPOINTS, 3)
    boxes = np.array([person.box for person in found if person.detected], np.float32).reshape(-1, 4)
    parts = split(keypoints)
    return People(boxes, parts.bodies, parts.visible, parts.faces, pair_hands(parts.hands, hands))


def bridge(frames: Sequence[Person | None]) -> tuple[list[Person], list[int]]:
    """One person through a clip, with the frames in which they are missing filled in.

    Between two frames that have them, box and points move in a straight line and are as certain as in the less certain
    of the two, so that a point that was seen only once is not drawn on its way; before the first and after the last
    they stand still.

    Args:
        frames: the person in each frame, None where missing.

    Returns:
        the person in every frame, and the indices of those that were filled in.

    Raises:
        ValueError: the person is in no frame.
    """
    known = [index for index, person in enumerate(frames) if person is not None]
    if not known:
        raise ValueError("a person who is in no frame cannot be bridged")
    missing = [index for index, person in enumerate(frames) if person is None]
    return [person or _between(frames, known, index) for index, person in enumerate(frames)], missing


def _between(frames: Sequence[Person | None], known: Sequence[int], index: int) -> Person:
    """The person of frame `index`, from the nearest of the frames that have them on either side."""
    place = int(np.searchsorted(known, index))
    before, after = known[max(place - 1, 0)], known[min(place, len(known) - 1)]
    start, end = frames[before], frames[after]
    assert start is not None
    assert end is not None
    if before == after:
        return start
    share = (index - before) / (after - before)
    keypoints = (1 - share) * start.keypoints + share * end.keypoints
    keypoints[:, 2] = np.minimum(start.keypoints[:, 2], end.keypoints[:, 2])
    box = (1 - share) * start.box + share * end.box
    return Person(box, min(start.score, end.score), keypoints)
