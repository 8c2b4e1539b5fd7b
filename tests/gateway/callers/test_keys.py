"""Keys: what is kept of them, what they are checked for, and how they end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bunraku.errors import InvalidRequest, NotFound
from gateway.callers.identity import Caller, CallerLimits, Scope
from gateway.callers.keys import DEFAULT_SCOPES, KeyStore, split_key
from gateway.jobs.database import Database


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


async def test_a_key_is_found_by_its_id_and_proved_by_its_secret(keys: KeyStore) -> None:
    limits = CallerLimits(60, 3, 500.0)
    made, text = await keys.create("studio", [Scope.READ, Scope.ADMIN], weight=2.5, limits=limits)
    parts = split_key(text)
    assert parts is not None
    found = await keys.with_id(parts[0])
    assert found == made
    assert found.has(parts[1])
    assert not found.has(parts[1][:-1] + ("A" if parts[1][-1] != "A" else "B"))
    assert not found.has("")
    caller = found.caller
    assert caller == Caller("studio", frozenset([Scope.READ, Scope.ADMIN]), 2.5, limits)


def contents(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.iterdir())


async def test_the_secret_is_nowhere_in_the_database(tmp_path: Path) -> None:
    database = Database(tmp_path / "gateway.sqlite")
    await database.migrate()
    _, text = await KeyStore(database).create("studio")
    await database.close()
    kept = contents(tmp_path)
    parts = split_key(text)
    assert parts is not None
    assert parts[0].encode() in kept  # the id is
    assert parts[1].encode() not in kept


async def test_keys_are_different_and_unlimited_by_default(keys: KeyStore) -> None:
    made = [(await keys.create("studio"))[1] for _ in range(3)]
    assert len(set(made)) == 3
    listed = await keys.list()
    assert [key.caller.scopes for key in listed] == [frozenset(DEFAULT_SCOPES)] * 3
    assert listed[0].caller.limits == CallerLimits()
    assert listed[0].expire_time_us is None


async def test_a_revoked_key_stays_revoked_since_the_first_time(keys: KeyStore) -> None:
    made, _ = await keys.create("studio")
    now_us = time.time_ns() // 1000
    assert made.is_valid(now_us)
    revoked = await keys.revoke(made.id)
    assert not revoked.is_valid(now_us)
    assert revoked.revoke_time_us is not None
    assert abs(revoked.revoke_time_us - now_us) < 5_000_000
    assert await keys.revoke(made.id) == revoked
    assert await keys.with_id(made.id) == revoked


async def test_a_key_is_valid_until_it_expires(keys: KeyStore) -> None:
    made, _ = await keys.create("studio", valid_s=60)
    assert made.expire_time_us is not None
    assert made.expire_time_us - made.create_time_us == 60_000_000
    assert made.is_valid(made.expire_time_us - 1)
    assert not made.is_valid(made.expire_time_us)


async def test_there_are_keys_once_one_was_made_even_if_it_is_revoked(keys: KeyStore) -> None:
    assert not await keys.exist()
    made, _ = await keys.create("studio")
    await keys.revoke(made.id)
    assert await keys.exist()


async def test_a_certificate_stands_for_one_key_that_has_no_secret(keys: KeyStore) -> None:
    made, text = await keys.create("studio", certificate="renderer.studio")
    assert text == ""
    assert await keys.with_certificate("renderer.studio") == made
    assert await keys.with_certificate("other") is None
    assert not made.has("")
    with pytest.raises(InvalidRequest) as raised:
        await keys.create("rival", certificate="renderer.studio")
    assert raised.value.violations[0][0] == "certificate"


async def test_all_that_is_wrong_is_named(keys: KeyStore) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await keys.create(
            "Studio/1",
            [],
            weight=0,
            limits=CallerLimits(0, -1, float("nan")),
            valid_s=0,
            certificate="c" * 256,
        )
    assert [field for field, _ in raised.value.violations] == [
        "caller",
        "scopes",
        "weight",
        "requests_per_minute",
        "max_active_generations",
        "gpu_seconds_per_day",
        "valid_s",
        "certificate",
    ]
    assert await keys.list() == []


async def test_a_key_that_is_not_there_cannot_be_revoked(keys: KeyStore) -> None:
    with pytest.raises(NotFound):
        await keys.revoke("0" * 12)
    with pytest.raises(InvalidRequest):
        await keys.revoke("' OR 1=1")


def test_only_whole_keys_are_taken_apart() -> None:
    key_id, secret = "0123456789ab", "s_-" + "x" * 40
    assert split_key(f"bunraku_{key_id}_{secret}") == (key_id, secret)
    for text in ("", "bunraku_", f"bunraku_{key_id}_{secret}x", f"bunraku_{key_id}_{secret}\n", f"{key_id}_{secret}"):
        assert split_key(text) is None
