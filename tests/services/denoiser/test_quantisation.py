"""Int8 weights: exact in their file, close in their numbers, refused where they make no sense."""

import base64
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from runtime.weights import CheckpointMismatch, read_metadata
from services.denoiser.model import Linear
from services.denoiser.quantisation import (
    Int8Linear,
    block_linears,
    check_quantization,
    quantize_modules,
    quantize_state_dict,
    quantize_weight,
    write_quanto,
)
from tests.services.denoiser.tiny import SCAIL, normal, transformer


def header(modules: object) -> dict[str, str]:
    return {"quantization_map_base64": base64.b64encode(json.dumps(modules).encode()).decode()}


def quantized(dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], list[str]]:
    """A tiny SCAIL checkpoint with its blocks quantised, and the modules."""
    model = transformer(SCAIL)
    modules = block_linears(model)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    return quantize_state_dict(state, modules), modules


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_dequantised_weights_are_within_half_a_step(seed: int, dtype: torch.dtype) -> None:
    weight = normal(5, 9, seed=seed).to(dtype)
    data, scale = quantize_weight(weight)
    error = (data.float() * scale.float() - weight.float()).abs()
    rounding = torch.finfo(dtype).eps * 127  # the quotient and the scale are rounded to the dtype themselves
    assert bool((error <= scale.float() * (0.5 + rounding) + 1e-12).all())
    assert bool((data.int().abs().amax(1) >= 126).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_stay_zeros(dtype: torch.dtype) -> None:
    weight = normal(3, 8).to(dtype)
    weight[1] = 0
    weight[2] = torch.finfo(dtype).smallest_normal / 2**6  # its scale rounds to nothing in float16
    data, scale = quantize_weight(weight)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    assert not data[1].any()
    torch.testing.assert_close((data.to(dtype) * scale)[1:], weight[1:], rtol=0.01, atol=2e-6)


def test_weights_that_are_not_finite_are_refused() -> None:
    for value in (torch.nan, torch.inf):
        weight = normal(2, 4)
        weight[0, 1] = value
        with pytest.raises(ValueError, match="must be finite"):
            quantize_weight(weight)


def test_int8_linear_computes_with_the_dequantised_weights() -> None:
    linear = Linear(8, 5)
    data, scale = quantize_weight(linear.weight.detach())
    stand_in = Int8Linear(8, 5, bias=True)
    assert linear.bias is not None
    stand_in.load_state_dict({"weight._data": data, "weight._scale": scale, "bias": linear.bias})
    inputs = normal(3, 8)
    torch.testing.assert_close(stand_in(inputs), inputs @ (data * scale).T + linear.bias)
    assert (stand_in.compute_dtype, linear.compute_dtype) == (torch.float32, torch.float32)


def test_quantised_model_stays_near_the_original() -> None:
    model = transformer(SCAIL)
    tensors, modules = quantized(torch.float32)
    quantize_modules(model, modules)
    wanted = {name: tensor for name, tensor in tensors.items() if not name.endswith(("input_scale", "output_scale"))}
    model.load_state_dict(wanted, strict=True)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 12 * SCAIL.num_layers
    tokens = normal(1, 7, SCAIL.dim)
    with torch.no_grad():
        original = transformer(SCAIL).get_submodule("blocks.0.ffn")(tokens)
        error = (model.get_submodule("blocks.0.ffn")(tokens) - original).norm() / original.norm()
    assert 0 < float(error) < 0.03


def test_file_has_the_layout_and_header_of_quanto(tmp_path: Path) -> None:
    tensors, modules = quantized()
    path = tmp_path / "tiny_quanto_bf16_int8.safetensors"
    write_quanto(path, tensors, modules, {"dim": 48})
    read, metadata = load_file(path), read_metadata(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    name = "blocks.1.cross_attn.k_img"
    assert (read[f"{name}.weight._data"].dtype, read[f"{name}.weight._scale"].shape) == (torch.int8, (48, 1))
    assert [float(read[f"{name}.{unused}_scale"]) for unused in ("input", "output")] == [1, 1]
    assert read[f"{name}.input_scale"].shape == ()
    assert metadata.keys() == {"quantization_format", "quantization_map_base64", "config_base64"}
    assert metadata["quantization_format"] == "quanto"
    assert json.loads(base64.b64decode(metadata["config_base64"])) == {"dim": 48}
    entries = json.loads(base64.b64decode(metadata["quantization_map_base64"]))
    assert entries == {module: {"weights": "qint8", "activations": "none"} for module in modules}
    assert check_quantization(read, [metadata]) == set(modules)


def test_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    tensors, modules = quantized()
    backwards = dict(reversed(tensors.items()))
    write_quanto(tmp_path / "a", tensors, modules, {"dim": 48})
    write_quanto(tmp_path / "b", backwards, reversed(modules), {"dim": 48})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_weights_to_quantise_have_to_be_there() -> None:
    with pytest.raises(ValueError, match=r"1 weights are missing \(blocks.0.ffn.7.weight\)"):
        quantize_state_dict({"blocks.0.ffn.0.weight": normal(2, 2)}, ["blocks.0.ffn.0", "blocks.0.ffn.7"])


def test_map_and_tensors_have_to_agree() -> None:
    tensors, modules = quantized()
    entries = {module: {"weights": "qint8", "activations": "none"} for module in modules}
    with pytest.raises(CheckpointMismatch, match=r"only as tensors \['blocks.0.cross_attn.k'"):
        check_quantization(tensors, [])
    with pytest.raises(CheckpointMismatch, match=r"only in the map \['text_embedding.0'\]"):
        check_quantization(tensors, [header(entries | {"text_embedding.0": {"weights": "qint8"}})])
    with pytest.raises(CheckpointMismatch, match=r"other weights than qint8: {'blocks\.0\.ffn\.0': 'qint4'}"):
        check_quantization(tensors, [header(entries | {"blocks.0.ffn.0": {"weights": "qint4"}})])
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        check_quantization(tensors, [{"quantization_map_base64": "not base64!"}])
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        check_quantization(tensors, [header(["blocks.0.ffn.0"])])
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    with pytest.raises(CheckpointMismatch, match=r"must be int8, got torch\.float32"):
        check_quantization(floats, [header(entries)])


def test_only_linears_can_be_quantised() -> None:
    for name in ("patch_embedding", "blocks.0.norm3", "blocks.9.ffn.0"):
        with pytest.raises(CheckpointMismatch, match=f"{name} is quantised in the checkpoint but is no linear"):
            quantize_modules(transformer(SCAIL), [name])
