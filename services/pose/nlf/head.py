"""Features of a crop -> where given points of the body are: Neural Localizer Fields.

A field, a small network over the canonical body, gives each point p the weights of its own 1x1 convolution. That yields
per point an uncertainty map, a heatmap over the crop in metric coordinates and a heatmap volume (crop x depth), all
[h, w] = crop side / stride; their expectations are the point's place. Full perspective then gives metres of distance.
Source: Sárándi and Pons-Moll 2024 (arXiv:2407.07532); MeTRAbs, Sárándi et al. 2021 (arXiv:2007.07227) for the decoding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.pose.nlf.config import HeadSizes, NlfConfig

_NORM_EPS = 1e-3
_FIELD_SCALE = 0.1  # of the eigenvalue-weighted position encoding
# points are used to find the person if their uncertainty is below, and if they are this many strides from the border
_MAX_UNCERTAINTY, _TRUSTED_BORDER = 0.3, 1.0
# points that land this many strides inside the crop are partly back-projected from their 2D places
_MIXED_BORDER = 0.6
_SEEN_DEPTH_M, _PROJECTION_DEPTH_M = 0.001, 0.1
_INVALID_WEIGHT, _RIDGE, _MIN_VARIANCE = 1e-8, 1e-4, 1e-10


class PointWeights(NamedTuple):
    """What the field says of P points: weights [P, 2 + depth, link_dim] and biases [P, 2 + depth]."""

    weight: Tensor
    bias: Tensor


class RelativePoints(NamedTuple):
    """Points of n crops: pixels [n, P, 2], metres up to a translation [n, P, 3], uncertainties [n, P]; float32."""

    pixels: Tensor
    metres: Tensor
    uncertainties: Tensor


class PointHead(nn.Module):
    """Points from features; stages are apart so that the weights of the points are computed once for many crops."""

    def __init__(self, config: NlfConfig, sizes: HeadSizes) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Sequential(
            nn.Conv2d(sizes.in_channels, sizes.link_dim, 1, bias=False),
            nn.BatchNorm2d(sizes.link_dim, eps=_NORM_EPS),
            nn.SiLU(),
        )
        self.weight_field = WeightField(sizes, (sizes.link_dim + 1) * (2 + config.depth))

    def point_weights(self, points: Tensor) -> PointWeights:
        """Canonical points [P, 3] in metres -> their weights, in the dtype of the features."""
        conv = self.layer[0]
        assert isinstance(conv, nn.Conv2d)
        weights = self.weight_field(points).to(conv.weight.dtype)
        # one row per input channel, the last is the bias: [P, link_dim + 1, 2 + depth]
        rows = torch.unflatten(weights, -1, (conv.out_channels + 1, 2 + self.config.depth))
        return PointWeights(rows[:, :-1].transpose(1, 2), rows[:, -1])

    def locate(self, features: Tensor, weights: PointWeights) -> RelativePoints:
        """Places of the points in each crop.

        Args:
            features: [n, link_dim, h, w], what `layer` gives.
        """
        kernels = weights.weight.flatten(0, 1)[:, :, None, None]
        logits = functional.conv2d(features, kernels, weights.bias.flatten())
        # fp32: an expectation over a thousand cells
        logits = torch.unflatten(logits.float(), 1, tuple(weights.bias.shape))  # [n, P, 2 + depth, h, w]
        plane = normalised(logits[:, :, 1], dims=2)
        volume = normalised(logits[:, :, 2:], dims=3)  # [n, P, depth, h, w]
        metric_xy = torch.stack([expectation(plane.sum(dim=2)), expectation(plane.sum(dim=3))], dim=-1)
        place = [expectation(volume.sum(dim=others)) for others in ((2, 3), (2, 4), (3, 4))]  # x, y, z
        uncertainties = (logits[:, :, 0] * volume.sum(dim=2)).sum(dim=(2, 3))
        uncertainties = functional.softplus(uncertainties + self.config.uncertainty_bias)
        box_size, side = self.config.box_size_m, self.config.proc_side
        metres = [self.to_pixels(metric_xy) * box_size / side, place[2][..., None] * box_size]
        return RelativePoints(
            pixels=self.to_pixels(torch.stack(place[:2], dim=-1)),
            metres=torch.cat(metres, dim=-1),
            uncertainties=uncertainties + self.config.uncertainty_floor,
        )

    def to_pixels(self, fractions: Tensor) -> Tensor:
        """Places between the centres of the first (0) and the last cell (1) -> pixels of the crop."""
        stride = self.config.stride
        last_centre = (self.config.proc_side - 1) // stride * stride
        return fractions * last_centre + (stride // 2 if self.config.centered_stride else 0)

    def absolute(self, points: RelativePoints, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
        """Points in front of the crop's camera.

        Args:
            intrinsics: [n, 3, 3] of the crops.

        Returns:
            millimetres [n, P, 3], and uncertainties [n, P] as they are handed out, both float32.
        """
        rays = homogeneous(points.pixels) @ torch.linalg.inv(intrinsics).mT  # [n, P, 3], z = 1
        trusted = self.inside(points.pixels, _TRUSTED_BORDER) & (points.uncertainties < _MAX_UNCERTAINTY)
        find = translation_weak if self.config.weak_perspective else translation_full
        translation = find(rays[..., :2], points.metres, trusted)[:, None]
        moved = points.metres + translation
        back_projected = rays * (points.metres[..., 2:] + translation[..., 2:])
        share = self.config.mix_3d_inside_fov
        mixed = share * moved + (1 - share) * back_projected
        projected = moved / moved[..., 2:].clamp(min=_PROJECTION_DEPTH_M) @ intrinsics.mT
        is_seen = self.inside(projected[..., :2], _MIXED_BORDER) & (moved[..., 2] > _SEEN_DEPTH_M)
        millimetres = torch.where(is_seen[..., None], mixed, moved) * 1000
        return millimetres, points.uncertainties * self.config.uncertainty_factor

    def inside(self, pixels: Tensor, border: float) -> Tensor:
        """Whether pixels [..., 2] are at least `border` strides from the border of the crop, seen from cell centres."""
        shift = 0 if self.config.centered_stride else -self.config.stride / 2
        low = self.config.stride * border + shift
        high = self.config.proc_side - self.config.stride * border + shift
        return ((pixels >= low) & (pixels <= high)).all(dim=-1)


class WeightField(nn.Module):
    """Canonical points [P, 3] -> [P, out_dim]; always float32, whatever the rest of the model computes in."""

    r_sqrt_eigva: Tensor

    def __init__(self, sizes: HeadSizes, out_dim: int) -> None:
        super().__init__()
        self.gps_net = GlobalPointSignature(sizes)
        self.register_buffer("r_sqrt_eigva", torch.ones(sizes.field_dim))
        self.pred_mlp = mlp(sizes.field_dim, sizes.field_hidden_dim, out_dim)

    def forward(self, points: Tensor) -> Tensor:
        # the signature may be longer than what the field takes of it
        signature = self.gps_net(points)[:, : self.r_sqrt_eigva.shape[0]]
        weights: Tensor = self.pred_mlp(signature * self.r_sqrt_eigva * _FIELD_SCALE)
        return weights


class GlobalPointSignature(nn.Module):
    """Canonical points -> smooth functions on the body, learnt to resemble Laplace eigenfunctions; [P, gps_dim]."""

    mini: Tensor
    maxi: Tensor
    center: Tensor

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        for name in ("mini", "maxi", "center"):
            self.register_buffer(name, torch.zeros(3))
        self.learnable_fourier = FourierFeatures(sizes.fourier_dim)
        self.mlp = mlp(sizes.fourier_dim, sizes.gps_hidden_dim, sizes.gps_dim)

    def forward(self, points: Tensor) -> Tensor:
        signature: Tensor = self.mlp(self.learnable_fourier((points - self.center) / (self.maxi - self.mini)))
        return signature


class FourierFeatures(nn.Module):
    """Sines and cosines of learnt directions; [P, 3] -> [P, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, dim // 2, bias=False)

    def forward(self, points: Tensor) -> Tensor:
        angles = self.linear(points)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return features * features.shape[-1] ** -0.5


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))


