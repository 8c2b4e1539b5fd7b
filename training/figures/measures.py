"""What a video of a story is worth, against what is known of the story: no network takes part.

Videos are uint8 [T, side, side, 3]; a truth is what one of them should show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from training.figures.characters import Characters, Part
from training.figures.clips import Stories
from training.figures.picture import NIGHT_TINT, outlines, paint, render
from training.figures.reading import correct, figure_heights, known_places, read
from training.figures.scenes import HATS, Scenes

_EVERYWHERE_ELSE = 1e7
"""Millimetres to the right, where no picture shows a figure."""
_CHANGED = 24
"""Levels by which a pixel differs that a figure or an effect is on."""


@dataclass(frozen=True)
class Truth:
    """One story, the joints that its true clip shows float32 [1, T, 24, 3], and the side of its pictures."""

    story: Stories
    joints: Tensor
    side: int

    @classmethod
    def of(cls, stories: Stories, index: int, side: int) -> Truth:
        story = stories.pick([index])
        return cls(story, story.joints(), side)

    @cached_property
    def clip(self) -> Tensor:
        """The true clip."""
        return self.in_scene(self.story.scenes)

    @cached_property
    def figure(self) -> Tensor:
        """Where the figure is: bool [T, side, side]."""
        elsewhere = self.joints + torch.tensor([_EVERYWHERE_ELSE, 0, 0])
        return _changed(self.clip, self._drawn(elsewhere, self.story.scenes))

    def in_scene(self, scenes: Scenes) -> Tensor:
        """What the true clip would be in another scene."""
        return self._drawn(self.joints, scenes)

    def _drawn(self, joints: Tensor, scenes: Scenes) -> Tensor:
        story = self.story
        return render(story.shown, joints, scenes, height=self.side, width=self.side, cameras=story.cameras)[0]


def _changed(one: Tensor, other: Tensor) -> Tensor:
    return (one.int() - other.int()).abs().amax(-1) > _CHANGED


def psnr(video: Tensor, true: Tensor, where: Tensor | None = None) -> float:
    """Peak signal to noise ratio of pixels, dB; of those that `where` [T, H, W] names if it is given."""
    squared = (video.float() - true.float()) ** 2
    error = float(squared.mean() if where is None else squared[where].mean())
    return 10 * math.log10(255**2 / max(error, 1e-6))


def pose_hits(video: Tensor, truth: Truth) -> tuple[int, int]:
    """Parts of a motley character that are within 0.1 of its height of where the joints have them, and how many can be
    seen and so count: PCK@0.1 is the ratio of their sums."""
    story = truth.story
    known = known_places(story.shown, truth.joints, story.scenes, story.cameras, truth.side)
    heights = figure_heights(story.shown, truth.joints, story.cameras, truth.side)
    hits, counted = correct(read(video[None], story.shown, story.scenes), known, heights)
    return int((hits & counted).sum()), int(counted.sum())


def recognised(video: Tensor, truth: Truth, candidates: Characters) -> int:
    """Which of the candidates' colours, drawn in the true pose, are nearest to the video: the place in candidates."""
    story, (each, side) = truth.story, (torch.zeros(truth.joints.shape[1], dtype=torch.long), truth.side)
    # painted once, in shares of the parts' colours: a channel per part, and three for what is the same for everyone
    shares = torch.eye(len(Part), len(Part) + 3).expand(1, -1, -1)
    figure = replace(story.shown, colours=shares).pick(each)
    cameras = story.cameras[each] * side
    capsules = outlines(figure, truth.joints[0], story.scenes.hat[each], cameras)
    canvas = paint(torch.zeros(len(each), side, side, len(Part) + 3), capsules)
    where = truth.figure & (canvas.sum(-1) > 0.6)
    light = torch.where(story.scenes.night[0], torch.tensor(NIGHT_TINT), torch.ones(3))
    pixels = canvas[where]  # [M, parts + 3]
    drawn = (pixels[:, : len(Part)] @ candidates.colours + pixels[:, len(Part) :]) * light  # [candidates, M, 3]
    errors = ((drawn - video[where].float() / 255) ** 2).mean((1, 2))
    return int(errors.argmin())


def effects_shown(video: Tensor, truth: Truth) -> dict[str, bool]:
    """Which effects are seen, whether asked for or not; a hat of another colour than the one asked for is none."""
    scenes = truth.story.scenes
    yes, no = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)

    def strength(present: Scenes, absent: Scenes) -> float:
        return _strength(video, truth.in_scene(present), truth.in_scene(absent))

    night = strength(replace(scenes, night=yes), replace(scenes, night=no)) > 0.5
    # the others are looked for in the light that there is
    scenes = replace(scenes, night=yes if night else no)
    snow = strength(replace(scenes, snow=yes), replace(scenes, snow=no)) > 0.5
    hats = [int(scenes.hat)] if scenes.hat else range(1, len(HATS) + 1)
    bare = replace(scenes, hat=torch.zeros(1, dtype=torch.long))
    hat = any(strength(replace(scenes, hat=torch.tensor([colour])), bare) > 0.5 for colour in hats)
    return {"snow": snow, "night": night, "hat": hat}


def effects_asked(truth: Truth) -> dict[str, bool]:
    scenes = truth.story.scenes
    return {"snow": bool(scenes.snow), "night": bool(scenes.night), "hat": bool(scenes.hat)}


def _strength(video: Tensor, present: Tensor, absent: Tensor) -> float:
    """How far along from a clip without an effect to the clip with it a video is: 0 to 1, where the two differ."""
    where = _changed(present, absent)
    change = present[where].float() - absent[where].float()
    return float(((video[where].float() - absent[where].float()) * change).sum() / (change**2).sum().clamp(min=1e-6))
