"""Several people through a clip: who is who in every frame, and the joints of each from pictures of them alone.

Identity comes from the tracker, which goes by where people were heading, what they look like, and their masks. What the
3D estimator is shown of a person is what is within their mask; where there are no masks, or a mask has lost its person,
what is within their box. In the presets of the released programs identity is that of the masks by themselves.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.pose.clip import Clip, Frame
from services.pose.habits import Habits
from services.pose.nlf.config import NlfQuirks
from services.pose.people import largest, only_inside
from services.pose.persons.masks import ClipMasks, PersonMasks, alone, prompt_of
from services.pose.persons.tracking import NOBODY, PersonTracker, iou, mask_box
from services.pose.progress import Progress
from services.pose.skeleton import without_near
from services.pose.whole_body import Person, as_people

Float32s = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

NUM_JOINTS = 24
_SOMEBODY_ELSE = 0.5
"""A mask whose box coincides by so much with the box of another person has gone over to them."""


class JointModel(Protocol):
    """What finds joints."""

    def joints(self, frames: Sequence[Frame], quirks: NlfQuirks) -> Float32s:
        """Joints of the best person of each frame: [n, 24, 3] millimetres in the frame's camera, zeros for nobody."""
        ...


@dataclass(frozen=True)
class Found:
    """Who was detected in a frame, best box first; and of each place, which of them stands there, NOBODY for none."""

    everybody: list[Person]
    rows: list[int]

    def at(self, place: int) -> Person | None:
        """The person of a place."""
        row = self.rows[place]
        return None if row == NOBODY else self.everybody[row]


@dataclass(frozen=True)
class Followed:
    """People [num_frames][places], None where not detected; joints [num_frames, places, 24, 3], zero where unknown."""

    persons: list[list[Person | None]]
    joints: Float32s


def detected_boxes(everybody: Sequence[Person], frame: Frame) -> Floats:
    """Boxes of the people who were detected, [n, 4] in pixels."""
    height, width = frame.shape[:2]
    boxes = np.array([person.box for person in everybody if person.detected], np.float64).reshape(-1, 4)
    return boxes * [width, height, width, height]


def first_with_all(found: Sequence[Found]) -> int | None:
    """The first frame in which somebody stands at every place."""
    return next((index for index, frame in enumerate(found) if NOBODY not in frame.rows), None)


def follow(
    clip: Clip, found: Sequence[Found], backend: PersonMasks | None, models: JointModel, habits: Habits, batch: int
) -> Generator[Progress, None, Followed]:
    """Goes through the clip once more, `batch` frames at a time.

    Args:
        found: the people of each frame, by a tracker without masks.
        backend: makes masks, from the first frame that shows all of the people on; None: there are none.
    """
    places = len(found[0].rows)
    joints = np.zeros((clip.num_frames, places, NUM_JOINTS, 3), np.float32)
    persons: list[list[Person | None]] = []
    recognition = _Recognition(found, backend, habits)
    for frames in clip.batches(batch):
        at, pictures = list[tuple[int, int]](), list[Frame]()
        for frame in frames:
            index = len(persons)
            here, shown = recognition.see(index, frame)
            persons.append(here)
            at += [(index, place) for place, picture in enumerate(shown) if picture is not None]
            pictures += [picture for picture in shown if picture is not None]
        for start in range(0, len(pictures), batch):
            rows, columns = np.array(at[start : start + batch]).T
            joints[rows, columns] = without_near(models.joints(pictures[start : start + batch], habits.nlf))
        yield Progress("track", len(persons), clip.num_frames)
        if len(persons) < clip.num_frames:
            yield Progress("joints", len(persons), clip.num_frames)
    return Followed(persons, joints)


class _Recognition:
    """Recognises the people of one frame after the other, and cuts each of them out."""

    def __init__(self, found: Sequence[Found], backend: PersonMasks | None, habits: Habits) -> None:
        self._found, self._backend, self._habits = found, backend, habits
        self._places = len(found[0].rows)
        self._tracker = PersonTracker(self._places)
        self._by_masks = backend is not None and not habits.follows
        self._start = 0 if self._by_masks else first_with_all(found)
        self._clip: ClipMasks | None = None

    def see(self, index: int, frame: Frame) -> tuple[list[Person | None], list[Frame | None]]:
        """The next frame: who is at each place, and what to show of them to the 3D estimator."""
        masks = self._masks(index, frame)
        everybody = self._found[index].everybody
        if self._by_masks:
            assert masks is not None
            rows = self._largest(everybody)
            rows += [NOBODY] * (self._places - len(rows))
            usable = [True] * self._places
        else:
            given = None if masks is None else masks.cpu().numpy()
            boxes = detected_boxes(everybody, frame)
            rows = self._tracker.update(frame, boxes, given)
            mask_boxes = [None] * self._places if given is None else [mask_box(mask) for mask in given]
            usable = [_usable(place, rows, boxes, box) for place, box in enumerate(mask_boxes)]
        here = [None if row == NOBODY else everybody[row] for row in rows]
        in_box = [None if person is None else only_inside(frame, person.box.tolist()) for person in here]
        if masks is None:
            return here, in_box
        in_mask = alone(torch.from_numpy(frame), masks, self._habits.background).cpu().numpy()
        return here, [in_mask[place] if usable[place] else in_box[place] for place in range(self._places)]

    def _masks(self, index: int, frame: Frame) -> Tensor | None:
        """Masks [places, H, W] of a frame; None before they begin."""
        if self._backend is None or self._start is None or index < self._start:
            return None
        picture = torch.from_numpy(frame)
        if self._clip is not None:
            return self._clip.follow(picture)
        found = self._found[index]
        rows = self._largest(found.everybody) if self._by_masks else found.rows
        people = as_people(found.everybody, "own")
        prompts = [prompt_of(people, row, *frame.shape[:2]) for row in rows]
        self._clip = self._backend.begin(picture, prompts)
        return self._clip.first

    def _largest(self, everybody: Sequence[Person]) -> list[int]:
        """Rows of the largest detected people, or of the whole frame where it is taken for one."""
        return largest(np.array([person.box for person in everybody]).reshape(-1, 4), self._places)


def _usable(place: int, rows: Sequence[int], boxes: Floats, mask: Floats | None) -> bool:
    """Whether a mask, whose box is given, shows the person of that place; rows of `boxes` [n, 4] by place."""
    if mask is None:
        return False
    elsewhere = max((iou(mask, boxes[row]) for row in rows if row not in (NOBODY, rows[place])), default=0.0)
    if rows[place] == NOBODY:
        return elsewhere < _SOMEBODY_ELSE
    return iou(mask, boxes[rows[place]]) > elsewhere
