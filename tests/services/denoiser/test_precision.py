"""What a precision makes of a model where there is no GPU."""

import pytest
import torch

from services.denoiser.precision import EXACT, arithmetic_of, default_precision, set_precision
from tests.services.denoiser.tiny import SCAIL, predict_animation, transformer


def test_exact_changes_nothing_and_is_the_default_without_kernels() -> None:
    model = transformer(SCAIL)
    expected = predict_animation(model)
    set_precision(model, EXACT)
    assert torch.equal(predict_animation(model), expected)
    assert arithmetic_of(model) == "weights dequantised"
    assert default_precision(torch.device("cpu")) == EXACT


def test_balanced_without_kernels_computes_the_same_arithmetic_in_plain_operations() -> None:
    model = transformer(SCAIL)
    expected = predict_animation(model)
    set_precision(model, "balanced")
    predicted = predict_animation(model)
    assert arithmetic_of(model) == "int8 (plain)"
    assert not torch.equal(predicted, expected)
    torch.testing.assert_close(predicted, expected, rtol=0.1, atol=0.05)


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="exact, balanced, fast, got best"):
        set_precision(transformer(SCAIL), "best")
