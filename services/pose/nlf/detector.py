"""Pictures in linear light -> boxes of people, by a YOLOX network that is given as a function.

Boxes are chosen on the host, since how many there are decides what comes next; of a network's output on a device only
those of people are brought there.

Source: YOLOX, Ge et al. 2021 (arXiv:2107.08430), fed and read as deepbeepmeep/Wan2GP 8681e9f does inside NLF.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.pose.nlf.crops import DISPLAY_GAMMA

# [n, 3, side, side] float32, RGB, 0 to 255 -> [n, cells, 5 + classes]: place, log size, objectness, class scores
Network = Callable[[Tensor], Tensor]
_STRIDES = (8, 16, 32)
_PERSON = 0
_PADDING = 0.5


@dataclass(frozen=True)
class DetectorConfig:
    """Side of the network's input; scores above `threshold` count, and boxes overlapping by more than `max_iou` are one."""

    side: int = 640
    threshold: float = 0.3
    max_iou: float = 0.7
    max_detections: int = 150


@dataclass(frozen=True)
class Letterbox:
    """Where a picture of height x width was put: scaled to (scaled_height, scaled_width), from (top, left) on."""

    height: int
    width: int
    scaled_height: int
    scaled_width: int
    top: int
    left: int

    @classmethod
    def centred(cls, height: int, width: int, side: int) -> Letterbox:
        factor = side / max(height, width)
        # rounded down as the reference does, also where the product misses `side` by a rounding error
        scaled_height, scaled_width = int(factor * height), int(factor * width)
        return cls(height, width, scaled_height, scaled_width, (side - scaled_height) // 2, (side - scaled_width) // 2)

    def to_picture(self, boxes: Tensor) -> Tensor:
        """Corners [k, 4] in the letterbox -> left, top, width, height in the picture."""
        scale = boxes.new_tensor([self.width / self.scaled_width, self.height / self.scaled_height])
        low = (boxes[:, :2] - boxes.new_tensor([self.left, self.top])) * scale
        return torch.cat([low, (boxes[:, 2:] - boxes[:, :2]) * scale], dim=1)


class PersonDetector:
    """People in each picture."""

    def __init__(self, network: Network, config: DetectorConfig | None = None) -> None:
        self.network, self.config = network, config or DetectorConfig()

    def detect(self, pictures: Tensor) -> list[Tensor]:
        """Boxes per picture.

        Args:
            pictures: [n, 3, H, W], RGB in linear light, 0 to 1.

        Returns:
            per picture float32 [k, 5], on the host: left, top, width, height in its pixels, score; best first.
        """
        config = self.config
        boxed = letterboxed(pictures, config.side)
        placed = Letterbox.centred(pictures.shape[2], pictures.shape[3], config.side)
        corners, scores = decode(self.network(boxed.float() * 255), config.side)
        people = (scores > config.threshold).nonzero(as_tuple=True)
        rows, picture = torch.cat([corners[people], scores[people][:, None]], dim=1).cpu(), people[0].cpu()
        found = []
        for mine in torch.split(rows, picture.bincount(minlength=len(pictures)).tolist()):
            best = mine[suppress(mine[:, :4], mine[:, 4], config.max_iou, config.max_detections)]
            found.append(torch.cat([placed.to_picture(best[:, :4]), best[:, 4:]], dim=1))
        return found


def letterboxed(pictures: Tensor, side: int) -> Tensor:
    """Linear light [n, 3, H, W] -> display tone, scaled to fit, in the middle of a grey [n, 3, side, side]."""
    height, width = pictures.shape[-2:]
    placed = Letterbox.centred(height, width, side)
    mode = "area" if side <= max(height, width) else "bilinear"
    size = (placed.scaled_height, placed.scaled_width)
    scaled = functional.interpolate(pictures, size, mode=mode).pow(1 / DISPLAY_GAMMA)
    below, right = side - size[0] - placed.top, side - size[1] - placed.left
    return functional.pad(scaled, (placed.left, right, placed.top, below), value=_PADDING)


def decode(raw: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Output [..., cells, 5 + classes] -> corners [..., cells, 4] in the letterbox and scores of people [..., cells]."""
    cells, strides = [], []
    for stride in _STRIDES:
        count = side // stride
        steps = torch.arange(count, device=raw.device)
        cells.append(torch.cartesian_prod(steps, steps).flip(-1))  # x, y; x fastest
        strides.append(steps.new_full((count * count, 1), stride))
    stride_of_cell = torch.cat(strides)
    middle = (raw[..., :2] + torch.cat(cells)) * stride_of_cell
    half = raw[..., 2:4].exp() * stride_of_cell / 2
    return torch.cat([middle - half, middle + half], dim=-1), raw[..., 4] * raw[..., 5 + _PERSON]


def suppress(corners: Tensor, scores: Tensor, max_iou: float, limit: int) -> Tensor:
    """Greedy non-maximum suppression: indices of at most `limit` boxes, best first, none too close to a better one."""
    remaining = scores.argsort(descending=True, stable=True)
    kept: list[Tensor] = []
    while len(remaining) and len(kept) < limit:
        best, remaining = remaining[:1], remaining[1:]
        kept.append(best)
        if len(remaining):
            remaining = remaining[iou(corners[best[0]], corners[remaining]) <= max_iou]
    return torch.cat(kept) if kept else remaining


def iou(corners: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box [4] with others [k, 4]."""
    low, high = torch.maximum(corners[:2], others[:, :2]), torch.minimum(corners[2:], others[:, 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    areas = (others[:, 2:] - others[:, :2]).prod(dim=-1)
    return intersection / ((corners[2:] - corners[:2]).prod() + areas - intersection)
