"""The glue of `glue.py` in Triton: each line of a block in one pass over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.denoiser.fp8_attention import FP8
from services.denoiser.glue import PLAIN, Affine, Consumer, Gate, Glue, HeadNorm, Prepared
from services.denoiser.int8 import Int8Tokens, TurnedInt8Linear
from services.denoiser.rope import Rope
from services.denoiser.triton_fp8 import e4m3
from services.denoiser.triton_int8 import TritonArithmetic
from services.denoiser.triton_rows import (
    AT_ONCE_FLOAT,
    SMALLEST_GROUP,
    quantized,
    row_grid,
    row_shape,
    row_strides,
    row_warps,
    sign_tile,
    sylvester,
    turned,
)

# Four programs on each processor, so that some load while others reduce (benchmarks/kernels.py --tune)
NORM_WARPS, NORM_REGISTERS = 4, 128


class TritonGlue:
    """On tensors of a CUDA device; what a kernel does not fit goes to `glue.PLAIN`."""

    name = "triton"

    def normed(self, tokens: Tensor, affine: Affine, to: Consumer) -> Prepared:
        return _normed(tokens.contiguous(), affine, to) if _fits(to) else PLAIN.normed(tokens, affine, to)

    def turn(self, projected: Tensor, norm: HeadNorm, rope: Rope | None) -> Tensor:
        batch, length, dim = projected.shape
        width = dim // norm.num_heads
        if width & (width - 1):
            return PLAIN.turn(projected, norm, rope)
        flat = projected.flatten(0, 1).contiguous()
        output = torch.empty_like(flat, dtype=norm.dtype or flat.dtype)
        cos, sin = (rope.cos, rope.sin) if rope is not None else (norm.weight, norm.weight)
        padded = triton.next_power_of_2(norm.num_heads)
        _turn_kernel[row_grid(flat)](
            flat, norm.weight, cos, sin, output, len(flat), length, norm.eps,
            HEADS=norm.num_heads, PADDED=padded, WIDTH=width, ROPE=rope is not None, FP8=norm.dtype == FP8,
            num_warps=row_warps(padded * width),
        )  # fmt: skip
        return output.view(batch, length, norm.num_heads, width)

    def add(self, tokens: Tensor, linear: Consumer, inputs: Prepared, gate: Gate) -> Tensor:
        tokens = tokens.contiguous()
        if isinstance(linear, TurnedInt8Linear) and isinstance(linear.arithmetic, TritonArithmetic):
            numbers = inputs if isinstance(inputs, Int8Tokens) else linear.prepare(inputs)
            bias = linear.get_buffer("bias")
            linear.arithmetic.add_product(tokens, numbers, linear.data, linear.scale, bias, gate.factor, gate.row)
            return tokens
        _add(tokens, linear(inputs).contiguous(), gate)
        return tokens


def _fits(to: Consumer) -> bool:
    """Whether the kernels make what this layer takes."""
    if isinstance(to, TurnedInt8Linear):
        return isinstance(to.arithmetic, TritonArithmetic) and to.group >= SMALLEST_GROUP
    return to.compute_dtype in (torch.bfloat16, torch.float16)


def _normed(tokens: Tensor, affine: Affine, to: Consumer) -> Prepared:
    """Layer norm of contiguous tokens with its affine map, as `to` takes it."""
    flat = tokens.flatten(0, 1)
    quantize = isinstance(to, TurnedInt8Linear)
    groups, padded, columns = row_shape(flat.shape[1], to.group if isinstance(to, TurnedInt8Linear) else 1)
    output = torch.empty_like(flat, dtype=torch.int8 if quantize else to.compute_dtype)
    scale = torch.empty(len(flat), device=flat.device, dtype=torch.float32)
    _norm_kernel[row_grid(flat)](
        flat, affine.factor.contiguous(), affine.addend.contiguous(), affine.row, output, scale,
        sylvester(columns, flat.device), len(flat), tokens.shape[1], *row_strides(affine.row), affine.eps,
        float(affine.plus), GROUPS=groups, PADDED=padded, COLUMNS=columns, QUANTIZE=quantize,
        num_warps=NORM_WARPS, maxnreg=NORM_REGISTERS, num_stages=1,
    )  # fmt: skip
    if quantize:
        return Int8Tokens(output.view(tokens.shape), scale.view(*tokens.shape[:-1], 1))
    return output.view(tokens.shape)


def _add(tokens: Tensor, values: Tensor, gate: Gate) -> None:
    """tokens += gate * values."""
    rows, dim = tokens.flatten(0, 1).shape
    _add_kernel[(rows,)](
        tokens, values, values if gate.factor is None else gate.factor.contiguous(), gate.row, dim, tokens.shape[1],
        *row_strides(gate.row), GATED=gate.factor is not None, BLOCK=triton.next_power_of_2(dim), num_warps=8,
    )  # fmt: skip


@triton.jit
def _norm_kernel(
    x, factor, addend, row, output, scale, matrix, tokens, length, row_batch, row_token, eps, plus,
    GROUPS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Layer norm and its affine map, a row at a time; QUANTIZE: turned and as int8 with a scale."""
    WIDTH: tl.constexpr = GROUPS * COLUMNS
    group = tl.arange(0, PADDED)[:, None]
    place = tl.max_contiguous(group * COLUMNS + tl.arange(0, COLUMNS)[None, :], [1, AT_ONCE_FLOAT])
    inside = group < GROUPS
    signs = sign_tile(matrix, COLUMNS, QUANTIZE)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        start = tl.cast(token, tl.int64) * WIDTH
        values = tl.load(x + start + place, mask=inside, other=0.0)
        mean = tl.sum(values) / WIDTH
        values = tl.where(inside, values - mean, 0.0)
        variance = tl.sum(values * values) / WIDTH
        mine = tl.load(row + (token // length) * row_batch + (token % length) * row_token) * WIDTH
        values = values * (1.0 / tl.sqrt(variance + eps))
        values = values * (plus + tl.load(factor + mine + place, mask=inside, other=0.0))
        values = values + tl.load(addend + mine + place, mask=inside, other=0.0)
        if QUANTIZE:
            numbers, step = quantized(turned(values, signs, COLUMNS))
            tl.store(output + start + place, numbers, mask=inside)
            tl.store(scale + token, step)
        else:
            tl.store(output + start + place, values.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _turn_kernel(
    x, weight, cos, sin, output, tokens, length, eps,
    HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """RMS norm over all heads of a token; ROPE: then its pairs turned by the token's angles."""
    head = tl.arange(0, PADDED)[:, None]
    place = head * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = head < HEADS
    factor = tl.load(weight + place, mask=inside, other=0.0)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        start = tl.cast(token, tl.int64) * (HEADS * WIDTH)
        values = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
        square = tl.sum(values * values) / (HEADS * WIDTH)
        values = values * (1.0 / tl.sqrt(square + eps)) * factor
        if ROPE:
            angle = (token % length) * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
            c, s = tl.load(cos + angle), tl.load(sin + angle)
            even, odd = tl.split(tl.reshape(values, (PADDED, WIDTH // 2, 2)))
            values = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (PADDED, WIDTH))
        if FP8:
            tl.store(output + start + place, e4m3(values), mask=inside)
        else:
            tl.store(output + start + place, values.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _add_kernel(
    x, update, gate, row, dim, length, row_batch, row_token, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x += gate * update, in place, a row per program."""
    token = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < dim
    start = tl.cast(token, tl.int64) * dim
    addend = tl.load(update + start + place, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        mine = tl.load(row + (token // length) * row_batch + (token % length) * row_token) * dim
        addend = addend * tl.load(gate + mine + place, mask=inside, other=0.0)
    tl.store(x + start + place, tl.load(x + start + place, mask=inside, other=0.0) + addend, mask=inside)


TRITON: Glue = TritonGlue()
