"""The estimator around its network: batches, cameras, tones, and the choice of one person per frame."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.pose.nlf.config import QUIRKS, NlfQuirks
from services.pose.nlf.crops import default_intrinsics
from services.pose.nlf.detector import PersonDetector
from services.pose.nlf.model import NUM_JOINTS
from tests.services.pose.nlf.tiny import CONFIG, NUM_POINTS, KnownAnswers, crop_model, estimator, random_frames

BOXES = [torch.tensor([[10.0, 5, 40, 50], [30, 10, 45, 45]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 80, 60]])]
INSIDE = [torch.tensor([[20.0, 15, 30, 30]])]


class Boxes(PersonDetector):
    """Finds the same boxes in every frame that is not black; counts the frames of each call."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(lambda _: rows)
        self.rows = rows
        self.calls: list[int] = []

    def detect(self, pictures: Tensor) -> list[Tensor]:
        self.calls.append(len(pictures))
        return [self.rows if picture.amax() > 0 else self.rows[:0] for picture in pictures]


def crop_of(level: int, quirks: NlfQuirks) -> float:
    """What the network is given for a frame of one grey level, 0 to 1."""
    model = KnownAnswers()
    frames = torch.full((1, 60, 80, 3), level, dtype=torch.uint8)
    estimator(model, quirks=quirks).estimate(frames, INSIDE)
    crop = model.crops[0][0].float()
    torch.testing.assert_close(crop.amin(), crop.amax(), atol=1e-4, rtol=0)
    return crop.amax().item()


def test_point_straight_ahead_of_the_crop_is_in_the_middle_of_the_box() -> None:
    poses = estimator(KnownAnswers()).poses(random_frames(3), BOXES)
    boxes = torch.cat(BOXES)
    middles = boxes[:, None, :2] + boxes[:, None, 2:] / 2
    torch.testing.assert_close(poses.pixels, middles.expand(3, NUM_POINTS, 2), atol=1e-3, rtol=0)
    rays = torch.cat([middles, torch.ones(3, 1, 1)], dim=-1) @ torch.linalg.inv(default_intrinsics(60, 80)).T
    expected = 2000 * rays / rays.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(poses.millimetres, expected.expand(3, NUM_POINTS, 3), atol=1e-2, rtol=0)


def test_cameras_may_be_given_once_or_per_frame() -> None:
    model, frames = estimator(KnownAnswers()), random_frames(3)
    narrow = torch.tensor([[100.0, 0, 35], [0, 110, 25], [0, 0, 1]])
    once = model.estimate(frames, BOXES, narrow)
    assert torch.equal(once, model.estimate(frames, BOXES, narrow.expand(3, 3, 3)))
    assert not torch.allclose(once, model.estimate(frames, BOXES))
    mixed = torch.stack([narrow, narrow, default_intrinsics(60, 80)])
    assert torch.equal(model.estimate(frames, BOXES, mixed)[:2], once[:2])
    assert torch.equal(model.estimate(frames, BOXES, mixed)[2:], model.estimate(frames, BOXES)[2:])


@pytest.mark.parametrize("preset", ["default", "official"])
def test_crops_taken_a_few_at_a_time_change_nothing(preset: str) -> None:
    frames = random_frames(3)
    whole, model = KnownAnswers(), KnownAnswers()
    expected = estimator(whole, quirks=QUIRKS[preset], batch_size=2).poses(frames, BOXES)
    few = estimator(model, quirks=QUIRKS[preset], batch_size=2, crops_at_once=1)
    found = few.poses(frames, BOXES)
    assert [len(crops) for crops in model.crops] == [1, 1, 1]
    assert torch.equal(torch.cat(model.crops), torch.cat(whole.crops))  # negatives are those of the same batches
    assert torch.equal(found.millimetres, expected.millimetres)


def test_joints_are_the_last_24_points() -> None:
    model = estimator(crop_model())
    poses = model.poses(random_frames(3), BOXES)
    joints = model.estimate(random_frames(3), BOXES)
    assert joints.shape == (3, NUM_JOINTS, 3)
    assert torch.equal(joints, poses.millimetres[:, NUM_POINTS - NUM_JOINTS :])


