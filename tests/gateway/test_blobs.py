"""Directory and bucket behave alike: whole or not at all, replaced, listed, deleted, away."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bunraku.errors import NotFound, NotReady
from gateway import blobs as blobs_module
from gateway.blobs import BlobStore, DirectoryBlobs, open_blobs
from tests.gateway.buckets import S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(params=["directory", "bucket"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "directory":
        return open_blobs(tmp_path / "blobs")
    server: S3Server = request.getfixturevalue("server")
    return server.blobs("some/prefix")


async def names(blobs: BlobStore, prefix: str) -> list[str]:
    return sorted(blob.name for blob in await blobs.under(prefix))


async def test_parts_are_joined_and_what_is_written_again_replaces_what_was(blobs: BlobStore) -> None:
    await blobs.put("a/one", [b"first", memoryview(b" and"), b" second"])
    assert bytes(await blobs.read("a/one")) == b"first and second"
    await blobs.put("a/one", [b"other"])
    assert bytes(await blobs.read("a/one")) == b"other"


async def test_what_was_read_stays_when_its_name_is_written_again_or_deleted(blobs: BlobStore) -> None:
    await blobs.put("a/one", [b"x" * 10_000])
    first = await blobs.read("a/one")
    await blobs.put("a/one", [b"y"])
    await blobs.delete("a/one")
    assert bytes(first) == b"x" * 10_000


async def test_what_is_not_there_is_not_found(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await blobs.read("a/one")
    with pytest.raises(NotFound):
        await blobs.fetch("a/one", tmp_path / "file")
    assert await blobs.find("a/one") is None
    assert "file" not in os.listdir(tmp_path)
    await blobs.delete("a/one")
    await blobs.mark_used("a/one")


async def test_nothing_is_kept_as_nothing(blobs: BlobStore) -> None:
    await blobs.put("a/empty", [])
    assert bytes(await blobs.read("a/empty")) == b""


async def test_names_under_a_prefix_are_listed_with_their_sizes(blobs: BlobStore) -> None:
    for name in ("a/one", "a/b/two", "ab/three"):
        await blobs.put(name, [name.encode()])
    assert await names(blobs, "a/") == ["a/b/two", "a/one"]
    assert await names(blobs, "none/") == []
    found = await blobs.find("a/b/two")
    assert found is not None
    assert found.size_bytes == 7
    assert abs(found.used_s - time.time()) < 60


async def test_a_file_moves_in_and_a_copy_comes_out(blobs: BlobStore, tmp_path: Path) -> None:
    content = os.urandom(12 << 20)  # more than one part of an upload
    (tmp_path / "in").write_bytes(content)
    await blobs.put_file("a/file", tmp_path / "in")
    assert not (tmp_path / "in").exists()
    await blobs.fetch("a/file", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


async def test_writers_and_deleters_of_one_folder_do_not_disturb_each_other(blobs: BlobStore) -> None:
    async def back_and_forth(name: str) -> None:
        for _ in range(20):
            await blobs.put(name, [b"x"])
            await blobs.delete(name)

    await asyncio.gather(*(back_and_forth(f"a/{number}") for number in range(4)))
    assert await names(blobs, "a/") == []


async def test_a_directory_remembers_what_was_used_last(tmp_path: Path) -> None:
    blobs = open_blobs(tmp_path)
    await blobs.put("a/one", [b"x"])
    os.utime(tmp_path / "a" / "one", (0, 0))
    await blobs.mark_used("a/one")
    found = await blobs.find("a/one")
    assert found is not None
    assert time.time() - found.used_s < 60


async def test_a_full_disk_is_not_ready_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, *arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    blobs = DirectoryBlobs(tmp_path)
    monkeypatch.setattr(DirectoryBlobs, "_rename", full)
    with pytest.raises(NotReady) as raised:
        await blobs.put("a/one", [b"x"])
    assert raised.value.reason == "DISK_FULL"
    assert [files for _, _, files in os.walk(tmp_path) if files] == []


async def test_an_object_storage_that_is_away_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs_module, "_RETRIES", 1)
    with s3_server() as gone:
        blobs = gone.blobs()
    for action in (blobs.read("a"), blobs.put("a", [b"x"]), blobs.under("a/"), blobs.find("a"), blobs.delete("a")):
        with pytest.raises(NotReady) as raised:
            await action
        assert raised.value.reason == "STORAGE_UNAVAILABLE"
