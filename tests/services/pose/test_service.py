"""PoseService over real gRPC: ready pose videos, driving videos, joints, refusals, stopping."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bunraku.errors import NotThereYet, OutOfMemory
from bunraku.v1 import pose_pb2 as pb
from bunraku.v1 import stage_pb2
from runtime.bundles import Bundle, BundleComponent, BundleError, Pose, load_bundle
from runtime.client import Budget
from runtime.gpu import WorkCancelled, raise_if_cancelled
from runtime.stage import StageRuntime
from runtime.tensors import FLOAT16, UINT8, WireTensor
from runtime.video import Frame, Source, VideoLimits
from services.pose.__main__ import PoseSettings
from services.pose.clip import Batch
from services.pose.fit import cover, halve
from services.pose.nlf.config import QUIRKS
from services.pose.nlf.head import PointWeights
from services.pose.plan import KeptPlan, Masks, Networks, PoseMemory, plan_pose
from services.pose.service import PoseService, strokes_of
from tests.parity.cases import Case
from tests.parity.pose_persons import sam2_config
from tests.services.pose.drawn import (
    ANN,
    ANN_BOX,
    BEN,
    BEN_BOX,
    HEIGHT,
    WIDTH,
    DrawnModels,
    joints_of,
    picture,
    walking,
)
from tests.services.pose.figures import standing
from tests.services.pose.nlf.tiny import KnownAnswers
from tests.services.pose.nlf.tiny import estimator as nlf_estimator
from tests.services.pose.videos import changing_size, lossless_mp4, noise, sound_only
from tests.services.serving import BUNDLE_TOML, Answers, Served, serving, until
from training.tiny_onnx import write_networks

LIMITS = VideoLimits()
SAM2 = sam2_config(Case("sam2", Path(__file__).resolve().parents[2] / "goldens").config)
Stage = Served[PoseService]
NETWORKS = {"person_detector": "detector.onnx", "whole_body_keypoints": "whole_body.onnx", "joints_3d": "nlf"}


def stage(bundle: Bundle, **options: Any) -> AbstractAsyncContextManager[Stage]:
    return serving("pose", PoseService, bundle, **options)


def first(height: int = 32, width: int = 64, **fields: Any) -> pb.FitPoseVideoRequest:
    return pb.FitPoseVideoRequest(parameters=pb.FitPoseVideoParameters(height=height, width=width, **fields))


def sent(video: bytes) -> list[WireTensor]:
    return [WireTensor.from_bytes("video", video)]


async def fit(of: Stage, video: bytes, **fields: Any) -> Answers:
    return await of.ask("FitPoseVideo", first(**fields), sent(video))


def series(answers: Answers, name: str) -> Any:
    return np.concatenate([tensor.numpy() for tensor in answers.named(name)])


async def test_a_video_of_the_right_size_is_halved_exactly(bundle: Bundle) -> None:
    frames = noise(9, 32, 64)
    async with stage(bundle) as pose:
        answers = await fit(pose, lossless_mp4(frames, rate=30))
    [info] = answers.messages("info")
    assert answers.items[0].WhichOneof("message") == "info"
    assert (info.num_frames, info.source_frames, info.frames_per_second) == (9, 9, 30.0)
    assert (info.source_height, info.source_width) == (32, 64)
    [tensor] = answers.tensors
    assert (tensor.name, tensor.dtype, tensor.shape) == ("pose_frames", FLOAT16, (9, 16, 32, 3))
    means = np.stack(frames).reshape(9, 16, 2, 32, 2, 3).astype(np.float64).mean(axis=(2, 4))
    assert np.array_equal(tensor.numpy().astype(np.float64), means)


async def test_a_video_of_another_size_is_scaled_and_cropped_at_its_centre(bundle: Bundle) -> None:
    frames = noise(5, 50, 32)
    async with stage(bundle) as pose:
        answers = await fit(pose, lossless_mp4(frames), height=64, width=96, full_size=True)
    [info] = answers.messages("info")
    assert (info.source_height, info.source_width) == (50, 32)
    expected = np.stack([cover(frame, 64, 96) for frame in frames])
    assert np.array_equal(series(answers, "pose_frames_full"), expected)
    assert np.array_equal(series(answers, "pose_frames"), np.stack([halve(frame) for frame in expected]))


async def test_frames_at_full_size_come_beside_the_halves(bundle: Bundle) -> None:
    frames = noise(37, 32, 64)
    async with stage(bundle) as pose:
        answers = await fit(pose, lossless_mp4(frames), full_size=True)
        halves = await fit(pose, lossless_mp4(frames))
    assert [(tensor.name, tensor.shape[0]) for tensor in answers.tensors] == [
        (name, n) for n in (16, 16, 5) for name in ("pose_frames", "pose_frames_full")
    ]
    assert {tensor.dtype for tensor in answers.named("pose_frames_full")} == {UINT8}
    assert np.array_equal(series(answers, "pose_frames_full"), np.stack(frames))
    assert np.array_equal(series(answers, "pose_frames"), series(halves, "pose_frames"))
    assert halves.named("pose_frames_full") == []


async def test_a_video_is_cut_to_whole_latents_and_to_what_is_asked_for(bundle: Bundle) -> None:
    frames = noise(16, 32, 64)
    video = lossless_mp4(frames)
    async with stage(bundle) as pose:
        for limit, given, read in ((0, 13, 16), (9, 9, 9), (13, 13, 13), (17, 13, 16), (9997, 13, 16)):
            answers = await fit(pose, video, max_frames=limit)
            [info] = answers.messages("info")
            assert (info.num_frames, info.source_frames) == (given, read)
            assert np.array_equal(series(answers, "pose_frames"), np.stack([halve(frame) for frame in frames[:given]]))


async def test_a_video_is_not_read_beyond_the_frames_asked_for(bundle: Bundle) -> None:
    # what comes then would be refused
    changing = changing_size((32, 64), (64, 64))
    async with stage(bundle) as pose:
        assert len(series(await fit(pose, changing, max_frames=5), "pose_frames")) == 5
        [(field, _)] = await pose.refused("FitPoseVideo", first(max_frames=9), sent(changing))
    assert field == "video"


async def test_a_video_that_is_too_short_is_refused(bundle: Bundle) -> None:
    async with stage(bundle) as pose:
        violations = await pose.refused("FitPoseVideo", first(), sent(lossless_mp4(noise(4, 32, 64))))
        assert violations == (("video", "must have at least 5 frames, got 4"),)
        assert len(series(await fit(pose, lossless_mp4(noise(5, 32, 64))), "pose_frames")) == 5


async def test_what_is_no_video_is_refused_with_a_reason(bundle: Bundle) -> None:
    whole = lossless_mp4(noise(5, 32, 64))
    cases = {
        "empty": (b"", "is empty"),
        "one byte": (b"x", "is not a"),
        "text": (b"a red dancer jumps\n" * 100, "is not a"),
        "a list of other files": (b"ffconcat version 1.0\nfile pose.mp4\n", "is not a"),
        "broken off": (whole[: len(whole) // 2], ""),
        "without its index": (whole.replace(b"stco", b"stcx"), ""),
        "sound": (sound_only(), "has no video stream"),
        "a changing size": (changing_size((32, 64), (64, 32)), "changes its size"),
    }
    async with stage(bundle) as pose:
        for case, (video, text) in cases.items():
            [(field, violation)] = await pose.refused("FitPoseVideo", first(), sent(video))
            assert field == "video", case
            assert violation.startswith(text), case
            assert violation, case
        assert await pose.refused("FitPoseVideo", first()) == (("video", "is missing"),)
        flat = [WireTensor.from_numpy("video", np.zeros((4, 4), np.uint8))]
        violation = "must have the shape [any], got [4, 4]"
        assert await pose.refused("FitPoseVideo", first(), flat) == (("video", violation),)
        floats = [WireTensor.from_numpy("video", np.zeros(4, np.float32))]
        assert await pose.refused("FitPoseVideo", first(), floats) == (("video", "must be uint8, got float32"),)
        assert len(series(await fit(pose, whole), "pose_frames")) == 5


WRONG_FIELDS: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"height": 33}, [("height", "must be a multiple of 32, got 33")]),
    ({"width": 0}, [("width", "must be 32 to 4096, got 0")]),
    ({"width": 4128}, [("width", "must be 32 to 4096, got 4128")]),
    ({"max_frames": 6}, [("max_frames", "must be 4k + 1, got 6")]),
    ({"max_frames": 10_001}, [("max_frames", "must be 1 to 10000, got 10001")]),
    (
        {"height": 16, "width": 65, "max_frames": 8},
        [
            ("height", "must be 32 to 4096, got 16"),
            ("width", "must be a multiple of 32, got 65"),
            ("max_frames", "must be 4k + 1, got 8"),
        ],
    ),
]


async def test_wrong_fields_are_named(bundle: Bundle) -> None:
    async with stage(bundle) as pose:
        for fields, violations in WRONG_FIELDS:
            assert await pose.refused("FitPoseVideo", first(**fields), sent(b"")) == tuple(violations)


def extraction(height: int = HEIGHT, width: int = WIDTH, **fields: Any) -> pb.ExtractPoseRequest:
    return pb.ExtractPoseRequest(parameters=pb.ExtractPoseParameters(height=height, width=width, **fields))


def drawing(height: int = HEIGHT, width: int = WIDTH, **fields: Any) -> pb.RenderPoseRequest:
    return pb.RenderPoseRequest(parameters=pb.RenderPoseParameters(height=height, width=width, **fields))


def driving(frames: list[Frame], reference: Frame | None = None) -> list[WireTensor]:
    reference = picture(0, {ANN: (30, 20, 50, 60)}) if reference is None else reference
    return [*sent(lossless_mp4(frames)), WireTensor.from_numpy("reference_image", reference)]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> DrawnModels:
    """What a bundle's pose models are loaded as."""
    models = DrawnModels(together=Batch(16))
    monkeypatch.setattr("services.pose.models.load_models", lambda *_: (models, []))
    return models


