"""Runs the suite through the services and scores it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.scores import Score, mean, share
from benchmarks.quality.services import Services
from benchmarks.quality.suite import Case, Suite
from services.pose.skeleton import SLOT_JOINTS
from training.figures.cameras import fitted_cameras, plain_cameras, projected
from training.figures.measures import Truth, effects_asked, effects_shown, pose_hits, psnr, recognised

FEWER: dict[str, dict[str, Any]] = {
    "every step in full": {},
    "mag 1.5": {"step_cache": "mag", "step_cache_speedup": 1.5},
    "mag 2": {"step_cache": "mag", "step_cache_speedup": 2.0},
    "tea 1.5": {"step_cache": "tea", "step_cache_speedup": 1.5},
    "tea 2": {"step_cache": "tea", "step_cache_speedup": 2.0},
    "3 steps": {"steps": 3},
    "12 steps": {"steps": 12},
    "12 steps, mag 1.75": {"steps": 12, "step_cache": "mag"},
    "12 steps, tea 1.75": {"steps": 12, "step_cache": "tea"},
    "guidance until half": {"guidance_end": 0.5},
    "CFG-Zero*": {"cfg_zero_star": True},
    "CFG-Zero*, 1 step of zero": {"cfg_zero_star": True, "zero_init_steps": 1},
}
"""Ways to fewer forward passes, and what they are to be compared with."""
EXTRACTION_SIDE = 192
"""Errors of extracted poses are told in pixels of a picture of this side."""


def pck(videos: Sequence[Tensor], cases: Sequence[Case]) -> float:
    return share([pose_hits(video, case.truth) for video, case in zip(videos, cases, strict=True)])


def score_reader(suite: Suite) -> list[Score]:
    """What the measure itself gives for true clips, and for perfect clips of another case's motion: chance.

    All clips of one character begin where its reference picture stands, so chance is far from 0.
    """
    cases = suite.motley
    true, count = [case.truth.clip for case in cases], len(cases)
    others = [moved_like(case.truth, other.truth).clip for case, other in zip(cases, shuffled(cases), strict=True)]
    return [
        Score("reader: PCK@0.1 of true clips", pck(true, cases), "", 0.95, "at least", count),
        Score("reader: PCK@0.1 of true clips of another case's motion", pck(others, cases), count=count),
    ]


def shuffled(cases: Sequence[Case]) -> list[Case]:
    """To each case another one."""
    return [*cases[1:], *cases[:1]]


def moved_like(truth: Truth, other: Truth) -> Truth:
    """The character of one truth after the driving clip of another."""
    own, driving = truth.story, other.story
    everywhere = torch.ones(1, dtype=torch.bool)
    story = replace(
        own,
        drivers=driving.drivers,
        motions=driving.motions,
        shown=own.characters.with_bodies_of(driving.drivers, everywhere),
        cameras=fitted_cameras(driving.driving_joints()[:, 0], own.reference_joints()[:, 0]),
    )
    return Truth.of(story, 0, truth.side)


async def score_vae(services: Services, suite: Suite) -> list[Score]:
    """Encoded and decoded again."""
    true = [case.truth.clip for case in suite.motley]
    decoded = [await services.reconstruct(frames) for frames in true]
    whole = [psnr(video, frames) for video, frames in zip(decoded, true, strict=True)]
    figure = [
        psnr(video, frames, case.truth.figure) for video, frames, case in zip(decoded, true, suite.motley, strict=True)
    ]
    count = len(true)
    return [
        Score("VAE: PSNR of clips", mean(whole), "dB", 28, "at least", count),
        Score("VAE: PSNR of the figure alone", mean(figure), "dB", 22, "at least", count),
        Score("VAE: PCK@0.1 of decoded clips", pck(decoded, suite.motley), "", 0.93, "at least", count),
    ]


async def score_extraction(services: Services, suite: Suite) -> list[Score]:
    """Joints found in raw driving clips, where they are seen."""
    cases = [*suite.motley, *suite.effects]
    errors = [extraction_error(await services.extract(case), case.truth) for case in cases]
    name = f"pose extraction: mean error at {EXTRACTION_SIDE} px"
    return [Score(name, mean(errors), "px", 5, "at most", len(cases))]


def extraction_error(joints: Tensor, truth: Truth) -> float:
    """Mean distance in the picture of the joints that are drawn from where they are."""
    camera = plain_cameras(1) * EXTRACTION_SIDE
    known = truth.story.driving_joints()[0]
    found, right = (
        projected(pose.reshape(1, -1, 3), camera) for pose in (joints[:, SLOT_JOINTS], known[:, SLOT_JOINTS])
    )
    return float((found - right).norm(dim=-1).mean())


async def animate(services: Services, suite: Suite) -> tuple[list[Tensor], list[Tensor]]:
    """Whole animations from raw driving clips: motley cases, and those with effects."""
    own = await services.animate(suite.motley, [case.driving for case in suite.motley], named="own")
    effects = await services.animate(suite.effects, [case.driving for case in suite.effects], named="effects")
    return own, effects


def score_generated(own: Sequence[Tensor], effects: Sequence[Tensor], suite: Suite) -> list[Score]:
    """What `animate` has made."""
    cases = [*suite.motley, *suite.effects]
    right = [known_again(video, case, suite) for video, case in zip([*own, *effects], cases, strict=True)]
    return [
        Score("generated: PCK@0.1", pck(own, suite.motley), "", 0.80, "at least", len(suite.motley)),
        Score("the right character of 64", mean(right), "", 0.95, "at least", len(cases)),
        *score_effects(effects, suite.effects),
    ]


async def score_controls(services: Services, suite: Suite) -> list[Score]:
    """Animations from another case's driving clip, which must score low; and from exact pose frames."""
    others = [case.driving for case in shuffled(suite.motley)]
    mixed = await services.animate(suite.motley, others, named="shuffled")
    exact = await services.animate(suite.motley, [case.pose for case in suite.motley], named="exact")
    control, count = pck(mixed, suite.motley), len(suite.motley)
    return [
        Score("generated with another case's driving clip: PCK@0.1", control, "", 0.30, "at most", count),
        Score("generated from exact pose frames: PCK@0.1", pck(exact, suite.motley), count=count),
    ]


