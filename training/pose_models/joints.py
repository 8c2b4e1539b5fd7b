"""Training of the 3D joints: Neural Localizer Fields with the production head on a small backbone.

What the network sees comes from the production code for crops; what it is told are points of the drawn skeleton in front
of the crop's camera. Source: Sárándi and Pons-Moll 2024 (arXiv:2407.07532), MeTRAbs (arXiv:2007.07227) for the losses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.pose.nlf.backbone import BACKBONES, OUT_CHANNELS, efficientnet
from services.pose.nlf.config import HeadSizes, NlfConfig
from services.pose.nlf.crops import CropCameras, default_intrinsics, look_at
from services.pose.nlf.head import RelativePoints, WeightField
from services.pose.nlf.model import CropModel, NlfEstimator
from training.pose_models.pictures import Pictures, boxes_near, only_inside, spoilt

CONFIG = NlfConfig(
    proc_side=128,
    stride=16,
    centered_stride=True,
    depth=8,
    box_size_m=2.5,
    backbone="efficientnetv2-tiny",
)
SIZES = HeadSizes(
    in_channels=OUT_CHANNELS,
    link_dim=64,
    fourier_dim=64,
    gps_hidden_dim=128,
    gps_dim=64,
    field_dim=64,
    field_hidden_dim=128,
)
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
"""Of SMPL's joints."""
_PELVIS, _LEFT_HIP, _RIGHT_HIP, _NECK, _HEAD = 0, 1, 2, 12, 15
_ON_BONES = (0.25, 0.5, 0.75)
# points around the trunk and the head, so that the points' outline is as wide as the body also from the side
_ROUND, _ROUND_MM, _CROWN_MM = (0, 3, 6, 9, 15), 110.0, 130.0
# metres, arms stretched out, seen from the front: x to the person's left, y up; a person of 1.7 m
_LEFT_OR_MIDDLE = {
    0: (0.0, 0.0, 0.0),
    1: (0.07, -0.09, 0.0),
    3: (0.0, 0.11, -0.02),
    4: (0.1, -0.47, 0.0),
    6: (0.0, 0.25, -0.01),
    7: (0.09, -0.87, -0.04),
    9: (0.0, 0.3, 0.01),
    10: (0.12, -0.93, 0.08),
    12: (0.0, 0.51, -0.03),
    13: (0.08, 0.42, -0.01),
    15: (0.0, 0.6, 0.02),
    16: (0.18, 0.45, -0.02),
    18: (0.44, 0.45, -0.03),
    20: (0.69, 0.45, -0.03),
    22: (0.78, 0.45, -0.03),
}
_RIGHT_OF = {2: 1, 5: 4, 8: 7, 11: 10, 14: 13, 17: 16, 19: 18, 21: 20, 23: 22}

_PIXEL_WEIGHT, _SHAPE_WEIGHT, _PLACE_WEIGHT, _CERTAINTY_WEIGHT = 1.0, 1.0, 0.3, 0.05
# the place follows from all points by a least squares fit that means nothing while they are anywhere
_PLACE_AFTER = 0.1


def body_points(joints: Tensor) -> Tensor:
    """The points that the network learns: along the bones and around the trunk, then the joints.

    Args:
        joints: [n, 24, 3], millimetres; also those of the canonical body.

    Returns:
        [n, P, 3], millimetres; the last 24 are the joints.
    """
    parents = torch.tensor(PARENTS[1:], device=joints.device)
    starts, ends = joints[:, parents], joints[:, 1:]
    along = [starts + share * (ends - starts) for share in _ON_BONES]
    up = functional.normalize(joints[:, _NECK] - joints[:, _PELVIS], dim=-1)
    across = joints[:, _LEFT_HIP] - joints[:, _RIGHT_HIP]
    across = functional.normalize(across - (across * up).sum(dim=-1, keepdim=True) * up, dim=-1)
    ahead = torch.linalg.cross(across, up)
    around = [
        joints[:, list(_ROUND)] + sign * axis[:, None] for axis in (across, ahead) for sign in (-_ROUND_MM, _ROUND_MM)
    ]
    crown = joints[:, _HEAD] + _CROWN_MM * functional.normalize(joints[:, _HEAD] - joints[:, _NECK], dim=-1)
    return torch.cat([*along, *around, crown[:, None], joints], dim=1)


def canonical_points() -> Tensor:
    """The same points of a body with its arms stretched out; [P, 3] float32, metres."""
    joints = torch.zeros(len(PARENTS), 3)
    for joint in range(len(PARENTS)):
        x, y, z = _LEFT_OR_MIDDLE[_RIGHT_OF.get(joint, joint)]
        joints[joint] = torch.tensor([-x if joint in _RIGHT_OF else x, y, z])
    return body_points(joints[None] * 1000)[0] / 1000


def crop_model(config: NlfConfig = CONFIG, sizes: HeadSizes = SIZES) -> CropModel:
    """The network with weights to start from."""
    model = CropModel(config, sizes, efficientnet(BACKBONES[config.backbone], centered_stride=config.centered_stride))
    _initialise(model.heatmap_head.weight_field, canonical_points(), sizes)
    return model


