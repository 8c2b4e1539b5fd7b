"""Sums and norms between convolutions: PyTorch's against plain formulas, Triton's against PyTorch's on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from services.vae.glue import PLAIN, Sum
from services.vae.model import RMSNorm


def summed(terms: int, channels: int, dtype: torch.dtype, device: str = "cpu", *, biased: bool) -> Sum:
    generator = torch.Generator().manual_seed(terms)
    parts = [torch.randn(2, 5, 3, channels, generator=generator).to(device, dtype) for _ in range(terms)]
    return Sum(tuple(parts), torch.randn(channels, generator=generator).to(device, dtype) if biased else None)


def copied(x: Sum) -> Sum:
    return Sum(tuple(term.clone() for term in x.terms), x.bias)


def truth(x: Sum) -> Tensor:
    total = torch.stack([term.double() for term in x.terms]).sum(dim=0)
    return total if x.bias is None else total + x.bias.double()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("terms", [1, 3, 4])
def test_terms_and_bias_are_added_up(terms: int, biased: bool) -> None:
    x = summed(terms, 6, torch.float32, biased=biased)
    expected = truth(x)
    torch.testing.assert_close(PLAIN.total(x).double(), expected, rtol=1e-6, atol=1e-6)


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


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and Triton"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [3, 96, 384, 1024])
@pytest.mark.parametrize("terms", [1, 3, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_kernels_give_the_numbers_of_the_plain_glue(
    dtype: torch.dtype, channels: int, terms: int, biased: bool
) -> None:
    from services.vae.triton_glue import TRITON

    x = summed(terms, channels, dtype, "cuda", biased=biased)
    eps, expected = torch.finfo(dtype).eps, truth(x).to(dtype)
    torch.testing.assert_close(TRITON.total(copied(x)), expected, rtol=4 * eps, atol=8 * eps)
    gamma = torch.randn(channels, device="cuda").to(dtype)
    for silu in (False, True):
        ours, plain = torch.empty_like(expected), torch.empty_like(expected)
        TRITON.normed(copied(x), gamma, ours, silu=silu)
        PLAIN.normed(Sum((truth(x).float(),)), gamma, plain, silu=silu)
        torch.testing.assert_close(ours, plain, rtol=8 * eps, atol=16 * eps)
