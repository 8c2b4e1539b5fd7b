"""A driving video -> pose frames: people found, followed, located in 3D, fitted to a reference picture, drawn.

The frames of the video are read once to find people and once to locate joints, a few at a time; what is kept of all of
them are keypoints and joints, some kilobytes per frame and person. One person is fitted to the reference picture;
several are drawn where they stand, each in a palette of their own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bunraku.errors import InvalidRequest
from runtime.gpu import raise_if_cancelled
from services.pose.align import align
from services.pose.bridging import bridge_joints, bridge_person
from services.pose.clip import Batch, Clip, Frame, covering
from services.pose.draw import draw_clip
from services.pose.habits import Habits
from services.pose.keypoints import NUM_KEYPOINTS
from services.pose.nlf.config import NlfQuirks
from services.pose.people import People, largest, only_inside
from services.pose.persons.masks import PersonMasks
from services.pose.persons.tracking import PersonTracker
from services.pose.progress import Gaps, Progress
from services.pose.quirks import REFERENCE_STROKES, PoseQuirks, Strokes
from services.pose.several import NUM_JOINTS, Found, detected_boxes, follow
from services.pose.skeleton import Camera, known, without_near
from services.pose.threads import behind
from services.pose.whole_body import Person, as_people, bridge

Float32s = npt.NDArray[np.float32]

_ANYWHERE = np.array([0, 0, 1, 1], np.float32)
_BRIDGED_SECONDS = 1.0
"""Several people: whoever is missing for longer has left the picture."""
_AS_LARGE, _AS_OFTEN = 0.8, 0.5
"""Somebody beyond those asked for makes it unclear who is meant who has this share of the area of the smallest of them,
in more than this share of the frames."""


class PoseModels(Protocol):
    """The networks of an extraction. `device` is where pose frames are drawn; `masks` are its back-ends by name."""

    @property
    def device(self) -> torch.device: ...

    @property
    def masks(self) -> Mapping[str, PersonMasks]: ...

    def people(self, frames: Sequence[Frame], *, phantom: bool) -> list[list[Person]]:
        """The people of each frame uint8 [H, W, 3], best box first; `phantom` as for whole_body.find_people."""
        ...

    def joints(self, frames: Sequence[Frame], quirks: NlfQuirks) -> Float32s:
        """Joints of the best person of each frame: [n, 24, 3] millimetres in the frame's camera, zeros for nobody."""
        ...

    def batch(self, height: int, width: int) -> Batch:
        """How much of a clip of this size is worked on at once. Raises OutOfMemory: it does not fit at all."""
        ...


@dataclass(frozen=True)
class Drawing:
    """All that pose frames are drawn from.

    Attributes:
        joints: [num_frames, people, 24, 3], millimetres in front of the camera; zero where unknown.
        keypoints: [num_frames, people, 134, 3]: x and y as fractions of the frame, score; where they are painted.
        camera: [3, 3], intrinsics in pixels of the video to be made.
    """

    joints: Float32s
    keypoints: Float32s
    camera: Float32s

    @classmethod
    def plain_camera(cls, height: int, width: int) -> Float32s:
        """That of a drawing that is not fitted to a reference picture."""
        return Camera.of(height, width).matrix().astype(np.float32)

    def clip(self) -> list[People]:
        """The people of each frame, without those of whom nothing is seen."""
        return [
            as_people([Person(_ANYWHERE, 1.0, one) for one in people if one[:, 2].any()], "own")
            for people in self.keypoints
        ]


@dataclass(frozen=True)
class _Posed:
    """A drawing, the people to paint in each frame, and what is missing of each person."""

    drawing: Drawing
    painted: list[People]
    gaps: tuple[Gaps, ...]


Steps = Generator[Progress, None, "_Posed"]


