"""Pose frames of a clip: limbs and overlay together, and the settings that decide who is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from services.pose.draw import draw_clip, draw_clips, halved
from services.pose.fit import halve
from services.pose.overlay import overlay
from services.pose.people import People
from services.pose.quirks import PRESETS, REFERENCE_STROKES, PoseQuirks, Strokes
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
    strokes: Strokes = REFERENCE_STROKES,
) -> Tensor:
    size = (HEIGHT, WIDTH)
    chunks = draw_clip(joints, clip, CAMERA, *size, quirks or PoseQuirks(), strokes, depth=depth, chunk_frames=2)
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
        int((drawn(standing(), empty, strokes=Strokes(capsule_radius_mm=radius)) != 0).any(-1).sum())
        for radius in (21.5, 86.0)
    ]
    assert areas[1] > 2.5 * areas[0]


def test_strokes_are_those_of_the_references_by_default() -> None:
    assert Strokes() == Strokes(capsule_radius_mm=21.5, head_radius_px=4, dot_radius_px=None)
    sizes = ((64, 64), (599, 900), (600, 900), (896, 512), (720, 1280), (2000, 2000))
    assert [Strokes().dot_radius(*size) for size in sizes] == [1, 1, 2, 1, 2, 2]
    assert Strokes(dot_radius_px=0).dot_radius(900, 900) == 0


def test_strokes_reach_limbs_and_overlay_of_a_clip() -> None:
    thin, thick = Strokes(10, 0, 0), Strokes(40, 6, 2)
    joints, clip, depth = standing(), [person()], DepthRange.of(limbs_of(standing()))
    assert depth is not None
    for strokes in (thin, thick):
        [frames] = draw_clip(joints, clip, CAMERA, HEIGHT, WIDTH, PoseQuirks(), strokes)
        view = View(HEIGHT, WIDTH, CAMERA, strokes.capsule_radius_mm, depth)
        expected, _ = render(limbs_of(joints), view)
        overlay(clip, HEIGHT, WIDTH, strokes).cover(expected)
        assert (frames == expected).all()


def test_many_clips_at_once_are_those_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    joints = np.stack([standing(frames=3, people=2, distance=distance) for distance in (2000, 3000, 5000)])
    joints[2, 1, 1] = 0
    cameras = [CAMERA, Camera(90, 80, 30, 20), Camera(60, 60, 40, 30)]
    clips = [[person(2, 10 * index + frame) for frame in range(3)] for index in range(3)]
    strokes = Strokes(60, 2, 0)
    monkeypatch.setattr("services.pose.draw._PIXELS_AT_ONCE", 4 * HEIGHT * WIDTH)
    for painted in (clips, None):
        found = draw_clips(joints, cameras, HEIGHT, WIDTH, strokes, clips=painted)
        assert found.shape == (3, 3, HEIGHT, WIDTH, 3)
        for index, frames in enumerate(found):
            nobody = [person(0)] * 3
            [expected] = draw_clip(
                joints[index],
                painted[index] if painted else nobody,
                cameras[index],
                HEIGHT,
                WIDTH,
                PoseQuirks(),
                strokes,
            )
            assert (frames == expected).all()


def test_presets_are_named_and_the_default_is_the_recommended_one() -> None:
    assert set(PRESETS) == {"recommended", "wan2gp", "official"}
    assert PRESETS["recommended"] == PoseQuirks()
    assert [PRESETS[name].scale_hands for name in ("recommended", "wan2gp", "official")] == [True, False, True]


def test_halves_are_those_of_frames_of_the_host_to_the_last_bit() -> None:
    frames = torch.randint(0, 256, (3, 32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames[0, :2, :2] = 255
    halves = halved(frames)
    assert halves.dtype == torch.float16
    np.testing.assert_array_equal(halves, [halve(frame.numpy()) for frame in frames])
