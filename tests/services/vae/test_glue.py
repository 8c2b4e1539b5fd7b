"""Sums and norms between convolutions: PyTorch's against plain formulas, Triton's against PyTorch's on a GPU."""

from __future__ import annotations

import importlib.util
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from services.vae.glue import PLAIN, Glue, Sum, Taps
from services.vae.model import RMSNorm


def summed(terms: int, channels: int, dtype: torch.dtype, device: str = "cpu", *, biased: bool) -> Sum:
    generator = torch.Generator().manual_seed(terms)
    parts = [torch.randn(2, 5, 3, channels, generator=generator).to(device, dtype) for _ in range(terms)]
    return Sum(tuple(parts), torch.randn(channels, generator=generator).to(device, dtype) if biased else None)


def apart(
    n: int, channels: int, dtype: torch.dtype, device: str = "cpu", *, is_first: bool, stacked: bool, others: int
) -> Sum:
    """Products of three taps, each a tensor of its own, or stacked in one beside channels that only fill up."""
    generator = torch.Generator().manual_seed(n)
    if stacked:
        products = torch.randn(n, 5, 3, 3 * channels + 2, generator=generator).to(device, dtype)
        parts = [products[..., tap * channels : (tap + 1) * channels] for tap in range(3)]
    else:
        parts = list(torch.randn(3, n, 5, 3, channels, generator=generator).to(device, dtype))
    carried = torch.randn(2, 5, 3, channels, generator=generator).to(device, dtype)
    terms = torch.randn(others, n, 5, 3, channels, generator=generator).to(device, dtype)
    return Sum(
        tuple(terms),
        torch.randn(channels, generator=generator).to(device, dtype),
        Taps(parts[0], parts[1], parts[2], carried, is_first),
    )


def truth(x: Sum) -> Tensor:
    parts = [term.double() for term in x.terms]
    if x.taps is not None:
        parts.append(carried_on(x.taps)[: len(x.taps.now)])
    total = torch.stack(parts).sum(dim=0)
    return total if x.bias is None else total + x.bias.double()


def carried_on(taps: Taps) -> Tensor:
    """What is added up for the frames of the taps, and for two more."""
    n = len(taps.now)
    frames = [torch.zeros_like(taps.now[0]).double() for _ in range(n + 2)]
    for frame in range(2):
        frames[frame] += 0 if taps.is_first else taps.carried[frame]
    for frame in range(n):
        for later, products in enumerate((taps.now, taps.next, taps.after)):
            frames[frame + later] += products[frame]
    return torch.stack(frames)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("terms", [1, 3, 4])
def test_terms_and_bias_are_added_up(terms: int, biased: bool) -> None:
    x = summed(terms, 6, torch.float32, biased=biased)
    expected = truth(x)
    torch.testing.assert_close(PLAIN.total(x).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_taps_are_put_together_and_carried_on(n: int, is_first: bool, stacked: bool) -> None:
    x = apart(n, 6, torch.float64, is_first=is_first, stacked=stacked, others=1)
    expected, rest = truth(x), carried_on(x.taps)[n:] if x.taps else None
    torch.testing.assert_close(PLAIN.total(x), expected)
    assert x.taps is not None
    torch.testing.assert_close(x.taps.carried, rest)


def test_phases_become_even_and_odd_rows_and_columns() -> None:
    phases, bias = torch.randn(2, 4, 6, 4 * 3), torch.randn(3)
    doubled, unbiased = torch.empty(2, 2, 6, 10, 3)
    PLAIN.doubled(phases, bias, doubled)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (4, 5), (5, 4), (5, 9)):
        phase = 2 * (row % 2) + column % 2
        source = phases[:, (row + 1) // 2, (column + 1) // 2, 3 * phase : 3 * phase + 3]
        torch.testing.assert_close(doubled[:, row, column], source + bias)
    PLAIN.doubled(phases, None, unbiased)
    torch.testing.assert_close(unbiased + bias, doubled)


@pytest.mark.parametrize("silu", [False, True])
def test_norm_is_that_of_the_module_and_leaves_a_single_term_alone(silu: bool) -> None:
    x = summed(1, 6, torch.float32, biased=False)
    x.terms[0][0, 0, 0] = 0  # stays 0
    before = x.terms[0].clone()
    module = RMSNorm(6).requires_grad_(False)
    module.gamma[:] = torch.arange(6.0).view(6, 1, 1, 1) - 2
    expected = module(before.permute(3, 0, 1, 2)[None])[0].permute(1, 2, 3, 0)
    out = torch.empty_like(before)
    PLAIN.normed(x, module.gamma.flatten(), out, silu=silu)
    torch.testing.assert_close(out, torch.nn.functional.silu(expected) if silu else expected)
    assert torch.equal(x.terms[0], before)


def test_norm_of_half_precision_does_not_overflow() -> None:
    out = torch.empty(1, 1, 1, 4, dtype=torch.float16)
    PLAIN.normed(Sum((torch.full((1, 1, 1, 4), 1000.0).half(),)), torch.ones(4).half(), out, silu=False)
    assert out.flatten().tolist() == [1.0] * 4


gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and Triton"
)


def triton() -> Glue:
    from services.vae.triton_glue import TRITON

    return TRITON


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [3, 96, 384, 1024])
@pytest.mark.parametrize("terms", [1, 2, "taps", "first taps", "stacked taps"])
@pytest.mark.parametrize("biased", [False, True])
def test_kernels_give_the_numbers_of_the_plain_glue(
    dtype: torch.dtype, channels: int, terms: int | str, biased: bool
) -> None:
    if isinstance(terms, int):
        x = summed(terms, channels, dtype, "cuda", biased=biased)
    else:
        options = {"is_first": "first" in terms, "stacked": "stacked" in terms, "others": int(biased)}
        x = apart(4, channels, dtype, "cuda", **options)  # type: ignore[arg-type]
    eps, expected = torch.finfo(dtype).eps, truth(x).to(dtype)
    ours = deepcopy(x)
    torch.testing.assert_close(triton().total(ours), expected, rtol=4 * eps, atol=8 * eps)
    if x.taps is not None:
        assert ours.taps is not None
        torch.testing.assert_close(ours.taps.carried, carried_on(x.taps)[4:].to(dtype), rtol=4 * eps, atol=8 * eps)
    gamma = torch.randn(channels, device="cuda").to(dtype)
    for silu in (False, True):
        normed, plain = torch.empty_like(expected), torch.empty_like(expected)
        triton().normed(deepcopy(x), gamma, normed, silu=silu)
        PLAIN.normed(Sum((truth(x).float(),)), gamma, plain, silu=silu)
        torch.testing.assert_close(normed, plain, rtol=8 * eps, atol=16 * eps)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("channels", [3, 96, 384])
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_doubles_as_the_plain_glue(channels: int, biased: bool) -> None:
    phases = torch.randn(2, 6, 4, 4 * channels, device="cuda").half()
    bias = torch.randn(channels, device="cuda").half() if biased else None
    ours, plain = torch.empty(2, 2, 10, 6, channels, device="cuda").half()
    triton().doubled(phases, bias, ours)
    PLAIN.doubled(phases, bias, plain)
    torch.testing.assert_close(ours, plain, rtol=2e-3, atol=2e-3)
