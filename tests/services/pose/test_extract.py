"""From a driving video to pose frames: the steps, who is followed, what is bridged, what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from torch import Tensor

from bunraku.errors import InvalidRequest
from services.pose.bridging import bridge_joints
from services.pose.clip import Batch, Clip
from services.pose.extract import Drawing, PoseExtractor, draw
from services.pose.habits import HABITS
from services.pose.nlf.config import QUIRKS
from services.pose.people import grown_rectangle
from services.pose.progress import Progress
from services.pose.quirks import Strokes
from services.pose.skeleton import Camera, known
from tests.services.pose.drawn import (
    ANN,
    ANN_BOX,
    BEN,
    BEN_BOX,
    HEIGHT,
    WIDTH,
    DrawnModels,
    Frame,
    joints_of,
    picture,
    walking,
)

REFERENCE = picture(0, {ANN: (30, 20, 50, 60)})
NOBODY = picture(0, {})


def clip_of(frames: Sequence[Frame], reads: list[int] | None = None) -> Clip:
    def read() -> Iterator[Frame]:
        for index, frame in enumerate(frames):
            if reads is not None:
                reads.append(index)
            yield frame

    return Clip(read, len(frames), HEIGHT, WIDTH)


def extract(
    frames: Sequence[Frame],
    models: DrawnModels | None = None,
    *,
    reference: Frame = REFERENCE,
    preset: str = "recommended",
    people: int = 1,
) -> list[Any]:
    extractor = PoseExtractor(models or DrawnModels())
    return list(extractor.extract(clip_of(frames), reference, HABITS[preset], people=people))


def progress(items: Sequence[Any], step: str) -> list[Progress]:
    return [item for item in items if isinstance(item, Progress) and item.step == step]


def drawing(items: Sequence[Any]) -> Drawing:
    [found] = [item for item in items if isinstance(item, Drawing)]
    return found


def pictures(items: Sequence[Any]) -> npt.NDArray[np.uint8]:
    return np.concatenate([item.numpy() for item in items if isinstance(item, Tensor)])


def test_a_clip_gives_as_many_pose_frames() -> None:
    frames = pictures(extract(walking(9)))
    assert frames.shape == (9, HEIGHT, WIDTH, 3)
    assert frames.dtype == np.uint8
    assert all(frame.any() for frame in frames)


def test_steps_come_in_order_and_count_up_to_all_frames() -> None:
    items = extract(walking(9))
    steps = [(item.step, item.completed_frames) for item in items if isinstance(item, Progress)]
    assert steps == [
        *[("detect", n) for n in (4, 8, 9)],
        ("track", 9),
        *[("joints", n) for n in (4, 8, 9)],
        ("align", 9),
        *[("render", n) for n in (4, 8, 9)],
    ]
    assert {item.total_frames for item in items if isinstance(item, Progress)} == {9}
    assert all(item.bridged_frames == () for item in items if isinstance(item, Progress))


def test_frames_are_read_twice_and_held_a_few_at_a_time() -> None:
    reads: list[int] = []
    models = DrawnModels()
    extractor = PoseExtractor(models)
    for item in extractor.extract(clip_of(walking(9), reads), REFERENCE, HABITS["recommended"]):
        if isinstance(item, Progress) and item.step == "detect":
            # while it is found out who is who in this batch, people are found in the next and that after it is read
            assert item.completed_frames <= len(reads) <= item.completed_frames + 4 + 4 + 1
    assert reads == [*range(9), *range(9)]
    assert models.batches == [4, 4, 1, 4, 4, 1, 1]


def test_joints_are_those_of_each_frame_and_stay_as_they_are_when_the_camera_is_fitted() -> None:
    found = drawing(extract(walking(6)))
    np.testing.assert_array_equal(found.joints[:, 0], [joints_of(ANN, number) for number in range(6)])
    assert found.keypoints.shape == (6, 1, 134, 3)
    assert not np.allclose(found.camera, Drawing.plain_camera(HEIGHT, WIDTH))


def test_without_a_person_in_the_reference_nothing_is_moved() -> None:
    found = drawing(extract(walking(5), reference=NOBODY))
    np.testing.assert_array_equal(found.camera, Camera.of(HEIGHT, WIDTH).matrix().astype(np.float32))
    seen = [people[0].keypoints for people in DrawnModels().people(walking(5), phantom=False)]
    np.testing.assert_array_equal(found.keypoints[:, 0], seen)


def test_poses_are_fitted_to_the_largest_person_of_the_reference() -> None:
    both = picture(0, {ANN: (30, 20, 50, 60), BEN: (60, 30, 70, 50)})
    one, other = (drawing(extract(walking(5), reference=picture)).camera for picture in (both, REFERENCE))
    np.testing.assert_array_equal(one, other)


def test_without_a_reference_poses_stay_where_they_are() -> None:
    extractor, clip = PoseExtractor(DrawnModels()), clip_of(walking(5))
    items = list(extractor.extract(clip, None, HABITS["recommended"]))
    np.testing.assert_array_equal(drawing(items).camera, Drawing.plain_camera(HEIGHT, WIDTH))


def test_a_reference_of_another_size_is_fitted_first() -> None:
    large = np.asarray(Image.fromarray(REFERENCE).resize((WIDTH * 2, HEIGHT * 2), Image.Resampling.NEAREST))
    one, other = (drawing(extract(walking(5), reference=picture)).camera for picture in (large, REFERENCE))
    # fitting blurs the outline by less than a pixel
    np.testing.assert_allclose(one, other, atol=3)


def test_the_drawing_drawn_again_gives_the_same_frames() -> None:
    for reference in (REFERENCE, NOBODY):
        items = extract(walking(9, without=[4]), reference=reference)
        habits, device = HABITS["recommended"].pose, DrawnModels().device
        again = list(draw(drawing(items), HEIGHT, WIDTH, habits, Strokes(), device, Batch(3)))
        np.testing.assert_array_equal(np.concatenate(again), pictures(items))


def test_frames_without_the_person_are_bridged_and_reported() -> None:
    items = extract(walking(9, without=[0, 4, 5]))
    for step in ("track", "joints", "align", "render"):
        assert progress(items, step)[-1].bridged_frames == (0, 4, 5)
    joints = drawing(items).joints[:, 0]
    third = (joints_of(ANN, 6) - joints_of(ANN, 3)) / 3
    np.testing.assert_allclose(joints[5], joints_of(ANN, 3) + 2 * third, rtol=1e-4)
    np.testing.assert_array_equal(joints[0], joints_of(ANN, 1))
    assert all(frame.any() for frame in pictures(items))


def test_frames_whose_joints_are_not_found_are_bridged_too() -> None:
    items = extract(walking(9, without=[4]), DrawnModels(unlocated=[2]))
    assert progress(items, "track")[-1].bridged_frames == (4,)
    assert progress(items, "joints")[-1].bridged_frames == (2, 4)
    middle = (joints_of(ANN, 1) + joints_of(ANN, 3)) / 2
    np.testing.assert_allclose(drawing(items).joints[2, 0], middle, rtol=1e-4)


def test_the_largest_person_is_followed_although_another_scores_more_and_grows() -> None:
    frames = [picture(n, {ANN: ANN_BOX, BEN: (60, 20 - 2 * n, 80 + 2 * n, 62)}) for n in range(9)]
    models = DrawnModels()
    found = drawing(extract(frames, models))
    np.testing.assert_array_equal(found.joints[:, 0], [joints_of(ANN, number) for number in range(9)])
    # the 3D estimator sees nobody else
    assert all((frame[..., 0] != BEN).all() for frame in models.shown)


def test_the_3d_estimator_sees_only_the_grown_rectangle() -> None:
    models = DrawnModels()
    bright = [np.where(frame == 0, np.uint8(33), frame) for frame in walking(5)]
    extract(bright, models)
    for number, frame in enumerate(models.shown):
        box = np.add(ANN_BOX, [number, 0, number, 0])
        fractions = np.divide(box, [WIDTH, HEIGHT, WIDTH, HEIGHT]).tolist()
        left, top, right, bottom = grown_rectangle(fractions, HEIGHT, WIDTH)
        np.testing.assert_array_equal(frame[top:bottom, left:right], bright[number][top:bottom, left:right])
        assert frame.sum(dtype=np.int64) == frame[top:bottom, left:right].sum(dtype=np.int64)


def test_released_programs_take_the_best_box_of_each_frame_and_leave_gaps() -> None:
    frames = [picture(n, {ANN: ANN_BOX, BEN: BEN_BOX} if n != 3 else {}) for n in range(5)]
    for preset in ("wan2gp", "official"):
        models = DrawnModels()
        items = extract(frames, models, preset=preset)
        joints = drawing(items).joints[:, 0]
        np.testing.assert_array_equal(joints[[0, 1, 2, 4]], [joints_of(BEN, number) for number in (0, 1, 2, 4)])
        assert not known(joints[3]).any()
        assert {item.bridged_frames for item in items if isinstance(item, Progress)} == {()}
        assert all(models.phantoms)
        assert set(models.quirks) == {QUIRKS[preset]}


def test_by_default_there_are_no_phantoms_and_the_estimator_has_its_own_settings() -> None:
    models = DrawnModels()
    extract(walking(5), models)
    assert not any(models.phantoms)
    assert set(models.quirks) == {QUIRKS["default"]}


def test_a_video_that_shows_nobody_is_refused() -> None:
    for preset in HABITS:
        with pytest.raises(InvalidRequest) as error:
            extract([NOBODY] * 5, preset=preset)
        assert error.value.violations == (("video", "shows nobody: no person was found in its 5 frames (0 to 4)"),)
    with pytest.raises(InvalidRequest) as error:
        extract(walking(5), DrawnModels(unlocated=range(5)))
    assert error.value.violations == (("video", "shows nobody whose joints can be located"),)


def test_joints_are_bridged_at_both_ends_and_between() -> None:
    joints = np.zeros((6, 24, 3), np.float32)
    joints[[1, 4]] = np.arange(1, 73, dtype=np.float32).reshape(24, 3) * np.array([1, 4])[:, None, None]
    filled, missing = bridge_joints(joints)
    assert missing == [0, 2, 3, 5]
    np.testing.assert_allclose(filled[:, 23, 2], 72 * np.array([1, 1, 2, 3, 4, 4]))
    assert not joints[0].any()
