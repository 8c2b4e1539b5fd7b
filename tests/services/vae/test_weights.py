"""Checkpoints in every layout load into the same VAE, and those that do not fit are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.weights import CheckpointMismatch
from services.vae.model import PRESETS, Vae, VaeConfig
from services.vae.weights import checkpoint_problems, diffusers_name, load_vae

CPU = torch.device("cpu")
CONFIG = VaeConfig(dim=4)
RESIDUAL = VaeConfig(dim=4, decoder_dim=8, patch_size=2, residual_stages=True)

# a name of every kind in the released file, and what diffusers calls it
FLAT_NAMES = {
    "conv1.weight": "quant_conv.weight",
    "conv2.bias": "post_quant_conv.bias",
    "encoder.conv1.weight": "encoder.conv_in.weight",
    "decoder.conv1.bias": "decoder.conv_in.bias",
    "encoder.middle.0.residual.0.gamma": "encoder.mid_block.resnets.0.norm1.gamma",
    "decoder.middle.1.to_qkv.weight": "decoder.mid_block.attentions.0.to_qkv.weight",
    "encoder.middle.1.norm.gamma": "encoder.mid_block.attentions.0.norm.gamma",
    "decoder.middle.2.residual.6.weight": "decoder.mid_block.resnets.1.conv2.weight",
    "encoder.head.0.gamma": "encoder.norm_out.gamma",
    "decoder.head.2.bias": "decoder.conv_out.bias",
    "encoder.downsamples.2.resample.1.weight": "encoder.down_blocks.2.resample.1.weight",
    "encoder.downsamples.6.shortcut.bias": "encoder.down_blocks.6.conv_shortcut.bias",
    "encoder.downsamples.8.time_conv.bias": "encoder.down_blocks.8.time_conv.bias",
    "encoder.downsamples.10.residual.3.gamma": "encoder.down_blocks.10.norm2.gamma",
    "decoder.upsamples.2.residual.2.weight": "decoder.up_blocks.0.resnets.2.conv1.weight",
    "decoder.upsamples.3.time_conv.weight": "decoder.up_blocks.0.upsamplers.0.time_conv.weight",
    "decoder.upsamples.4.shortcut.weight": "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
    "decoder.upsamples.11.resample.1.bias": "decoder.up_blocks.2.upsamplers.0.resample.1.bias",
    "decoder.upsamples.14.residual.6.bias": "decoder.up_blocks.3.resnets.2.conv2.bias",
}
NESTED_NAMES = {
    "encoder.downsamples.1.downsamples.0.shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "encoder.downsamples.3.downsamples.1.residual.2.bias": "encoder.down_blocks.3.resnets.1.conv1.bias",
    "encoder.downsamples.2.downsamples.2.time_conv.weight": "encoder.down_blocks.2.downsampler.time_conv.weight",
    "decoder.upsamples.3.upsamples.2.residual.0.gamma": "decoder.up_blocks.3.resnets.2.norm1.gamma",
    "decoder.upsamples.0.upsamples.3.resample.1.bias": "decoder.up_blocks.0.upsampler.resample.1.bias",
}


@cache
def random_weights(config: VaeConfig) -> Mapping[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.detach() for name, tensor in Vae(config).state_dict().items()}


def load(path: Path, config: VaeConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Vae:
    return load_vae([path], config, device=CPU, dtype=dtype)


@pytest.mark.parametrize(("released", "diffusers"), FLAT_NAMES.items())
def test_diffusers_name_of_the_first_vae(released: str, diffusers: str) -> None:
    assert diffusers_name(released, PRESETS["wan2.1"]) == diffusers


@pytest.mark.parametrize(("released", "diffusers"), NESTED_NAMES.items())
def test_diffusers_name_of_the_second_vae(released: str, diffusers: str) -> None:
    assert diffusers_name(released, PRESETS["wan2.2"]) == diffusers


@pytest.mark.parametrize("config", [CONFIG, RESIDUAL], ids=["flat", "residual"])
@pytest.mark.parametrize("layout", ["pth", "safetensors", "diffusers"])
def test_every_layout_loads_the_same_weights(config: VaeConfig, layout: str, tmp_path: Path) -> None:
    weights = random_weights(config)
    path = tmp_path / ("vae.pth" if layout == "pth" else "vae.safetensors")
    if layout == "pth":
        torch.save(dict(weights), path)
    else:
        named = {diffusers_name(name, config): tensor for name, tensor in weights.items()}
        save_file(named if layout == "diffusers" else dict(weights), path)
    loaded = load(path, config).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_loaded_vae_has_the_asked_dtype_and_needs_no_gradients(tmp_path: Path) -> None:
    save_file(dict(random_weights(CONFIG)), tmp_path / "vae.safetensors")
    vae = load(tmp_path / "vae.safetensors", dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in vae.parameters()} == {torch.bfloat16}
    assert not any(tensor.requires_grad for tensor in vae.parameters())
    assert not vae.training


def test_missing_unknown_and_reshaped_names_are_all_listed(tmp_path: Path) -> None:
    weights = dict(random_weights(CONFIG))
    del weights["encoder.head.2.bias"]
    weights["decoder.extra"] = torch.zeros(1)
    weights["conv2.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "odd.safetensors")
    expected = (
        r"odd\.safetensors does not fit Vae: 1 missing \(encoder\.head\.2\.bias\); 1 unknown \(decoder\.extra\); "
        r"1 of another shape \(conv2\.bias \[3\] instead of \[16\]\)"
    )
    with pytest.raises(CheckpointMismatch, match=expected):
        load(tmp_path / "odd.safetensors")


def test_unknown_name_in_a_diffusers_file_is_listed_as_it_stands_there() -> None:
    shapes = {diffusers_name(name, CONFIG): tuple(t.shape) for name, t in random_weights(CONFIG).items()}
    assert checkpoint_problems(shapes, CONFIG) == []
    shapes["encoder.down_blocks.99.norm1.gamma"] = (4, 1, 1, 1)
    assert checkpoint_problems(shapes, CONFIG) == ["1 unknown (encoder.down_blocks.99.norm1.gamma)"]


def test_checkpoint_of_the_other_vae_is_refused() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in random_weights(RESIDUAL).items()}
    kinds = [problem.split(" (")[0].split(" ", 1)[1] for problem in checkpoint_problems(shapes, CONFIG)]
    assert kinds == ["missing", "unknown", "of another shape"]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist"):
        load(tmp_path / "absent.pth")
