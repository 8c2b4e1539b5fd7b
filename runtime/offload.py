"""Weights that wait in a file, where neither the device nor host memory has room for them.

The files have no names: nothing is left of them when the process ends, however it ends. What is read of them stays in
the page cache as long as the system has nothing better to do with its memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

_LARGE_BYTES = 2**20  # of a tensor that is worth a file of its own


class FilePiece:
    """Bytes in a file of their own.

    Attributes:
        tensor: uint8 [size], the mapped file; what is written to it is in the file.
    """

    def __init__(self, size: int, folder: Path) -> None:
        """Raises OSError where the folder is not there, cannot be written to, or has no room for so many bytes."""
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            self._descriptor = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            # a disk that turns out to be full when a mapped page is written would kill the process
            os.posix_fallocate(self._descriptor, 0, max(size, 1))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {size} bytes to offload", str(folder)) from error
        self._pages = mmap.mmap(self._descriptor, max(size, 1))
        self.tensor = torch.frombuffer(self._pages, dtype=torch.uint8)[:size]

    def drop(self) -> None:
        """Takes what has been written out of the process's resident memory; the file has it."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)

    def read(self, into: Tensor) -> Tensor:
        """Fills `into`, uint8 [size] in host memory, past the mapping, so that no page becomes resident; gives it back.

        Raises OSError where the disk fails.
        """
        view, done = into.numpy().data, 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], done)
            if not count:
                raise OSError(f"an offloaded piece of {len(view)} bytes ends after {done}")
            done += count
        return into


def in_file(tensor: Tensor, folder: Path) -> Tensor:
    """The same numbers in a file that goes with the last view of them, out of the process's resident memory until they
    are read; small tensors as they are. Raises OSError as `FilePiece`.
    """
    if tensor.nbytes < _LARGE_BYTES:
        return tensor
    piece = FilePiece(tensor.nbytes, folder)
    copy = piece.tensor.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    piece.drop()
    return copy
