"""Int8 arithmetic in Triton: quantising tokens in one pass, and a product with its scales, bias and GELU in one kernel.

For GPUs with the bulk tensor copy engine (Hopper and newer). The same numbers as `int8.Arithmetic`, but for the order
of float32 sums. Figures: docs/figures.md.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.denoiser.int8 import Arithmetic, Int8Tokens
from services.denoiser.triton_rows import SMALLEST_GROUP, quantized, row_grid, row_shape, row_warps, sylvester, turned

_TILE_TOKENS, _TILE_ROWS, _TILE_DEPTH = 128, 256, 128


class TritonArithmetic(Arithmetic):
    """On tensors of a CUDA device."""

    name = "triton"

    def quantize(self, tokens: Tensor, group: int) -> Int8Tokens:
        if 1 < group < SMALLEST_GROUP:
            return super().quantize(tokens, group)
        flat = tokens.flatten(0, -2).contiguous()
        data = torch.empty_like(flat, dtype=torch.int8)
        scale = torch.empty(len(flat), 1, device=flat.device, dtype=torch.float32)
        groups, padded, columns = row_shape(flat.shape[1], group)
        _quantize_kernel[row_grid(flat)](
            flat, data, scale, sylvester(columns, flat.device), len(flat),
            GROUPS=groups, PADDED=padded, COLUMNS=columns, TURN=group > 1, num_warps=row_warps(padded * columns), num_stages=1,
        )  # fmt: skip
        leading = tokens.shape[:-1]
        return Int8Tokens(data.view(tokens.shape), scale.view(*leading, 1))

    def multiply(
        self, tokens: Int8Tokens, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool
    ) -> Tensor:
        flat = tokens.data.flatten(0, -2)
        (m, k), n = flat.shape, len(data)
        output = torch.empty(m, n, device=flat.device, dtype=dtype)
        wide = n > k  # more columns of output than the narrow products have: deeper grouping, fewer stages
        halves = 1 if wide else 2
        _product_kernel[(min(_processors(flat.device), triton.cdiv(m, _TILE_TOKENS) * triton.cdiv(n, _TILE_ROWS)),)](
            TensorDescriptor.from_tensor(flat, [_TILE_TOKENS, _TILE_DEPTH]),
            TensorDescriptor.from_tensor(data, [_TILE_ROWS, _TILE_DEPTH]),
            TensorDescriptor.from_tensor(output, [_TILE_TOKENS, _TILE_ROWS // halves]),
            tokens.scale, scale, scale if bias is None else bias, m, n, k,
            BM=_TILE_TOKENS, BN=_TILE_ROWS, BK=_TILE_DEPTH, GROUP=16 if wide else 8, HALVES=halves, FLATTEN=not wide,
            HAS_BIAS=bias is not None, GELU=gelu, num_warps=8, num_stages=3 if wide else 4,
        )  # fmt: skip
        return output.view(*tokens.data.shape[:-1], n)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _quantize_kernel(
    x, data, scale, matrix, tokens,
    GROUPS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Rows of x [tokens, GROUPS * COLUMNS] -> int8 data of the same shape and scale [tokens]."""
    group = tl.arange(0, PADDED)[:, None]
    place = group * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = group < GROUPS
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        start = tl.cast(token, tl.int64) * (GROUPS * COLUMNS)
        values = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
        if TURN:
            values = turned(values, matrix, COLUMNS)
        numbers, step = quantized(values)
        tl.store(data + start + place, numbers, mask=inside)
        tl.store(scale + token, step)


@triton.jit
def _product_kernel(
    a_desc, b_desc, c_desc, a_scale, b_scale, bias, m, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
    FLATTEN: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """a [m, k] int8 times b [n, k] int8, transposed -> c [m, n]. Each program takes tile after tile.

    GROUP tiles of a column of tiles are taken before the next column, so that both sides stay in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        band = tile // (GROUP * tiles_n)
        height = min(tiles_m - band * GROUP, GROUP)
        row = (band * GROUP + (tile % (GROUP * tiles_n)) % height) * BM
        column = ((tile % (GROUP * tiles_n)) // height) * BN
        sums = tl.zeros((BM, BN), tl.int32)
        for depth in range(0, k, BK):
            sums = tl.dot(a_desc.load([row, depth]), b_desc.load([column, depth]).T, sums, out_dtype=tl.int32)
        rows = row + tl.arange(0, BM)
        token_scale = tl.load(a_scale + rows, mask=rows < m, other=0.0)
        if HALVES == 2:
            # half of the tile at a time needs half of the shared memory, which goes into another stage of loads
            left, right = tl.split(tl.permute(tl.reshape(sums, (BM, 2, BN // 2)), (0, 2, 1)))
            _store(c_desc, left, row, column, token_scale, b_scale, bias, n, HAS_BIAS, GELU)
            _store(c_desc, right, row, column + BN // 2, token_scale, b_scale, bias, n, HAS_BIAS, GELU)
        else:
            _store(c_desc, sums, row, column, token_scale, b_scale, bias, n, HAS_BIAS, GELU)


@triton.jit
def _store(c_desc, sums, row, column, token_scale, b_scale, bias, n, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    columns = column + tl.arange(0, sums.shape[1])
    output = sums.to(tl.float32) * token_scale[:, None] * tl.load(b_scale + columns, mask=columns < n, other=0.0)[None]
    if HAS_BIAS:
        output += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None]
    if GELU:
        # x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
        output = output * tl.sigmoid(1.5957691216057308 * (output + 0.044715 * output * output * output))
    c_desc.store([row, column], output.to(c_desc.dtype))
