"""What lies between the convolutions of a VAE: sums, norms, activations, on frames [n, h, w, C].

Memory traffic, not arithmetic. A convolution's output is a `Sum` that nobody has added up yet, so that its parts, its
bias, a shortcut and a norm take one pass over memory together. Interchangeable: `PLAIN` runs everywhere, `triton_glue`
does each line in one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_LENGTH = 1e-12  # of a channel vector; a shorter one is divided by this


@dataclass(frozen=True)
class Taps:
    """Frames of a convolution over three frames, apart: what each frame it saw adds to itself and to the next two.

    Attributes:
        now, next, after: [n, h, w, C], for the same frame, the next, and the one after that; channels side by side, and
            the same strides in all.
        carried: [2, h, w, C], what the frames before add to the first two. Who puts the frames together leaves here
            what they add to the two that follow.
        is_first: whether no frame came before, so that `carried` has no values yet.
    """

    now: Tensor
    next: Tensor
    after: Tensor
    carried: Tensor
    is_first: bool


@dataclass(frozen=True)
class Sum:
    """Frames that are still to be added up: `taps`, all `terms` [n, h, w, C] and the bias [C] at every position."""

    terms: tuple[Tensor, ...]
    bias: Tensor | None = None
    taps: Taps | None = None

    def plus(self, term: Tensor) -> Sum:
        return replace(self, terms=(*self.terms, term))

    @property
    def first(self) -> Tensor:
        """A part of it, of the shape, dtype and device of the whole."""
        return self.terms[0] if self.taps is None else self.taps.now


class Glue(Protocol):
    """A `Sum` is used up by either of the first two: its taps give another result the second time."""

    @property
    def takes_bias(self) -> bool:
        """Whether a convolution's bias costs less here than in the convolution."""
        ...

    def normed(self, x: Sum, gamma: Tensor, out: Tensor, *, silu: bool) -> None:
        """RMSNorm over the channels, times gamma [C], then SiLU if asked for; into `out` [n, h, w, C]."""
        ...

    def total(self, x: Sum) -> Tensor:
        """The sum; may be written into the first term, or the taps."""
        ...

    def doubled(self, phases: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Puts frames of twice the size together (see `convolution.Doubling`), and adds the bias [C].

        Args:
            phases: [n, h + 1, w + 1, 4 * C]; the four are the even and odd columns of even, then of odd rows.
            out: [n, 2h, 2w, C]
        """
        ...


class PlainGlue:
    """Operations of PyTorch."""

    takes_bias = False

    def normed(self, x: Sum, gamma: Tensor, out: Tensor, *, silu: bool) -> None:
        frames = self.total(x)
        wide = torch.promote_types(frames.dtype, torch.float32)  # squares overflow in float16
        length = torch.linalg.vector_norm(frames, dim=-1, keepdim=True, dtype=wide)
        torch.mul(frames, length.clamp_min_(SMALLEST_LENGTH).reciprocal_(), out=out)
        out.mul_(gamma * gamma.shape[0] ** 0.5)
        if silu:
            F.silu(out, inplace=True)

    def total(self, x: Sum) -> Tensor:
        first, *others = x.terms if x.taps is None else (_together(x.taps), *x.terms)
        if x.bias is not None:
            first.add_(x.bias)
        for term in others:
            first.add_(term)
        return first

    def doubled(self, phases: Tensor, bias: Tensor | None, out: Tensor) -> None:
        n, h, w, channels = (out.shape[0], out.shape[1] // 2, out.shape[2] // 2, out.shape[3])
        apart = out.view(n, h, 2, w, 2, channels)
        for phase, (row, column) in enumerate(product((0, 1), repeat=2)):
            place = slice(phase * channels, (phase + 1) * channels)
            apart[:, :, row, :, column] = phases[:, row : row + h, column : column + w, place]
        if bias is not None:
            out.add_(bias)


def _together(taps: Taps) -> Tensor:
    n = len(taps.now)
    frames = taps.now.new_zeros(n + 2, *taps.now.shape[1:])
    if not taps.is_first:
        frames[:2] = taps.carried
    for later, products in enumerate((taps.now, taps.next, taps.after)):
        frames[later : later + n] += products
    taps.carried.copy_(frames[n:])
    return frames[:n]


PLAIN: Glue = PlainGlue()
