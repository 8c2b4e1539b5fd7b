"""The parts of the memory benchmark that need no GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.memory import _line, difference, host_peaks, write_random
from services.denoiser.weights import load_transformer
from tests.services.denoiser.tiny import SCAIL, predict_animation

CPU = torch.device("cpu")
FEW = replace(SCAIL, num_layers=1)
ROW = {
    "budget": 0.0,
    "plan": "40 of 40 blocks",
    "seconds": [9.0, 4.0],
    "planned": 2**30,
    "allocated_bytes": 2**31,
    "reserved_bytes": 2**31,
    "driver_bytes": 2**31,
    "VmHWM": 2**32,
    "difference": 0.0,
    "load_seconds": 6.4,
}


def test_random_weights_are_a_checkpoint_that_loads_and_computes(tmp_path: Path) -> None:
    write_random(tmp_path / "random_quanto_int8.safetensors", FEW, CPU)
    model = load_transformer(
        [tmp_path / "random_quanto_int8.safetensors"], FEW, device=CPU, compute_dtype=torch.float32
    )
    weight = model.get_buffer("blocks.0.ffn.0.weight._data")
    assert weight.dtype == torch.int8
    assert 20 < float(weight.float().std()) < 36
    assert bool(predict_animation(model).isfinite().all())


def test_a_row_is_compared_with_the_first_by_its_second_pass() -> None:
    streamed = ROW | {"budget": 4.0, "seconds": [1.0, 4.2], "difference": 0.25}
    assert "| gpu_only | 40 of 40 blocks | 4.000 | 1.000 | 1.00 | 2.00 |" in _line([ROW])
    assert "the same bits" in _line([ROW])
    line = _line([ROW, streamed])
    assert line.startswith("| 4 | 40 of 40 blocks | 4.200 | 1.050 |")
    assert "2.5e-01" in line


def test_a_process_that_failed_is_a_row_too() -> None:
    line = _line([ROW, {"budget": 2.0, "failed": "exit status 1"}])
    assert line.startswith("| 2 | exit status 1 |")
    assert line.count("|") == _line([ROW]).count("|")


def test_the_first_result_is_what_the_others_are_compared_with(tmp_path: Path) -> None:
    expected = tmp_path / "expected.pt"
    assert difference(torch.ones(4), expected) == 0
    assert difference(torch.ones(4), expected) == 0
    assert difference(torch.full((4,), 1.5), expected) == pytest.approx(0.5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what is resident")
def test_peaks_of_host_memory_are_bytes() -> None:
    peaks = host_peaks()
    assert peaks["VmHWM"] >= peaks["VmRSS"] > 10**7
