"""Files in the store: uploads that break off and go on, what is refused, reading, deleting."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bunraku.errors import BunrakuError, InvalidRequest, NotFound, NotReady, WrongState
from bunraku.v1 import gateway_pb2 as pb
from gateway.assets import AssetStore, asset_id
from runtime.media_type import media_type
from tests.gateway.buckets import S3Server, s3_server

CONTENT = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 5
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "assets"


@pytest.fixture
def store(directory: Path) -> AssetStore:
    return AssetStore(directory, max_size_bytes=10_000, reserve_bytes=0)


def metadata(upload_id: str = "", *, sha256: str = "", offset: int = 0, size: int = len(CONTENT)) -> pb.UploadMetadata:
    return pb.UploadMetadata(
        upload_id=upload_id, filename="cat.png", size_bytes=size, sha256=sha256, offset_bytes=offset
    )


async def stored(store: AssetStore, content: bytes = CONTENT) -> pb.Asset:
    async with await store.begin(metadata(size=len(content))) as upload:
        await upload.append(content)
        return await upload.finish()


async def begun(store: AssetStore, upload_id: str, content: bytes) -> None:
    """An upload that broke off after these bytes."""
    async with await store.begin(metadata(upload_id)) as upload:
        await upload.append(content)


async def read(store: AssetStore, asset_id: str, offset: int = 0, chunk_bytes: int = 100) -> list[bytes]:
    return [chunk async for chunk in store.read(asset_id, offset, chunk_bytes)]


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "uploads").iterdir())


def fields(error: BunrakuError) -> list[str]:
    assert isinstance(error, InvalidRequest)
    return [field for field, _ in error.violations]


# A whole file


async def test_an_upload_in_pieces_is_stored_under_its_digest(store: AssetStore, directory: Path) -> None:
    before_s = time.time()
    async with await store.begin(metadata(sha256=SHA256.upper())) as upload:
        for start in range(0, len(CONTENT), 500):
            await upload.append(CONTENT[start : start + 500])
        asset = await upload.finish()
    assert asset.name == f"assets/{SHA256}"
    assert asset_id(asset.name) == asset.sha256 == SHA256
    assert (asset.filename, asset.size_bytes, asset.media_type) == ("cat.png", len(CONTENT), "image/png")
    assert before_s <= asset.create_time.ToNanoseconds() / 1e9 <= time.time()
    assert await store.get(SHA256) == asset
    assert b"".join(await read(store, SHA256)) == CONTENT
    assert (await store.path(SHA256)).read_bytes() == CONTENT
    assert left_in(directory) == []


async def test_a_file_is_on_the_disk_before_it_gets_its_name(
    store: AssetStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def record(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        if os.fstat(descriptor).st_size == len(CONTENT):
            assert not any(path.name == SHA256 for path in directory.rglob("*"))

    monkeypatch.setattr(os, "fsync", record)
    await stored(store)
    content = await store.path(SHA256)
    sidecar = content.with_name(f"{SHA256}.json")
    directories = [content.parent, directory / "objects"]  # after the name was given
    assert synced == [path.stat().st_ino for path in (sidecar, *directories, content, *directories)]


async def test_a_finished_upload_takes_nothing_more(store: AssetStore) -> None:
    async with await store.begin(metadata("u-1")) as upload:
        await upload.append(CONTENT)
        await upload.finish()
        for late in (upload.append(b"x"), upload.finish()):
            with pytest.raises(WrongState):
                await late


async def test_messages_may_be_of_one_mebibyte(directory: Path) -> None:
    content = bytes(1_048_576)
    asset = await stored(AssetStore(directory, reserve_bytes=0), content)
    assert (asset.size_bytes, asset.media_type) == (1_048_576, "application/octet-stream")


async def test_a_new_store_on_the_directory_knows_its_files(store: AssetStore, directory: Path) -> None:
    asset = await stored(store)
    assert await AssetStore(directory).get(SHA256) == asset


async def test_the_same_content_is_stored_once_with_its_first_name(store: AssetStore, directory: Path) -> None:
    first = await stored(store)
    async with await store.begin(pb.UploadMetadata(filename="dog.png", size_bytes=len(CONTENT))) as upload:
        await upload.append(CONTENT)
        assert await upload.finish() == first
    assert left_in(directory) == []


async def test_a_file_is_read_in_chunks_from_an_offset(store: AssetStore) -> None:
    await stored(store)
    chunks = await read(store, SHA256, offset=10, chunk_bytes=600)
    assert [len(chunk) for chunk in chunks] == [600, 600, len(CONTENT) - 1210]
    assert b"".join(chunks) == CONTENT[10:]
    assert await read(store, SHA256, offset=len(CONTENT)) == []
    with pytest.raises(InvalidRequest) as refused:
        await read(store, SHA256, offset=len(CONTENT) + 1)
    assert fields(refused.value) == ["offset_bytes"]


async def test_a_deleted_file_is_not_found_and_can_be_stored_again(store: AssetStore, directory: Path) -> None:
    await stored(store)
    await store.delete(SHA256)
    await store.delete(SHA256)
    for call in (store.get, store.path):
        with pytest.raises(NotFound):
            await call(SHA256)
    with pytest.raises(NotFound):
        await read(store, SHA256)
    assert not [path for path in (directory / "objects").rglob("*") if path.is_file()]
    assert (await stored(store)).sha256 == SHA256


async def test_a_finished_file_is_taken_over(store: AssetStore, tmp_path: Path, directory: Path) -> None:
    made = tmp_path / "work.mp4"
    made.write_bytes(CONTENT)
    asset = await store.put_file(made, "dance.mp4")
    assert (asset.sha256, asset.filename) == (SHA256, "dance.mp4")
    assert not made.exists()
    assert (await store.path(SHA256)).read_bytes() == CONTENT
    assert left_in(directory) == []


async def test_a_file_on_another_file_system_is_taken_over(
    store: AssetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "rename", refuse)
    made = tmp_path / "work.mp4"
    made.write_bytes(CONTENT)
    await store.put_file(made, "dance.mp4")
    assert not made.exists()
    assert (await store.path(SHA256)).read_bytes() == CONTENT


# Uploads that break off


async def test_a_broken_upload_goes_on_where_it_was(store: AssetStore, directory: Path) -> None:
    await begun(store, "u-1", CONTENT[:700])
    again = AssetStore(directory)  # also after a restart
    assert await again.received_bytes("u-1") == 700
    async with await again.begin(metadata("u-1", offset=700, sha256=SHA256)) as upload:
        await upload.append(CONTENT[700:])
        asset = await upload.finish()
    assert asset.sha256 == SHA256
    assert left_in(directory) == []
    with pytest.raises(NotFound):
        await again.received_bytes("u-1")


async def test_an_upload_whose_every_byte_arrived_only_needs_finishing(store: AssetStore) -> None:
    await begun(store, "u-1", CONTENT)
    async with await store.begin(metadata("u-1", offset=len(CONTENT))) as upload:
        assert (await upload.finish()).sha256 == SHA256


@pytest.mark.parametrize("offset", [1, 699, 701])
async def test_an_upload_does_not_go_on_at_another_offset(store: AssetStore, offset: int) -> None:
    await begun(store, "u-1", CONTENT[:700])
    with pytest.raises(WrongState, match="700 bytes have arrived") as refused:
        await store.begin(metadata("u-1", offset=offset))
    assert refused.value.reason == "WRONG_OFFSET"
    assert await store.received_bytes("u-1") == 700


async def test_an_unknown_upload_does_not_go_on(store: AssetStore, directory: Path) -> None:
    with pytest.raises(WrongState, match="0 bytes have arrived"):
        await store.begin(metadata("u-1", offset=5))
    assert left_in(directory) == []


async def test_an_upload_may_begin_anew(store: AssetStore) -> None:
    await begun(store, "u-1", b"something else")
    async with await store.begin(metadata("u-1", sha256=SHA256)) as upload:
        await upload.append(CONTENT)
        assert (await upload.finish()).sha256 == SHA256


async def test_a_broken_upload_without_id_leaves_nothing(store: AssetStore, directory: Path) -> None:
    await begun(store, "", CONTENT[:700])
    assert left_in(directory) == []


async def test_a_later_call_takes_an_upload_over(store: AssetStore) -> None:
    first = await store.begin(metadata("u-1"))
    await first.append(CONTENT[:700])
    async with await store.begin(metadata("u-1", offset=700)) as second:
        for late in (first.append(b"x"), first.finish()):
            with pytest.raises(WrongState) as refused:
                await late
            assert refused.value.reason == "UPLOAD_TAKEN_OVER"
        await first.close()
        await second.append(CONTENT[700:])
        assert (await second.finish()).sha256 == SHA256


async def test_a_cancelled_call_is_done_writing_before_the_next_goes_on(
    store: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await store.begin(metadata("u-1"))
    writing, may_write, write = threading.Event(), threading.Event(), os.write

    def slow_write(descriptor: int, data: bytes) -> int:
        writing.set()
        may_write.wait(5)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", slow_write)
    cancelled = asyncio.create_task(first.append(CONTENT[:700]))
    await asyncio.to_thread(writing.wait, 5)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    going_on = asyncio.create_task(store.begin(metadata("u-1", offset=700)))
    await asyncio.sleep(0.05)
    assert not going_on.done()
    may_write.set()
    async with await going_on as second:
        await second.append(CONTENT[700:])
        assert (await second.finish()).sha256 == SHA256


async def test_a_cancelled_begin_keeps_no_file_open(store: AssetStore, directory: Path) -> None:
    before = psutil.Process().num_fds()
    for i in range(20):
        call = asyncio.create_task(store.begin(metadata()))
        await asyncio.sleep(i * 0.0002)
        call.cancel()
        await asyncio.wait([call])
        if not call.cancelled():
            await call.result().close()
    assert left_in(directory) == []
    assert psutil.Process().num_fds() == before


async def test_stale_uploads_are_removed_but_not_the_one_being_sent(store: AssetStore, directory: Path) -> None:
    await begun(store, "old", b"x")
    await begun(store, "young", b"x")
    sending = await store.begin(metadata("sending"))
    for name in ("old", "sending"):
        os.utime(directory / "uploads" / f"{name}.part", (0, 0))
    assert await store.remove_stale_uploads(older_than_s=3600) == 1
    assert left_in(directory) == ["sending.part", "young.part"]
    await sending.close()


# What is refused


async def test_another_sha256_is_refused_and_the_bytes_are_dropped(store: AssetStore, directory: Path) -> None:
    async with await store.begin(metadata("u-1", sha256="0" * 64)) as upload:
        await upload.append(CONTENT)
        with pytest.raises(InvalidRequest) as refused:
            await upload.finish()
    assert fields(refused.value) == ["metadata.sha256"]
    assert left_in(directory) == []
    with pytest.raises(NotFound):
        await store.get(SHA256)


async def test_a_file_that_is_too_short_is_refused_and_can_go_on(store: AssetStore) -> None:
    async with await store.begin(metadata("u-1")) as upload:
        await upload.append(CONTENT[:700])
        with pytest.raises(InvalidRequest, match="700 bytes") as refused:
            await upload.finish()
    assert fields(refused.value) == ["metadata.size_bytes"]
    assert await store.received_bytes("u-1") == 700


async def test_more_bytes_than_declared_are_refused_unwritten(store: AssetStore) -> None:
    async with await store.begin(metadata("u-1")) as upload:
        await upload.append(CONTENT[:700])
        with pytest.raises(InvalidRequest) as refused:
            await upload.append(CONTENT)
        assert fields(refused.value) == ["data"]
        assert await store.received_bytes("u-1") == 700


@pytest.mark.parametrize("data", [b"", bytes(1_048_577)])
async def test_empty_and_oversized_messages_are_refused(store: AssetStore, data: bytes) -> None:
    async with await store.begin(metadata()) as upload:
        with pytest.raises(InvalidRequest) as refused:
            await upload.append(data)
    assert fields(refused.value) == ["data"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (pb.UploadMetadata(size_bytes=0), "size_bytes"),
        (pb.UploadMetadata(size_bytes=10_001), "size_bytes"),
        (pb.UploadMetadata(size_bytes=1, upload_id="../x"), "upload_id"),
        (pb.UploadMetadata(size_bytes=1, upload_id="x\n"), "upload_id"),
        (pb.UploadMetadata(size_bytes=1, upload_id="x" * 65), "upload_id"),
        (pb.UploadMetadata(size_bytes=1, filename="../../etc/passwd"), "filename"),
        (pb.UploadMetadata(size_bytes=1, filename="a\\b"), "filename"),
        (pb.UploadMetadata(size_bytes=1, filename="a\nb"), "filename"),
        (pb.UploadMetadata(size_bytes=1, filename="x" * 256), "filename"),
        (pb.UploadMetadata(size_bytes=1, sha256="abc"), "sha256"),
        (pb.UploadMetadata(size_bytes=1, upload_id="x", offset_bytes=2), "offset_bytes"),
        (pb.UploadMetadata(size_bytes=2, offset_bytes=1), "offset_bytes"),
    ],
)
async def test_wrong_metadata_is_refused(
    store: AssetStore, directory: Path, wrong: pb.UploadMetadata, field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await store.begin(wrong)
    assert fields(refused.value) == [f"metadata.{field}"]
    assert left_in(directory) == []


async def test_all_wrong_fields_are_named_at_once(store: AssetStore) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await store.begin(pb.UploadMetadata(upload_id="?", filename="/", sha256="?"))
    assert fields(refused.value) == [f"metadata.{name}" for name in ("upload_id", "filename", "size_bytes", "sha256")]


async def test_limits_themselves_are_accepted(store: AssetStore) -> None:
    limits = pb.UploadMetadata(size_bytes=10_000, upload_id="aZ09-_" + "x" * 58, filename="x" * 255, sha256="aF" * 32)
    await (await store.begin(limits)).close()


@pytest.mark.parametrize("name", ["", "assets/", f"assets/{SHA256.upper()}", f"assets/{SHA256}/..", "assets/../x"])
def test_names_of_another_form_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asset_id(name, "animate.pose_video")
    assert fields(refused.value) == ["animate.pose_video"]


async def test_upload_ids_of_another_form_are_refused_when_asked_for(store: AssetStore) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await store.received_bytes("../x")
    assert fields(refused.value) == ["upload_id"]


async def test_a_file_that_the_disk_has_no_room_for_is_not_begun(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(directory.parent)._replace(free=1000 + len(CONTENT) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    store = AssetStore(directory, reserve_bytes=1000)
    with pytest.raises(NotReady) as refused:
        await store.begin(metadata())
    assert refused.value.reason == "DISK_FULL"
    assert left_in(directory) == []
    async with await store.begin(metadata("u-1", size=len(CONTENT) - 1)) as upload:
        await upload.append(CONTENT[:700])
    usage = usage._replace(free=1000 + len(CONTENT) - 701)
    await (await store.begin(metadata("u-1", size=len(CONTENT) - 1, offset=700))).close()  # the rest has room


async def test_a_disk_that_fills_up_is_not_ready_and_the_upload_can_go_on(
    store: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = os.write, [False]

    def partial_write(descriptor: int, data: bytes) -> int:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        full[0] = True
        return write(descriptor, data[:300])

    async with await store.begin(metadata("u-1")) as upload:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", partial_write)
            with pytest.raises(NotReady) as refused:
                await upload.append(CONTENT)
    assert refused.value.reason == "DISK_FULL"
    assert await store.received_bytes("u-1") == 300


# Media types


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\x89PNG\r\n\x1a\n....", "image/png"),
        (b"\xff\xd8\xff\xe0....JFIF", "image/jpeg"),
        (b"RIFF....WEBPVP8 ", "image/webp"),
        (b"RIFF....WAVEfmt ", "audio/wav"),
        (b"RIFF....AVI LIST", "application/octet-stream"),
        (b"GIF89a....", "image/gif"),
        (b"....ftypisom....", "video/mp4"),
        (b"....ftypmp42....", "video/mp4"),
        (b"....ftypqt  ....", "video/quicktime"),
        (b"....moov....", "video/quicktime"),
        (b"....ftypM4A ....", "audio/mp4"),
        (b"....ftypheic....", "application/octet-stream"),
        (b"\x1a\x45\xdf\xa3....\x42\x82\x84webm", "video/webm"),
        (b"\x1a\x45\xdf\xa3....\x42\x82\x88matroska", "video/matroska"),
        (b"\x1a\x45\xdf\xa3....", "application/octet-stream"),
        (b"ID3\x04....", "audio/mpeg"),
        (b"\xff\xfb\x90\x64", "audio/mpeg"),  # MPEG 1, 2 and 2.5
        (b"\xff\xf3\x40\xc4", "audio/mpeg"),
        (b"\xff\xe3\x18\xc4", "audio/mpeg"),
        (b"\xff\xeb\x90\x64", "application/octet-stream"),  # no such version
        (b"\xff\xfd\x90\x64", "application/octet-stream"),  # layer II
        (b"\xff\xfb\x9c\x64", "application/octet-stream"),  # no such sample rate
        (b"\xff\xfe\x68\x00", "application/octet-stream"),  # UTF-16 text
        (b"\xff\xfb\xf0\x64", "application/octet-stream"),  # no such bit rate
        (b"#EXTM3U\nhttp://", "application/octet-stream"),
        (b"hello", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_media_types_are_found_in_the_content(head: bytes, expected: str) -> None:
    assert media_type(head) == expected


# In an object storage


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def remote(directory: Path, server: S3Server) -> AssetStore:
    return AssetStore(directory, server.blobs("assets"), reserve_bytes=0)


async def test_files_in_an_object_storage_are_found_by_every_gateway(
    remote: AssetStore, server: S3Server, tmp_path: Path
) -> None:
    asset = await stored(remote)
    other = AssetStore(tmp_path / "other", server.open(server.buckets[-1], "assets"), reserve_bytes=0)
    assert await other.get(SHA256) == asset
    assert b"".join(await read(other, SHA256, 3)) == CONTENT[3:]
    assert (await other.path(SHA256)).read_bytes() == CONTENT
    assert left_in(tmp_path / "other") == []


async def test_a_file_that_a_generation_made_goes_into_an_object_storage(remote: AssetStore, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(CONTENT)
    asset = await remote.put_file(tmp_path / "video.mp4", "video.mp4")
    assert (asset.sha256, asset.filename) == (SHA256, "video.mp4")
    assert "video.mp4" not in os.listdir(tmp_path)
    assert b"".join(await read(remote, SHA256)) == CONTENT
    # a second time it keeps its first name
    (tmp_path / "video.mp4").write_bytes(CONTENT)
    assert (await remote.put_file(tmp_path / "video.mp4", "other.mp4")).filename == "video.mp4"


async def test_a_file_deleted_from_an_object_storage_is_gone_here_too(remote: AssetStore, directory: Path) -> None:
    await stored(remote)
    copy = await remote.path(SHA256)
    assert SHA256 in os.listdir(copy.parent)
    await remote.delete(SHA256)
    assert SHA256 not in os.listdir(copy.parent)
    for missing in (remote.get(SHA256), remote.path(SHA256)):
        with pytest.raises(NotFound):
            await missing
    await remote.delete(SHA256)


async def test_copies_that_nobody_asks_for_go_and_come_again(remote: AssetStore) -> None:
    await stored(remote)
    copy = await remote.path(SHA256)
    os.utime(copy, (0, 0))
    assert await remote.path(SHA256) == copy  # asked for: it stays
    assert await remote.remove_stale_uploads(older_than_s=60) == 0
    os.utime(copy, (0, 0))
    assert await remote.remove_stale_uploads(older_than_s=60) == 1
    assert (await remote.path(SHA256)).read_bytes() == CONTENT


async def test_old_files_in_an_object_storage_are_told(remote: AssetStore) -> None:
    await stored(remote)
    assert await remote.older_than(3600) == []
    assert await remote.older_than(-3600) == [SHA256]
