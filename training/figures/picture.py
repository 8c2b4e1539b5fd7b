"""Joints of characters -> pictures: tapered capsules with soft edges, painted from far to near.

    joints -> capsules in the camera frame -> their outlines in pixels -> sky, floor, shadow, capsules, snow, night

Everything is one batch of frames on the device of its inputs: a frame of 128 x 128 needs about 27 passes over its
pixels. `paint` is the costly part, and can be compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.figures.cameras import plain_cameras, projected
from training.figures.characters import Characters, Part, Radius
from training.figures.scenes import HATS, Scenes

_EYE_WHITE, _PUPIL, _MOUTH = (0.98, 0.98, 0.98), (0.08, 0.07, 0.12), (0.55, 0.12, 0.14)
_SHADE, _LIGHT = 0.2, (-0.6, -0.8)
"""How much darker the side of a limb away from the light is, and where the light comes from."""
NIGHT_TINT = (0.48, 0.54, 0.80)
_MOON, _MOON_COLOUR = (0.83, 0.14, 0.075), (1.0, 0.97, 0.78)
_SNOWFLAKES, _FALL_PER_FRAME = 26, 0.022
_SNOWFLAKE_RADIUS = 0.0165


@dataclass(frozen=True)
class Capsules:
    """P capsules of each of N frames, far to near.

    Attributes:
        start, end: [N, P, 2] pixels.
        radii: [N, P, 2] pixels, at the start and at the end; not above 0 where there is none.
        colours: [N, P, 3].
    """

    start: Tensor
    end: Tensor
    radii: Tensor
    colours: Tensor

    def one(self, index: tuple[int | slice | None, ...]) -> Capsules:
        """Part of each tensor."""
        return Capsules(self.start[index], self.end[index], self.radii[index], self.colours[index])


def render(
    characters: Characters,
    joints: Tensor,
    scenes: Scenes,
    *,
    height: int,
    width: int,
    cameras: Tensor | None = None,
) -> Tensor:
    """Draws clips.

    Args:
        characters, scenes: B of them.
        joints: float32 [B, T, 24, 3], millimetres in front of the camera.
        cameras: float32 [B, 4], see cameras.py; None: the plain one.

    Returns:
        uint8 [B, T, height, width, 3] on the device of the joints.
    """
    batch, frames = joints.shape[:2]
    each = torch.arange(batch, device=joints.device).repeat_interleave(frames)
    seen = (plain_cameras(batch).to(joints.device) if cameras is None else cameras)[each] * height
    capsules = outlines(characters.pick(each), joints.flatten(0, 1), scenes.hat[each], seen)
    canvas = background(scenes, height, width)[each]
    canvas = paint(canvas, shadows(joints.flatten(0, 1), height, seen), shaded=False, strength=0.22)
    canvas = paint(canvas, capsules)
    canvas = lit(canvas, scenes.night[each], height, width)
    times = torch.arange(frames, device=joints.device).repeat(batch)
    canvas = snowed(canvas, scenes.snow[each], times, height, width)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8).reshape(batch, frames, height, width, 3)


def grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """y [height, 1] and x [1, width] of the pixels, whose centres are whole numbers."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in (height, width))
    return rows[:, None], columns[None]


def background(scenes: Scenes, height: int, width: int) -> Tensor:
    """Sky, floor and discs by daylight: [B, height, width, 3]."""
    y, x = grid(height, width, scenes.sky.device)
    y, x = y / height, x / width
    horizon = scenes.horizon[:, None, None]
    share = (y / horizon).clamp(0, 1)[..., None]
    top, bottom = (scenes.sky[:, place, None, None] for place in (0, 1))
    canvas = (top * (1 - share) + bottom * share).expand(-1, -1, width, -1)
    for disc, colour in zip(scenes.discs.unbind(1), scenes.disc_colours.unbind(1), strict=True):
        left, upper, radius = (value[:, None, None] for value in disc.unbind(1))
        outside = torch.hypot(x - left, y - upper) - radius
        cover = (0.5 - outside * height).clamp(0, 1) * (radius > 0)
        canvas = torch.lerp(canvas, colour[:, None, None].expand_as(canvas), cover[..., None])
    on_floor = ((y - horizon) * height + 0.5).clamp(0, 1)[..., None]
    return torch.lerp(canvas, scenes.floor[:, None, None].expand_as(canvas), on_floor.expand_as(canvas))


