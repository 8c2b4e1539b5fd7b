"""Int8 arithmetic: int8 tokens times int8 weights, with a scale per token and one per row of the weights.

A few channels of a transformer's activations are tens of times larger than the rest, and would take all the numbers of
a token's scale. So both sides are turned by a Hadamard matrix in groups of channels first, which spreads each channel
over its group and leaves the product as it was (QuaRot: Ashkboos et al. 2024, arXiv:2404.00456). The values' heads are
turned in the weights that make them, so what attention gathers arrives turned at the output projection.

This file is the definition and runs everywhere; `triton_int8` computes the same numbers on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.denoiser.attention import Attended
from services.denoiser.model import Block, CrossAttention, DiffusionTransformer, Linear, SelfAttention
from services.denoiser.quantisation import Int8Linear, quantize_weight

HIGHEST = 127
LARGEST_GROUP = 128
_SMALLEST = 1e-12  # scale of a token of zeros


@dataclass(frozen=True)
class Int8Tokens:
    """Tokens as an int8 number per channel times a scale per token; turned by groups where the layer asks for it."""

    data: Tensor  # int8 [..., K]
    scale: Tensor  # float32 [..., 1]


class Arithmetic:
    """How tokens are quantised and multiplied; this one with PyTorch's own operations."""

    name = "plain"

    def quantize(self, tokens: Attended, group: int, also: Tensor | None = None) -> Int8Tokens:
        """tokens [..., K] of any float dtype, or as 8-bit attention leaves them.

        group: how many channels are turned together; 1: none are.
        also: of the same shape and dtype, added in float32. What is turned is rounded to bfloat16 first, which is a
        tenth of the step that the int8 numbers then make.
        """
        exact = tokens.float() if also is None else tokens.float() + also.float()
        turned = exact if group == 1 else rotated(exact.bfloat16().float(), group)
        scale = turned.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST) / HIGHEST
        return Int8Tokens((turned / scale).round().to(torch.int8), scale)

    def multiply(
        self, tokens: Int8Tokens, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool
    ) -> Tensor:
        """tokens @ weights.T + bias, then GELU (tanh) if asked: [..., N] in `dtype`; sums of products are exact.

        data: int8 [N, K]; scale: float32 [N]; bias: [N].
        """
        products = _integer_product(tokens.data.flatten(0, -2), data)
        output = products.float() * tokens.scale.flatten(0, -2) * scale
        if bias is not None:
            output = output + bias.float()
        if gelu:
            output = F.gelu(output, approximate="tanh")
        return torch.unflatten(output.to(dtype), 0, tokens.data.shape[:-1])


PLAIN = Arithmetic()


class TurnedInt8Linear(nn.Module):
    """Stands in for `model.Linear` in int8 arithmetic."""

    data: Tensor  # int8 [out, in], turned along `in`
    scale: Tensor  # float32 [out]

    def __init__(
        self, linear: Linear | Int8Linear, arithmetic: Arithmetic, *, input_is_turned: bool, group: int, gelu: bool
    ) -> None:
        super().__init__()
        weight = _dequantised(linear)
        data, scale = quantize_weight(rotated(weight, group))
        self.register_buffer("data", data)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", linear.bias)
        self.compute_dtype = linear.compute_dtype
        self.group = 1 if input_is_turned else group
        self.gelu = gelu
        self.arithmetic = arithmetic

    def prepare(self, inputs: Attended, also: Tensor | None = None) -> Int8Tokens:
        return self.arithmetic.quantize(inputs, self.group, also)

    def forward(self, inputs: Attended | Int8Tokens) -> Tensor:
        tokens = inputs if isinstance(inputs, Int8Tokens) else self.prepare(inputs)
        bias = self.get_buffer("bias")
        return self.arithmetic.multiply(tokens, self.data, self.scale, bias, self.compute_dtype, self.gelu)


