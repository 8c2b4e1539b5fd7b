"""Training of the person detector: drawn pictures as both of its users show them, YOLOX's targets and loss.

The pose service shows BGR frames in the top left corner of a grey canvas, the 3D estimator RGB ones in the middle of
another grey, black but for one person.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.pose_models.networks import STRIDES, DetectorNetwork
from training.pose_models.pictures import Pictures, between, boxes_near, chance, only_inside, spoilt, window

_GREYS = (114.0, 127.5, 0.0)
_BLACKENED, _ZOOMED, _PAIRED = 0.35, 0.4, 0.15
# a cell is asked for a person whose middle is nearer than this many cells, so 2 x 2 cells of a grid are
_NEAR = 1.0
# longer sides of the people that each grid is asked for, pixels
_SIZES = ((0.0, 48.0), (32.0, 96.0), (64.0, 1e9))
_MIN_SIDE = 6.0
_IOU_WEIGHT, _CORNER_WEIGHT = 5.0, 1.0


@dataclass(frozen=True)
class Shown:
    """Levels [n, 3, S, S]; boxes [n, k, 4] of the people in them: left, top, right, bottom; real [n, k]: who is there."""

    levels: Tensor
    boxes: Tensor
    real: Tensor


def shown(pictures: Pictures, side: int, count: int, generator: torch.Generator) -> Shown:
    """A batch of square pictures with one person, two or nobody."""
    black, paired = chance(count, _BLACKENED, generator), chance(count, _PAIRED, generator)
    parts = []
    for part in range(2):
        drawn = pictures.batch(count, generator)
        levels = spoilt(drawn.frames.permute(0, 3, 1, 2).float(), generator)
        alone = (black & ~paired & drawn.shown)[:, None, None, None]
        levels = torch.where(alone, only_inside(levels, boxes_near(drawn.boxes, generator)), levels)
        parts.append(_placed(drawn, levels, side, paired, part, generator))
    (first, box, here), (second, other, there) = parts
    half = torch.arange(side, device=first.device) >= side / 2
    both = torch.where(paired[:, None, None, None] & half, second, first)
    flipped = chance(count, 0.5, generator)[:, None, None, None]
    return Shown(
        torch.where(flipped, both.flip(1), both),
        torch.stack([box, other], dim=1),
        torch.stack([here, there & paired], dim=1),
    )


def _placed(
    drawn: Pictures, levels: Tensor, side: int, paired: Tensor, part: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures on their canvases, each alone or in its half (`part` 0 or 1); boxes there, and who can be seen there."""
    count, height = len(levels), levels.shape[2]
    fits = side / height
    zoom = fits * torch.where(chance(count, _ZOOMED, generator), between(0.55, 1, count, generator=generator), 1.0)
    greys = levels.new_tensor(_GREYS)
    outside = greys[torch.randint(len(_GREYS), (count,), generator=generator, device=levels.device)]
    centred = chance(count, 0.5, generator)[:, None]
    corner = torch.where(centred, (side - zoom * height)[:, None] / 2, 0.0).expand(-1, 2)
    # of a pair, each stands in the middle of its half
    middle = (drawn.boxes[:, 0] + drawn.boxes[:, 2]) / 2
    beside = torch.stack([side * (0.25 + 0.5 * part) - zoom * middle, torch.zeros_like(middle)], dim=1)
    corner = torch.where(paired[:, None], beside, corner)
    transforms = levels.new_zeros(count, 2, 3)
    transforms[:, 0, 0] = transforms[:, 1, 1] = zoom
    transforms[:, :, 2] = corner + (zoom[:, None] - 1) / 2  # middles of pixels are half a pixel from their corners
    boxes = drawn.boxes * zoom[:, None] + corner.repeat(1, 2)
    left = torch.where(paired, side * 0.5 * part, 0.0)
    right = torch.where(paired, side * (0.5 + 0.5 * part), float(side))
    x = torch.minimum(torch.maximum(boxes[:, 0::2], left[:, None]), right[:, None])
    y = boxes[:, 1::2].clamp(0, side)
    boxes = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
    seen = drawn.shown & ((boxes[:, 2:] - boxes[:, :2]) > _MIN_SIDE).all(dim=1)
    return window(levels, transforms, side, side, outside=outside[:, None, None, None]), boxes, seen


