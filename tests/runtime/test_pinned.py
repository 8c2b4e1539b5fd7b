"""Pinned memory of exact sizes; on a machine without a GPU ordinary memory of the same kind."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runtime import pinned
from runtime.pinned import pinned_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SIZE = 33 * 1024**2


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("size", [0, 1, 4097])
def test_memory_has_the_size_that_was_asked_for(size: int) -> None:
    memory = pinned_memory(size, CPU)
    assert (memory.dtype, memory.shape) == (torch.uint8, (size,))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what is resident")
def test_memory_goes_back_to_the_system_with_its_last_view() -> None:
    memory = pinned_memory(SIZE, CPU).fill_(1)
    view = memory[17:].view(torch.int8)
    used = resident_bytes()
    del memory
    assert resident_bytes() > used - SIZE / 2
    assert int(view[0]) == 1
    del view
    assert resident_bytes() < used - SIZE / 2


def test_memory_is_registered_once_and_until_its_last_view_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def register(*arguments: int) -> int:
        calls.append(arguments)
        return 0

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: calls.append((address,)))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    memory = pinned_memory(5000, CUDA)
    address = memory.data_ptr()
    assert calls == [(address, 5000, 1)]
    view = memory[10:]
    del memory
    assert len(calls) == 1
    del view
    assert calls[1:] == [(address,)]


def test_memory_that_cannot_be_pinned_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released: list[int] = []
    driver = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaHostUnregister=released.append)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    launched: list[torch.device] = []

    def launch(count: int, device: torch.device) -> None:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")  # of the call before

    monkeypatch.setattr(torch, "ones", launch)
    memory = pinned_memory(8, CUDA).fill_(7)
    assert launched == [CUDA]  # so that what comes next does not meet that error
    assert "8 bytes of host memory could not be pinned: CUDA error 2" in caplog.text
    assert memory.tolist() == [7] * 8
    del memory
    assert released == []


def test_a_kernel_without_huge_pages_has_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pages: object, advice: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pinned._Pages, "madvise", refuse)
    assert pinned_memory(5, CPU).fill_(1).tolist() == [1] * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_from_it_by_itself() -> None:
    memory = pinned_memory(SIZE, CUDA).fill_(5)
    assert memory[100:].is_pinned()
    copied = memory.to(CUDA, non_blocking=True)
    torch.cuda.synchronize()
    assert bool((copied == 5).all())
