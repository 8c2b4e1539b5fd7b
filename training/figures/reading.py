"""Where the parts of a motley character are in a picture: read by colour, without any network.

Every pixel is shared out among the colours that the character has, those of the scene behind it, and hair and hat.
A part is where most of its colour is; its place is the middle of that. What it is compared with is known from the
joints: the projected middle of the part. Snow hides colours, so clips to read have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.figures.cameras import projected
from training.figures.characters import NUM_READ, Characters, Length, Part
from training.figures.picture import NIGHT_TINT, Capsules, background, head_centre, lit, outlines, paint
from training.figures.scenes import HATS, Scenes

_SIGMA = 0.09
"""How far from its colour a pixel still counts; levels 0 to 1."""
_SHADED = (0.76, 1.03)
"""Least and most light on a part."""
_BLUR, _REACH = 0.022, 0.105
"""Of the smoothing before the best place is taken, and from there how far a part may go; in sides of the picture."""
_LEAST_AREA = 0.0006
"""Of the picture, that a part must cover to be said to be there."""
_LEAST_VISIBLE = 0.4
"""Of a part, for it to be compared."""


@dataclass(frozen=True)
class Places:
    """Where the 15 parts are: points float32 [B, T, 15, 2], pixels, x first; there bool [B, T, 15]."""

    points: Tensor
    there: Tensor


def read(frames: Tensor, characters: Characters, scenes: Scenes) -> Places:
    """Reads the parts of motley characters from clips uint8 [B, T, height, width, 3]."""
    batch, num_frames, height, width, _ = frames.shape
    shares = _shares(frames.float().flatten(0, 1) / 255, characters, scenes, num_frames)
    peak = _blurred(shares, _BLUR * height).flatten(2).argmax(-1)
    y, x = (torch.arange(side, device=frames.device, dtype=torch.float32) for side in (height, width))
    off_x, off_y = x - (peak % width)[..., None], y - (peak // width)[..., None]  # [N, 15, width], [N, 15, height]
    near = (off_x[..., None, :] ** 2 + off_y[..., None] ** 2) < (_REACH * height) ** 2
    mass = shares * near
    area = mass.sum((-1, -2))
    place_x, place_y = (mass.sum(2) * x).sum(-1), (mass.sum(3) * y).sum(-1)
    points = torch.stack([place_x, place_y], -1) / area.clamp(min=1e-6)[..., None]
    there = area >= _LEAST_AREA * height * width
    return Places(points.reshape(batch, num_frames, -1, 2), there.reshape(batch, num_frames, -1))


def _shares(pixels: Tensor, characters: Characters, scenes: Scenes, num_frames: int) -> Tensor:
    """How much of each pixel [N, height, width, 3] is of each part: [N, 15, height, width]."""
    height, width = pixels.shape[1:3]
    each = torch.arange(len(characters), device=pixels.device).repeat_interleave(num_frames)
    tint = torch.where(scenes.night[:, None], torch.tensor(NIGHT_TINT, device=pixels.device), 1.0)
    hats = torch.tensor([(1.0, 1.0, 1.0), *HATS.values()], device=pixels.device)[scenes.hat]
    hats = torch.where(scenes.hat[:, None] > 0, hats, characters.colours[:, Part.HAIR])
    own = torch.cat([characters.colours, hats[:, None]], 1) * tint[:, None]
    behind = lit(background(scenes, height, width), scenes.night, height, width)[each]
    distances = [_distance(pixels, behind)]
    for colour in own.unbind(1):
        distances.append(_distance(pixels, colour[each, None, None]))
    shares = torch.softmax(-torch.stack(distances, 1) / (2 * _SIGMA**2), 1)
    return shares[:, 1 : 1 + NUM_READ]


def _distance(pixels: Tensor, colour: Tensor) -> Tensor:
    """Squared distance of pixels [..., 3] to a colour in the best light for it."""
    light = (pixels * colour).sum(-1) / (colour**2).sum(-1).clamp(min=1e-4)
    light = light.clamp(*_SHADED)
    return ((pixels - light[..., None] * colour) ** 2).sum(-1)


def _blurred(shares: Tensor, sigma: float) -> Tensor:
    """[N, C, height, width] smoothed by a Gaussian."""
    reach = int(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=shares.device, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    rows = shares.reshape(-1, 1, *shares.shape[-2:])
    rows = torch.nn.functional.conv2d(rows, kernel.view(1, 1, -1, 1), padding=(reach, 0))
    return torch.nn.functional.conv2d(rows, kernel.view(1, 1, 1, -1), padding=(0, reach)).view_as(shares)


def known_places(characters: Characters, joints: Tensor, scenes: Scenes, cameras: Tensor, side: int) -> Places:
    """Where the parts are by the joints [B, T, 24, 3], and which of them are seen: at least 0.4 of the part, in front of
    everything else.

    Args:
        cameras: that the joints are seen with, float32 [B, 4].
        side: height and width of the picture, pixels.
    """
    batch, num_frames = joints.shape[:2]
    flat = joints.flatten(0, 1)
    each = torch.arange(batch, device=joints.device).repeat_interleave(num_frames)
    figures, seen_by = characters.pick(each), cameras[each] * side
    points = projected(_middles(figures, flat), seen_by)
    there = _seen(figures, flat, scenes.hat[each], seen_by, side)
    return Places(points.reshape(batch, num_frames, -1, 2), there.reshape(batch, num_frames, -1))


def _middles(characters: Characters, joints: Tensor) -> Tensor:
    """[N, 15, 3], millimetres, in the order of Part."""
    ends = [(3, 16), (1, 2), (16, 18), (17, 19), (18, 20), (19, 21), (22, 22), (23, 23)]
    ends += [(1, 4), (2, 5), (4, 7), (5, 8), (7, 10), (8, 11)]
    middles = (joints[:, [start for start, _ in ends]] + joints[:, [end for _, end in ends]]) / 2
    chest = joints[:, [3, 6, 16, 17]].mean(1)
    return torch.cat([torch.stack([head_centre(characters, joints), chest], 1), middles[:, 1:]], 1)


def _seen(characters: Characters, joints: Tensor, hat: Tensor, cameras: Tensor, side: int) -> Tensor:
    """Which parts are seen well enough, bool [N, 15]."""
    # every part is painted in a level of its own, without shade; eyes, mouth and hat have other colours
    levels = torch.zeros_like(characters.colours)
    levels[..., 0] = (torch.arange(len(Part), device=joints.device) + 1.0) / len(Part)
    numbered = replace(characters, colours=levels)
    capsules = outlines(numbered, joints, hat, cameras)
    canvas = paint(torch.zeros(len(joints), side, side, 3, device=joints.device), capsules, shaded=False, soft=False)
    number = torch.where((canvas[..., 1] == 0), canvas[..., 0] * len(Part), 1.0).round()
    visible = torch.stack([(number == part + 1).sum((-1, -2)) for part in range(NUM_READ)], 1)
    return (visible >= _LEAST_VISIBLE * _areas(capsules)) & (visible >= 1.5 * _LEAST_AREA * side**2)


def _areas(capsules: Capsules) -> Tensor:
    """Of the largest capsule of each part, whose colours are numbers as in _seen: pixels [N, 15]."""
    first, second = capsules.radii.unbind(-1)
    length = (capsules.end - capsules.start).norm(dim=-1)
    area = math.pi * (first**2 + second**2) / 2 + (first + second) * length
    other = capsules.colours[..., 1] > 0
    number = torch.where(other, 0.0, capsules.colours[..., 0] * len(Part)).round().long()
    areas = torch.zeros(len(area), len(Part) + 1, device=area.device)
    return areas.scatter_reduce(1, number, area, "amax")[:, 1 : 1 + NUM_READ]


def figure_heights(characters: Characters, joints: Tensor, cameras: Tensor, side: int) -> Tensor:
    """How high each character would stand in the picture where its pelvis is, pixels [B, T]."""
    return characters.lengths[:, None, Length.HEIGHT] * cameras[:, None, 1] * side / joints[:, :, 0, 2]


def correct(found: Places, known: Places, heights: Tensor, *, within: float = 0.1) -> tuple[Tensor, Tensor]:
    """Which parts were found where they are known to be.

    Args:
        heights: of the figures, pixels [B, T].
        within: of the height, how far off a part may be.

    Returns:
        hits bool [B, T, 15], and which of them count, bool [B, T, 15]; PCK is the share of hits among those.
    """
    distance = (found.points - known.points).norm(dim=-1)
    return found.there & (distance <= within * heights[..., None]), known.there
