"""What the LoRA benchmark measures is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.accuracy import Bench, int8_checkpoint
from benchmarks.lora import RANK, change, inputs_of_linears, measured, random_lora
from benchmarks.outliers import outlier_model
from services.denoiser.model import PRESETS

CPU = torch.device("cpu")
CONFIG = replace(
    PRESETS["scail-14b"], dim=256, ffn_dim=256, num_heads=2, num_layers=1, text_dim=16, text_len=8, image_dim=16
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


def test_a_random_lora_changes_a_weight_by_its_part_along_what_the_layer_is_given() -> None:
    weight, inputs = torch.randn(24, 32), torch.randn(5, 32)
    lora = random_lora(weight, inputs, 0.1)
    assert (tuple(lora.up.shape), tuple(lora.down.shape)) == ((24, RANK), (RANK, 32))
    assert float(change(lora).norm() / weight.norm()) == pytest.approx(0.1, rel=1e-4)
    assert int(torch.linalg.matrix_rank(torch.cat([change(lora), inputs]), rtol=1e-4)) == 5


def test_chosen_scales_leave_more_of_a_small_lora_than_the_smallest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.accuracy.SIDE", 64)
    model, bench = int8_checkpoint(outlier_model(CONFIG, CPU)), Bench(CONFIG, CPU, 5, 1)
    given = inputs_of_linears(bench, model)
    assert {inputs.shape[1] for inputs in given.values()} == {256}
    small, large = (measured(bench, model, given, part) for part in (0.01, 0.3))
    assert small.steps < 1 < large.steps
    assert small.left == pytest.approx(1, abs=0.03)
    assert small.smallest_left < 0.95
    assert small.velocity < small.smallest_velocity
    assert large.left == pytest.approx(1, abs=0.01)
    assert large.smallest_left == pytest.approx(1, abs=0.01)
    assert 0.005 < large.error < 0.02
    assert large.velocity < 0.1 * small.smallest_velocity
