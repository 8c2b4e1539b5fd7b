"""Motions: angles and places over time, and the joints of a character who moves so.

Each angle swings about a base: base + amplitude * sin(2 pi (rate * seconds * multiple + phase)). A class of motion says
around which values its bases and amplitudes are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from services.pose.skeleton import FIELD_OF_VIEW_DEGREES
from training.figures.batched import Batched
from training.figures.characters import Characters, Length

FRAMES_PER_SECOND = 16
FOCAL = 1 / (2 * math.tan(math.radians(FIELD_OF_VIEW_DEGREES / 2)))
"""Focal length of the camera over the side of the square picture."""
FEET_AT = 0.385
"""Where a standing figure's ankles are seen, in sides of the picture below its middle."""

CHANNELS = (
    "yaw",  # of the whole body; 0 faces the camera, positive turns to its own left
    "roll",
    "bow",  # of the trunk: forwards, sideways, about itself
    "side",
    "twist",
    "left_raise",  # of the upper arm, sideways from hanging; then forwards; then the elbow, forwards or upwards
    "right_raise",
    "left_reach",
    "right_reach",
    "left_elbow",
    "right_elbow",
    "left_upward",
    "right_upward",
    "left_spread",  # of the thigh, sideways; forwards; then the knee
    "right_spread",
    "left_step",
    "right_step",
    "left_knee",
    "right_knee",
    "across",  # of the place, in sides of the picture: to the right, away from the camera, above the floor
    "away",
    "hop",
)
_PLACES = 3


@dataclass(frozen=True)
class Swing:
    """How one channel swings: degrees, or hundredths of the picture's side for a place.

    base and amplitude are each drawn within +- their spread; phase and multiple are of the class's own beat.
    """

    base: float = 0.0
    base_spread: float = 0.0
    amplitude: float = 0.0
    amplitude_spread: float = 0.0
    phase: float = 0.0
    multiple: float = 1.0


_EVERYONE: Mapping[str, Swing] = {
    "yaw": Swing(0, 35, 8, 8),
    "roll": Swing(0, 3, 2, 2),
    "bow": Swing(2, 5, 3, 3),
    "side": Swing(0, 5, 4, 4),
    "twist": Swing(0, 6, 6, 6, 0.25),
    "left_raise": Swing(18, 8, 4, 4),
    "right_raise": Swing(18, 8, 4, 4, 0.5),
    "left_reach": Swing(0, 10, 6, 6),
    "right_reach": Swing(0, 10, 6, 6, 0.5),
    "left_elbow": Swing(25, 15, 6, 6),
    "right_elbow": Swing(25, 15, 6, 6),
    "left_upward": Swing(20, 20),
    "right_upward": Swing(20, 20),
    "left_spread": Swing(8, 5),
    "right_spread": Swing(8, 5),
    "left_step": Swing(4, 4, 2, 2),
    "right_step": Swing(4, 4, 2, 2, 0.5),
    "left_knee": Swing(8, 5, 2, 2),
    "right_knee": Swing(8, 5, 2, 2, 0.5),
    "across": Swing(0, 14, 3, 3),
    "away": Swing(6, 6),
}


def _both(name: str, left: Swing, right: Swing | None = None) -> dict[str, Swing]:
    return {f"left_{name}": left, f"right_{name}": right or left}


