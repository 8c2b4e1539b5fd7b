"""What Triton kernels that treat a token's whole row at once share.

A row is held as a tile [groups, columns]: a group is what a Hadamard matrix turns together. Triton's tiles are powers
of two, so there are groups too many (5120 channels are 40 groups in a tile of 64), which are masked.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.denoiser.int8 import HIGHEST, LARGEST_GROUP, group_of

SMALLEST_GROUP = 16  # of a matrix product in Triton
_PROGRAMS_PER_PROCESSOR = 8
_HIGHEST = tl.constexpr(float(HIGHEST))
_SMALLEST = tl.constexpr(1e-12)
# Neighbours that a thread loads and stores at once, 16 bytes of float32 or of bfloat16. Triton would have it take as
# many as it can store, 16 of int8: threads would then load 64 bytes apart, and each load fetch what four need
AT_ONCE_FLOAT, AT_ONCE_HALF = tl.constexpr(4), tl.constexpr(8)
_ROUNDS = tl.constexpr(1.5 * 2**23)  # added to a float32, it leaves the nearest whole number in its last bits


def row_shape(width: int, group: int) -> tuple[int, int, int]:
    """Groups of a row, the same rounded up to a power of two, and the columns of each."""
    columns = group if group > 1 else group_of(width)
    groups = width // columns
    return groups, max(SMALLEST_GROUP, triton.next_power_of_2(groups)), columns


def row_grid(rows: Tensor) -> tuple[int]:
    """Programs for [tokens, D]: as many as run at once, each of which takes one token after another."""
    if not rows.is_cuda:
        return (2,)
    processors = torch.cuda.get_device_properties(rows.device).multi_processor_count
    return (min(len(rows), processors * _PROGRAMS_PER_PROCESSOR),)


def row_strides(row: Tensor) -> tuple[int, int]:
    """Steps of a table's `row` [B or 1, L or 1] from one sample, and from one token, to the next."""
    batch, length = row.shape
    return (0 if batch == 1 else row.stride(0)), (0 if length == 1 else row.stride(1))


def row_warps(numbers: int) -> int:
    """Warps for a tile of so many numbers."""
    return 8 if numbers > 8192 else 4


@cache
def sylvester(order: int, device: torch.device) -> Tensor:
    """Hadamard's matrix [order, order] of 1 and -1, which bfloat16 holds exactly; not yet divided by order^0.5."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.to(device, torch.bfloat16)


@triton.jit
def sign_tile(matrix, COLUMNS: tl.constexpr, TURN: tl.constexpr):
    """`sylvester`, loaded once by a kernel that turns many tokens."""
    if TURN:
        place = tl.arange(0, COLUMNS)
        return tl.load(matrix + place[:, None] * COLUMNS + place[None, :])
    else:  # Triton compiles only the branch that is taken
        return matrix


@triton.jit
def turned(values, signs, COLUMNS: tl.constexpr):
    """values [groups, COLUMNS] float32, rounded to bfloat16 and turned: float32."""
    return tl.dot(values.to(tl.bfloat16), signs) * (1.0 / tl.sqrt(COLUMNS * 1.0))


@triton.jit
def quantized(values):
    """A row [groups, columns] float32 -> its int8 numbers and its scale."""
    step = tl.maximum(tl.max(tl.abs(values)), _SMALLEST) / _HIGHEST
    return (values * (1.0 / step) + _ROUNDS).to(tl.int32, bitcast=True).to(tl.int8), step


assert LARGEST_GROUP >= SMALLEST_GROUP
