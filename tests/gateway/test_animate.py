"""The animate pipeline against stages that answer at once: what goes where, what is tried again, what is delivered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bunraku.errors import (
    BunrakuError,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    OutOfMemory,
    StageBroken,
    WrongState,
)
from bunraku.v1 import denoiser_pb2
from gateway.blobs import DirectoryBlobs
from gateway.outputs import JobOutputs, OutputStore
from gateway.pipelines.animate import Animation, Motion, animate
from gateway.stages import Conditioning, Driving, Stages, Work, connect, denoise_recipe
from runtime import replicas
from runtime.client import Budget, Retry
from runtime.server import as_bunraku_error
from tests.gateway.fake_stages import FakeStages, serving

Frames = npt.NDArray[np.uint8]
AT_ONCE = Retry(attempts=3, first_wait_s=0.001, longest_wait_s=0.002)
GONE = NotReady("gone", stage="denoiser")


@dataclass
class Told:
    """A report that remembers."""

    events: list[tuple[object, ...]] = field(default_factory=list)

    def progress(self, stage: str, completed: int, total: int, *, window: int = 0, windows: int = 1) -> None:
        self.events.append(("progress", stage, completed, total))

    def retrying(self, stage: str) -> None:
        self.events.append(("retrying", stage))

    def preview(self, frames: Frames, completed_steps: int) -> None:
        self.events.append(("preview", completed_steps))

    def partial(self, completed_frames: int, total_frames: int) -> None:
        self.events.append(("partial", completed_frames, total_frames))

    def denoised(self, window: int, forward_passes: denoiser_pb2.ForwardPasses) -> None:
        self.events.append(("denoised", window, forward_passes.computed, forward_passes.reused))

    def stage(self, stage: str, *, window: int = 0, windows: int = 1) -> AbstractContextManager[None]:
        return nullcontext()


class Tape:
    """A video that keeps its frames."""

    def __init__(self) -> None:
        self.frames: list[Frames] = []
        self.motion: Motion | None = None
        self.ended = 0

    def open(self, motion: Motion) -> Tape:
        self.motion = motion
        return self

    async def add(self, frames: Frames) -> None:
        self.frames += [frame.copy() for frame in frames]

    async def end_segment(self) -> bytes:
        """The frames of the window, as numbers."""
        first, self.ended = self.ended, len(self.frames)
        return bytes(int(frame[0, 0, 0]) for frame in self.frames[first:])

    async def restore(self, segment: bytes) -> None:
        self.frames += [np.full((64, 32, 3), number, np.uint8) for number in segment]
        self.ended = len(self.frames)


ANIMATION = Animation(
    reference_image=np.full((64, 32, 3), 7, np.uint8),
    motion=b"a video",
    prompt="a dance",
    negative_prompt="blur",
    max_frames=81,
    window_frames=17,
    window_overlap_frames=5,
    color_correction_strength=0.5,
    sampling=denoiser_pb2.DenoiseParameters(
        num_inference_steps=4, guidance_scale=2, shift=5, seed=3, checkpoint_every_steps=2
    ),
    image_resize="bicubic",
    pixel_rounding="nearest",
)


@pytest.fixture
def fake() -> FakeStages:
    return FakeStages(revision="r1")  # type: ignore[abstract]  # the rpcs that are not there yet


@pytest.fixture
async def stages(fake: FakeStages) -> AsyncIterator[Stages]:
    async with serving(fake) as addresses:
        connected = connect(addresses, None)
        yield connected
        await connected.close()


async def run(
    stages: Stages, animation: Animation = ANIMATION, seconds: float = 20, outputs: JobOutputs | None = None
) -> tuple[Tape, Told]:
    tape, told = Tape(), Told()
    work = Work("generations/1", Budget.of(seconds), told, AT_ONCE, outputs=outputs)
    await animate(animation, stages, work, tape.open)
    return tape, told


async def test_one_window_passes_every_tensor_by_name(fake: FakeStages, stages: Stages) -> None:
    tape, told = await run(stages)
    assert [int(frame[0, 0, 0]) for frame in tape.frames] == list(range(9))
    given = fake.tensors["Denoise"][0]
    assert {name: tensor.shape for name, tensor in given.items()} == {
        "prompt_embeds": (1, 8, 16),
        "negative_prompt_embeds": (1, 8, 16),
        "image_embeds": (1, 5, 16),
        "reference_latents": (1, 16, 1, 8, 4),
        "pose_latents": (1, 16, 3, 4, 2),
    }
    parameters = fake.calls["Denoise"][0]
    assert (parameters.height, parameters.width, parameters.num_frames, parameters.seed) == (64, 32, 9, 3)
    assert told.events[-1] == ("partial", 9, 9)
    assert tape.motion is not None
    assert float(tape.motion.frames_per_second) == 12


async def test_a_raw_driving_video_goes_to_extraction_with_the_reference(fake: FakeStages, stages: Stages) -> None:
    driving = Driving(b"a dance", people=2, mask_video=b"a mask", preset="official")
    tape, told = await run(stages, replace(ANIMATION, motion=driving))
    assert len(tape.frames) == 9
    parameters = fake.calls["ExtractPose"][0]
    assert (parameters.height, parameters.width, parameters.people, parameters.preset) == (64, 32, 2, "official")
    given = fake.tensors["ExtractPose"][0]
    assert {name: tensor.shape for name, tensor in given.items()} == {
        "video": (7,),
        "reference_image": (64, 32, 3),
        "mask_video": (6,),
    }
    assert ("progress", "pose_detect", 9, 9) in told.events


async def test_without_guidance_no_negative_prompt_is_encoded(fake: FakeStages, stages: Stages) -> None:
    sampling = denoiser_pb2.DenoiseParameters(num_inference_steps=1, guidance_scale=1)
    await run(stages, replace(ANIMATION, sampling=sampling))
    assert not fake.calls["EncodeText"][0].HasField("negative_prompt")
    assert "negative_prompt_embeds" not in fake.tensors["Denoise"][0]


async def test_windows_share_frames_and_deliver_each_frame_once(fake: FakeStages, stages: Stages) -> None:
    fake.num_frames = 41
    tape, told = await run(stages)
    # windows of 17 with 5 shared: 17, then 12 new frames each
    assert [(p.num_frames, p.history_frames) for p in fake.calls["Denoise"]] == [(17, 0), (17, 5), (17, 5)]
    assert len(tape.frames) == 41
    assert [event for event in told.events if event[0] == "partial"] == [
        ("partial", 17, 41),
        ("partial", 29, 41),
        ("partial", 41, 41),
    ]
    # the pose frames of a window begin with those it shares
    pose = [tensors["frames"] for tensors in fake.tensors["Encode"] if tensors["frames"].shape[1] == 32]
    assert [[int(x) for x in frames.numpy()[[0, -1], 0, 0, 0]] for frames in pose] == [[0, 16], [12, 28], [24, 40]]
    # history is what was delivered last, and colours follow its first frame
    history = [tensors["frames"] for tensors in fake.tensors["Encode"] if tensors["frames"].shape[0] == 5]
    assert [[int(x) for x in frames.numpy()[:, 0, 0, 0]] for frames in history] == [[12, 13, 14, 15, 16]] * 2
    assert [p.skip_frames for p in fake.calls["Decode"]] == [0, 5, 5]
    assert ["color_reference" in tensors for tensors in fake.tensors["Decode"]] == [False, True, True]
    assert int(fake.tensors["Decode"][1]["color_reference"].numpy()[0, 0, 0]) == 12


async def test_independent_branches_run_at_the_same_time(fake: FakeStages, stages: Stages) -> None:
    fake.pause = {"EncodeText", "EncodeImage", "Encode", "FitPoseVideo"}

    async def all_four() -> None:
        while fake.most_running["any"] < 4:
            await asyncio.sleep(0.001)
        fake.resume.set()

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(all_four())
        group.create_task(run(stages))
    assert fake.most_running["any"] >= 4


async def test_the_vae_is_not_called_before_there_is_a_pose_frame(fake: FakeStages, stages: Stages) -> None:
    fake.pause = {"pose frames"}
    running = asyncio.create_task(run(stages))
    async with asyncio.timeout(10):
        while not (fake.running["FitPoseVideo"] and fake.calls["Encode"]):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert [(p.height, p.width) for p in fake.calls["Encode"]] == [(64, 32)]  # the reference
        fake.resume.set()
        await running
    assert [(p.height, p.width) for p in fake.calls["Encode"]] == [(64, 32), (32, 16)]


async def test_a_denoiser_that_dies_goes_on_from_its_last_checkpoint(fake: FakeStages, stages: Stages) -> None:
    fake.fail_next["after a step"] = [GONE, GONE]
    sampling = denoiser_pb2.DenoiseParameters(num_inference_steps=4, guidance_scale=2, checkpoint_every_steps=1)
    _, told = await run(stages, replace(ANIMATION, sampling=sampling))
    assert [p.start_from.completed_steps for p in fake.calls["Denoise"]] == [0, 1, 2]
    assert "checkpoint.latents" in fake.tensors["Denoise"][1]
    assert ("retrying", "denoise") in told.events


async def test_a_vae_that_dies_while_decoding_gives_every_frame_once(fake: FakeStages, stages: Stages) -> None:
    fake.fail_next["after frames"] = [NotReady("gone", stage="vae")]
    tape, _ = await run(stages)
    assert [p.skip_frames for p in fake.calls["Decode"]] == [0, 4]
    assert [int(frame[0, 0, 0]) for frame in tape.frames] == list(range(9))


@pytest.mark.parametrize(("rpc", "stage"), [("EncodeText", "encoder"), ("FitPoseVideo", "pose"), ("Encode", "vae")])
async def test_a_stage_that_stays_away_is_named(fake: FakeStages, stages: Stages, rpc: str, stage: str) -> None:
    fake.fail_next[rpc] = [NotReady("loading") for _ in range(50)]
    with pytest.raises(ExceptionGroup) as raised:
        await run(stages)
    error = as_bunraku_error(raised.value)
    assert isinstance(error, NotReady)
    assert error.stage == stage
    assert f"the {stage} stage" in error.message
    assert len(fake.calls[rpc]) >= AT_ONCE.attempts


async def test_what_does_not_help_is_not_tried_again(fake: FakeStages, stages: Stages) -> None:
    for error in (OutOfMemory("too large"), StageBroken("a bug")):
        fake.calls.clear()
        fake.fail_next["Denoise"] = [error]
        with pytest.raises(type(error)):
            await run(stages)
        assert len(fake.calls["Denoise"]) == 1


async def test_the_deadline_ends_it_and_frees_the_stages(fake: FakeStages, stages: Stages) -> None:
    fake.pause = {"Denoise"}
    with pytest.raises(DeadlineExceeded):
        await run(stages, seconds=0.5)
    async with asyncio.timeout(5):
        while fake.running["Denoise"]:
            await asyncio.sleep(0.01)


# What was made before


@pytest.fixture
def store(tmp_path: Path) -> OutputStore:
    return OutputStore(DirectoryBlobs(tmp_path))


def job(store: OutputStore, number: int = 1, caller: str = "anna", claim: str = "c1") -> JobOutputs:
    return store.of_job(f"{number:032x}", caller=caller, claim=claim)


def counts(fake: FakeStages) -> dict[str, int]:
    return {rpc: len(calls) for rpc, calls in fake.calls.items() if calls}


async def test_the_same_again_runs_the_denoiser_and_what_comes_after_only(
    fake: FakeStages, stages: Stages, store: OutputStore
) -> None:
    await run(stages, outputs=job(store, 1))
    first = fake.tensors["Denoise"][0]
    fake.calls.clear()
    await run(stages, outputs=job(store, 2))
    assert counts(fake) == {"Denoise": 1, "Decode": 1}
    again = fake.tensors["Denoise"][1]
    assert {name: tensor.data.tobytes() for name, tensor in first.items()} == {
        name: tensor.data.tobytes() for name, tensor in again.items()
    }


@pytest.mark.parametrize(
    ("change", "made_again"),
    [
        ({"prompt": "another dance"}, {"EncodeText"}),
        ({"negative_prompt": "noise"}, {"EncodeText"}),
        ({"reference_image": np.full((64, 32, 3), 8, np.uint8)}, {"EncodeImage", "Encode"}),
        ({"image_resize": "lanczos"}, {"EncodeImage"}),
        ({"motion": b"another video"}, {"FitPoseVideo", "Encode"}),
        ({"max_frames": 5}, {"FitPoseVideo", "Encode"}),
        ({"window_frames": 13}, {"FitPoseVideo", "Encode"}),
    ],
)
async def test_only_what_depends_on_a_change_is_made_again(
    fake: FakeStages, stages: Stages, store: OutputStore, change: dict[str, Any], made_again: set[str]
) -> None:
    await run(stages, outputs=job(store, 1))
    fake.calls.clear()
    await run(stages, replace(ANIMATION, **change), outputs=job(store, 2))
    assert counts(fake).keys() == {"Denoise", "Decode", *made_again}


@pytest.mark.parametrize("change", [{"people": 3}, {"preset": "wan2gp"}, {"mask_video": None}, {"video": b"other"}])
async def test_every_part_of_a_driving_video_decides_its_poses(
    fake: FakeStages, stages: Stages, store: OutputStore, change: dict[str, Any]
) -> None:
    driving = Driving(b"a dance", people=2, mask_video=b"a mask", preset="official")
    for number, motion in enumerate((driving, driving, replace(driving, **change))):
        await run(stages, replace(ANIMATION, motion=motion), outputs=job(store, number))
    assert len(fake.calls["ExtractPose"]) == 2


async def test_poses_of_a_driving_video_are_aligned_to_the_picture_and_found_again_only_with_it(
    fake: FakeStages, stages: Stages, store: OutputStore
) -> None:
    animation = replace(ANIMATION, motion=Driving(b"a dance", people=1, mask_video=None, preset="official"))
    other = replace(animation, reference_image=np.full((64, 32, 3), 8, np.uint8))
    for number, each in enumerate((animation, other, animation)):
        await run(stages, each, outputs=job(store, number))
    assert len(fake.calls["ExtractPose"]) == 2


async def test_other_weights_and_other_callers_find_nothing(
    fake: FakeStages, stages: Stages, store: OutputStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "REVISION_STAYS_S", 0.0)
    everything = {"EncodeText": 1, "EncodeImage": 1, "FitPoseVideo": 1, "Encode": 2, "Denoise": 1, "Decode": 1}
    await run(stages, outputs=job(store, 1))
    for number, (revision, caller) in enumerate((("r1", "bert"), ("r2", "anna")), start=2):
        fake.revision = revision
        fake.calls.clear()
        await run(stages, outputs=job(store, number, caller))
        assert counts(fake) == everything


async def test_several_at_once_make_the_same_once(fake: FakeStages, stages: Stages, store: OutputStore) -> None:
    await asyncio.gather(*(run(stages, outputs=job(store, number)) for number in range(4)))
    assert counts(fake) == {
        "EncodeText": 1,
        "EncodeImage": 1,
        "FitPoseVideo": 1,
        "Encode": 2,
        "Denoise": 4,
        "Decode": 4,
    }


async def test_a_generation_that_goes_on_repeats_nothing_that_was_finished(
    fake: FakeStages, stages: Stages, store: OutputStore
) -> None:
    fake.num_frames = 41
    undisturbed, _ = await run(stages, outputs=job(store, 9))
    fake.fail_next["Decode"] = []
    fake.calls.clear()

    class Full(Tape):
        async def add(self, frames: Frames) -> None:
            if len(self.frames) >= 29:
                raise StageBroken("the gateway dies in the third window")
            await super().add(frames)

    work = Work("generations/1", Budget.of(20), Told(), AT_ONCE, outputs=job(store, 1, claim="c1"))
    with pytest.raises(StageBroken):
        await animate(ANIMATION, stages, work, Full().open)
    assert len(fake.calls["Denoise"]) == 3
    fake.calls.clear()
    tape, told = await run(stages, outputs=job(store, 1, claim="c2"))
    # the window whose frames were on their way is decoded again, and that is all
    assert counts(fake) == {"Decode": 1}
    assert fake.calls["Decode"][0].skip_frames == 5
    assert np.array_equal(np.stack(tape.frames), np.stack(undisturbed.frames))
    assert ("progress", "denoise", 4, 4) in told.events
    assert [event for event in told.events if event[0] == "partial"] == [
        ("partial", 17, 41),
        ("partial", 29, 41),
        ("partial", 41, 41),
    ]


async def test_what_was_computed_is_told_of_every_window_also_of_those_that_were_finished_before(
    fake: FakeStages, stages: Stages, store: OutputStore
) -> None:
    fake.num_frames = 29
    fake.forward_passes = denoiser_pb2.ForwardPasses(computed=5, reused=3)
    said = [("denoised", 0, 5, 3), ("denoised", 1, 5, 3)]
    for _ in range(2):
        _, told = await run(stages, outputs=job(store))
        assert [event for event in told.events if event[0] == "denoised"] == said
    assert len(fake.calls["Denoise"]) == 2


async def test_windows_after_those_that_were_finished_get_their_history(
    fake: FakeStages, stages: Stages, store: OutputStore
) -> None:
    fake.num_frames = 41
    fake.fail_next["Denoise"] = [None, None, StageBroken("the gateway dies before the third window")]
    with pytest.raises(StageBroken):
        await run(stages, outputs=job(store, 1, claim="c1"))
    fake.calls.clear()
    fake.tensors.clear()
    tape, _ = await run(stages, outputs=job(store, 1, claim="c2"))
    assert counts(fake) == {"Denoise": 1, "Decode": 1}
    assert [int(frame[0, 0, 0]) for frame in tape.frames[:17]] == list(range(17))
    assert len(tape.frames) == 41
    [reference] = [tensors["color_reference"].numpy() for tensors in fake.tensors["Decode"]]
    assert np.array_equal(reference, tape.frames[24])


async def test_the_denoiser_goes_on_from_the_last_checkpoint_of_another_worker(
    fake: FakeStages, stages: Stages, store: OutputStore
) -> None:
    fake.fail_next["after a step"] = [*[None] * 2, StageBroken("the gateway dies")]
    sampling = denoiser_pb2.DenoiseParameters(num_inference_steps=4, guidance_scale=2, checkpoint_every_steps=1)
    animation = replace(ANIMATION, sampling=sampling)
    with pytest.raises(StageBroken):
        await run(stages, animation, outputs=job(store, 1, claim="c1"))
    await store.close()
    fake.calls.clear()
    await run(stages, animation, outputs=job(store, 1, claim="c2"))
    assert [p.start_from.completed_steps for p in fake.calls["Denoise"]] == [3]
    assert "checkpoint.latents" in fake.tensors["Denoise"][-1]
    # another generation begins at the beginning
    await run(stages, animation, outputs=job(store, 2))
    assert [p.start_from.completed_steps for p in fake.calls["Denoise"]] == [3, 0]


@pytest.mark.parametrize(
    "refusal",
    [
        WrongState("of another run", reason="CHECKPOINT_OF_ANOTHER_RUN"),
        InvalidRequest(("start_from.completed_steps", "must be")),
        InvalidRequest(("checkpoint.latents", "is missing")),
    ],
)
async def test_a_checkpoint_that_is_refused_costs_only_itself(
    fake: FakeStages, stages: Stages, store: OutputStore, refusal: BunrakuError
) -> None:
    fake.fail_next["after a step"] = [*[None] * 2, StageBroken("the gateway dies")]
    with pytest.raises(StageBroken):
        await run(stages, outputs=job(store, 1))
    await store.close()
    fake.fail_next["Denoise"] = [refusal]
    fake.calls.clear()
    tape, _ = await run(stages, outputs=job(store, 1, claim="c2"))
    assert [p.start_from.completed_steps for p in fake.calls["Denoise"]] == [2, 0]
    assert len(tape.frames) == 9


async def test_a_wrong_request_is_not_taken_for_a_wrong_checkpoint(
    fake: FakeStages, stages: Stages, store: OutputStore
) -> None:
    fake.fail_next["Denoise"] = [InvalidRequest(("seed", "must be"))]
    with pytest.raises(InvalidRequest):
        await run(stages, outputs=job(store))
    assert len(fake.calls["Denoise"]) == 1


async def test_waiting_for_one_that_makes_the_same_ends_with_the_deadline(
    fake: FakeStages, stages: Stages, store: OutputStore
) -> None:
    fake.pause = {"EncodeText"}
    first = asyncio.create_task(run(stages, outputs=job(store, 1)))
    async with asyncio.timeout(5):
        while not fake.running["EncodeText"]:
            await asyncio.sleep(0.001)
    with pytest.raises(ExceptionGroup) as raised:
        await run(stages, outputs=job(store, 2), seconds=0.3)
    assert isinstance(as_bunraku_error(raised.value), DeadlineExceeded)
    assert fake.running["EncodeText"] == 1
    fake.resume.set()
    await first


def test_latents_depend_on_all_but_what_is_told_on_the_way() -> None:
    def digest(digests: dict[str, str] | None = None, **changes: Any) -> str:
        fields: dict[str, Any] = {"seed": 1, "num_inference_steps": 4, "guidance_scale": 2.0, "shift": 5.0} | changes
        parameters = denoiser_pb2.DenoiseParameters(**fields)
        return denoise_recipe(parameters, Conditioning({}, digests or {"text": "1"})).digest("r1")

    checkpoint = denoiser_pb2.Checkpoint(completed_steps=2)
    assert {
        digest(),
        digest(preview_every_steps=1),
        digest(checkpoint_every_steps=5),
        digest(start_from=checkpoint),
    } == {digest()}
    others = {
        digest(seed=2),
        digest(num_inference_steps=5),
        digest(guidance_scale=3.0),
        digest(shift=1.0),
        digest(num_frames=5),
        digest({"text": "2"}),
        digest(step_cache=denoiser_pb2.STEP_CACHE_TEA),
        digest(step_cache=denoiser_pb2.STEP_CACHE_MAG),
        digest(step_cache=denoiser_pb2.STEP_CACHE_MAG, step_cache_speedup=2.0),
        digest(step_cache=denoiser_pb2.STEP_CACHE_MAG, step_cache_start=0.1),
        digest(guidance_start=0.1),
        digest(guidance_end=0.9),
        digest(cfg_zero_star=True),
        digest(zero_init_steps=1),
    }
    assert len(others | {digest()}) == 15
