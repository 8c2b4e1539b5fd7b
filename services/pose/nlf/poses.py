"""Poses of people, and which of those found in one frame are kept: not the uncertain, misplaced or duplicate ones.

Source: NLF's plausibility check, which is that of MeTRAbs (arXiv:2007.07227), as in deepbeepmeep/Wan2GP 8681e9f.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# a point is certain below the first; a pose needs more than the second as its share of certain points
_CERTAIN, _CERTAIN_SHARE = 0.25, 1 / 3
# of the box's area, that the rectangle around the pose must cover more than
_COVERED_SHARE = 0.25
# two poses are one person above this similarity; points this far apart count as unlike
_SAME_PERSON, _UNLIKE_MM = 0.4, 300.0
# the similarity looks at the fifth of the points that are farthest apart
_COMPARED_PART = 5


@dataclass(frozen=True)
class Poses:
    """All canonical points of n people, float32.

    Attributes:
        millimetres: [n, P, 3], in the frame's camera: x right, y down, z forward.
        pixels: [n, P, 2], where the points are in the frame.
        uncertainties: [n, P], as the head hands them out (`NlfConfig.uncertainty_factor`).
    """

    millimetres: Tensor
    pixels: Tensor
    uncertainties: Tensor

    def __len__(self) -> int:
        return len(self.millimetres)

    def __getitem__(self, rows: Tensor | slice) -> Poses:
        """The people of these rows."""
        return Poses(self.millimetres[rows], self.pixels[rows], self.uncertainties[rows])


def per_frame(poses: Poses, counts: Sequence[int]) -> Iterator[Poses]:
    """Splits people of several frames, so many in each."""
    start = 0
    for count in counts:
        yield poses[start : start + count]
        start += count


def best_first(poses: Poses, boxes: Tensor) -> Tensor:
    """The people of one frame that are kept.

    Args:
        boxes: [n, 5], from which the poses were made: left, top, width, height, score.

    Returns:
        int64 [kept]: rows of the poses, by descending score / mean uncertainty.
    """
    ranks = ranked(poses, boxes)
    order = ranks.argsort(descending=True, stable=True)
    candidates = order[ranks[order] > -torch.inf]
    duplicates = (similarity(poses.millimetres[candidates]) > _SAME_PERSON).tolist()
    kept: list[int] = []
    for index in range(len(candidates)):
        if not any(duplicates[index][better] for better in kept):
            kept.append(index)
    return candidates[kept]


def ranked(poses: Poses, boxes: Tensor) -> Tensor:
    """Score / mean uncertainty of each pose [n], of which the highest is the best; -inf where it is not plausible."""
    plausible = is_certain(poses.uncertainties) & fits_box(poses.pixels, boxes)
    return torch.where(plausible, boxes[:, 4] / poses.uncertainties.mean(dim=1), -torch.inf)


def is_certain(uncertainties: Tensor) -> Tensor:
    """[n, P] -> bool [n]."""
    return (uncertainties < _CERTAIN).float().mean(dim=1) > _CERTAIN_SHARE


def fits_box(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Whether the rectangles around poses [n, P, 2] cover enough of the boxes [n, 4 or more]; bool [n]."""
    low, size = boxes[:, :2], boxes[:, 2:4]
    overlap = torch.minimum(pixels.amax(dim=1), low + size) - torch.maximum(pixels.amin(dim=1), low)
    return overlap.clamp(min=0).prod(dim=1) > _COVERED_SHARE * size.prod(dim=1)


def similarity(millimetres: Tensor) -> Tensor:
    """[n, P, 3] -> [n, n] from 0 to 1, each pair compared at a common scale, seen from the camera."""
    points = millimetres.double()
    power = points.square().mean(dim=(1, 2))
    common = (power[:, None] + power) / 2
    first = points[:, None] * (common / power[:, None]).sqrt()[..., None, None]
    second = points * (common / power).sqrt()[..., None, None]
    apart = (first - second).norm(dim=-1)  # [n, n, P]
    farthest = apart.topk(points.shape[1] // _COMPARED_PART, dim=-1).values
    return functional.relu(1 - farthest / _UNLIKE_MM).mean(dim=-1)
