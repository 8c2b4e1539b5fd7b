"""The animate pipeline against stages that answer at once: what goes where, what is tried again, what is delivered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest

from bunraku.errors import DeadlineExceeded, NotReady, OutOfMemory, StageBroken
from bunraku.v1 import denoiser_pb2
from gateway.pipelines.animate import Animation, Motion, animate
from gateway.stages import Driving, Stages, Work, connect
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

    def stage(self, stage: str, *, window: int = 0, windows: int = 1) -> AbstractContextManager[None]:
        return nullcontext()


class Tape:
    """A video that keeps its frames."""

    def __init__(self) -> None:
        self.frames: list[Frames] = []
        self.motion: Motion | None = None

    def open(self, motion: Motion) -> Tape:
        self.motion = motion
        return self

    async def add(self, frames: Frames) -> None:
        self.frames += [frame.copy() for frame in frames]


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
    return FakeStages()  # type: ignore[abstract]  # the rpcs that are not there yet


@pytest.fixture
async def stages(fake: FakeStages) -> AsyncIterator[Stages]:
    async with serving(fake) as addresses:
        connected = connect(addresses, None)
        yield connected
        await connected.close()


async def run(stages: Stages, animation: Animation = ANIMATION, seconds: float = 20) -> tuple[Tape, Told]:
    tape, told = Tape(), Told()
    await animate(animation, stages, Work("generations/1", Budget.of(seconds), told, AT_ONCE), tape.open)
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
