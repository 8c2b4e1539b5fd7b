"""Int8 arithmetic in Triton: quantising tokens in one pass, and a product with its scales, bias and GELU in one kernel.

For GPUs with the bulk tensor copy engine (Hopper and newer). The same numbers as `int8.Arithmetic`, but for the order
of float32 sums. Figures: docs/figures.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.denoiser.attention import Attended
from services.denoiser.fp8_attention import Fp8Tokens
from services.denoiser.int8 import Arithmetic, Int8Tokens
from services.denoiser.triton_rows import (
    AT_ONCE_HALF,
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

_TILE_TOKENS, _TILE_ROWS, _TILE_DEPTH = 128, 256, 128
_UNGATED, _ONE_GATE, _GATES_BY_TOKEN = 0, 1, 2


class TritonArithmetic(Arithmetic):
    """On tensors of a CUDA device."""

    name = "triton"

    def quantize(self, tokens: Attended, group: int, also: Tensor | None = None) -> Int8Tokens:
        if isinstance(tokens, Fp8Tokens):
            return _of_fp8(tokens) if group == 1 and also is None else self.quantize(tokens.float(), group, also)
        if 1 < group < SMALLEST_GROUP:
            return super().quantize(tokens, group, also)
        flat = tokens.flatten(0, -2).contiguous()
        data = torch.empty_like(flat, dtype=torch.int8)
        scale = torch.empty(len(flat), 1, device=flat.device, dtype=torch.float32)
        groups, padded, columns = row_shape(flat.shape[1], group)
        _quantize_kernel[row_grid(flat)](
            flat, flat if also is None else also.contiguous(), data, scale, sylvester(columns, flat.device), len(flat),
            GROUPS=groups, PADDED=padded, COLUMNS=columns, TURN=group > 1, ALSO=also is not None,
            num_warps=row_warps(padded * columns), num_stages=1,
        )  # fmt: skip
        leading = tokens.shape[:-1]
        return Int8Tokens(data.view(tokens.shape), scale.view(*leading, 1))

    def multiply(
        self, tokens: Int8Tokens, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool
    ) -> Tensor:
        output = torch.empty(*tokens.data.shape[:-1], len(data), device=data.device, dtype=dtype)
        _multiply(tokens, data, scale, bias, output.flatten(0, -2), gelu=gelu)
        return output

    def add_product(
        self,
        stream: Tensor,
        tokens: Int8Tokens,
        data: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        row: Tensor,
    ) -> None:
        """stream += gate * (tokens @ weights.T + bias), without the product's ever being in memory.

        stream: float32 [B, L, N], contiguous. gate: float32 [n, N] or 1; row: [B or 1, L or 1], of the gate.
        """
        _multiply(tokens, data, scale, bias, stream.flatten(0, -2), adding=_Adding(gate, row, stream.shape[-2]))


def _of_fp8(tokens: Fp8Tokens) -> Int8Tokens:
    """Tokens [..., D] of 8-bit floats, not turned."""
    flat = tokens.data.flatten(0, -2).contiguous()
    data = torch.empty_like(flat, dtype=torch.int8)
    scale = torch.empty(len(flat), device=flat.device, dtype=torch.float32)
    groups, padded, columns = row_shape(flat.shape[1], 1)
    _requantize_kernel[row_grid(flat)](
        flat, tokens.scale, tokens.mean, data, scale, len(flat), GROUPS=groups, PADDED=padded, COLUMNS=columns,
        num_warps=row_warps(padded * columns),
    )  # fmt: skip
    return Int8Tokens(data.view(tokens.data.shape), scale.view(*tokens.data.shape[:-1], 1))


@dataclass(frozen=True)
class _Adding:
    gate: Tensor | None
    row: Tensor
    length: int  # tokens of a sample


def _multiply(
    tokens: Int8Tokens,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    output: Tensor,
    *,
    gelu: bool = False,
    adding: _Adding | None = None,
) -> None:
    """The product into output [M, N], or added to it."""
    flat = tokens.data.flatten(0, -2)
    (m, k), n = flat.shape, len(data)
    wide = n > k  # more columns of output than the narrow products have: deeper grouping, fewer stages
    # a part of the tile at a time needs less of the shared memory, which goes into another stage of loads
    parts = 4 if adding else 1 if wide else 2
    gate, row, gating = scale, scale, _UNGATED
    if adding is not None and adding.gate is not None:
        gate, row = adding.gate.contiguous(), adding.row
        gating = _ONE_GATE if len(gate) == 1 else _GATES_BY_TOKEN
    _product_kernel[(min(_processors(flat.device), triton.cdiv(m, _TILE_TOKENS) * triton.cdiv(n, _TILE_ROWS)),)](
        TensorDescriptor.from_tensor(flat, [_TILE_TOKENS, _TILE_DEPTH]),
        TensorDescriptor.from_tensor(data, [_TILE_ROWS, _TILE_DEPTH]),
        TensorDescriptor.from_tensor(output, [_TILE_TOKENS, _TILE_ROWS // parts]),
        tokens.scale, scale, scale if bias is None else bias, gate, row, m, n, k,
        adding.length if adding else 1, *(row_strides(row) if gating == _GATES_BY_TOKEN else (0, 0)),
        BM=_TILE_TOKENS, BN=_TILE_ROWS, BK=_TILE_DEPTH, GROUP=16 if wide else 8, PARTS=parts, FLATTEN=not wide,
        HAS_BIAS=bias is not None, GELU=gelu, ADD=adding is not None, GATING=gating, num_warps=8,
        num_stages=3 if wide or gating == _GATES_BY_TOKEN else 4,
    )  # fmt: skip


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _quantize_kernel(
    x, also, data, scale, matrix, tokens,
    GROUPS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, TURN: tl.constexpr, ALSO: tl.constexpr,
):  # fmt: skip
    """Rows of x [tokens, GROUPS * COLUMNS] -> int8 data of the same shape and scale [tokens]. ALSO: of x + also."""
    group = tl.arange(0, PADDED)[:, None]
    place = tl.max_contiguous(group * COLUMNS + tl.arange(0, COLUMNS)[None, :], [1, AT_ONCE_HALF])
    inside = group < GROUPS
    signs = sign_tile(matrix, COLUMNS, TURN)
    # where much is to be done with a token, the next one is loaded at the same time
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=2 if TURN else 1):
        start = tl.cast(token, tl.int64) * (GROUPS * COLUMNS)
        values = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
        if ALSO:
            values += tl.load(also + start + place, mask=inside, other=0.0).to(tl.float32)
        if TURN:
            values = turned(values, signs, COLUMNS)
        numbers, step = quantized(values)
        tl.store(data + start + place, numbers, mask=inside)
        tl.store(scale + token, step)


@triton.jit
def _requantize_kernel(
    x, factor, mean, data, scale, tokens, GROUPS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows of x [tokens, GROUPS * COLUMNS] times factor plus mean -> int8 data of the same shape and scale [tokens]."""
    group = tl.arange(0, PADDED)[:, None]
    place = group * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = group < GROUPS
    addend = tl.load(mean + place, mask=inside, other=0.0)
    by = tl.load(factor)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        start = tl.cast(token, tl.int64) * (GROUPS * COLUMNS)
        values = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
        numbers, step = quantized(values * by + addend)
        tl.store(data + start + place, numbers, mask=inside)
        tl.store(scale + token, step)