def grids(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y [cells, 2] of every cell of a square's grids in cells, and its stride [cells, 1]."""
    cells, strides = [], []
    for stride in STRIDES:
        steps = torch.arange(side // stride, device=device, dtype=torch.float32)
        cells.append(torch.cartesian_prod(steps, steps).flip(-1))
        strides.append(steps.new_full((len(cells[-1]), 1), stride))
    return torch.cat(cells), torch.cat(strides)


def decoded(logits: Tensor, side: int) -> Tensor:
    """Corners [n, cells, 4] of the boxes that the cells tell of."""
    cells, strides = grids(side, logits.device)
    middle = (logits[..., :2] + cells) * strides
    half = logits[..., 2:4].clamp(max=6).exp() * strides / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def assigned(boxes: Tensor, real: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Which cells are asked for a person, and for whom.

    Args:
        boxes: [n, k, 4].
        real: bool [n, k].

    Returns:
        bool [n, cells], and boxes [n, cells, 4] of the nearest person, to be read where it is true.
    """
    cells, strides = grids(side, boxes.device)
    ranges = boxes.new_tensor(_SIZES)[[STRIDES.index(int(stride)) for stride in strides[:, 0].tolist()]]
    middles = (boxes[..., :2] + boxes[..., 2:]) / 2
    longest = (boxes[..., 2:] - boxes[..., :2]).amax(dim=-1)[:, None]  # [n, 1, k]
    apart = ((middles[:, None] / strides[:, None]) - (cells[:, None] + 0.5)).abs().amax(dim=-1)  # [n, cells, k]
    fitting = real[:, None] & (longest >= ranges[:, :1]) & (longest < ranges[:, 1:])
    apart = torch.where(fitting, apart, torch.inf)
    nearest, whose = apart.min(dim=-1)
    return nearest < _NEAR, torch.gather(boxes, 1, whose[..., None].expand(-1, -1, 4))


def overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of pairs of boxes [..., 4], and the same less the share of their hull that neither covers."""
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(dim=-1) for box in (boxes, others)]
    union = (areas[0] + areas[1] - shared).clamp(min=1e-6)
    hull = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    hull_area = hull.prod(dim=-1).clamp(min=1e-6)
    return shared / union, shared / union - (hull_area - union) / hull_area


def loss(logits: Tensor, boxes: Tensor, real: Tensor, side: int) -> Tensor:
    """YOLOX's loss: cells know whether they hold a person, how well their box fits, and the box.

    Source: Ge et al. 2021 (arXiv:2107.08430), with generalised overlap (arXiv:1902.09630) and plain centre sampling.
    """
    positive, wanted = assigned(boxes, real, side)
    number = positive.sum().clamp(min=1)
    found = decoded(logits, side)
    plain, generalised = overlap(found, wanted)
    size = (wanted[..., 2:] - wanted[..., :2]).clamp(min=1).repeat(1, 1, 2)
    corners = ((found - wanted).abs() / size).mean(dim=-1)
    box_loss = torch.where(positive, _IOU_WEIGHT * (1 - generalised) + _CORNER_WEIGHT * corners, 0.0).sum()
    object_loss = functional.binary_cross_entropy_with_logits(logits[..., 4], positive.float(), reduction="sum")
    classes = torch.zeros_like(logits[..., 5:])
    classes[..., 0] = plain.detach()
    class_losses = functional.binary_cross_entropy_with_logits(logits[..., 5:], classes, reduction="none").sum(dim=-1)
    return (box_loss + object_loss + torch.where(positive, class_losses, 0.0).sum()) / number


class DetectorTask:
    """What `loop.train` needs to know of the detector."""

    def __init__(self, side: int, batch_size: int = 192) -> None:
        self.side, self.batch_size = side, batch_size
        self.model: nn.Module = DetectorNetwork()

    def loss(self, pictures: Pictures, generator: torch.Generator, progress: float) -> Tensor:
        batch = shown(pictures, self.side, self.batch_size, generator)
        assert isinstance(self.model, DetectorNetwork)
        return loss(self.model.logits(batch.levels), batch.boxes, batch.real, self.side)

    @torch.inference_mode()
    def scores(self, pictures: Pictures, generator: torch.Generator) -> dict[str, float]:
        """Of single people: the share whose best box scores above 0.3 and overlaps by half, and the mean overlap; the
        share of empty pictures with a box."""
        batch = shown(pictures, self.side, self.batch_size * 4, generator)
        raw = self.model(batch.levels)
        scores, best = (raw[..., 4] * raw[..., 5]).max(dim=1)
        boxes = decoded(raw, self.side)[torch.arange(len(raw), device=raw.device), best]
        single, empty = batch.real[:, 0] & ~batch.real[:, 1], ~batch.real.any(dim=1)
        plain, _ = overlap(boxes, batch.boxes[:, 0])
        found = (scores > 0.3) & (plain > 0.5)
        return {
            "found": float(found[single].float().mean()),
            "overlap": float(plain[single].mean()),
            "false": float((scores[empty] > 0.3).float().mean()) if empty.any() else 0.0,
        }
