"""One request through five real processes over real sockets."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from bunraku.client import Client
from bunraku.errors import BunrakuError, InvalidRequest
from bunraku.v1 import gateway_pb2 as pb
from gateway.media import read_metadata
from runtime.video import probe_video
from tests.system.conftest import Collector, System
from tests.system.media import read_video, write_picture, write_pose_video

SUCCEEDED, FAILED = pb.GENERATION_STATE_SUCCEEDED, pb.GENERATION_STATE_FAILED
CANCELLED, RUNNING = pb.GENERATION_STATE_CANCELLED, pb.GENERATION_STATE_RUNNING


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture(tmp_path_factory.mktemp("media") / "ref.png", height=60, width=100)


@pytest.fixture(scope="module")
def pose_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pose_video(tmp_path_factory.mktemp("media") / "pose.mp4", num_frames=10)


def ended(client: Client, generation: pb.Generation) -> pb.Generation:
    """The generation once it has ended, however it did."""
    for _ in client.watch(generation.name):
        pass
    return client.get(generation.name)


def test_animates_with_the_right_size_frames_rate_and_metadata(
    client: Client, picture: Path, pose_video: Path, tmp_path: Path
) -> None:
    generation = client.animate(
        reference_image=picture,
        pose_video=pose_video,
        prompt="a figure dances",
        seed=7,
        num_inference_steps=2,
        height=64,
        width=64,
    )
    events = list(client.watch(generation.name))
    generation = ended(client, generation)
    assert generation.state == SUCCEEDED
    client.download(generation.video, tmp_path / "out.mp4")
    info = probe_video(tmp_path / "out.mp4", "out")
    # 64 x 64 pixels at the aspect of 100 x 60, in steps of 32; 10 frames are cut to 4k + 1
    assert (info.height, info.width, info.num_frames, float(info.frames_per_second)) == (64, 96, 9, 12.0)
    assert len(read_video(tmp_path / "out.mp4")) == 9
    metadata = read_metadata(tmp_path / "out.mp4", "out")
    assert metadata["seed"] == 7
    assert metadata["num_frames"] == 9
    assert metadata["request"]["animate"]["prompt"] == "a figure dances"  # type: ignore[index]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    done = [event.progress.stage for event in events if event.progress.state == pb.STAGE_PROGRESS_STATE_DONE]
    assert set(done) == {"text", "image", "reference", "pose", "pose_latents", "denoise", "decode", "write"}
    assert done.index("pose_latents") < done.index("denoise") < done.index("decode") < done.index("write")
    assert events[-1].generation.state == SUCCEEDED
    assert generation.progress.fraction == pytest.approx(1)


def test_the_same_seed_gives_the_same_frames_and_another_seed_others(
    client: Client, picture: Path, pose_video: Path, tmp_path: Path
) -> None:
    videos = []
    for number, seed in enumerate((3, 3, 4)):
        generation = client.animate(
            reference_image=picture, pose_video=pose_video, seed=seed, num_inference_steps=2, height=64, width=64
        )
        client.download(ended(client, generation).video, tmp_path / f"{number}.mp4")
        videos.append(read_video(tmp_path / f"{number}.mp4"))
    assert np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_a_long_pose_video_goes_window_by_window(client: Client, picture: Path, tmp_path: Path) -> None:
    pose = write_pose_video(tmp_path / "long.mp4", num_frames=41, height=64, width=64)
    generation = client.animate(
        reference_image=picture, pose_video=pose, seed=1, num_inference_steps=1, height=32, width=32
    )
    events = list(client.watch(generation.name))
    generation = ended(client, generation)
    assert generation.state == SUCCEEDED, generation.error
    partial = [event.partial.completed_frames for event in events if event.WhichOneof("event") == "partial"]
    assert partial == [17, 33, 41]
    client.download(generation.video, tmp_path / "out.mp4")
    assert len(read_video(tmp_path / "out.mp4")) == 41


def test_one_request_is_one_trace_through_all_processes(
    client: Client, collector: tuple[Collector, str], picture: Path, pose_video: Path
) -> None:
    generation = ended(
        client,
        client.animate(
            reference_image=picture,
            pose_video=pose_video,
            prompt="nothing of it is kept from another",
            num_inference_steps=1,
            height=96,
            width=32,
        ),
    )
    assert len(generation.trace_id) == 32
    expected = {f"bunraku-{name}" for name in ("gateway", "encoder", "pose", "denoiser", "vae")}
    expected |= {"generation", "stage.denoiser", "bunraku.v1.DenoiserService/Denoise"}
    spans = collector[0].spans[generation.trace_id]
    until = time.monotonic() + 20  # spans are sent in batches, once a second
    while not expected <= {name for span in spans for name in span}:
        assert time.monotonic() < until, spans
        time.sleep(0.1)


def test_an_empty_prompt_is_allowed(client: Client, picture: Path, pose_video: Path) -> None:
    generation = client.animate(
        reference_image=picture, pose_video=pose_video, prompt="", num_inference_steps=1, height=32, width=32
    )
    assert ended(client, generation).state == SUCCEEDED


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_frames": 1_000_000_000}, "output.num_frames"),
        ({"height": 100, "width": 64, "size_mode": "crop"}, "output.height"),
        ({"height": 4096, "width": 4096}, "output.height"),
        ({"height": 64}, "output.width"),
        ({"model": "unknown"}, "model"),
        ({"seed": 2**63}, "sampling.seed"),
        ({"guidance_scale": float("nan")}, "sampling.guidance_scale"),
        ({"shift": float("inf")}, "sampling.shift"),
        ({"num_inference_steps": 0}, "sampling.num_inference_steps"),
        ({"solver": "magic"}, "sampling.solver"),
        ({"frames_per_second": 1000.0}, "output.frames_per_second"),
    ],
)
def test_a_bad_field_is_named_before_anything_is_queued(
    client: Client, picture: Path, pose_video: Path, arguments: dict[str, object], field: str
) -> None:
    before = len(list(client.list()))
    with pytest.raises(InvalidRequest) as raised:
        client.animate(reference_image=picture, pose_video=pose_video, **arguments)  # type: ignore[arg-type]
    assert field in [name for name, _ in raised.value.violations]
    assert len(list(client.list())) == before


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 not a picture", b"hello"])
def test_a_corrupt_picture_or_video_is_refused_by_name(
    client: Client, picture: Path, pose_video: Path, tmp_path: Path, content: bytes
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(content)
    for field, files in (
        ("animate.reference_image", {"reference_image": broken, "pose_video": pose_video}),
        ("animate.pose_video", {"reference_image": picture, "pose_video": broken}),
    ):
        with pytest.raises(InvalidRequest) as raised:
            client.animate(**files)  # type: ignore[arg-type]
        if content:
            assert [name for name, _ in raised.value.violations] == [field]


def test_a_driving_video_that_shows_nobody_fails_and_says_so(client: Client, picture: Path, pose_video: Path) -> None:
    generation = ended(client, client.animate(reference_image=picture, driving_video=pose_video, height=64, width=64))
    assert generation.state == FAILED
    assert "shows nobody" in str(generation.error)


def test_every_stage_tells_its_state(client: Client) -> None:
    status = client.status()
    assert {stage.stage for stage in status.stages} == {"encoder", "pose", "denoiser", "vae"}
    assert all(stage.reachable and stage.status.bundle == "tiny" for stage in status.stages)
    denoiser = next(stage.status for stage in status.stages if stage.stage == "denoiser")
    assert denoiser.components[0].name == "transformer"
    assert "int8" in denoiser.components[0].dtype
    assert denoiser.ram.used_bytes > 0


def wait_for_step(client: Client, name: str, step: int) -> None:
    for event in client.watch(name):
        if event.progress.stage == "denoise" and event.progress.completed >= step:
            return
    raise AssertionError("ended before that step")


def test_cancel_frees_the_denoiser(client: Client, picture: Path, pose_video: Path) -> None:
    generation = client.animate(
        reference_image=picture, pose_video=pose_video, num_inference_steps=100, height=128, width=128
    )
    wait_for_step(client, generation.name, 1)
    client.cancel(generation.name)
    assert ended(client, generation).state == CANCELLED
    deadline = time.monotonic() + 10
    while any(stage.status.work for stage in client.status().stages):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_denoiser_costs_no_generation_and_changes_no_bit(
    client: Client, system: System, picture: Path, pose_video: Path, tmp_path: Path
) -> None:
    def animate() -> pb.Generation:
        return client.animate(
            reference_image=picture, pose_video=pose_video, seed=5, num_inference_steps=24, height=64, width=64
        )

    client.download(ended(client, animate()).video, tmp_path / "undisturbed.mp4")
    generation = animate()
    wait_for_step(client, generation.name, 7)
    os.kill(system.pid("services.denoiser"), signal.SIGKILL)
    generation = ended(client, generation)
    assert generation.state == SUCCEEDED, generation.error
    client.download(generation.video, tmp_path / "killed.mp4")
    assert np.array_equal(read_video(tmp_path / "undisturbed.mp4"), read_video(tmp_path / "killed.mp4"))


def test_a_killed_gateway_goes_on_with_its_generation(
    client: Client, system: System, picture: Path, pose_video: Path
) -> None:
    generation = client.animate(
        reference_image=picture, pose_video=pose_video, num_inference_steps=20, height=64, width=64
    )
    wait_for_step(client, generation.name, 2)
    os.kill(system.pid("gateway"), signal.SIGKILL)
    generation = ended(client, generation)
    assert generation.state == SUCCEEDED, generation.error
    assert generation.attempts == 2


def test_errors_are_the_same_types_on_both_sides(client: Client) -> None:
    with pytest.raises(BunrakuError) as raised:
        client.get("generations/" + "0" * 32)
    assert raised.value.reason == "NOT_FOUND"
