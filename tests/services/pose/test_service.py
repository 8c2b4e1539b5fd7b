"""PoseService over real gRPC: ready pose videos, refusals, stopping."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bunraku.errors import NotThereYet
from bunraku.v1 import pose_pb2 as pb
from bunraku.v1 import stage_pb2
from runtime.bundles import Bundle
from runtime.client import Budget
from runtime.tensors import FLOAT16, UINT8, WireTensor
from runtime.video import Frame, Source, VideoLimits
from services.pose.fit import cover, halve
from services.pose.service import PoseService
from tests.services.pose.videos import changing_size, lossless_mp4, noise, sound_only
from tests.services.serving import Answers, Served, serving, until

LIMITS = VideoLimits()
Stage = Served[PoseService]


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


async def test_extraction_and_drawing_are_not_there_yet(bundle: Bundle) -> None:
    extract = pb.ExtractPoseRequest(parameters=pb.ExtractPoseParameters(height=32, width=32))
    render = pb.RenderPoseRequest(parameters=pb.RenderPoseParameters(height=32, width=32))
    async with stage(bundle) as pose:
        for rpc, request in (("ExtractPose", extract), ("RenderPose", render)):
            with pytest.raises(NotThereYet, match=f"{rpc} is in the contract, but not in this version yet"):
                await pose.ask(rpc, request)


async def test_a_client_that_leaves_stops_the_reading_and_frees_the_stage(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, held, closed = 0, threading.Event(), threading.Event()

    def endless(source: Source, field: str, limits: VideoLimits = LIMITS) -> Iterator[Frame]:
        nonlocal read
        try:
            while True:
                read += 1
                if read == 20:
                    held.set()
                    assert left.wait(20)
                yield np.zeros((32, 64, 3), np.uint8)
        finally:
            closed.set()

    left = threading.Event()
    video = lossless_mp4(noise(401, 32, 64))
    async with stage(bundle) as pose:
        with monkeypatch.context() as patched:
            patched.setattr("services.pose.service.read_frames", endless)
            async with pose.client.call(Budget.of(60)) as call:
                answers = call.stream(call.stub.FitPoseVideo, first(), sent(video))
                await anext(answers)
                await until(held.is_set)
                await answers.aclose()  # type: ignore[attr-defined]
            await asyncio.sleep(0.05)
            left.set()
            await until(closed.is_set)
            await until(lambda: not pose.runtime.status().work)
        # it stopped long before the 401 frames of the video
        assert read <= 32
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