def known_again(video: Tensor, case: Case, suite: Suite) -> bool:
    """Whether the case's character is the nearest of all."""
    own = case.truth.story.characters
    candidates = replace(suite.strangers, colours=torch.cat([own.colours, suite.strangers.colours]))
    return recognised(video, case.truth, candidates) == 0


def score_effects(videos: Sequence[Tensor], cases: Sequence[Case]) -> list[Score]:
    """Effects that the captions ask for or do not, one by one."""
    asked = [effects_asked(case.truth) for case in cases]
    shown = [effects_shown(video, case.truth) for video, case in zip(videos, cases, strict=True)]
    pairs = [(want[name], have[name]) for want, have in zip(asked, shown, strict=True) for name in want]
    present, absent = ([have == want for want, have in pairs if want is asked_for] for asked_for in (True, False))
    each = [
        Score(
            f"caption: {name} as asked",
            mean([w[name] == h[name] for w, h in zip(asked, shown, strict=True)]),
            count=len(cases),
        )
        for name in asked[0]
    ]
    return [
        Score("caption: effect present when asked for", mean(present), "", 0.90, "at least", len(present)),
        Score("caption: effect absent when not", mean(absent), "", 0.90, "at least", len(absent)),
        *each,
    ]


async def score_fewer(services: Services, suite: Suite) -> AsyncIterator[list[Score]]:
    """Animations with fewer forward passes, and what they are to be compared with."""
    in_full: list[Tensor] = []
    for name, arguments in FEWER.items():
        motley, scores = await score_beside(services, suite, name, in_full, "every step in full", **arguments)
        in_full = in_full or motley
        yield scores


async def score_beside(
    services: Services, suite: Suite, name: str, first: Sequence[Tensor], other: str, **arguments: Any
) -> tuple[list[Tensor], list[Score]]:
    """Videos made in some way, with the same seeds each time, and their scores.

    Args:
        first: the videos to compare them with; empty: these are they.
        other: what those are called.
    """
    named = name.replace(" ", "-").replace(",", "")
    motley = await services.animate(suite.motley, [case.driving for case in suite.motley], named=named, **arguments)
    effects = await services.animate(
        suite.effects, [case.driving for case in suite.effects], named=f"{named}-effects", **arguments
    )
    present, absent, *_ = score_effects(effects, suite.effects)
    alike = [psnr(video, whole) for video, whole in zip(motley, first, strict=True)] if first else []
    return motley, [
        *([Score(f"{name}: PSNR against {other}", mean(alike), "dB", count=len(alike))] if alike else []),
        Score(f"{name}: PCK@0.1", pck(motley, suite.motley), count=len(motley)),
        replace(present, name=f"{name}: effect present when asked for", bound=None),
        replace(absent, name=f"{name}: effect absent when not", bound=None),
    ]


async def score_guidance(services: Services, suite: Suite) -> list[Score]:
    """The same without guidance."""
    driving = [case.driving for case in suite.motley]
    motley = await services.animate(suite.motley, driving, named="unguided", guidance_scale=1.0)
    effects = await services.animate(
        suite.effects, [case.driving for case in suite.effects], named="unguided-effects", guidance_scale=1.0
    )
    present, absent, *_ = score_effects(effects, suite.effects)
    return [
        Score("guidance 1: PCK@0.1", pck(motley, suite.motley), count=len(motley)),
        replace(present, name="guidance 1: effect present when asked for", bound=None),
        replace(absent, name="guidance 1: effect absent when not", bound=None),
    ]
