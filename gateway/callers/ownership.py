"""Which files a caller sees: those that it sent itself, and the videos of its own generations.

The id of a file is the digest of its content, so two callers who send the same bytes share one file. Knowing the id is
not enough to read it: a caller must have sent all of it once. A file that a caller does not see is one that is not
there.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from bunraku.errors import NotFound
from gateway.callers.identity import calling
from gateway.callers.tables import ASSET_OWNERS, insert
from gateway.jobs.database import Database, promptly
from gateway.jobs.tables import GENERATIONS

_AT_ONCE = 500  # a statement takes so many parameters and not all that many more


class AssetOwners:
    """Who sent which file, in the gateway's database. Methods raise NotReady when that is away.

    Where callers have no names nothing is kept and everybody sees everything.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    @promptly
    async def add(self, asset_id: str) -> None:
        """The file is from now on one of those that the running call's caller has sent."""
        caller = calling().name
        if not caller:
            return
        values = {"asset_id": asset_id, "caller": caller, "create_time_us": time.time_ns() // 1000}
        async with self.database.writing() as connection:
            await connection.execute(insert(connection, ASSET_OWNERS).values(values).on_conflict_do_nothing())

    @promptly
    async def seen(self, asset_ids: Collection[str]) -> set[str]:
        """Those of the files that the running call's caller sees."""
        owner = calling().owner
        if owner is None or not asset_ids:
            return set(asset_ids)
        sent = sa.select(ASSET_OWNERS.c.asset_id).where(
            ASSET_OWNERS.c.asset_id.in_(asset_ids), ASSET_OWNERS.c.caller == owner
        )
        made = sa.select(GENERATIONS.c.video_asset_id).where(
            GENERATIONS.c.video_asset_id.in_(asset_ids), GENERATIONS.c.caller == owner
        )
        async with self.database.reading() as connection:
            return set(await connection.scalars(sent.union(made)))

    async def require(self, asset_id: str) -> None:
        """Checks that the running call's caller sees a file. Raises NotFound, as for a file that is not there."""
        if not await self.seen([asset_id]):
            raise NotFound(f"there is no assets/{asset_id}")

    @promptly
    async def forget(self, asset_ids: Collection[str]) -> None:
        """Files that were deleted belong to nobody."""
        names = sorted(asset_ids)
        async with self.database.writing() as connection:
            for start in range(0, len(names), _AT_ONCE):
                these = ASSET_OWNERS.c.asset_id.in_(names[start : start + _AT_ONCE])
                await connection.execute(sa.delete(ASSET_OWNERS).where(these))


async def was_sent(connection: AsyncConnection, asset_id: str) -> bool:
    """Whether any caller has sent the file: it stays when a generation goes whose video has the same content."""
    query = sa.select(ASSET_OWNERS.c.asset_id).where(ASSET_OWNERS.c.asset_id == asset_id).limit(1)
    return await connection.scalar(query) is not None
