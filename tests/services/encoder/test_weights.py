from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.weights import CheckpointMismatch
from services.encoder import image, text
from services.encoder.weights import (
    image_encoder_mismatches,
    image_model,
    image_weights,
    load_image_encoder,
    load_text_encoder,
    text_encoder_mismatches,
    text_model,
    text_weights,
)
from tests.services.encoder.checkpoints import CPU, IMAGE, TEXT, released_image_weights, released_text_weights
from training.tiny_tokenizer import write_tokenizer

PROMPTS = ["a red jacket", "she waves"]


def encode_text(directory: Path, files: list[Path]) -> Tensor:
    write_tokenizer(directory, TEXT.vocab)
    return load_text_encoder(files, TEXT, directory, device=CPU, dtype=torch.float32).encode(PROMPTS).prompt_embeds


def encode_image(files: list[Path]) -> Tensor:
    picture = torch.linspace(-1, 1, 3 * 9 * 11).reshape(3, 9, 11)
    return load_image_encoder(files, IMAGE, device=CPU, dtype=torch.float32).encode([picture])


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def transformers_text_weights(*table_names: str) -> dict[str, Tensor]:
    ours = text_weights(released_text_weights())
    table = ours.pop("embed_tokens.weight")
    return {f"encoder.{name}": tensor for name, tensor in ours.items()} | {name: table.clone() for name in table_names}


@pytest.mark.parametrize(
    "tables", [("shared.weight",), ("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")]
)
def test_text_files_of_either_naming_give_the_same_embeddings(tmp_path: Path, tables: tuple[str, ...]) -> None:
    torch.save(released_text_weights(), tmp_path / "released.pth")
    save_file(transformers_text_weights(*tables), tmp_path / "transformers.safetensors")
    released = encode_text(tmp_path, [tmp_path / "released.pth"])
    assert torch.equal(encode_text(tmp_path, [tmp_path / "transformers.safetensors"]), released)


def test_sharded_text_checkpoint_gives_the_same_embeddings(tmp_path: Path) -> None:
    weights = released_text_weights()
    save_file(weights, tmp_path / "whole.safetensors")
    shard_of = {name: f"shard{number % 2}.safetensors" for number, name in enumerate(weights)}
    for shard in set(shard_of.values()):
        save_file({name: weights[name] for name in weights if shard_of[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shard_of}))
    assert torch.equal(encode_text(tmp_path, [index]), encode_text(tmp_path, [tmp_path / "whole.safetensors"]))


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_image_files_of_either_naming_give_the_same_embeddings(tmp_path: Path, prefix: str) -> None:
    released = released_image_weights()
    torch.save(released, tmp_path / "released.pth")
    named = {f"{prefix}{name}": tensor.clone() for name, tensor in image_weights(released, IMAGE).items()}
    unused = {
        f"{prefix}encoder.layers.{IMAGE.num_layers - 1}.layer_norm1.weight": torch.ones(3),
        "vision_model.post_layernorm.bias": torch.ones(3),
        "visual_projection.weight": torch.ones(3),
        "logit_scale": torch.ones(()),
    }
    save_file(named | unused, tmp_path / "transformers.safetensors")
    from_transformers = encode_image([tmp_path / "transformers.safetensors"])
    assert torch.equal(from_transformers, encode_image([tmp_path / "released.pth"]))


def test_fused_projection_holds_query_key_and_value_in_this_order() -> None:
    released = released_image_weights()
    mapped = image_weights(released, IMAGE)
    for part, rows in zip("qkv", (slice(0, 16), slice(16, 32), slice(32, 48)), strict=True):
        for leaf in ("weight", "bias"):
            expected = released[f"visual.transformer.1.attn.to_qkv.{leaf}"][rows]
            assert torch.equal(mapped[f"encoder.layers.1.self_attn.{part}_proj.{leaf}"], expected)


def test_missing_text_weight_is_named(tmp_path: Path) -> None:
    weights = released_text_weights()
    del weights["blocks.1.pos_embedding.embedding.weight"]
    save_file(weights, tmp_path / "text.safetensors")
    name = r"text\.safetensors does not fit .*1 missing \(block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight\)"
    with pytest.raises(CheckpointMismatch, match=name):
        encode_text(tmp_path, [tmp_path / "text.safetensors"])


@pytest.mark.parametrize(
    "name",
    ["blocks.0.attn.rel.weight", "blocks.2.norm1.weight", "blocks.0.attn.q.weight._scale", "textual.head.0.weight"],
)
def test_unknown_text_weight_is_named(name: str) -> None:
    problems = text_encoder_mismatches(shapes_of(released_text_weights()) | {name: (TEXT.dim,)}, TEXT)
    assert len(problems) == 1
    assert problems[0].startswith("1 unknown")
    assert name.removeprefix("blocks.").split(".")[0] in problems[0]