class PoseExtractor:
    """Goes through the steps with models that are given; serves any number of clips.

    Args:
        strokes: how thick things are drawn.
    """

    def __init__(self, models: PoseModels, strokes: Strokes = REFERENCE_STROKES) -> None:
        self._models, self._strokes = models, strokes

    @property
    def mask_backends(self) -> Mapping[str, PersonMasks]:
        """What can make masks of several people, by name."""
        return self._models.masks

    def extract(
        self,
        clip: Clip,
        reference: Frame | None,
        habits: Habits,
        *,
        people: int = 1,
        backend: PersonMasks | None = None,
    ) -> Iterator[Progress | Drawing | Tensor]:
        """Progress as it comes, then the drawing, then the frames in order: uint8 [n, height, width, 3] on the device.

        Args:
            reference: uint8 [H, W, 3] of any size, the person whom the poses of one person are fitted to; None: they
                stay where they are.
            people: to follow, the largest; they are drawn in the order of their places.
            backend: makes masks of several people; None: they are told apart by their boxes.

        Raises:
            InvalidRequest: `video` shows nobody; or fewer `people` than are asked for, or more that may be meant.
        """
        found = yield from self._find(clip, habits, people)
        _check_people(found, people, habits)
        if people == 1:
            posed = yield from self._one(clip, found, reference, habits)
        else:
            posed = yield from self._several(clip, found, people, backend, habits)
        yield Progress("align", clip.num_frames, clip.num_frames, posed.gaps)
        yield posed.drawing
        drawn, size, device = 0, (clip.height, clip.width), self._models.device
        batch = self._models.batch(*size)
        for frames in draw(posed.drawing, *size, habits.pose, self._strokes, device, batch, clip=posed.painted):
            drawn += len(frames)
            yield frames
            yield Progress("render", drawn, clip.num_frames, posed.gaps if drawn == clip.num_frames else ())

    def _together(self, clip: Clip) -> int:
        return self._models.batch(clip.height, clip.width).frames

    def _find(self, clip: Clip, habits: Habits, people: int) -> Generator[Progress, None, list[Found]]:
        """Everybody in each frame, and which of them are the people who are followed."""
        tracker, follows = PersonTracker(people), habits.follows or people > 1

        def recognise(seen: tuple[list[Frame], list[list[Person]]]) -> list[Found]:
            return [
                Found(everybody, tracker.update(frame, detected_boxes(everybody, frame) if follows else ()))
                for frame, everybody in zip(*seen, strict=True)
            ]

        phantom, found = habits.pose.draw_undetected, list[Found]()
        batches = (
            (frames, self._models.people(frames, phantom=phantom)) for frames in clip.batches(self._together(clip))
        )
        # who is who is found out while the networks look at the next frames
        with closing(behind(batches, recognise)) as recognised:
            for some in recognised:
                found += some
                yield Progress("detect", len(found), clip.num_frames)
        return found

    def _one(self, clip: Clip, found: Sequence[Found], reference: Frame | None, habits: Habits) -> Steps:
        """One person, fitted to the reference picture."""
        if habits.follows:
            shown = [[person] if (person := frame.at(0)) else [] for frame in found]
        else:
            shown = [frame.everybody for frame in found]
        persons = [next((person for person in frame if person.detected), None) for frame in shown]
        missing = tuple(index for index, person in enumerate(persons) if person is None) if habits.follows else ()
        yield Progress("track", clip.num_frames, clip.num_frames, (Gaps(missing),))
        joints = yield from self._locate(clip, persons, habits)
        if not known(joints).any():
            raise InvalidRequest(("video", "shows nobody whose joints can be located"))
        if habits.follows:
            shown = [[person] for person in bridge(persons)[0]]
            joints, unlocated = bridge_joints(joints)
            missing = tuple(sorted({*missing, *unlocated}))
        yield Progress("joints", clip.num_frames, clip.num_frames, (Gaps(missing),))
        people = [as_people(frame, habits.pose.hands) for frame in shown]
        aligned = align(joints, people, self._reference(reference, clip, habits), clip.height, clip.width, habits.pose)
        painted = [_single_precision(frame) for frame in aligned.clip]
        keypoints = _keypoints(painted, [frame[:1] for frame in shown], 1)
        camera = aligned.camera.matrix().astype(np.float32)
        return _Posed(Drawing(joints[:, None], keypoints, camera), painted, (Gaps(missing),))

    def _several(
        self, clip: Clip, found: Sequence[Found], people: int, backend: PersonMasks | None, habits: Habits
    ) -> Steps:
        """Several people, where they stand."""
        followed = yield from follow(clip, found, backend, self._models, habits, self._together(clip))
        persons, joints, gaps = followed.persons, followed.joints, tuple(Gaps() for _ in range(people))
        if not known(joints).any():
            raise InvalidRequest(("video", "shows nobody whose joints can be located"))
        if habits.follows or backend is None:
            longest = max(1, round(_BRIDGED_SECONDS * clip.frames_per_second))
            each = [
                bridge_person([frame[place] for frame in persons], joints[:, place], longest) for place in range(people)
            ]
            persons = [list(frame) for frame in zip(*(one[0] for one in each), strict=True)]
            joints, gaps = np.stack([one[1] for one in each], axis=1), tuple(one[2] for one in each)
        yield Progress("joints", clip.num_frames, clip.num_frames, gaps)
        painted = [
            _single_precision(_people_at(everybody.everybody, frame, habits))
            for everybody, frame in zip(found, persons, strict=True)
        ]
        drawing = Drawing(joints, _keypoints(painted, persons, people), Drawing.plain_camera(clip.height, clip.width))
        return _Posed(drawing, painted, gaps)

    def _locate(
        self, clip: Clip, persons: Sequence[Person | None], habits: Habits
    ) -> Generator[Progress, None, Float32s]:
        """Joints [num_frames, 24, 3] of the person of each frame; zeros where there is none or none are found."""

        def alone(number: int, frame: Frame) -> Frame:
            person = persons[number]
            return frame if person is None else only_inside(frame, person.box.tolist())

        joints = np.zeros((clip.num_frames, NUM_JOINTS, 3), np.float32)
        begin = 0
        for frames in clip.batches(self._together(clip), alone):
            shown = [index for index in range(len(frames)) if persons[begin + index] is not None]
            if shown:
                found = self._models.joints([frames[index] for index in shown], habits.nlf)
                joints[[begin + index for index in shown]] = without_near(found)
            begin += len(frames)
            if begin < clip.num_frames:
                yield Progress("joints", begin, clip.num_frames)
        return joints

    def _reference(self, picture: Frame | None, clip: Clip, habits: Habits) -> People:
        """The people of the reference picture, the one to fit to first."""
        if picture is None:
            return as_people([], habits.pose.hands)
        frame = covering(picture, clip.height, clip.width, clip.fit)
        [found] = self._models.people([frame], phantom=habits.pose.draw_undetected)
        people = as_people(found, habits.pose.hands)
        return people.pick(largest(people.boxes, 1)) if habits.follows else people


