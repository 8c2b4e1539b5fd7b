"""Which part of a frame is computed at a time when memory is short, so that the result is the same.

Where frames are large the layers of a VAE are convolutions, which see a few positions around the one they compute. A
tile is therefore computed with so many more positions on every side that has some, and these are cut off again: no
seam can be seen because there is none. The layers at a low resolution, among them the attention, which sees a whole
frame, are computed for whole frames; they need little memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from services.vae.model import (
    CausalConv3d,
    Chain,
    Decoder,
    Downsample,
    DownStage,
    Encoder,
    ResidualBlock,
    Upsample,
    UpStage,
)

_CHANGES_IN_ENCODER_TILES = 2  # of size: its stages at whole and half height and width
_CHANGES_IN_DECODER_TILES = 1  # the same stages, of which the first is entered at half height


@dataclass(frozen=True)
class Window:
    """One axis of a tile, in positions of the frame."""

    start: int  # of what the tile is for
    stop: int
    first: int  # of what is computed for it
    last: int  # exclusive

    def computed(self, scale: int) -> slice:
        """What is computed, in a frame that is `scale` times as large."""
        return slice(self.first * scale, self.last * scale)

    def kept(self, scale: int) -> slice:
        """What the tile is for, within what is computed."""
        return slice((self.start - self.first) * scale, (self.stop - self.first) * scale)

    def place(self, scale: int) -> slice:
        """What the tile is for, in a frame that is `scale` times as large."""
        return slice(self.start * scale, self.stop * scale)


@dataclass(frozen=True)
class Cut:
    """Where the layers of a half that see whole frames end, and those that see tiles begin; or the other way round.

    Attributes:
        tiled: layers that see tiles; the encoder's first ones, the decoder's last ones.
        whole: the others.
        reach: positions at the cut that a tile needs around it.
        scale: side of the square of positions, at the tiles' outer end, that a position at the cut stands for.
        frames: at the tiles' outer end that one at the cut stands for. The encoder's tiles take multiples of it.
    """

    tiled: tuple[nn.Module, ...]
    whole: tuple[nn.Module, ...]
    reach: int
    scale: int
    frames: int

    def windows(self, size: int, count: int) -> list[Window]:
        """Cuts `size` positions at the cut into `count` windows of about the same size."""
        edges = [round(i * size / count) for i in range(count + 1)]
        return [
            Window(start, stop, max(0, start - self.reach), min(size, stop + self.reach))
            for start, stop in pairwise(edges)
        ]


def cut_of(half: Encoder | Decoder) -> Cut:
    steps = steps_of(half)
    changes = [i for i, layer in enumerate(steps) if _changes(layer)]
    if isinstance(half, Encoder):
        end = changes[min(_CHANGES_IN_ENCODER_TILES, len(changes)) - 1] + 1
        tiled, whole = steps[:end], steps[end:]
        scale = 2 ** sum(_changes(layer) for layer in tiled)
        return Cut(tuple(tiled), tuple(whole), -(-reach_of(tiled) // scale), scale, _rate_of(tiled))
    start = changes[max(-1 - _CHANGES_IN_DECODER_TILES, -len(changes))] + 1
    whole, tiled = steps[:start], steps[start:]
    scale = 2 ** sum(_changes(layer) for layer in tiled)
    return Cut(tuple(tiled), tuple(whole), reach_of(tiled), scale, _rate_of(tiled))


def steps_of(half: Encoder | Decoder) -> list[nn.Module]:
    """The layers of a half in their order."""
    if isinstance(half, Encoder):
        return [half.conv1, *half.downsamples, *half.middle, half.head]
    return [half.conv1, *half.middle, *half.upsamples, half.head]


def reach_of(layers: Iterable[nn.Module], reach: int = 0) -> int:
    """Positions of the input around a square that its output depends on, plus `reach` more of the output."""
    for layer in reversed(list(layers)):
        match layer:
            case CausalConv3d():
                reach += max(layer.borders)
            case ResidualBlock():
                reach += reach_of(layer.residual)
            case Downsample():
                reach = 2 * reach + 1
            case Upsample():
                reach = (reach + 2) // 2  # one position of the larger frame, rounded up
            case DownStage():
                reach = reach_of(layer.downsamples, reach)
            case UpStage():
                reach = reach_of(layer.upsamples, reach)
            case Chain():
                reach = reach_of(layer, reach)
            case nn.Module() if next(layer.children(), None) is not None:
                raise AssertionError(f"{type(layer).__name__} sees more than squares")
    return reach


def _changes(layer: nn.Module) -> bool:
    """Whether height and width change in a layer."""
    return any(isinstance(part, Downsample | Upsample) for part in layer.modules())


def _rate_of(layers: Iterable[nn.Module]) -> int:
    """Frames before or after the layers that one on the other side stands for."""
    parts = [part for layer in layers for part in layer.modules()]
    return int(2 ** sum(isinstance(part, Downsample | Upsample) and part.time_conv is not None for part in parts))
