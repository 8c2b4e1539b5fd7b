"""How a transformer fits into a number of bytes on the device: what stays there, what is streamed, how long a piece.

Everything is counted, activations too; the count is an upper bound, checked against the device in benchmarks/memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.budget import DoesNotFit
from services.denoiser.model import TransformerConfig

GIB = 1024**3
# Tokens that are treated at once, best first. With these the tiles of the int8 products, 128 tokens high, fill the 132
# processors of an H100 evenly; those of 2048 tokens take a quarter longer for each token, those of 1024 three quarters.
PIECES = (16896, 4224, 2432, 1664, 768)
_PLACES = 2  # streaming.PLACES: the block that computes and the next
# The driver's own: the CUDA context and loaded kernels. 0.74 GiB on an H100 after a forward pass
DEVICE_OVERHEAD_BYTES = 800 * 1024**2
# The allocator's besides what is counted: the workspace of cuBLAS (32 MiB), gaps between tensors (61 MiB were seen), inputs
_GAPS_BYTES = 160 * 1024**2
_BRANCHES = 2  # of guidance


@dataclass(frozen=True)
class Weights:
    """Bytes of a loaded transformer, as the device would hold them, and how it computes with them."""

    block: int  # of the largest block, without what computes once per request
    context: int  # of a block's linears that compute once per request
    context_linear: int  # of the largest of these, which come one by one, and of what it is dequantised to
    rest: int  # outside the blocks, always on the device
    on_demand: int  # the largest part outside the blocks that comes for a call
    on_demand_together: int  # all of these parts
    each_step: int  # those of them that come in each forward pass
    dequantised: int  # of what the largest of the other int8 weights become before they are multiplied, if they do
    num_blocks: int
    is_fused: bool  # whether norms, gates and rotary positions are kernels without intermediates


@dataclass(frozen=True)
class MemoryPlan:
    """What `plan_memory` decided."""

    resident: int  # blocks that stay on the device
    is_whole: bool  # everything stays, what computes once per request or step too
    tokens_at_once: int  # of the token-wise parts; 0: all
    device_bytes: int  # the peak, the driver's own included
    host_bytes: int  # pinned for good
    streamed_bytes: int  # host to device in each forward pass
    disk_bytes: int = 0  # with an offload folder, in which all blocks are before some go to the device
    host_bytes_with_disk: int = 0  # pinned then
    loading_host_bytes: int = 0  # without one, while loading: blocks that go to the device pass through host memory

    @property
    def most_host_bytes(self) -> int:
        """What a host must have room for, without an offload folder."""
        return max(self.host_bytes, self.loading_host_bytes)

    def words(self, num_blocks: int) -> str:
        """What a log says of it, of a transformer of so many blocks."""
        pieces = f", {self.tokens_at_once} tokens at once" if self.tokens_at_once else ""
        streamed = f", {self.streamed_bytes / GIB:.1f} GiB streamed in each pass" if self.streamed_bytes else ""
        there = f"{self.resident} of {num_blocks} blocks on the device"
        return f"{there}{pieces}{streamed}, {self.device_bytes / GIB:.2f} GiB"


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
    for piece in (tokens, *_shorter_pieces(tokens)[:2]):  # long pieces cost less than streaming
        needed = _whole(weights, config, tokens, piece, cached_branches)
        if budget is None or needed <= budget:
            loading = 0 if budget is None else _through_the_host(weights)
            at_once = 0 if piece == tokens else piece
            return MemoryPlan(weights.num_blocks, True, at_once, needed, 0, 0, loading_host_bytes=loading)
    assert budget is not None
    for piece in _shorter_pieces(tokens):
        beside = _beside_blocks(weights, config, tokens, piece, cached_branches)
        if beside + weights.num_blocks * weights.block <= budget:
            return _streamed(weights, config, piece, beside, weights.num_blocks)
        needed = beside + _places(weights)
        if needed <= budget:
            resident = min((budget - needed) // weights.block, max(0, weights.num_blocks - _PLACES))
            return _streamed(weights, config, piece, needed, resident)
    needed = least_bytes(weights, config, tokens, cached_branches)
    raise DoesNotFit(
        f"{tokens} tokens need {needed / GIB:.2f} GiB with every block streamed and the shortest pieces; "
        f"the budget is {budget / GIB:.2f} GiB"
    )


def least_bytes(weights: Weights, config: TransformerConfig, tokens: int, cached_branches: int = 0) -> int:
    """The smallest budget that there is a plan for: every block streamed, the shortest pieces."""
    piece = _shorter_pieces(tokens)[-1]
    return _beside_blocks(weights, config, tokens, piece, cached_branches) + _places(weights)


def _shorter_pieces(tokens: int) -> list[int]:
    return [piece for piece in PIECES if piece < tokens] or [tokens]


def _through_the_host(weights: Weights) -> int:
    """Bytes of all that is in host memory before it is decided what goes to the device."""
    return weights.num_blocks * (weights.block + weights.context) + weights.on_demand_together


def _places(weights: Weights) -> int:
    return min(_PLACES, weights.num_blocks) * weights.block


def _whole(weights: Weights, config: TransformerConfig, tokens: int, piece: int, cached_branches: int) -> int:
    """Bytes with all weights on the device, and the keys and values of the context."""
    each = weights.block + weights.context + _BRANCHES * context_keys(config)
    return (
        weights.num_blocks * each
        + weights.rest
        + weights.on_demand_together
        + activations(weights, config, tokens, piece, cached_branches)
        + residuals(config, tokens, cached_branches)
        + DEVICE_OVERHEAD_BYTES
        + _GAPS_BYTES
    )


def _beside_blocks(weights: Weights, config: TransformerConfig, tokens: int, piece: int, cached_branches: int) -> int:
    """Bytes where blocks are streamed, without them: all else comes when it is called."""
    return (
        # the timestep's projection comes and goes before there are tokens
        max(activations(weights, config, tokens, piece, cached_branches) + context_keys(config), weights.on_demand)
        + weights.rest
        + residuals(config, tokens, cached_branches)
        + DEVICE_OVERHEAD_BYTES
        + _GAPS_BYTES
    )


def _streamed(weights: Weights, config: TransformerConfig, piece: int, needed: int, resident: int) -> MemoryPlan:
    streamed = weights.num_blocks - resident
    keys = weights.num_blocks * context_keys(config)
    context = weights.num_blocks * weights.context
    beside = weights.on_demand_together + _BRANCHES * keys
    return MemoryPlan(
        resident=resident,
        is_whole=False,
        tokens_at_once=piece,
        device_bytes=needed + resident * weights.block,
        host_bytes=streamed * weights.block + context + beside,
        streamed_bytes=streamed * weights.block + weights.each_step + keys,
        disk_bytes=weights.num_blocks * weights.block + context,
        host_bytes_with_disk=_PLACES * weights.block + beside,
        loading_host_bytes=_through_the_host(weights),
    )


def activations(weights: Weights, config: TransformerConfig, tokens: int, piece: int, cached_branches: int = 0) -> int:
    """Bytes of a forward pass besides what stays: what stands for all tokens, and the intermediates of a piece.

    For all: the residual stream in float32; queries, keys and values in bfloat16, of which the queries' place takes
    what attention gathers and the others go before the block's second half; and the rotary tables. For a piece, fused:
    its queries, keys and values once more while they are made, and the norm as int8; in the second half the hidden in
    bfloat16 and as int8, and at a request's first step what makes keys and values of the context. Not fused: float32
    intermediates of each. A step cache ends the pass
    with the residual stream, the tokens embedded once more, and their parts.
    """
    wide, hidden = config.dim, config.ffn_dim
    first, second = (7 * wide + 64, 3 * hidden + wide) if weights.is_fused else (28 * wide, 5 * hidden + 13 * wide)
    tables = config.head_dim // 2 * 4 * 2
    if piece < tokens:
        context = weights.context_linear + context_keys(config)
        at_once = max(tokens * 6 * wide + piece * first, tokens * 2 * wide + piece * second + context)
    else:  # `Block.forward` keeps queries, keys and values to the end
        at_once = tokens * (8 * wide + second)
    latents = 16 * 4 * 8 * tokens  # the solver's state and history, 16 channels of 4 pixels a token
    embedded_again = tokens * (wide * 4 * 3 + tables) if cached_branches else 0
    return max(tokens * (4 * wide + tables) + at_once + weights.dequantised, embedded_again) + latents


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
