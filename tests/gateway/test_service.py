"""GatewayService and its worker over real gRPC, with stages that answer at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bunraku.client import AsyncClient
from bunraku.errors import Conflict, InvalidRequest, NotFound, NotReady, StageBroken, WrongState
from bunraku.v1 import gateway_pb2 as pb
from bunraku.v1 import gateway_pb2_grpc
from gateway.assets import AssetStore
from gateway.jobs.store import JobStore
from gateway.requests import ModelSpec
from gateway.service import GatewayService
from gateway.stages import connect
from gateway.worker import Worker, WorkerSettings
from runtime.bundles import load_bundle
from runtime.client import Retry
from runtime.server import build_server
from tests.gateway.fake_stages import FakeStages, serving
from tests.system.media import write_picture, write_pose_video

TINY = Path(__file__).resolve().parent.parent.parent / "bundles" / "tiny"
SUCCEEDED, FAILED, CANCELLED = pb.GENERATION_STATE_SUCCEEDED, pb.GENERATION_STATE_FAILED, pb.GENERATION_STATE_CANCELLED
QUEUED, RUNNING = pb.GENERATION_STATE_QUEUED, pb.GENERATION_STATE_RUNNING
AT_ONCE = Retry(attempts=2, first_wait_s=0.001, longest_wait_s=0.002)


@dataclass
class Gateway:
    """A gateway with its parts, in this process."""

    client: AsyncClient
    fake: FakeStages
    store: JobStore
    picture: Path
    pose_video: Path

    async def animate(self, **arguments: object) -> pb.Generation:
        sizes = {"height": 32, "width": 32, "num_inference_steps": 2}
        return await self.client.animate(
            reference_image=self.picture,
            pose_video=self.pose_video,
            **{**sizes, **arguments},  # type: ignore[arg-type]
        )

    async def ended(self, generation: pb.Generation) -> pb.Generation:
        async with asyncio.timeout(20):
            async for _ in self.client.watch(generation.name):
                pass
        return await self.client.get(generation.name)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    fake = FakeStages()  # type: ignore[abstract]  # the rpcs that are not there yet
    bundle = load_bundle(TINY)
    store, assets = JobStore(tmp_path / "jobs.sqlite"), AssetStore(tmp_path / "assets", reserve_bytes=0)
    await store.open()
    async with serving(fake) as addresses:
        stages = connect(addresses, None)
        settings = WorkerSettings(max_running=2, max_seconds=60, retry=AT_ONCE)
        working = asyncio.create_task(Worker(store, assets, stages, {bundle.name: bundle}, settings).run())
        server = build_server()
        service = GatewayService(store, assets, stages, [ModelSpec.from_bundle(bundle)], 60)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            picture = write_picture(tmp_path / "ref.png", 32, 32)
            yield Gateway(client, fake, store, picture, write_pose_video(tmp_path / "pose.mp4", 9, 32, 32))
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await server.stop(None)
        await stages.close()
        await store.close()


async def test_a_generation_succeeds_and_its_video_can_be_downloaded(gateway: Gateway, tmp_path: Path) -> None:
    generation = await gateway.ended(await gateway.animate(prompt="a dance", seed=11))
    assert generation.state == SUCCEEDED
    used = generation.request
    assert (used.model, used.sampling.seed, used.output.height, used.output.num_frames) == ("tiny", 11, 32, 9)
    assert used.output.frames_per_second == 12
    assert used.animate.negative_prompt  # the model's default
    await gateway.client.download(generation.video, tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").stat().st_size == generation.video.size_bytes


async def test_the_same_request_id_makes_one_generation(gateway: Gateway) -> None:
    first = await gateway.animate(request_id="once", seed=1)
    assert (await gateway.animate(request_id="once", seed=1)).name == first.name
    with pytest.raises(Conflict):
        await gateway.animate(request_id="once", seed=2)
    assert len([g async for g in gateway.client.list()]) == 1


async def test_a_repeated_call_is_answered_when_its_files_are_gone(gateway: Gateway, tmp_path: Path) -> None:
    arguments = await gateway.client.prepare(
        reference_image=gateway.picture, pose_video=gateway.pose_video, request_id="again", height=32, width=32
    )
    first = await gateway.client.create(arguments)
    for path in (tmp_path / "assets" / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    assert (await gateway.client.create(arguments)).name == first.name


async def test_a_stage_that_breaks_fails_the_generation_with_its_name(gateway: Gateway) -> None:
    gateway.fake.fail_next["Denoise"] = [StageBroken("NaN in latents", reason="LATENTS_NOT_FINITE", stage="denoiser")]
    generation = await gateway.ended(await gateway.animate())
    assert generation.state == FAILED
    error = generation.error
    assert (error.status, error.reason, error.stage) == ("INTERNAL", "LATENTS_NOT_FINITE", "denoiser")


async def test_a_stage_that_stays_away_fails_it_as_unavailable(gateway: Gateway) -> None:
    gateway.fake.fail_next["EncodeText"] = [NotReady("loading", stage="encoder")] * 5
    generation = await gateway.ended(await gateway.animate())
    assert (generation.error.status, generation.error.reason) == ("UNAVAILABLE", "STAGE_UNAVAILABLE")
    assert generation.error.stage == "encoder"
    assert "the encoder stage is not available" in generation.error.message


async def test_what_a_stage_finds_wrong_with_the_request_names_the_field(gateway: Gateway) -> None:
    gateway.fake.fail_next["FitPoseVideo"] = [InvalidRequest(("video", "is too dark"), stage="pose")]
    generation = await gateway.ended(await gateway.animate())
    assert (generation.error.status, generation.error.field) == ("INVALID_ARGUMENT", "video")


async def test_a_generation_that_takes_too_long_ends_and_frees_its_stage(gateway: Gateway) -> None:
    gateway.fake.pause = {"Denoise"}
    generation = await gateway.ended(await gateway.animate(timeout_seconds=1))
    assert generation.error.status == "DEADLINE_EXCEEDED"
    assert gateway.fake.running["Denoise"] == 0


async def test_cancel_stops_the_stage_before_the_generation_ends(gateway: Gateway) -> None:
    gateway.fake.pause = {"Denoise"}
    generation = await gateway.animate()
    while not gateway.fake.running["Denoise"]:
        await asyncio.sleep(0.01)
    await gateway.client.cancel(generation.name)
    assert (await gateway.ended(generation)).state == CANCELLED
    assert gateway.fake.running["Denoise"] == 0


async def test_what_waits_is_cancelled_at_once_and_never_begins(gateway: Gateway) -> None:
    gateway.fake.pause = {"Denoise"}
    running = [await gateway.animate(seed=seed) for seed in (1, 2)]
    waiting = await gateway.animate(seed=3)
    assert (await gateway.client.cancel(waiting.name)).state == CANCELLED
    gateway.fake.resume.set()
    for generation in running:
        assert (await gateway.ended(generation)).state == SUCCEEDED
    assert (await gateway.client.get(waiting.name)).attempts == 0


async def test_while_one_is_denoised_the_next_is_encoded(gateway: Gateway) -> None:
    gateway.fake.pause = {"Denoise"}
    first, second = [await gateway.animate(seed=seed) for seed in (1, 2)]
    async with asyncio.timeout(10):
        while len(gateway.fake.calls["EncodeText"]) < 2:
            await asyncio.sleep(0.01)
    gateway.fake.resume.set()
    assert (await gateway.ended(first)).state == (await gateway.ended(second)).state == SUCCEEDED


async def test_watching_again_goes_on_where_it_stopped(gateway: Gateway) -> None:
    generation = await gateway.ended(await gateway.animate())
    events = [event async for event in gateway.client.watch(generation.name)]
    rest = [event async for event in gateway.client.watch(generation.name, after_sequence=events[3].sequence)]
    assert [event.sequence for event in rest] == [event.sequence for event in events[4:]]


async def test_previews_come_when_asked_for(gateway: Gateway) -> None:
    generation = await gateway.animate(previews=True)
    await gateway.ended(generation)
    assert gateway.fake.calls["Denoise"][0].preview_every_steps == 1


async def test_delete_takes_what_has_ended_with_its_video(gateway: Gateway) -> None:
    gateway.fake.pause = {"Denoise"}
    generation = await gateway.animate()
    with pytest.raises(WrongState):
        await gateway.client.delete(generation.name)
    gateway.fake.resume.set()
    generation = await gateway.ended(generation)
    await gateway.client.delete(generation.name)
    with pytest.raises(NotFound):
        await gateway.client.get(generation.name)
    with pytest.raises(NotFound):
        await gateway.client.download(generation.video, Path("never"))


async def test_a_named_file_that_is_not_there_is_refused_by_field(gateway: Gateway) -> None:
    request = pb.CreateGenerationRequest(
        animate=pb.AnimateTask(reference_image="assets/" + "0" * 64, pose_video="assets/" + "1" * 64)
    )
    with pytest.raises(InvalidRequest) as raised:
        await gateway.client.create(request)
    assert [field for field, _ in raised.value.violations] == ["animate.reference_image", "animate.pose_video"]


async def test_models_and_status_are_told(gateway: Gateway) -> None:
    (model,) = await gateway.client.models()
    assert (model.name, model.task, model.default_sampling.solver) == ("tiny", "animate", "unipc")
    status = await gateway.client.status()
    assert {stage.stage for stage in status.stages} == {"encoder", "pose", "denoiser", "vae"}
    assert not any(stage.reachable for stage in status.stages)  # the fakes have no StageService
    assert all(stage.problem for stage in status.stages)
