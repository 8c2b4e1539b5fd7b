"""Characters: how long and thick their parts are, and what colour each has.

A character is dressed (skin, hair, shirt, trousers, shoes) or motley: every part has a colour of its own, so that a
part's place can be read from a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from training.figures.batched import Batched


class Length(IntEnum):
    """Columns of Characters.lengths, millimetres; halves are from the middle of the body to one side."""

    HEIGHT = 0
    SHIN = 1
    THIGH = 2
    HALF_HIPS = 3
    SPINE = 4
    NECK = 5
    HALF_SHOULDERS = 6
    UPPER_ARM = 7
    FOREARM = 8
    HAND = 9
    FOOT = 10
    HEAD = 11


class Radius(IntEnum):
    """Columns of Characters.radii, millimetres."""

    HIPS = 0
    WAIST = 1
    CHEST = 2
    NECK = 3
    HEAD = 4
    SHOULDER = 5
    ELBOW = 6
    WRIST = 7
    HAND = 8
    HIP = 9
    KNEE = 10
    ANKLE = 11
    FOOT = 12


class Part(IntEnum):
    """Rows of Characters.colours. The first 15 are read from pictures, see reading.py."""

    HEAD = 0
    CHEST = 1
    HIPS = 2
    LEFT_UPPER_ARM = 3
    RIGHT_UPPER_ARM = 4
    LEFT_FOREARM = 5
    RIGHT_FOREARM = 6
    LEFT_HAND = 7
    RIGHT_HAND = 8
    LEFT_THIGH = 9
    RIGHT_THIGH = 10
    LEFT_SHIN = 11
    RIGHT_SHIN = 12
    LEFT_FOOT = 13
    RIGHT_FOOT = 14
    HAIR = 15


NUM_READ = 15

# of the height: least and most
_LENGTHS = {
    Length.SHIN: (0.195, 0.225),
    Length.THIGH: (0.195, 0.225),
    Length.HALF_HIPS: (0.052, 0.066),
    Length.SPINE: (0.25, 0.28),
    Length.NECK: (0.045, 0.055),
    Length.HALF_SHOULDERS: (0.1, 0.13),
    Length.UPPER_ARM: (0.145, 0.17),
    Length.FOREARM: (0.13, 0.155),
    Length.HAND: (0.04, 0.05),
    Length.FOOT: (0.085, 0.1),
    Length.HEAD: (0.07, 0.085),
}
_RADII = {
    Radius.HIPS: (0.062, 0.075),
    Radius.WAIST: (0.07, 0.095),
    Radius.CHEST: (0.06, 0.075),
    Radius.NECK: (0.03, 0.036),
    Radius.HEAD: (0.1, 0.12),
    Radius.SHOULDER: (0.05, 0.06),
    Radius.ELBOW: (0.043, 0.052),
    Radius.WRIST: (0.038, 0.046),
    Radius.HAND: (0.05, 0.06),
    Radius.HIP: (0.066, 0.078),
    Radius.KNEE: (0.054, 0.064),
    Radius.ANKLE: (0.044, 0.052),
    Radius.FOOT: (0.042, 0.05),
}
_HEIGHT_MM = (1400.0, 1800.0)

CLOTHES = {
    "red": (0.84, 0.18, 0.18),
    "orange": (0.95, 0.55, 0.12),
    "yellow": (0.96, 0.84, 0.22),
    "green": (0.20, 0.60, 0.26),
    "turquoise": (0.14, 0.68, 0.66),
    "blue": (0.16, 0.34, 0.82),
    "purple": (0.52, 0.22, 0.68),
    "pink": (0.95, 0.50, 0.68),
    "white": (0.95, 0.95, 0.93),
    "black": (0.14, 0.14, 0.17),
}
_SKIN = ((0.98, 0.84, 0.74), (0.94, 0.74, 0.58), (0.80, 0.58, 0.42), (0.60, 0.40, 0.27), (0.40, 0.26, 0.18))
_HAIR = ((0.12, 0.09, 0.08), (0.36, 0.21, 0.12), (0.88, 0.70, 0.34), (0.74, 0.34, 0.14), (0.66, 0.66, 0.68))
# far from each other, and from the pale scenes
_MOTLEY = (
    (0.90, 0.10, 0.12),
    (1.00, 0.55, 0.05),
    (1.00, 0.92, 0.10),
    (0.55, 0.90, 0.10),
    (0.05, 0.60, 0.15),
    (0.05, 0.85, 0.75),
    (0.05, 0.45, 1.00),
    (0.10, 0.10, 0.75),
    (0.55, 0.15, 0.90),
    (0.95, 0.15, 0.90),
    (1.00, 0.62, 0.72),
    (0.48, 0.05, 0.22),
    (0.50, 0.32, 0.10),
    (0.05, 0.25, 0.25),
    (1.00, 1.00, 1.00),
)
_SPLIT = 5
"""Of all pairs of shirt and trousers, one in so many is held out."""


@dataclass(frozen=True)
class Characters(Batched):
    """B characters.

    Attributes:
        lengths: float32 [B, len(Length)], millimetres.
        radii: float32 [B, len(Radius)], millimetres.
        colours: float32 [B, len(Part), 3], 0 to 1.
        shirt, trousers: int64 [B], their places in CLOTHES, or among the colours of motley characters.
        motley: bool [B].
    """

    lengths: Tensor
    radii: Tensor
    colours: Tensor
    shirt: Tensor
    trousers: Tensor
    motley: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def with_bodies_of(self, others: Characters, chosen: Tensor) -> Characters:
        """The same clothes, on the others' bodies where chosen, bool [B]."""
        lengths = torch.where(chosen[:, None], others.lengths, self.lengths)
        return replace(self, lengths=lengths, radii=torch.where(chosen[:, None], others.radii, self.radii))


