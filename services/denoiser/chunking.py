"""Blocks and head that treat their tokens piece by piece, so that a long clip's intermediates never exist at once.

At 48,832 tokens of width 5120 a float32 intermediate is 1 GB; in a block only the residual stream, queries, keys and
values have to stand for all tokens. Applied to a finished model from outside; for inference only, as it writes into
what it is given.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from services.denoiser.attention import Attended
from services.denoiser.model import Block, Context, DiffusionTransformer, Head, TimeEmbedding
from services.denoiser.rope import Rope


def run_in_pieces(model: DiffusionTransformer, tokens_at_once: int) -> None:
    """Makes `model` run its token-wise parts on at most `tokens_at_once` tokens (which cost speed: plan.PIECES)."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.forward = partial(_forward, block, tokens_at_once)  # type: ignore[method-assign]  # hooks still apply
    model.head.forward = partial(_patches, model.head, tokens_at_once)  # type: ignore[method-assign]


def _forward(
    block: Block, tokens_at_once: int, tokens: Tensor, time: TimeEmbedding, context: Context, rope: Rope
) -> Tensor:
    """`Block.forward` in pieces that are written into place, the residual stream's too."""
    pieces = _pieces(tokens, tokens_at_once)
    attended = _attended(block, pieces, tokens, time, rope)
    for piece in pieces:
        part = tokens[:, piece]
        _put(part, block.update(part, _part(attended, piece), time.tokens(piece), context))
    return tokens


def _attended(block: Block, pieces: list[slice], tokens: Tensor, time: TimeEmbedding, rope: Rope) -> Attended:
    """What self-attention gathers: [B, L, D]. All else is gone when this returns, as the second half needs the room."""
    heads: list[Tensor] = []
    for piece in pieces:
        # within one expression: a name would keep a piece's result while the next one is made
        _put_all(heads, piece, block.project(tokens[:, piece], time.tokens(piece), rope.tokens(piece)), tokens.shape[1])
    queries, keys, values = heads
    attending = block.self_attn.attention.over(keys, values)
    for piece in pieces:  # what is gathered takes the place of the queries that asked for it
        queries[:, piece] = attending.gather(queries[:, piece])
    return attending.finish(queries)


def _part(attended: Attended, piece: slice) -> Attended:
    return attended[:, piece] if isinstance(attended, Tensor) else attended.tokens(piece)


def _put_all(heads: list[Tensor], piece: slice, parts: tuple[Tensor, ...], length: int) -> None:
    """Puts queries, keys and values of a piece into those of all tokens, which the first piece makes."""
    if not heads:
        heads += [part.new_empty(len(part), length, *part.shape[2:]) for part in parts]
    for whole, part in zip(heads, parts, strict=True):
        whole[:, piece] = part


def _put(part: Tensor, updated: Tensor) -> None:
    """Puts new values into a part of all tokens, unless it was updated in place."""
    if updated.data_ptr() != part.data_ptr():
        part.copy_(updated)


def _patches(head: Head, tokens_at_once: int, tokens: Tensor, time: TimeEmbedding) -> Tensor:
    """`Head.forward` in pieces."""
    pieces = _pieces(tokens, tokens_at_once)
    return torch.cat([Head.forward(head, tokens[:, piece], time.tokens(piece)) for piece in pieces], dim=1)


def _pieces(tokens: Tensor, tokens_at_once: int) -> list[slice]:
    return [slice(start, start + tokens_at_once) for start in range(0, tokens.shape[1], tokens_at_once)]
