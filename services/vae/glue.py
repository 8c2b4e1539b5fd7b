"""What lies between the convolutions of a VAE: sums, norms, activations, on frames [n, h, w, C].

Memory traffic, not arithmetic. A convolution's output is a `Sum` that nobody has added up yet, so that its parts, its
bias, a shortcut and a norm take one pass over memory together. Interchangeable: `PLAIN` runs everywhere, `triton_glue`
does each line in one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_LENGTH = 1e-12  # of a channel vector; a shorter one is divided by this


@dataclass(frozen=True)
class Sum:
    """Frames that are still to be added up: all `terms` [n, h, w, C] and the bias [C] at every position."""

    terms: tuple[Tensor, ...]
    bias: Tensor | None = None

    def plus(self, term: Tensor) -> Sum:
        return Sum((*self.terms, term), self.bias)


class Glue(Protocol):
    @property
    def takes_bias(self) -> bool:
        """Whether a convolution's bias costs less here than in the convolution."""
        ...

    def normed(self, x: Sum, gamma: Tensor, out: Tensor, *, silu: bool) -> None:
        """RMSNorm over the channels, times gamma [C], then SiLU if asked for; into `out` [n, h, w, C]."""
        ...

    def total(self, x: Sum) -> Tensor:
        """The sum; may be written into the first term."""
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
        first, *others = x.terms
        if x.bias is not None:
            first.add_(x.bias)
        for term in others:
            first.add_(term)
        return first


PLAIN: Glue = PlainGlue()