def sample_characters(count: int, generator: torch.Generator, *, held_out: bool, motley: float) -> Characters:
    """Draws characters.

    Args:
        generator: of the CPU.
        held_out: whose pairs of shirt and trousers are used.
        motley: how many of them, 0 to 1, are motley.
    """
    low, high = _HEIGHT_MM
    height = torch.rand(count, 1, generator=generator) * (high - low) + low
    lengths = torch.cat([height, height * _between(count, list(_LENGTHS.values()), generator)], 1)
    radii = height * _between(count, list(_RADII.values()), generator)
    is_motley = torch.rand(count, generator=generator) < motley
    dressed, *clothes = _dressed(count, generator, held_out)
    coloured, *patches = _motley(count, generator, held_out)
    colours = torch.where(is_motley[:, None, None], coloured, dressed)
    shirt, trousers = (torch.where(is_motley, patch, cloth) for patch, cloth in zip(patches, clothes, strict=True))
    return Characters(lengths, radii, colours, shirt, trousers, is_motley)


def _between(count: int, bounds: Sequence[tuple[float, float]], generator: torch.Generator) -> Tensor:
    """Uniform within bounds, [count, len(bounds)]."""
    low, high = torch.tensor(bounds).T
    drawn: Tensor = low + (high - low) * torch.rand(count, len(bounds), generator=generator)
    return drawn


def _pairs(count: int, colours: int, generator: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor]:
    """Two different colours of so many, as the split allows; held out are pairs whose numbers add up to a multiple of 5."""
    pairs = [
        (shirt, trousers)
        for shirt in range(colours)
        for trousers in range(colours)
        if shirt != trousers and ((shirt + trousers) % _SPLIT == 0) == held_out
    ]
    chosen = torch.tensor(pairs)[torch.randint(len(pairs), (count,), generator=generator)]
    return chosen[:, 0], chosen[:, 1]


def _choose(palette: Sequence[tuple[float, float, float]], count: int, generator: torch.Generator) -> Tensor:
    chosen: Tensor = torch.tensor(palette)[torch.randint(len(palette), (count,), generator=generator)]
    return chosen


def _dressed(count: int, generator: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [count, len(Part), 3], and the numbers of shirts and trousers."""
    clothes = torch.tensor(list(CLOTHES.values()))
    shirt, trousers = _pairs(count, len(CLOTHES), generator, held_out)
    skin, hair = _choose(_SKIN, count, generator), _choose(_HAIR, count, generator)
    shoes = clothes[torch.randint(len(CLOTHES), (count,), generator=generator)]
    long_sleeves, long_legs = (torch.rand(count, 1, generator=generator) < share for share in (0.5, 0.7))
    sleeves = torch.where(long_sleeves, clothes[shirt], skin)
    legs = torch.where(long_legs, clothes[trousers], skin)
    arm, leg = [clothes[shirt]] * 2 + [sleeves] * 2 + [skin] * 2, [clothes[trousers]] * 2 + [legs] * 2 + [shoes] * 2
    colours = torch.stack([skin, clothes[shirt], clothes[trousers], *arm, *leg, hair], 1)
    shade = 1 + 0.12 * (torch.rand(count, 1, 3, generator=generator) - 0.5)
    return (colours * shade).clamp(0, 1), shirt, trousers


def _motley(count: int, generator: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [count, len(Part), 3], and the numbers of those of chest and hips."""
    palette = torch.tensor(_MOTLEY)
    shirt, trousers = _pairs(count, len(palette), generator, held_out)
    order = torch.rand(count, len(palette), generator=generator)
    # these two first: their colours are given
    order.scatter_(1, shirt[:, None], -2.0).scatter_(1, trousers[:, None], -1.0)
    order = order.argsort(1)
    order = torch.cat([order[:, 2:3], order[:, :2], order[:, 3:]], 1)
    grey = torch.tensor(_HAIR[-1]).expand(count, 1, 3)  # no part's colour
    return torch.cat([palette[order], grey], 1), shirt, trousers
