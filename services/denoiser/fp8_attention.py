"""Attention in 8-bit floats (e4m3): queries, keys, weights, values and what is gathered.

Queries and keys are RMS-normed, so the range of e4m3 holds them as they are. Values are scaled by one number, and lose
their mean over the tokens first: tensor cores add up products of 8-bit floats in about 14 bits, and what tens of
thousands of keys have in common would come out up to a quarter too small. The weights of a query sum to one, so giving
the mean back afterwards is exact.

This file is the definition and runs everywhere; `cudnn_attention` computes it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
HIGHEST = 448.0
WEIGHT_SCALE = 256.0  # of the weights of a query, the largest of which is 1; a power of two, so that scaling is exact
_SMALLEST = 1e-12  # scale of values that are all alike
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Fp8Values:
    """Values less their mean, as e4m3 numbers times a scale."""

    data: Tensor  # e4m3 [B, K, H, d]
    scale: Tensor  # float32 [1]
    mean: Tensor  # float32 [H, d], over all tokens


class Fp8Attention:
    """The definition, in PyTorch's own operations."""

    name = "fp8"
    dtype: torch.dtype | None = FP8

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.over(keys, values)(queries)

    def over(self, keys: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
        keys, held, dtype = self.as_fp8(keys), self.centred(values), values.dtype

        def attend(queries: Tensor) -> Tensor:
            return self.restored(self.gathered(self.as_fp8(queries), keys, held.data), held, dtype)

        return attend

    def as_fp8(self, values: Tensor) -> Tensor:
        return as_fp8(values)

    def centred(self, values: Tensor) -> Fp8Values:
        """values [B, K, H, d] of any float dtype."""
        exact = values.float()
        mean = exact.mean((0, 1))
        centred = exact - mean
        scale = centred.abs().amax().clamp_min(_SMALLEST).reshape(1) / HIGHEST
        return Fp8Values(as_fp8(centred / scale), scale, mean)

    def gathered(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All e4m3, queries [B, L, H, d], keys and values [B, K, H, d] -> e4m3 [B, L, H, d]."""
        keys, values = keys.float().permute(0, 2, 3, 1), values.float().transpose(1, 2)  # [B, H, d, K], [B, H, K, d]
        pieces = torch.split(queries.float().transpose(1, 2), _QUERIES_AT_ONCE, dim=2)
        gathered = torch.cat([_weighted(piece @ keys * queries.shape[-1] ** -0.5, values) for piece in pieces], 2)
        return as_fp8(gathered.transpose(1, 2))

    def restored(self, gathered: Tensor, held: Fp8Values, dtype: torch.dtype) -> Tensor:
        """What was gathered of `held`, e4m3 [B, L, H, d], with the scale and the mean: of `dtype`."""
        return (gathered.float() * held.scale + held.mean).to(dtype)


def as_fp8(values: Tensor) -> Tensor:
    """The nearest e4m3 numbers; what is beyond the highest becomes the highest."""
    if values.dtype == FP8:
        return values
    return values.float().clamp(-HIGHEST, HIGHEST).to(FP8)


def _weighted(scores: Tensor, values: Tensor) -> Tensor:
    """scores [B, H, l, K], values [B, H, K, d] -> [B, H, l, d]: weights are e4m3 in the products, exact in their sum."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return as_fp8(weights * WEIGHT_SCALE).float() @ values / (weights.sum(-1, keepdim=True) * WEIGHT_SCALE)
