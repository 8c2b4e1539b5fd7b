"""What stages have made, kept to be used again: by later generations of the same caller, and by one that goes on.

    cache/{caller}/{ab}/{digest}                   embeddings, latents of pictures and poses
    jobs/{id}/{digest}                             latents that the denoiser has finished, frames that were decoded
    jobs/{id}/{digest}.checkpoints/{step}-{claim}  where the denoiser was

An output is found under the digest of everything that decided it: the rpc, its parameters, the digests of its inputs
and the revision of what computed it, which stands for weights, types and program. An input that is itself an output
goes in with its own digest, so no tensor is read for that. What one caller's contents have led to, no other caller
finds: not even how long a request takes tells one of another's.

The cache holds so many bytes; what was used least recently goes first. What belongs to a generation goes when it ends.
Nothing here is needed to be right: an output that is gone, damaged or out of reach is made again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import struct
import time
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bunraku.errors import BunrakuError, InvalidRequest, NotFound
from bunraku.v1 import tensor_pb2
from gateway.blobs import Blob, BlobStore, Bytes
from runtime import telemetry
from runtime.tensors import WireTensor, check_header

_log = logging.getLogger(__name__)
_CACHE, _JOBS = "cache/", "jobs/"
# After making room so much of it is free, so that not every output has to make some
_ROOM = 0.1
_JOB_STAYS_S = 14 * 24 * 3600.0
_TIDY_INTERVAL_S = 600.0
_WRITTEN_WITHIN_S = 5.0

_MAGIC = b"bunraku-output-1"
_LENGTHS = struct.Struct("<II")  # of the header, and its CRC
_ALIGNMENT = 64


@dataclass(frozen=True)
class StageOutput:
    """What one call of a stage gave.

    Attributes:
        tensors: by name.
        facts: what it said beside them; JSON.
        revision: of what computed it; empty where the stage does not say.
        digest: of everything that decided it; empty where that is not known, and then it was not kept.
    """

    tensors: Mapping[str, WireTensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    revision: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Recipe:
    """What decides an output, but for what computes it.

    Attributes:
        stage: `encoder`, `pose`, `denoiser` or `vae`.
        method: the rpc, or what the gateway makes of several.
        parameters: of the rpc, as bytes that are the same for the same parameters.
        inputs: digests by name; of contents, or of outputs.
    """

    stage: str
    method: str
    parameters: bytes
    inputs: Mapping[str, str] = field(default_factory=dict)

    def digest(self, revision: str) -> str:
        """Of the output that something of this revision makes, 64 hexadecimal digits."""
        decisive = [self.stage, self.method, self.parameters.hex(), sorted(self.inputs.items()), revision]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


async def content_digest(*contents: WireTensor) -> str:
    """SHA-256 of tensors with their types and shapes, computed in a thread."""

    def digest() -> str:
        found = hashlib.sha256()
        for tensor in contents:
            found.update(f"{tensor.dtype} {tensor.shape}".encode())
            found.update(tensor.data.data)
        return found.hexdigest()

    return await asyncio.to_thread(digest)


class OutputStore:
    """Outputs of all generations.

    Args:
        blobs: where they are kept.
        capacity_bytes: that the cache may hold; what belongs to generations under way comes on top.
    """

    def __init__(self, blobs: BlobStore, *, capacity_bytes: int = 4 << 30) -> None:
        self._blobs, self._capacity_bytes = blobs, capacity_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()  # of the cache, least recently used first
        self._size_bytes = 0
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()  # of the locks
        self._writing: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)

    @property
    def size_bytes(self) -> int:
        """Of the cache, as far as this process knows."""
        return self._size_bytes

    def of_job(self, job_id: str, *, caller: str, claim: str) -> JobOutputs:
        """What a generation may find and keep.

        Args:
            job_id: of the generation.
            caller: whose it is; empty where callers have no names.
            claim: of the worker that works on it; nobody else writes under the same name.
        """
        return JobOutputs(self, job_id, caller, claim)

    async def forget(self, job_id: str) -> None:
        """Removes what belongs to a generation that has ended. What cannot be removed now goes when it is old."""
        with _not_needed("removed"):
            if writing := self._writing.get(job_id):
                await asyncio.wait(writing, timeout=_WRITTEN_WITHIN_S)
            await self._blobs.delete(*(blob.name for blob in await self._blobs.under(f"{_JOBS}{job_id}/")))

    async def keep_tidy(self) -> None:
        """Calls `tidy` now and every few minutes, until it is cancelled."""
        while True:
            with _not_needed("tidied"):
                await self.tidy()
            await asyncio.sleep(_TIDY_INTERVAL_S)

    async def tidy(self) -> None:
        """Looks at what is there, which other gateways change too, and removes what is old or too much."""
        found = sorted(await self._blobs.under(_CACHE), key=lambda blob: blob.used_s)
        self._sizes = OrderedDict((blob.name, blob.size_bytes) for blob in found)
        self._size_bytes = sum(self._sizes.values())
        await self._make_room()
        until = time.time() - _JOB_STAYS_S
        await self._blobs.delete(*(b.name for b in await self._blobs.under(_JOBS) if b.used_s < until))

    async def read(self, name: str) -> StageOutput | None:
        """What was kept under a name; None where nothing usable is."""
        found: StageOutput | None = None
        with _not_needed("read"):
            try:
                found = unpacked(await self._blobs.read(name))
                if name in self._sizes:
                    self._sizes.move_to_end(name)
                    await self._blobs.mark_used(name)
            except NotFound:
                self._dropped(name)
            except ValueError as error:
                _log.warning("%s is damaged and made again: %s", name, error)
                self._dropped(name)
                await self._blobs.delete(name)
        return found

    async def write(self, name: str, output: StageOutput) -> None:
        """Keeps an output, and makes room for it if it goes into the cache."""
        parts = packed(output)
        with _not_needed("kept"):
            await self._blobs.put(name, parts)
            if name.startswith(_CACHE):
                self._dropped(name)
                self._sizes[name] = sum(len(part) for part in parts)
                self._size_bytes += self._sizes[name]
                await self._make_room()

    def write_soon(self, job_id: str, writing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs a write for a generation to its end, whatever becomes of who asked for it."""
        task = asyncio.create_task(writing)
        tasks = self._writing[job_id]
        tasks.add(task)

        def written(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not tasks and self._writing.get(job_id) is tasks:
                del self._writing[job_id]

        task.add_done_callback(written)
        return task

    async def close(self) -> None:
        """Waits a moment for writes under way."""
        if tasks := [task for tasks in self._writing.values() for task in tasks]:
            await asyncio.wait(tasks, timeout=_WRITTEN_WITHIN_S)

    async def names(self, prefix: str) -> list[str]:
        """What is kept under a prefix, in no order."""
        blobs: list[Blob] = []
        with _not_needed("listed"):
            blobs = await self._blobs.under(prefix)
        return [blob.name for blob in blobs]

    async def delete(self, *names: str) -> None:
        with _not_needed("removed"):
            await self._blobs.delete(*names)

    @asynccontextmanager
    async def alone(self, key: str) -> AsyncIterator[None]:
        """One at a time: who comes second finds what the first has made."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] += 1
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]

    async def _make_room(self) -> None:
        if self._size_bytes <= self._capacity_bytes:
            return
        going = []
        while self._sizes and self._size_bytes > self._capacity_bytes * (1 - _ROOM):
            name, size_bytes = self._sizes.popitem(last=False)
            self._size_bytes -= size_bytes
            going.append(name)
        await self._blobs.delete(*going)

    def _dropped(self, name: str) -> None:
        self._size_bytes -= self._sizes.pop(name, 0)


@dataclass(frozen=True)
class JobOutputs:
    """Outputs as one generation sees them."""

    store: OutputStore
    job_id: str
    caller: str
    claim: str

    @asynccontextmanager
    async def alone(self, recipe: Recipe) -> AsyncIterator[None]:
        """Generations of this process that need the same make it one after another, so only the first does."""
        async with self.store.alone(self.cache_name(recipe.digest(""))):
            yield

    async def find(self, recipe: Recipe, revisions: Collection[str]) -> StageOutput | None:
        """What was made of a recipe before, by something of any of these revisions."""
        for revision in revisions:
            digest = recipe.digest(revision)
            found = await self.store.read(self.cache_name(digest))
            if found is not None:
                telemetry.OUTPUTS.add(stage=recipe.stage, result="hit")
                return replace(found, revision=revision, digest=digest)
        telemetry.OUTPUTS.add(stage=recipe.stage, result="miss")
        return None

    async def keep(self, recipe: Recipe, output: StageOutput) -> StageOutput:
        """Keeps an output for this caller; gives it with its digest."""
        if not output.revision:
            return output
        digest = recipe.digest(output.revision)
        await self.store.write(self.cache_name(digest), output)
        return replace(output, digest=digest)

    async def find_own(self, recipe: Recipe, revisions: Collection[str]) -> StageOutput | None:
        """As `find`, of what this generation has kept for itself."""
        for revision in revisions:
            digest = recipe.digest(revision)
            found = await self.store.read(self.own_name(digest))
            if found is not None:
                return replace(found, revision=revision, digest=digest)
        return None

    async def keep_own(self, recipe: Recipe, output: StageOutput) -> StageOutput:
        """As `keep`, until this generation ends and for nobody else."""
        if not output.revision:
            return output
        digest = recipe.digest(output.revision)
        await self.store.write(self.own_name(digest), output)
        return replace(output, digest=digest)

    def checkpoints(self, recipe: Recipe) -> Checkpoints:
        """Where the denoiser was with a recipe."""
        return Checkpoints(self.store, self.job_id, f"{self.own_name(recipe.digest(''))}.checkpoints/", self.claim)

    def cache_name(self, digest: str) -> str:
        caller = hashlib.sha256(self.caller.encode()).hexdigest()[:16]
        return f"{_CACHE}{caller}/{digest[:2]}/{digest}"

    def own_name(self, digest: str) -> str:
        return f"{_JOBS}{self.job_id}/{digest}"


class Checkpoints:
    """The checkpoints of one run of the denoiser.

    Written behind the run, which never waits for it; of several that wait only the newest is written. Each worker's
    have names of their own: one that was thought dead and goes on writes beside its successor's, not over them.
    """

    def __init__(self, store: OutputStore, job_id: str, prefix: str, claim: str) -> None:
        self._store, self._job_id, self._prefix, self._claim = store, job_id, prefix, claim
        self._next: tuple[int, StageOutput] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._written = ""

    async def last(self) -> StageOutput | None:
        """The one with the most steps, whoever wrote it."""
        for name in sorted(await self._store.names(self._prefix), reverse=True):
            if (found := await self._store.read(name)) is not None:
                return found
        return None

    def keep(self, completed_steps: int, checkpoint: StageOutput) -> None:
        """Has a checkpoint written soon."""
        self._next = completed_steps, checkpoint
        if self._writer is None or self._writer.done():
            self._writer = self._store.write_soon(self._job_id, self._write())

    async def _write(self) -> None:
        while self._next is not None:
            (completed_steps, checkpoint), self._next = self._next, None
            name = f"{self._prefix}{completed_steps:05d}-{self._claim}"
            await self._store.write(name, checkpoint)
            written, self._written = self._written, name
            if written and written != name:
                await self._store.delete(written)


def packed(output: StageOutput) -> list[Bytes]:
    """An output as bytes: magic, length and CRC of the header, the header (JSON), then the tensors, aligned."""
    tensors = [
        {"name": name, "dtype": t.dtype, "shape": t.shape, "size_bytes": t.size_bytes}
        for name, t in output.tensors.items()
    ]
    header = json.dumps({"facts": dict(output.facts), "tensors": tensors}).encode()
    parts: list[Bytes] = [_MAGIC, _LENGTHS.pack(len(header), zlib.crc32(header)), header]
    size = sum(len(part) for part in parts)
    for tensor in output.tensors.values():
        parts += [bytes(-size % _ALIGNMENT), tensor.data.data]
        size += -size % _ALIGNMENT + tensor.size_bytes
    return parts


def unpacked(blob: memoryview) -> StageOutput:
    """The output; its tensors share the bytes.

    Raises:
        ValueError: these are not the bytes of an output, or not all of them.
    """
    start = len(_MAGIC) + _LENGTHS.size
    if len(blob) < start or blob[: len(_MAGIC)] != _MAGIC:
        raise ValueError("is no output")
    length, check = _LENGTHS.unpack(blob[len(_MAGIC) : start])
    content = bytes(blob[start : start + length])
    if len(content) != length or zlib.crc32(content) != check:
        raise ValueError("has a damaged header")
    header = json.loads(content)
    position, tensors = start + length, {}
    for entry in header["tensors"]:
        position += -position % _ALIGNMENT
        end = position + entry["size_bytes"]
        tensors[entry["name"]] = _tensor(entry, blob[position:end])
        position = end
    if position != len(blob):
        raise ValueError(f"has {len(blob)} bytes instead of {position}")
    return StageOutput(tensors, header["facts"])


def _tensor(entry: Mapping[str, Any], content: memoryview) -> WireTensor:
    if len(content) != entry["size_bytes"]:
        raise ValueError("is cut off")
    try:
        check_header(tensor_pb2.TensorHeader(**entry))
    except InvalidRequest as error:
        raise ValueError(error.message) from error
    return WireTensor(entry["name"], entry["dtype"], tuple(entry["shape"]), np.frombuffer(content, np.uint8))


@contextmanager
def _not_needed(what: str) -> Iterator[None]:
    """Goes on after an error of the storage, with a warning: whatever is kept can be made again."""
    try:
        yield
    except (BunrakuError, OSError) as error:
        _log.warning("stage outputs cannot be %s: %s", what, error)
