"""The skeleton: which joint goes where, which limbs there are, and the camera."""

from __future__ import annotations

import numpy as np
import pytest

from services.pose.skeleton import LIMBS, Camera, known, limbs_of, palette, slots


def joints(frames: int = 1, people: int = 1) -> np.ndarray:
    """Every coordinate another number, none zero."""
    values = np.arange(1, frames * people * 24 * 3 + 1, dtype=np.float32)
    return values.reshape(frames, people, 24, 3)


def test_slots_hold_the_joints_of_their_body_part_and_eyes_and_ears_stay_zero() -> None:
    one = joints()[0, 0]
    names = {
        0: "head",
        1: "neck",
        4: "right wrist",
        7: "left wrist",
        8: "right hip",
        10: "right ankle",
        13: "left ankle",
    }
    smpl = {
        "head": 15,
        "neck": 12,
        "right wrist": 21,
        "left wrist": 20,
        "right hip": 2,
        "right ankle": 8,
        "left ankle": 7,
    }
    placed = slots(one)
    for slot, name in names.items():
        assert (placed[slot] == one[smpl[name]]).all(), name
    assert placed.shape == (18, 3)
    assert (placed[14:] == 0).all()


def test_thirteen_limbs_join_their_slots_in_the_order_of_drawing() -> None:
    one = joints()
    limbs, placed = limbs_of(one), slots(one)[0, 0]
    pairs = [
        (1, 2),
        (2, 3),
        (3, 4),
        (1, 5),
        (5, 6),
        (6, 7),
        (1, 8),
        (8, 9),
        (9, 10),
        (1, 11),
        (11, 12),
        (12, 13),
        (1, 0),
    ]
    assert (limbs.starts[0] == placed[[start for start, _ in pairs]]).all()
    assert (limbs.ends[0] == placed[[end for _, end in pairs]]).all()
    assert limbs.drawn.all()


def test_limb_is_left_out_when_either_end_has_coordinates_of_sum_zero() -> None:
    one = joints()
    one[0, 0, 20] = 0
    one[0, 0, 2] = (5, -7, 2)
    drawn = dict(zip([(limb.start, limb.end) for limb in LIMBS], limbs_of(one).drawn[0], strict=True))
    assert [pair for pair, shown in drawn.items() if not shown] == [(6, 7), (1, 8), (8, 9)]
    assert known(np.array([[0, 0, 0], [1, 0, -1], [1, 0, 0]])).tolist() == [False, False, True]


def test_people_follow_each_other_within_a_frame() -> None:
    limbs = limbs_of(joints(frames=2, people=3))
    assert limbs.starts.shape == (2, 39, 3)
    assert (limbs.starts[1, 13:26] == limbs_of(joints(2, 3)[1:, 1:2]).starts[0]).all()
    assert len(limbs) == 2
    assert (limbs.frames(1, 2).ends == limbs.ends[1:]).all()


def test_one_person_has_saturated_colours_and_the_first_of_several_pastel_ones() -> None:
    alone, several = palette(1), palette(4)
    # 255 becomes 1, 0 becomes 0.15, 85 in between
    assert alone[1].tolist() == pytest.approx([1, 85 / 300 + 0.15, 0.15])
    assert several[0].tolist() == pytest.approx([1, 0.65, 0.65])
    assert several[12].tolist() == pytest.approx([0.85, 0.85, 0.85])
    assert several[13].tolist() == pytest.approx([1, 20 / 300 + 0.15, 20 / 300 + 0.15])
    assert (several[13:26] == several[26:39]).all()
    assert (several[13:26] == several[39:]).all()


def test_focal_length_is_that_of_55_degrees_over_the_longer_side() -> None:
    for height, width in ((512, 896), (896, 512)):
        camera = Camera.of(height, width)
        assert camera.fx == camera.fy == pytest.approx(860.5999928830823, rel=1e-12)
        assert (camera.cx, camera.cy) == (width / 2, height / 2)
    assert Camera.of(100, 80, 90).fx == pytest.approx(50)


def test_projection_divides_by_depth_and_matrix_holds_the_same_camera() -> None:
    camera = Camera(100, 50, 7, 9)
    assert camera.project(np.array([[2, 4, 10], [-1, 0, 1]])).tolist() == [[27, 29], [-93, 9]]
    assert camera.matrix().tolist() == [[100, 0, 7], [0, 50, 9], [0, 0, 1]]
    assert Camera.from_matrix(camera.matrix()) == camera
