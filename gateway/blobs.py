"""Bytes under names: in a directory, or in a bucket of any S3-compatible store.

Names are paths with `/` that the gateway makes itself. Something is there whole or not at all; what is written again
replaces what was. Both kinds raise NotFound for a name that is not there and NotReady when the storage is full or away.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from bunraku.errors import NotFound, NotReady

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Bytes = bytes | memoryview
_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S, _RETRY_S, _RETRIES = 3, 60, 10, 5
_ARRIVING = ".arriving"
_CHUNK_BYTES = 8 << 20
# Every mapping holds an open file for as long as somebody has what was read; to copy less than this takes no time
_MAPPED_FROM_BYTES = 1 << 20
_RENAMES = 100


@dataclass(frozen=True)
class Blob:
    """One name and what is known of it.

    Attributes:
        used_s: when it was written or, in a directory, last marked as used; seconds since 1970.
    """

    name: str
    size_bytes: int
    used_s: float


class BlobStore(Protocol):
    """Where bytes are kept."""

    async def put(self, name: str, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        """Writes the parts one after another; durable: they survive a power cut, and are on the disk when this ends."""

    async def put_file(self, name: str, path: Path) -> None:
        """Takes a finished file, which is no longer at `path` then; durable."""

    async def read(self, name: str) -> memoryview:
        """All of it; stays what it is when the name is deleted or written again."""

    async def fetch(self, name: str, path: Path) -> None:
        """Copies it to a file, which appears under its name when it is whole."""

    async def find(self, name: str) -> Blob | None:
        """What is known of it; None where it is not there."""

    async def under(self, prefix: str) -> list[Blob]:
        """Everything whose name begins with `prefix`, which is empty or ends with `/`; in no order."""

    async def delete(self, *names: str) -> None:
        """Those that are not there are left so."""

    async def mark_used(self, *names: str) -> None:
        """Lets `used_s` be now, where the store can."""


class DirectoryBlobs:
    """Files in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._arriving = directory, directory / _ARRIVING
        self._arriving.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the file of a name is, or would be."""
        return self._directory / name

    async def put(self, name: str, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        def write() -> None:
            with self._file_for(name, durable=durable) as arriving, arriving.open("wb", buffering=0) as file:
                for part in parts:
                    rest = memoryview(part).cast("B")
                    while rest:
                        rest = rest[file.write(rest) :]

        await asyncio.to_thread(write)

    async def put_file(self, name: str, path: Path) -> None:
        def move() -> None:
            with self._file_for(name, durable=True) as arriving:
                shutil.move(path, arriving)  # copies where `path` is on another file system

        await asyncio.to_thread(move)

    async def read(self, name: str) -> memoryview:
        return await asyncio.to_thread(_mapped, self.path(name), name)

    async def fetch(self, name: str, path: Path) -> None:
        def copy() -> None:
            partial = path.with_name(f".{uuid.uuid4().hex}.part")
            try:
                with full_disk_is_not_ready():
                    shutil.copyfile(self.path(name), partial)
                partial.replace(path)
            except FileNotFoundError as error:
                raise _not_found(name) from error
            finally:
                partial.unlink(missing_ok=True)

        await asyncio.to_thread(copy)

    async def find(self, name: str) -> Blob | None:
        return await asyncio.to_thread(self._find, name)

    async def under(self, prefix: str) -> list[Blob]:
        def walk() -> list[Blob]:
            names = [
                str((Path(folder) / file).relative_to(self._directory))
                for folder, _, files in os.walk(self._directory / prefix)
                for file in files
                if Path(folder) != self._arriving
            ]
            return [found for name in names if (found := self._find(name)) is not None]

        return await asyncio.to_thread(walk)

    async def delete(self, *names: str) -> None:
        def unlink() -> None:
            for name in names:
                self.path(name).unlink(missing_ok=True)
                with suppress(OSError):  # others are in it, or it is gone already
                    self.path(name).parent.rmdir()

        await asyncio.to_thread(unlink)

    async def mark_used(self, *names: str) -> None:
        def touch() -> None:
            for name in names:
                with suppress(FileNotFoundError):
                    os.utime(self.path(name))

        await asyncio.to_thread(touch)

    def _find(self, name: str) -> Blob | None:
        try:
            status = self.path(name).stat()
        except FileNotFoundError:
            return None
        return Blob(name, status.st_size, status.st_mtime)

    @contextmanager
    def _file_for(self, name: str, *, durable: bool) -> Iterator[Path]:
        """A path to write to; what is there at the end of the block gets the name."""
        arriving, final = self._arriving / uuid.uuid4().hex, self.path(name)
        try:
            with full_disk_is_not_ready():
                yield arriving
                if durable:
                    _sync(arriving, os.O_RDONLY)
                self._rename(arriving, final)
                if durable:
                    for folder in (final.parent, self._directory):
                        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)
        finally:
            arriving.unlink(missing_ok=True)

    def _rename(self, arriving: Path, final: Path) -> None:
        for attempt in range(_RENAMES):
            try:
                final.parent.mkdir(parents=True, exist_ok=True)
                arriving.replace(final)
                return
            except (FileExistsError, FileNotFoundError):  # a delete has just removed the folder that it left empty
                if attempt == _RENAMES - 1 or not arriving.exists():
                    raise


class BucketBlobs:
    """Objects in a bucket, through obstore."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def put(self, name: str, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        import obstore

        content = await asyncio.to_thread(b"".join, parts)
        async with _storage():
            await obstore.put_async(self._store, name, content)

    async def put_file(self, name: str, path: Path) -> None:
        import obstore

        async with _storage():
            # in parts above some megabytes, so that no file is in memory as a whole
            await obstore.put_async(self._store, name, path)
        await asyncio.to_thread(path.unlink)

    async def read(self, name: str) -> memoryview:
        import obstore

        async with _storage(name):
            result = await obstore.get_async(self._store, name)
            return memoryview(await result.buffer_async())

    async def fetch(self, name: str, path: Path) -> None:
        import obstore

        partial = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            async with _storage(name):
                result = await obstore.get_async(self._store, name)
                with partial.open("wb") as file:
                    async for chunk in result.stream(_CHUNK_BYTES):
                        await asyncio.to_thread(_written, file, chunk)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    async def find(self, name: str) -> Blob | None:
        import obstore

        try:
            async with _storage(name):
                return _blob(await obstore.head_async(self._store, name))
        except NotFound:
            return None

    async def under(self, prefix: str) -> list[Blob]:
        import obstore

        async with _storage():
            return [_blob(meta) for meta in await obstore.list(self._store, prefix.rstrip("/") or None).collect_async()]

    async def delete(self, *names: str) -> None:
        import obstore

        for name in names:
            with suppress(NotFound):
                async with _storage(name):
                    await obstore.delete_async(self._store, name)

    async def mark_used(self, *names: str) -> None:
        """Objects cannot be marked; those that were written last count as used last."""


