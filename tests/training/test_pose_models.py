"""Training of the tiny pose models: pictures and what is true of them, targets, losses, the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from services.pose.detect import YoloxDetector
from services.pose.keypoints import (
    WholeBodyEstimator,
    crop,
    crop_transforms,
    crop_windows,
    decode_simcc,
    normalised,
    to_frame,
)
from services.pose.nlf.crops import default_intrinsics
from services.pose.nlf.detector import decode
from services.pose.nlf.head import RelativePoints
from services.pose.onnx import OnnxNetwork
from services.pose.people import only_inside as service_only_inside
from services.pose.skeleton import Camera
from training.figures.characters import sample_characters
from training.figures.motion import joints, sample_motions
from training.pose_models import detector, drawing, keypoints
from training.pose_models import joints as joints_3d
from training.pose_models.drawing import draw, elsewhere
from training.pose_models.loop import Schedule, Task, train
from training.pose_models.networks import DetectorNetwork, KeypointNetwork
from training.pose_models.pictures import Pictures, half_resolution_colour, only_inside, softened, spoilt, window

SIDE = 128
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return draw(8, 3, CPU, held_out=False)


@pytest.fixture(scope="module")
def people(pictures: Pictures) -> Pictures:
    return pictures[pictures.shown]


def some_boxes() -> Tensor:
    return torch.tensor([[30.5, 20.0, 90.0, 110.0], [60.0, 70.25, 82.0, 121.0]])


def test_a_seed_gives_the_same_pictures_and_another_seed_others(pictures: Pictures) -> None:
    again, other = draw(8, 3, CPU, held_out=False), draw(8, 4, CPU, held_out=False)
    assert torch.equal(again.frames, pictures.frames)
    assert torch.equal(again.joints, pictures.joints)
    assert not torch.equal(other.joints, pictures.joints)


def test_keypoints_and_joints_lie_in_the_boxes_of_their_people(people: Pictures) -> None:
    focal = Camera.of(SIDE, SIDE).fx
    projected = focal * people.joints[..., :2] / people.joints[..., 2:] + SIDE / 2
    for points, seen in ((projected, None), (people.points, people.visible)):
        low, high = people.boxes[:, None, :2] - 3, people.boxes[:, None, 2:] + 3
        inside = ((points >= low) & (points <= high)).all(dim=-1)
        assert (inside if seen is None else inside[seen]).float().mean() > 0.97


def test_people_moved_elsewhere_appear_in_all_sizes_and_stay_in_the_picture() -> None:
    characters = sample_characters(200, seeded(), held_out=False, motley=0.0)
    posed = joints(characters, sample_motions(200, 1, seeded(), held_out=False))
    placed, shown = elsewhere(posed, SIDE, seeded())
    focal = Camera.of(SIDE, SIDE).fx
    places, before = (focal * body[..., :2] / body[..., 2:] for body in (placed[shown], posed[shown]))
    sizes = (places[..., 1].amax(-1) - places[..., 1].amin(-1)) / (before[..., 1].amax(-1) - before[..., 1].amin(-1))
    assert sizes.min() < 0.5
    assert sizes.max() > 1.05
    assert (places.abs() < SIDE / 2).all(dim=-1).float().mean() > 0.95
    assert 0 < (~shown).sum() < 30
    hidden = focal * placed[~shown][..., 0] / placed[~shown][..., 2]
    assert (hidden.abs() > SIDE).all()


def test_black_surroundings_are_those_of_the_pose_service() -> None:
    frame = np.random.default_rng(0).integers(1, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    for box in some_boxes():
        expected = service_only_inside(frame, (box / SIDE).tolist())
        levels = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
        got = only_inside(levels, box[None])[0].permute(1, 2, 0).numpy()
        assert np.array_equal(got, expected)


def test_cuts_are_those_of_the_pose_service() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    boxes = some_boxes()
    expected = crop_transforms(*crop_windows(boxes.numpy(), 96 / 128), 96)
    transforms = keypoints.cut_transforms(boxes, 128, 96)
    np.testing.assert_allclose(transforms.numpy(), expected, rtol=1e-5, atol=1e-4)
    levels = torch.from_numpy(frame).permute(2, 0, 1)[None].float().repeat(2, 1, 1, 1)
    cuts = window(levels, transforms, 128, 96).permute(0, 2, 3, 1).numpy()
    for cut, transform in zip(cuts, expected, strict=True):
        inside = crop(frame, transform, 128, 96).astype(np.float32)
        # within rounding, but for the frame's border, where one fades to black within a pixel and the other does not
        assert (np.abs(cut - inside) < 1.1).mean() > 0.97


def test_the_keypoint_network_sees_what_it_will_see_in_the_pose_service(
    people: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keypoints, "spoilt", lambda levels, generator: levels)
    monkeypatch.setattr(keypoints, "boxes_near", lambda boxes, generator: boxes)
    seen, places = keypoints.cuts(people, 128, 96, seeded())
    transforms = crop_transforms(*crop_windows(people.boxes.numpy(), 96 / 128), 96)
    for row, frame, transform in zip(seen.numpy(), people.frames.numpy(), transforms, strict=True):
        expected = normalised(crop(frame, transform, 128, 96)[..., ::-1]).transpose(2, 0, 1)
        assert (np.abs(row - expected) < 0.03).mean() > 0.97
    np.testing.assert_allclose(to_frame(places.numpy(), transforms), people.points, atol=0.01)


def test_colour_is_blurred_more_than_brightness() -> None:
    levels = torch.rand(1, 3, 16, 16, generator=seeded()) * 255
    blurred = half_resolution_colour(levels)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close((blurred * luma).sum(1), (levels * luma).sum(1), rtol=1e-3, atol=0.1)
    assert (blurred - levels).abs().mean() > 10
    grey = levels[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(half_resolution_colour(grey), grey, rtol=1e-3, atol=0.1)


def test_softening_moves_nothing() -> None:
    dot = torch.zeros(1, 3, 9, 9)
    dot[..., 4, 4] = 16
    soft = softened(dot)[0, 0]
    assert soft[3:6, 3:6].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert soft.sum() == 16


def test_spoilt_pictures_are_whole_levels_near_the_original(pictures: Pictures) -> None:
    levels = pictures.frames.permute(0, 3, 1, 2).float()
    spoiled = spoilt(levels, seeded())
    assert torch.equal(spoiled, spoiled.round())
    assert spoiled.min() >= 0
    assert spoiled.max() <= 255
    assert 0 < (spoiled - levels).abs().mean() < 40


def test_the_detector_is_shown_boxes_around_what_differs_from_the_surroundings(pictures: Pictures) -> None:
    # white people without scenery, so that they can be measured
    white = torch.zeros_like(pictures.frames)
    for row, box, here in zip(white, pictures.boxes.round().int().tolist(), pictures.shown.tolist(), strict=True):
        if here:
            row[box[1] : box[3], box[0] : box[2]] = 255
    shown = pictures.shown.clone()
    shown[0], white[0] = False, 0
    drawn = replace(pictures, frames=white, boxes=pictures.boxes.round(), shown=shown)
    batch = detector.shown(drawn, SIDE, 64, seeded())
    assert batch.real[:, 1].any()
    assert (~batch.real[:, 0]).any()
    compared = 0
    for levels, boxes, real in zip(batch.levels, batch.boxes, batch.real, strict=True):
        if real.tolist() != [True, False] or (levels.mean(0) > 190).sum() == 0:
            continue
        rows, columns = torch.nonzero(levels.mean(0) > 190, as_tuple=True)
        measured = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (measured - boxes[0]).abs().max() <= 1.6
        compared += 1
    assert compared > 20


def test_cells_near_a_persons_middle_are_asked_for_them_on_the_grids_of_their_size() -> None:
    boxes = torch.tensor([[[50.0, 20, 90, 120], [11.0, 10, 31, 40]]])
    positive, wanted = detector.assigned(boxes, torch.tensor([[True, True]]), SIDE)
    cells, strides = detector.grids(SIDE, CPU)
    middles = (cells + 0.5) * strides
    for box, sizes in zip(boxes[0], ((32,), (8,)), strict=True):
        asked = positive[0] & (wanted[0] == box).all(dim=-1)
        assert set(strides[asked].flatten().tolist()) == set(sizes)
        assert asked.sum() == 4
        middle = (box[:2] + box[2:]) / 2
        assert ((middles[asked] - middle).abs() < strides[asked]).all()
    nobody, _ = detector.assigned(boxes, torch.tensor([[False, False]]), SIDE)
    assert not nobody.any()


def test_boxes_are_decoded_as_the_pose_service_does() -> None:
    raw = torch.randn(1, 336, 85, generator=seeded())
    corners, _ = decode(raw[0], SIDE)
    torch.testing.assert_close(detector.decoded(raw, SIDE)[0], corners)


def test_overlap_is_one_for_the_same_box_and_tells_distance_when_apart() -> None:
    box = torch.tensor([0.0, 0, 10, 10])
    plain, generalised = detector.overlap(box, torch.stack([box, box + 5, box + 20, box + 40]))
    torch.testing.assert_close(plain, torch.tensor([1, 25 / 175, 0, 0]))
    assert generalised[0] == 1
    assert 0 > generalised[2] > generalised[3]


def perfect_logits(boxes: Tensor, real: Tensor) -> Tensor:
    positive, wanted = detector.assigned(boxes, real, SIDE)
    cells, strides = detector.grids(SIDE, CPU)
    logits = torch.full((len(boxes), len(cells), 85), -12.0)
    middle, size = (wanted[..., :2] + wanted[..., 2:]) / 2, wanted[..., 2:] - wanted[..., :2]
    logits[..., :2], logits[..., 2:4] = middle / strides - cells, (size.clamp(min=1) / strides).log()
    logits[..., 4:6] = torch.where(positive[..., None], 12.0, -12.0)
    return logits


def test_the_detectors_loss_is_least_for_the_truth() -> None:
    boxes, real = torch.tensor([[[50.0, 20, 90, 120], [10.0, 10, 30, 40]]]), torch.tensor([[True, False]])
    best = perfect_logits(boxes, real)
    least = detector.loss(best, boxes, real, SIDE)
    assert least < 0.05
    for change in (0, 2, 4, 5, 60):
        worse = best.clone()
        worse[..., change] += 3.0 if change < 4 else -24.0 * worse[..., change].sign()
        assert detector.loss(worse, boxes, real, SIDE) > least + 0.5


def test_the_keypoints_loss_is_least_where_the_service_reads_the_truth() -> None:
    places = torch.tensor([[[20.5, 100.0], [70.0, 31.5]]])
    visible = torch.tensor([[True, False]])

    def loss(shift: float, seen: float) -> Tensor:
        logits = []
        for axis, size in ((0, 96), (1, 128)):
            bins = torch.arange(size * 2)
            logits.append(-((bins - 2 * (places[..., axis, None] + shift)) ** 2) / 8)
        return keypoints.loss((logits[0], logits[1], torch.tensor([[seen, -seen]])), places, visible, 128, 96)

    least = loss(0.0, 6.0)
    assert all(loss(shift, 6.0) > least + 0.01 for shift in (-1, 1))
    assert loss(0.0, -6.0) > least + 1
    bins = [
        torch.exp(-((torch.arange(size * 2) - 2 * places[..., axis, None]) ** 2) / 8)
        for axis, size in ((0, 96), (1, 128))
    ]
    found, scores = decode_simcc(bins[0].numpy(), bins[1].numpy(), 2.0)
    np.testing.assert_array_equal(found, places)
    assert scores.min() == 1


def test_a_point_that_nobody_sees_is_learnt_with_a_quarter_of_the_weight() -> None:
    logits = torch.zeros(1, 2, 192), torch.zeros(1, 2, 256), torch.tensor([[9.0, -9.0]])
    logits[0][0, 1, 40] = 5.0  # the second point is believed to be at 20
    places = torch.tensor([[[20.0, 50.0], [20.0, 50.0]]])
    right, wrong = (
        keypoints.loss(logits, places + torch.tensor([[[0.0, 0], [x, 0]]]), torch.tensor([[True, False]]), 128, 96)
        for x in (0.0, 30.0)
    )
    both = keypoints.loss(logits, places + torch.tensor([[[0.0, 0], [30.0, 0]]]), torch.tensor([[True, True]]), 128, 96)
    seen = keypoints.loss(logits, places, torch.tensor([[True, True]]), 128, 96)
    torch.testing.assert_close((wrong - right) / (both - seen), torch.tensor(0.25 / 1.25 * 2), rtol=1e-3, atol=1e-3)


def test_places_outside_the_cut_are_not_learnt_but_called_unseen() -> None:
    logits = torch.zeros(1, 1, 192), torch.zeros(1, 1, 256), torch.tensor([[-9.0]])
    assert keypoints.loss(logits, torch.tensor([[[-5.0, 50.0]]]), torch.tensor([[True]]), 128, 96) < 0.001
    assert keypoints.loss(logits, torch.tensor([[[5.0, 50.0]]]), torch.tensor([[True]]), 128, 96) > 5


def test_points_of_a_body_end_with_its_joints_and_turn_and_scale_with_it() -> None:
    body = torch.randn(2, 24, 3, generator=seeded()) * 300
    points = joints_3d.body_points(body)
    assert torch.equal(points[:, -24:], body)
    shift = torch.tensor([10.0, -20, 3000])
    torch.testing.assert_close(joints_3d.body_points(body + shift), points + shift)
    turn = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    torch.testing.assert_close(joints_3d.body_points(body @ turn), points @ turn, rtol=1e-3, atol=1e-2)


def test_the_canonical_body_is_a_person_with_left_on_one_side() -> None:
    points = joints_3d.canonical_points()
    body = points[-24:]
    left, right = [1, 4, 7, 10, 13, 16, 18, 20, 22], [2, 5, 8, 11, 14, 17, 19, 21, 23]
    torch.testing.assert_close(body[left] * torch.tensor([-1.0, 1, 1]), body[right])
    assert (body[left, 0] > 0).all()
    assert 1.6 < points[:, 1].max() - points[:, 1].min() < 1.8
    assert (torch.cdist(points, points) + torch.eye(len(points))).min() > 0.005


def test_crops_show_their_people_where_the_truth_says(people: Pictures) -> None:
    # the person is a white box on black, so that the truth can be compared with the crop
    white = torch.zeros_like(people.frames)
    for row, (left, top, right, bottom) in zip(white, people.boxes.round().int().tolist(), strict=True):
        row[top:bottom, left:right] = 255
    crops, cameras, wanted = joints_3d.JointTask()._batch(replace(people, frames=white), 8, seeded())
    pixels = wanted[:, -24:] / wanted[:, -24:, 2:] @ cameras.intrinsics.mT
    x, y = pixels[..., :2].round().long().clamp(0, 127).unbind(dim=-1)
    inside = torch.stack([crop_.mean(0)[rows, columns] for crop_, rows, columns in zip(crops, y, x, strict=True)])
    assert (inside > 0.3).float().mean() > 0.95
    assert crops.min() < 0.05
    # the larger side of a person fills the crop, but for what is around its joints
    spans = pixels[..., :2].amax(dim=1) - pixels[..., :2].amin(dim=1)
    assert spans.amax(dim=1).min() > 0.6 * SIDE


def test_heatmaps_have_the_cells_that_the_settings_say() -> None:
    model = joints_3d.crop_model().eval()
    features = model.backbone(torch.zeros(1, 3, joints_3d.CONFIG.proc_side, joints_3d.CONFIG.proc_side))
    cells = joints_3d.CONFIG.proc_side // joints_3d.CONFIG.stride
    assert features.shape[2:] == (cells, cells)


def test_held_out_pictures_show_the_held_out_characters_and_motions(monkeypatch: pytest.MonkeyPatch) -> None:
    for held_out in (False, True):
        splits: list[bool] = []
        monkeypatch.setattr(drawing, "_PORTRAITS", 0.0)  # they have no motion
        for name in ("sample_characters", "sample_motions"):
            sample = getattr(drawing, name)

            def noted(*args: Any, sample: Any = sample, splits: list[bool] = splits, **options: Any) -> Any:
                splits.append(options["held_out"])
                return sample(*args, **options)

            monkeypatch.setattr(drawing, name, noted)
        draw(4, 3, CPU, held_out=held_out)
        monkeypatch.undo()
        assert splits == [held_out] * 2


def test_the_joints_loss_is_least_for_the_truth_and_honest_uncertainty() -> None:
    wanted = torch.randn(2, 40, 3, generator=seeded()) * 0.3 + torch.tensor([0, 0, 3.0])
    intrinsics = default_intrinsics(SIDE, SIDE).expand(2, 3, 3)
    pixels = (wanted / wanted[..., 2:] @ intrinsics.mT)[..., :2]
    shape = wanted - wanted.mean(dim=1, keepdim=True)

    def loss(pixel: float = 0.0, metre: float = 0.0, place: float = 0.0, sure: float = 0.01) -> float:
        off = torch.zeros(40, 3)
        off[::2] = metre  # a shift of all points alike is none of the shape
        points = RelativePoints(pixels + pixel, shape + off, torch.full((2, 40), sure))
        return float(joints_3d.loss(points, wanted + place, wanted, intrinsics, SIDE, 2.5))

    least = loss()
    # two pixels to the right and down, in metres
    assert loss(pixel=2) == pytest.approx(least + 2 * 2**0.5 * 2.5 / SIDE, abs=1e-4)
    assert all(value > least + 0.01 for value in (loss(pixel=2), loss(metre=0.1), loss(place=0.2)))
    errors = {sure: loss(metre=0.1, sure=sure) for sure in (0.005, 0.029, 0.2)}
    assert min(errors, key=errors.__getitem__) == 0.029


@pytest.mark.parametrize("task", ["detector", "keypoints", "joints"])
def test_every_networks_loss_falls_on_a_few_pictures(task: str, people: Pictures) -> None:
    torch.manual_seed(0)
    tasks: dict[str, Callable[[], Task]] = {
        "detector": lambda: detector.DetectorTask(SIDE, batch_size=4),
        "keypoints": lambda: keypoints.KeypointTask(batch_size=4),
        "joints": lambda: joints_3d.JointTask(batch_size=2),
    }
    made = tasks[task]()
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=2e-3)
    losses = []
    for _ in range(5):
        loss = made.loss(people[:2], seeded(), 1.0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        nn.utils.clip_grad_norm_(made.model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0] or losses[-1] < losses[0] - 0.1
    scores = made.scores(people[:2], seeded())
    assert np.isfinite(list(scores.values())).all()


class Straight:
    """A task of one number that should become 3."""

    def __init__(self) -> None:
        self.model: nn.Module = nn.Linear(1, 1, bias=False)
        self.seen: list[float] = []

    def loss(self, pictures: Pictures, generator: torch.Generator, progress: float) -> Tensor:
        self.seen.append(progress)
        assert self.model.training
        return (self.model(torch.ones(1, 1)) - 3).square().mean()

    def scores(self, pictures: Pictures, generator: torch.Generator) -> dict[str, float]:
        assert not self.model.training
        return {"value": self.model(torch.ones(1, 1)).item()}


def test_a_training_ends_in_time_and_goes_on_from_where_it_stopped(tmp_path: Path, pictures: Pictures) -> None:
    first, schedule = Straight(), Schedule(0.3, learning_rate=0.05, warmup_steps=1, weight_decay=0.0)
    train(first, pictures, pictures, schedule, tmp_path)
    assert max(first.seen) < 1
    assert first.seen == sorted(first.seen)
    reached = first.model(torch.ones(1, 1)).item()
    again = Straight()
    train(again, pictures, pictures, replace(schedule, seconds=0.6), tmp_path)
    assert min(again.seen) >= 0.45
    log = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["log"]
    assert log[-1]["step"] == len(first.seen) + len(again.seen)
    assert abs(again.model(torch.ones(1, 1)).item() - 3) <= abs(reached - 3) + 1e-3
    assert (tmp_path / "log.json").exists()


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    schedule = Schedule(10, learning_rate=1.0, warmup_steps=10)
    assert schedule.rate(0, 0.0) == pytest.approx(0.1)
    assert schedule.rate(9, 0.0) == pytest.approx(1.0)
    assert schedule.rate(99, 0.5) == pytest.approx(0.5)
    assert schedule.rate(999, 1.0) == pytest.approx(0.0)


def test_curves_show_the_loss_and_every_score_of_a_log(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from training.pose_models.curves import draw_curves

    log = [{"step": 50.0, "loss": 3.0}, {"step": 100.0, "loss": 2.0, "found": 0.5}, {"step": 120.0, "found": 0.9}]
    for name in ("one", "other"):
        draw_curves(log, "detector", tmp_path / f"{name}.svg")
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert all(f"detector: {name}" in drawn for name in ("loss", "found"))
    assert drawn == (tmp_path / "other.svg").read_text(encoding="utf-8")


class _Session:
    """A network as onnxruntime would run it."""

    def __init__(self, model: nn.Module, shape: tuple[int, int], outputs: list[str]) -> None:
        self.model, self._shape, self._outputs = model.eval(), shape, outputs

    def get_inputs(self) -> list[object]:
        return [_Value("images", ["n", 3, *self._shape])]

    def get_outputs(self) -> list[object]:
        return [_Value(name, []) for name in self._outputs]

    def get_providers(self) -> list[str]:
        return ["torch"]

    @torch.inference_mode()
    def run(self, names: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        given = self.model(torch.from_numpy(next(iter(feed.values()))))
        return [value.numpy() for value in (given if isinstance(given, tuple) else (given,))]


class _Value:
    type = "tensor(float)"

    def __init__(self, name: str, shape: list[object]) -> None:
        self.name, self.shape = name, shape


def test_the_networks_are_those_that_the_pose_service_takes() -> None:
    yolox = OnnxNetwork(_Session(DetectorNetwork(), (SIDE, 96), ["output"]), "detector")  # type: ignore[arg-type]
    assert YoloxDetector(yolox).detect([np.zeros((64, 80, 3), np.uint8)])[0].shape == (0, 5)
    session = _Session(KeypointNetwork(), (128, 96), ["simcc_x", "simcc_y"])
    along_x, along_y = session.run(
        [], {"input": np.random.default_rng(0).normal(size=(2, 3, 128, 96)).astype(np.float32)}
    )
    np.testing.assert_allclose(along_x.max(axis=-1), along_y.max(axis=-1), rtol=1e-5)
    estimator = WholeBodyEstimator(OnnxNetwork(session, "keypoints"))  # type: ignore[arg-type]
    [found] = estimator.estimate([np.zeros((64, 80, 3), np.uint8)], [np.array([[5.0, 5, 60, 60]])])
    assert found.shape == (1, 134, 3)
    assert found[..., 2].max() <= 1