def test_batches_are_bounded_and_do_not_change_the_result() -> None:
    frames = random_frames(3)
    whole, model = KnownAnswers(), KnownAnswers()
    expected = estimator(whole).poses(frames, BOXES)
    found = estimator(model, batch_size=2).poses(frames, BOXES)
    assert [len(crops) for crops in model.crops] == [2, 1]
    assert torch.equal(torch.cat(model.crops), torch.cat(whole.crops))
    assert torch.equal(found.uncertainties, expected.uncertainties)


def test_each_crop_is_cut_from_its_own_frame() -> None:
    frames = torch.stack([torch.full((60, 80, 3), level, dtype=torch.uint8) for level in (50, 100, 200)])
    model = KnownAnswers()
    estimator(model).estimate(frames, [INSIDE[0], INSIDE[0][:0], INSIDE[0]])
    dark, bright = model.crops[0].amax(dim=(1, 2, 3)).tolist()
    assert dark == pytest.approx((50 / 255) ** (2.2 * 0.8), abs=1e-3)
    assert bright == pytest.approx((200 / 255) ** (2.2 * 0.8), abs=1e-3)


def test_nobody_gives_no_rows() -> None:
    model = KnownAnswers()
    poses = estimator(model).poses(random_frames(2), [torch.zeros(0, 4), torch.zeros(0, 4)])
    assert poses.millimetres.shape == (0, NUM_POINTS, 3)
    assert poses.pixels.shape == (0, NUM_POINTS, 2)
    assert poses.uncertainties.shape == (0, NUM_POINTS)
    assert model.crops == []


@pytest.mark.parametrize(("white", "outside"), [(True, 1.0), (False, 0.0)])
def test_outside_of_the_picture_is_white_or_black(white: bool, outside: float) -> None:
    model = KnownAnswers()
    frames = torch.full((1, 60, 80, 3), 128, dtype=torch.uint8)
    beside = [torch.tensor([[-50.0, 10, 60, 40]])]
    estimator(model, config=replace(CONFIG, pad_white_pixels=white)).estimate(frames, beside)
    crop = model.crops[0][0]
    assert (crop[:, 20:40, :40] == outside).all()
    assert crop[0, 32, 62].item() == pytest.approx((128 / 255) ** 1.76, abs=1e-3)


@pytest.mark.parametrize(("twice", "power"), [(True, 2.2 * 0.8), (False, 0.8)])
def test_linearising_once_or_twice_is_a_setting(twice: bool, power: float) -> None:
    for level in (90, 160, 255):
        assert crop_of(level, NlfQuirks(linearise_twice=twice)) == pytest.approx((level / 255) ** power, abs=1e-4)


def test_half_precision_blackens_shadows() -> None:
    """The levels that the reference sheet states for the released programs' order of operations."""
    released = QUIRKS["wan2gp"]
    assert [crop_of(level, released) for level in (1, 30, 45)] == [0, 0, 0]
    assert [round(crop_of(level, released), 4) for level in range(46, 62, 3)] == [0.0626] * 4 + [0.0805] * 2
    for level in (85, 150, 250):
        assert crop_of(level, released) == pytest.approx((level / 255) ** 1.76, abs=0.003)
    assert crop_of(30, NlfQuirks()) == pytest.approx((30 / 255) ** 1.76, abs=1e-3)


def test_released_programs_give_negatives_in_every_second_batch() -> None:
    frames = torch.full((3, 60, 80, 3), 60, dtype=torch.uint8)
    bright = {}
    for name, quirks in (("released", QUIRKS["official"]), ("default", QUIRKS["default"])):
        model = KnownAnswers()
        estimator(model, quirks=quirks, batch_size=1).estimate(frames, INSIDE * 3)
        bright[name] = [crops.mean().item() > 0.5 for crops in model.crops]
    assert bright == {"released": [False, True, False], "default": [False, False, False]}


