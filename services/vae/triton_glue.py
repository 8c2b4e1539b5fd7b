"""The glue of `glue.py` in Triton: each line in one pass over the frames."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.vae.glue import SMALLEST_LENGTH, Sum

_NUMBERS = 4096  # that a program treats at once
_WARPS = 8


class TritonGlue:
    """On frames of a CUDA device. A `Sum` has two terms at most, or one beside taps."""

    takes_bias = True

    def normed(self, x: Sum, gamma: Tensor, out: Tensor, *, silu: bool) -> None:
        assert out.is_contiguous()
        _added_up(x, out, gamma, silu=silu)

    def total(self, x: Sum) -> Tensor:
        if x.taps is None and x.bias is None and len(x.terms) == 1:
            return x.terms[0]
        out = x.first
        if not out.is_contiguous():
            out = torch.empty_like(out, memory_format=torch.contiguous_format)
        _added_up(x, out, None, silu=False)
        return out

    def doubled(self, phases: Tensor, bias: Tensor | None, out: Tensor) -> None:
        assert phases.is_contiguous()
        assert out.is_contiguous()
        n, height, width, channels = out.shape
        positions, padded, together, programs = _tiles(n * height * width, channels)
        _doubling_kernel[(programs,)](
            phases, phases if bias is None else bias, out, positions, height, width, BIASED=bias is not None,
            CHANNELS=channels, PADDED=padded, TOGETHER=together, num_warps=_WARPS,
        )  # fmt: skip


def _added_up(x: Sum, out: Tensor, gamma: Tensor | None, *, silu: bool) -> None:
    """The sum, normed if there is a gamma, into `out`, which may be its first term."""
    taps, channels = x.taps, x.first.shape[-1]
    if taps is None:
        frames, (first, *others) = 1, [term.contiguous() for term in x.terms]
        step, (now, later, latest, carried) = channels, (first, first, first, first)
    else:
        frames, others = len(taps.now), [term.contiguous() for term in x.terms]
        step, (now, later, latest, carried) = taps.now.stride(2), (taps.now, taps.next, taps.after, taps.carried)
        assert carried.is_contiguous()
        assert all(_is_even(part, step) for part in (now, later, latest))
    assert len(others) <= 1
    positions, padded, together, programs = _tiles(out.numel() // channels // frames, channels)
    _kernel[(programs,)](
        now, later, latest, carried, others[0] if others else now, now if x.bias is None else x.bias,
        now if gamma is None else gamma, out, frames, positions, step, positions * step, positions * channels,
        channels**0.5, SMALLEST_LENGTH,
        TAPS=taps is not None, FIRST=taps is not None and taps.is_first, OTHER=bool(others), BIASED=x.bias is not None,
        NORMED=gamma is not None, SILU=silu, CHANNELS=channels, PADDED=padded, TOGETHER=together, num_warps=_WARPS,
    )  # fmt: skip


def _is_even(frames: Tensor, step: int) -> bool:
    """Whether positions [n, h, w] lie `step` numbers apart, one after the other."""
    _, h, w, _ = frames.shape
    expected = (step * w * h, step * w, step, 1)
    return all(
        size == 1 or stride == right
        for size, stride, right in zip(frames.shape, frames.stride(), expected, strict=True)
    )


def _tiles(positions: int, channels: int) -> tuple[int, int, int, int]:
    """Positions, channels up to a power of two, positions of a program, programs."""
    padded = triton.next_power_of_2(channels)
    together = max(1, _NUMBERS // padded)
    return positions, padded, together, triton.cdiv(positions, together)


@triton.jit
def _kernel(
    now, later, latest, carried, other, bias, gamma, out, frames, positions, step, step_of_frame, size_of_frame,
    scale, smallest, TAPS: tl.constexpr, FIRST: tl.constexpr, OTHER: tl.constexpr, BIASED: tl.constexpr,
    NORMED: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Goes through the frames of some positions; what one adds to the next two stays in registers in between."""
    position = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    channel = tl.arange(0, PADDED)
    present = channel < CHANNELS
    inside = (position < positions)[:, None] & present[None, :]
    place = position[:, None] * CHANNELS + channel[None, :]
    product = position[:, None] * step + channel[None, :]
    next_one = tl.zeros([TOGETHER, PADDED], tl.float32)
    after_it = tl.zeros([TOGETHER, PADDED], tl.float32)
    if TAPS and not FIRST:
        next_one += tl.load(carried + place, mask=inside, other=0.0).to(tl.float32)
        after_it += tl.load(carried + size_of_frame + place, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        shift = tl.load(bias + channel, mask=present, other=0.0).to(tl.float32)
    if NORMED:
        factor = tl.load(gamma + channel, mask=present, other=0.0).to(tl.float32) * scale
    for frame in range(frames):
        at = tl.cast(frame, tl.int64)
        values = tl.load(now + at * step_of_frame + product, mask=inside, other=0.0).to(tl.float32)
        if TAPS:
            values += next_one
            next_one = after_it + tl.load(later + at * step_of_frame + product, mask=inside, other=0.0).to(tl.float32)
            after_it = tl.load(latest + at * step_of_frame + product, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            values += shift[None, :]
        if OTHER:
            values += tl.load(other + at * size_of_frame + place, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            values = tl.where(inside, values, 0.0)
            length = tl.maximum(tl.sqrt(tl.sum(values * values, axis=1)), smallest)
            values = values / length[:, None] * factor[None, :]
        if SILU:
            values = values / (1.0 + tl.exp(-values))
        tl.store(out + at * size_of_frame + place, values.to(out.dtype.element_ty), mask=inside)
    if TAPS:
        tl.store(carried + place, next_one.to(carried.dtype.element_ty), mask=inside)
        tl.store(carried + size_of_frame + place, after_it.to(carried.dtype.element_ty), mask=inside)


@triton.jit
def _doubling_kernel(
    phases, bias, out, positions, height, width,
    BIASED: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Each position of a larger frame fetches its phase."""
    position = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    channel = tl.arange(0, PADDED)
    present = channel < CHANNELS
    inside = (position < positions)[:, None] & present[None, :]
    column, line = position % width, position // width
    row, frame = line % height, line // height
    lines = (frame * (height // 2 + 1) + (row + 1) // 2).to(tl.int64)
    source = (lines * (width // 2 + 1) + (column + 1) // 2) * 4 + row % 2 * 2 + column % 2
    values = tl.load(phases + source[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
    if BIASED:
        values = values.to(tl.float32) + tl.load(bias + channel, mask=present, other=0.0).to(tl.float32)[None, :]
    place = position.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)


TRITON = TritonGlue()
