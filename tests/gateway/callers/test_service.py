"""A gateway with two callers over real gRPC: what each sees, may do and may take; files by URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from bunraku.client import AsyncClient
from bunraku.errors import Busy, Conflict, InvalidRequest, NotFound, PermissionDenied, Unauthenticated
from bunraku.v1 import gateway_pb2 as pb
from bunraku.v1 import gateway_pb2_grpc
from gateway.assets import AssetStore
from gateway.callers.authentication import Authentication
from gateway.callers.identity import CallerLimits, Scope
from gateway.callers.keys import DEFAULT_SCOPES, KeyStore
from gateway.fetch import Fetcher, FetchLimits
from gateway.jobs.job import QUEUED, SUCCEEDED
from gateway.jobs.store import JobStore
from gateway.jobs.tables import GENERATIONS
from gateway.requests import ModelSpec
from gateway.service import GatewayService
from gateway.stages import connect
from runtime.bundles import load_bundle
from runtime.server import build_server
from tests.system.media import write_picture, write_pose_video

TINY = Path(__file__).resolve().parent.parent.parent.parent / "bundles" / "tiny"
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
UNUSED = {stage: ["127.0.0.1:1"] for stage in ("encoder", "pose", "denoiser", "vae")}  # nothing is worked on here


class Files(Fetcher):
    """Fetches from a directory, as if it was the Internet."""

    def __init__(self, directory: Path) -> None:
        super().__init__(FetchLimits())
        self._directory = directory
        self.fetched: list[tuple[str, str]] = []

    async def fetch(self, url: str, path: Path, field: str) -> str:
        self.fetched.append((url, field))
        source = self._directory / url.rpartition("/")[2]
        if not source.exists():
            raise InvalidRequest((field, "answers with status 404"))
        await asyncio.to_thread(path.write_bytes, source.read_bytes())
        return source.name


class Gateway:
    """A gateway without a worker, so that what is queued stays queued."""

    def __init__(self, store: JobStore, address: str, fetcher: Files, directory: Path) -> None:
        self.store, self.address, self.fetcher = store, address, fetcher
        self.keys = KeyStore(store.database)
        self.picture, self.pose_video = directory / "ref.png", directory / "pose.mp4"
        self._clients = AsyncExitStack()

    async def client(
        self, name: str, *, scopes: tuple[Scope, ...] = DEFAULT_SCOPES, limits: CallerLimits | None = None
    ) -> AsyncClient:
        """A client with a key of its own."""
        _, key = await self.keys.create(name, scopes, limits=limits or CallerLimits())
        return await self._clients.enter_async_context(AsyncClient(self.address, api_key=key))

    async def animate(self, client: AsyncClient, **arguments: object) -> pb.Generation:
        return await client.animate(
            reference_image=self.picture,
            pose_video=self.pose_video,
            **{**SMALL, **arguments},  # type: ignore[arg-type]
        )

    async def succeed(self) -> pb.Asset:
        """Ends the oldest generation that waits with a video."""
        job = await self.store.claims.claim_next()
        assert job is not None
        video = pb.Asset(name="assets/" + "f" * 64, sha256="f" * 64, size_bytes=1)
        async with self.store.database.writing() as connection:
            used = sa.update(GENERATIONS).where(GENERATIONS.c.id == job.id)
            await connection.execute(used.values(gpu_seconds=50.0))
        assert (await self.store.claims.finish(job, video=video)).state == SUCCEEDED
        return video

    async def close(self) -> None:
        await self._clients.aclose()


@asynccontextmanager
async def serving(directory: Path, database: Path) -> AsyncIterator[Gateway]:
    write_picture(directory / "ref.png", 32, 32)
    write_pose_video(directory / "pose.mp4", 9, 32, 32)
    store, assets = JobStore(database), AssetStore(directory / "assets", reserve_bytes=0)
    await store.open()
    stages, fetcher = connect(UNUSED, None), Files(directory)
    server = build_server(Authentication(KeyStore(store.database), remembered_s=0))
    models = [ModelSpec.from_bundle(load_bundle(TINY))]
    service = GatewayService(store, assets, stages, models, 60, fetcher)
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    running = Gateway(store, f"127.0.0.1:{port}", fetcher, directory)
    try:
        yield running
    finally:
        await running.close()
        await server.stop(None)
        await stages.close()
        await store.close()


@pytest.fixture
async def gateway(tmp_path: Path, empty_sqlite: Path) -> AsyncIterator[Gateway]:
    database = tmp_path / "gateway.sqlite"
    database.write_bytes(empty_sqlite.read_bytes())  # noqa: ASYNC240  # before anything runs
    async with serving(tmp_path, database) as running:
        yield running


async def names(client: AsyncClient) -> list[str]:
    return [generation.name async for generation in client.list()]


async def test_callers_see_their_own_generations_and_an_administrator_all(gateway: Gateway) -> None:
    studio, rival = await gateway.client("studio"), await gateway.client("rival")
    operator = await gateway.client("operator", scopes=(Scope.ADMIN,))
    mine = (await gateway.animate(studio)).name
    yours = (await gateway.animate(rival)).name
    assert await names(studio) == [mine]
    assert await names(rival) == [yours]
    assert await names(operator) == [yours, mine]
    with pytest.raises(NotFound):
        await rival.get(mine)
    with pytest.raises(NotFound):
        await rival.cancel(mine)
    with pytest.raises(NotFound):
        await rival.delete(mine)
    with pytest.raises(NotFound):
        async for _ in rival.watch(mine):
            pass
    assert (await studio.get(mine)).state == QUEUED
    assert (await operator.cancel(mine)).name == mine


async def test_two_keys_of_one_caller_see_the_same(gateway: Gateway) -> None:
    first, second = await gateway.client("studio"), await gateway.client("studio")
    generation = await gateway.animate(first)
    assert (await second.get(generation.name)).name == generation.name


async def test_request_ids_of_two_callers_do_not_meet(gateway: Gateway) -> None:
    studio, rival = await gateway.client("studio"), await gateway.client("rival")
    mine = await gateway.animate(studio, request_id="once", seed=1)
    yours = await gateway.animate(rival, request_id="once", seed=2)
    assert mine.name != yours.name
    assert (await gateway.animate(studio, request_id="once", seed=1)).name == mine.name
    with pytest.raises(Conflict):
        await gateway.animate(rival, request_id="once", seed=1)


async def test_a_file_must_be_sent_to_be_used(gateway: Gateway, tmp_path: Path) -> None:
    studio, rival = await gateway.client("studio"), await gateway.client("rival")
    picture, video = await studio.upload(gateway.picture), await studio.upload(gateway.pose_video)
    with pytest.raises(NotFound):
        await rival.download(picture, tmp_path / "stolen.png")
    with pytest.raises(InvalidRequest) as raised:
        await rival.animate(reference_image=picture, pose_video=video)
    assert [field for field, _ in raised.value.violations] == ["animate.reference_image", "animate.pose_video"]
    assert (await rival.upload(gateway.picture)).name == picture.name  # all of it, as it does not find it there
    await rival.download(picture, tmp_path / "own.png")


async def test_what_has_arrived_of_an_upload_is_its_callers(gateway: Gateway) -> None:
    studio, rival = await gateway.client("studio"), await gateway.client("rival")

    async def parts() -> AsyncIterator[pb.UploadAssetRequest]:
        yield pb.UploadAssetRequest(metadata=pb.UploadMetadata(upload_id="u1", filename="a", size_bytes=100))
        yield pb.UploadAssetRequest(data=bytes(60))

    # it ends too early, and can be gone on with
    with pytest.raises(InvalidRequest), studio._translated():
        await studio._stub.UploadAsset(parts(), metadata=studio._metadata)
    assert await studio._received("u1") == 60
    assert await rival._received("u1") == 0


async def test_the_video_of_a_generation_is_its_callers(gateway: Gateway) -> None:
    studio, rival = await gateway.client("studio"), await gateway.client("rival")
    await gateway.animate(studio)
    video = await gateway.succeed()
    with pytest.raises(NotFound, match="there is no assets/f"):
        await rival.download(video, Path("never"))
    # the studio comes through to the store, which has no such file here
    with pytest.raises(NotFound, match="there is no assets/f"):
        await studio.download(video, Path("never"))


async def test_scopes_limit_a_key(gateway: Gateway) -> None:
    reader = await gateway.client("studio", scopes=(Scope.READ,))
    with pytest.raises(PermissionDenied):
        await reader.upload(gateway.picture)
    with pytest.raises(PermissionDenied):
        await reader.status()
    await reader.models()
    async with AsyncClient(gateway.address) as nobody:
        with pytest.raises(Unauthenticated):
            await nobody.models()


async def test_ten_creates_at_once_do_not_exceed_the_active_generations(gateway: Gateway) -> None:
    client = await gateway.client("studio", limits=CallerLimits(max_active_generations=3))
    request = await client.prepare(reference_image=gateway.picture, pose_video=gateway.pose_video, height=32, width=32)

    async def create(seed: int) -> str:
        one = pb.CreateGenerationRequest()
        one.CopyFrom(request)
        one.request_id, one.sampling.seed = f"r{seed}", seed
        try:
            await client.create(one)
        except Busy as error:
            return error.reason
        return "CREATED"

    outcomes = await asyncio.gather(*map(create, range(10)))
    assert sorted(outcomes) == ["CREATED"] * 3 + ["TOO_MANY_GENERATIONS"] * 7
    assert len(await names(client)) == 3
    # a repeated call is no further generation
    assert (await client.create(next_of(request, await client.get((await names(client))[0])))).state == QUEUED


def next_of(request: pb.CreateGenerationRequest, generation: pb.Generation) -> pb.CreateGenerationRequest:
    """The call that made a generation, again."""
    again = pb.CreateGenerationRequest()
    again.CopyFrom(request)
    again.request_id, again.sampling.seed = generation.request.request_id, generation.request.sampling.seed
    return again


async def test_gpu_seconds_are_counted_when_a_generation_ends_and_deleting_gives_nothing_back(gateway: Gateway) -> None:
    client = await gateway.client("studio", limits=CallerLimits(gpu_seconds_per_day=50))
    generation = await gateway.animate(client)
    await gateway.succeed()  # takes 50
    for _ in range(2):
        with pytest.raises(Busy) as raised:
            await gateway.animate(client, seed=2)
        assert raised.value.reason == "GPU_QUOTA_SPENT"
        assert raised.value.retry_after_s
        with_video = [g.name async for g in client.list()]
        if with_video:
            await client.delete(generation.name)


# Files by URL


async def test_files_by_url_are_fetched_and_become_the_callers_assets(gateway: Gateway, tmp_path: Path) -> None:
    studio, rival = await gateway.client("studio"), await gateway.client("rival")
    urls = {"reference_image": "https://media.example/ref.png", "pose_video": "HTTPS://media.example/pose.mp4"}
    generation = await studio.animate(**urls, height=32, width=32)  # type: ignore[arg-type]
    used = generation.request.animate
    assert used.reference_image == (await studio.upload(gateway.picture)).name
    await studio.download(used.pose_video, tmp_path / "back.mp4")
    with pytest.raises(NotFound):
        await rival.download(used.pose_video, tmp_path / "stolen.mp4")
    assert sorted(gateway.fetcher.fetched) == sorted((url, f"animate.{field}") for field, url in urls.items())


async def test_a_repeated_call_fetches_nothing_again(gateway: Gateway) -> None:
    client = await gateway.client("studio")
    arguments = {"reference_image": "https://media.example/ref.png", "request_id": "once", "seed": 1}
    request = await client.prepare(pose_video=gateway.pose_video, **arguments)  # type: ignore[arg-type]
    first = await client.create(request)
    assert (await client.create(request)).name == first.name
    assert len(gateway.fetcher.fetched) == 1


async def test_what_is_wrong_otherwise_is_said_before_anything_is_fetched(gateway: Gateway) -> None:
    client = await gateway.client("studio")
    with pytest.raises(InvalidRequest):
        await client.animate(
            reference_image="https://media.example/ref.png", pose_video=gateway.pose_video, num_inference_steps=500
        )
    assert gateway.fetcher.fetched == []


async def test_a_file_that_cannot_be_fetched_names_its_field(gateway: Gateway) -> None:
    client = await gateway.client("studio")
    with pytest.raises(InvalidRequest) as raised:
        await client.animate(reference_image="https://media.example/none.png", pose_video=gateway.pose_video)
    assert raised.value.violations == (("animate.reference_image", "answers with status 404"),)


async def test_fetching_needs_the_scope_of_uploads(gateway: Gateway) -> None:
    whole = await gateway.client("studio")
    video = await whole.upload(gateway.pose_video)
    client = await gateway.client("studio", scopes=(Scope.GENERATE,))
    with pytest.raises(PermissionDenied):
        await client.animate(reference_image="https://media.example/ref.png", pose_video=video)
    assert gateway.fetcher.fetched == []
