"""Where the 133 points of COCO-WholeBody are on a drawn figure, and its box.

Order: 17 of the body, 6 of the feet, 68 of the face, 21 of the left hand, 21 of the right one; as the network of
services/pose/keypoints.py gives them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.figures.cameras import plain_cameras, projected
from training.figures.characters import Characters, Radius
from training.figures.picture import head_centre

# SMPL's numbers of shoulders, elbows, wrists, hips, knees, ankles: left, right
_BODY = (16, 17, 18, 19, 20, 21, 1, 2, 4, 5, 7, 8)
Angle = tuple[float, float]


def _face() -> list[Angle]:
    """Where the 68 points of a face are on the head: radians to the right of the picture and upwards."""
    jaw = [(math.sin(turn) * 1.0, -0.75 * math.cos(turn)) for turn in (math.pi / 2 * (i / 8 - 1) for i in range(17))]
    brows = [(side * (0.62 - 0.1 * i), 0.36 + 0.03 * (2 - abs(i - 2))) for side in (-1,) for i in range(5)]
    brows += [(-x, y) for x, y in reversed(brows)]
    nose = [(0.0, 0.12 - 0.1 * i) for i in range(4)] + [(0.06 * (i - 2), -0.24) for i in range(5)]
    eye = [(-0.15, 0.0), (-0.07, 0.1), (0.07, 0.1), (0.15, 0.0), (0.07, -0.1), (-0.07, -0.1)]
    eyes = [(middle + x, 0.09 + y) for middle in (-0.38, 0.38) for x, y in eye]
    lips = [(0.24 * math.cos(turn), 0.1 * math.sin(turn)) for turn in (math.pi - i * math.pi / 6 for i in range(12))]
    inner = [(0.15 * math.cos(turn), 0.04 * math.sin(turn)) for turn in (math.pi - i * math.pi / 4 for i in range(8))]
    return jaw + brows + nose + eyes + [(x, y - 0.47) for x, y in lips + inner]


_NOSE, _EYES, _EARS = (0.0, -0.18), ((0.38, 0.09), (-0.38, 0.09)), ((1.45, 0.0), (-1.45, 0.0))


def whole_body(
    characters: Characters, joints: Tensor, height: int, width: int, cameras: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The points of B figures in T frames.

    Args:
        joints: float32 [B, T, 24, 3].
        cameras: float32 [B, 4]; None: the plain one.

    Returns:
        points float32 [B, T, 133, 2], pixels, x first; visible bool [B, T, 133]: in the picture, and points of the head
        on the side of it that is seen.
    """
    batch, frames = joints.shape[:2]
    each = torch.arange(batch, device=joints.device).repeat_interleave(frames)
    flat, figures = joints.flatten(0, 1), characters.pick(each)
    head, facing = _on_head(figures, flat, [_NOSE, *_EYES, *_EARS, *_face()])
    places = torch.cat([head[:, :5], flat[:, _BODY], _feet(figures, flat), head[:, 5:], _hands(figures, flat)], 1)
    seen = torch.ones(places.shape[:2], dtype=torch.bool, device=places.device)
    seen[:, :5], seen[:, 23:91] = facing[:, :5], facing[:, 5:]
    seen_by = (plain_cameras(batch).to(joints.device) if cameras is None else cameras)[each] * height
    points = projected(places, seen_by)
    inside = (points > 0).all(-1) & (points[..., 0] < width - 1) & (points[..., 1] < height - 1)
    return points.reshape(batch, frames, -1, 2), (seen & inside).reshape(batch, frames, -1)