def _initialise(field: WeightField, points: Tensor, sizes: HeadSizes) -> None:
    """Scales of the field such that neighbouring points start different, and heatmaps broad."""
    signature = field.gps_net
    signature.mini.copy_(points.amin(dim=0))
    signature.maxi.copy_(points.amax(dim=0))
    signature.center.copy_((signature.mini + signature.maxi) / 2)
    nn.init.normal_(signature.learnable_fourier.linear.weight, std=5.0)
    field.r_sqrt_eigva.fill_(10)  # the field takes a tenth of it
    # sines come divided by the root of their number
    gains = {signature.mlp: (sizes.fourier_dim**0.5, 1.0), field.pred_mlp: (1.0, sizes.link_dim**-0.5)}
    for mlp, layers in gains.items():
        for index, gain in zip((0, 2), layers, strict=True):
            linear = mlp[index]
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=gain * math.sqrt(2 / linear.in_features))
            nn.init.zeros_(linear.bias)


def loss(
    points: RelativePoints, placed: Tensor | None, wanted: Tensor, intrinsics: Tensor, side: int, box_size_m: float
) -> Tensor:
    """How far the points are off: in the crop, in shape, in place; and whether their uncertainty tells of it.

    Args:
        points: as the head locates them.
        placed: [n, P, 3], metres in front of the camera, or None: not to be looked at yet.
        wanted: [n, P, 3], the same of the truth.
        intrinsics: [n, 3, 3] of the crops.
    """
    projected = wanted / wanted[..., 2:] @ intrinsics.mT
    inside = ((projected[..., :2] >= 0) & (projected[..., :2] <= side)).all(dim=-1)
    metres_per_pixel = box_size_m / side
    in_crop = (points.pixels - projected[..., :2]).norm(dim=-1) * metres_per_pixel
    shape = (_centred(points.metres) - _centred(wanted)).norm(dim=-1)
    # three dimensions: the likelihood of a Laplace-like error of this scale
    certainty = shape.detach() / points.uncertainties + 3 * points.uncertainties.log()
    total = _PIXEL_WEIGHT * (in_crop * inside).sum() / inside.sum().clamp(min=1)
    total = total + _SHAPE_WEIGHT * shape.mean() + _CERTAINTY_WEIGHT * certainty.mean()
    if placed is not None:
        total = total + _PLACE_WEIGHT * (placed - wanted).norm(dim=-1).mean()
    return total


def _centred(points: Tensor) -> Tensor:
    return points - points.mean(dim=1, keepdim=True)


class JointTask:
    """What `loop.train` needs to know of the joints; every picture must show somebody."""

    def __init__(self, batch_size: int = 128) -> None:
        self.batch_size = batch_size
        self.model: nn.Module = crop_model()
        self._points = canonical_points()

    def loss(self, pictures: Pictures, generator: torch.Generator, progress: float) -> Tensor:
        model = self.model
        assert isinstance(model, CropModel)
        crops, cameras, wanted = self._batch(pictures, self.batch_size, generator)
        head = model.heatmap_head
        weights = head.point_weights(self._points.to(crops.device))
        points = head.locate(head.layer(model.backbone(crops)), weights)
        placed = head.absolute(points, cameras.intrinsics)[0] / 1000 if progress > _PLACE_AFTER else None
        return loss(points, placed, wanted, cameras.intrinsics, CONFIG.proc_side, CONFIG.box_size_m)

    @torch.no_grad()
    def _batch(self, pictures: Pictures, count: int, generator: torch.Generator) -> tuple[Tensor, CropCameras, Tensor]:
        """Crops, their cameras, and the true points [n, P, 3] in metres in front of these."""
        model = self.model
        assert isinstance(model, CropModel)
        drawn = pictures.batch(count, generator)
        levels = spoilt(drawn.frames.permute(0, 3, 1, 2).float(), generator)
        levels = only_inside(levels, boxes_near(drawn.boxes, generator))
        frames = levels.permute(0, 2, 3, 1).to(torch.uint8)
        boxes = boxes_near(drawn.boxes, generator)
        boxes[:, 2:] -= boxes[:, :2]
        intrinsics = default_intrinsics(*frames.shape[1:3]).to(frames.device).expand(count, 3, 3)
        cameras = look_at(boxes, intrinsics, CONFIG.proc_side)
        estimator = NlfEstimator(CONFIG, model, self._points)
        crops = estimator.crops(frames, torch.arange(count, device=frames.device), intrinsics, cameras)
        wanted = body_points(drawn.joints) / 1000 @ cameras.rotation.mT
        return crops, cameras, wanted

    @torch.inference_mode()
    def scores(self, pictures: Pictures, generator: torch.Generator) -> dict[str, float]:
        """Of the joints: distance in pixels of the frame, of the shape and of the place in millimetres; the share of
        pictures in which a third of the points is certain."""
        model = self.model
        assert isinstance(model, CropModel)
        crops, cameras, wanted = self._batch(pictures, self.batch_size * 4, generator)
        weights = model.heatmap_head.point_weights(self._points.to(crops.device))
        millimetres, uncertainties = model(crops, cameras.intrinsics, weights)
        found, true = millimetres[:, -24:], wanted[:, -24:] * 1000
        pixels = [(points / points[..., 2:] @ cameras.intrinsics.mT)[..., :2] for points in (found, true)]
        apart = (pixels[0] - pixels[1]).norm(dim=-1) / cameras.zoom[:, None]
        return {
            "px": float(apart.mean()),
            "shape_mm": float((_centred(found) - _centred(true)).norm(dim=-1).mean()),
            "place_mm": float((found - true).norm(dim=-1).mean()),
            "certain": float(((uncertainties < 0.25).float().mean(dim=1) > 1 / 3).float().mean()),
        }
