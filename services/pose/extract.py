"""A driving video -> pose frames of one person: found, followed, located in 3D, fitted to a reference picture, drawn.

The frames of the video are read once to find people and once to locate joints, a few at a time; what is kept of all of
them are keypoints and joints, some kilobytes per frame.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from bunraku.errors import InvalidRequest, NotThereYet
from runtime.gpu import raise_if_cancelled
from services.pose.align import align
from services.pose.draw import draw_clip
from services.pose.fit import halve
from services.pose.keypoints import NUM_KEYPOINTS
from services.pose.nlf.config import QUIRKS, NlfQuirks
from services.pose.people import People, largest, only_inside
from services.pose.persons.tracking import NOBODY, PersonTracker
from services.pose.quirks import PRESETS, PoseQuirks
from services.pose.skeleton import Camera, known
from services.pose.whole_body import Person, as_people, bridge

Frame = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]
PoseFrames = npt.NDArray[np.float16]

NUM_JOINTS = 24
_BATCH_FRAMES = 16
_ANYWHERE = np.array([0, 0, 1, 1], np.float32)


class PoseModels(Protocol):
    """The networks of an extraction. `device` is where pose frames are drawn."""

    @property
    def device(self) -> torch.device: ...

    def people(self, frames: Sequence[Frame], *, phantom: bool) -> list[list[Person]]:
        """The people of each frame uint8 [H, W, 3], best box first; `phantom` as for whole_body.find_people."""
        ...

    def joints(self, frames: Sequence[Frame], quirks: NlfQuirks) -> Float32s:
        """Joints of the best person of each frame: [n, 24, 3] millimetres in the frame's camera, zeros for nobody."""
        ...


@dataclass(frozen=True)
class Habits:
    """How an extraction decides.

    Attributes:
        pose, nlf: settings of the drawing and of the 3D estimator.
        follows: the largest person of the first frame that shows anybody is followed, and bridged where missing;
            otherwise the best box of each frame is taken for the person, as both released programs do.
    """

    pose: PoseQuirks
    nlf: NlfQuirks
    follows: bool


HABITS: Mapping[str, Habits] = {
    "": Habits(PRESETS["recommended"], QUIRKS["default"], follows=True),
    "wan2gp": Habits(PRESETS["wan2gp"], QUIRKS["wan2gp"], follows=False),
    "official": Habits(PRESETS["official"], QUIRKS["official"], follows=False),
}
"""By the preset that a request names; empty: recommended."""


@dataclass(frozen=True)
class Clip:
    """The driving video: `read` gives its num_frames frames from the first on, whenever it is called."""

    read: Callable[[], Iterator[Frame]]
    num_frames: int
    height: int
    width: int

    def batches(self, size: int) -> Iterator[list[Frame]]:
        """The frames, uint8 [height, width, 3] of the video to be made, so many at a time."""
        frames = islice(self.read(), self.num_frames)
        while batch := [covering(frame, self.height, self.width) for frame in islice(frames, size)]:
            raise_if_cancelled()
            yield batch


@dataclass(frozen=True)
class Progress:
    """How far a step has come: `detect`, `track`, `joints`, `align` or `render`. The message that ends a step also names
    the frames that are known to be bridged by then."""

    step: str
    completed_frames: int
    total_frames: int
    bridged_frames: tuple[int, ...] = ()


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


