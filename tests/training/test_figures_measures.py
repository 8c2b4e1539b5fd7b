"""Measures give full marks to true clips, and each falls where what it measures is spoilt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.figures.characters import sample_characters
from training.figures.clips import Stories, sample_stories
from training.figures.measures import Truth, effects_asked, effects_shown, pose_hits, psnr, recognised

SIDE = 64


def drawn_stories(seed: int = 3, **shares: float) -> Stories:
    generator = torch.Generator().manual_seed(seed)
    stories = sample_stories(6, generator, frames=9, held_out=True, **shares)
    motions = replace(stories.motions, angles=stories.motions.angles[:, ::4], places=stories.motions.places[:, ::4])
    return replace(stories, motions=motions)


@pytest.fixture(scope="module")
def truths() -> list[Truth]:
    stories = drawn_stories(motley=0.5, effects=0.5)
    return [Truth.of(stories, index, SIDE) for index in range(len(stories))]


def test_psnr_is_that_of_its_definition() -> None:
    true = torch.full((1, 4, 4, 3), 100, dtype=torch.uint8)
    where = torch.zeros(1, 4, 4, dtype=torch.bool)
    where[0, :2] = True
    changed = true.clone()
    changed[:, :2] += 10
    assert psnr(changed, true) == pytest.approx(31.14, abs=0.01)
    assert psnr(changed, true, where) == pytest.approx(28.13, abs=0.01)
    assert psnr(true, true) > 90


def test_the_figure_is_where_its_joints_are(truths: list[Truth]) -> None:
    for truth in truths:
        figure = truth.figure
        assert 0.04 < figure.float().mean() < 0.5
        assert not torch.equal(figure[0], figure[-1])


def test_true_clips_are_recognised_among_many_and_recoloured_ones_are_not(truths: list[Truth]) -> None:
    others = sample_characters(24, torch.Generator().manual_seed(77), held_out=True, motley=0.5)
    right = 0
    for truth in truths:
        own = truth.story.characters
        candidates = replace(others, colours=torch.cat([others.colours[:-1], own.colours]))
        right += recognised(truth.clip, truth, candidates) == 23
        disguised = replace(truth.story, shown=replace(truth.story.shown, colours=others.colours[:1]))
        assert recognised(replace(truth, story=disguised).clip, truth, candidates) == 0
    assert right == len(truths)


def test_effects_are_seen_in_true_clips_just_where_asked_for(truths: list[Truth]) -> None:
    asked = [effects_asked(truth) for truth in truths]
    for name in ("snow", "night", "hat"):
        assert {effects[name] for effects in asked} == {False, True}
    assert [effects_shown(truth.clip, truth) for truth in truths] == asked


def test_effects_are_missed_in_clips_without_them(truths: list[Truth]) -> None:
    for truth in truths:
        plain = truth.in_scene(truth.story.scenes.plain())
        shown = effects_shown(plain, truth)
        assert not any(shown[name] for name, asked in effects_asked(truth).items() if asked)


def test_a_hat_of_another_colour_is_not_the_one_asked_for() -> None:
    stories = drawn_stories(effects=0.0)
    truth = Truth.of(stories, 0, SIDE)
    asked = replace(truth, story=replace(truth.story, scenes=replace(truth.story.scenes, hat=torch.tensor([2]))))
    blue = replace(truth.story.scenes, hat=torch.tensor([3]))
    assert effects_shown(asked.clip, asked)["hat"]
    assert not effects_shown(truth.in_scene(blue), asked)["hat"]


def test_pose_hits_fall_when_the_clip_is_of_another_story() -> None:
    stories = drawn_stories(motley=1.0, effects=0.0)
    truths = [Truth.of(stories, index, SIDE) for index in range(3)]
    for truth, other in zip(truths, truths[1:] + truths[:1], strict=True):
        hits, counted = pose_hits(truth.clip, truth)
        assert hits >= 0.93 * counted
        moved = replace(truth, story=replace(truth.story, cameras=other.story.cameras), joints=other.joints)
        hits, counted = pose_hits(moved.clip, truth)
        assert hits <= 0.5 * counted
