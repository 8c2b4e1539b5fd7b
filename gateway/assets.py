"""Files that callers send and that generations make, each under the SHA-256 of its content.

Finished files are blobs (gateway.blobs), in a directory or in an object storage:

    ab/ab12...        the content
    ab/ab12....json   what is known of it: a pb.Asset

What is on its way is in directories of this gateway:

    uploads/{upload_id}.part  what has arrived of an upload that can be gone on with; with its caller's name before it
    uploads/{uuid}.tmp        a file on its way into the store
    fetched/{id}              a copy of a file in an object storage, for as long as somebody may read it

A file is in the store once its content has its final name; that name is given last, after everything is on the disk.
Work on files runs in threads, and goes on to its end when the caller is cancelled.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from google.protobuf import json_format

from bunraku.errors import InvalidRequest, NotFound, WrongState
from bunraku.v1 import gateway_pb2 as pb
from gateway.blobs import BlobStore, DirectoryBlobs, disk_full, full_disk_is_not_ready
from gateway.callers.identity import current_caller
from runtime.media_type import HEAD_BYTES, media_type

ASSET_NAME = re.compile(r"assets/([0-9a-f]{64})")
MAX_DATA_BYTES = 1 << 20  # of one message
MAX_FILENAME_CHARACTERS = 255

_KNOWN = ".json"
_UPLOAD_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_NOT_IN_FILENAMES = re.compile(r"[/\\\x00-\x1f\x7f]")

Result = TypeVar("Result")


def asset_id(name: str, field: str = "name") -> str:
    """The id in `assets/{id}`.

    Raises:
        InvalidRequest: the name, which came in this field, has another form.
    """
    match = ASSET_NAME.fullmatch(name)
    if match is None:
        raise InvalidRequest((field, f"must be assets/ and 64 hexadecimal digits, got {name[:100]!r}"))
    return match[1]


class AssetStore:
    """Files in a directory or in an object storage.

    Args:
        directory: made when it does not exist; what is in it belongs to the store.
        blobs: where finished files are kept; None: in `objects` in the directory.
        max_size_bytes: the largest file that may be sent.
        reserve_bytes: room on the disk that uploads leave free.
    """

    def __init__(
        self,
        directory: Path,
        blobs: BlobStore | None = None,
        *,
        max_size_bytes: int = 2 << 30,
        reserve_bytes: int = 256 << 20,
    ) -> None:
        self._blobs: BlobStore = blobs or DirectoryBlobs(directory / "objects")
        self._uploads, self._fetched = directory / "uploads", directory / "fetched"
        self._max_size_bytes, self._reserve_bytes = max_size_bytes, reserve_bytes
        self._active: dict[Path, Upload] = {}
        self._beginning = asyncio.Lock()
        self._moving = asyncio.Lock()  # a file that is stored again while it is deleted must not be lost
        for folder in (self._uploads, self._fetched):
            folder.mkdir(parents=True, exist_ok=True)

    # Uploads

    async def begin(self, metadata: pb.UploadMetadata) -> Upload:
        """Begins an upload or goes on with one; a call that still has the same upload_id loses it.

        Raises:
            InvalidRequest: a field of the metadata is wrong.
            WrongState: the offset is neither 0 nor what has arrived.
            NotReady: the disk has no room for the file.
        """
        self._check(metadata)
        name = _part(metadata.upload_id) if metadata.upload_id else f"{uuid.uuid4().hex}.tmp"
        upload = Upload(self, metadata, self._uploads / name)
        async with self._beginning:
            if (earlier := self._active.get(upload.path)) is not None:
                await earlier.close()
            try:
                await upload.run(upload.open)
            except BaseException:  # a cancelled call too: the thread opens the file all the same
                await upload.close()
                raise
            self._active[upload.path] = upload
        return upload

    async def received_bytes(self, upload_id: str) -> int:
        """Bytes of an unfinished upload that have arrived.

        Raises:
            InvalidRequest: upload_id has another form.
            NotFound: there is no such upload: it was never begun, is finished, or was left for too long.
        """
        if not _UPLOAD_ID.fullmatch(upload_id):
            raise InvalidRequest(("upload_id", _UPLOAD_ID_FORM))
        size = await asyncio.to_thread(_size, self._uploads / _part(upload_id))
        if size is None:
            raise NotFound(f"there is no unfinished upload {upload_id}")
        return size

    async def remove_stale_uploads(self, older_than_s: float) -> int:
        """Removes what has arrived of uploads that nobody has sent to for so many seconds; returns how many.

        Copies of files in an object storage that nobody has asked for as long go too.
        """
        active = set(self._active)

        def remove() -> int:
            removed = 0
            for path in {*self._uploads.iterdir(), *self._fetched.iterdir()} - active:
                with suppress(FileNotFoundError):  # finished meanwhile
                    if path.stat().st_mtime < time.time() - older_than_s:
                        path.unlink()
                        removed += 1
            return removed

        return await asyncio.to_thread(remove)

    async def older_than(self, seconds: float) -> list[str]:
        """Ids of the files that were stored, or sent again, longer ago than this."""

        until = time.time() - seconds
        known = [blob for blob in await self._blobs.under("") if blob.name.endswith(_KNOWN)]
        return [blob.name.rpartition("/")[2].removesuffix(_KNOWN) for blob in known if blob.used_s < until]

    # Files

    async def put_file(self, path: Path, filename: str) -> pb.Asset:
        """Takes a file into the store; it is no longer at `path` then.

        Args:
            path: a finished file.
            filename: its name for people. A file that is in the store already keeps the name that it has.

        Raises:
            NotReady: the disk is full.
        """

        arrived = self._uploads / f"{uuid.uuid4().hex}.tmp"

        def move() -> None:
            with full_disk_is_not_ready():
                shutil.move(path, arrived)  # copies where `path` is on another file system

        await asyncio.to_thread(move)
        try:
            return await self.adopt(arrived, filename)
        finally:
            await asyncio.to_thread(arrived.unlink, missing_ok=True)

    async def get(self, asset_id: str) -> pb.Asset:
        """What is known of a file.

        Raises:
            NotFound: there is no such file.
        """
        if await self._blobs.find(_content(asset_id)) is None:
            raise _not_found(asset_id)
        try:
            known = await self._blobs.read(_content(asset_id) + _KNOWN)
        except NotFound as error:  # deleted between the two
            raise _not_found(asset_id) from error
        return json_format.Parse(bytes(known), pb.Asset())

    async def path(self, asset_id: str) -> Path:
        """Where a file is, for reading; one in an object storage is copied here first.

        Raises:
            NotFound: there is no such file.
        """
        await self.get(asset_id)
        if isinstance(self._blobs, DirectoryBlobs):
            return self._blobs.path(_content(asset_id))
        copy = self._fetched / asset_id
        try:
            await asyncio.to_thread(os.utime, copy)  # it is in use
        except FileNotFoundError:
            await self._blobs.fetch(_content(asset_id), copy)
        return copy

    async def read(self, asset_id: str, offset: int = 0, chunk_bytes: int = 256 << 10) -> AsyncIterator[bytes]:
        """The bytes of a file from an offset on, in chunks; nothing when the offset is its end.

        Raises:
            NotFound: there is no such file.
            InvalidRequest: the offset is behind its end.
        """
        asset = await self.get(asset_id)
        if offset > asset.size_bytes:
            raise InvalidRequest(("offset_bytes", f"must be 0 to {asset.size_bytes}, got {offset}"))
        path = await self.path(asset_id)
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except FileNotFoundError as error:
            raise _not_found(asset_id) from error
        try:
            file.seek(offset)
            while chunk := await asyncio.to_thread(file.read, chunk_bytes):
                yield chunk
        finally:
            file.close()

    async def delete(self, asset_id: str) -> None:
        """Deletes a file; one that is not there is left so."""
        async with self._moving:
            await self._blobs.delete(_content(asset_id), _content(asset_id) + _KNOWN)
        await asyncio.to_thread((self._fetched / asset_id).unlink, missing_ok=True)

    # For uploads, not for callers of the store

    async def adopt(self, path: Path, filename: str, sha256: str = "") -> pb.Asset:
        """Moves a finished file into the store.

        Raises:
            InvalidRequest: it is not the file with this SHA-256, if one is given; the file is removed.
        """
        asset = await asyncio.to_thread(_looked_at, path, filename)
        if sha256 and asset.sha256 != sha256.lower():
            await asyncio.to_thread(path.unlink)
            raise InvalidRequest(("metadata.sha256", f"is {sha256.lower()}, but what has arrived has {asset.sha256}"))
        content = _content(asset.sha256)
        async with self._moving:
            if await self._blobs.find(content) is not None:
                await asyncio.to_thread(path.unlink)
                known = await self._blobs.read(content + _KNOWN)
                await self._blobs.put(content + _KNOWN, [known], durable=True)  # as young as if it were stored now
                return await self.get(asset.sha256)
            await self._blobs.put(content + _KNOWN, [json_format.MessageToJson(asset).encode()], durable=True)
            await self._blobs.put_file(content, path)
        return asset

    def require_room(self, size_bytes: int) -> None:
        """Checks that so many bytes more can be taken; for uploads.

        Raises:
            NotReady: they cannot.
        """
        free = shutil.disk_usage(self._uploads).free
        if free < size_bytes + self._reserve_bytes:
            raise disk_full(f"{size_bytes} bytes are to come, {max(0, free - self._reserve_bytes)} can be taken")

    def release(self, upload: Upload) -> None:
        """Forgets an upload that is no longer written to; for uploads."""
        if self._active.get(upload.path) is upload:
            del self._active[upload.path]

    def _check(self, metadata: pb.UploadMetadata) -> None:
        violations = []
        if metadata.upload_id and not _UPLOAD_ID.fullmatch(metadata.upload_id):
            violations.append(("metadata.upload_id", _UPLOAD_ID_FORM))
        if len(metadata.filename) > MAX_FILENAME_CHARACTERS:
            text = f"must have at most {MAX_FILENAME_CHARACTERS} characters, has {len(metadata.filename)}"
            violations.append(("metadata.filename", text))
        if _NOT_IN_FILENAMES.search(metadata.filename):
            violations.append(("metadata.filename", "must be a name without directories and control characters"))
        if not 1 <= metadata.size_bytes <= self._max_size_bytes:
            text = f"must be 1 to {self._max_size_bytes}, got {metadata.size_bytes}"
            violations.append(("metadata.size_bytes", text))
        if metadata.sha256 and not _SHA256.fullmatch(metadata.sha256):
            violations.append(("metadata.sha256", "must be 64 hexadecimal digits"))
        if metadata.offset_bytes > metadata.size_bytes:
            text = f"must be 0 to size_bytes = {metadata.size_bytes}, got {metadata.offset_bytes}"
            violations.append(("metadata.offset_bytes", text))
        if metadata.offset_bytes and not metadata.upload_id:
            violations.append(("metadata.offset_bytes", "must be 0 where there is no upload_id"))
        if violations:
            raise InvalidRequest(*violations)


class Upload:
    """A file that is being sent; to be used as a context manager, which closes it.

    Closed without `finish`, it can be gone on with if it has an upload_id and is gone otherwise.
    """

    def __init__(self, store: AssetStore, metadata: pb.UploadMetadata, path: Path) -> None:
        self.path = path
        self._store, self._metadata = store, metadata
        self._received = 0
        self._descriptor: int | None = None
        self._lock = asyncio.Lock()

    async def append(self, data: bytes) -> None:
        """Adds the next bytes of the file.

        Raises:
            InvalidRequest: they are none, too many for one message, or more than the file has.
            WrongState: another call goes on with this upload.
            NotReady: the disk is full.
        """
        if not 1 <= len(data) <= MAX_DATA_BYTES:
            raise InvalidRequest(("data", f"must be 1 to {MAX_DATA_BYTES} bytes, got {len(data)}"))
        await self.run(lambda: self._append(data))

    async def finish(self) -> pb.Asset:
        """Takes the file into the store.

        Raises:
            InvalidRequest: bytes are missing, or they are not those of the SHA-256; the upload begins anew then.
            WrongState: another call goes on with this upload.
            NotReady: the disk is full.
        """

        async def finish() -> pb.Asset:
            await asyncio.to_thread(self._complete)
            with full_disk_is_not_ready():
                return await self._store.adopt(self.path, self._metadata.filename, self._metadata.sha256)

        return await self._alone(finish)

    async def close(self) -> None:
        """Stops writing; may be called again and after `finish`."""
        await self.run(self._close)
        self._store.release(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs work on this upload in a thread, one at a time, to its end even when the caller is cancelled.

        Otherwise a call that goes on with the upload could meet a thread of the one before, still writing.
        """
        return await self._alone(lambda: asyncio.to_thread(work))

    async def _alone(self, work: Callable[[], Coroutine[object, object, Result]]) -> Result:
        async def alone() -> Result:
            async with self._lock:
                return await work()

        return await asyncio.shield(asyncio.create_task(alone()))

    def open(self) -> None:
        """Opens the file at the offset of the metadata; for the store."""
        offset = self._metadata.offset_bytes
        arrived = _size(self.path)
        if offset and offset != arrived:
            raise WrongState(f"{arrived or 0} bytes have arrived, offset_bytes is {offset}", reason="WRONG_OFFSET")
        self._store.require_room(self._metadata.size_bytes - offset)
        with full_disk_is_not_ready():
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.ftruncate(self._descriptor, offset)
        self._received = offset

    def _append(self, data: bytes) -> None:
        descriptor = self._open_descriptor()
        if self._received + len(data) > self._metadata.size_bytes:
            raise InvalidRequest(("data", f"is more than the {self._metadata.size_bytes} bytes of size_bytes"))
        rest = memoryview(data)
        with full_disk_is_not_ready():
            while rest:
                written = os.write(descriptor, rest)
                self._received += written
                rest = rest[written:]

    def _complete(self) -> None:
        self._open_descriptor()
        if self._received != self._metadata.size_bytes:
            text = f"is {self._metadata.size_bytes}, but {self._received} bytes have arrived"
            raise InvalidRequest(("metadata.size_bytes", text))
        self._close_descriptor()

    def _close(self) -> None:
        self._close_descriptor()
        if not self._metadata.upload_id:
            self.path.unlink(missing_ok=True)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise WrongState("another call goes on with this upload, or it is over", reason="UPLOAD_TAKEN_OVER")
        return self._descriptor

    def _close_descriptor(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_UPLOAD_ID_FORM = "must be 1 to 64 characters of a-z, A-Z, 0-9, - and _"


def _part(upload_id: str) -> str:
    """Name of the file of an unfinished upload: callers choose ids, and must not meet in one."""
    caller = current_caller()
    return f"{caller}.{upload_id}.part" if caller else f"{upload_id}.part"


def _content(asset_id: str) -> str:
    return f"{asset_id[:2]}/{asset_id}"


def _looked_at(path: Path, filename: str) -> pb.Asset:
    """What a file is."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
    asset = pb.Asset(
        name=f"assets/{found}", filename=filename, size_bytes=size, sha256=found, media_type=media_type(head)
    )
    asset.create_time.GetCurrentTime()
    return asset


def _not_found(asset_id: str) -> NotFound:
    return NotFound(f"there is no assets/{asset_id}")


def _size(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return None
