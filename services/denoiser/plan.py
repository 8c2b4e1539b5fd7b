"""How a transformer fits into a number of bytes on the device: what stays there, what is streamed, how long a piece.

Everything is counted, activations too; the count is an upper bound, checked against the device in benchmarks/memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.denoiser.model import TransformerConfig

GIB = 1024**3
PIECE_TOKENS = 4096  # shorter pieces cost speed
SHORTEST_PIECE = 512
_PLACES = 2  # streaming.PLACES: the block that computes and the next
# The driver's own: the CUDA context, loaded kernels, and the workspaces of cuBLAS and cuDNN
DEVICE_OVERHEAD_BYTES = 768 * 1024**2


@dataclass(frozen=True)
class Weights:
    """Bytes of a loaded transformer, as the device would hold them."""

    block: int  # of the largest block, without what computes once per request
    context: int  # of a block's linears that compute once per request
    context_linear: int  # of the largest of these; streamed, they come one by one
    rest: int  # outside the blocks, always on the device
    on_demand: int  # the largest part outside the blocks that comes for a call
    num_blocks: int


@dataclass(frozen=True)
class MemoryPlan:
    """What `plan_memory` decided."""

    resident: int  # blocks that stay on the device
    tokens_at_once: int  # of the token-wise parts; 0: all
    device_bytes: int  # the peak, the driver's own included
    host_bytes: int  # pinned
    streamed_bytes: int  # host to device in each forward pass


class DoesNotFit(Exception):
    """No plan is within the budget; the message has the numbers."""


def plan_memory(
    weights: Weights, config: TransformerConfig, tokens: int, budget: int | None, cached_branches: int = 0
) -> MemoryPlan:
    """The plan with the most on the device that keeps within `budget` bytes (None: everything stays on the device).

    Args:
        tokens: of the longest clip.
        cached_branches: guidance branches whose residual a step cache keeps; 0: no step cache.

    Raises:
        DoesNotFit: even with all blocks streamed and the shortest pieces.
    """
    whole = weights.num_blocks * (weights.block + weights.context) + weights.rest + weights.on_demand
    kept = residuals(config, tokens, cached_branches)
    if budget is None:
        return MemoryPlan(
            weights.num_blocks, 0, whole + activations(config, tokens, tokens, cached_branches) + kept, 0, 0
        )
    pieces = [piece for piece in (PIECE_TOKENS, PIECE_TOKENS // 2, PIECE_TOKENS // 4, SHORTEST_PIECE) if piece < tokens]
    for piece in (tokens, *pieces[:1]):  # pieces cost less than streaming, short ones more
        needed = whole + activations(config, tokens, piece, cached_branches) + kept + DEVICE_OVERHEAD_BYTES
        if needed <= budget:
            return MemoryPlan(weights.num_blocks, 0 if piece == tokens else piece, needed, 0, 0)
    in_turn = _PLACES * weights.block + weights.context_linear + context_keys(config) + weights.rest + kept
    for piece in pieces or [tokens]:
        # the timestep's projection comes and goes before there are tokens
        at_once = max(activations(config, tokens, piece, cached_branches), weights.on_demand)
        needed = in_turn + at_once + DEVICE_OVERHEAD_BYTES
        if needed <= budget:
            return _streamed(weights, config, piece, needed, budget)
    raise DoesNotFit(
        f"{tokens} tokens need {needed / GIB:.2f} GiB with every block streamed and the shortest pieces; "
        f"the budget is {budget / GIB:.2f} GiB"
    )


def _streamed(weights: Weights, config: TransformerConfig, piece: int, needed: int, budget: int) -> MemoryPlan:
    # a block that stays keeps its linears of the context too
    each = weights.block + weights.context
    resident = min((budget - needed) // each, weights.num_blocks - _PLACES)
    streamed = weights.num_blocks - resident
    return MemoryPlan(
        resident=resident,
        tokens_at_once=piece,
        device_bytes=needed + resident * each,
        host_bytes=streamed * each + weights.on_demand + 2 * weights.num_blocks * context_keys(config),
        streamed_bytes=streamed * weights.block + weights.on_demand + weights.num_blocks * context_keys(config),
    )


def activations(config: TransformerConfig, tokens: int, piece: int, cached_branches: int = 0) -> int:
    """Bytes of a forward pass besides weights: what stands for all tokens, and the intermediates of a piece.

    For all: the residual stream in float32, queries, keys and values in bfloat16, of which the queries' place takes
    what attention gathers, and the rotary tables. For a piece, at the widest (in the FFN): its norm as int8 and
    bfloat16, the hidden in bfloat16 and as int8, the output. A step cache ends the pass with the residual stream, the
    tokens embedded once more, and their parts.
    """
    heads = config.head_dim // 2 * 4 * 2
    for_all = tokens * (config.dim * (4 + 3 * 2) + heads)
    of_a_piece = piece * (config.ffn_dim * (2 + 1 + 2) + config.dim * (4 + 2 + 1 + 2 + 4))
    latents = 16 * 4 * 8 * tokens  # the solver's state and history, 16 channels of 4 pixels a token
    embedded_again = tokens * (config.dim * 4 * 3 + heads) if cached_branches else 0
    return max(for_all + of_a_piece, embedded_again) + latents


def residuals(config: TransformerConfig, tokens: int, branches: int) -> int:
    """Bytes of what a step cache keeps between steps, in bfloat16."""
    return branches * tokens * config.dim * 2


def context_keys(config: TransformerConfig) -> int:
    """Bytes of the keys and values of one block for one guidance branch: 512 text and 257 image tokens."""
    return (config.text_len + (257 if config.image_dim is not None else 0)) * config.dim * 2 * 2


def animation_tokens(height: int, width: int, num_frames: int) -> int:
    """Tokens of a SCAIL clip: the reference frame, the video, and the pose at half size."""
    frames = (num_frames - 1) // 4 + 1
    per_frame = height // 16 * (width // 16)
    return (1 + frames) * per_frame + frames * per_frame // 4
