"""The camera of each clip: the plain one, or the one that the pose service fits to a reference picture.

A camera is a row fx, fy, cx, cy, in sides of the square picture, whose first pixel's centre is (0, 0).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from services.pose.skeleton import SLOT_JOINTS, Camera

# of services/pose/align.py
_NECK, _LOWER = 1, (9, 10, 12, 13)
_M_BOUNDS, _S_BOUNDS = (0.7, 1.4), (0.8, 1.15)
_JOINTS = [SLOT_JOINTS[slot] for slot in (_NECK, *_LOWER)]
_SHOULDERS = [16, 17]
_WEIGHTS = (1.0, 4.0, 4.0, 4.0, 4.0)


def plain_cameras(count: int) -> Tensor:
    """float32 [count, 4]."""
    camera = Camera.of(1, 1)
    return torch.tensor([(camera.fx, camera.fy, camera.cx, camera.cy)]).repeat(count, 1)


def as_camera(row: Tensor, side: int) -> Camera:
    """One row as the pose service's camera of pictures of that side."""
    fx, fy, cx, cy = (row.double() * side).tolist()
    return Camera(fx, fy, cx, cy)


def projected(points: Tensor, cameras: Tensor) -> Tensor:
    """Points [N, k, 3], millimetres -> [N, k, 2], x first, in the cameras' [N, 4] unit."""
    depth = points[..., 2:].clamp(min=100.0)
    return cameras[:, None, :2] * points[..., :2] / depth + cameras[:, None, 2:]


def fitted_cameras(driving: Tensor, reference: Tensor) -> Tensor:
    """The cameras that show driving figures where the reference figures' neck, knees and ankles are.

    The pose service's fit (services/pose/align.py) for whole figures, for many pairs at once and with the keypoints
    known exactly.

    Args:
        driving, reference: float32 [B, 24, 3], the first driving pose and that of the reference picture.

    Returns:
        float32 [B, 4].
    """
    plain = plain_cameras(len(driving)).to(driving.device)
    centre = plain[:, None, 2:]
    weights = driving.new_tensor(_WEIGHTS)[:, None]
    weights = weights / weights.sum()
    rays, goals = (projected(joints[:, _JOINTS], plain) - centre for joints in (driving, reference))
    # a 2D neck is halfway between the shoulders
    goals[:, 0] = projected(reference[:, _SHOULDERS], plain).mean(1) - centre[:, 0]
    middle_ray, middle_goal = (weights * rays).sum(1), (weights * goals).sum(1)
    rays, goals = rays - middle_ray[:, None], goals - middle_goal[:, None]
    squares = (weights * rays**2).sum(1)  # [B, 2], across and down
    products = (weights * rays * goals).sum(1)
    scales = _scales(squares, products)
    return torch.cat([plain[:, :2] * scales, plain[:, 2:] + middle_goal - scales * middle_ray], 1)


def _scales(squares: Tensor, products: Tensor) -> Tensor:
    """The best (m, m s) within the bounds: least sum of squares of both axes, [B, 2]."""
    xx, yy = squares.clamp(min=1e-9).unbind(-1)
    xy, yx = products.unbind(-1)
    found = []
    for m, s in itertools.product((None, *_M_BOUNDS), (None, *_S_BOUNDS)):
        if m is None:
            across = xy / xx if s is None else (xy + s * yx) / (xx + s * s * yy)
        else:
            across = torch.full_like(xx, m)
        down = yx / yy if s is None else across * s
        found.append(torch.stack([across, down], -1))
    scales = torch.stack(found, 1)  # [B, 9, 2]
    cost = (squares[:, None] * scales**2 - 2 * products[:, None] * scales).sum(-1)
    across, ratio = scales[..., 0], scales[..., 1] / scales[..., 0]
    inside = (across >= _M_BOUNDS[0] - 1e-4) & (across <= _M_BOUNDS[1] + 1e-4)
    inside &= (ratio >= _S_BOUNDS[0] - 1e-4) & (ratio <= _S_BOUNDS[1] + 1e-4)
    best = torch.where(inside, cost, torch.inf).argmin(1)
    return scales[torch.arange(len(scales)), best]