def open_blobs(location: str | Path, **settings: Any) -> BlobStore:
    """The store at a location: a directory, or a URL that obstore knows (`s3://bucket/prefix`, `gs://`, `az://`).

    Args:
        location: a URL's credentials, region and endpoint come from `settings` or the usual variables (AWS_...).
        settings: of obstore, such as `endpoint`.
    """
    if isinstance(location, Path) or "://" not in location:
        return DirectoryBlobs(Path(location))
    from obstore.store import from_url

    plain = urlsplit(str(settings.get("endpoint", os.environ.get("AWS_ENDPOINT_URL", "")))).scheme == "http"
    options: dict[str, Any] = {
        "client_options": {
            "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
            "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
            "allow_http": plain,
        },
        "retry_config": {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_S)},
    }
    return BucketBlobs(from_url(location, **options, **settings))


@contextmanager
def full_disk_is_not_ready() -> Iterator[None]:
    """Turns the error of a full disk into NotReady; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full("writing failed") from error
        raise


def disk_full(detail: str) -> NotReady:
    return NotReady(f"the gateway's disk is full: {detail}", reason="DISK_FULL", retry_after_s=60)


@asynccontextmanager
async def _storage(name: str = "") -> AsyncIterator[None]:
    """Turns obstore's errors into ours."""
    from obstore.exceptions import BaseError, NotFoundError

    try:
        yield
    except (FileNotFoundError, NotFoundError) as error:
        raise _not_found(name) from error
    except BaseError as error:
        text = f"the object storage is not available: {_first_line(error)}"
        raise NotReady(text, reason="STORAGE_UNAVAILABLE", retry_after_s=5) from error


def _blob(meta: Any) -> Blob:
    return Blob(meta["path"], meta["size"], meta["last_modified"].timestamp())


def _mapped(path: Path, name: str) -> memoryview:
    """A file as memory, read ahead of its use: no copy, and whoever uses it does not wait for the disk."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise _not_found(name) from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if size < _MAPPED_FROM_BYTES:
            return memoryview(file.read())
        populate: int = getattr(mmap, "MAP_POPULATE", 0)
        return memoryview(mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED | populate, prot=mmap.PROT_READ))


def _written(file: Any, chunk: Bytes) -> None:
    with full_disk_is_not_ready():
        file.write(chunk)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_found(name: str) -> NotFound:
    return NotFound(f"there is no {name} in the storage")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
