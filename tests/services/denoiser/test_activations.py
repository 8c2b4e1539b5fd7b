"""The bytes that a plan counts for a pass, against those of the pass itself, at full size on the meta device.

Kernels are stood in for by what they leave in memory: results of the same sizes, and nothing besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from runtime.alive import Alive
from services.denoiser.attention import Attended, Attending, PlainAttending
from services.denoiser.chunking import run_in_pieces
from services.denoiser.fp8_attention import FP8, Fp8Tokens
from services.denoiser.glue import Affine, Consumer, Gate, HeadNorm, Prepared
from services.denoiser.int8 import Int8Tokens
from services.denoiser.model import PRESETS, Block, Context, DiffusionTransformer
from services.denoiser.placement import weights_of
from services.denoiser.plan import PIECES, activations, animation_tokens, context_keys
from services.denoiser.precision import use_attention, use_glue
from services.denoiser.rope import Rope
from services.denoiser.weights import unloaded_transformer

CONFIG = replace(PRESETS["scail-14b"], num_layers=2)
META = torch.device("meta")
TOKENS = animation_tokens(512, 896, 81)


class Linear(nn.Module):
    """Int8 arithmetic."""

    compute_dtype = torch.bfloat16

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def prepare(self, inputs: Attended, also: Tensor | None = None) -> Int8Tokens:
        return int8(inputs if isinstance(inputs, Tensor) else inputs.data)

    def forward(self, inputs: Attended | Int8Tokens) -> Tensor:
        tokens = inputs if isinstance(inputs, Int8Tokens) else self.prepare(inputs)
        return tokens.data.new_empty(*tokens.data.shape[:-1], self.width, dtype=torch.bfloat16)


class Kernels:
    name = "kernels"

    def normed(self, tokens: Tensor, affine: Affine, to: Consumer) -> Prepared:
        return int8(tokens)

    def add(self, tokens: Tensor, linear: Consumer, inputs: Prepared, gate: Gate) -> Tensor:
        if not isinstance(inputs, Int8Tokens):
            linear.prepare(inputs)
        return tokens

    def turn(self, projected: Tensor, norm: HeadNorm, rope: Rope | None) -> Tensor:
        return torch.unflatten(torch.empty_like(projected, dtype=norm.dtype), -1, (norm.num_heads, -1))


class Attends:
    name = "attends"

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return torch.empty_like(queries, dtype=values.dtype)

    def over(self, keys: Tensor, values: Tensor) -> Attending:
        return PlainAttending(self, keys, values) if self.dtype is None else InEightBits(torch.empty_like(keys))


@dataclass(frozen=True)
class InEightBits:
    values: Tensor

    def gather(self, queries: Tensor) -> Tensor:
        return torch.empty_like(queries)

    def finish(self, gathered: Tensor) -> Fp8Tokens:
        return Fp8Tokens(gathered.flatten(2), *torch.empty(2, 1, device=META))


@contextmanager
def counted() -> Iterator[Alive]:
    with torch.inference_mode(), Alive() as alive:
        yield alive


def int8(tokens: Tensor) -> Int8Tokens:
    return Int8Tokens(torch.empty_like(tokens, dtype=torch.int8), tokens.new_empty(*tokens.shape[:-1], 1))


def with_kernels(dtype: torch.dtype | None) -> DiffusionTransformer:
    model = unloaded_transformer(CONFIG, quantized=True)
    use_glue(model, Kernels())
    use_attention(model, Attends(dtype))
    for block in model.blocks:
        assert isinstance(block, Block)
        block.cross_attn.attention = Attends(None)
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o"):
            block.set_submodule(name, Linear(CONFIG.dim))
        block.ffn = nn.Sequential(Linear(CONFIG.ffn_dim), nn.Identity(), Linear(CONFIG.dim))
    return model


def most_of_a_pass(model: DiffusionTransformer) -> int:
    """Bytes besides weights and the keys of the context."""
    pairs = [
        torch.empty(1, n, CONFIG.num_heads, CONFIG.head_dim, dtype=torch.bfloat16, device=META) for n in (512, 257)
    ]
    text = torch.empty(1, 512, CONFIG.dim, device=META)
    made = {block.cross_attn: tuple((pair, pair) for pair in pairs) for block in model.blocks}
    context = Context(text, text, made)  # type: ignore[arg-type]  # blocks are modules to mypy
    table = torch.empty(TOKENS, CONFIG.head_dim // 2, device=META)
    latents, pose = torch.empty(1, 20, 22, 64, 112, device=META), torch.empty(1, 20, 21, 32, 56, device=META)
    with counted() as alive:
        time = model.embed_timestep(torch.tensor([999]), META)
        tokens = model.embed_tokens(latents, pose)
        assert tokens.shape[1] == TOKENS
        for block in model.blocks:
            tokens = block(tokens, time, context, Rope(table, table))
        model.predict(tokens, time, latents.shape[2:])
    return alive.most


@pytest.mark.parametrize("dtype", [None, FP8])
@pytest.mark.parametrize("piece", [TOKENS, *PIECES])
def test_a_pass_takes_no_more_than_is_counted_and_not_much_less(piece: int, dtype: torch.dtype | None) -> None:
    model = with_kernels(dtype)
    weights = replace(weights_of(model), is_fused=True, context_linear=0, dequantised=0)
    if piece < TOKENS:
        run_in_pieces(model, piece)
    planned = activations(weights, CONFIG, TOKENS, piece) - context_keys(CONFIG) * (piece < TOKENS)
    taken = most_of_a_pass(model)
    assert taken <= planned
    assert taken >= planned * (0.97 if dtype is None else 0.75)
