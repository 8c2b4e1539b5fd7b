"""Which files a caller sees."""

from __future__ import annotations

import pytest

from bunraku.errors import NotFound
from gateway.callers.identity import Caller, Scope, acting_for
from gateway.callers.ownership import AssetOwners, was_sent
from gateway.jobs.database import Database
from gateway.jobs.job import SUCCEEDED
from tests.gateway.callers.rows import generation

STUDIO = Caller("studio", frozenset([Scope.UPLOAD, Scope.READ]))
RIVAL = Caller("rival", frozenset([Scope.UPLOAD, Scope.READ]))
ADMIN = Caller("operator", frozenset([Scope.ADMIN]))
FILE, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def owners(database: Database) -> AssetOwners:
    return AssetOwners(database)


async def test_a_caller_sees_what_it_has_sent_and_no_other_does(owners: AssetOwners) -> None:
    with acting_for(STUDIO):
        await owners.add(FILE)
        await owners.add(FILE)  # sent again
        assert await owners.seen([FILE, OTHER]) == {FILE}
        await owners.require(FILE)
    with acting_for(RIVAL):
        assert await owners.seen([FILE, OTHER]) == set()
        with pytest.raises(NotFound, match=f"there is no assets/{FILE}"):
            await owners.require(FILE)
        await owners.add(FILE)  # all of it was sent: the same file is the rival's too
        await owners.require(FILE)


async def test_a_caller_sees_the_videos_of_its_own_generations(owners: AssetOwners, database: Database) -> None:
    await generation(database, "studio", SUCCEEDED, video_asset_id=FILE)
    with acting_for(STUDIO):
        await owners.require(FILE)
    with acting_for(RIVAL), pytest.raises(NotFound):
        await owners.require(FILE)


async def test_an_administrator_sees_everything_and_so_does_everybody_without_keys(owners: AssetOwners) -> None:
    with acting_for(STUDIO):
        await owners.add(FILE)
    with acting_for(ADMIN):
        assert await owners.seen([FILE, OTHER]) == {FILE, OTHER}
    assert await owners.seen([FILE, OTHER]) == {FILE, OTHER}


async def sent(database: Database) -> list[str]:
    async with database.reading() as connection:
        return [name for name in (FILE, OTHER) if await was_sent(connection, name)]


async def test_a_file_that_somebody_has_sent_is_known_until_it_is_forgotten(
    owners: AssetOwners, database: Database
) -> None:
    assert await sent(database) == []
    with acting_for(STUDIO):
        await owners.add(FILE)
        await owners.add(OTHER)
    assert await sent(database) == [FILE, OTHER]
    await owners.forget([FILE])
    assert await sent(database) == [OTHER]


async def test_without_keys_nothing_is_kept(owners: AssetOwners, database: Database) -> None:
    await owners.add(FILE)
    assert await sent(database) == []


async def test_more_files_than_a_statement_takes_are_forgotten(owners: AssetOwners, database: Database) -> None:
    names = [f"{number:064x}" for number in range(1001)]
    with acting_for(STUDIO):
        await owners.add(names[0])
        await owners.add(names[-1])
        await owners.add(FILE)
        await owners.forget(names)
        assert await owners.seen([names[0], names[-1], FILE]) == {FILE}
