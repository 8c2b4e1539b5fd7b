"""Training of the whole-body keypoints: cuts around people as the pose service makes them, places as distributions.

Source: SimCC, Li et al. 2022 (arXiv:2107.03332), and RTMPose (arXiv:2303.07399): along either axis a point is a
distribution over bins, trained towards a Gaussian around the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.pose.keypoints import MEAN, STD
from training.pose_models.networks import BINS_PER_PIXEL, KEYPOINTS_HEIGHT, KEYPOINTS_WIDTH, KeypointNetwork
from training.pose_models.pictures import Pictures, boxes_near, spoilt, window

_PADDING = 1.25  # as services.pose.keypoints
_SPREAD_BINS = 2.0
# points that nobody sees still have a place, which is drawn on where the body goes on; it is known less well
_UNSEEN_WEIGHT = 0.25
_SEEN_WEIGHT = 2.0


def cut_transforms(boxes: Tensor, height: int, width: int) -> Tensor:
    """Places in the frame -> in the cut, [n, 2, 3], for boxes [n, 4]; services.pose.keypoints' on tensors."""
    low, high = boxes[:, :2], boxes[:, 2:]
    across, along = ((high - low) * _PADDING).unbind(dim=1)
    size = torch.stack(
        [torch.maximum(across, along * (width / height)), torch.maximum(along, across * (height / width))]
    )
    zoom = width / size[0]
    transforms = boxes.new_zeros(len(boxes), 2, 3)
    transforms[:, 0, 0] = transforms[:, 1, 1] = zoom
    transforms[:, :, 2] = zoom[:, None] * (size.mT / 2 - (low + high) / 2)
    return transforms


def cuts(pictures: Pictures, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the network sees [n, 3, height, width], BGR normalised, and the places of the points in it [n, 133, 2]."""
    transforms = cut_transforms(boxes_near(pictures.boxes, generator), height, width)
    levels = spoilt(pictures.frames.permute(0, 3, 1, 2).float(), generator)
    seen = window(levels, transforms, height, width).flip(1)
    mean, std = (torch.from_numpy(values).to(seen)[:, None, None] for values in (MEAN, STD))
    zoom = torch.stack([transforms[:, 0, 0], transforms[:, 1, 1]], dim=-1)
    return (seen - mean) / std, pictures.points * zoom[:, None] + transforms[:, None, :, 2]


def place_loss(logits: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of distributions over bins with Gaussians, the mean over points by weight.

    Args:
        logits: [n, points, bins].
        places: [n, points], pixels.
        weights: [n, points], zero for what is outside.
    """
    bins = torch.arange(logits.shape[-1], device=logits.device)
    wanted = functional.softmax(-((bins - places[..., None] * BINS_PER_PIXEL) ** 2) / (2 * _SPREAD_BINS**2), dim=-1)
    entropies = -(wanted * functional.log_softmax(logits, dim=-1)).sum(dim=-1)
    return (entropies * weights).sum() / weights.sum().clamp(min=1)


def loss(logits: tuple[Tensor, Tensor, Tensor], places: Tensor, visible: Tensor, height: int, width: int) -> Tensor:
    """Places along both axes, and whether each point is seen."""
    x, y, seen = logits
    inside = ((places >= 0) & (places <= places.new_tensor([width - 1, height - 1]))).all(dim=-1)
    weights = inside * torch.where(visible, 1.0, _UNSEEN_WEIGHT)
    seen_loss = functional.binary_cross_entropy_with_logits(seen, (visible & inside).float())
    return place_loss(x, places[..., 0], weights) + place_loss(y, places[..., 1], weights) + _SEEN_WEIGHT * seen_loss


class KeypointTask:
    """What `loop.train` needs to know of the keypoints; every picture must show somebody."""

    def __init__(self, height: int = KEYPOINTS_HEIGHT, width: int = KEYPOINTS_WIDTH, batch_size: int = 192) -> None:
        self.height, self.width, self.batch_size = height, width, batch_size
        self.model: nn.Module = KeypointNetwork(height, width)

    def loss(self, pictures: Pictures, generator: torch.Generator, progress: float) -> Tensor:
        drawn = pictures.batch(self.batch_size, generator)
        seen, places = cuts(drawn, self.height, self.width, generator)
        assert isinstance(self.model, KeypointNetwork)
        return loss(self.model.logits(seen), places, drawn.visible, self.height, self.width)

    @torch.inference_mode()
    def scores(self, pictures: Pictures, generator: torch.Generator) -> dict[str, float]:
        """Mean distance of the points that are seen, in pixels of the cut; the share of points rightly called seen or not."""
        drawn = pictures.batch(self.batch_size * 4, generator)
        seen, places = cuts(drawn, self.height, self.width, generator)
        x, y = self.model(seen)
        found = torch.stack([x.argmax(dim=-1), y.argmax(dim=-1)], dim=-1) / BINS_PER_PIXEL
        apart = (found - places).norm(dim=-1)
        visible = drawn.visible
        called = torch.minimum(x.amax(dim=-1), y.amax(dim=-1)) > 0.3
        return {
            "body_px": float(apart[:, :23][visible[:, :23]].mean()),
            "face_px": float(apart[:, 23:91][visible[:, 23:91]].mean()),
            "hands_px": float(apart[:, 91:][visible[:, 91:]].mean()),
            "seen_right": float((called == visible).float().mean()),
        }
