"""Removes what is old: events, generations with their videos, files that nothing names any longer, unfinished uploads."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass

from bunraku.errors import NotReady
from gateway.assets import AssetStore
from gateway.callers.ownership import AssetOwners
from gateway.callers.quotas import remove_old_usage
from gateway.jobs.store import CLEANED_AT_ONCE, JobStore

_log = logging.getLogger(__name__)
_INTERVAL_S = 3600.0
_STALE_UPLOAD_S = 24 * 3600.0


@dataclass(frozen=True)
class Ages:
    """How long things are kept; 0: for ever.

    Attributes:
        events_s: of a generation, from its end.
        generations_s: from their end, with their videos.
        assets_s: that no generation names, from when they were stored.
    """

    events_s: float
    generations_s: float
    assets_s: float


async def keep_clean(store: JobStore, assets: AssetStore, ages: Ages) -> None:
    """Cleans once an hour, for ever."""
    while True:
        with suppress(OSError, NotReady):  # the next time, then
            await clean(store, assets, ages)
        await asyncio.sleep(_INTERVAL_S)


async def clean(store: JobStore, assets: AssetStore, ages: Ages) -> None:
    """Removes what is older than it may become, in portions that nobody waits for long."""
    await assets.remove_stale_uploads(_STALE_UPLOAD_S)
    async with store.database.writing() as connection:
        await remove_old_usage(connection)
    now_us = int(time.time() * 1e6)
    if ages.events_s:
        while await store.delete_old_events(now_us - int(ages.events_s * 1e6)) == CLEANED_AT_ONCE:
            pass
    if ages.generations_s:
        deleted = CLEANED_AT_ONCE
        while deleted == CLEANED_AT_ONCE:
            deleted, videos = await store.delete_old(now_us - int(ages.generations_s * 1e6))
            for video in videos:
                await assets.delete(video)
    if ages.assets_s:
        # looked for before what is used: what a generation that comes meanwhile names is younger
        old = await assets.older_than(ages.assets_s)
        unused = set(old) - await store.named_assets() if old else set()
        for each in unused:
            await assets.delete(each)
        await AssetOwners(store.database).forget(unused)
        if unused:
            _log.info("removed %d files that no generation names", len(unused))
