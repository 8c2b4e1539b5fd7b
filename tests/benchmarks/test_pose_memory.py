"""The pose stage's memory benchmark at a tiny size, without a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.pose_memory import followed, line, sam2_masks
from tests.parity.cases import Case
from tests.parity.pose_persons import sam2_config

CPU = torch.device("cpu")
ROW = {
    "budget": 2.0,
    "plan": "a frame at a time, no masks, 1.94 GiB",
    "rate": 14.3,
    "masks_s": 0.0,
    "planned": 2 * 2**30,
    "allocated_bytes": 2**29,
    "reserved_bytes": 2**30,
    "driver_bytes": 7 * 2**28,
}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_random_masks_follow_people(is_streamed: bool) -> None:
    config = sam2_config(Case("sam2", Path(__file__).parents[1] / "goldens").config)
    pictures = np.zeros((4, 512, 896, 3), np.uint8)
    assert followed(sam2_masks(config, CPU, is_streamed=is_streamed), pictures, CPU) > 0


def test_a_row_says_what_was_planned_and_what_was_taken() -> None:
    cells = [cell.strip() for cell in line(ROW).split("|")[1:-1]]
    assert cells == ["2", ROW["plan"], "14", "", "2.00", "0.50", "1.00", "1.75", "0.75"]
    assert line(ROW | {"budget": 0.0, "masks_s": 0.0456}).startswith("| none | a frame at a time")
    assert "| 46 |" in line(ROW | {"masks_s": 0.0456})