def test_text_weight_of_another_shape_is_reported_with_both() -> None:
    shapes = shapes_of(released_text_weights()) | {"norm.weight": (25,)}
    assert text_encoder_mismatches(shapes, TEXT) == [
        "1 of another shape (final_layer_norm.weight [25] instead of [24])"
    ]


def test_decoder_of_a_complete_text_file_is_ignored() -> None:
    decoder = {"decoder.block.0.layer.0.layer_norm.weight": (24,), "lm_head.weight": (400, 24)}
    assert text_encoder_mismatches(shapes_of(released_text_weights()) | decoder, TEXT) == []


def test_two_names_of_one_weight_are_an_error() -> None:
    weights = released_text_weights()
    weights["shared.weight"] = weights["token_embedding.weight"]
    with pytest.raises(CheckpointMismatch, match=r"token_embedding\.weight and shared\.weight are two names"):
        text_weights(weights)


def test_unused_parts_of_an_image_file_are_ignored_and_may_be_absent() -> None:
    shapes = shapes_of(released_image_weights())
    assert image_encoder_mismatches(shapes, IMAGE) == []
    unused = (
        "log_scale",
        "textual.",
        "visual.head",
        "visual.post_norm.",
        f"visual.transformer.{IMAGE.num_layers - 1}.",
    )
    used = {name: shape for name, shape in shapes.items() if not name.startswith(unused)}
    assert len(used) == len(shapes) - 17
    assert image_encoder_mismatches(used, IMAGE) == []


@pytest.mark.parametrize(
    "name",
    [
        "visual.post_normal.weight",
        "visual.transformer.2.attn.rel",  # also inside the block that is not used
        "visual.transformer.3.norm1.bias",
        "text.head",
        "log_scales",
    ],
)
def test_unknown_image_weight_is_named(name: str) -> None:
    problems = image_encoder_mismatches(shapes_of(released_image_weights()) | {name: (IMAGE.dim,)}, IMAGE)
    assert len(problems) == 1
    assert problems[0].startswith("1 unknown")


def test_missing_and_reshaped_image_weights_are_named(tmp_path: Path) -> None:
    weights = released_image_weights()
    del weights["visual.pre_norm.bias"]
    weights["visual.pos_embedding"] = torch.zeros(1, 6, IMAGE.dim)
    save_file(weights, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointMismatch) as caught:
        encode_image([tmp_path / "clip.safetensors"])
    assert "clip.safetensors does not fit" in str(caught.value)
    assert "1 missing (pre_layrnorm.bias)" in str(caught.value)
    assert "embeddings.position_embedding.weight [6, 16] instead of [5, 16]" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_models_are_complete_frozen_and_of_one_dtype(dtype: torch.dtype) -> None:
    models = (
        text_model(released_text_weights(), TEXT, device=CPU, dtype=dtype, source="test"),
        image_model(released_image_weights(), IMAGE, device=CPU, dtype=dtype, source="test"),
    )
    for model in models:
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_models_are_loaded_onto_the_device_that_is_asked_for() -> None:
    there = torch.device("meta")
    models = (
        text_model(released_text_weights(), TEXT, device=there, dtype=torch.float32, source="test"),
        image_model(released_image_weights(), IMAGE, device=there, dtype=torch.float32, source="test"),
    )
    for model in models:
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_embedding_table_exists_once() -> None:
    weights = released_text_weights()
    model = text_model(weights, TEXT, device=CPU, dtype=torch.float32, source="test")
    tables = [tensor for tensor in model.state_dict().values() if tuple(tensor.shape) == (TEXT.vocab, TEXT.dim)]
    assert len(tables) == 1
    assert tables[0].data_ptr() == weights["token_embedding.weight"].data_ptr()  # used in place, not copied


def test_presets_are_the_released_sizes() -> None:
    # Wan-Video/Wan2.1: wan/modules/t5.py umt5_xxl, wan/modules/clip.py clip_xlm_roberta_vit_h_14
    umt5 = text.PRESETS["umt5-xxl"]
    assert (umt5.vocab, umt5.dim, umt5.dim_attn, umt5.dim_ffn, umt5.num_heads, umt5.num_layers) == (
        256384,
        4096,
        4096,
        10240,
        64,
        24,
    )
    assert (umt5.num_buckets, umt5.max_distance, umt5.text_len) == (32, 128, 512)
    clip = image.PRESETS["clip-vit-h-14"]
    assert (clip.image_size, clip.patch_size, clip.dim, clip.num_heads, clip.num_layers) == (224, 14, 1280, 16, 32)
    assert (clip.mlp_ratio, clip.activation, clip.norm_eps) == (4, "gelu", 1e-5)
