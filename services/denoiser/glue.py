"""What lies between the matrix products of a block: norms, modulation, rotary positions, gates.

Memory traffic, not arithmetic: written out in PyTorch it costs a quarter of a forward pass at 48,832 tokens. So it is
interchangeable, as attention is: `PLAIN` runs everywhere, `triton_glue` does each line of a block in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from services.denoiser.attention import Attended
from services.denoiser.fp8_attention import FP8, as_fp8
from services.denoiser.rope import Rope, rotate

if TYPE_CHECKING:
    from services.denoiser.int8 import Int8Tokens

Prepared: TypeAlias = "Attended | Int8Tokens"  # tokens as the linears that follow take them


class Consumer(Protocol):
    """A linear layer, as those see it who make its input and take its output."""

    @property
    def compute_dtype(self) -> torch.dtype: ...

    def prepare(self, inputs: Attended, also: Tensor | None = None) -> Prepared:
        """Inputs [..., in] of any float dtype -> what the layer computes with; done once for layers that share them.

        also: of the same shape and dtype, to be added to the inputs.
        """
        ...

    def __call__(self, inputs: Any) -> Tensor:
        """Inputs, prepared or not -> [..., out] of `compute_dtype`."""
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
class Gate:
    """What weighs a part of a block where it is added to the residual stream."""

    factor: Tensor | None  # [n, D] float32; None: 1
    row: Tensor  # [B or 1, L or 1] int64, below n


@dataclass(frozen=True)
class HeadNorm:
    """What makes queries and keys of what was projected: RMS norm over all heads at once."""

    eps: float
    weight: Tensor  # [D] float32
    num_heads: int
    dtype: torch.dtype | None = None  # of the result; None: as it came


class Glue(Protocol):
    """Tokens are the residual stream, [B, L, D] float32."""

    @property
    def name(self) -> str: ...

    def normed(self, tokens: Tensor, affine: Affine, to: Consumer) -> Prepared:
        """Layer norm of the tokens with its affine map, prepared for `to`."""
        ...

    def add(self, tokens: Tensor, linear: Consumer, inputs: Prepared, gate: Gate) -> Tensor:
        """tokens + gate * linear(inputs). May write into `tokens`."""
        ...

    def turn(self, projected: Tensor, norm: HeadNorm, rope: Rope | None) -> Tensor:
        """The norm, then rotary positions if there are any: [B, L, D] -> [B, L, H, d]."""
        ...


class PlainGlue:
    """Each step an operation of PyTorch, in float32."""

    name = "plain"

    def normed(self, tokens: Tensor, affine: Affine, to: Consumer) -> Prepared:
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=affine.eps)
        factor, addend = affine.factor[affine.row], affine.addend[affine.row]
        return to.prepare(torch.addcmul(addend, normed, affine.plus + factor))

    def add(self, tokens: Tensor, linear: Consumer, inputs: Prepared, gate: Gate) -> Tensor:
        values = linear(inputs)
        return tokens + values if gate.factor is None else torch.addcmul(tokens, gate.factor[gate.row], values)

    def turn(self, projected: Tensor, norm: HeadNorm, rope: Rope | None) -> Tensor:
        normed = F.rms_norm(projected.float(), norm.weight.shape, norm.weight, norm.eps)
        heads = torch.unflatten(normed, -1, (norm.num_heads, -1))
        turned = heads if rope is None else rotate(heads, rope)
        return as_fp8(turned) if norm.dtype == FP8 else turned.to(norm.dtype or projected.dtype)


PLAIN: Glue = PlainGlue()
