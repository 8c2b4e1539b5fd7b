"""Drawn figures: what is drawn is what the parameters, the pose service and the captions say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from services.pose.align import landmarks, solve_camera
from services.pose.draw import draw_clip
from services.pose.fit import halve
from services.pose.keypoints import openpose
from services.pose.quirks import PoseQuirks
from services.pose.skeleton import Camera
from training.figures.cameras import as_camera, fitted_cameras, plain_cameras, projected
from training.figures.characters import Length, Part, sample_characters
from training.figures.clips import STROKES, Stories, halved, people, sample_batch, sample_stories
from training.figures.keypoints import boxes, whole_body
from training.figures.motion import CHANNELS, CLASS_NAMES, HELD_OUT_CLASS, Motions, joints, sample_motions
from training.figures.picture import outlines, paint, paint_whole, render
from training.figures.scenes import sample_scenes
from training.tiny_tokenizer import SPECIAL_TOKENS, write_tokenizer

SIDE = 64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def still(**degrees: float) -> Motions:
    """One frame of a figure that hangs its limbs, but for some angles."""
    angles = torch.zeros(1, 1, len(CHANNELS) - 3)
    for name, value in degrees.items():
        angles[..., CHANNELS.index(name)] = np.radians(value)
    return Motions(angles, torch.zeros(1, 1, 3), torch.tensor([0.8]), torch.tensor([0]))


def posed(**degrees: float) -> Tensor:
    """Joints [24, 3] of one such figure."""
    characters = sample_characters(1, seeded(), held_out=False, motley=0.0)
    return joints(characters, still(**degrees))[0, 0]


def stories(count: int = 4, frames: int = 2, seed: int = 1, **shares: float) -> Stories:
    return sample_stories(count, seeded(seed), frames=frames, held_out=True, **shares)


def test_one_seed_gives_one_batch_and_another_seed_another() -> None:
    def drawn(seed: int) -> Tensor:
        return sample_batch(2, seeded(seed), frames=1, height=32, width=32, held_out=False).target

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_no_pair_of_clothes_and_no_class_of_motion_is_in_both_splits() -> None:
    for motley in (0.0, 1.0):
        pairs = []
        for held_out in (False, True):
            drawn = sample_characters(500, seeded(), held_out=held_out, motley=motley)
            pairs.append(set(zip(drawn.shirt.tolist(), drawn.trousers.tolist(), strict=True)))
        assert not pairs[0] & pairs[1]
    held_out_class = CLASS_NAMES.index(HELD_OUT_CLASS)
    assert held_out_class not in sample_motions(300, 1, seeded(), held_out=False).kind
    assert held_out_class in sample_motions(300, 1, seeded(), held_out=True).kind


def test_every_part_of_a_motley_character_has_a_colour_of_its_own() -> None:
    colours = sample_characters(5, seeded(), held_out=False, motley=1.0).colours[:, :15]
    distances = torch.cdist(colours, colours) + 9 * torch.eye(15)
    assert distances.min() > 0.2


def test_bones_keep_their_lengths_in_every_motion() -> None:
    made = stories(6, frames=5)
    moved, lengths = made.driving_joints(), made.drivers.lengths
    for start, end, bone in (
        (4, 7, Length.SHIN),
        (2, 5, Length.THIGH),
        (16, 18, Length.UPPER_ARM),
        (19, 21, Length.FOREARM),
        (21, 23, Length.HAND),
        (8, 11, Length.FOOT),
    ):
        length = (moved[:, :, end] - moved[:, :, start]).norm(dim=-1)
        assert torch.allclose(length, lengths[:, None, bone].expand_as(length), rtol=0.02)


def test_a_figure_that_faces_the_camera_has_its_left_hand_on_the_right_of_the_picture() -> None:
    pose = posed(left_raise=60)
    left_hand, right_hand, head, pelvis, ankle = pose[[22, 23, 15, 0, 7]]
    assert left_hand[0] > right_hand[0]
    assert head[1] < pelvis[1] < ankle[1]
    assert left_hand[1] < right_hand[1]


@pytest.mark.parametrize(
    ("angle", "joint", "axis", "sign"),
    [
        ("yaw", 16, 2, 1),  # the front turns to its own left: the left shoulder goes away from the camera
        ("roll", 15, 0, 1),
        ("bow", 15, 2, -1),
        ("left_reach", 22, 2, -1),
        ("left_elbow", 22, 2, -1),
        ("right_step", 5, 2, -1),
        ("right_knee", 8, 2, 1),
        ("left_spread", 7, 0, 1),
        ("right_spread", 8, 0, -1),
    ],
)
def test_an_angle_moves_its_joint_to_the_side_it_says(angle: str, joint: int, axis: int, sign: int) -> None:
    # the place of the figure depends on its pose; the pelvis moves with it
    moved, straight = (pose[joint] - pose[0] for pose in (posed(**{angle: 30.0}), posed()))
    assert sign * float(moved[axis] - straight[axis]) > 50


def test_the_lower_ankle_stands_on_one_floor_unless_it_hops() -> None:
    made = stories(5, frames=4)
    motions = replace(made.motions, places=made.motions.places * torch.tensor([1.0, 1.0, 0.0]))
    lowest = joints(made.drivers, motions)[:, :, [7, 8], 1].amax(-1)
    assert torch.allclose(lowest, lowest[:, :1].expand_as(lowest), atol=0.1)


def test_a_hop_lifts_the_feet_off_the_floor() -> None:
    made = stories(2, frames=1)
    heights = []
    for hop in (0.0, 0.1):
        places = made.motions.places.clone()
        places[..., 2] = hop
        heights.append(joints(made.drivers, replace(made.motions, places=places))[:, :, [7, 8], 1].amax(-1))
    side = made.drivers.lengths[:, Length.HEIGHT] / made.motions.size
    assert torch.allclose(heights[0] - heights[1], 0.1 * side[:, None], rtol=1e-3)


def test_figures_are_large() -> None:
    made = stories(30, frames=1, fitted=0.0)
    found = boxes(made.characters, made.reference_joints(), 128, 128)[:, 0]
    heights = (found[:, 3] - found[:, 1]) / 128
    assert 0.72 < heights.mean() < 0.88
    assert (found[:, 1] > 0).all()


def test_fitted_cameras_are_those_of_the_pose_service() -> None:
    made = stories(12, frames=1, fitted=1.0)
    driving, standing = made.driving_joints()[:, 0], made.reference_joints()
    references = people(made.characters, standing, SIDE, SIDE)
    plain = Camera.of(SIDE, SIDE)
    for index, row in enumerate(fitted_cameras(driving, standing[:, 0])):
        marks = landmarks(driving[index].numpy(), references[index][0], SIDE, SIDE)
        expected = solve_camera(marks, SIDE, SIDE).apply(plain)
        found = as_camera(row, SIDE)
        assert np.allclose(
            [found.fx, found.fy, found.cx, found.cy], [expected.fx, expected.fy, expected.cx, expected.cy]
        )
    assert torch.equal(made.cameras, fitted_cameras(driving, standing[:, 0]))


def test_pose_frames_are_what_the_pose_service_draws() -> None:
    made = stories(3, frames=2, fitted=0.5, seed=2)
    drawn = made.draw_pose(SIDE, SIDE).numpy()
    assert drawn.reshape(3, -1).max(1).min() > 100
    found = people(made.shown, made.joints(), SIDE, SIDE, made.cameras)
    for index, pose in enumerate(made.joints()[:, :, None].numpy()):
        camera = as_camera(made.cameras[index], SIDE)
        [frames] = draw_clip(pose, found[index], camera, SIDE, SIDE, PoseQuirks(), STROKES)
        assert np.array_equal(drawn[index], frames.numpy())
        assert np.array_equal(halved(frames).numpy(), np.stack([halve(frame) for frame in frames.numpy()]))


def test_pose_frames_lie_on_the_figure() -> None:
    made = stories(4, frames=1, fitted=1.0)
    there = made.draw_pose(SIDE, SIDE, overlay=False)[:, 0].amax(-1) > 60
    empty = render(made.shown, made.joints() + torch.tensor([1e6, 0, 0]), made.scenes, height=SIDE, width=SIDE)
    changed = (made.draw_target(SIDE, SIDE).int() - empty.int()).abs().amax(-1)[:, 0] > 8
    assert (there & changed).sum() / there.sum() > 0.85


def test_a_nearer_limb_covers_a_farther_one() -> None:
    """A hand held in front of the chest is seen there, one behind it is not."""
    characters = sample_characters(1, seeded(5), held_out=False, motley=1.0)
    scenes = sample_scenes(1, seeded(), effects=0.0)
    pose = joints(characters, still())
    seen = []
    for depth in (-250.0, 250.0):
        placed = pose.clone()
        placed[:, :, [20, 22]] = pose[:, :, 9:10] + torch.tensor([0.0, 0.0, depth])
        place = projected(placed[:, 0, 22:23], plain_cameras(1) * 128)[0, 0].round().long()
        picture = render(characters, placed, scenes, height=128, width=128)[0, 0] / 255
        seen.append((picture[place[1], place[0]] - characters.colours[0, Part.LEFT_HAND]).abs().max() < 0.2)
    assert seen == [True, False]


def test_both_ways_of_painting_paint_the_same() -> None:
    made = stories(3, frames=2)
    each = torch.arange(3).repeat_interleave(2)
    flat, cameras = made.joints().flatten(0, 1), made.cameras[each] * SIDE
    capsules = outlines(made.shown.pick(each), flat, made.scenes.hat[each], cameras)
    canvas = torch.rand(6, SIDE, SIDE, 3, generator=seeded())
    assert torch.allclose(paint(canvas, capsules), paint_whole(canvas, capsules), atol=1e-6)


def test_effects_are_there_only_when_asked_for() -> None:
    made = stories(3, frames=2, effects=0.0)

    def drawn(**effects: Tensor) -> Tensor:
        scenes = replace(made.scenes, **effects)
        return render(made.shown, made.joints(), scenes, height=SIDE, width=SIDE).float()

    plain, yes = drawn(), torch.ones(3, dtype=torch.bool)
    assert drawn(night=yes).mean() < 0.75 * plain.mean()
    snow = drawn(snow=yes) - plain
    # flakes fall
    assert 0.01 < (snow.abs().amax(-1) > 20).float().mean() < 0.12
    assert not torch.equal(snow[:, 0], snow[:, 1])
    hat = (drawn(hat=yes.long()) - plain).abs().amax(-1) > 20
    rows = hat[:, 0].nonzero()[:, 1]
    assert len(rows) > 20
    necks = projected(made.joints()[:, 0, 12:13], made.cameras * SIDE)[..., 1].max()
    assert rows.max() < necks


def test_a_caption_names_each_effect_that_is_shown() -> None:
    made = stories(20, effects=0.5)
    for said, snow, night, hat in zip(
        made.captions(), made.scenes.snow, made.scenes.night, made.scenes.hat, strict=True
    ):
        assert ("snow is falling" in said, "at night" in said, " hat" in said) == (bool(snow), bool(night), bool(hat))


def test_the_tiny_tokenizer_knows_every_word_of_the_captions(tmp_path: object) -> None:
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path, 1024)  # type: ignore[arg-type]
    tokenizer = Tokenizer.from_file(f"{tmp_path}/tokenizer.json")
    for said in set(stories(60, effects=0.5).captions()):
        words = [token for token in tokenizer.encode(said).tokens if token not in SPECIAL_TOKENS]
        assert len(words) <= len(said.replace(",", " ,").split())


def test_keypoints_of_the_body_are_the_joints_seen_by_the_camera() -> None:
    made = stories(2, frames=1, fitted=1.0)
    points, visible = whole_body(made.shown, made.joints(), SIDE, SIDE, made.cameras)
    seen = projected(made.joints()[:, 0], made.cameras * SIDE)
    # OpenPose's right elbow, left wrist, right hip, left ankle
    ordered = openpose(points[:, 0].numpy(), visible[:, 0].numpy().astype(float))[..., :2]
    for place, joint in ((3, 19), (7, 20), (8, 2), (13, 7)):
        assert np.allclose(ordered[:, place], seen[:, joint], atol=1e-3)


def test_a_face_is_seen_from_the_front_and_not_from_behind() -> None:
    characters = sample_characters(1, seeded(), held_out=False, motley=0.0)
    for yaw, share in ((0, 1.0), (180, 0.0)):
        points, visible = whole_body(characters, joints(characters, still(yaw=yaw)), SIDE, SIDE)
        assert visible[0, 0, 40:91].float().mean() == share
        nose, left_eye, right_eye = points[0, 0, :3]
        assert nose[1] > left_eye[1]
        assert (left_eye[0] > right_eye[0]) == (yaw == 0)


def test_eyes_are_drawn_on_the_side_that_the_figure_faces() -> None:
    characters = sample_characters(1, seeded(5), held_out=False, motley=1.0)
    scenes = sample_scenes(1, seeded(), effects=0.0)
    darkest = []
    for yaw in (0, 180):
        pose = joints(characters, still(yaw=yaw))
        points, _ = whole_body(characters, pose, 128, 128)
        picture = render(characters, pose, scenes, height=128, width=128)[0, 0]
        # pupils are nearly black, and no part of this character is
        darkest.append([int(picture[y, x].max()) for x, y in points[0, 0, 1:3].round().long().tolist()])
    assert max(darkest[0]) < 60 < min(darkest[1])


def test_boxes_are_around_all_that_is_drawn_of_a_figure() -> None:
    made = stories(4, frames=1, effects=0.0, seed=6)
    empty = render(made.shown, made.joints() + torch.tensor([1e6, 0, 0]), made.scenes, height=SIDE, width=SIDE)
    figures = (made.draw_target(SIDE, SIDE).int() - empty.int()).abs().amax(-1)[:, 0] > 60
    found = boxes(made.shown, made.joints(), SIDE, SIDE, made.cameras)[:, 0]
    for figure, box in zip(figures, found, strict=True):
        y, x = figure.nonzero().unbind(1)
        edges = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert (edges - box).abs().max() < 5
