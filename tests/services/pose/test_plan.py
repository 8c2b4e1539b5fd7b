"""The pose stage within a budget: plans that keep to their numbers, say what they leave out, and give the same frames."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bunraku.errors import OutOfMemory
from runtime.alive import Alive
from runtime.budget import DoesNotFit
from runtime.bundles import Bundle, BundleComponent, load_bundle
from runtime.vram import Peak
from services.pose.activations import drawing_bytes, joints_bytes, people_bytes, sam2_weights, segmenter_weights
from services.pose.clip import Batch, Clip
from services.pose.extract import PoseExtractor
from services.pose.habits import HABITS
from services.pose.models import load_models, load_within
from services.pose.nlf.config import NlfQuirks, NlfSizes
from services.pose.nlf.weights import load_nlf, sizes_of, unloaded_nlf
from services.pose.onnx import OnnxNetwork, OnnxSettings
from services.pose.onnx_file import OnnxSizes
from services.pose.persons.sam import SegmenterConfig
from services.pose.persons.sam2 import Sam2Config
from services.pose.plan import (
    GIB,
    RELEASED_DETECTOR,
    RELEASED_WHOLE_BODY,
    KeptPlan,
    Masks,
    Networks,
    PoseMemory,
    least_plan,
    plan_pose,
    whole_plan,
)
from services.pose.render import most_bytes
from tests.parity.cases import Case
from tests.parity.pose_persons import sam2_config, segmenter_config
from tests.services.pose.drawn import ANN, ANN_BOX, BEN, BEN_BOX, DrawnModels, picture, walking
from tests.services.pose.test_models import PROMPTS

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "bundles" / "tiny"
CPU = torch.device("cpu")
SIZE = 512, 896
RELEASED = PoseMemory(Networks())


def tiny_sam2() -> Sam2Config:
    return sam2_config(Case("sam2", ROOT / "tests" / "goldens").config)


def tiny_segmenter() -> SegmenterConfig:
    case = Case("sam", ROOT / "tests" / "goldens")
    return segmenter_config(case.config, case.weights())


@pytest.fixture
def tiny() -> Bundle:
    return load_bundle(TINY)


def with_masks() -> PoseMemory:
    """Networks of small sizes, with masks; quick to count."""
    nlf = sizes_of(TINY / "pose" / "nlf_tiny.safetensors")
    return PoseMemory(Networks(nlf=nlf, sam2=tiny_sam2(), segmenter=tiny_segmenter()))


@given(st.integers(int(1.95 * GIB), 8 * GIB))
@settings(max_examples=20, deadline=None)
def test_plans_keep_within_the_budget_and_work_on_more_where_there_is_more(budget: int) -> None:
    plan = plan_pose(RELEASED, *SIZE, budget)
    assert plan.device_bytes <= budget
    more = plan_pose(RELEASED, *SIZE, budget + GIB // 2)
    assert (more.batch.frames, more.onnx_batch) >= (plan.batch.frames, plan.onnx_batch)


def test_the_released_networks_need_two_gib() -> None:
    assert plan_pose(RELEASED, *SIZE, 2 * GIB).batch.frames == 1
    assert least_plan(RELEASED, *SIZE).device_bytes == pytest.approx(1.93 * GIB, rel=0.01)
    assert whole_plan(RELEASED, *SIZE).batch == Batch(32, 64, 65536)
    with pytest.raises(
        DoesNotFit,
        match=r"poses of 896x512 take 1\.9\d GiB a frame at a time and without masks; the budget is 1\.50 GiB",
    ):
        plan_pose(RELEASED, *SIZE, 3 * GIB // 2)


def test_pictures_of_onnxruntime_are_given_up_before_frames() -> None:
    whole = whole_plan(RELEASED, *SIZE)
    plan = plan_pose(RELEASED, *SIZE, whole.device_bytes - 1)
    assert (whole.onnx_batch, plan.onnx_batch) == (8, 4)
    assert plan.batch == whole.batch
    assert least_plan(RELEASED, *SIZE, frames=None).onnx_batch == 2
    assert least_plan(RELEASED, *SIZE, frames=8).batch.frames == 8


def test_a_plan_counts_everything_that_is_there() -> None:
    networks, batch, masks = RELEASED.networks, Batch(4, 8, 8192), Masks()
    arenas = RELEASED.arenas(2)
    assert arenas[0] == 4 * 54_174_271 + 2 * int(1.25 * 216 * 640 * 640) + 64 * 1024**2
    working = max(
        people_bytes(RELEASED_DETECTOR, RELEASED_WHOLE_BODY, 2, batch, *SIZE),
        joints_bytes(networks.nlf, torch.float16, RELEASED_DETECTOR, batch, *SIZE),
        drawing_bytes(batch, *SIZE),
    )
    nlf = sum(tensor.nbytes for tensor in unloaded_nlf(NlfSizes(), torch.float16).model.state_dict().values())
    drawn = 3 * 4 * SIZE[0] * SIZE[1]
    beside = (832 + 128 + 128) * 1024**2  # the driver's, onnxruntime's and the allocator's
    expected = beside + sum(arenas) + nlf + 1.1 * (working + 2 * drawn)
    assert RELEASED.taken(masks, batch, 2, SIZE) == pytest.approx(expected, abs=1024)
    without = replace(RELEASED, has_onnx=False).taken(masks, batch, 2, SIZE)
    assert RELEASED.taken(masks, batch, 2, SIZE) - without == sum(arenas) + 128 * 1024**2
    assert drawing_bytes(batch, *SIZE) - most_bytes(4, 5 * 13, *SIZE, 8192) == drawn  # beside those drawn last
    one = replace(RELEASED, clips=1).taken(masks, batch, 2, SIZE)
    assert RELEASED.taken(masks, batch, 2, SIZE) - one == pytest.approx(1.1 * drawn, abs=2)


def test_layers_of_the_released_size_need_what_is_assumed_of_onnxruntime() -> None:
    from benchmarks.pose_chain import RtmPoseL, YoloxL

    for build, sizes in ((YoloxL, RELEASED_DETECTOR), (RtmPoseL, RELEASED_WHOLE_BODY)):
        with torch.inference_mode(), torch.device("meta"):
            network = build()
            with Alive() as alive:
                network(torch.empty(2, 3, sizes.height, sizes.width))
        assert sum(weight.numel() for weight in network.parameters()) == sizes.parameters
        per_pixel = alive.most / (2 * sizes.height * sizes.width)
        assert 170 < per_pixel <= 216


def test_what_a_step_takes_grows_with_the_batch_and_the_size() -> None:
    def steps(batch: Batch, height: int, width: int) -> list[int]:
        sizes = RELEASED_DETECTOR, RELEASED_WHOLE_BODY
        return [
            people_bytes(*sizes, 2, batch, height, width),
            joints_bytes(NlfSizes(), torch.float16, sizes[0], batch, height, width),
            drawing_bytes(batch, height, width),
        ]

    one, four, large = (steps(*case) for case in ((Batch(1, 2, 2048), 256, 448), (Batch(4, 8, 8192), 256, 448), (Batch(1, 2, 2048), 512, 896)))  # fmt: skip
    for less, more, larger in zip(one, four, large, strict=True):
        assert 1.5 * less < more < 4.5 * less
        assert less < larger < 5 * less


def test_masks_are_streamed_or_left_to_the_processor_before_they_are_left_out() -> None:
    memory = with_masks()
    networks = memory.networks
    assert networks.sam2 is not None
    assert networks.segmenter is not None
    everything = memory.taken(Masks(("sam2", "matanyone")), Batch(32, 64, 65536), 8, SIZE)
    assert plan_pose(memory, *SIZE, everything).masks == Masks(("sam2", "matanyone"))
    less = plan_pose(memory, *SIZE, everything - 1)
    assert less.masks == Masks(("sam2", "matanyone"), is_segmenter_on_host=True)
    assert less.host_bytes == segmenter_weights(networks.segmenter).total
    least = least_plan(memory, *SIZE, ["sam2", "matanyone"], frames=8)
    assert least.masks == Masks(("sam2", "matanyone"), is_segmenter_on_host=True, is_sam2_streamed=True)
    assert least.host_bytes == less.host_bytes + sam2_weights(networks.sam2).blocks
    only_sam2 = plan_pose(memory, *SIZE, least.device_bytes - 1)
    assert (only_sam2.masks.backends, only_sam2.left_out) == (("sam2",), ("matanyone",))
    assert "no room for matanyone" in str(only_sam2)
    assert only_sam2.batch.frames > 8  # which others are not given up for
    few = plan_pose(memory, *SIZE, least_plan(memory, *SIZE, ["sam2"]).device_bytes)
    assert (few.masks.backends, few.batch.frames) == (("sam2",), 1)
    none = plan_pose(memory, *SIZE, least_plan(memory, *SIZE, ["sam2"]).device_bytes - 1)
    assert none.left_out == ("sam2", "matanyone")


def test_the_back_end_that_the_bundle_uses_is_kept_longest() -> None:
    memory = PoseMemory(replace(with_masks().networks, preferred="matanyone"))
    assert memory.networks.backends == ("matanyone", "sam2")
    least = least_plan(memory, *SIZE, memory.networks.backends, frames=8)
    assert plan_pose(memory, *SIZE, least.device_bytes - 1).left_out == ("sam2",)


def test_a_streamed_network_takes_two_of_its_blocks() -> None:
    memory = with_masks()
    config = memory.networks.sam2
    assert config is not None
    weights = sam2_weights(config)
    saved = [
        memory.taken(Masks(("sam2",), is_sam2_streamed=streamed), Batch(1, 1, 1024), 1, SIZE)
        for streamed in (False, True)
    ]
    assert saved[0] - saved[1] == weights.blocks - 2 * weights.largest_block


def test_a_larger_size_is_worked_on_in_smaller_batches_or_refused_with_the_numbers() -> None:
    memory = with_masks()
    plan = plan_pose(memory, *SIZE, int(2.6 * GIB))
    kept = KeptPlan(memory, plan, int(2.6 * GIB))
    assert kept.batch(*SIZE).frames >= plan.batch.frames
    assert kept.batch(720, 1280).frames < kept.batch(*SIZE).frames
    with pytest.raises(
        OutOfMemory, match=r"poses of 4096x4096 a frame at a time take \d\.\d\d GiB; the budget is 2\.60"
    ):
        kept.batch(4096, 4096)


def test_masks_of_more_people_than_there_is_room_for_are_refused_with_the_numbers() -> None:
    memory = PoseMemory(replace(with_masks().networks, preferred="matanyone"))
    budget = least_plan(memory, *SIZE, ["matanyone"]).device_bytes
    kept = KeptPlan(memory, plan_pose(memory, *SIZE, budget), budget)
    kept.check_masks("matanyone", 2, *SIZE)
    text = r"masks of 5 people of 896x512 by matanyone take \d\.\d\d GiB; the budget is \d\.\d\d GiB"
    with pytest.raises(OutOfMemory, match=text) as refused:
        kept.check_masks("matanyone", 5, *SIZE)
    larger = SIZE[0] * 2, SIZE[1]
    assert kept.batch(*larger).frames > 1  # one person has room
    with pytest.raises(OutOfMemory, match="masks of 2 people of 896x1024"):
        kept.check_masks("matanyone", 2, *larger)
    needed, given_gib = (float(number) for number in re.findall(r"(\d\.\d\d) GiB", str(refused.value)))
    assert needed > given_gib
    with pytest.raises(OutOfMemory, match="by sam2 take"):
        kept.check_masks("sam2", 2, *SIZE)  # left out


def test_sizes_are_those_of_the_files(tiny: Bundle) -> None:
    networks = Networks.of(tiny)
    file = tiny.component("joints_3d").files[0]
    loaded = load_nlf(file, device=CPU, dtype=torch.float32)
    assert networks.nlf == sizes_of(file)
    assert networks.nlf.config == loaded.config
    unloaded = unloaded_nlf(networks.nlf, torch.float32)
    shapes = {name: tensor.shape for name, tensor in loaded.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in unloaded.model.state_dict().items()} == shapes
    assert len(unloaded.canonical_points) == len(loaded.canonical_points)
    session = load_models(tiny, CPU)[0]._detector.network
    assert (networks.detector.height, networks.detector.width) == (session.height, session.width)
    assert networks.detector == OnnxSizes.of(tiny.component("person_detector").files[0])
    assert networks.backends == ()
    others = {**tiny.components, "text_encoder": BundleComponent("text_encoder", ())}
    assert Networks.of(replace(tiny, components=others)) == networks


def test_without_files_the_released_sizes_are_planned_with() -> None:
    networks = Networks.of(load_bundle(ROOT / "bundles" / "scail-14b"))
    assert networks.detector == RELEASED_DETECTOR
    assert networks.nlf == NlfSizes()
    assert networks.backends == ("sam2", "matanyone")


def test_a_bundle_is_loaded_within_its_budget_and_gives_the_same_people_and_joints(
    tiny: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    frames = [picture(number, {ANN: ANN_BOX, BEN: BEN_BOX}) for number in range(5)]
    whole, _ = load_models(tiny, CPU)
    memory = PoseMemory(Networks.of(tiny), has_onnx=False)
    budget = least_plan(memory, tiny.video.height, tiny.video.width).device_bytes
    models, loaded, kept = load_within(tiny, CPU, budget, 2)
    assert [component.name for component in loaded] == ["person_detector", "whole_body_keypoints", "joints_3d"]
    assert kept.plan.batch == models.batch(tiny.video.height, tiny.video.width)
    assert kept.plan.batch.frames == 1
    assert f"a frame at a time, no masks, {budget / GIB:.2f} GiB" in caplog.text
    expected, found = (each.joints(frames, NlfQuirks()) for each in (whole, models))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-2)
    for one, other in zip(*(each.people(frames, phantom=True) for each in (whole, models)), strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_allclose(theirs.keypoints, mine.keypoints, atol=1e-6)
    assert models._estimating(NlfQuirks(), 3).crops_at_once == 3
    with pytest.raises(DoesNotFit, match=r"the budget is 0\.00 GiB"):
        load_within(tiny, CPU, 1000, 2)


def test_the_allocator_gets_what_onnxruntime_leaves_and_each_session_its_part(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    caps: list[tuple[int, int]] = []
    asked: list[OnnxSettings] = []
    load = OnnxNetwork.load

    def on_cpu(path: Path, given: OnnxSettings) -> OnnxNetwork:
        asked.append(given)
        return load(path, OnnxSettings("cpu", max_batch=given.max_batch))

    monkeypatch.setattr("services.pose.models._onnx_device", lambda device: "cuda:0")
    monkeypatch.setattr("services.pose.models.cap_memory", lambda device, *bytes_: caps.append(bytes_))
    monkeypatch.setattr(OnnxNetwork, "load", on_cpu)
    _, _, kept = load_within(tiny, CPU, 3 * GIB // 2, 2)
    plan = kept.plan
    assert caps == [(3 * GIB // 2 - sum(plan.arenas) - 128 * 1024**2, 832 * 1024**2)]
    assert [settings.arena_bytes for settings in asked] == list(plan.arenas)
    little = least_plan(kept.memory, tiny.video.height, tiny.video.width)
    asked.clear()
    load_within(tiny, CPU, little.device_bytes, 2)
    assert {settings.max_batch for settings in asked} == {1}


def test_smaller_batches_give_the_same_frames() -> None:
    clip = Clip(lambda: iter(walking(9)), 9, *walking(1)[0].shape[:2])

    def frames(batch: Batch) -> Any:
        items = PoseExtractor(DrawnModels(together=batch)).extract(clip, None, HABITS["recommended"])
        return np.concatenate([item.numpy() for item in items if isinstance(item, torch.Tensor)])

    whole = frames(Batch(9))
    assert whole.any()
    for batch in (Batch(4, 8, 64), Batch(1, 1, 7)):
        np.testing.assert_array_equal(frames(batch), whole)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_masks_are_the_same_wherever_their_weights_are(tiny: Bundle, tmp_path: Path, is_streamed: bool) -> None:
    case = Case("sam2", ROOT / "tests" / "goldens")
    save_file(case.weights(), tmp_path / "sam2.safetensors")
    component = BundleComponent("person_masks", (tmp_path / "sam2.safetensors",), config=asdict(tiny_sam2()))
    bundle = replace(tiny, components={**tiny.components, "person_masks": component})
    memory = PoseMemory(Networks.of(bundle))
    assert memory.networks.backends == ("sam2",)
    plan = plan_pose(memory, 64, 96, 4 * GIB)
    plan = replace(plan, masks=replace(plan.masks, is_sam2_streamed=is_streamed))
    logits = []
    for kept in (None, KeptPlan(memory, plan, 4 * GIB)):
        models, _ = load_models(bundle, CPU, kept)
        frames = [torch.from_numpy(picture(number, {ANN: ANN_BOX, BEN: BEN_BOX})) for number in range(3)]
        clip: Any = models.masks["sam2"].begin(frames[0], PROMPTS)
        for frame in frames[1:]:
            clip.follow(frame)
        logits.append(clip.logits)
    assert torch.equal(*logits)
    left_out = replace(plan, masks=Masks(), left_out=("sam2",))
    assert load_models(bundle, CPU, KeptPlan(memory, left_out, 4 * GIB))[0].masks == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_drawn_takes_no_more_than_was_counted() -> None:
    from benchmarks.pose_render import dancing
    from services.pose.extract import Drawing, draw
    from services.pose.quirks import Strokes

    device, batch = torch.device("cuda:0"), Batch(8, 16, 16384)
    joints = dancing(16, 5)
    drawing = Drawing(joints, np.zeros((16, 5, 134, 3), np.float32), Drawing.plain_camera(*SIZE))
    with Peak(device) as peak:
        before = torch.cuda.memory_allocated(device)
        for _ in draw(drawing, *SIZE, HABITS["recommended"].pose, Strokes(), device, batch):
            pass
    assert 0 < peak.allocated_bytes - before <= drawing_bytes(batch, *SIZE)
