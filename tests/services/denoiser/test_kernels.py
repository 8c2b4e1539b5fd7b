"""The Triton kernels against the operations of PyTorch that they stand for, on a GPU."""

import pytest
import torch
from torch import Tensor

from services.denoiser import glue
from services.denoiser.fp8_attention import FP8, Fp8Tokens
from services.denoiser.glue import Affine, Gate
from services.denoiser.int8 import PLAIN, Arithmetic, Int8Tokens, TurnedInt8Linear
from services.denoiser.model import Linear
from services.denoiser.precision import has_kernels
from services.denoiser.rope import Rope

DEVICE = torch.device("cuda:0")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not has_kernels(DEVICE), reason="needs a Hopper GPU and Triton"
    ),
]
B, L, D = 2, 5, 384


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def triton_arithmetic() -> Arithmetic:
    from services.denoiser.triton_int8 import TritonArithmetic

    return TritonArithmetic()


def triton_glue() -> glue.Glue:
    from services.denoiser.triton_glue import TRITON

    return TRITON


def assert_same_numbers(ours: glue.Prepared, expected: glue.Prepared) -> None:
    """Scales alike; int8 numbers alike but where a number lies between two."""
    assert isinstance(ours, Int8Tokens)
    assert isinstance(expected, Int8Tokens)
    torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-5, atol=0)
    steps = (ours.data.int() - expected.data.int()).abs()
    assert int(steps.max()) <= 1
    assert float((steps != 0).float().mean()) < 0.01


@pytest.mark.parametrize("group", [1, 8, 32, 128])
def test_tokens_are_quantised_to_the_same_numbers(group: int) -> None:
    tokens = random(B, L, D, dtype=torch.bfloat16)
    assert_same_numbers(triton_arithmetic().quantize(tokens, group), PLAIN.quantize(tokens, group))
    also = random(B, L, D, dtype=torch.bfloat16)
    assert_same_numbers(triton_arithmetic().quantize(tokens, group, also), PLAIN.quantize(tokens, group, also))


def test_what_8_bit_attention_gathered_is_quantised_to_the_same_numbers() -> None:
    data = (random(B, L, D) * 20).clamp(-448, 448).to(FP8)
    tokens = Fp8Tokens(data, torch.rand(1, device=DEVICE), random(D) * 10)
    ours, expected = triton_arithmetic().quantize(tokens, 1), PLAIN.quantize(tokens, 1)
    assert ours.data.shape == expected.data.shape
    assert_same_numbers(ours, expected)
    some = tokens.tokens(slice(1, 3))
    assert_same_numbers(triton_arithmetic().quantize(some, 1), PLAIN.quantize(some, 1))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("k", "n"), [(384, 272), (256, 640)])
def test_products_are_the_same(k: int, n: int, gelu: bool) -> None:
    tokens = PLAIN.quantize(random(B, 37, k), 1)
    data = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
    scale, bias = torch.rand(n, device=DEVICE), random(n, dtype=torch.bfloat16)
    ours = triton_arithmetic().multiply(tokens, data, scale, bias, torch.bfloat16, gelu)
    expected = PLAIN.multiply(tokens, data, scale, bias, torch.bfloat16, gelu)
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("rows", [(B, L), (B, 1), (1, 1), (1, L)], ids=str)
def test_norms_are_the_same(rows: tuple[int, int]) -> None:
    tokens, row = random(B, L, D), torch.randint(0, 3, rows, device=DEVICE)
    shift, scale = random(2, 3, D)
    ours, plain = both(Linear(D, 64).to(DEVICE))
    affine = Affine(1e-6, scale, shift, row, plus=1)
    assert_same_numbers(triton_glue().normed(tokens, affine, ours), glue.PLAIN.normed(tokens, affine, plain))


@pytest.mark.parametrize("rows", [(B, L), (B, 1), (1, 1), (1, L)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width", [256, 512])
def test_products_are_added_alike(rows: tuple[int, int], gated: bool, width: int) -> None:
    tokens, inputs = random(B, L, D), random(B, L, width, dtype=torch.bfloat16)
    count = 1 if rows == (1, 1) else 3
    row = torch.randint(0, count, rows, device=DEVICE)
    gate = Gate(random(count, D) if gated else None, row)
    linear = Linear(width, D).to(DEVICE)
    for linears in (both(linear), (linear.bfloat16(),) * 2):
        expected = glue.PLAIN.add(tokens, linears[1], inputs, gate)
        ours = triton_glue().add(tokens.clone(), linears[0], inputs, gate)
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=2**-6)


def both(linear: Linear) -> tuple[TurnedInt8Linear, TurnedInt8Linear]:
    """The layer in int8, by kernels and without."""
    ours, plain = (
        TurnedInt8Linear(linear, arithmetic, input_is_turned=False, group=128, gelu=False)
        for arithmetic in (triton_arithmetic(), PLAIN)
    )
    return ours, plain


def test_norms_for_a_layer_in_bfloat16_are_the_same() -> None:
    tokens, row = random(B, L, D), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    affine = Affine(1e-6, random(1, D), random(1, D), row, plus=0)
    linear = Linear(D, 64).to(DEVICE, torch.bfloat16)
    ours = triton_glue().normed(tokens, affine, linear)
    expected = glue.PLAIN.normed(tokens, affine, linear)
    assert isinstance(ours, Tensor)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("turned", [True, False])
def test_queries_are_normed_and_turned_alike(turned: bool) -> None:
    projected, weight, angles = random(B, L, D, dtype=torch.bfloat16), random(D), random(L, D // 12)
    rope = Rope(angles.cos(), angles.sin()) if turned else None
    norm = glue.HeadNorm(1e-6, weight, 6)
    torch.testing.assert_close(triton_glue().turn(projected, norm, rope), glue.PLAIN.turn(projected, norm, rope))
