"""A picture to look at: one row per case, with its reference, driving clip, pose frames, generated and true frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.quality.suite import Case

_GAP = 6
_WHITE = 255


def write_sheet(path: Path, cases: Sequence[Case], videos: Sequence[Tensor]) -> None:
    """Writes a PNG of as many rows as there are cases."""
    rows = [_row(case, video) for case, video in zip(cases, videos, strict=True)]
    Image.fromarray(torch.cat(rows).numpy()).save(path, optimize=True)


def _row(case: Case, video: Tensor) -> Tensor:
    """uint8 [side, width, 3]."""
    story, side = case.truth.story, case.truth.side
    few, more = [0, len(video) // 2, len(video) - 1], torch.linspace(0, len(video) - 1, 5).long().tolist()
    blocks = [
        story.draw_reference(side, side),
        story.draw_driving(side, side)[0, few],
        story.draw_pose(side, side)[0, few],
        video[more],
        case.truth.clip[more],
    ]
    gap = torch.full((side, _GAP, 3), _WHITE, dtype=torch.uint8)
    parts = [part for block in blocks for part in (gap, torch.cat(list(block), 1))]
    return torch.cat(parts[1:], 1)
