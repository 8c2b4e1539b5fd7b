"""Files that weights wait in: what they hold, that nothing is left of them, and what happens when a disk fails."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import streaming
from runtime.offload import FilePiece
from runtime.streaming import (
    BlockStreamer,
    Piece,
    bring_for_calls,
    into_host_memory,
    size_of,
    stream_blocks,
    weights_of,
)
from tests.runtime.test_streaming import layers

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
VALUES = torch.ones(2, 7)


def filed(layer: torch.nn.Module, folder: Path) -> Piece:
    weights = list(weights_of(layer))
    return Piece(weights, FilePiece(size_of(weights), folder))


def numbers(size: int) -> torch.Tensor:
    return (torch.arange(size) % 251).to(torch.uint8)


def empty(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def reading_threads() -> int:
    return sum(thread.name.startswith("offload") for thread in threading.enumerate())


def fails_with(code: int) -> Any:
    def fail(*given: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_piece_reads_what_was_written_to_it(tmp_path: Path) -> None:
    piece = FilePiece(5000, tmp_path)
    piece.tensor.copy_(numbers(5000))
    piece.drop()
    assert torch.equal(piece.read(empty(5000)), numbers(5000))
    assert torch.equal(piece.tensor, numbers(5000))


def test_a_piece_of_nothing_is_empty(tmp_path: Path) -> None:
    assert FilePiece(0, tmp_path).read(empty(0)).numel() == 0


def test_the_file_has_no_name_and_goes_with_the_piece(tmp_path: Path) -> None:
    before = descriptors()
    piece = FilePiece(4096, tmp_path)
    assert not list(tmp_path.iterdir())
    assert descriptors() > before
    del piece
    assert descriptors() == before


def test_nothing_is_left_of_a_process_that_was_killed(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from runtime.offload import FilePiece
piece = FilePiece(1 << 20, Path({str(tmp_path)!r}))
piece.tensor.fill_(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False)
    assert ended.returncode == -9
    assert not list(tmp_path.iterdir())


def test_reads_go_on_where_the_system_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece, preadv = FilePiece(1000, tmp_path), os.preadv
    piece.tensor.copy_(numbers(1000))
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:300]], at))
    assert torch.equal(piece.read(empty(1000)), numbers(1000))


def test_a_file_that_ends_early_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = FilePiece(1000, tmp_path)
    monkeypatch.setattr(os, "preadv", lambda *given: 0)
    with pytest.raises(OSError, match="an offloaded piece of 1000 bytes ends after 0"):
        piece.read(empty(1000))


def test_a_full_disk_is_told_with_the_folder_and_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(os, "posix_fallocate", fails_with(errno.ENOSPC))
    with pytest.raises(OSError, match=f"No space left on device: 4096 bytes to offload: '{tmp_path}'"):
        FilePiece(4096, tmp_path)
    assert descriptors() == before


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FilePiece(1, tmp_path / "nowhere")


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_layers_that_wait_in_files_compute_the_same_again_and_again(count: int, tmp_path: Path) -> None:
    model = layers(count)
    expected, last = model(VALUES), model[-1](VALUES)
    undo = stream_blocks([(layer, filed(layer, tmp_path)) for layer in model], CPU)
    for _ in range(3):
        assert torch.equal(model(VALUES), expected)
        assert torch.equal(model[-1](VALUES), last)  # out of turn, as after a run that was cancelled
    assert reading_threads() == 1
    undo()
    assert reading_threads() == 0


def test_a_layer_comes_from_its_file_for_a_call(tmp_path: Path) -> None:
    layer = layers(1)
    expected, piece = layer(VALUES), into_host_memory(layer, CPU, tmp_path)
    bring_for_calls(layer, piece, CPU)
    assert torch.equal(layer(VALUES), expected)
    assert piece.file is not None
    assert piece.on(CPU).data_ptr() != piece.host.data_ptr()


def test_a_disk_that_fails_fails_the_call_and_not_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(4)
    expected = model(VALUES)
    undo = stream_blocks([(layer, filed(layer, tmp_path)) for layer in model], CPU)
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fails_with(errno.EIO))
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                model(VALUES)
    for _ in range(2):
        assert torch.equal(model(VALUES), expected)
    undo()


def test_a_disk_that_hangs_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, preadv, goes_on = layers(3), os.preadv, threading.Event()
    expected = model(VALUES)
    undo = stream_blocks([(layer, filed(layer, tmp_path)) for layer in model], CPU)

    def hanging(*given: Any) -> int:
        assert goes_on.wait(20)
        return preadv(*given)

    with monkeypatch.context() as slow:
        slow.setattr(os, "preadv", hanging)
        slow.setattr(streaming, "_READ_S", 0.05)
        with pytest.raises(TimeoutError, match=r"an offloaded piece was not read within 0\.05 s"):
            model(VALUES)
        goes_on.set()
        slow.setattr(streaming, "_READ_S", 20)
        assert torch.equal(model(VALUES), expected)
    undo()


def test_the_next_file_is_read_while_a_layer_computes(tmp_path: Path) -> None:
    streamer = BlockStreamer([filed(layer, tmp_path) for layer in layers(4)], CPU)
    streamer.before(0)
    streamer.after(0)
    reading = streamer._reading[streamer._held.index(2)]
    assert reading is not None
    reading.result(5)
    streamer.close()


def test_a_disk_that_gives_up_by_itself_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(3)
    undo = stream_blocks([(layer, filed(layer, tmp_path)) for layer in model], CPU)
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fails_with(errno.ETIMEDOUT))
        with pytest.raises(TimeoutError, match="Connection timed out"):
            model(VALUES)
    undo()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_come_to_a_gpu_from_files(tmp_path: Path) -> None:
    model, values = layers(6).to(CUDA), VALUES.to(CUDA)
    expected = model(values)
    undo = stream_blocks([(layer, filed(layer, tmp_path)) for layer in model], CUDA)
    for _ in range(20):
        assert torch.equal(model(values), expected)
    undo()
