"""Checkpoints in every layout give the same model; damaged ones are refused by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.weights import CheckpointMismatch
from services.denoiser.model import DiffusionTransformer, Linear
from services.denoiser.names import released_names
from services.denoiser.quantisation import Int8Linear, block_linears, quantize_state_dict, write_quanto
from services.denoiser.weights import checkpoint_problems, load_transformer
from tests.services.denoiser.tiny import SCAIL, TEXT_TO_VIDEO, predict_animation, transformer

CPU = torch.device("cpu")
I2V = replace(SCAIL, pose=False)


def load(path: Path, dtype: torch.dtype = torch.float32) -> DiffusionTransformer:
    return load_transformer([path], SCAIL, device=CPU, compute_dtype=dtype)


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_released_names_load_unchanged(tmp_path: Path) -> None:
    model = transformer(SCAIL)
    loaded = load(saved(tmp_path / "model.safetensors", model.state_dict()))
    assert torch.equal(predict_animation(loaded), predict_animation(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_pth_file_loads(tmp_path: Path) -> None:
    model = transformer(SCAIL)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert torch.equal(predict_animation(load(tmp_path / "model.pth")), predict_animation(model))


def test_names_of_wan2gp_files_load(tmp_path: Path) -> None:
    model = transformer(SCAIL)
    renamed = {
        "model.diffusion_model."
        + name.replace("pose_patch_embedding.", "patch_embedding_pose.").replace("blocks.0.", "blocks.0.block."): tensor
        for name, tensor in model.state_dict().items()
    }
    renamed |= {"vae.conv1.weight": torch.zeros(1), "blocks.0.attn2.norm_added_q.weight": torch.zeros(1)}
    loaded = load(saved(tmp_path / "model.safetensors", renamed))
    assert torch.equal(predict_animation(loaded), predict_animation(model))


DIFFUSERS_NAMES = {
    "patch_embedding.weight": "patch_embedding.weight",
    "time_embedding.0.bias": "condition_embedder.time_embedder.linear_1.bias",
    "time_embedding.2.weight": "condition_embedder.time_embedder.linear_2.weight",
    "time_projection.1.weight": "condition_embedder.time_proj.weight",
    "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
    "text_embedding.2.weight": "condition_embedder.text_embedder.linear_2.weight",
    "img_emb.proj.0.weight": "condition_embedder.image_embedder.norm1.weight",
    "img_emb.proj.1.weight": "condition_embedder.image_embedder.ff.net.0.proj.weight",
    "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
    "img_emb.proj.4.weight": "condition_embedder.image_embedder.norm2.weight",
    "head.modulation": "scale_shift_table",
    "head.head.weight": "proj_out.weight",
    "blocks.1.modulation": "blocks.1.scale_shift_table",
    "blocks.1.norm3.weight": "blocks.1.norm2.weight",
    "blocks.1.self_attn.q.weight": "blocks.1.attn1.to_q.weight",
    "blocks.1.self_attn.norm_q.weight": "blocks.1.attn1.norm_q.weight",
    "blocks.1.self_attn.o.bias": "blocks.1.attn1.to_out.0.bias",
    "blocks.1.cross_attn.k.weight": "blocks.1.attn2.to_k.weight",
    "blocks.1.cross_attn.norm_k.weight": "blocks.1.attn2.norm_k.weight",
    "blocks.1.cross_attn.k_img.weight": "blocks.1.attn2.add_k_proj.weight",
    "blocks.1.cross_attn.v_img.bias": "blocks.1.attn2.add_v_proj.bias",
    "blocks.1.cross_attn.norm_k_img.weight": "blocks.1.attn2.norm_added_k.weight",
    "blocks.1.ffn.0.weight": "blocks.1.ffn.net.0.proj.weight",
    "blocks.1.ffn.2.weight": "blocks.1.ffn.net.2.weight",
    "blocks.1.ffn.2.weight._data": "blocks.1.ffn.net.2.weight._data",
}


def test_diffusers_names_become_the_released_ones() -> None:
    assert released_names(dict.fromkeys(DIFFUSERS_NAMES.values())) == {
        theirs: released for released, theirs in DIFFUSERS_NAMES.items()
    }


def test_norm2_is_renamed_in_diffusers_files_only() -> None:
    assert released_names({"blocks.0.norm2.weight": None}) == {"blocks.0.norm2.weight": "blocks.0.norm2.weight"}


def test_compute_dtype_is_for_linears_of_blocks_and_context_alone(tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in transformer(SCAIL).state_dict().items()}
    model = load(saved(tmp_path / "model.safetensors", half), torch.bfloat16)
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert {name.split(".")[0] for name in linears} == {"blocks", "text_embedding", "img_emb"}
    for name, parameter in model.named_parameters():
        expected = torch.bfloat16 if name.rpartition(".")[0] in linears else torch.float32
        assert parameter.dtype == expected, name


def quantized_file(path: Path, modules: Callable[[DiffusionTransformer], list[str]] = block_linears) -> Path:
    model = transformer(SCAIL)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    chosen = modules(model)
    write_quanto(path, quantize_state_dict(state, chosen), chosen, {})
    return path


def test_int8_file_loads_as_int8_and_computes_in_the_given_dtype(tmp_path: Path) -> None:
    path = quantized_file(tmp_path / "model.safetensors")
    whole = predict_animation(transformer(SCAIL))
    for dtype in (torch.float32, torch.bfloat16):
        model = load(path, dtype)
        linear = model.get_submodule("blocks.0.ffn.0")
        assert isinstance(linear, Int8Linear)
        assert (linear.weight._data.dtype, linear.compute_dtype) == (torch.int8, dtype)
        assert model.get_parameter("blocks.0.norm3.weight").dtype == torch.float32
        velocity = predict_animation(model)
        assert float((velocity - whole).norm() / whole.norm()) < 0.03


def test_which_linears_are_int8_is_read_from_the_file(tmp_path: Path) -> None:
    chosen = ["img_emb.proj.1", "blocks.1.ffn.2", "time_embedding.0"]
    model = load(quantized_file(tmp_path / "model.safetensors", lambda _: chosen), torch.bfloat16)
    quantised = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert quantised.keys() == set(chosen)
    assert quantised["img_emb.proj.1"].compute_dtype == torch.bfloat16
    assert quantised["time_embedding.0"].compute_dtype == torch.float32  # as the linear it replaces
    assert predict_animation(model).dtype == torch.float32


def damaged(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = dict(transformer(SCAIL).state_dict())
    change(tensors)
    return saved(path, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.ffn.0.bias"), r"1 missing \(blocks.1.ffn.0.bias\)"),
        (lambda t: t.update({"blocks.2.ffn.0.bias": torch.zeros(64)}), r"1 unknown \(blocks.2.ffn.0.bias\)"),
        (
            lambda t: t.update({"head.modulation": torch.zeros(1, 3, 48)}),
            r"head.modulation \[1, 3, 48\] instead of \[1, 2, 48\]",
        ),
        (
            lambda t: t.update({"model.diffusion_model.head.modulation": torch.zeros(1, 2, 48)}),
            "tensors stand under two names: head.modulation",
        ),
        (
            lambda t: t.update({"blocks.0.ffn.0.weight._data": torch.zeros(64, 48, dtype=torch.int8)}),
            r"only as tensors \['blocks.0.ffn.0'\]",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    with pytest.raises(CheckpointMismatch, match=message):
        load(damaged(tmp_path / "model.safetensors", change))


def test_int8_file_without_its_scales_is_refused(tmp_path: Path) -> None:
    model = transformer(SCAIL)
    tensors = quantize_state_dict(model.state_dict(), ["blocks.0.ffn.0"])
    del tensors["blocks.0.ffn.0.weight._scale"]
    write_quanto(tmp_path / "model.safetensors", tensors, ["blocks.0.ffn.0"], {})
    with pytest.raises(CheckpointMismatch, match=r"1 missing \(blocks.0.ffn.0.weight._scale\)"):
        load(tmp_path / "model.safetensors")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load(tmp_path / "nowhere.safetensors")


def test_problems_of_a_listing_are_found_without_weights() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer(I2V).state_dict().items()}
    assert checkpoint_problems(I2V, shapes) == []
    assert "missing" in checkpoint_problems(SCAIL, shapes)[0]
    assert "unknown" in checkpoint_problems(replace(I2V, image_dim=None), shapes)[0]
    assert checkpoint_problems(TEXT_TO_VIDEO, {"norm.weight._data": (1, 1)}) == [
        "norm is quantised in the checkpoint but is no linear of DiffusionTransformer"
    ]