CLASSES: Mapping[str, Mapping[str, Swing]] = {
    "stands": {
        "yaw": Swing(0, 30),
        "across": Swing(0, 6),
        **_both("raise", Swing(32, 22)),
        **_both("step", Swing(2, 3)),
    },
    "walks": {
        "yaw": Swing(0, 60, 3, 3),
        **_both("step", Swing(6, 3, 30, 6), Swing(6, 3, 30, 6, 0.5)),
        **_both("knee", Swing(24, 4, 20, 5, 0.25), Swing(24, 4, 20, 5, 0.75)),
        **_both("reach", Swing(4, 6, 32, 10, 0.5), Swing(4, 6, 32, 10)),
        "across": Swing(0, 4, 18, 4, 0, 0.5),
    },
    "waves": {
        "left_raise": Swing(120, 20, 22, 10),
        "left_elbow": Swing(50, 15, 38, 10, 0.2),
        "left_upward": Swing(85, 5),
        "side": Swing(0, 10, 10, 5),
        "across": Swing(0, 17, 3, 3),
    },
    "dances": {
        "side": Swing(0, 4, 20, 6),
        "roll": Swing(0, 4, 8, 4),
        **_both("raise", Swing(80, 20, 45, 15), Swing(80, 20, 45, 15, 0.5)),
        **_both("elbow", Swing(70, 20, 30, 10, 0.3), Swing(70, 20, 30, 10, 0.8)),
        **_both("upward", Swing(70, 20)),
        **_both("spread", Swing(16, 6, 8, 4), Swing(16, 6, 8, 4, 0.5)),
        **_both("knee", Swing(22, 6, 16, 5), Swing(22, 6, 16, 5, 0.5)),
        "across": Swing(0, 8, 12, 4),
    },
    "squats": {
        **_both("step", Swing(50, 5, 42, 6)),
        **_both("knee", Swing(72, 6, 60, 6)),
        **_both("spread", Swing(20, 6)),
        **_both("reach", Swing(55, 15, 30, 10)),
        "bow": Swing(14, 4, 10, 4),
        "yaw": Swing(0, 60),
        "across": Swing(0, 17),
    },
    "jumps": {
        **_both("raise", Swing(90, 8, 62, 10)),
        **_both("elbow", Swing(18, 10)),
        **_both("spread", Swing(18, 4, 13, 3)),
        "hop": Swing(3, 0, 3, 1, 0.5, 2),
        "across": Swing(0, 14),
    },
    "kicks": {
        "right_step": Swing(38, 6, 48, 8),
        "right_knee": Swing(24, 8, 20, 6, 0.5),
        "bow": Swing(-8, 5, 8, 4),
        **_both("raise", Swing(60, 15, 12, 6)),
        "yaw": Swing(0, 65),
        "across": Swing(0, 17),
    },
    "bows": {
        "bow": Swing(38, 6, 36, 6),
        "yaw": Swing(0, 65),
        **_both("reach", Swing(20, 20, 30, 10)),
        "side": Swing(0, 8),
        "across": Swing(0, 17),
    },
    "turns": {
        "yaw": Swing(0, 20, 80, 15, 0, 0.6),
        **_both("raise", Swing(60, 30, 20, 10)),
        **_both("elbow", Swing(40, 20)),
        "across": Swing(0, 10, 8, 4),
    },
    "signals": {
        "left_raise": Swing(95, 15, 60, 10),
        "right_raise": Swing(75, 15, 60, 10, 0.25, 1),
        **_both("elbow", Swing(12, 8)),
        "roll": Swing(0, 6),
        "across": Swing(0, 16),
    },
}
"""Words of the captions; what a class does not say it has from _EVERYONE."""
_STARTS = {"walks": 0.0, "squats": 0.75, "jumps": 0.75, "kicks": 0.75, "bows": 0.75}
"""Phases at which these begin, about: people start from where they stand, and the first pose is what is fitted to the
reference picture."""
_START_SPREAD = 0.12
HELD_OUT_CLASS, STANDING = "signals", "stands"
CLASS_NAMES = tuple(CLASSES)
_RATE_HZ = (0.45, 0.95)
_SIZE = (0.74, 0.84)


@dataclass(frozen=True)
class Motions(Batched):
    """B motions of T frames.

    Attributes:
        angles: float32 [B, T, len(CHANNELS) - 3], radians.
        places: float32 [B, T, 3]: across, away, hop, in sides of the picture.
        size: float32 [B], how high a standing figure is, in sides of the picture.
        kind: int64 [B], places in CLASS_NAMES.
    """

    angles: Tensor
    places: Tensor
    size: Tensor
    kind: Tensor

    def __len__(self) -> int:
        return len(self.angles)

    def first(self) -> Motions:
        """The first frame of each."""
        return replace(self, angles=self.angles[:, :1], places=self.places[:, :1])


def sample_motions(count: int, frames: int, generator: torch.Generator, *, held_out: bool) -> Motions:
    """Draws motions of all classes but the held-out one, and of that one as well where held out."""
    allowed = [place for place, name in enumerate(CLASS_NAMES) if name != STANDING]
    if not held_out:
        allowed.remove(CLASS_NAMES.index(HELD_OUT_CLASS))
    kinds = torch.tensor(allowed)[torch.randint(len(allowed), (count,), generator=generator)]
    return _swinging(kinds, frames, generator)


