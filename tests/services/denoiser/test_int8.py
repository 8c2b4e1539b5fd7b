"""Int8 arithmetic: what it computes, and how far a model that uses it is from the float one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from services.denoiser.int8 import PLAIN, Int8Tokens, TurnedInt8Linear, group_of, hadamard, rotated, use_int8
from services.denoiser.model import Linear
from services.denoiser.quantisation import block_linears, quantize_modules, quantize_state_dict, quantize_weight
from tests.services.denoiser.tiny import SCAIL, normal, predict_animation, transformer

WIDE = replace(SCAIL, dim=128, ffn_dim=192, num_heads=2)


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((output - expected).norm() / expected.norm()).detach())


def test_groups_are_powers_of_two_that_divide_the_width() -> None:
    assert [group_of(width) for width in (5120, 13824, 704, 64, 48, 3)] == [128, 128, 64, 64, 16, 1]


def test_turning_twice_gives_the_values_back_and_turning_both_sides_keeps_a_product() -> None:
    values, others = normal(3, 96), normal(4, 96, seed=1)
    torch.testing.assert_close(rotated(rotated(values, 32), 32), values)
    torch.testing.assert_close(rotated(values, 32) @ rotated(others, 32).T, values @ others.T)
    assert torch.equal(rotated(values, 1), values)
    assert torch.equal(hadamard(8, torch.device("cpu")).abs(), torch.full((8, 8), 8**-0.5))


def test_a_token_takes_all_numbers_of_its_own_scale() -> None:
    tokens = normal(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    quantised = PLAIN.quantize(tokens, 1)
    assert quantised.data.abs().amax(-1).tolist() == [127] * 5
    error = (quantised.data * quantised.scale - tokens).abs()
    assert bool((error <= quantised.scale * 0.5001).all())


def test_a_token_of_zeros_stays_zero() -> None:
    quantised = PLAIN.quantize(torch.zeros(2, 3, 8), 8)
    assert not quantised.data.any()
    assert bool((quantised.scale > 0).all())


def test_product_is_exact_in_its_integers_and_then_scaled_biased_and_activated() -> None:
    tokens = Int8Tokens(torch.full((2, 3, 5120), 127, dtype=torch.int8), torch.rand(2, 3, 1) + 0.5)
    data = torch.full((4, 5120), -127, dtype=torch.int8)
    data[1] = 1
    scale, bias = torch.rand(4) * 1e-5, normal(4)
    exact = (tokens.data.double() @ data.double().T) * tokens.scale.double() * scale.double() + bias.double()
    output = PLAIN.multiply(tokens, data, scale, bias, torch.float32, False)
    torch.testing.assert_close(output, exact.float(), rtol=1e-6, atol=1e-6)
    activated = PLAIN.multiply(tokens, data, scale, bias, torch.float32, True)
    torch.testing.assert_close(activated, F.gelu(output, approximate="tanh"))
    assert PLAIN.multiply(tokens, data, scale, None, torch.bfloat16, False).dtype == torch.bfloat16


@pytest.mark.parametrize(("outlier", "at_most"), [(1.0, 0.016), (25.0, 0.02)])
def test_turning_keeps_the_error_small_where_channels_are_outliers(outlier: float, at_most: float) -> None:
    linear = Linear(256, 64)
    tokens = normal(200, 256)
    tokens[:, ::64] *= outlier
    tokens[:, ::64] *= outlier
    expected = linear(tokens).detach()
    turned = TurnedInt8Linear(linear, PLAIN, input_is_turned=False, group=128, gelu=False)
    plain = TurnedInt8Linear(linear, PLAIN, input_is_turned=False, group=1, gelu=False)
    error = relative_error(turned(tokens), expected)
    assert error < at_most
    if outlier > 1:
        assert relative_error(plain(tokens), expected) > 1.5 * error


def test_prepared_tokens_give_what_the_layer_itself_makes_of_floats() -> None:
    layer = TurnedInt8Linear(Linear(32, 8), PLAIN, input_is_turned=False, group=32, gelu=True)
    tokens = normal(2, 3, 32)
    assert torch.equal(layer(layer.prepare(tokens)), layer(tokens))


@pytest.mark.parametrize("config", [WIDE, SCAIL], ids=["turned", "an odd head width"])
def test_a_model_in_int8_predicts_what_the_float_model_predicts(config: object) -> None:
    model = transformer(WIDE if config is WIDE else SCAIL)
    expected = predict_animation(model)
    use_int8(model)
    error = relative_error(predict_animation(model), expected)
    assert 0 < error < 0.02


def test_int8_files_are_used_as_they_are() -> None:
    model = transformer(WIDE)
    modules = block_linears(model)
    state = quantize_state_dict(model.state_dict(), modules)
    quantize_modules(model, modules)
    model.load_state_dict(
        {name: tensor for name, tensor in state.items() if "put_scale" not in name}, strict=True, assign=True
    )
    expected = predict_animation(model)
    use_int8(model)
    assert relative_error(predict_animation(model), expected) < 0.02


def test_weights_are_quantised_by_row_after_turning() -> None:
    linear = Linear(64, 5)
    layer = TurnedInt8Linear(linear, PLAIN, input_is_turned=False, group=64, gelu=False)
    data, scale = quantize_weight(rotated(linear.weight.detach(), 64))
    assert torch.equal(layer.data, data)
    assert torch.equal(layer.scale, scale.flatten())
