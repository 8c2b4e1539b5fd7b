"""Masks of people, carried through a clip: the interface of the back-ends, what they are asked, and what is done with them.

A back-end is asked once, with boxes and points in the first frame; the clip's own object then gives masks frame by frame
and holds all that is remembered of the clip. Back-ends: `sam2.Sam2Masks`, `matanyone.masks.MatAnyoneMasks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from services.pose.people import People

_PROMPT_POINTS = (0, 1, 14, 15)
"""Nose, neck, right and left eye of OpenPose's 18."""

BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {"wan2gp": (120, 255, 155), "official": (30, 60, 30)}
"""What the two released programs put behind a person before joints are estimated, RGB levels."""


@dataclass(frozen=True)
class PersonPrompt:
    """Where a person is in a frame, in pixels.

    box: left, top, right, bottom. points: x and y of at least one place on the person.
    """

    box: tuple[float, float, float, float]
    points: tuple[tuple[float, float], ...]


class ClipMasks(Protocol):
    """The people of one clip; what is kept between frames does not grow with their number."""

    @property
    def first(self) -> Tensor:
        """Masks of the first frame, as `follow` gives them."""
        ...

    def follow(self, frame: Tensor) -> Tensor:
        """The next frame, uint8 [H, W, 3] -> masks float32 [people, H, W] from 0 to 1, people in the order of the prompts.

        All zeros where a person is not seen. The masks are on the back-end's device.
        """
        ...


class PersonMasks(Protocol):
    """A back-end with its weights; serves any number of clips at a time."""

    def begin(self, first_frame: Tensor, prompts: Sequence[PersonPrompt]) -> ClipMasks:
        """Starts a clip.

        Args:
            first_frame: uint8 [H, W, 3], RGB.
            prompts: one per person, at least one.
        """
        ...


def masks_of_clip(
    backend: PersonMasks, frames: Iterable[Tensor], prompts: Sequence[PersonPrompt]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each frame of a clip with its masks; at most one frame is held.

    Args:
        frames: uint8 [H, W, 3], all of one size.
        prompts: for the first of them.
    """
    rest = iter(frames)
    for first_frame in rest:
        clip = backend.begin(first_frame, prompts)
        yield from chain([(first_frame, clip.first)], ((frame, clip.follow(frame)) for frame in rest))


def prompt_of(people: People, person: int, height: int, width: int) -> PersonPrompt:
    """How a back-end is asked for one of the detected people: the box and the visible points of the head and neck.

    Source: zai-org/SCAIL-Pose 830da75 and deepbeepmeep/Wan2GP 8681e9f models/wan/scail.
    """
    size = np.array([width, height], np.float64)
    left, top, right, bottom = (people.boxes[person].reshape(2, 2) * size).flatten().tolist()
    points = people.bodies[person, list(_PROMPT_POINTS)]
    shown = people.visible[person, list(_PROMPT_POINTS)] & (points >= 0).all(axis=-1)
    chosen = (points[shown] * size).tolist() or [((left + right) / 2, (top + bottom) / 2)]
    return PersonPrompt((left, top, right, bottom), tuple((x, y) for x, y in chosen))


def alone(frame: Tensor, masks: Tensor, background: tuple[int, int, int]) -> Tensor:
    """Each person on a plain background, for an estimator that is to see one person.

    Args:
        frame: uint8 [H, W, 3].
        masks: [people, H, W], 0 to 1.
        background: RGB levels.

    Returns:
        uint8 [people, H, W, 3]; levels are truncated, as in the released programs.
    """
    share = masks[..., None]
    levels = frame.to(masks.device) * share + torch.tensor(background, device=masks.device) * (1 - share)
    return levels.to(torch.uint8)
