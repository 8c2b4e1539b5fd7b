"""What is old goes: events, generations with their videos, files that nothing names; everything else stays."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from bunraku.errors import NotFound
from bunraku.v1 import gateway_pb2 as pb
from gateway.assets import AssetStore
from gateway.cleaning import Ages, clean
from gateway.jobs import store as store_module
from gateway.jobs.job import Job
from gateway.jobs.store import JobStore
from gateway.jobs.tables import GENERATIONS
from tests.gateway.jobs.jobs import animation, created, video

HOUR_S = 3600.0


@dataclass
class Kept:
    """What is to be cleaned."""

    store: JobStore
    assets: AssetStore
    directory: Path

    async def file(self, content: str, *, age_s: float = 0.0) -> pb.Asset:
        path = self.directory / content
        path.write_text(content)
        asset = await self.assets.put_file(path, content)
        when = time.time() - age_s
        os.utime(self.directory / "assets" / "objects" / asset.sha256[:2] / f"{asset.sha256}.json", (when, when))
        return asset

    async def ended(self, *, age_s: float, result: pb.Asset | None = None) -> Job:
        await created(self.store)
        job = await self.store.claims.finish(await self.store.claims.next_job(), video=result or video())
        end = int((time.time() - age_s) * 1e6)
        async with self.store.database.writing() as connection:
            await connection.execute(sa.update(GENERATIONS).where(GENERATIONS.c.id == job.id).values(end_time_us=end))
        return job

    async def is_there(self, asset: pb.Asset) -> bool:
        try:
            await self.assets.get(asset.sha256)
        except NotFound:
            return False
        return True


@pytest.fixture
async def kept(where: Path | str, tmp_path: Path) -> AsyncIterator[Kept]:
    store = JobStore(where)
    await store.open()
    yield Kept(store, AssetStore(tmp_path / "assets", reserve_bytes=0), tmp_path)
    await store.close()


async def test_events_go_before_their_generation(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CLEANED_AT_ONCE", 2)
    monkeypatch.setattr("gateway.cleaning.CLEANED_AT_ONCE", 2)
    old = [await kept.ended(age_s=2 * HOUR_S) for _ in range(5)]
    new, waiting = await kept.ended(age_s=0.5 * HOUR_S), await created(kept.store)
    await clean(kept.store, kept.assets, Ages(HOUR_S, 0, 0))
    for job in old:
        assert await kept.store.events_after(job.id) == []
        assert (await kept.store.get(job.id)).video == video()
        assert [event async for event in kept.store.watch(job.id, 0)] == []
    assert len(await kept.store.events_after(new.id)) == 3
    assert len(await kept.store.events_after(waiting.id)) == 1


async def test_old_generations_go_with_their_videos_and_free_their_request_ids(kept: Kept) -> None:
    old_video, shared, new_video = [await kept.file(name) for name in ("old", "shared", "new")]
    old = await kept.ended(age_s=2 * HOUR_S, result=old_video)
    await kept.ended(age_s=2 * HOUR_S, result=shared)
    newer = await kept.ended(age_s=0, result=shared)
    new = await kept.ended(age_s=0, result=new_video)
    await clean(kept.store, kept.assets, Ages(0, HOUR_S, 0))
    with pytest.raises(NotFound):
        await kept.store.get(old.id)
    assert {job.id for job in (await kept.store.list_jobs())[0]} == {newer.id, new.id}
    assert [await kept.is_there(asset) for asset in (old_video, shared, new_video)] == [False, True, True]


async def test_files_that_nothing_names_go_and_those_of_any_generation_stay(kept: Kept) -> None:
    orphan, young, named = await kept.file("a", age_s=9e9), await kept.file("b"), await kept.file("c", age_s=9e9)
    result = await kept.file("d", age_s=9e9)
    request = animation()
    request.animate.reference_image = named.name
    await kept.store.create(request, request_digest="d")
    await kept.store.claims.finish(await kept.store.claims.next_job(), video=result)
    await clean(kept.store, kept.assets, Ages(0, 0, HOUR_S))
    there = [await kept.is_there(asset) for asset in (orphan, young, named, result)]
    assert there == [False, True, True, True]


async def test_a_file_that_is_sent_again_is_young_again(kept: Kept) -> None:
    asset = await kept.file("a", age_s=9e9)
    path = kept.directory / "again"
    path.write_text("a")
    await kept.assets.put_file(path, "again")
    await clean(kept.store, kept.assets, Ages(0, 0, HOUR_S))
    assert await kept.is_there(asset)


async def test_zero_keeps_for_ever(kept: Kept) -> None:
    job, asset = await kept.ended(age_s=9e8), await kept.file("a", age_s=9e9)
    await clean(kept.store, kept.assets, Ages(0, 0, 0))
    assert len(await kept.store.events_after(job.id)) == 3
    assert await kept.is_there(asset)