def use_int8(
    model: DiffusionTransformer,
    arithmetic: Arithmetic = PLAIN,
    device: torch.device | None = None,
    take: Callable[[Block], None] | None = None,
) -> None:
    """Gives the blocks of a loaded model int8 arithmetic, in place, one block after another.

    The weights may be floats or int8 already. Keys and values of the context are computed once per request and stay as
    they are. device: where to compute the new weights, which then go back to where the old ones were; take: is given
    each block with its new weights on `device` instead.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        home = block.modulation.device
        block.to(device or home)
        _convert_self_attention(block.self_attn, arithmetic)
        _convert_cross_attention(block.cross_attn, arithmetic)
        first, last = block.ffn[0], block.ffn[2]
        block.ffn[0] = _converted(first, arithmetic, gelu=True)
        block.ffn[1] = nn.Identity()
        block.ffn[2] = _converted(last, arithmetic)
        if take is None:
            block.to(home)
        else:
            take(block)


def _convert_self_attention(layer: SelfAttention, arithmetic: Arithmetic) -> None:
    group = _turn_values(layer.o, layer.num_heads, [layer.v])
    for name in ("q", "k", "v"):
        layer.add_module(name, _converted(getattr(layer, name), arithmetic))
    layer.add_module("o", TurnedInt8Linear(layer.o, arithmetic, input_is_turned=True, group=group, gelu=False))


def _convert_cross_attention(layer: CrossAttention, arithmetic: Arithmetic) -> None:
    values = [layer.v, *([layer.v_img] if hasattr(layer, "v_img") else [])]
    group = _turn_values(layer.o, layer.num_heads, values)
    layer.add_module("q", _converted(layer.q, arithmetic))
    layer.add_module("o", TurnedInt8Linear(layer.o, arithmetic, input_is_turned=True, group=group, gelu=False))


def _converted(linear: nn.Module, arithmetic: Arithmetic, gelu: bool = False) -> TurnedInt8Linear:
    assert isinstance(linear, Linear | Int8Linear)
    group = group_of(_dequantised(linear).shape[1])
    return TurnedInt8Linear(linear, arithmetic, input_is_turned=False, group=group, gelu=gelu)


def _turn_values(output: Linear | Int8Linear, num_heads: int, makers: Sequence[Linear | Int8Linear]) -> int:
    """Turns each head of the values in the layers that make them; returns the group that `output` has to take back."""
    group = group_of(_dequantised(output).shape[1] // num_heads)
    for maker in makers:
        weight = rotated(_dequantised(maker).T, group).T.contiguous()
        if isinstance(maker, Int8Linear):
            data, scale = quantize_weight(weight)
            maker.weight._data, maker.weight._scale = data, scale.to(maker.compute_dtype)
        else:
            maker.weight = nn.Parameter(weight.to(maker.compute_dtype), requires_grad=False)
        if maker.bias is not None:
            maker.bias = nn.Parameter(rotated(maker.bias.float(), group).to(maker.bias.dtype), requires_grad=False)
    return group


def _dequantised(linear: Linear | Int8Linear) -> Tensor:
    """Weights [out, in] float32."""
    if isinstance(linear, Int8Linear):
        return linear.weight._data.float() * linear.weight._scale.float()
    return linear.weight.detach().float()


def group_of(width: int) -> int:
    """Channels that are turned together: the largest power of two, up to 128, that divides the width."""
    return min(width & -width, LARGEST_GROUP)


def rotated(values: Tensor, group: int) -> Tensor:
    """values [..., K] float32 with every `group` channels turned by the same orthogonal symmetric matrix."""
    if group == 1:
        return values
    return (torch.unflatten(values, -1, (-1, group)) @ hadamard(group, values.device)).flatten(-2)


@cache
def hadamard(order: int, device: torch.device) -> Tensor:
    """Sylvester's matrix [order, order] float32, divided by order^0.5 so that it is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix * order**-0.5).to(device)


def _integer_product(tokens: Tensor, data: Tensor) -> Tensor:
    """int8 [M, K] and [N, K] -> int32 [M, N]."""
    product: Callable[[Tensor, Tensor], Tensor] = torch._int_mm
    if tokens.is_cuda and len(tokens) <= _FEWEST_ROWS:
        return product(F.pad(tokens, (0, 0, 0, _FEWEST_ROWS + 1 - len(tokens))), data.T)[: len(tokens)]
    return product(tokens, data.T)


_FEWEST_ROWS = 16  # cuBLAS's int8 product takes only more
