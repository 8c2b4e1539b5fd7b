"""Tensors between processes of one host through shared memory.

A process owns segments: files in a directory in memory (`/dev/shm`, or a volume that the containers of a pod share).
The sender copies a tensor into a free segment and sends its place; the receiver maps the segment and reads it there.
The first page of a segment holds two counters: the sender writes the number of the use, the receiver writes the same
number into the second when it no longer needs the bytes, and the segment is free again. Segments are used again and
again, because fresh pages cost more than the copy.

Nothing outlives a process. Each holds a lock on a file of its own while it lives; whoever finds such a lock free
removes that process's segments. A segment that was handed to a process which died is given up by its sender.
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
# Below this, bytes in the stream are as fast
MIN_BYTES = 64 * 1024
_PAGE = 4096
_NAME = re.compile(r"bunraku-([0-9a-f]{16})\.[0-9]{1,9}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SWEEP_INTERVAL_S = 5.0


def boot_id() -> str:
    """Identifies the running kernel, empty where that cannot be told."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class _Segment:
    """One file, mapped. `counters` are [use, released]."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        self.size_bytes = len(mapping) - _PAGE
        self.counters = np.frombuffer(mapping, np.uint64, count=2)
        self.stat = path.stat()

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
class Lent:
    """A segment of ours and whom it was last lent to."""

    segment: _Segment
    peer: str = ""

    @property
    def place(self) -> tensor_pb2.SharedMemory:
        """Where its present use lies."""
        use = int(self.segment.counters[0])
        return tensor_pb2.SharedMemory(segment=self.segment.path.name, offset_bytes=_PAGE, generation=use)

    @property
    def free(self) -> bool:
        use, released = self.segment.counters
        return bool(use == released)


@dataclass
class SharedMemory:
    """The segments of this process, and its view of those of others. Thread-safe.

    Args:
        directory: where segments lie; must be in memory and the same for all that are to share.
        capacity_bytes: the most that segments of this process may take together; beyond it tensors go as bytes.
    """

    directory: Path = DIRECTORY
    capacity_bytes: int = 2 * 1024**3
    instance: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self._own: list[Lent] = []
        self._foreign: dict[str, _Segment] = {}
        self._lock = threading.RLock()
        self._count = 0
        self._next_sweep = 0.0
        # locked before it has its name, so that nobody finds it unlocked while its owner lives
        nameless = self.directory / f"bunraku-{self.instance}.starting"
        self._lease = os.open(nameless, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        nameless.rename(self._lease_path(self.instance))
        self.sweep()

    @classmethod
    def create(cls, directory: Path = DIRECTORY, capacity_bytes: int = 2 * 1024**3) -> SharedMemory | None:
        """None where the directory cannot be written to: tensors then go as bytes."""
        try:
            return cls(directory, capacity_bytes)
        except OSError:
            return None

    def close(self) -> None:
        """Removes the segments of this process; memory that is still read stays until it no longer is."""
        with self._lock:
            for lent in self._own:
                lent.segment.path.unlink(missing_ok=True)
            self._own.clear()
            self._foreign.clear()
            if self._lease >= 0:
                self._lease_path(self.instance).unlink(missing_ok=True)
                os.close(self._lease)
                self._lease = -1

    def place(self, data: npt.NDArray[np.uint8], peer: str) -> Lent | None:
        """Copies bytes to where `peer` can read them; None when they are few or there is no room."""
        if data.nbytes < MIN_BYTES:
            return None
        self._sweep_now_and_then()
        with self._lock:
            lent = self._free_segment(data.nbytes)
            if lent is None:
                return None
            lent.peer = peer
            lent.segment.counters[0] += np.uint64(1)
        lent.segment.payload(data.nbytes)[:] = data
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
            raise NotReady(f"{name} lies in a segment that is gone: {error}", reason="SHARED_MEMORY_LOST") from error
        if place.offset_bytes != _PAGE or size_bytes > segment.size_bytes:
            raise InvalidRequest((name, "lies outside its segment"))
        if int(segment.counters[0]) != place.generation:
            raise InvalidRequest((name, "lies in a segment that was used again"))
        data = segment.payload(size_bytes)
        weakref.finalize(data, _release, segment, place.generation).atexit = False
        return data

    def give_up(self, given: Collection[Lent]) -> None:
        """Removes segments that were lent for a call that failed: nobody may ever give them back."""
        with self._lock:
            for lent in given:
                if lent in self._own and not lent.free:
                    lent.segment.path.unlink(missing_ok=True)
                    self._own.remove(lent)

    def sweep(self) -> None:
        """Removes the segments of processes that died, gives up what was lent to them, and closes stale views."""
        dead = {instance for instance in self._instances() if instance != self.instance and self._is_dead(instance)}
        for instance in dead:
            for path in self.directory.glob(f"bunraku-{instance}.*"):
                path.unlink(missing_ok=True)
        with self._lock:
            self.give_up([lent for lent in self._own if not lent.free and not self._lease_path(lent.peer).exists()])
            for stale in [name for name, segment in self._foreign.items() if not segment.path.exists()]:
                del self._foreign[stale]

    def is_alive(self, instance: str) -> bool:
        """Whether the process of this instance still runs."""
        return self._lease_path(instance).exists() and not self._is_dead(instance)

    @property
    def own_bytes(self) -> int:
        """What segments of this process take together."""
        return sum(lent.segment.size_bytes for lent in self._own)

    def nonce_segment(self, nonce: bytes) -> str:
        """Writes a nonce where a peer can read it; returns the segment's name. Raises OSError without room."""
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
        with suppress(OSError):
            return match[1], (self.directory / segment).read_bytes()[:64]
        return None

    def _free_segment(self, size_bytes: int) -> Lent | None:
        fitting = [lent for lent in self._own if lent.free and lent.segment.size_bytes >= size_bytes]
        if fitting:
            return min(fitting, key=lambda lent: lent.segment.size_bytes)
        # sizes in powers of two, so that a segment serves the next tensor too
        wanted = min(1 << (size_bytes - 1).bit_length(), self.capacity_bytes)
        self._drop_free(self.own_bytes + wanted - self.capacity_bytes)
        if wanted < size_bytes or self.own_bytes + wanted > self.capacity_bytes:
            return None
        try:
            lent = Lent(_Segment.create(self._next_path(), wanted))
        except OSError:
            return None
        self._own.append(lent)
        return lent

    def _drop_free(self, size_bytes: int) -> None:
        """Removes free segments until so many bytes are gone, the smallest first."""
        for lent in sorted(self._own, key=lambda lent: lent.segment.size_bytes):
            if size_bytes <= 0:
                return
            if lent.free:
                lent.segment.path.unlink(missing_ok=True)
                self._own.remove(lent)
                size_bytes -= lent.segment.size_bytes

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

    def _sweep_now_and_then(self) -> None:
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_INTERVAL_S
            self.sweep()


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

    def failed(self) -> None:
        """The call did not end well: what was lent for it may never be given back."""
        self.memory.give_up(self.lent)