@pytest.fixture
def pose_bundle(bundle: Bundle, tmp_path: Path) -> Bundle:
    """One that finds people with the tiny networks."""
    write_networks(tmp_path)
    (tmp_path / "nlf").touch()
    components = {name: BundleComponent(name, (tmp_path / file,)) for name, file in NETWORKS.items()}
    return replace(bundle, components={**bundle.components, **components})


async def test_a_bundle_without_pose_models_says_so(bundle: Bundle) -> None:
    async with stage(bundle) as pose:
        with pytest.raises(NotThereYet, match="bundle test has no pose models: give a ready pose video") as error:
            await pose.ask("ExtractPose", extraction(), driving(walking(5)))
        assert error.value.reason == "NO_POSE_MODELS"


async def test_a_bundle_that_lacks_one_of_the_pose_models_is_not_loaded(pose_bundle: Bundle, tmp_path: Path) -> None:
    components = dict(pose_bundle.components)
    del components["whole_body_keypoints"]
    async with stage(replace(pose_bundle, components=components), load=False) as pose:
        with pytest.raises(BundleError, match="has no component whole_body_keypoints"):
            pose.service.load()
    (tmp_path / "detector.onnx").unlink()
    async with stage(pose_bundle, load=False) as pose:
        with pytest.raises(BundleError, match=r"person_detector: not there: .*detector\.onnx"):
            pose.service.load()


