"""Attention in 8-bit floats (e4m3): queries, keys, weights, values and what is gathered.

Queries and keys are RMS-normed, so the range of e4m3 holds them as they are. Values are scaled by one number, and lose
their mean over the tokens first: tensor cores add up products of 8-bit floats in about 14 bits, and what tens of
thousands of keys have in common would come out up to a quarter too small. The weights of a query sum to one, so giving
the mean back afterwards is exact.

This file is the definition and runs everywhere; `cudnn_attention` computes it on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
HIGHEST = 448.0
WEIGHT_SCALE = 256.0  # of the weights of a query, the largest of which is 1; a power of two, so that scaling is exact
_SMALLEST = 1e-12  # scale of values that are all alike
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Fp8Tokens:
    """Values, or what was gathered of them, as e4m3 numbers times a scale, plus the mean that all values have."""

    data: Tensor  # e4m3 [B, L, H, d] or [B, L, D]
    scale: Tensor  # float32 [1]
    mean: Tensor  # float32 [H, d] or [D]

    def tokens(self, piece: slice) -> Fp8Tokens:
        """The same of some of the tokens."""
        return replace(self, data=self.data[:, piece])

    def float(self) -> Tensor:
        """What they stand for, in float32."""
        return self.data.float() * self.scale + self.mean


class Fp8Attention:
    """The definition, in PyTorch's own operations."""

    name = "fp8"
    dtype: torch.dtype | None = FP8

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attending = self.over(keys, values)
        return self.restored(replace(attending.values, data=attending.gather(queries)), values.dtype)

    def over(self, keys: Tensor, values: Tensor) -> Fp8Attending:
        return Fp8Attending(self, self.as_fp8(keys), self.centred(values))

    def as_fp8(self, values: Tensor) -> Tensor:
        return as_fp8(values)

    def centred(self, values: Tensor) -> Fp8Tokens:
        """values [B, K, H, d] of any float dtype."""
        exact = values.float()
        mean = exact.mean((0, 1))
        centred = exact - mean
        scale = centred.abs().amax().clamp_min(_SMALLEST).reshape(1) / HIGHEST
        return Fp8Tokens(as_fp8(centred / scale), scale, mean)

    def gathered(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All e4m3, queries [B, L, H, d], keys and values [B, K, H, d] -> e4m3 [B, L, H, d]."""
        keys, values = keys.float().permute(0, 2, 3, 1), values.float().transpose(1, 2)  # [B, H, d, K], [B, H, K, d]
        pieces = torch.split(queries.float().transpose(1, 2), _QUERIES_AT_ONCE, dim=2)
        gathered = torch.cat([_weighted(piece @ keys * queries.shape[-1] ** -0.5, values) for piece in pieces], 2)
        return as_fp8(gathered.transpose(1, 2))

    def restored(self, gathered: Fp8Tokens, dtype: torch.dtype) -> Tensor:
        """What was gathered [B, L, H, d], with the scale and the mean: of `dtype`."""
        return gathered.float().to(dtype)


@dataclass(frozen=True)
class Fp8Attending:
    """To given keys and values; scale and mean are left to who takes what was gathered, for all pieces at once."""

    attention: Fp8Attention
    keys: Tensor  # e4m3 [B, K, H, d]
    values: Fp8Tokens

    def gather(self, queries: Tensor) -> Tensor:
        return self.attention.gathered(self.attention.as_fp8(queries), self.keys, self.values.data)

    def finish(self, gathered: Tensor) -> Fp8Tokens:
        return Fp8Tokens(gathered.flatten(2), self.values.scale, self.values.mean.flatten())


def as_fp8(values: Tensor) -> Tensor:
    """The nearest e4m3 numbers; what is beyond the highest becomes the highest."""
    if values.dtype == FP8:
        return values
    return values.float().clamp(-HIGHEST, HIGHEST).to(FP8)


def _weighted(scores: Tensor, values: Tensor) -> Tensor:
    """scores [B, H, l, K], values [B, H, K, d] -> [B, H, l, d]: weights are e4m3 in the products, exact in their sum."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return as_fp8(weights * WEIGHT_SCALE).float() @ values / (weights.sum(-1, keepdim=True) * WEIGHT_SCALE)
