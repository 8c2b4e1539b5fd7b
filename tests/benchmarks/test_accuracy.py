"""The reference is float32 of the very weights, the weights have outliers, and errors are measured against the right ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy import BF16, INT8, Bench, in_float32, int8_checkpoint, relative, twin, with_rounded_stream
from benchmarks.outliers import HIDDEN_FACTOR, INPUT_FACTOR, RESIDUAL_FACTOR, Moments, outlier_model
from services.denoiser.model import PRESETS, Block, DiffusionTransformer, Linear
from services.denoiser.quantisation import Int8Linear

CPU = torch.device("cpu")
CONFIG = replace(
    PRESETS["scail-14b"], dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=16, text_len=8, image_dim=16
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


@pytest.fixture
def model() -> DiffusionTransformer:
    return outlier_model(CONFIG, CPU)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("benchmarks.accuracy.SIDE", 64)
    return Bench(CONFIG, CPU, 5, 2)


def velocity(bench: Bench, model: DiffusionTransformer) -> Tensor:
    return bench.velocity(model, bench.prompt.prompt_embeds)


def ffn(model: DiffusionTransformer, block: int, layer: int) -> Linear:
    linear = model.get_submodule(f"blocks.{block}.ffn.{layer}")
    assert isinstance(linear, Linear)
    return linear


def all_in_float32(model: DiffusionTransformer) -> DiffusionTransformer:
    """The same weights held in float32, as nothing as large as 14B could be."""
    return twin(model, "math").float()


def test_the_reference_computes_what_float32_weights_compute(bench: Bench, model: DiffusionTransformer) -> None:
    expected = velocity(bench, all_in_float32(model))
    torch.testing.assert_close(velocity(bench, in_float32(model)), expected, rtol=0, atol=1e-6)
    assert relative(velocity(bench, model), expected) > 1e-4


def test_the_reference_of_int8_weights_is_theirs(bench: Bench, model: DiffusionTransformer) -> None:
    quantized = int8_checkpoint(model)
    linear, rounded = ffn(model, 1, 0), quantized.get_submodule("blocks.1.ffn.0")
    assert isinstance(rounded, Int8Linear)
    assert 1e-3 < relative(rounded.weight(), linear.weight) < 0.05
    of_int8, of_bf16 = velocity(bench, in_float32(quantized)), velocity(bench, in_float32(model))
    assert relative(velocity(bench, quantized), of_int8) < relative(of_bf16, of_int8)


def test_weights_are_as_they_were_after_a_reference(bench: Bench, model: DiffusionTransformer) -> None:
    truth, before = in_float32(model), velocity(bench, model)
    velocity(bench, truth)
    assert ffn(truth, 0, 0).weight.dtype == torch.bfloat16
    assert torch.equal(velocity(bench, model), before)


def test_a_twin_can_be_changed_alone(bench: Bench, model: DiffusionTransformer) -> None:
    before = velocity(bench, model)
    for precision in ("balanced", "fast"):
        assert not torch.equal(velocity(bench, bench.at(model, precision)), before)
    assert torch.equal(velocity(bench, model), before)


def test_a_block_alone_is_measured_on_the_reference_s_tokens(bench: Bench, model: DiffusionTransformer) -> None:
    reference = bench.reference(in_float32(model), lambda norm: None)
    own, stream = bench.block_errors(in_float32(model), reference)
    assert max(own + stream) < 1e-5
    # a wrong first block leaves the second one's own error as it was
    wrong = twin(model)
    last = ffn(wrong, 0, 2)
    last.bias = nn.Parameter(last.bias + 1, requires_grad=False)
    own, stream = bench.block_errors(wrong, reference)
    right, _ = bench.block_errors(twin(model), reference)
    assert own[0] > 10 * right[0]
    assert own[1] == pytest.approx(right[1])
    assert stream[1] > 0.01


def test_a_rounded_stream_is_one_of_bfloat16(bench: Bench, model: DiffusionTransformer) -> None:
    for tokens in list(bench.passed(with_rounded_stream(model)))[1:]:
        assert torch.equal(tokens, tokens.bfloat16().float())


def test_every_way_gets_a_row_and_bfloat16_is_the_yardstick(bench: Bench, model: DiffusionTransformer) -> None:
    document = bench.run(model)
    rows = {(row["weights"], row["what"]): row for row in document["rows"]}
    assert rows[BF16, "bf16"]["ratio"] == rows[INT8, "exact"]["ratio"] == 1
    balanced = rows[BF16, "balanced"]
    assert balanced["ratio"] == pytest.approx(balanced["latents"] / rows[BF16, "bf16"]["latents"])
    assert balanced["own_mean"] > rows[BF16, "bf16"]["own_mean"]
    assert [row["latents"] for row in document["rows"] if row["what"] == "float32"] == [None, None]
    assert len(document["norms"]) == 2
    assert document["activations"]["hidden"]["peak"] > 20


def test_outliers_are_where_they_should_be(bench: Bench, model: DiffusionTransformer) -> None:
    stream = next(bench.passed(model))[0]
    sizes = stream.square().mean(dim=0).sqrt().sort(descending=True).values
    assert sizes[3] > RESIDUAL_FACTOR / 2 > 5 * sizes[4]
    block = model.blocks[0]
    assert isinstance(block, Block)
    table = block.modulation
    assert [int((table[0, row] > INPUT_FACTOR / 2).sum()) for row in range(6)] == [0, 8, 0, 0, 8, 0]
    rows = ffn(model, 0, 0).weight.float().square().mean(dim=1).sqrt().sort(descending=True).values
    assert rows[20] > HIDDEN_FACTOR / 2 * rows[21]


def test_moments_are_those_of_the_numbers() -> None:
    moments = Moments()
    moments.add(torch.tensor([1.0, -1.0]))
    moments.add(torch.tensor([[1.0], [-3.0]]))
    row = moments.row()
    assert row["kurtosis"] == pytest.approx((3 + 81) / 4 / 3**2)
    assert row["peak"] == pytest.approx(3 / 3**0.5)
