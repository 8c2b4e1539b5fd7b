"""The encoder's memory benchmark at tiny sizes, without a GPU."""

import pytest
import torch

from benchmarks.encoder_memory import line, measured
from tests.services.encoder.checkpoints import IMAGE, TEXT


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_random_encoders_are_placed_and_run(budget: float) -> None:
    row = measured(TEXT, IMAGE, torch.device("cpu"), budget)
    assert row["prompt_s"] > 0
    assert row["picture_s"] > 0
    assert (row["planned"] > 0) == bool(budget)
    assert line(row).startswith(f"| {budget:g} | all on the device")
