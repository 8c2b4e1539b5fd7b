"""What lies between the matrix products of a block: norms, modulation, rotary positions, gates.

Memory traffic, not arithmetic: written out in PyTorch it costs a quarter of a forward pass at 48,832 tokens. So it is
interchangeable, as attention is: `PLAIN` runs everywhere, `triton_glue` does each line of a block in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from services.denoiser.rope import Rope, rotate

if TYPE_CHECKING:
    from services.denoiser.int8 import Int8Tokens

Prepared: TypeAlias = "Tensor | Int8Tokens"  # tokens as the linears that follow take them


class Consumer(Protocol):
    """A linear layer, as the maker of its input sees it."""

    @property
    def compute_dtype(self) -> torch.dtype: ...

    def prepare(self, inputs: Tensor) -> Prepared:
        """Inputs [..., in] of any float dtype -> what the layer computes with; done once for layers that share them."""
        ...


@dataclass(frozen=True)
class Affine:
    """What follows a layer norm: * (plus + factor) + addend, with a row of factor and addend for each token."""

    eps: float  # of the norm
    factor: Tensor  # [n, D] float32
    addend: Tensor  # [n, D] float32
    row: Tensor  # [B or 1, L or 1] int64, below n
    plus: float


@dataclass(frozen=True)
class Update:
    """What a part of a block adds to the residual stream: gate * values."""

    values: Tensor  # [B, L, D] of any float dtype
    gate: Tensor | None  # [n, D] float32; None: 1
    row: Tensor  # [B or 1, L or 1] int64, below n


class Glue(Protocol):
    """Tokens are the residual stream, [B, L, D] float32."""

    @property
    def name(self) -> str: ...

    def normed(self, tokens: Tensor, update: Update | None, affine: Affine, to: Consumer) -> tuple[Tensor, Prepared]:
        """The tokens after the update, if there is one, and their layer norm with its affine map, prepared for `to`.

        May write into `tokens`.
        """
        ...

    def add(self, tokens: Tensor, update: Update) -> Tensor:
        """The tokens after the update. May write into `tokens`."""
        ...

    def turn(self, projected: Tensor, eps: float, weight: Tensor, num_heads: int, rope: Rope | None) -> Tensor:
        """RMS norm over all heads at once, then rotary positions: [B, L, D] -> [B, L, H, d] of the same dtype."""
        ...


class PlainGlue:
    """Each step an operation of PyTorch, in float32."""

    name = "plain"

    def normed(self, tokens: Tensor, update: Update | None, affine: Affine, to: Consumer) -> tuple[Tensor, Prepared]:
        if update is not None:
            tokens = self.add(tokens, update)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=affine.eps)
        factor, addend = affine.factor[affine.row], affine.addend[affine.row]
        return tokens, to.prepare(torch.addcmul(addend, normed, affine.plus + factor))

    def add(self, tokens: Tensor, update: Update) -> Tensor:
        if update.gate is None:
            return tokens + update.values
        return torch.addcmul(tokens, update.gate[update.row], update.values)

    def turn(self, projected: Tensor, eps: float, weight: Tensor, num_heads: int, rope: Rope | None) -> Tensor:
        heads = torch.unflatten(F.rms_norm(projected.float(), weight.shape, weight, eps), -1, (num_heads, -1))
        return (heads if rope is None else rotate(heads, rope)).to(projected.dtype)


PLAIN: Glue = PlainGlue()