def draw(
    drawing: Drawing,
    height: int,
    width: int,
    quirks: PoseQuirks,
    strokes: Strokes,
    device: torch.device,
    batch: Batch,
    *,
    clip: Sequence[People] | None = None,
) -> Iterator[Tensor]:
    """The frames uint8 [n, height, width, 3] on the device, a few at a time.

    Args:
        height, width: of the video to be made.
        batch: how much is drawn at once.
        clip: the people to paint where they are not just those of the drawing.
    """
    people = drawing.clip() if clip is None else clip
    camera = Camera.from_matrix(drawing.camera)
    drawn = draw_clip(
        drawing.joints,
        people,
        camera,
        height,
        width,
        quirks,
        strokes,
        device=device,
        chunk_frames=batch.frames,
        tiles_at_once=batch.tiles,
    )
    for frames in drawn:
        raise_if_cancelled()
        yield frames


def _check_people(found: Sequence[Found], people: int, habits: Habits) -> None:
    """Raises InvalidRequest where a clip does not show those who are to be followed."""
    boxes = [[person.box for person in frame.everybody if person.detected] for frame in found]
    counts = [len(frame) for frame in boxes]
    if not any(counts):
        frames = len(found)
        raise InvalidRequest(("video", f"shows nobody: no person was found in its {frames} frames (0 to {frames - 1})"))
    at_most = max(counts) if habits.follows else counts[0]
    if people > 1 and at_most < people:
        where = f"no frame of the video shows more than {at_most}" if habits.follows else f"frame 0 shows {at_most}"
        raise InvalidRequest(("people", f"asks for {people}, {where}"))
    if not habits.follows:
        return
    crowded = [index for index, frame in enumerate(boxes) if len(frame) > people and _is_unclear(frame, people)]
    if len(crowded) > _AS_OFTEN * len([count for count in counts if count]):
        text = f"is {people}, the video shows more of about the same size in {len(crowded)} of its {len(found)} frames "
        raise InvalidRequest(("people", f"{text}(first in frame {crowded[0]}): ask for all of them or mask the others"))


def _is_unclear(boxes: Sequence[Float32s], people: int) -> bool:
    """Whether somebody beyond the largest is about as large as the smallest of these."""
    areas = sorted(((right - left) * (bottom - top) for left, top, right, bottom in boxes), reverse=True)
    return bool(areas[people] >= _AS_LARGE * areas[people - 1])


def _people_at(everybody: Sequence[Person], places: Sequence[Person | None], habits: Habits) -> People:
    """The people of a frame who are painted: those at the places, with the hands that the habits give them."""
    persons = [person for person in places if person is not None]
    if habits.pose.hands == "own":
        return as_people(persons, "own")
    rows = [index for person in persons for index, one in enumerate(everybody) if one is person]
    if len(rows) < len(persons):  # a bridged person is in no frame
        return as_people(persons, "own")
    return as_people(everybody, habits.pose.hands).pick(rows)


def _single_precision(people: People) -> People:
    """What is painted is what is given out, to the last bit."""
    parts = {name: getattr(people, name).astype(np.float32) for name in ("bodies", "faces", "hands")}
    return replace(people, **parts)


def _keypoints(painted: Sequence[People], found: Sequence[Sequence[Person | None]], places: int) -> Float32s:
    """Keypoints [num_frames, places, 134, 3] of those who are painted, where they are; zeros for nobody."""
    keypoints = np.zeros((len(painted), places, NUM_KEYPOINTS, 3), np.float32)
    for rows, people, persons in zip(keypoints, painted, found, strict=True):
        there = [(place, person) for place, person in enumerate(persons) if person is not None]
        for index, (place, person) in enumerate(there[: len(people)]):
            parts = (people.bodies[index], people.faces[index], *people.hands[index])
            rows[place, :, :2], rows[place, :, 2] = np.concatenate(parts), person.keypoints[:, 2]
    return keypoints
