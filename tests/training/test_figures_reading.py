"""The reader finds parts where they are, and does not find what is not there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from training.figures.clips import Stories, sample_stories
from training.figures.reading import Places, correct, figure_heights, known_places, read

SIDE = 96


@pytest.fixture(scope="module")
def stories() -> Stories:
    generator = torch.Generator().manual_seed(9)
    made = sample_stories(8, generator, frames=9, held_out=True, motley=1.0, effects=0.0)
    motions = replace(made.motions, angles=made.motions.angles[:, ::4], places=made.motions.places[:, ::4])
    return replace(made, motions=motions)


@pytest.fixture(scope="module")
def clips(stories: Stories) -> Tensor:
    return stories.draw_target(SIDE, SIDE)


@pytest.fixture(scope="module")
def found(stories: Stories, clips: Tensor) -> Places:
    return read(clips, stories.shown, stories.scenes)


def pck(places: Places, stories: Stories) -> float:
    known = known_places(stories.shown, stories.joints(), stories.scenes, stories.cameras, SIDE)
    heights = figure_heights(stories.shown, stories.joints(), stories.cameras, SIDE)
    hits, counted = correct(places, known, heights)
    return float(hits[counted].float().mean())


def test_true_clips_score_nearly_one(stories: Stories, found: Places) -> None:
    assert pck(found, stories) >= 0.97


def test_most_parts_count(stories: Stories) -> None:
    known = known_places(stories.shown, stories.joints(), stories.scenes, stories.cameras, SIDE)
    assert 0.75 < known.there.float().mean() < 0.95


def test_night_and_hats_are_known_to_the_reader(stories: Stories) -> None:
    scenes = replace(stories.scenes, night=torch.ones(8, dtype=torch.bool), hat=torch.ones(8, dtype=torch.long))
    dark = replace(stories, scenes=scenes)
    assert pck(read(dark.draw_target(SIDE, SIDE), dark.shown, dark.scenes), dark) >= 0.9


def test_another_clip_scores_low(stories: Stories, found: Places) -> None:
    other = Places(found.points.roll(1, 0), found.there.roll(1, 0))
    assert pck(other, stories) <= 0.35


def test_a_mirrored_clip_scores_low(stories: Stories, clips: Tensor) -> None:
    assert pck(read(clips.flip(-2), stories.shown, stories.scenes), stories) <= 0.45


def test_a_clip_that_stands_still_scores_less(stories: Stories, clips: Tensor) -> None:
    standing = clips[:, :1].expand_as(clips)
    assert pck(read(standing, stories.shown, stories.scenes), stories) <= 0.8


def test_an_empty_scene_has_no_parts(stories: Stories) -> None:
    gone = replace(stories, cameras=stories.cameras + torch.tensor([0.0, 0.0, 9.0, 0.0]))
    assert read(gone.draw_target(SIDE, SIDE), gone.shown, gone.scenes).there.float().mean() <= 0.1


def test_a_part_behind_the_body_does_not_count(stories: Stories) -> None:
    hidden = stories.joints()
    hidden[:, :, [20, 22]] = hidden[:, :, 9:10] + torch.tensor([0.0, 0.0, 300.0])
    known = known_places(stories.shown, hidden, stories.scenes, stories.cameras, SIDE)
    assert known.there[..., 7].float().mean() < 0.3