def sample_stances(count: int, generator: torch.Generator) -> Motions:
    """Motions of one frame in which a character stands, as for a portrait."""
    return _swinging(torch.full((count,), CLASS_NAMES.index(STANDING)), 1, generator)


def _table() -> Tensor:
    """[classes, channels, 6], degrees turned to radians and hundredths to ones."""
    rows = [[{**_EVERYONE, **swings}.get(name, Swing()) for name in CHANNELS] for swings in CLASSES.values()]
    table = torch.tensor(
        [[[getattr(swing, field.name) for field in fields(Swing)] for swing in row] for row in rows],
    )
    table[:, :-_PLACES, :4] *= math.pi / 180
    table[:, -_PLACES:, :4] /= 100
    return table


def _swinging(kinds: Tensor, frames: int, generator: torch.Generator) -> Motions:
    count = len(kinds)

    def within(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    base, base_spread, amplitude, amplitude_spread, phase, multiple = _table()[kinds].unbind(-1)
    channels = len(CHANNELS)
    base = base + base_spread * within(-1, 1, channels)
    amplitude = amplitude + amplitude_spread * within(-1, 1, channels)
    starts = torch.tensor([[_STARTS.get(name, 0.0), _START_SPREAD if name in _STARTS else 0.5] for name in CLASSES])
    about, spread = starts[kinds].unbind(-1)
    start = (about + spread * within(-1, 1))[:, None] + phase + within(-0.04, 0.04, channels)
    seconds = torch.arange(frames) / FRAMES_PER_SECOND
    beat = (within(*_RATE_HZ, 1) * multiple)[:, None] * seconds[:, None] + start[:, None]
    swung = base[:, None] + amplitude[:, None] * torch.sin(2 * math.pi * beat)
    mirrored = torch.rand(count, generator=generator) < 0.5
    swung = torch.where(mirrored[:, None, None], _mirror(swung), swung)
    return Motions(swung[..., :-_PLACES], swung[..., -_PLACES:], within(*_SIZE), kinds)


def _mirror(swung: Tensor) -> Tensor:
    """Left for right."""
    order, signs = [], []
    for name in CHANNELS:
        side, _, rest = name.partition("_")
        other = {"left": f"right_{rest}", "right": f"left_{rest}"}.get(side, name)
        order.append(CHANNELS.index(other))
        signs.append(-1.0 if name in ("yaw", "roll", "side", "twist", "across") else 1.0)
    return swung[..., order] * torch.tensor(signs)


def joints(characters: Characters, motions: Motions) -> Tensor:
    """SMPL's 24 joints of each character in its motion: float32 [B, T, 24, 3], millimetres in front of the camera.

    The camera is level, as far away as the motion's size asks for; the lower ankle is on the floor, less the hop.
    """
    lengths = characters.lengths[:, None]  # [B, 1, lengths]
    angle = dict(zip(CHANNELS, motions.angles.unbind(-1), strict=False))
    body = _turned_about_y(angle["yaw"]) @ _turned_about_z(angle["roll"])
    chest = body @ _turned_about_x(angle["bow"]) @ _turned_about_z(angle["side"]) @ _turned_about_y(angle["twist"])
    at = _skeleton(lengths, angle, body, chest)
    pose = torch.stack([at[index] for index in range(24)], -2)
    side_mm = lengths[..., Length.HEIGHT] / motions.size[:, None]  # what the picture's side spans where the figure is
    across, away, hop = motions.places.unbind(-1)
    floor = side_mm * FEET_AT
    lowest = pose[..., [7, 8], 1].amax(-1)
    moved = torch.stack([across * side_mm, floor - hop * side_mm - lowest, side_mm * (FOCAL + away)], -1)
    return pose + moved[..., None, :]


def _skeleton(lengths: Tensor, angle: Mapping[str, Tensor], body: Tensor, chest: Tensor) -> dict[int, Tensor]:
    """Joints by their number in SMPL's order, the pelvis at the origin; body, chest: rotations [B, T, 3, 3]."""
    long = {bone: lengths[..., bone, None] for bone in Length}
    at = {0: torch.zeros_like(body[..., 0])}
    up = -body[..., 1] * 0.3 - chest[..., 1] * 0.7  # the spine bends a little above the hips
    up = torch.nn.functional.normalize(up, dim=-1)
    at[3] = at[0] - body[..., 1] * long[Length.SPINE] * 0.25
    at[6] = at[3] + up * long[Length.SPINE] * 0.25
    at[9] = at[6] - chest[..., 1] * long[Length.SPINE] * 0.2
    at[12] = at[9] - chest[..., 1] * long[Length.SPINE] * 0.3
    at[15] = at[12] - chest[..., 1] * long[Length.NECK]
    for side, sign in (("left", 1.0), ("right", -1.0)):
        hip, knee, ankle, foot = (1, 4, 7, 10) if side == "left" else (2, 5, 8, 11)
        collar, shoulder, elbow, wrist, hand = (13, 16, 18, 20, 22) if side == "left" else (14, 17, 19, 21, 23)
        at[hip] = body[..., 0] * sign * long[Length.HALF_HIPS] + body[..., 1] * long[Length.HALF_HIPS] * 0.5
        spread, step, bend = (angle[f"{side}_{name}"] for name in ("spread", "step", "knee"))
        at[knee] = at[hip] + _limb(body, sign, spread, step) * long[Length.THIGH]
        at[ankle] = at[knee] + _limb(body, sign, spread, step - bend) * long[Length.SHIN]
        at[foot] = at[ankle] + _applied(body, (0.3 * sign, 0.25, -0.92)) * long[Length.FOOT]
        across = chest[..., 0] * sign
        at[collar] = at[9] + across * long[Length.HALF_SHOULDERS] * 0.4 - chest[..., 1] * long[Length.SPINE] * 0.15
        at[shoulder] = at[12] + across * long[Length.HALF_SHOULDERS] + chest[..., 1] * long[Length.SPINE] * 0.1
        raised, reach, bend, upward = (angle[f"{side}_{name}"] for name in ("raise", "reach", "elbow", "upward"))
        upper = _limb(chest, sign, raised, reach)
        lower = _bent(chest, sign, upper, bend, upward)
        at[elbow] = at[shoulder] + upper * long[Length.UPPER_ARM]
        at[wrist] = at[elbow] + lower * long[Length.FOREARM]
        at[hand] = at[wrist] + lower * long[Length.HAND]
    return at


def _limb(frame: Tensor, sign: float, sideways: Tensor, forwards: Tensor) -> Tensor:
    """Direction [B, T, 3] of a limb that hangs down, swung outwards and then forwards."""
    local = [sign * sideways.sin(), sideways.cos() * forwards.cos(), -sideways.cos() * forwards.sin()]
    return (frame @ torch.stack(local, -1)[..., None])[..., 0]


def _bent(frame: Tensor, sign: float, upper: Tensor, bend: Tensor, upward: Tensor) -> Tensor:
    """Direction of a forearm: the upper arm's, bent by an angle towards the front, or upwards, and a little inwards."""
    towards = torch.stack([torch.full_like(upward, -0.35 * sign), -upward.sin(), -upward.cos()], -1)
    towards = (frame @ towards[..., None])[..., 0]
    towards = towards - (towards * upper).sum(-1, keepdim=True) * upper
    towards = torch.nn.functional.normalize(towards, dim=-1)
    return upper * bend.cos()[..., None] + towards * bend.sin()[..., None]


def _applied(frame: Tensor, direction: tuple[float, float, float]) -> Tensor:
    return frame @ torch.tensor(direction, device=frame.device)


def _rotation(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(list(row), -1) for row in rows], -2)


def _turned_about_x(angle: Tensor) -> Tensor:
    """Bowing forwards: what is above goes towards the front, -z."""
    one, zero, c, s = torch.ones_like(angle), torch.zeros_like(angle), angle.cos(), angle.sin()
    return _rotation([[one, zero, zero], [zero, c, -s], [zero, s, c]])


def _turned_about_y(angle: Tensor) -> Tensor:
    """Turning: the front, -z, goes towards +x."""
    one, zero, c, s = torch.ones_like(angle), torch.zeros_like(angle), angle.cos(), angle.sin()
    return _rotation([[c, zero, -s], [zero, one, zero], [s, zero, c]])


def _turned_about_z(angle: Tensor) -> Tensor:
    """Leaning: what is above goes towards +x."""
    one, zero, c, s = torch.ones_like(angle), torch.zeros_like(angle), angle.cos(), angle.sin()
    return _rotation([[c, -s, zero], [s, c, zero], [zero, zero, one]])