async def test_a_driving_video_gives_info_then_progress_then_pose_frames(
    pose_bundle: Bundle, models: DrawnModels
) -> None:
    async with stage(pose_bundle) as pose:
        answers = await pose.ask("ExtractPose", extraction(), driving(walking(22, without=[2, 3])))
    [info] = answers.messages("info")
    assert answers.items[0].WhichOneof("message") == "info"
    assert (info.num_frames, info.source_frames, info.frames_per_second) == (21, 22, 16.0)
    assert (info.source_height, info.source_width) == (HEIGHT, WIDTH)
    progress = answers.messages("progress")
    assert [(p.step, p.completed_frames) for p in progress] == [
        (step, n)
        for step, counts in {"detect": (16, 21), "track": (21,), "joints": (16, 21), "align": (21,), "render": (16, 21)}.items()
        for n in counts
    ]  # fmt: skip
    assert {p.total_frames for p in progress} == {21}
    assert list(progress[-1].bridged_frames) == [2, 3]
    assert {tensor.name for tensor in answers.tensors} == {"pose_frames"}
    assert {tensor.dtype for tensor in answers.tensors} == {FLOAT16}
    frames = series(answers, "pose_frames")
    assert frames.shape == (21, HEIGHT // 2, WIDTH // 2, 3)
    assert all(frame.any() for frame in frames)


async def test_given_joints_drawn_again_give_the_same_frames(pose_bundle: Bundle, models: DrawnModels) -> None:
    async with stage(pose_bundle) as pose:
        for reference in (None, np.zeros((8, 8, 3), np.uint8)):
            video = driving(walking(17, without=[6]), reference)
            answers = await pose.ask("ExtractPose", extraction(give_joints=True), video)
            given = {name: answers.one(name) for name in ("keypoints", "joints", "camera")}
            assert given["keypoints"].shape == (17, 1, 134, 3)
            assert given["joints"].shape == (17, 1, 24, 3)
            drawn = await pose.ask("RenderPose", drawing(), given.values())
            assert np.array_equal(series(drawn, "pose_frames"), series(answers, "pose_frames"))
            # a camera that was not fitted is the one taken where none is given
            del given["camera"]
            plain = await pose.ask("RenderPose", drawing(), given.values())
            same = np.array_equal(series(plain, "pose_frames"), series(answers, "pose_frames"))
            assert same == (reference is not None)


async def test_joints_are_drawn_without_any_model(bundle: Bundle) -> None:
    joints = WireTensor.from_numpy("joints", standing(5, 2))
    nobody = WireTensor.from_numpy("keypoints", np.zeros((5, 2, 134, 3), np.float32))
    async with stage(bundle) as pose:
        frames = series(await pose.ask("RenderPose", drawing(64, 64), [joints, nobody]), "pose_frames")
    assert frames.shape == (5, 32, 32, 3)
    assert all(frame.any() for frame in frames)


async def test_a_video_or_a_number_of_people_that_cannot_be_extracted_is_refused(
    pose_bundle: Bundle, models: DrawnModels
) -> None:
    people = ("people", "asks for 2, no frame of the video shows more than 1")
    nobody = ("video", "shows nobody: no person was found in its 5 frames (0 to 4)")
    async with stage(pose_bundle) as pose:
        assert await pose.refused("ExtractPose", extraction(people=2), driving(walking(5))) == (people,)
        assert await pose.refused("ExtractPose", extraction(), driving(walking(5, without=range(5)))) == (nobody,)
        short = ("video", "must have at least 5 frames, got 4")
        assert await pose.refused("ExtractPose", extraction(), driving(walking(4))) == (short,)
        [(field, _)] = await pose.refused("ExtractPose", extraction(), [*sent(b"no"), driving(walking(5))[1]])
        assert field == "video"
        assert (await pose.ask("ExtractPose", extraction(), sent(lossless_mp4(walking(5))))).named("pose_frames")


async def test_two_people_are_given_each_with_what_was_missing_of_them(
    pose_bundle: Bundle, models: DrawnModels
) -> None:
    frames = [picture(n, {ANN: ANN_BOX, BEN: BEN_BOX} if n != 3 else {ANN: ANN_BOX}) for n in range(9)]
    async with stage(pose_bundle) as pose:
        answers = await pose.ask("ExtractPose", extraction(people=2, give_joints=True), driving(frames))
        given = [answers.one(name) for name in ("keypoints", "joints", "camera")]
        drawn = await pose.ask("RenderPose", drawing(), given)
    assert answers.one("joints").shape == (9, 2, 24, 3)
    assert answers.one("keypoints").shape == (9, 2, 134, 3)
    np.testing.assert_array_equal(answers.one("joints").numpy()[5, 1], joints_of(BEN, 5))
    last = answers.messages("progress")[-1]
    assert list(last.bridged_frames) == [3]
    assert [list(person.bridged_frames) for person in last.people] == [[], [3]]
    assert np.array_equal(series(drawn, "pose_frames"), series(answers, "pose_frames"))


async def test_people_are_looked_for_only_where_the_mask_video_is_bright(
    pose_bundle: Bundle, models: DrawnModels
) -> None:
    both = [picture(n, {ANN: ANN_BOX, BEN: BEN_BOX}) for n in range(5)]
    right = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    right[:, WIDTH // 2 :] = 255
    mask = WireTensor.from_bytes("mask_video", lossless_mp4([right] * 5))
    short = WireTensor.from_bytes("mask_video", lossless_mp4([right] * 4))
    async with stage(pose_bundle) as pose:
        for tensors, who in (([], ANN), ([mask], BEN)):
            video = [*driving(both), *tensors]
            joints = (await pose.ask("ExtractPose", extraction(give_joints=True), video)).one("joints").numpy()
            np.testing.assert_array_equal(joints[2, 0], joints_of(who, 2))
        violations = await pose.refused("ExtractPose", extraction(), [*driving(both), short])
        assert violations == (("mask_video", "must have as many frames as are used of video, 5, got 4"),)


async def test_a_mask_backend_that_the_bundle_lacks_is_said_so(pose_bundle: Bundle, models: DrawnModels) -> None:
    async with stage(pose_bundle) as pose:
        with pytest.raises(NotThereYet, match="mask_backend matanyone: bundle test has none") as error:
            await pose.ask("ExtractPose", extraction(mask_backend="matanyone"), driving(walking(5)))
    assert error.value.reason == "NO_MASK_BACKEND"


async def test_what_there_is_no_room_for_is_refused_with_the_numbers(pose_bundle: Bundle, models: DrawnModels) -> None:
    memory = PoseMemory(Networks())
    plan = replace(plan_pose(memory, 512, 896, 2 * 1024**3), left_out=("sam2",))
    async with stage(pose_bundle) as pose:
        pose.service._kept = KeptPlan(replace(memory, networks=Networks(sam2=SAM2)), plan, 2 * 1024**3)
        with pytest.raises(
            OutOfMemory, match=r"masks of 2 people .* by sam2 take \d\.\d\d GiB; the budget is 2\.00 GiB"
        ):
            await pose.ask("ExtractPose", extraction(people=2, mask_backend="sam2"), driving(walking(5)))
        models.refusing = "poses of 96x64 take 9 GiB"
        with pytest.raises(OutOfMemory, match="take 9 GiB"):
            await pose.ask("ExtractPose", extraction(), driving(walking(5)))


async def test_how_much_of_a_drawing_fits_is_counted_beside_the_loop_and_the_gpu(
    pose_bundle: Bundle, models: DrawnModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting: list[str] = []

    def batch(height: int, width: int) -> Batch:
        counting.append(threading.current_thread().name)
        return Batch(4)

    monkeypatch.setattr(models, "batch", batch)
    joints = WireTensor.from_numpy("joints", standing(5, 1))
    nobody = WireTensor.from_numpy("keypoints", np.zeros((5, 1, 134, 3), np.float32))
    async with stage(pose_bundle) as pose:
        portions = (await pose.ask("RenderPose", drawing(64, 64), [joints, nobody])).named("pose_frames")
    assert [len(portion.numpy()) for portion in portions] == [4, 1]
    # not asyncio's own threads either, which GetStatus needs: a caller that has gone would leave one busy
    assert set(counting) == {"pose-count_0"}


async def test_the_stage_reads_how_much_it_may_take(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    monkeypatch.setenv("BUNRAKU_VRAM", "3GiB")
    assert PoseSettings().vram == 3 * 1024**3
    monkeypatch.delenv("BUNRAKU_VRAM")
    assert PoseSettings().vram is None
    for device, vram_bytes in (("cpu", None), ("cuda:0", 5)):
        runtime = StageRuntime("pose", bundle, device=device)
        assert PoseService(runtime, bundle, vram_bytes=5)._vram_bytes == vram_bytes
        runtime.gpu.shutdown()


async def test_a_budget_is_what_the_networks_are_loaded_within(
    pose_bundle: Bundle, models: DrawnModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    memory = PoseMemory(Networks())
    plan = plan_pose(memory, 512, 896, 2 * 1024**3)
    kept = KeptPlan(memory, replace(plan, masks=Masks(is_sam2_streamed=True)), 2 * 1024**3)

    def load_within(bundle: Bundle, device: object, budget: int, clips: int) -> tuple[DrawnModels, list[Any], KeptPlan]:
        asked.append((budget, clips))
        return models, [], kept

    monkeypatch.setattr("services.pose.models.load_within", load_within)
    async with stage(pose_bundle, load=False) as pose:
        pose.service._vram_bytes = 12345
        pose.service.load()
        assert pose.runtime.memory_mode == stage_pb2.MEMORY_MODE_HYBRID
    assert asked == [(12345, pose.runtime.limits.max_concurrent)]


async def test_frames_of_full_size_come_on_black_or_over_the_video(pose_bundle: Bundle, models: DrawnModels) -> None:
    frames = walking(21)
    async with stage(pose_bundle) as pose:
        black = await pose.ask("ExtractPose", extraction(full_size=True), driving(frames))
        over = await pose.ask("ExtractPose", extraction(full_size=True, over_source=True), driving(frames))
        violations = await pose.refused("ExtractPose", extraction(over_source=True), driving(frames))
    full = series(black, "pose_frames_full")
    assert np.array_equal(np.stack([halve(frame) for frame in full]), series(black, "pose_frames"))
    drawn = full.any(axis=-1, keepdims=True)
    assert np.array_equal(series(over, "pose_frames_full"), np.where(drawn, full, np.stack(frames)))
    assert np.array_equal(series(over, "pose_frames"), series(black, "pose_frames"))
    assert violations == (("over_source", "goes with full_size only"),)


async def test_the_bundle_decides_on_strokes_and_on_the_preset(pose_bundle: Bundle, models: DrawnModels) -> None:
    joints = WireTensor.from_numpy("joints", standing(5))
    nobody = WireTensor.from_numpy("keypoints", np.zeros((5, 1, 134, 3), np.float32))
    drawn = []
    for radius in (21.5, 80.0):
        bundle = replace(pose_bundle, pose=Pose(preset="wan2gp", capsule_radius_mm=radius))
        async with stage(bundle) as pose:
            answers = await pose.ask("RenderPose", drawing(64, 64, full_size=True), [joints, nobody])
            drawn.append(series(answers, "pose_frames_full").any(axis=-1).sum())
            await pose.ask("ExtractPose", extraction(), driving(walking(5)))
    assert drawn[1] > 2 * drawn[0]
    assert set(models.quirks) == {QUIRKS["wan2gp"]}


async def test_wrong_fields_of_an_extraction_or_a_drawing_are_named(pose_bundle: Bundle, models: DrawnModels) -> None:
    fields: dict[str, Any] = {"people": 6, "preset": "best", "mask_expand": 51, "mask_backend": "none", "max_frames": 6}
    violations = {
        "max_frames": "must be 4k + 1, got 6",
        "people": "must be 0 to 5, got 6",
        "preset": "must be recommended, wan2gp, official or empty, got best",
        "mask_expand": "must be -10 to 50, got 51",
        "mask_backend": "must be sam2 or matanyone or empty, got none",
    }
    async with stage(pose_bundle) as pose:
        assert await pose.refused("ExtractPose", extraction(**fields)) == tuple(violations.items())
        wrong = drawing(33, preset="best")
        expected = (("height", "must be a multiple of 32, got 33"), ("preset", violations["preset"]))
        assert await pose.refused("RenderPose", wrong) == expected


@pytest.mark.parametrize(
    ("joints", "keypoints", "violation"),
    [
        ((4, 1), (4, 1), ("joints", "must have 4k + 1 frames, 5 to 10000, got 4")),
        ((5, 6), (5, 6), ("joints", "must be 1 to 5, got 6")),
        ((5, 1), (5, 2), ("keypoints", "must have the shape [5, 1, 134, 3], got [5, 2, 134, 3]")),
    ],
)
async def test_joints_of_the_wrong_shape_are_refused(
    bundle: Bundle, joints: tuple[int, int], keypoints: tuple[int, int], violation: tuple[str, str]
) -> None:
    tensors = [
        WireTensor.from_numpy("joints", np.zeros((*joints, 24, 3), np.float32)),
        WireTensor.from_numpy("keypoints", np.zeros((*keypoints, 134, 3), np.float32)),
    ]
    async with stage(bundle) as pose:
        assert await pose.refused("RenderPose", drawing(), tensors) == (violation,)


async def test_joints_that_are_no_numbers_or_nowhere_near_are_refused(bundle: Bundle) -> None:
    async with stage(bundle) as pose:
        for name, value in (("joints", np.nan), ("joints", np.inf), ("keypoints", 101), ("keypoints", np.nan)):
            values = {"joints": standing(5), "keypoints": np.zeros((5, 1, 134, 3), np.float32)}
            values[name][4, 0, -1, -1] = value
            tensors = [WireTensor.from_numpy(name, array) for name, array in values.items()]
            [(field, text)] = await pose.refused("RenderPose", drawing(), tensors)
            assert (field, text[:26]) == (name, "must be finite and within ")


async def test_a_camera_without_a_focal_length_is_refused(bundle: Bundle) -> None:
    camera = np.eye(3, dtype=np.float32)
    tensors = {"joints": standing(5), "keypoints": np.zeros((5, 1, 134, 3), np.float32), "camera": camera}
    async with stage(bundle) as pose:
        for place in ((0, 0), (1, 1)):
            tensors["camera"] = camera.copy()
            tensors["camera"][place] = 0
            sent_tensors = [WireTensor.from_numpy(name, array) for name, array in tensors.items()]
            violations = await pose.refused("RenderPose", drawing(), sent_tensors)
            assert violations == (("camera", "must have focal lengths of 1 at least"),)


async def test_real_networks_are_loaded_fed_and_reported(
    pose_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.pose.models.load_nlf", lambda *_, **__: nlf_estimator(FillsTheCrop()))
    frames = [np.full((64, 64, 3), 20, np.uint8) for _ in range(5)]
    for number, frame in enumerate(frames):
        frame[8:56, 16 + number : 40 + number] = 200
    async with stage(pose_bundle) as pose:
        tensors = driving(frames, frames[2])
        answers = await pose.ask("ExtractPose", extraction(64, 64, give_joints=True), tensors)
        detector, whole_body, joints_3d = (await pose.status()).components
    assert [c.name for c in (detector, whole_body, joints_3d)] == list(NETWORKS)
    assert detector.size_bytes == (tmp_path / NETWORKS["person_detector"]).stat().st_size
    assert (whole_body.dtype, joints_3d.parameters > 0) == ("float32", True)
    joints = answers.one("joints").numpy()[:, 0]
    # two metres ahead of a camera that looks at the person, who goes to the right by a pixel per frame
    np.testing.assert_allclose(np.linalg.norm(joints.mean(axis=1), axis=-1), 2000, rtol=0.02)
    assert (np.diff(joints[..., 0].mean(axis=1)) > 10).all()
    assert series(answers, "pose_frames").shape == (5, 32, 32, 3)


class FillsTheCrop(KnownAnswers):
    """Sees points all over the crop, 2 m ahead, and is certain of them."""

    def forward(self, crops: Tensor, intrinsics: Tensor, weights: PointWeights) -> tuple[Tensor, Tensor]:
        count, side = len(weights.bias), crops.shape[-1]
        x = torch.linspace(0, side, count)
        pixels = torch.stack([x, x.roll(count // 2), torch.ones(count)], dim=-1)
        ahead = pixels @ torch.linalg.inv(intrinsics).mT * 2000
        return ahead, torch.full(ahead.shape[:2], 0.01)


async def test_a_client_that_leaves_stops_the_extraction(
    pose_bundle: Bundle, models: DrawnModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, left = threading.Event(), threading.Event()
    people = models.people

    def slow(frames: Any, *, phantom: bool) -> Any:
        if len(models.batches) == 1:
            started.set()
            assert left.wait(20)
        return people(frames, phantom=phantom)

    monkeypatch.setattr(models, "people", slow)
    video = driving(walking(5) * 32 + walking(1))
    async with stage(pose_bundle) as pose:
        async with pose.client.call(Budget.of(60)) as call:
            answers = call.stream(call.stub.ExtractPose, extraction(), video)
            await anext(answers)
            await until(started.is_set)
            await answers.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        left.set()
        await until(lambda: not pose.runtime.status().work)
        # it stopped long before the 11 batches of the video
        assert len(models.batches) <= 3
        monkeypatch.setattr(models, "people", people)
        again = await pose.ask("ExtractPose", extraction(max_frames=5), video)
    assert len(series(again, "pose_frames")) == 5


async def test_a_client_that_leaves_stops_the_reading_and_frees_the_stage(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, held, closed = 0, threading.Event(), threading.Event()

    def held_at_20(source: Source, field: str, limits: VideoLimits = LIMITS) -> Iterator[Frame]:
        nonlocal read
        try:
            while True:
                read += 1
                while read == 20:
                    held.set()
                    try:
                        raise_if_cancelled()
                    except WorkCancelled:
                        break
                    time.sleep(0.001)
                yield np.zeros((32, 64, 3), np.uint8)
        finally:
            closed.set()

    video = lossless_mp4(noise(401, 32, 64))
    async with stage(bundle) as pose:
        with monkeypatch.context() as patched:
            patched.setattr("services.pose.service.read_frames", held_at_20)
            async with pose.client.call(Budget.of(60)) as call:
                answers = call.stream(call.stub.FitPoseVideo, first(), sent(video))
                await anext(answers)
                await until(held.is_set)
                await answers.aclose()  # type: ignore[attr-defined]
            await until(closed.is_set)
            await until(lambda: not pose.runtime.status().work)
        assert read == 20
        assert len(series(await fit(pose, video, max_frames=5), "pose_frames")) == 5


async def test_two_videos_at_the_same_time_do_not_mix(bundle: Bundle) -> None:
    clips = [noise(21, 32, 64, seed) for seed in (1, 2)]
    async with stage(bundle) as pose:
        together = await asyncio.gather(*(fit(pose, lossless_mp4(frames)) for frames in clips))
    for answers, frames in zip(together, clips, strict=True):
        assert np.array_equal(series(answers, "pose_frames"), np.stack([halve(frame) for frame in frames]))


async def test_shared_memory_changes_no_bit_and_leaves_nothing_behind(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.shared_memory.MIN_BYTES", 1)
    frames = noise(9, 32, 64)
    async with stage(bundle, shared_memory=tmp_path) as pose:
        answers = await fit(pose, lossless_mp4(frames), full_size=True)
        assert np.array_equal(series(answers, "pose_frames_full"), np.stack(frames))
        assert np.array_equal(series(answers, "pose_frames"), np.stack([halve(frame) for frame in frames]))
        memory = pose.runtime.shared_memory
        assert memory is not None
        assert memory.own_bytes > 0
        del answers
    assert os.listdir(tmp_path) == []


async def test_status_tells_of_a_stage_without_models(bundle: Bundle) -> None:
    async with stage(bundle) as pose:
        status = await pose.status()
    assert (status.stage, status.state) == ("pose", stage_pb2.STAGE_STATE_SERVING)
    assert list(status.components) == []


async def test_joints_at_or_behind_the_camera_are_refused(bundle: Bundle) -> None:
    nobody = WireTensor.from_numpy("keypoints", np.zeros((5, 2, 134, 3), np.float32))
    text = "must be at least 100 mm in front of the camera, those of frame, person 3, 1 are not"
    async with stage(bundle) as pose:
        for depth, violations in ((99, (("joints", text),)), (-500, (("joints", text),)), (100, None)):
            joints = standing(5, 2)
            joints[3, 1, 15, 2] = depth
            joints[2, 0] = 0
            tensors = [WireTensor.from_numpy("joints", joints), nobody]
            if violations:
                assert await pose.refused("RenderPose", drawing(64, 64), tensors) == violations
            else:
                assert (await pose.ask("RenderPose", drawing(64, 64), tensors)).named("pose_frames")


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("capsule_radius_mm = 0", "capsule_radius_mm must be above 0"),
        ("head_radius_px = 65", "head_radius_px must be 0 to 64"),
        ("dot_radius_px = 3", "dot_radius_px must be 0 to 2"),
        ('preset = "best"', "pose.preset must be one of recommended, wan2gp, official"),
        ('mask_backend = "sam"', "pose.mask_backend must be one of sam2, matanyone"),
        ("radius = 3", "radius"),
    ],
)
def test_a_wrong_pose_section_of_a_bundle_is_named(tmp_path: Path, entry: str, text: str) -> None:
    (tmp_path / "bundle.toml").write_text(f"{BUNDLE_TOML}[pose]\n{entry}\n", encoding="utf-8")
    with pytest.raises(BundleError, match=text):
        load_bundle(tmp_path)


def test_the_pose_section_of_a_bundle_is_read(tmp_path: Path) -> None:
    (tmp_path / "bundle.toml").write_text(BUNDLE_TOML, encoding="utf-8")
    assert load_bundle(tmp_path).pose == Pose("recommended", "sam2", 21.5, 4, None)
    section = "[pose]\ncapsule_radius_mm = 80\nhead_radius_px = 2\ndot_radius_px = 0\n"
    (tmp_path / "bundle.toml").write_text(BUNDLE_TOML + section, encoding="utf-8")
    strokes = strokes_of(load_bundle(tmp_path))
    assert (strokes.capsule_radius_mm, strokes.head_radius_px, strokes.dot_radius_px) == (80, 2, 0)
