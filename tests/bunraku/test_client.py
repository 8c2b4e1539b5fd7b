"""The client against a gateway that breaks."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from bunraku.client import CHECKSUM_MISMATCH, UNREACHABLE, AsyncClient, Client, Retry, animate_request, succeeded
from bunraku.errors import (
    Busy,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NotReady,
    OutOfMemory,
    StageBroken,
    WrongState,
)
from bunraku.v1 import gateway_pb2 as pb
from tests.bunraku.fake_gateway import NAME, VIDEO, FakeGateway, GatewayThread, asset, stage_event

QUICK = Retry(attempts=4, first_wait_s=0.01, longest_wait_s=0.05)


@pytest.fixture
async def client(gateway: GatewayThread) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(gateway.address, retry=QUICK, call_timeout_s=5.0) as client:
        yield client


@pytest.fixture
def movie(tmp_path: Path) -> Path:
    path = tmp_path / "movie.mp4"
    path.write_bytes(VIDEO)
    return path


async def test_upload_sends_the_file_with_its_size_and_checksum(
    client: AsyncClient, fake: FakeGateway, movie: Path
) -> None:
    stored = await client.upload(movie)
    assert stored == asset(VIDEO)
    assert fake.assets[stored.name] == VIDEO
    (metadata,) = fake.requests("UploadAsset")
    assert (metadata.filename, metadata.size_bytes) == ("movie.mp4", len(VIDEO))
    assert metadata.sha256 == hashlib.sha256(VIDEO).hexdigest()


async def test_upload_goes_on_where_it_broke_off(client: AsyncClient, fake: FakeGateway, movie: Path) -> None:
    fake.break_upload_at = [600_000]
    seen: list[tuple[int, int]] = []
    stored = await client.upload(movie, on_progress=lambda done, total: seen.append((done, total)))
    first, second = fake.requests("UploadAsset")
    assert first.upload_id == second.upload_id
    assert first.offset_bytes == 0
    assert 600_000 <= second.offset_bytes < len(VIDEO)
    assert fake.assets[stored.name] == VIDEO
    assert seen[-1] == (len(VIDEO), len(VIDEO))


async def test_transfers_that_move_on_may_break_any_number_of_times(
    client: AsyncClient, fake: FakeGateway, movie: Path, tmp_path: Path
) -> None:
    fake.break_upload_at, fake.break_download_at = [[step * 131_072 for step in range(1, 8)] for _ in range(2)]
    stored = await client.upload(movie)
    await client.download(stored, tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == VIDEO
    assert len(fake.requests("UploadAsset")) > QUICK.attempts
    assert len(fake.requests("DownloadAsset")) == 8


async def test_file_that_the_gateway_has_is_not_sent(client: AsyncClient, fake: FakeGateway, movie: Path) -> None:
    fake.assets[asset(VIDEO).name] = VIDEO
    seen: list[tuple[int, int]] = []
    assert await client.upload(movie, on_progress=lambda done, total: seen.append((done, total))) == asset(VIDEO)
    assert fake.requests("UploadAsset") == []
    assert seen == [(len(VIDEO), len(VIDEO))]


async def test_upload_whose_answer_was_lost_is_not_sent_again(
    client: AsyncClient, fake: FakeGateway, movie: Path
) -> None:
    fake.lose_upload_answer = True
    assert (await client.upload(movie)).name == asset(VIDEO).name
    assert len(fake.requests("UploadAsset")) == 1


async def test_upload_that_is_cancelled_ends_its_call(client: AsyncClient, fake: FakeGateway, movie: Path) -> None:
    fake.hold_upload = True
    task = asyncio.create_task(client.upload(movie))
    assert await asyncio.to_thread(fake.uploading.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(fake.upload_left.wait, 10)


async def test_upload_that_never_gets_through_ends_with_not_ready(
    client: AsyncClient, fake: FakeGateway, movie: Path
) -> None:
    fake.failures["UploadAsset"] = [NotReady("full") for _ in range(10)]
    with pytest.raises(NotReady, match="full"):
        await client.upload(movie)
    assert len(fake.requests("UploadAsset")) == QUICK.attempts


async def test_empty_and_missing_files_are_refused_before_any_call(
    client: AsyncClient, fake: FakeGateway, tmp_path: Path
) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(InvalidRequest, match=r"empty\.png is empty"):
        await client.upload(tmp_path / "empty.png")
    with pytest.raises(FileNotFoundError):
        await client.upload(tmp_path / "missing.png")
    assert fake.calls == []


async def test_animate_uploads_and_sets_every_field_under_its_own_name(
    client: AsyncClient, fake: FakeGateway, movie: Path
) -> None:
    sent: list[str] = []
    generation = await client.animate(
        on_upload=lambda field, done, total: sent.append(field),
        reference_image=movie,
        pose_video=pb.Asset(name="assets/known"),
        prompt="a cat",
        seed=0,
        num_inference_steps=8,
        guidance_scale=1.0,
        solver="dpm++",
        width=832,
        height=480,
        size_mode="crop",
        frames_per_second=16,
        crf=0,
        model="tiny",
    )
    assert generation.name == NAME
    (request,) = fake.requests("CreateGeneration")
    assert request.animate == pb.AnimateTask(
        prompt="a cat", reference_image=asset(VIDEO).name, pose_video="assets/known"
    )
    assert request.sampling == pb.SamplingParameters(seed=0, num_inference_steps=8, guidance_scale=1.0, solver="dpm++")
    assert request.output == pb.OutputParameters(
        width=832, height=480, size_mode=pb.SIZE_MODE_CROP, frames_per_second=16, crf=0
    )
    assert request.model == "tiny"
    assert set(sent) == {"reference_image"}


async def test_create_is_repeated_under_one_request_id(client: AsyncClient, fake: FakeGateway) -> None:
    fake.failures["CreateGeneration"] = [NotReady("not yet")]
    await client.create(pb.CreateGenerationRequest())
    first, second = fake.requests("CreateGeneration")
    assert first.request_id == second.request_id != ""
    await client.create(pb.CreateGenerationRequest(request_id="mine"))
    assert fake.requests("CreateGeneration")[2].request_id == "mine"


@pytest.mark.parametrize("error", [Busy("full", retry_after_s=5), OutOfMemory("large"), Conflict("other")])
async def test_what_waiting_does_not_help_is_not_repeated(
    client: AsyncClient, fake: FakeGateway, error: Exception
) -> None:
    assert isinstance(error, (Busy, OutOfMemory, Conflict))
    fake.failures["CreateGeneration"] = [error]
    with pytest.raises(type(error), match=error.message):
        await client.create(pb.CreateGenerationRequest())
    assert len(fake.requests("CreateGeneration")) == 1


async def test_delete_is_tried_once(client: AsyncClient, fake: FakeGateway) -> None:
    fake.failures["DeleteGeneration"] = [NotReady("lost")]
    with pytest.raises(NotReady):
        await client.delete(NAME)
    assert len(fake.requests("DeleteGeneration")) == 1


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("seed", -1, "sampling.seed"),
        ("num_inference_steps", "many", "sampling.num_inference_steps"),
        ("num_frames", 10**10, "output.num_frames"),
        ("size_mode", "stretch", "output.size_mode"),
        ("priority", 1.5, "priority"),
        ("people", -1, "animate.people"),
    ],
)
def test_value_that_cannot_be_sent_is_named_by_its_field(name: str, value: object, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        animate_request({"reference_image": "a.png", name: value})  # type: ignore[misc]  # wrong on purpose
    assert caught.value.violations[0][0] == field
    assert repr(value) in caught.value.message


def test_two_motions_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest) as caught:
        animate_request({"reference_image": "a.png", "pose_video": "b.mp4", "driving_video": "c.mp4"})
    assert caught.value.violations[0][0] == "animate.driving_video"


async def test_what_is_wrong_with_a_file_is_said_of_its_field(
    client: AsyncClient, fake: FakeGateway, movie: Path
) -> None:
    fake.failures["UploadAsset"] = [InvalidRequest(("size_bytes", "must be at most 10"))]
    with pytest.raises(InvalidRequest) as caught:
        await client.animate(reference_image=movie)
    assert caught.value.violations == (("animate.reference_image", "must be at most 10"),)
    assert fake.requests("CreateGeneration") == []


async def test_watch_gives_each_event_once_across_broken_streams(client: AsyncClient, fake: FakeGateway) -> None:
    fake.succeed()
    fake.break_watch_after = [1, 1, 0, 1, 1, 1]
    sequences = [event.sequence async for event in client.watch(NAME)]
    assert sequences == [1, 2, 3, 4, 5, 6]
    assert [request.after_sequence for request in fake.requests("WatchGeneration")] == [0, 1, 2, 2, 3, 4, 5]


async def test_watch_survives_a_restart_of_the_gateway(client: AsyncClient, gateway: GatewayThread) -> None:
    fake = gateway.fake
    fake.succeed()
    ending = fake.events.pop()
    fake.hold_watch = True
    received = []
    async with aclosing(client.watch(NAME)) as events:
        async for event in events:
            received.append(event.sequence)
            if event.sequence == len(fake.events) and fake.hold_watch:
                await asyncio.to_thread(gateway.stop)
                fake.hold_watch = False
                fake.events.append(ending)
                await asyncio.to_thread(gateway.start)
    assert received == [1, 2, 3, 4, 5, 6]


async def test_watch_goes_on_when_a_stream_ends_before_the_generation(client: AsyncClient, fake: FakeGateway) -> None:
    fake.succeed()
    fake.generation.state = pb.GENERATION_STATE_RUNNING
    fake.break_watch_after, fake.end_watch_quietly = [2], True
    assert [event.sequence async for event in client.watch(NAME)] == [1, 2, 3, 4, 5, 6]


async def test_watch_after_the_last_event_ends_at_once(client: AsyncClient, fake: FakeGateway) -> None:
    fake.succeed()
    assert [event async for event in client.watch(NAME, after_sequence=6)] == []
    assert len(fake.requests("WatchGeneration")) == 1


async def test_watch_gives_up_after_failures_in_a_row(gateway: GatewayThread, fake: FakeGateway) -> None:
    fake.succeed()
    fake.break_watch_after = [1] + [0] * 20
    # on a busy machine a stream that breaks off at once may take as long as one that was held does with QUICK
    retry = replace(QUICK, longest_wait_s=30.0)
    async with AsyncClient(gateway.address, retry=retry, call_timeout_s=5.0) as client:
        with pytest.raises(NotReady, match="broken off"):
            async for _ in client.watch(NAME):
                pass
    assert len(fake.requests("WatchGeneration")) == QUICK.attempts


async def test_streams_that_hold_for_long_are_no_failures(gateway: GatewayThread) -> None:
    gateway.fake.events, gateway.fake.hold_watch = [stage_event("text", 0, 1)], True
    async with AsyncClient(gateway.address, retry=QUICK, stream_timeout_s=0.1) as client:
        with pytest.raises(DeadlineExceeded, match="has not ended within"):
            await client.wait(NAME, timeout_s=1.5)
    assert len(gateway.fake.requests("WatchGeneration")) > QUICK.attempts


async def test_watch_that_is_left_ends_its_stream(client: AsyncClient, fake: FakeGateway) -> None:
    fake.succeed()
    async with aclosing(client.watch(NAME)) as events:
        async for _ in events:
            break
    assert (await client.get(NAME)).name == NAME


async def test_wait_gives_the_generation_or_raises_what_it_failed_with(client: AsyncClient, fake: FakeGateway) -> None:
    fake.succeed()
    assert (await client.wait(NAME)).video == asset(VIDEO)
    fake.generation.state = pb.GENERATION_STATE_FAILED
    fake.generation.error.CopyFrom(
        pb.GenerationError(
            status="RESOURCE_EXHAUSTED", reason="GPU_OUT_OF_MEMORY", message="needs 90 GB", stage="denoiser"
        )
    )
    with pytest.raises(OutOfMemory, match="needs 90 GB") as caught:
        await client.wait(NAME)
    assert (caught.value.stage, caught.value.reason) == ("denoiser", "GPU_OUT_OF_MEMORY")


def test_how_a_generation_ended_is_an_error_of_its_kind() -> None:
    bad = pb.GenerationError(status="INVALID_ARGUMENT", message="must be 4k + 1", field="output.num_frames")
    with pytest.raises(InvalidRequest) as caught:
        succeeded(pb.Generation(state=pb.GENERATION_STATE_FAILED, error=bad))
    assert caught.value.violations == (("output.num_frames", "must be 4k + 1"),)
    with pytest.raises(StageBroken):
        succeeded(pb.Generation(state=pb.GENERATION_STATE_FAILED, error=pb.GenerationError(status="new")))
    with pytest.raises(Cancelled):
        succeeded(pb.Generation(state=pb.GENERATION_STATE_CANCELLED))
    with pytest.raises(WrongState):
        succeeded(pb.Generation(state=pb.GENERATION_STATE_RUNNING))


async def test_download_goes_on_where_it_broke_off(client: AsyncClient, fake: FakeGateway, tmp_path: Path) -> None:
    fake.assets[asset(VIDEO).name] = VIDEO
    fake.break_download_at = [300_000]
    seen: list[tuple[int, int]] = []
    await client.download(
        asset(VIDEO), tmp_path / "out.mp4", on_progress=lambda done, total: seen.append((done, total))
    )
    assert (tmp_path / "out.mp4").read_bytes() == VIDEO
    first, second = fake.requests("DownloadAsset")
    assert first.offset_bytes == 0
    assert 300_000 <= second.offset_bytes < len(VIDEO)
    assert seen[-1] == (len(VIDEO), len(VIDEO))


async def test_damaged_download_is_an_error_and_leaves_what_was_there(
    client: AsyncClient, fake: FakeGateway, tmp_path: Path
) -> None:
    fake.assets[asset(VIDEO).name], fake.damaged = VIDEO, True
    (tmp_path / "out.mp4").write_bytes(b"old")
    with pytest.raises(StageBroken, match="arrived damaged") as caught:
        await client.download(asset(VIDEO).name, tmp_path / "out.mp4")
    assert caught.value.reason == CHECKSUM_MISMATCH
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old"


async def test_list_reads_every_page_with_the_same_filter(client: AsyncClient, fake: FakeGateway) -> None:
    fake.pages = [[pb.Generation(name="generations/2")], [pb.Generation(name="generations/1")]]
    names = [found.name async for found in client.list(states=[pb.GENERATION_STATE_RUNNING], page_size=1)]
    assert names == ["generations/2", "generations/1"]
    assert all(request.states == [pb.GENERATION_STATE_RUNNING] for request in fake.requests("ListGenerations"))


async def test_errors_of_the_gateway_keep_their_type(client: AsyncClient, fake: FakeGateway) -> None:
    fake.failures["GetGeneration"] = [NotFound("there is no generations/9")]
    with pytest.raises(NotFound, match=r"there is no generations/9"):
        await client.get("generations/9")


async def test_address_without_a_gateway_is_told_at_once_by_connect(gateway: GatewayThread) -> None:
    gateway.stop()
    async with AsyncClient(gateway.address, retry=QUICK) as client:
        begun = time.monotonic()
        with pytest.raises(NotReady, match="no gateway answers at") as caught:
            await client.connect()
        assert caught.value.reason == UNREACHABLE
        assert time.monotonic() - begun < 1.0
        with pytest.raises(NotReady, match="no gateway answers at") as caught:
            await client.get(NAME)
        assert caught.value.reason == UNREACHABLE
    gateway.start()


async def test_call_that_is_not_answered_ends_at_its_deadline(gateway: GatewayThread) -> None:
    gateway.fake.hold_create = True
    async with AsyncClient(gateway.address, retry=QUICK, call_timeout_s=0.1) as client:
        with pytest.raises(DeadlineExceeded):
            await client.create(pb.CreateGenerationRequest())
    assert len(gateway.fake.requests("CreateGeneration")) == 1


def test_client_without_an_event_loop_has_the_same_verbs(gateway: GatewayThread, movie: Path, tmp_path: Path) -> None:
    fake = gateway.fake
    fake.succeed()
    fake.pages = [[fake.generation]]
    with Client(gateway.address, retry=QUICK) as client:
        generation = client.animate(reference_image=movie, pose_video=movie, seed=7)
        assert [event.sequence for event in client.watch(generation.name)] == [1, 2, 3, 4, 5, 6]
        client.download(client.wait(generation.name).video, tmp_path / "out.mp4")
        assert [found.name for found in client.list()] == [NAME]
        assert client.status().version == "1.2"
        assert client.cancel(NAME).state == pb.GENERATION_STATE_SUCCEEDED
        fake.failures["GetGeneration"] = [NotFound("gone")]
        with pytest.raises(NotFound, match="gone"):
            client.get(NAME)
    assert (tmp_path / "out.mp4").read_bytes() == VIDEO
    verbs = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert verbs == {name for name in vars(Client) if not name.startswith("_")}


def test_leaving_a_watch_leaves_the_client_usable(gateway: GatewayThread) -> None:
    gateway.fake.succeed()
    gateway.fake.events.pop()
    gateway.fake.hold_watch = True
    threads = threading.active_count()
    with Client(gateway.address, retry=QUICK) as client:
        for event in client.watch(NAME):
            if event.sequence == 3:
                break
        assert client.get(NAME).name == NAME
    assert threading.active_count() <= threads