def test_best_person_of_each_frame_is_found_and_zeros_where_nobody_is() -> None:
    frames = torch.full((3, 60, 80, 3), 60, dtype=torch.uint8)
    frames[1] = 0
    # one is plausible and better than the other, which looks at a brighter, hence more uncertain, part
    frames[:, :, 40:] = frames[:, :, 40:] * 2
    rows = torch.tensor([[45.0, 20, 20, 20, 0.9], [10, 20, 20, 20, 0.8]])
    model = KnownAnswers()
    wide = _Spread(model)
    joints = estimator(wide).find_joints(frames, Boxes(rows))
    expected = estimator(_Spread(KnownAnswers())).estimate(frames[:1], [rows[1:]])[0]
    assert joints.shape == (3, NUM_JOINTS, 3)
    torch.testing.assert_close(joints[0], expected)
    torch.testing.assert_close(joints[2], expected)
    assert not joints[1].any()


def test_somebody_whose_pose_is_not_plausible_is_nobody() -> None:
    # the brighter, the more uncertain
    frames, rows = torch.full((2, 60, 80, 3), 60, dtype=torch.uint8), torch.tensor([[10.0, 20, 20, 20, 0.8]])
    frames[1] = 255
    joints = estimator(_Spread(KnownAnswers())).find_joints(frames, Boxes(rows))
    assert joints[0].any()
    assert not joints[1].any()


class _Spread(KnownAnswers):
    """Points over the whole crop instead of in its middle, so that they cover the box."""

    def __init__(self, model: KnownAnswers) -> None:
        super().__init__()
        self.known = model

    def forward(self, crops: Tensor, intrinsics: Tensor, weights: object) -> tuple[Tensor, Tensor]:
        ahead, uncertainties = self.known(crops, intrinsics, weights)
        pixels = torch.rand(ahead.shape[1], 3, generator=torch.Generator().manual_seed(0)) * CONFIG.proc_side
        pixels[:, 2] = 1
        return 2000 * pixels @ torch.linalg.inv(intrinsics).mT, uncertainties


def test_frames_are_searched_in_bounded_portions_with_their_own_cameras() -> None:
    frames, rows = random_frames(5), torch.tensor([[20.0, 15, 30, 30, 0.9]])
    cameras = default_intrinsics(60, 80).repeat(5, 1, 1)
    cameras[4, 0, 2] += 15
    detector = Boxes(rows)
    dim = (frames * 0.3).to(torch.uint8)
    joints = estimator(_Spread(KnownAnswers()), batch_size=2).find_joints(dim, detector, cameras)
    assert detector.calls == [2, 2, 1]
    assert joints.any(dim=2).all()
    torch.testing.assert_close(joints[3], joints[0])
    assert (joints[4] - joints[0]).abs().max() > 50


def test_network_in_bfloat16_gives_float32_joints() -> None:
    model = crop_model()
    model.backbone.bfloat16()
    model.heatmap_head.layer.bfloat16()
    assert estimator(model).estimate(random_frames(1), INSIDE).dtype == torch.float32


def test_nothing_of_one_call_is_left_for_the_next() -> None:
    model, frames = estimator(crop_model()), random_frames(3)
    first = model.estimate(frames, BOXES)
    model.estimate(random_frames(2, seed=9), [INSIDE[0], INSIDE[0]])
    assert torch.equal(model.estimate(frames, BOXES), first)
    assert torch.equal(frames, random_frames(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quirks", QUIRKS.values(), ids=QUIRKS)
def test_gpu_sees_the_same_crops_and_answers_the_same(quirks: NlfQuirks) -> None:
    frames, on_cpu, on_gpu = random_frames(3), KnownAnswers(), KnownAnswers()
    on_gpu.heatmap_head.cuda()
    on_gpu.device = torch.device("cuda")
    expected, found = (estimator(model, quirks=quirks).poses(frames, BOXES) for model in (on_cpu, on_gpu))
    difference = (on_gpu.crops[0].cpu().float() - on_cpu.crops[0].float()).abs()
    # near black one step of half precision is large
    assert difference.quantile(0.99) < (0.02 if quirks.half_precision_crops else 1e-3)
    torch.testing.assert_close(found.pixels.cpu(), expected.pixels, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.millimetres.cpu(), expected.millimetres, atol=0.1, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_network_runs_on_the_gpu() -> None:
    model = crop_model().cuda()
    model.backbone.half()
    model.heatmap_head.layer.half()
    joints = estimator(model).estimate(random_frames(3), BOXES)
    assert joints.device.type == "cuda"
    assert joints.isfinite().all()