class PoseExtractor:
    """Goes through the steps with models that are given; serves any number of clips.

    Args:
        batch_frames: frames that are in memory, and looked at, together.
    """

    def __init__(self, models: PoseModels, *, batch_frames: int = _BATCH_FRAMES) -> None:
        self._models, self._batch_frames = models, batch_frames

    def extract(
        self, clip: Clip, reference: Frame, habits: Habits, *, people: int = 1
    ) -> Iterator[Progress | Drawing | PoseFrames]:
        """Progress as it comes, then the drawing, then the pose frames [n, height / 2, width / 2, 3] in order.

        Args:
            reference: uint8 [H, W, 3] of any size, the person whom the poses are fitted to.
            people: to follow; so far one.

        Raises:
            InvalidRequest: `video` shows nobody, or its first frame fewer people than `people`.
            NotThereYet: several people.
        """
        if people > 1:
            self._refuse_several(clip, people)
        found = yield from self._find(clip, habits)
        persons = [next((person for person in frame if person.detected), None) for frame in found]
        if not any(persons):
            raise InvalidRequest(("video", f"shows nobody: no person was found in its {clip.num_frames} frames"))
        missing = _missing(persons) if habits.follows else ()
        yield Progress("track", clip.num_frames, clip.num_frames, missing)
        joints = yield from self._locate(clip, persons, habits)
        if not known(joints).any():
            raise InvalidRequest(("video", "shows nobody whose joints can be located"))
        if habits.follows:
            found = [[person] for person in bridge(persons)[0]]
            joints, unlocated = bridge_joints(joints)
            missing = tuple(sorted({*missing, *unlocated}))
        yield Progress("joints", clip.num_frames, clip.num_frames, missing)
        aligned = align(
            joints,
            [as_people(frame, habits.pose.hands) for frame in found],
            self._reference(covering(reference, clip.height, clip.width), habits),
            clip.height,
            clip.width,
            habits.pose,
        )
        yield Progress("align", clip.num_frames, clip.num_frames, missing)
        painted = [_single_precision(frame) for frame in aligned.clip]
        camera = aligned.camera.matrix().astype(np.float32)
        drawing = Drawing(joints[:, None], _keypoints(painted, found), camera)
        yield drawing
        drawn = 0
        for frames in draw(drawing, clip.height, clip.width, habits.pose, self._models.device, clip=painted):
            drawn += len(frames)
            yield frames
            yield Progress("render", drawn, clip.num_frames, missing if drawn == clip.num_frames else ())

    def _find(self, clip: Clip, habits: Habits) -> Generator[Progress, None, list[list[Person]]]:
        """Who is taken of each frame: one person or none where a person is followed, otherwise everybody."""
        tracker, found = PersonTracker(1), list[list[Person]]()
        for frames in clip.batches(self._batch_frames):
            seen = self._models.people(frames, phantom=habits.pose.draw_undetected)
            for frame, people in zip(frames, seen, strict=True):
                found.append(_followed(tracker, frame, people) if habits.follows else people)
            yield Progress("detect", len(found), clip.num_frames)
        return found

    def _locate(
        self, clip: Clip, persons: Sequence[Person | None], habits: Habits
    ) -> Generator[Progress, None, Float32s]:
        """Joints [num_frames, 24, 3] of the person of each frame; zeros where there is none or none are found."""
        joints = np.zeros((clip.num_frames, NUM_JOINTS, 3), np.float32)
        begin = 0
        for frames in clip.batches(self._batch_frames):
            shown = [(index, person) for index, person in enumerate(persons[begin : begin + len(frames)]) if person]
            if shown:
                alone = [only_inside(frames[index], person.box.tolist()) for index, person in shown]
                joints[[begin + index for index, _ in shown]] = self._models.joints(alone, habits.nlf)
            begin += len(frames)
            if begin < clip.num_frames:
                yield Progress("joints", begin, clip.num_frames)
        return joints

    def _reference(self, frame: Frame, habits: Habits) -> People:
        """The people of the reference picture, the one to fit to first."""
        [found] = self._models.people([frame], phantom=habits.pose.draw_undetected)
        people = as_people(found, habits.pose.hands)
        return people.pick(largest(people.boxes, 1)) if habits.follows else people

    def _refuse_several(self, clip: Clip, people: int) -> None:
        [frame] = next(clip.batches(1))
        [found] = self._models.people([frame], phantom=False)
        if len(found) < people:
            raise InvalidRequest(("people", f"asks for {people}, frame 0 of the video shows {len(found)}"))
        raise NotThereYet("people: following several people is not there yet, ask for 1")


def covering(frame: Frame, height: int, width: int) -> Frame:
    """A frame [h, w, 3] scaled to cover height x width and cropped at its centre.

    Source: deepbeepmeep/Wan2GP 8681e9f models/wan/scail (Lanczos on 8-bit frames).
    """
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.LANCZOS))


def bridge_joints(joints: Float32s) -> tuple[Float32s, list[int]]:
    """Joints [num_frames, 24, 3] with the frames that have none filled in, and the indices of those.

    As whole_body.bridge: in a straight line between neighbours, standing still before the first and after the last. At
    least one frame has joints.
    """
    found = known(joints).any(axis=1)
    at, missing = np.flatnonzero(found), np.flatnonzero(~found)
    filled = joints.copy()
    flat = filled.reshape(len(joints), -1)
    for column in flat.T:
        column[missing] = np.interp(missing, at, column[at])
    return filled, missing.tolist()


def draw(
    drawing: Drawing,
    height: int,
    width: int,
    quirks: PoseQuirks,
    device: torch.device,
    *,
    clip: Sequence[People] | None = None,
) -> Iterator[PoseFrames]:
    """Pose frames, a few at a time: [n, height / 2, width / 2, 3], levels 0 to 255.

    Args:
        height, width: of the video to be made.
        clip: the people to paint where they are not just those of the drawing.
    """
    people = drawing.clip() if clip is None else clip
    camera = Camera.from_matrix(drawing.camera)
    for frames in draw_clip(drawing.joints, people, camera, height, width, quirks, device=device):
        raise_if_cancelled()
        yield np.stack([halve(frame) for frame in frames.cpu().numpy()])


def _missing(persons: Sequence[Person | None]) -> tuple[int, ...]:
    return tuple(index for index, person in enumerate(persons) if person is None)


def _followed(tracker: PersonTracker, frame: Frame, people: Sequence[Person]) -> list[Person]:
    """The person among the people of the next frame."""
    height, width = frame.shape[:2]
    boxes = np.array([person.box for person in people], np.float64).reshape(-1, 4) * [width, height, width, height]
    return [people[row] for row in tracker.update(frame, boxes) if row != NOBODY]


def _single_precision(people: People) -> People:
    """What is painted is what is given out, to the last bit."""
    parts = {name: getattr(people, name).astype(np.float32) for name in ("bodies", "faces", "hands")}
    return replace(people, **parts)


def _keypoints(painted: Sequence[People], found: Sequence[Sequence[Person]]) -> Float32s:
    """Keypoints [num_frames, 1, 134, 3] of the first person of each frame, where they are painted; zeros for nobody."""
    keypoints = np.zeros((len(painted), 1, NUM_KEYPOINTS, 3), np.float32)
    for row, people, persons in zip(keypoints[:, 0], painted, found, strict=True):
        if len(people):
            row[:, :2] = np.concatenate([people.bodies[0], people.faces[0], *people.hands[0]])
            row[:, 2] = persons[0].keypoints[:, 2]
    return keypoints
