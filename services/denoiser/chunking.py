"""Blocks that treat their tokens piece by piece, so that a long clip's intermediates never exist at once.

At 48,832 tokens of width 5120 a float32 intermediate is 1 GB; in a block only the residual stream, queries, keys and
values have to stand for all tokens. Applied to a finished model from outside; for inference only, as it writes into
what it is given.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from services.denoiser.model import Block, Context, DiffusionTransformer, TimeEmbedding
from services.denoiser.rope import Rope


def run_in_pieces(model: DiffusionTransformer, tokens_at_once: int) -> None:
    """Makes every block of `model` run its token-wise parts on at most `tokens_at_once` tokens (below 4096 costs speed)."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.forward = partial(_forward, block, tokens_at_once)  # type: ignore[method-assign]  # hooks still apply


def _forward(
    block: Block, tokens_at_once: int, tokens: Tensor, time: TimeEmbedding, context: Context, rope: Rope
) -> Tensor:
    """`Block.forward` in pieces that are written into place, the residual stream's too."""
    pieces = [slice(start, start + tokens_at_once) for start in range(0, tokens.shape[1], tokens_at_once)]
    heads: tuple[Tensor, ...] = ()
    for piece in pieces:
        part = block.project(tokens[:, piece], time.tokens(piece), rope.tokens(piece))
        heads = heads or tuple(_for_all_tokens(tensor, tokens) for tensor in part)
        for whole, some in zip(heads, part, strict=True):
            whole[:, piece] = some
    queries, keys, values = heads
    for piece in pieces:  # what is gathered takes the place of the queries that asked for it
        queries[:, piece] = block.self_attn.attention(queries[:, piece], keys, values)
    attended = queries.flatten(2)
    del heads, queries, keys, values  # before the second half needs room
    for piece in pieces:
        tokens[:, piece] = block.update(tokens[:, piece], attended[:, piece], time.tokens(piece), context)
    return tokens


def _for_all_tokens(part: Tensor, tokens: Tensor) -> Tensor:
    return part.new_empty(len(tokens), tokens.shape[1], *part.shape[2:])
