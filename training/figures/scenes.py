"""What is around a character: a pale sky and floor, a few discs; and what only a caption asks for.

The effects are in neither the reference picture nor the pose: snow that falls, night light with a moon, a hat put on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.figures.batched import Batched

HATS = {"red": (0.88, 0.12, 0.16), "yellow": (1.0, 0.85, 0.1), "blue": (0.12, 0.3, 0.9)}
NUM_DISCS = 3
_EFFECT_SHARE = 0.3
"""How often each effect is asked for."""


@dataclass(frozen=True)
class Scenes(Batched):
    """B scenes; colours 0 to 1, places and sizes in sides of the picture.

    Attributes:
        sky: [B, 2, 3], above and at the horizon.
        floor: [B, 3].
        horizon: [B].
        discs: [B, NUM_DISCS, 3]: x, y, radius; a radius of 0 is none.
        disc_colours: [B, NUM_DISCS, 3].
        snow, night: bool [B].
        hat: int64 [B], 0 for none, else one more than the place in HATS.
    """

    sky: Tensor
    floor: Tensor
    horizon: Tensor
    discs: Tensor
    disc_colours: Tensor
    snow: Tensor
    night: Tensor
    hat: Tensor

    def __len__(self) -> int:
        return len(self.sky)

    def plain(self) -> Scenes:
        """The same without effects."""
        none = torch.zeros_like(self.snow)
        return replace(self, snow=none, night=none, hat=torch.zeros_like(self.hat))


def sample_scenes(count: int, generator: torch.Generator, *, effects: float = _EFFECT_SHARE) -> Scenes:
    """Draws scenes; each effect is there in that share of them."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    discs = torch.cat(
        [uniform(NUM_DISCS, 1), 0.1 + 0.55 * uniform(NUM_DISCS, 1), 0.05 + 0.07 * uniform(NUM_DISCS, 1)], -1
    )
    discs[..., 2] *= uniform(NUM_DISCS) < 0.4
    return Scenes(
        sky=_pale(uniform(2, 3), 0.34),
        floor=_pale(uniform(3), 0.42) * 0.8,
        horizon=0.72 + 0.12 * uniform(),
        discs=discs,
        disc_colours=_pale(uniform(NUM_DISCS, 3), 0.55),
        snow=uniform() < effects,
        night=uniform() < effects,
        hat=torch.where(uniform() < effects, 1 + (uniform() * len(HATS)).long(), 0),
    )


def _pale(random: Tensor, saturation: float) -> Tensor:
    """Colours between a hue at full strength and white, from uniform numbers [..., 3]: hue, strength, darkness."""
    hue = (random[..., :1] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    pure = ((hue - 3).abs() - 1).clamp(0, 1)
    mixed = 1 - saturation * (0.35 + 0.65 * random[..., 1:2]) * (1 - pure)
    return mixed * (1 - 0.18 * random[..., 2:3])
