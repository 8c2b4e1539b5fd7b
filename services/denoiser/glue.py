"""What lies between the matrix products of a block: norms, modulation, rotary positions, gates.

Memory traffic, not arithmetic: written out in PyTorch it costs a third of a forward pass at 48,832 tokens. So it is
interchangeable, as attention is: `PLAIN` runs everywhere and is exact, `triton_glue` does each line in one pass.
"""

from __future__ import annotations

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


class Glue(Protocol):
    """Tokens are the residual stream, [B, L, D] float32."""

    @property
    def name(self) -> str: ...

    def modulate(self, tokens: Tensor, eps: float, shift: Tensor, scale: Tensor, row: Tensor, to: Consumer) -> Prepared:
        """layer_norm(tokens) * (1 + scale) + shift, prepared for `to`.

        shift, scale: [n, D] float32; row: [B or 1, L or 1] int64, which of the n a token takes.
        """
        ...

    def normalise(self, tokens: Tensor, eps: float, weight: Tensor, bias: Tensor, to: Consumer) -> Prepared:
        """layer_norm(tokens) * weight + bias, prepared for `to`."""
        ...

    def turn(self, projected: Tensor, eps: float, weight: Tensor, num_heads: int, rope: Rope | None) -> Tensor:
        """RMS norm over all heads at once, then rotary positions: [B, L, D] -> [B, L, H, d] of the same dtype."""
        ...

    def add(self, tokens: Tensor, update: Tensor, gate: Tensor | None, row: Tensor) -> Tensor:
        """tokens + gate * update; gate [n, D] float32, None: 1. May write into `tokens`."""
        ...


class PlainGlue:
    """Each step an operation of PyTorch, in float32."""

    name = "plain"

    def modulate(self, tokens: Tensor, eps: float, shift: Tensor, scale: Tensor, row: Tensor, to: Consumer) -> Prepared:
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
        return to.prepare(modulated(normed, shift[row], scale[row]))

    def normalise(self, tokens: Tensor, eps: float, weight: Tensor, bias: Tensor, to: Consumer) -> Prepared:
        return to.prepare(F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps))

    def turn(self, projected: Tensor, eps: float, weight: Tensor, num_heads: int, rope: Rope | None) -> Tensor:
        heads = torch.unflatten(F.rms_norm(projected.float(), weight.shape, weight, eps), -1, (num_heads, -1))
        return (heads if rope is None else rotate(heads, rope)).to(projected.dtype)

    def add(self, tokens: Tensor, update: Tensor, gate: Tensor | None, row: Tensor) -> Tensor:
        if gate is None:
            return tokens + update
        return torch.addcmul(tokens, gate[row], update)


PLAIN: Glue = PlainGlue()


def modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed * (1 + scale) + shift, in one pass."""
    return torch.addcmul(shift, normed, 1 + scale)