def shadows(joints: Tensor, height: int, cameras: Tensor) -> Capsules:
    """What each figure of joints [N, 24, 3] darkens of the floor."""
    feet = joints[:, [7, 8]]
    ends = projected(feet, cameras)
    ends[..., 1] = ends[..., 1].amax(-1, keepdim=True) + 0.03 * height
    radii = torch.full_like(ends, 0.028 * height)
    start, end = ends[:, :1], ends[:, 1:]
    return Capsules(start, end, radii[:, :1], torch.zeros_like(joints[:, :1]))


def outlines(characters: Characters, joints: Tensor, hat: Tensor, cameras: Tensor) -> Capsules:
    """All parts of N figures, sorted from far to near.

    Args:
        joints: [N, 24, 3].
        hat: int64 [N], of Scenes.
        cameras: float32 [N, 4], in pixels.
    """
    parts = _Parts(characters, joints, hat)
    starts, ends = torch.stack(parts.starts, 1), torch.stack(parts.ends, 1)
    radii = torch.stack([torch.stack(pair, -1) for pair in parts.radii], 1)
    depth = torch.stack([starts[..., 2], ends[..., 2]], -1)
    # the nearer end of a limb decides, as it is what is seen to be in front
    order = (depth.mean(-1) * 0.5 + depth.amin(-1) * 0.5 - torch.stack(parts.bias, 1)).argsort(1, descending=True)
    pixels = radii * cameras[:, :2].mean(1)[:, None, None] / depth.clamp(min=100.0)
    colours = torch.stack(parts.colours, 1)
    sorted_parts = (
        value.gather(1, order[..., None].expand_as(value))
        for value in (projected(starts, cameras), projected(ends, cameras), pixels, colours)
    )
    return Capsules(*sorted_parts)


