"""Several people from drawn clips to their joints and keypoints: who is who, what is bridged, who is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from bunraku.errors import InvalidRequest
from services.pose.clip import Batch, Clip
from services.pose.extract import Drawing, PoseExtractor
from services.pose.habits import HABITS
from services.pose.nlf.config import NlfQuirks
from services.pose.persons.masks import PersonMasks, PersonPrompt
from services.pose.progress import Gaps, Progress
from services.pose.skeleton import known, palette
from services.pose.whole_body import Person
from tests.services.pose.drawn import keypoints_in
from tests.services.pose.figures import standing
from tests.services.pose.persons.drawn import (
    BLUE,
    BROWN,
    GREEN,
    HEIGHT,
    RED,
    WIDTH,
    Drawn,
    Walker,
    draw,
    walk,
)

RATE = 16
FAR = -1000.0  # where somebody is who is not in the picture
Frame = npt.NDArray[np.uint8]
CROSSING = (walk((0, 40), (32, 200)), walk((0, 200), (32, 40)))
RETURNING = (walk((0, 60), (6, -20), (7, FAR), (34, FAR), (35, 260), (44, 180)), walk((0, 120), (44, 110)))
# the nearer one stands before the other for half a second
HIDING = (walk((0, 60), (12, 118), (20, 121), (32, 190)), walk((0, 120), (32, 120)))
HIDDEN_FRAMES = range(11, 22)


def two(paths: tuple[list[float], list[float]]) -> list[Drawn]:
    """The nearer one in red and the other in green."""
    return draw([Walker(RED, BLUE, paths[0]), Walker(GREEN, BROWN, paths[1], depth=1)])


@dataclass
class Models:
    """What a detector says of a drawn clip; joints stand where the shirt is seen that a picture shows most of.

    The height of the joints tells whose they are: a metre more for each person.
    """

    clip: Sequence[Drawn]
    masks: Mapping[str, PersonMasks] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shown: list[Frame] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._drawn = {drawn.frame.tobytes(): drawn for drawn in self.clip}

    def batch(self, height: int, width: int) -> Batch:
        return Batch(4)

    def people(self, frames: Sequence[Frame], *, phantom: bool) -> list[list[Person]]:
        return [self._people(self._drawn[frame.tobytes()]) for frame in frames]

    def joints(self, frames: Sequence[Frame], quirks: NlfQuirks) -> npt.NDArray[np.float32]:
        self.shown += frames
        return np.stack([self._joints(frame) for frame in frames])

    def _people(self, drawn: Drawn) -> list[Person]:
        boxes = (drawn.boxes / [WIDTH, HEIGHT, WIDTH, HEIGHT]).astype(np.float32)
        return [Person(box, 0.9, keypoints_in(*box)) for box in boxes]

    def _joints(self, frame: Frame) -> npt.NDArray[np.float32]:
        shirts = [np.abs(frame.astype(int) - shirt).max(axis=-1) < 25 for shirt in (RED, GREEN)]
        who = int(np.argmax([shirt.sum() for shirt in shirts]))
        if shirts[who].sum() < 60:
            return np.zeros((24, 3), np.float32)
        at = shirts[who].nonzero()[1].mean()
        return standing()[0, 0] + np.array([10 * at, 1000 * (who + 1), 0], np.float32)


class TrueMasks:
    """The masks of a drawn clip, of the people who are asked for."""

    def __init__(self, clip: Sequence[Drawn], strays: Mapping[int, tuple[int, int]] | None = None) -> None:
        """`strays`: frames in which the mask of one place is that of another."""
        self.clip, self.strays = clip, strays or {}
        self.first = torch.zeros(0)

    def begin(self, first_frame: Tensor, prompts: Sequence[PersonPrompt]) -> TrueMasks:
        self.at = next(i for i, drawn in enumerate(self.clip) if (drawn.frame == first_frame.numpy()).all())
        self.begun_at, masks = self.at, self.clip[self.at].masks
        self.who = []
        for prompt in prompts:
            left, top, right, bottom = (round(side) for side in prompt.box)
            self.who.append(int(np.argmax([mask[top:bottom, left:right].sum() for mask in masks])))
        self.first = self.follow(first_frame)
        return self

    def follow(self, frame: Tensor) -> Tensor:
        masks = self.clip[self.at].masks[self.who].copy()
        if self.at in self.strays:
            place, other = self.strays[self.at]
            masks[place] = masks[other]
        self.at += 1
        return torch.from_numpy(masks)


def extract(
    clip: Sequence[Drawn], *, masks: PersonMasks | None = None, preset: str = "recommended", people: int = 2
) -> tuple[Drawing, tuple[Gaps, ...], Models]:
    models = Models(clip)
    driving = Clip(lambda: iter([drawn.frame for drawn in clip]), len(clip), HEIGHT, WIDTH, RATE)
    items: list[Any] = []
    for item in PoseExtractor(models).extract(driving, None, HABITS[preset], people=people, backend=masks):
        items.append(item)
        if isinstance(item, Drawing):
            break
    gaps = [item.gaps for item in items if isinstance(item, Progress) and item.step == "align"]
    return items[-1], gaps[-1], models


def people_at(drawing: Drawing) -> list[list[int | None]]:
    """For each frame, whose joints are at each place."""
    heights = drawing.joints[..., 1].mean(axis=-1) - standing()[0, 0, :, 1].mean()
    there = np.asarray(known(drawing.joints).any(axis=-1))
    return [
        [round(float(height) / 1000) - 1 if one else None for height, one in zip(row, ones, strict=True)]
        for row, ones in zip(heights, there, strict=True)
    ]


WITH_AND_WITHOUT_MASKS = pytest.mark.parametrize("masked", [False, True], ids=["boxes", "masks"])


@WITH_AND_WITHOUT_MASKS
@pytest.mark.parametrize("paths", [CROSSING, HIDING], ids=["cross", "hide"])
def test_two_people_keep_their_joints_when_they_cross_or_hide_each_other(
    paths: tuple[list[float], list[float]], masked: bool
) -> None:
    clip = two(paths)
    drawing, gaps, _ = extract(clip, masks=TrueMasks(clip) if masked else None)
    owners = people_at(drawing)[0]
    assert sorted(owner for owner in owners if owner is not None) == [0, 1]
    for index, frame in enumerate(people_at(drawing)):
        assert frame == owners, f"frame {index}"
    for place, owner in enumerate(owners):
        assert owner is not None
        xs = drawing.joints[:, place, :, 0].mean(axis=-1) - standing()[0, 0, :, 0].mean()
        np.testing.assert_allclose(xs / 10, paths[owner], atol=14)
        assert gaps[place].absent_frames == ()


def test_one_who_is_hidden_for_half_a_second_is_bridged_and_reported() -> None:
    clip = two(HIDING)
    hidden = [index for index, drawn in enumerate(clip) if 1 not in drawn.who]
    assert RATE / 2 <= len(hidden) <= RATE
    assert set(hidden) <= set(HIDDEN_FRAMES)
    drawing, gaps, _ = extract(clip, masks=TrueMasks(clip))
    hidden_place = people_at(drawing)[0].index(1)
    assert set(hidden) <= set(gaps[hidden_place].bridged_frames)
    assert gaps[1 - hidden_place].bridged_frames == ()
    assert (drawing.keypoints[:, hidden_place, :, 2] > 0).all()


@WITH_AND_WITHOUT_MASKS
def test_one_who_leaves_is_left_out_until_they_come_back(masked: bool) -> None:
    clip = two(RETURNING)
    away = [index for index, drawn in enumerate(clip) if 0 not in drawn.who]
    assert len(away) > RATE
    drawing, gaps, _ = extract(clip, masks=TrueMasks(clip) if masked else None)
    place = people_at(drawing)[0].index(0)
    for index, frame in enumerate(people_at(drawing)):
        assert frame[1 - place] == 1
        if index not in away:
            assert frame[place] == 0, f"frame {index}"
    # a mask sees a little of them for longer than a detector does
    middle = away[2:-2]
    assert set(middle) <= set(gaps[place].absent_frames) <= set(away)
    assert not drawing.joints[middle, place].any()
    assert not drawing.keypoints[middle, place].any()
    assert len(drawing.clip()[middle[0]]) == 1


def test_a_mask_that_goes_over_to_somebody_else_fools_nobody() -> None:
    clip = two(HIDING)
    order = people_at(extract(clip, masks=TrueMasks(clip))[0])[0]
    hidden = order.index(1)
    strays = dict.fromkeys(range(HIDDEN_FRAMES[0] - 1, len(clip)), (hidden, 1 - hidden))
    drawing, _, _ = extract(clip, masks=TrueMasks(clip, strays))
    assert people_at(drawing) == [order] * len(clip)


def test_the_estimator_is_shown_one_person_on_a_plain_background() -> None:
    clip = two(CROSSING)
    _, _, models = extract(clip, masks=TrueMasks(clip))
    # the one behind is not shown where nothing is seen of them
    assert 2 * len(clip) - 2 <= len(models.shown) < 2 * len(clip)
    for picture in models.shown[:2]:
        assert (picture[0, 0] == (30, 60, 30)).all()
        share = (picture != (30, 60, 30)).any(axis=-1).mean()
        assert 0.8 * 24 * 72 <= share * HEIGHT * WIDTH <= 24 * 72
    _, _, models = extract(clip)
    assert not models.shown[0][0].any()


def test_masks_begin_with_the_first_frame_that_shows_everybody() -> None:
    late = (walk((0, 60), (20, 80)), [FAR] * 6 + walk((0, 200), (14, 160)))
    clip = two(late)
    masks = TrueMasks(clip)
    drawing, gaps, _ = extract(clip, masks=masks)
    assert masks.begun_at == 6
    assert people_at(drawing)[0] == [0, 1]
    # whoever is missing at the start for no longer than a second stands still before
    assert gaps[1].bridged_frames == tuple(range(6))


def test_released_programs_take_the_largest_people_of_each_frame_and_bridge_nothing() -> None:
    clip = two(RETURNING)
    for preset, background in (("wan2gp", (120, 255, 155)), ("official", (30, 60, 30))):
        drawing, gaps, models = extract(clip, masks=TrueMasks(clip), preset=preset)
        assert gaps == (Gaps(), Gaps())
        place = people_at(drawing)[0].index(0)
        assert people_at(drawing)[20][place] is None
        assert (models.shown[0][0, 0] == background).all()


def test_several_people_are_drawn_in_their_own_palettes_without_being_fitted() -> None:
    clip = two(CROSSING)
    drawing, _, _ = extract(clip)
    np.testing.assert_array_equal(drawing.camera, Drawing.plain_camera(HEIGHT, WIDTH))
    assert len(palette(2)) == 2 * len(palette(1))
    assert drawing.joints.shape == (len(clip), 2, 24, 3)
    assert drawing.keypoints.shape == (len(clip), 2, 134, 3)


def test_too_few_or_unclear_people_are_refused() -> None:
    clip = two(CROSSING)
    for people, text in (
        (3, "asks for 3, no frame of the video shows more than 2"),
        (1, "is 1, the video shows more of about the same size in"),
    ):
        with pytest.raises(InvalidRequest) as error:
            extract(clip, people=people)
        [(field_name, violation)] = error.value.violations
        assert field_name == "people"
        assert violation.startswith(text)
    with pytest.raises(InvalidRequest) as error:
        extract(clip, people=3, preset="wan2gp")
    assert error.value.violations == (("people", "asks for 3, frame 0 shows 2"),)
    assert len(extract(clip, people=1, preset="wan2gp")[0].joints) == len(clip)