def _on_head(characters: Characters, joints: Tensor, angles: list[Angle]) -> tuple[Tensor, Tensor]:
    """Points of the head's surface [N, k, 3], and whether they are turned towards the camera."""
    up = torch.nn.functional.normalize(joints[:, 15] - joints[:, 12], dim=-1)
    left = joints[:, 16] - joints[:, 17]
    left = torch.nn.functional.normalize(left - (left * up).sum(-1, keepdim=True) * up, dim=-1)
    front = torch.linalg.cross(left, up)
    turn, rise = torch.tensor(angles, device=joints.device).unbind(-1)
    axes = torch.stack([left, up, front], 1)
    local = torch.stack([turn.sin() * rise.cos(), rise.sin(), turn.cos() * rise.cos()], -1)
    outwards = local @ axes  # [N, k, 3]
    centre = head_centre(characters, joints)[:, None]
    places = centre + outwards * characters.radii[:, Radius.HEAD, None, None]
    return places, (outwards * places).sum(-1) < 0.1 * places.norm(dim=-1)


def _feet(characters: Characters, joints: Tensor) -> Tensor:
    """Big toe, small toe and heel of the left and the right foot, [N, 6, 3]."""
    points = []
    across = torch.nn.functional.normalize(joints[:, 1] - joints[:, 2], dim=-1)
    wide = characters.radii[:, Radius.FOOT, None] * 0.6
    for ankle, foot, outwards in ((7, 10, across), (8, 11, -across)):
        along = joints[:, foot] - joints[:, ankle]
        tip = joints[:, foot] + 0.2 * along
        points += [tip - outwards * wide, tip + outwards * wide, joints[:, ankle] - 0.25 * along]
    return torch.stack(points, 1)


def _hands(characters: Characters, joints: Tensor) -> Tensor:
    """Wrist and five fingers of four points each, of the left and the right hand, [N, 42, 3]; fingers are spread in the
    plane of forearm and upper arm."""
    points = []
    for elbow, wrist, hand, shoulder in ((18, 20, 22, 16), (19, 21, 23, 17)):
        along = torch.nn.functional.normalize(joints[:, hand] - joints[:, wrist], dim=-1)
        across = joints[:, shoulder] - joints[:, elbow]
        across = across - (across * along).sum(-1, keepdim=True) * along
        across = torch.nn.functional.normalize(across + 1e-3, dim=-1)
        size = characters.radii[:, Radius.HAND, None]
        palm = joints[:, hand]
        points.append(joints[:, wrist])
        for finger in range(5):
            turn = math.radians(35 * (2 - finger))
            towards = along * math.cos(turn) + across * math.sin(turn)
            points += [palm + towards * size * share for share in (0.1, 0.4, 0.7, 1.0)]
    return torch.stack(points, 1)


def boxes(characters: Characters, joints: Tensor, height: int, width: int, cameras: Tensor | None = None) -> Tensor:
    """Boxes of the figures: float32 [B, T, 4], left, top, right, bottom in pixels, not beyond the picture."""
    batch, frames = joints.shape[:2]
    each = torch.arange(batch, device=joints.device).repeat_interleave(frames)
    flat, radii = joints.flatten(0, 1), characters.radii[each]
    head = head_centre(characters.pick(each), flat)
    limbs = [10, 11, 7, 8, 22, 23, 18, 19, 4, 5, 16, 17, 1, 2]
    thick = [Radius.FOOT] * 4 + [Radius.HAND] * 2 + [Radius.ELBOW] * 2 + [Radius.KNEE] * 2 + [Radius.CHEST] * 2
    thick += [Radius.HIPS] * 2
    places = torch.cat([flat[:, limbs], head[:, None]], 1)
    size = torch.cat([radii[:, [int(radius) for radius in thick]], radii[:, Radius.HEAD, None]], 1)
    seen_by = (plain_cameras(batch).to(joints.device) if cameras is None else cameras)[each] * height
    middle = projected(places, seen_by)
    reach = (seen_by[:, :2].mean(1)[:, None] * size / places[..., 2])[..., None]
    low, high = (middle - reach).amin(1), (middle + reach).amax(1)
    limit = torch.tensor([width, height], device=joints.device, dtype=torch.float32)
    low, high = (corner.clamp(min=0).minimum(limit) for corner in (low, high))
    return torch.cat([low, high], -1).reshape(batch, frames, 4)
