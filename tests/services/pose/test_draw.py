"""Pose frames of a clip: limbs and overlay together, and the settings that decide who is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from services.pose.draw import draw_clip
from services.pose.overlay import overlay
from services.pose.people import People
from services.pose.quirks import PRESETS, PoseQuirks
from services.pose.render import DepthRange, View, render
from services.pose.skeleton import Camera, limbs_of
from tests.services.pose.figures import person, standing

HEIGHT, WIDTH = 56, 72
CAMERA = Camera.of(HEIGHT, WIDTH)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def drawn(
    joints: npt.NDArray[np.float32],
    clip: list[People],
    quirks: PoseQuirks | None = None,
    depth: DepthRange | None = None,
) -> Tensor:
    chunks = draw_clip(joints, clip, CAMERA, HEIGHT, WIDTH, quirks or PoseQuirks(), depth=depth, chunk_frames=2)
    return torch.cat(list(chunks))


def test_frames_are_limbs_under_the_overlay_in_chunks() -> None:
    joints, clip = standing(frames=5, people=2), [person(2, seed) for seed in range(5)]
    limbs = limbs_of(joints)
    depth = DepthRange.of(limbs)
    assert depth is not None
    frames, _ = render(limbs, View(HEIGHT, WIDTH, CAMERA, 21.5, depth))
    overlay(clip, HEIGHT, WIDTH).cover(frames)
    assert (drawn(joints, clip) == frames).all()


def test_part_of_a_clip_is_drawn_with_the_depths_of_the_whole() -> None:
    joints, clip = standing(frames=4), [person()] * 4
    joints[3, ..., 2] += 4000
    whole, depth = drawn(joints, clip), DepthRange.of(limbs_of(joints))
    assert (drawn(joints[:2], clip[:2], depth=depth) == whole[:2]).all()
    assert (drawn(joints[:2], clip[:2]) != whole[:2]).any()


@pytest.mark.parametrize(("preset", "shown"), [("recommended", False), ("wan2gp", True), ("official", True)])
def test_points_of_nobody_are_drawn_only_as_in_the_references(preset: str, shown: bool) -> None:
    frames = drawn(np.zeros((1, 1, 24, 3), np.float32), [person(detected=False)], PRESETS[preset])
    assert bool(frames.any()) == shown


@pytest.mark.parametrize(("preset", "people"), [("recommended", 3), ("wan2gp", 3), ("official", 2)])
def test_third_person_is_left_out_by_the_official_extractor(preset: str, people: int) -> None:
    joints, clip = standing(people=3), [person(3)]
    expected = drawn(
        joints[:, :people], [clip[0].pick(range(people))], replace(PRESETS[preset], further_people="drawn")
    )
    assert (drawn(joints, clip, PRESETS[preset]) == expected).all()


def test_radius_is_a_setting() -> None:
    empty = [person().pick([])]
    areas = [
        int((drawn(standing(), empty, PoseQuirks(capsule_radius_mm=radius)) != 0).any(-1).sum())
        for radius in (21.5, 86.0)
    ]
    assert areas[1] > 2.5 * areas[0]


def test_presets_are_named_and_the_default_is_the_recommended_one() -> None:
    assert set(PRESETS) == {"recommended", "wan2gp", "official"}
    assert PRESETS["recommended"] == PoseQuirks()
    assert {quirks.capsule_radius_mm for quirks in PRESETS.values()} == {21.5}
    assert [PRESETS[name].scale_hands for name in ("recommended", "wan2gp", "official")] == [True, False, True]