class _Parts:
    """Collects the capsules of N figures: ends [N, 3] and radii [N] in millimetres, colours [N, 3]; `bias` brings one
    nearer in the order of painting than its depth says."""

    def __init__(self, characters: Characters, joints: Tensor, hat: Tensor) -> None:
        self.starts: list[Tensor] = []
        self.ends: list[Tensor] = []
        self.radii: list[tuple[Tensor, Tensor]] = []
        self.colours: list[Tensor] = []
        self.bias: list[Tensor] = []
        self._characters, self._joints = characters, joints
        self._limbs()
        self._trunk()
        self._head(hat)

    def _radius(self, name: Radius) -> Tensor:
        return self._characters.radii[:, name]

    def _at(self, joint: int) -> Tensor:
        return self._joints[:, joint]

    def _add(
        self, start: Tensor, end: Tensor, first: Tensor, second: Tensor, colour: Part | Tensor, bias: float = 0.0
    ) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.radii.append((first, second))
        if isinstance(colour, Part):
            self.colours.append(self._characters.colours[:, colour])
        else:
            # colours of characters may have further channels before the three
            others = self._characters.colours.shape[-1] - colour.shape[-1]
            self.colours.append(torch.nn.functional.pad(colour, (others, 0)))
        self.bias.append(torch.full_like(first, bias))

    def _limbs(self) -> None:
        """Arms and legs, in SMPL's numbers of the left ones; the right ones follow each."""
        chains = (
            (16, 18, Radius.SHOULDER, Radius.ELBOW, Part.LEFT_UPPER_ARM),
            (18, 20, Radius.ELBOW, Radius.WRIST, Part.LEFT_FOREARM),
            (22, 22, Radius.HAND, Radius.HAND, Part.LEFT_HAND),
            (1, 4, Radius.HIP, Radius.KNEE, Part.LEFT_THIGH),
            (4, 7, Radius.KNEE, Radius.ANKLE, Part.LEFT_SHIN),
            (7, 10, Radius.FOOT, Radius.FOOT, Part.LEFT_FOOT),
        )
        for start, end, first, second, part in chains:
            for side in (0, 1):
                ends = self._at(start + side), self._at(end + side)
                self._add(*ends, self._radius(first), self._radius(second), Part(part + side), 10.0 * (start == end))

    def _trunk(self) -> None:
        pelvis, shoulders = self._at(0), (self._at(16), self._at(17))
        middle = (self._at(3) + self._at(6)) / 2
        hips = [self._at(side) * 0.75 + pelvis * 0.25 for side in (1, 2)]
        self._add(hips[0], hips[1], self._radius(Radius.HIPS), self._radius(Radius.HIPS), Part.HIPS)
        top = (shoulders[0] + shoulders[1]) / 2
        self._add(middle, top, self._radius(Radius.WAIST), self._radius(Radius.CHEST), Part.CHEST, 5.0)
        ends = [shoulder * 0.72 + top * 0.28 for shoulder in shoulders]
        chest = self._radius(Radius.CHEST) * 0.85
        self._add(ends[0], ends[1], chest, chest, Part.CHEST)

    def _head(self, hat: Tensor) -> None:
        """Neck, head, hair, face and hat; the face looks where the chest does."""
        neck, head = self._at(12), self._at(15)
        up = torch.nn.functional.normalize(head - neck, dim=-1)
        left = self._at(16) - self._at(17)
        left = torch.nn.functional.normalize(left - (left * up).sum(-1, keepdim=True) * up, dim=-1)
        front = torch.linalg.cross(left, up)
        radius = self._radius(Radius.HEAD)
        size = radius[:, None]
        centre = head_centre(self._characters, self._joints)
        self._add(neck, head, self._radius(Radius.NECK), self._radius(Radius.NECK), Part.HEAD)
        self._add(centre, centre, radius, radius, Part.HEAD, 15.0)
        crown = centre + (0.24 * up - 0.34 * front) * size
        self._add(crown, crown, radius * 1.08, radius * 1.08, Part.HAIR, 15.0)
        for side in (-1, 1):
            eye = centre + (0.34 * side * left + 0.08 * up + 0.82 * front) * size
            self._add(eye, eye, radius * 0.27, radius * 0.27, self._same(_EYE_WHITE), 15.0)
            pupil = eye + 0.1 * front * size
            self._add(pupil, pupil, radius * 0.15, radius * 0.15, self._same(_PUPIL), 20.0)
        lips = centre + (-0.45 * up + 0.86 * front) * size
        corners = lips - 0.2 * left * size, lips + 0.2 * left * size
        self._add(*corners, radius * 0.07, radius * 0.07, self._same(_MOUTH), 15.0)
        worn = radius * (hat > 0)
        colour = torch.tensor([(0.0, 0.0, 0.0), *HATS.values()], device=hat.device)[hat]
        brim = centre + 0.55 * up * size
        self._add(brim - 0.95 * left * size, brim + 0.95 * left * size, worn * 0.2, worn * 0.2, colour * 0.8, 150.0)
        self._add(brim + 0.15 * up * size, brim + 0.95 * up * size, worn * 0.72, worn * 0.55, colour, 140.0)

    def _same(self, colour: tuple[float, float, float]) -> Tensor:
        return torch.tensor(colour, device=self._joints.device).expand(len(self._joints), 3)


def head_centre(characters: Characters, joints: Tensor) -> Tensor:
    """Middle of the head [N, 3]: above the head joint, which is where it turns."""
    up = torch.nn.functional.normalize(joints[:, 15] - joints[:, 12], dim=-1)
    return joints[:, 15] + up * characters.radii[:, Radius.HEAD, None] * 0.75


def paint(
    canvas: Tensor, capsules: Capsules, *, shaded: bool = True, strength: float = 1.0, soft: bool = True
) -> Tensor:
    """Paints capsules one after the other over [N, height, width, channels]; `soft` edges cover pixels in part.

    On a GPU every capsule is painted over whole pictures, in one pass of all frames; on a CPU, where it may be seen.
    """
    style = _Style(shaded, strength, soft)
    return (_paint_windows if canvas.device.type == "cpu" else paint_whole)(canvas, capsules, style)


@dataclass(frozen=True)
class _Style:
    """How paint paints."""

    shaded: bool = True
    strength: float = 1.0
    soft: bool = True


