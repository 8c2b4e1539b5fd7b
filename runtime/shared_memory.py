"""Tensors between processes of one host through shared memory.

A process owns segments: files in a directory in memory (`/dev/shm`, or a volume that the containers of a pod share).
The sender copies a tensor into a free segment and sends its place; the receiver maps the segment and reads it there.
The first page of a segment holds three counters: the sender writes the number of the use, the receiver writes the same
number into the second when it no longer needs the bytes, and the segment is free again; it writes it into the third
when it finds the bytes, so that the sender knows which it may take back. Segments are used again and again, because
fresh pages cost more than the copy.

Nothing outlives a process. Each holds a lock on a file of its own while it lives, its lease; every process sweeps the
directory every few seconds, and whoever finds such a lock free removes that process's segments. A segment that was
handed to a process which died, or that nobody came for, is given up by its sender.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bunraku.errors import InvalidRequest, NotReady
from bunraku.v1 import tensor_pb2

DIRECTORY = Path("/dev/shm")
# Reason of a NotReady after which the two sides agree anew
LOST = "SHARED_MEMORY_LOST"
# Below this, bytes in the stream are as fast
MIN_BYTES = 64 * 1024
_PAGE = 4096
_NAME = re.compile(r"bunraku-([0-9a-f]{16})\.[0-9]{1,9}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SWEEP_INTERVAL_S = 5.0
# A caller that has not come for an answer by now never will; one that does is told to call again
_UNTAKEN_S = 600.0
_STARTING_S = 60.0
_NONCE_BYTES = 16


def boot_id() -> str:
    """Identifies the running kernel, empty where that cannot be told."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class _Segment:
    """One file, mapped. `counters` are [use, released, taken]."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        self.size_bytes = len(mapping) - _PAGE
        self.counters = np.frombuffer(mapping, np.uint64, count=3)

    @classmethod
    def create(cls, path: Path, size_bytes: int) -> _Segment:
        """Raises OSError when the directory has no room."""
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # all pages now: writing to a page that cannot be had later would kill the process
            os.posix_fallocate(descriptor, 0, _PAGE + size_bytes)
            return cls(path, mmap.mmap(descriptor, _PAGE + size_bytes))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, path: Path) -> _Segment:
        """Raises OSError or ValueError when it is not there or too small."""
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            return cls(path, mmap.mmap(descriptor, 0))
        finally:
            os.close(descriptor)

    def payload(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.mapping, np.uint8, count=size_bytes, offset=_PAGE)


@dataclass(eq=False)
class _Own:
    """A segment of ours, and whom it was last lent to."""

    segment: _Segment
    peer: str = ""
    lent_at: float = 0.0

    @property
    def use(self) -> int:
        return int(self.segment.counters[0])

    @property
    def free(self) -> bool:
        return self.use == int(self.segment.counters[1])

    @property
    def taken(self) -> bool:
        return self.use == int(self.segment.counters[2])


@dataclass(frozen=True)
class Lent:
    """One use of a segment: what was lent for one tensor."""

    own: _Own
    use: int

    @property
    def place(self) -> tensor_pb2.SharedMemory:
        """Where the bytes lie."""
        return tensor_pb2.SharedMemory(segment=self.own.segment.path.name, offset_bytes=_PAGE, generation=self.use)


@dataclass
class SharedMemory:
    """The segments of this process, and its view of those of others. Thread-safe.

    Args:
        directory: where segments lie; must be in memory and the same for all that are to share.
        capacity_bytes: the most that segments of this process may take together; beyond it tensors go as bytes.
        sweep_interval_s: how often what dead processes left is removed.
    """

    directory: Path = DIRECTORY
    capacity_bytes: int = 2 * 1024**3
    sweep_interval_s: float = _SWEEP_INTERVAL_S
    instance: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self._own: list[_Own] = []
        self._foreign: dict[str, _Segment] = {}
        self._lock = threading.RLock()
        self._count = 0
        self._closed = threading.Event()
        # locked before it has its name, so that nobody finds it unlocked while its owner lives
        nameless = self.directory / f"bunraku-{self.instance}.starting"
        self._lease = os.open(nameless, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        nameless.rename(self._lease_path(self.instance))
        sweeper = (weakref.ref(self), self._closed, self.sweep_interval_s)
        threading.Thread(target=_sweep_until_closed, args=sweeper, name="shared-memory", daemon=True).start()

    @classmethod
    def create(cls, directory: Path = DIRECTORY, capacity_bytes: int = 2 * 1024**3) -> SharedMemory | None:
        """None where the directory cannot be written to: tensors then go as bytes."""
        try:
            return cls(directory, capacity_bytes)
        except OSError:
            return None

    def close(self) -> None:
        """Removes the segments of this process; memory that is still read stays until it no longer is."""
        self._closed.set()
        with self._lock:
            self._own.clear()
            self._foreign.clear()
            self._remove_files(self.instance)
            if self._lease >= 0:
                os.close(self._lease)
                self._lease = -1

    def place(self, data: npt.NDArray[np.uint8], peer: str) -> Lent | None:
        """Copies bytes to where `peer` can read them; None when they are few or there is no room."""
        if data.nbytes < MIN_BYTES:
            return None
        with self._lock:
            own = None if self._closed.is_set() else self._free_segment(data.nbytes)
            if own is None:
                return None
            own.peer, own.lent_at = peer, time.monotonic()
            own.segment.counters[0] += np.uint64(1)
            lent = Lent(own, own.use)
        own.segment.payload(data.nbytes)[:] = data
        return lent

    def take(self, name: str, place: tensor_pb2.SharedMemory, size_bytes: int, peer: str) -> npt.NDArray[np.uint8]:
        """The bytes that `peer` placed; they are given back when the last view of the array is gone.

        Raises:
            InvalidRequest: the place is not a segment of that peer, is out of its bounds, or was used again.
            NotReady: the segment is gone; the caller may agree anew.
        """
        match = _NAME.fullmatch(place.segment)
        if match is None or match[1] != peer:
            raise InvalidRequest((name, "lies in a segment that is not the caller's"))
        try:
            segment = self._foreign_segment(place.segment)
        except (OSError, ValueError) as error:
            raise NotReady(f"{name} lies in a segment that is gone: {error}", reason=LOST) from error
        if place.offset_bytes != _PAGE or size_bytes > segment.size_bytes:
            raise InvalidRequest((name, "lies outside its segment"))
        if int(segment.counters[0]) != place.generation:
            raise InvalidRequest((name, "lies in a segment that was used again"))
        segment.counters[2] = place.generation
        data = segment.payload(size_bytes)
        weakref.finalize(data, _release, segment, place.generation).atexit = False
        return data

    def take_back(self, given: Collection[Lent]) -> None:
        """Removes those segments that nobody has taken: nobody would ever give them back."""
        with self._lock:
            for lent in given:
                own = lent.own
                if own in self._own and own.use == lent.use and not own.free and not own.taken:
                    self._remove(own)

    def sweep(self) -> None:
        """Removes the segments of processes that died, gives up what was lent to them, and closes stale views."""
        for instance in self._instances():
            if instance != self.instance and self._is_dead(instance):
                self._remove_files(instance)
        with self._lock:
            lent = [own for own in self._own if not own.free]
            for own in lent:
                if not self._lease_path(own.peer).exists():
                    self._remove(own)
            now = time.monotonic()
            self.take_back([Lent(own, own.use) for own in lent if now - own.lent_at > _UNTAKEN_S])
            for stale in [name for name, segment in self._foreign.items() if not segment.path.exists()]:
                del self._foreign[stale]

    def is_alive(self, instance: str) -> bool:
        """Whether the process of this instance still runs."""
        return self._lease_path(instance).exists() and not self._is_dead(instance)

    @property
    def own_bytes(self) -> int:
        """What segments of this process take together."""
        return sum(own.segment.size_bytes for own in self._own)

    def nonce_segment(self, nonce: bytes) -> str:
        """Writes a nonce where a peer can read it; returns the segment's name. Raises OSError without room."""
        with self._lock:
            path = self._next_path()
        path.touch(0o600, exist_ok=False)
        path.write_bytes(nonce)
        return path.name

    def remove_nonce(self, segment: str) -> None:
        (self.directory / segment).unlink(missing_ok=True)

    def read_nonce(self, segment: str) -> tuple[str, bytes] | None:
        """The peer's instance and its nonce; None if the segment cannot be read here."""
        match = _NAME.fullmatch(segment)
        if match is None:
            return None
        try:
            descriptor = os.open(self.directory / segment, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with open(descriptor, "rb") as file:
            nonce = file.read(_NONCE_BYTES + 1)
        return (match[1], nonce) if len(nonce) == _NONCE_BYTES else None

    def _free_segment(self, size_bytes: int) -> _Own | None:
        fitting = [own for own in self._own if own.free and own.segment.size_bytes >= size_bytes]
        if fitting:
            return min(fitting, key=lambda own: own.segment.size_bytes)
        # in steps of an eighth, so that a segment serves the next tensor too and little of it is never used
        step = max(_PAGE, 1 << max(0, size_bytes.bit_length() - 4))
        wanted = -(-size_bytes // step) * step
        self._drop_free(self.own_bytes + wanted - self.capacity_bytes)
        if self.own_bytes + wanted > self.capacity_bytes:
            return None
        try:
            own = _Own(_Segment.create(self._next_path(), wanted))
        except OSError:
            return None
        self._own.append(own)
        return own

    def _drop_free(self, size_bytes: int) -> None:
        """Removes free segments until so many bytes are gone, the smallest first."""
        for own in sorted(self._own, key=lambda own: own.segment.size_bytes):
            if size_bytes <= 0:
                return
            if own.free:
                self._remove(own)
                size_bytes -= own.segment.size_bytes

    def _remove(self, own: _Own) -> None:
        own.segment.path.unlink(missing_ok=True)
        self._own.remove(own)

    def _remove_files(self, instance: str) -> None:
        """Everything of an instance; the lease last, so that whoever is interrupted here leaves it to be found."""
        for path in self.directory.glob(f"bunraku-{instance}.[0-9]*"):
            path.unlink(missing_ok=True)
        self._lease_path(instance).unlink(missing_ok=True)

    def _foreign_segment(self, name: str) -> _Segment:
        with self._lock:
            segment = self._foreign.get(name)
            if segment is None:
                segment = self._foreign[name] = _Segment.open(self.directory / name)
            return segment

    def _next_path(self) -> Path:
        self._count += 1
        return self.directory / f"bunraku-{self.instance}.{self._count}"

    def _lease_path(self, instance: str) -> Path:
        return self.directory / f"bunraku-{instance}.lease"

    def _instances(self) -> Iterator[str]:
        for path in self.directory.glob("bunraku-*.lease"):
            yield path.name.removeprefix("bunraku-").removesuffix(".lease")
        for path in self.directory.glob("bunraku-*.starting"):
            # a process that died within the microseconds in which its lease has this name
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STARTING_S:
                    path.unlink()

    def _is_dead(self, instance: str) -> bool:
        try:
            descriptor = os.open(self._lease_path(instance), os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        else:
            return True
        finally:
            os.close(descriptor)


def _sweep_until_closed(memory: weakref.ref[SharedMemory], closed: threading.Event, interval_s: float) -> None:
    while True:
        present = memory()
        if present is None:
            return
        present.sweep()
        del present
        if closed.wait(interval_s):
            return


def _release(segment: _Segment, generation: int) -> None:
    segment.counters[1] = np.uint64(generation)


@dataclass
class Sharing:
    """Shared memory as agreed with one peer, for one call: what `send_tensors` and `receive` take."""

    memory: SharedMemory
    peer: str
    lent: list[Lent] = field(default_factory=list)

    def place(self, data: npt.NDArray[np.uint8]) -> tensor_pb2.SharedMemory | None:
        lent = self.memory.place(data, self.peer)
        if lent is None:
            return None
        self.lent.append(lent)
        return lent.place

    def take(self, name: str, place: tensor_pb2.SharedMemory, size_bytes: int) -> npt.NDArray[np.uint8]:
        return self.memory.take(name, place, size_bytes, self.peer)

    def ended(self) -> None:
        """The peer will read no more of this call: what it has not taken by now it never will."""
        self.memory.take_back(self.lent)