def normalised(logits: Tensor, *, dims: int) -> Tensor:
    """Softmax over the last `dims` axes together."""
    return logits.flatten(-dims).softmax(dim=-1).reshape(logits.shape)


def expectation(weights: Tensor) -> Tensor:
    """Distributions [..., k] over k places from 0 to 1 -> expected places [...]."""
    return weights @ torch.linspace(0, 1, weights.shape[-1], device=weights.device)


def homogeneous(points: Tensor) -> Tensor:
    return torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)


def translation_full(rays: Tensor, metres: Tensor, trusted: Tensor) -> Tensor:
    """The translation that brings relative points onto their rays, in the least squares sense of MeTRAbs.

    A point lies on its ray (nx, ny, 1) if tx - nx tz = nx z - x, and so in y; both sides are scaled to unit size
    before they are weighted.

    Args:
        rays: [n, P, 2], on the plane z = 1.
        metres: [n, P, 3].
        trusted: bool [n, P]; the others count for next to nothing.

    Returns:
        metres [n, 3].
    """
    offsets = rays * metres[..., 2:] - metres[..., :2]
    ray_scale, offset_scale = (masked_rms(values, trusted) for values in (rays, offsets))  # [n, 1, 1]
    identity = torch.eye(2, device=rays.device).expand(*rays.shape, 2)
    rows = torch.cat([identity, -(rays / ray_scale)[..., None]], dim=-1).flatten(1, 2)  # [n, P * 2, 3]
    target = (offsets / offset_scale).reshape(len(rays), -1, 1)
    weighted = rows * (trusted.float() + _INVALID_WEIGHT).repeat_interleave(2, dim=1)[..., None]
    gram = weighted.mT @ rows
    gram.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    solution = torch.cholesky_solve(weighted.mT @ target, torch.linalg.cholesky_ex(gram).L)[..., 0]
    scale = offset_scale[..., 0]
    return torch.cat([solution[:, :2] * scale, solution[:, 2:] * (scale / ray_scale[..., 0])], dim=-1)


def translation_weak(rays: Tensor, metres: Tensor, trusted: Tensor) -> Tensor:
    """As `translation_full`, with one distance for all points: that at which their spread is that of their rays."""
    ray_mean, metre_mean = (masked_mean(values, trusted, dims=(1,)) for values in (rays, metres))  # [n, 1, 2 or 3]
    spread = masked_rms(metres[..., :2] - metre_mean[..., :2], trusted)
    distance = spread / masked_rms(rays - ray_mean, trusted)
    return (homogeneous(ray_mean) * distance - metre_mean)[:, 0]


def masked_mean(values: Tensor, mask: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    """[n, P, c] -> sum over `dims` of the chosen points / their number, axes kept; zero where none is chosen."""
    chosen = mask[..., None]
    return (values * chosen).sum(dim=dims, keepdim=True) / chosen.sum(dim=1, keepdim=True).clamp(min=1)


def masked_rms(values: Tensor, mask: Tensor) -> Tensor:
    """[n, P, 2] -> root mean square length of the chosen points, [n, 1, 1]."""
    return (masked_mean(values.square(), mask, dims=(1, 2)) + _MIN_VARIANCE).sqrt()