def paint_whole(canvas: Tensor, capsules: Capsules, style: _Style = _Style()) -> Tensor:
    """paint without a decision that depends on the numbers, so that it can be compiled."""
    y, x = grid(canvas.shape[1], canvas.shape[2], canvas.device)
    for number in range(capsules.start.shape[1]):
        canvas = _covered(canvas, capsules.one((slice(None), number, None, None)), y, x, style)
    return canvas


def _paint_windows(canvas: Tensor, capsules: Capsules, style: _Style) -> Tensor:
    height, width = canvas.shape[1:3]
    y, x = grid(height, width, canvas.device)
    reach = capsules.radii.amax(-1, keepdim=True) + 1
    low = (torch.minimum(capsules.start, capsules.end) - reach).floor().clamp(min=0)
    high = (torch.maximum(capsules.start, capsules.end) + reach).ceil() + 1
    windows = torch.cat([low, high, capsules.radii.amax(-1, keepdim=True)], -1).tolist()
    canvas = canvas.clone()
    for frame, parts in zip(range(len(canvas)), windows, strict=True):
        for number, (left, top, right, bottom, radius) in enumerate(parts):
            rows, columns = slice(int(top), int(min(bottom, height))), slice(int(left), int(min(right, width)))
            if radius <= 0 or rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            part = canvas[frame, rows, columns]
            part.copy_(_covered(part, capsules.one((frame, number)), y[rows], x[:, columns], style))
    return canvas


def _covered(canvas: Tensor, capsule: Capsules, y: Tensor, x: Tensor, style: _Style) -> Tensor:
    """Pixels [..., height, width, channels] with one capsule, of tensors [..., channels], over them."""
    radii, colour = capsule.radii, capsule.colours
    along_x, along_y = (capsule.end - capsule.start).unbind(-1)
    off_x, off_y = x - capsule.start[..., 0], y - capsule.start[..., 1]
    share = ((off_x * along_x + off_y * along_y) / (along_x**2 + along_y**2).clamp(min=1e-6)).clamp(0, 1)
    off_x, off_y = off_x - share * along_x, off_y - share * along_y
    radius = radii[..., 0] + share * (radii[..., 1] - radii[..., 0])
    cover = (radius - (off_x**2 + off_y**2).sqrt() + 0.5).clamp(0, 1) * (radius > 0) * style.strength
    if not style.soft:
        cover = (cover >= 0.5).float()
    if style.shaded:
        away = -(off_x * _LIGHT[0] + off_y * _LIGHT[1]) / radius.clamp(min=1e-3)
        colour = colour * (1 - _SHADE * (0.5 + 0.5 * away.clamp(-1, 1)))[..., None]
    return canvas + cover[..., None] * (colour - canvas)


def lit(canvas: Tensor, night: Tensor, height: int, width: int) -> Tensor:
    """Pictures [N, height, width, 3] as they are seen by day, or at night with a moon."""
    y, x = grid(height, width, canvas.device)
    left, upper, radius = (value * height for value in _MOON)
    moon = (radius - torch.hypot(x - left, y - upper) + 0.5).clamp(0, 1)[..., None]
    dark = canvas * torch.tensor(NIGHT_TINT, device=canvas.device)
    dark = dark + moon * (torch.tensor(_MOON_COLOUR, device=canvas.device) - dark)
    return torch.where(night[:, None, None, None], dark, canvas)


def snowed(canvas: Tensor, snow: Tensor, times: Tensor, height: int, width: int) -> Tensor:
    """Pictures with snow in front, bool [N], at so many frames from the start of a clip [N]; it always falls the same."""
    if canvas.device.type == "cpu" and not snow.any():
        return canvas
    y, x = grid(height, width, canvas.device)
    cover = torch.zeros(len(times), height, width, device=canvas.device)
    for number in range(_SNOWFLAKES):
        # the golden ratio spreads any number of flakes evenly
        left = (number * 0.618034 + 0.05) % 1 * width
        fallen = (number / _SNOWFLAKES + times * _FALL_PER_FRAME)[:, None, None] % 1.0
        upper = fallen * (height * 1.1) - 0.05 * height
        distance = ((x - left) ** 2 + (y - upper) ** 2).sqrt()
        cover = torch.maximum(cover, (_SNOWFLAKE_RADIUS * height - distance + 0.5).clamp(0, 1))
    cover = (cover * snow[:, None, None])[..., None]
    return canvas + cover * (1 - canvas)
