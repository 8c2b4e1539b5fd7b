"""The glue of `glue.py` in Triton: each line in one pass over the frames."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from services.vae.glue import SMALLEST_LENGTH, Sum

_NUMBERS = 4096  # that a program treats at once
_WARPS = 8
_MOST_TERMS = 4


class TritonGlue:
    """On frames of a CUDA device."""

    takes_bias = True

    def normed(self, x: Sum, gamma: Tensor, out: Tensor, *, silu: bool) -> None:
        assert out.is_contiguous()
        positions, channels, padded, together, programs = _tiles(out)
        _norm_kernel[(programs,)](
            *_four(x), gamma if x.bias is None else x.bias, gamma, out, positions, channels**0.5, SMALLEST_LENGTH,
            TERMS=len(x.terms), BIASED=x.bias is not None, SILU=silu,
            CHANNELS=channels, PADDED=padded, TOGETHER=together, num_warps=_WARPS,
        )  # fmt: skip

    def total(self, x: Sum) -> Tensor:
        if len(x.terms) == 1 and x.bias is None:
            return x.terms[0]
        four = _four(x)
        positions, channels, padded, together, programs = _tiles(four[0])
        _sum_kernel[(programs,)](
            *four, four[0] if x.bias is None else x.bias, positions, TERMS=len(x.terms), BIASED=x.bias is not None,
            CHANNELS=channels, PADDED=padded, TOGETHER=together, num_warps=_WARPS,
        )  # fmt: skip
        return four[0]


def _tiles(frames: Tensor) -> tuple[int, int, int, int, int]:
    """Positions, channels, channels up to a power of two, positions of a program, programs."""
    channels = frames.shape[-1]
    positions, padded = frames.numel() // channels, triton.next_power_of_2(channels)
    together = max(1, _NUMBERS // padded)
    return positions, channels, padded, together, triton.cdiv(positions, together)


def _four(x: Sum) -> list[Tensor]:
    """As many contiguous terms as the kernels take; the first stands where there is none."""
    assert len(x.terms) <= _MOST_TERMS
    terms = [term if term.is_contiguous() else term.contiguous() for term in x.terms]
    return terms + terms[:1] * (_MOST_TERMS - len(terms))


@triton.jit
def _places(positions, CHANNELS: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr):
    """Of the program's tile [TOGETHER, PADDED]: offsets, what of them exists, the channels, which of these exist."""
    position = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    channel = tl.arange(0, PADDED)
    present = channel < CHANNELS
    return (
        position[:, None] * CHANNELS + channel[None, :],
        (position < positions)[:, None] & present[None, :],
        channel,
        present,
    )


@triton.jit
def _added_up(a, b, c, d, bias, place, inside, channel, present, TERMS: tl.constexpr, BIASED: tl.constexpr):
    values = tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
    if TERMS > 1:
        values += tl.load(b + place, mask=inside, other=0.0).to(tl.float32)
    if TERMS > 2:
        values += tl.load(c + place, mask=inside, other=0.0).to(tl.float32)
    if TERMS > 3:
        values += tl.load(d + place, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        values += tl.load(bias + channel, mask=present, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def _norm_kernel(
    a, b, c, d, bias, gamma, out, positions, scale, smallest, TERMS: tl.constexpr, BIASED: tl.constexpr,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """RMSNorm of the sum, and SiLU."""
    place, inside, channel, present = _places(positions, CHANNELS, PADDED, TOGETHER)
    values = _added_up(a, b, c, d, bias, place, inside, channel, present, TERMS, BIASED)
    length = tl.maximum(tl.sqrt(tl.sum(values * values, axis=1)), smallest)
    factor = tl.load(gamma + channel, mask=present, other=0.0).to(tl.float32) * scale
    values = values / length[:, None] * factor[None, :]
    if SILU:
        values = values / (1.0 + tl.exp(-values))
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    a, b, c, d, bias, positions, TERMS: tl.constexpr, BIASED: tl.constexpr,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """a = the sum, in place."""
    place, inside, channel, present = _places(positions, CHANNELS, PADDED, TOGETHER)
    values = _added_up(a, b, c, d, bias, place, inside, channel, present, TERMS, BIASED)
    tl.store(a + place, values.to(a.dtype.element_ty), mask=inside)


TRITON = TritonGlue()