@triton.jit
def _product_kernel(
    a_desc, b_desc, c_desc, a_scale, b_scale, bias, gate, row, m, n, k, length, row_batch, row_token,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    FLATTEN: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, GATING: tl.constexpr,
):  # fmt: skip
    """a [m, k] int8 times b [n, k] int8, transposed -> c [m, n]. Each program takes tile after tile.

    GROUP tiles of a column of tiles are taken before the next column, so that both sides stay in the L2 cache. ADD:
    c += gate * the product; the memory does the addition, once for each number, so that the order does not matter.
    """
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        band = tile // (GROUP * tiles_n)
        height = min(tiles_m - band * GROUP, GROUP)
        top = (band * GROUP + (tile % (GROUP * tiles_n)) % height) * BM
        left = ((tile % (GROUP * tiles_n)) // height) * BN
        sums = tl.zeros((BM, BN), tl.int32)
        for depth in range(0, k, BK):
            sums = tl.dot(a_desc.load([top, depth]), b_desc.load([left, depth]).T, sums, out_dtype=tl.int32)
        rows = top + tl.arange(0, BM)
        token_scale = tl.load(a_scale + rows, mask=rows < m, other=0.0)
        gates = gate
        if GATING == 2:
            gates = (
                gate
                + tl.load(row + (rows // length) * row_batch + (rows % length) * row_token, mask=rows < m, other=0) * n
            )
        if PARTS == 1:
            _store(c_desc, sums, top, left, token_scale, b_scale, bias, gates, n, HAS_BIAS, GELU, ADD, GATING)
        elif PARTS == 2:
            first, second = _halves(sums)
            _store(c_desc, first, top, left, token_scale, b_scale, bias, gates, n, HAS_BIAS, GELU, ADD, GATING)
            _store(
                c_desc, second, top, left + BN // 2, token_scale, b_scale, bias, gates, n, HAS_BIAS, GELU, ADD, GATING
            )
        else:
            first, second = _halves(sums)
            one, two = _halves(first)
            _store(c_desc, one, top, left, token_scale, b_scale, bias, gates, n, HAS_BIAS, GELU, ADD, GATING)
            _store(c_desc, two, top, left + BN // 4, token_scale, b_scale, bias, gates, n, HAS_BIAS, GELU, ADD, GATING)
            one, two = _halves(second)
            left += BN // 2
            _store(c_desc, one, top, left, token_scale, b_scale, bias, gates, n, HAS_BIAS, GELU, ADD, GATING)
            _store(c_desc, two, top, left + BN // 4, token_scale, b_scale, bias, gates, n, HAS_BIAS, GELU, ADD, GATING)


@triton.jit
def _tanh(values):
    """The processor's own, one instruction; its error of 2^-11 is a quarter of what rounding to bfloat16 makes."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [values], tl.float32, is_pure=True, pack=1)


@triton.jit
def _halves(sums):
    """The left and the right half of the columns."""
    rows: tl.constexpr = sums.shape[0]
    columns: tl.constexpr = sums.shape[1]
    return tl.split(tl.permute(tl.reshape(sums, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def _store(
    c_desc, sums, top, left, token_scale, b_scale, bias, gates, n,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, GATING: tl.constexpr,
):  # fmt: skip
    columns = left + tl.arange(0, sums.shape[1])
    inside = columns < n
    output = sums.to(tl.float32) * token_scale[:, None] * tl.load(b_scale + columns, mask=inside, other=0.0)[None]
    if HAS_BIAS:
        output += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None]
    if GELU:
        output = 0.5 * output * (1.0 + _tanh(0.7978845608028654 * (output + 0.044715 * output * output * output)))
    if GATING == 1:
        output = output * tl.load(gates + columns, mask=inside, other=0.0)[None]
    elif GATING == 2:
        output = output * tl.load(gates[:, None] + columns[None], mask=inside[None], other=0.0)
    if ADD:
        c_desc.atomic_add([top, left], output)
    else:
        c_desc.store([top, left], output.to(c_desc.dtype))
