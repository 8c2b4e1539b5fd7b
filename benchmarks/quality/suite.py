"""The clips of the benchmark, from the held-out split, as files that a user could have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.draw_example import write_clip
from training.figures import FRAMES
from training.figures.characters import Characters, sample_characters
from training.figures.clips import Stories, sample_stories
from training.figures.measures import Truth

CANDIDATES = 64
_MOTLEY_SEED, _EFFECTS_SEED, _CANDIDATES_SEED = 7001, 7002, 7003


@dataclass(frozen=True)
class Case:
    """One clip: its truth, and the files that ask for it."""

    truth: Truth
    caption: str
    reference: Path
    driving: Path
    pose: Path


@dataclass(frozen=True)
class Suite:
    """Cases whose poses can be read, since every part has a colour of its own; and cases whose captions ask for effects.

    `strangers` are characters to be told from.
    """

    motley: Sequence[Case]
    effects: Sequence[Case]
    strangers: Characters

    @classmethod
    def make(cls, directory: Path, side: int, motley: int, effects: int, *, frames: int = FRAMES) -> Suite:
        """Draws the files into a directory; more cases are those of fewer, and further ones."""
        readable = [_story(_MOTLEY_SEED, index, frames, motley=1.0, effects=0.0) for index in range(motley)]
        asking = [_story(_EFFECTS_SEED, index, frames, motley=0.3, effects=0.5) for index in range(effects)]
        generator = torch.Generator().manual_seed(_CANDIDATES_SEED)
        return cls(
            [_case(story, directory / f"motley-{index:03}", side) for index, story in enumerate(readable)],
            [_case(story, directory / f"effects-{index:03}", side) for index, story in enumerate(asking)],
            sample_characters(CANDIDATES - 1, generator, held_out=True, motley=0.4),
        )


def _story(seed: int, index: int, frames: int, *, motley: float, effects: float) -> Stories:
    generator = torch.Generator().manual_seed(seed * 10_000 + index)
    return sample_stories(1, generator, frames=frames, held_out=True, motley=motley, effects=effects, fitted=1.0)


def _case(story: Stories, stem: Path, side: int) -> Case:
    reference, driving, pose = (
        stem.with_name(stem.name + end) for end in ("-reference.png", "-driving.mp4", "-pose.mp4")
    )
    Image.fromarray(story.draw_reference(side, side)[0].numpy()).save(reference)
    write_clip(driving, story.draw_driving(side, side)[0])
    write_clip(pose, story.draw_pose(side, side)[0])
    return Case(Truth.of(story, 0, side), story.captions()[0], reference, driving, pose)


def read_video(path: Path) -> Tensor:
    """uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
