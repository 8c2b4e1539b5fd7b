"""A network small enough for tests, a stand-in whose answers are known, and pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.pose.nlf.backbone import OUT_CHANNELS, Stage, efficientnet
from services.pose.nlf.config import HeadSizes, NlfConfig, NlfQuirks
from services.pose.nlf.head import PointHead, PointWeights
from services.pose.nlf.model import CropModel, NlfEstimator

NUM_POINTS = 40
STAGES = (Stage(True, 1, 1, 8, 1), Stage(True, 4, 2, 8, 2), Stage(False, 4, 2, 12, 2))
SIZES = HeadSizes(
    in_channels=OUT_CHANNELS,
    link_dim=16,
    fourier_dim=8,
    gps_hidden_dim=12,
    gps_dim=14,
    field_dim=10,
    field_hidden_dim=6,
)
CONFIG = NlfConfig(proc_side=64, stride=8, centered_stride=True, depth=4, box_size_m=2.2, backbone="tiny")


def crop_model(config: NlfConfig = CONFIG) -> CropModel:
    """Random weights that are the same every time."""
    torch.manual_seed(0)
    model = CropModel(config, SIZES, efficientnet(STAGES, centered_stride=config.centered_stride))
    field = model.heatmap_head.weight_field
    field.r_sqrt_eigva.fill_(30)
    field.gps_net.maxi.fill_(1)
    return model.eval().requires_grad_(False)


def canonical_points() -> Tensor:
    return torch.rand(NUM_POINTS, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


class KnownAnswers(nn.Module):
    """Sees every point 2 m straight ahead, as uncertain as the crop is bright; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.heatmap_head = PointHead(CONFIG, SIZES)
        self.heatmap_head.weight_field.gps_net.maxi.fill_(1)
        self.device = torch.device("cpu")
        self.crops: list[Tensor] = []

    def forward(self, crops: Tensor, intrinsics: Tensor, weights: PointWeights) -> tuple[Tensor, Tensor]:
        self.crops.append(crops)
        ahead = crops.new_tensor([0.0, 0, 2000], dtype=torch.float32).expand(len(crops), len(weights.bias), 3)
        return ahead, crops.float().mean(dim=(1, 2, 3))[:, None].expand(ahead.shape[:2])


def estimator(
    model: nn.Module,
    config: NlfConfig = CONFIG,
    quirks: NlfQuirks | None = None,
    batch_size: int = 64,
    crops_at_once: int | None = None,
) -> NlfEstimator:
    return NlfEstimator(
        config,
        model,  # type: ignore[arg-type]  # stands in for CropModel
        canonical_points(),
        quirks=quirks,
        batch_size=batch_size,
        crops_at_once=crops_at_once,
    )


def random_frames(num_frames: int, height: int = 60, width: int = 80, seed: int = 2) -> Tensor:
    """Smooth random pictures, uint8 [num_frames, height, width, 3]."""
    coarse = torch.rand(num_frames, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (fine * 255).to(torch.uint8).permute(0, 2, 3, 1)
