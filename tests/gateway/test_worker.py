"""The worker at the edges of a claim: putting aside, handing back, losing it, deadlines; over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from bunraku.v1 import denoiser_pb2
from bunraku.v1 import gateway_pb2 as pb
from gateway.assets import AssetStore
from gateway.jobs.job import FAILED, QUEUED, RUNNING, SUCCEEDED, Job
from gateway.jobs.store import JobStore
from gateway.jobs.tables import COSTS, GENERATIONS
from gateway.media import read_metadata
from gateway.stages import connect
from gateway.worker import Worker, WorkerSettings
from runtime.bundles import load_bundle
from tests.gateway.fake_stages import FakeStages, serving
from tests.system.media import write_picture, write_pose_video

TINY = Path(__file__).resolve().parent.parent.parent / "bundles" / "tiny"


@dataclass
class Work:
    """A worker with its parts, in this process."""

    fake: FakeStages
    store: JobStore
    assets: AssetStore
    worker: Worker
    working: asyncio.Task[None]
    picture: pb.Asset
    pose_video: pb.Asset

    async def create(self, *, priority: int = 0, timeout_s: float | None = None, **sampled: Any) -> Job:
        """sampled: further fields of SamplingParameters."""
        request = pb.CreateGenerationRequest(model="tiny", priority=priority)
        animate, sampling, output = request.animate, request.sampling, request.output
        animate.reference_image, animate.pose_video = self.picture.name, self.pose_video.name
        animate.preset, animate.window_overlap_frames, animate.color_correction_strength = "wan2gp", 5, 0.0
        sampling.seed, sampling.num_inference_steps, sampling.guidance_scale, sampling.shift = 1, 2, 1.0, 3.0
        sampling.MergeFrom(pb.SamplingParameters(**sampled))
        sampling.solver, output.size_mode, output.crf = "euler", pb.SIZE_MODE_BUDGET, 20
        output.height, output.width, output.num_frames, output.frames_per_second = 32, 32, 9, 12.0
        return await self.store.create(request, request_digest="d", timeout_s=timeout_s)

    async def ended(self, job: Job) -> Job:
        async with asyncio.timeout(20), aclosing(self.store.watch(job.id, 0)) as events:
            async for _ in events:
                pass
        return await self.store.get(job.id)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def denoising(self, count: int = 1) -> None:
        await self.until(lambda: self.fake.running["Denoise"] == count)

    async def stop(self) -> None:
        self.working.cancel()
        await asyncio.gather(self.working, return_exceptions=True)


@pytest.fixture
async def work(tmp_path: Path, empty_sqlite: Path) -> AsyncIterator[Work]:
    fake = FakeStages()  # type: ignore[abstract]  # the rpcs that are not there yet
    bundle = load_bundle(TINY)
    store, assets = JobStore(tmp_path / "jobs.sqlite", poll_s=0.1), AssetStore(tmp_path / "assets", reserve_bytes=0)
    await store.open()
    async with serving(fake) as addresses:
        stages = connect(addresses, None)
        worker = Worker(store, assets, stages, {bundle.name: bundle}, WorkerSettings(max_running=1, max_seconds=60))
        picture = await assets.put_file(write_picture(tmp_path / "ref.png", 32, 32), "ref.png")
        pose = await assets.put_file(write_pose_video(tmp_path / "pose.mp4", 9, 32, 32), "pose.mp4")
        working = Work(fake, store, assets, worker, asyncio.create_task(worker.run()), picture, pose)
        yield working
        await working.stop()
        await stages.close()
        await store.close()


async def test_a_low_one_that_is_denoised_is_put_aside_for_an_urgent_one_and_goes_on_afterwards(work: Work) -> None:
    work.fake.pause = {"Denoise"}
    low = await work.create()
    await work.denoising()
    high = await work.create(priority=9)
    await work.until(lambda: len(work.fake.calls["Denoise"]) == 2)
    work.fake.resume.set()
    ends = [await work.ended(job) for job in (high, low)]
    assert [end.state for end in ends] == [SUCCEEDED, SUCCEEDED]
    assert [end.attempts for end in ends] == [1, 2]
    assert ends[0].end_time_us is not None
    assert ends[1].end_time_us is not None
    assert ends[0].end_time_us < ends[1].end_time_us
    states = [event.generation.state for event in await work.store.events_after(low.id) if event.HasField("generation")]
    assert states == [QUEUED, RUNNING, QUEUED, RUNNING, SUCCEEDED]


async def test_what_waits_is_begun_when_another_ends_and_not_at_the_next_poll(work: Work) -> None:
    work.store.claims._poll_s = 60.0
    work.fake.pause = {"Denoise"}
    first = await work.create()
    await work.denoising()
    second = await work.create()
    work.fake.pause = set()
    work.fake.resume.set()
    assert [(await work.ended(job)).state for job in (first, second)] == [SUCCEEDED, SUCCEEDED]


async def test_one_of_the_same_priority_waits_for_its_turn(work: Work) -> None:
    work.fake.pause = {"Denoise"}
    first = await work.create(priority=5)
    await work.denoising()
    second = await work.create(priority=5)
    await asyncio.sleep(0.3)
    assert len(work.fake.calls["Denoise"]) == 1
    work.fake.resume.set()
    assert [(await work.ended(job)).attempts for job in (first, second)] == [1, 1]


async def test_a_worker_that_stops_ends_its_calls_and_hands_its_generations_back(work: Work) -> None:
    work.fake.pause = {"Denoise"}
    job = await work.create()
    await work.denoising()
    await work.stop()
    back = await work.store.get(job.id)
    assert (back.state, back.claim_token) == (QUEUED, "")
    await work.until(lambda: work.fake.running["Denoise"] == 0)


async def test_work_that_another_gateway_has_taken_over_is_dropped_without_a_word(work: Work) -> None:
    work.fake.pause = {"Denoise"}
    job = await work.create()
    await work.denoising()
    async with work.store.database.writing() as connection:
        taken = {"claim_token": "f" * 32, "owner": "somebody else"}
        await connection.execute(sa.update(GENERATIONS).where(GENERATIONS.c.id == job.id).values(taken))
    await work.until(lambda: work.fake.running["Denoise"] == 0)
    assert (await work.store.get(job.id)).claim_token == "f" * 32
    other = await work.create()  # the worker goes on with others
    work.fake.resume.set()
    assert (await work.ended(other)).state == SUCCEEDED


async def test_how_it_was_sampled_reaches_the_denoiser_and_is_told_by_the_generation_and_its_file(work: Work) -> None:
    work.fake.forward_passes = denoiser_pb2.ForwardPasses(computed=7, reused=4, omitted=1)
    fields: dict[str, Any] = {
        "step_cache": "mag",
        "step_cache_speedup": 1.5,
        "step_cache_start": 0.25,
        "guidance_start": 0.125,
        "guidance_end": 0.5,
        "cfg_zero_star": True,
        "zero_init_steps": 1,
    }
    ended = await work.ended(await work.create(**fields))
    [asked] = work.fake.calls["Denoise"]
    assert asked.step_cache == denoiser_pb2.STEP_CACHE_MAG
    assert {name: getattr(asked, name) for name in fields if name != "step_cache"} | {"step_cache": "mag"} == fields
    assert ended.progress.forward_passes == work.fake.forward_passes
    assert ended.video is not None
    metadata: dict[str, Any] = read_metadata(await work.assets.path(ended.video.sha256), "video")
    assert metadata["forward_passes"] == {"computed": 7, "reused": 4, "omitted": 1}
    assert metadata["request"]["sampling"].items() >= fields.items()


async def test_what_is_not_asked_for_is_not_sent_and_not_told(work: Work) -> None:
    ended = await work.ended(await work.create())
    [asked] = work.fake.calls["Denoise"]
    assert not any(asked.HasField(name) for name in ("step_cache_speedup", "guidance_end"))
    assert (asked.step_cache, asked.guidance_start, asked.cfg_zero_star, asked.zero_init_steps) == (0, 0, False, 0)
    assert not ended.progress.HasField("forward_passes")
    assert ended.video is not None
    assert "forward_passes" not in read_metadata(await work.assets.path(ended.video.sha256), "video")


async def test_what_waited_past_its_deadline_never_reaches_a_stage(work: Work) -> None:
    work.fake.pause = {"Denoise"}
    first = await work.create()
    await work.denoising()
    late = await work.create(timeout_s=0.2)
    failed = await work.ended(late)
    assert failed.state == FAILED
    assert failed.error is not None
    assert failed.error.status == "DEADLINE_EXCEEDED"
    work.fake.resume.set()
    await work.ended(first)
    assert len(work.fake.calls["EncodeText"]) == 1


async def test_a_watcher_that_leaves_changes_nothing_and_leaves_nothing(work: Work) -> None:
    work.fake.pause = {"Denoise"}
    job = await work.create()
    await work.denoising()
    watching = asyncio.create_task(work.ended(job))
    await asyncio.sleep(0.1)
    watching.cancel()
    await asyncio.wait([watching])
    assert not work.store._watching._feeds
    work.fake.resume.set()
    assert (await work.ended(job)).state == SUCCEEDED


async def test_what_it_took_is_kept_for_the_share_of_its_caller_and_for_estimates(work: Work) -> None:
    done = await work.ended(await work.create())
    assert 0 < done.gpu_seconds < 10
    async with work.store.database.reading() as connection:
        cost = (await connection.execute(sa.select(COSTS))).one()
    assert 0 < cost.step_seconds < 5
    again = await work.create()
    assert again.estimated_seconds == pytest.approx(2 * cost.step_seconds + cost.other_seconds)
    await work.ended(again)
