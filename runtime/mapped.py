"""Pages of memory-mapped files, which are resident memory of the process from their first use until they are dropped."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED


@dataclass(frozen=True)
class _Span:
    """Addresses from `start` up to `end` that stand for a part of a file."""

    start: int
    end: int
    file: tuple[str, str]  # device and inode


class MappedPages:
    """Where those of some tensors lie that are private mappings of files, as checkpoints are.

    Does nothing where the system does not say what is mapped (other than Linux).
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        files = _mapped_files()
        spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.is_cpu]
        self._spans = [part for start, end in spans for part in _parts(start, end, files)]

    def drop(self) -> None:
        """Takes the pages out of the process's resident memory; read again, they come from the file.

        The tensors may be gone by now. What has been written to them is lost; weights are only read.
        """
        files = _mapped_files()
        libc = ctypes.CDLL(None)
        for span in self._spans:
            # only where the file still is: the addresses may have been given to something else
            for part in _parts(span.start, span.end, [file for file in files if file.file == span.file]):
                first = part.start - part.start % mmap.PAGESIZE
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(part.end - first), _DONTNEED)


def _parts(start: int, end: int, files: Iterable[_Span]) -> list[_Span]:
    """What of the addresses from `start` to `end` is in files."""
    return [
        _Span(max(start, each.start), min(end, each.end), each.file)
        for each in files
        if each.start < end and start < each.end
    ]


def _mapped_files() -> list[_Span]:
    """All private mappings of files."""
    if not _MAPS.exists():
        return []
    found = []
    for line in _MAPS.read_text().splitlines():
        addresses, permissions, _, device, inode = line.split(maxsplit=5)[:5]
        if permissions.endswith("p") and inode != "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(_Span(start, end, (device, inode)))
    return found
