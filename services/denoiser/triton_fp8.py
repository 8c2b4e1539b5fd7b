"""What 8-bit attention needs besides its products, in Triton: values centred and as e4m3, and the mean given back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.denoiser.fp8_attention import FP8, HIGHEST, Fp8Tokens

_COLUMNS, _ROWS = 128, 64  # of a tile
_PARTS = 32  # of the tokens, for the sums over them
_ELEMENTS = 4096
_HIGHEST = tl.constexpr(HIGHEST)
_SMALLEST = 1e-12


def centred(values: Tensor) -> Fp8Tokens:
    """As `Fp8Attention.centred`, on a GPU."""
    flat = values.contiguous().flatten(2).flatten(0, 1)
    tokens, width = flat.shape
    parts = torch.empty(3, _PARTS, width, device=flat.device, dtype=torch.float32)
    blocks = triton.cdiv(width, _COLUMNS)
    _column_kernel[(blocks, _PARTS)](
        flat, parts, tokens, width, triton.cdiv(tokens, _PARTS), parts.stride(0), COLUMNS=_COLUMNS, ROWS=_ROWS
    )
    mean = parts[0].sum(0) / tokens
    furthest = torch.maximum(parts[1].amax(0) - mean, mean - parts[2].amin(0))
    scale = furthest.amax().clamp_min(_SMALLEST).reshape(1) / HIGHEST
    data = torch.empty_like(flat, dtype=FP8)
    _centre_kernel[_elements(flat)](flat, mean, scale, data, flat.numel(), width, SIZE=_ELEMENTS, num_warps=8)
    return Fp8Tokens(data.view(values.shape), scale, mean.view(values.shape[2:]))


def restored(gathered: Fp8Tokens, dtype: torch.dtype) -> Tensor:
    """As `Fp8Attention.restored`, on a GPU."""
    data, mean = gathered.data.contiguous(), gathered.mean.contiguous()
    output = torch.empty_like(data, dtype=dtype)
    _restore_kernel[_elements(output)](
        data, mean, gathered.scale, output, output.numel(), mean.numel(), SIZE=_ELEMENTS, num_warps=8
    )
    return output


def as_fp8(values: Tensor) -> Tensor:
    """As `fp8_attention.as_fp8`, on a GPU."""
    if values.dtype == FP8:
        return values
    flat = values.contiguous()
    output = torch.empty_like(flat, dtype=FP8)
    _convert_kernel[_elements(flat)](flat, output, flat.numel(), SIZE=_ELEMENTS, num_warps=8)
    return output


def _elements(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), _ELEMENTS),)


@triton.jit
def _column_kernel(
    x, parts, tokens, width, tokens_of_a_part, part_stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Sum, highest and lowest of each column of x [tokens, width] over a part of the tokens: parts [3, parts, width]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    begin = tl.program_id(1) * tokens_of_a_part
    end = min(begin + tokens_of_a_part, tokens)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    highest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    lowest = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & inside[None, :]
        place = tl.cast(row, tl.int64)[:, None] * width + column[None, :]
        values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        total += values
        highest = tl.maximum(highest, tl.where(mask, values, float("-inf")))
        lowest = tl.minimum(lowest, tl.where(mask, values, float("inf")))
    mine = parts + tl.program_id(1) * width + column
    tl.store(mine, tl.sum(total, axis=0), mask=inside)
    tl.store(mine + part_stride, tl.max(highest, axis=0), mask=inside)
    tl.store(mine + 2 * part_stride, tl.min(lowest, axis=0), mask=inside)


@triton.jit
def _centre_kernel(x, mean, scale, output, count, width, SIZE: tl.constexpr):
    place = tl.cast(tl.program_id(0), tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + place % width)
    tl.store(output + place, e4m3(values / tl.load(scale)), mask=inside)


@triton.jit
def _restore_kernel(x, mean, scale, output, count, width, SIZE: tl.constexpr):
    place = tl.cast(tl.program_id(0), tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    tl.store(output + place, (values + tl.load(mean + place % width)).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _convert_kernel(x, output, count, SIZE: tl.constexpr):
    place = tl.cast(tl.program_id(0), tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    tl.store(output + place, e4m3(tl.load(x + place, mask=inside, other=0.0).to(tl.float32)), mask=inside)


@triton.jit
def e4m3(values):
    return tl.minimum(tl.maximum(values, -_HIGHEST), _HIGHEST).to(tl.float8e4nv)
