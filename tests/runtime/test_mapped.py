"""Pages of checkpoints leave the resident memory, and nothing else does."""

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runtime.mapped import MappedPages
from runtime.weights import read_checkpoint

NUMBERS = 4 * 1024**2  # float32: 16 MiB

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")


def resident_file_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def test_pages_of_a_file_are_dropped_and_come_back(tmp_path: Path) -> None:
    save_file({"weights": torch.ones(NUMBERS)}, tmp_path / "a.safetensors")
    weights = read_checkpoint([tmp_path / "a.safetensors"])["weights"]
    pages = MappedPages([weights])
    assert float(weights.sum()) == NUMBERS
    used = resident_file_bytes()
    pages.drop()
    assert used - resident_file_bytes() > 0.9 * weights.nbytes
    assert float(weights.sum()) == NUMBERS


def test_pages_can_be_dropped_when_the_tensor_is_gone_but_the_file_is_not(tmp_path: Path) -> None:
    save_file({"a": torch.ones(NUMBERS), "b": torch.ones(NUMBERS)}, tmp_path / "a.safetensors")
    tensors = read_checkpoint([tmp_path / "a.safetensors"])
    pages = MappedPages([tensors["a"]])
    assert float(tensors.pop("a").sum()) == NUMBERS
    used = resident_file_bytes()
    pages.drop()
    assert used - resident_file_bytes() > 0.9 * tensors["b"].nbytes
    assert float(tensors["b"].sum()) == NUMBERS


@pytest.mark.parametrize("name", ["a", "b"])
def test_pages_of_the_other_tensors_of_a_file_stay(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(NUMBERS), "b": torch.ones(NUMBERS)}, tmp_path / "a.safetensors")
    tensors = read_checkpoint([tmp_path / "a.safetensors"])
    pages = MappedPages([tensors[name]])
    assert all(float(tensor.sum()) == NUMBERS for tensor in tensors.values())
    used = resident_file_bytes()
    pages.drop()
    assert used - resident_file_bytes() == pytest.approx(tensors[name].nbytes, rel=0.1)


def test_memory_that_is_no_file_is_left_alone() -> None:
    values = torch.arange(NUMBERS)
    pages = MappedPages([values])
    pages.drop()
    assert torch.equal(values, torch.arange(NUMBERS))


def test_what_has_taken_the_addresses_since_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # pages of no file, which zeros would show to have been dropped
    memory = mmap.mmap(-1, NUMBERS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = torch.frombuffer(memory, dtype=torch.uint8).fill_(7)
    maps = Path("/proc/self/maps").read_text()

    def mapped(inode: int) -> None:
        entry = f"{values.data_ptr():x}-{values.data_ptr() + values.nbytes:x} rw-p 00000000 fe:00 {inode} /file\n"
        monkeypatch.setattr(Path, "read_text", lambda self: maps + entry)

    mapped(17)
    pages = MappedPages([values])
    mapped(18)
    pages.drop()
    assert bool((values == 7).all())
    mapped(17)
    pages.drop()
    assert not values.any()
