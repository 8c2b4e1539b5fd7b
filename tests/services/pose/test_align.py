"""Alignment of a driving clip to the reference picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tests.parity.pose_render  # noqa: F401 (registers the checks)
from services.pose import align as module
from services.pose.align import (
    Correction,
    Landmarks,
    align,
    face_scale,
    landmarks,
    scale_face,
    scale_hands,
    shift,
    solve_camera,
)
from services.pose.people import People
from services.pose.quirks import PRESETS, PoseQuirks
from services.pose.skeleton import Camera, slots
from tests.parity.cases import Case
from tests.parity.families import check_for
from tests.services.pose.figures import person, standing

GOLDENS = Path(__file__).parents[2] / "goldens"
HEIGHT, WIDTH = 320, 240
PLAIN = Camera.of(HEIGHT, WIDTH)
LEGS, ARMS = [1, 9, 10, 12, 13], [1, 0, 2, 3, 5, 6]
AS_BOTH = PoseQuirks(scale_hands=False)


def failures(name: str) -> list[str]:
    check = check_for(name)
    assert check is not None
    return [each.name for each in check(Case(name, GOLDENS)) if not each.verdict()[0]]


def seen_by(camera: Camera, hidden: tuple[int, ...] = ()) -> People:
    """A reference picture that shows the standing figure through this camera."""
    points = camera.project(slots(standing()[0, 0])[:14]) / (WIDTH, HEIGHT)
    reference = person()
    bodies, visible = reference.bodies.copy(), reference.visible.copy()
    bodies[0, :14] = points
    visible[0, list(hidden)] = False
    return replace(reference, bodies=bodies, visible=visible)


@pytest.mark.parametrize("name", ["pose-align-central", "pose-align-down", "pose-pipeline", "pose-pipeline-upper"])
def test_stored_case_passes(name: str) -> None:
    assert failures(name) == []


@pytest.mark.parametrize(
    ("constant", "value", "name"),
    [
        ("_LOWER", (9, 10, 12, 11), "pose-pipeline"),
        ("_UPPER", (0, 2, 3, 5, 7), "pose-pipeline-upper"),
        ("_NECK", 0, "pose-pipeline"),
        ("_M_BOUNDS", (0.7, 1.1), "pose-align-down"),
        ("_S_BOUNDS", (0.8, 1.05), "pose-align-central"),
        ("_FACE_SCALE_BOUNDS", (0.9, 1.5), "pose-align-central"),
        ("_NOSE_TIP", 31, "pose-align-down"),
        ("_NOSE", 1, "pose-align-down"),
        ("HEAD_JOINT", 12, "pose-align-down"),
        ("LEFT_WRIST_JOINT", 21, "pose-align-down"),
        ("RIGHT_WRIST_JOINT", 20, "pose-align-down"),
    ],
)
def test_stored_case_fails_when_a_constant_is_off(
    constant: str, value: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, constant, value)
    assert failures(name)


def test_legs_are_used_when_all_of_them_are_visible_and_found_and_weigh_four_times() -> None:
    marks = landmarks(standing()[0, 0], seen_by(PLAIN), HEIGHT, WIDTH)
    assert (marks.points == slots(standing()[0, 0])[LEGS]).all()
    assert marks.pixels == pytest.approx(PLAIN.project(marks.points))
    assert marks.weights.tolist() == [1, 4, 4, 4, 4]


@pytest.mark.parametrize("lost", [9, 10, 12, 13])
def test_one_leg_point_missing_leaves_arms_and_a_neck_that_weighs_eight_times(lost: int) -> None:
    marks = landmarks(standing()[0, 0], seen_by(PLAIN, hidden=(lost,)), HEIGHT, WIDTH)
    assert (marks.points == slots(standing()[0, 0])[ARMS]).all()
    assert marks.weights.tolist() == [8, 1, 1, 1, 1, 1]
    joints = standing()[0, 0]
    joints[{9: 5, 10: 8, 12: 4, 13: 7}[lost]] = 0
    assert len(landmarks(joints, seen_by(PLAIN), HEIGHT, WIDTH).points) == 6


def test_hidden_arms_are_left_out_and_a_hidden_neck_is_not() -> None:
    marks = landmarks(standing()[0, 0], seen_by(PLAIN, hidden=(1, 3, 6, 9)), HEIGHT, WIDTH)
    assert (marks.points == slots(standing()[0, 0])[[1, 0, 2, 5]]).all()


@pytest.mark.parametrize(
    "correction", [Correction(1.21, 0.93, 17.0, -22.0), Correction(0.75, 1.1, -90.0, 40.0), Correction(1, 1, 0, 0)]
)
def test_solver_finds_the_camera_a_picture_was_taken_with(correction: Correction) -> None:
    reference = seen_by(correction.apply(PLAIN))
    found = solve_camera(landmarks(standing()[0, 0], reference, HEIGHT, WIDTH), HEIGHT, WIDTH)
    assert (found.m, found.s, found.p, found.q) == pytest.approx(
        (correction.m, correction.s, correction.p, correction.q), abs=1e-6
    )


def test_correction_scales_both_focal_lengths_by_m_and_the_vertical_one_by_s_too() -> None:
    assert Correction(2, 3, 5, 7).apply(Camera(10, 100, 1, 2)) == Camera(20, 600, 6, 9)


@pytest.mark.parametrize("seed", range(12))
def test_no_camera_within_the_bounds_fits_better(seed: int) -> None:
    """Against many random corrections and steps around the solution, for goals that push it against the bounds."""
    generator = np.random.default_rng(seed)
    wanted = Correction(
        *generator.uniform((0.4, 0.5, -1.4 * WIDTH, -1.4 * HEIGHT), (2.0, 1.6, 1.4 * WIDTH, 1.4 * HEIGHT))
    )
    marks = landmarks(standing()[0, 0], seen_by(PLAIN, hidden=(9,) if seed % 2 else ()), HEIGHT, WIDTH)
    goal = wanted.apply(PLAIN).project(marks.points) + generator.normal(0, 6, marks.pixels.shape)
    marks = replace(marks, pixels=goal)
    found = solve_camera(marks, HEIGHT, WIDTH)
    values = np.array([found.m, found.s, found.p, found.q])
    low, high = np.array([0.7, 0.8, -WIDTH, -HEIGHT]), np.array([1.4, 1.15, WIDTH, HEIGHT])
    assert (values >= low - 1e-9).all()
    assert (values <= high + 1e-9).all()
    best = marks.cost(found.apply(PLAIN))
    steps = generator.normal(size=(300, 4)) * 10 ** generator.uniform(-4, 0, (300, 1)) * (high - low)
    for other in np.clip(values + steps, low, high):
        assert marks.cost(Correction(*other).apply(PLAIN)) >= best - 1e-9 * (1 + best)


def test_a_single_point_is_met_without_a_warning() -> None:
    marks = Landmarks(np.array([[100.0, -400, 3000]]), np.array([[130.0, 90]]), np.ones(1))
    assert marks.cost(solve_camera(marks, HEIGHT, WIDTH).apply(PLAIN)) < 1e-9
    nothing = Landmarks(np.zeros((0, 3)), np.zeros((0, 2)), np.zeros(0))
    assert solve_camera(nothing, HEIGHT, WIDTH) == Correction(1, 1, 0, 0)


def test_face_scale_is_the_ratio_of_sizes_within_its_bounds() -> None:
    face = person().faces[0]
    tip = face[30]
    for size, expected in ((1.25, 1.25), (0.5, 0.8), (3.0, 1.5)):
        assert face_scale(face, tip + (face - tip) * size, PoseQuirks()) == pytest.approx(expected)
    assert face_scale(np.full((68, 2), 0.5), face, PoseQuirks()) == 1


def test_invisible_face_points_count_only_as_in_the_references() -> None:
    face = person().faces[0]
    larger = face[30] + (face - face[30]) * 1.25
    hidden = np.where(np.arange(68)[:, None] < 9, -1.0, larger)
    assert face_scale(face, hidden, PoseQuirks()) == pytest.approx(1.25)
    assert face_scale(face, hidden, PRESETS["wan2gp"]) == 1.5
    assert face_scale(face, np.full_like(face, -1), PoseQuirks()) == 1


def test_face_grows_about_the_nose_tip_and_the_body_about_the_nose() -> None:
    people = person(2)
    scaled = scale_face(people, 1.5)
    for before, after, about in ((people.faces, scaled.faces, 30), (people.bodies, scaled.bodies, 0)):
        assert (after[:, about] == before[:, about]).all()
        assert (after - after[:, [about]]) == pytest.approx(1.5 * (before - before[:, [about]]))
    assert scaled.hands is people.hands


def test_hands_grow_about_their_wrists_unless_the_wrist_is_hidden() -> None:
    people = person()
    people.hands[0, 1, 0] = -1
    scaled = scale_hands(people, Correction(1.2, 0.9, 0, 0))
    left, before = scaled.hands[0, 0], people.hands[0, 0]
    assert (left - left[0]) == pytest.approx((before - before[0]) * (1.2, 1.08))
    assert (left[0] == before[0]).all()
    assert (scaled.hands[0, 1] == people.hands[0, 1]).all()


def test_points_move_with_their_joint_and_stay_where_the_joint_is_not_before_the_camera() -> None:
    people, joints = person(), standing()[0, 0]
    joints[21] = (10, 20, 0.01)
    after = Correction(1.3, 1.1, 12, -8).apply(PLAIN)
    moved = shift(people, joints, PLAIN, after, HEIGHT, WIDTH)

    def step(joint: int) -> np.ndarray:
        return (after.project(joints[joint]) - PLAIN.project(joints[joint])) / (WIDTH, HEIGHT)

    assert moved.faces == pytest.approx(people.faces + step(15))
    assert moved.bodies == pytest.approx(people.bodies + step(15))
    assert moved.hands[:, 0] == pytest.approx(people.hands[:, 0] + step(20))
    assert (moved.hands[:, 1] == people.hands[:, 1]).all()


def test_first_frame_with_a_pose_decides_and_later_ones_do_not() -> None:
    joints = standing(frames=4)[:, 0]
    joints[0] = 0
    reference = seen_by(Camera(PLAIN.fx * 1.1, PLAIN.fy * 1.1, PLAIN.cx + 9, PLAIN.cy))
    clip = [person(seed=seed) for seed in range(4)]
    aligned = align(joints, clip, reference, HEIGHT, WIDTH, PoseQuirks())
    assert aligned.start == 1
    correction = solve_camera(landmarks(joints[1], reference, HEIGHT, WIDTH), HEIGHT, WIDTH)
    assert aligned.camera == correction.apply(PLAIN)
    # nothing hangs on a joint in the frame without one, but the face is scaled
    scale = face_scale(clip[1].faces[0], reference.faces[0], PoseQuirks())
    assert aligned.clip[0].faces == pytest.approx(scale_face(clip[0], scale).faces)
    first = align(joints, clip, reference, HEIGHT, WIDTH, replace(AS_BOTH, face_scale_frame="first"))
    scale = face_scale(clip[0].faces[0], reference.faces[0], PoseQuirks())
    assert first.clip[0].faces == pytest.approx(scale_face(clip[0], scale).faces)


def test_frames_without_anyone_stay_so() -> None:
    joints = standing(frames=2)[:, 0]
    joints[0] = 0
    clip = [person().pick([]), person()]
    for quirks in PRESETS.values():
        for reference in (person(), person(detected=False)):
            aligned = align(joints, clip, reference, HEIGHT, WIDTH, quirks)
            assert [len(people) for people in aligned.clip] == [0, 1]


def test_only_the_first_person_is_kept_and_hands_are_scaled_where_asked_for() -> None:
    joints, clip = standing()[:, 0], [person(3)]
    reference = seen_by(Camera(PLAIN.fx * 1.2, PLAIN.fy * 1.2, PLAIN.cx, PLAIN.cy))
    spans = []
    for quirks in (PoseQuirks(), AS_BOTH):
        [people] = align(joints, clip, reference, HEIGHT, WIDTH, quirks).clip
        assert len(people) == 1
        spans.append(np.ptp(people.hands[0, 0], axis=0))
    assert spans[0] == pytest.approx(1.2 * spans[1])
    assert spans[1] == pytest.approx(np.ptp(clip[0].hands[0, 0], axis=0))


@pytest.mark.parametrize(("quirks", "drawn"), [(PoseQuirks(), 1), (PRESETS["wan2gp"], 2), (PRESETS["official"], 2)])
def test_nothing_is_aligned_to_a_picture_without_a_person(quirks: PoseQuirks, drawn: int) -> None:
    clip = [person(2)]
    for joints, reference in (
        (standing()[:, 0], person(detected=False)),
        (np.zeros((1, 24, 3), np.float32), person()),
    ):
        aligned = align(joints, clip, reference, HEIGHT, WIDTH, quirks)
        assert (aligned.camera, aligned.start) == (PLAIN, None)
        assert len(aligned.clip[0]) == drawn
        assert (aligned.clip[0].faces == clip[0].faces[:drawn]).all()
