"""Released checkpoint files -> text and image encoders.

Names of the Wan releases and of transformers / diffusers files are both understood. What a file holds beyond the part
that is used is listed here by name and ignored; any other unknown name is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.weights import CheckpointMismatch, build_on_meta, load_weights, mismatches, read_checkpoint
from services.encoder.image import ImageEncoder, ImageEncoderConfig, ImageModel
from services.encoder.text import PromptTokenizer, TextEncoder, TextEncoderConfig, TextModel

# inside block i: the Wan release's name -> ours
_TEXT_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TEXT_OUTSIDE = {
    "token_embedding": "embed_tokens",
    "norm": "final_layer_norm",
    "shared": "embed_tokens",  # as transformers writes it
}
# the other half of a complete UMT5 file
_TEXT_UNUSED = ("decoder.", "lm_head.")

_IMAGE_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_IMAGE_OUTSIDE = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
}
# the text tower, the projections, and what follows the last block
_IMAGE_UNUSED = ("textual.", "text_model.")
_IMAGE_UNUSED_NAMES = frozenset(
    (
        "log_scale",
        "visual.head",
        "visual.post_norm.weight",
        "visual.post_norm.bias",
        "logit_scale",
        "text_projection.weight",
        "visual_projection.weight",
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
        "vision_model.embeddings.position_ids",
    )
)


def load_text_encoder(
    files: Sequence[Path], config: TextEncoderConfig, tokenizer_dir: Path, *, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Reads a UMT5 encoder and its tokenizer; tensors that already have `device` and `dtype` stay memory-mapped.

    Raises:
        CheckpointMismatch: names or shapes that do not fit `config`, or a tokenizer that does not fit the table.
        FileNotFoundError: a file, or the tokenizer.json of `tokenizer_dir`, is missing.
    """
    tokenizer = PromptTokenizer(tokenizer_dir, config)
    model = text_model(read_checkpoint(files), config, device=device, dtype=dtype, source=_names(files))
    return TextEncoder(config, model, tokenizer)


def load_image_encoder(
    files: Sequence[Path], config: ImageEncoderConfig, *, device: torch.device, dtype: torch.dtype
) -> ImageEncoder:
    """Reads a CLIP vision tower; raises as `load_text_encoder` does."""
    model = image_model(read_checkpoint(files), config, device=device, dtype=dtype, source=_names(files))
    return ImageEncoder(config, model)


def text_model(
    tensors: Mapping[str, Tensor], config: TextEncoderConfig, *, device: torch.device, dtype: torch.dtype, source: str
) -> TextModel:
    """The text encoder's weights from tensors under checkpoint names; `source` is what an error calls them."""
    model = build_on_meta(lambda: TextModel(config))
    load_weights(model.stack, text_weights(tensors), source=source)
    return model.to(device, dtype).eval()


def image_model(
    tensors: Mapping[str, Tensor], config: ImageEncoderConfig, *, device: torch.device, dtype: torch.dtype, source: str
) -> ImageModel:
    """The image encoder's weights from tensors under checkpoint names; `source` is what an error calls them."""
    model = build_on_meta(lambda: ImageModel(config))
    load_weights(model.clip, image_weights(tensors, config), source=source)
    # no checkpoint holds this buffer, so nothing has taken it off the meta device
    embeddings = model.clip.embeddings
    embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions)[None], persistent=False)
    return model.to(device, dtype).eval()


def text_encoder_mismatches(shapes: Mapping[str, Sequence[int]], config: TextEncoderConfig) -> list[str]:
    """What does not fit in a text checkpoint of these names and shapes, in words; empty when all of it does."""
    return _mismatches(build_on_meta(lambda: TextModel(config)).stack, text_weights(_on_meta(shapes)))


def image_encoder_mismatches(shapes: Mapping[str, Sequence[int]], config: ImageEncoderConfig) -> list[str]:
    """What does not fit in an image checkpoint of these names and shapes, in words; empty when all of it does."""
    return _mismatches(build_on_meta(lambda: ImageModel(config)).clip, image_weights(_on_meta(shapes), config))


def text_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint names -> names of the stack in UMT5EncoderModel; an unknown name stays as it is, to be reported."""
    # transformers' files hold the table under either name, or the same one under both
    twin = "encoder.embed_tokens.weight" if "shared.weight" in tensors else None
    used = {name: tensor for name, tensor in tensors.items() if name != twin and not name.startswith(_TEXT_UNUSED)}
    return _renamed(used, _text_name)


def image_weights(tensors: Mapping[str, Tensor], config: ImageEncoderConfig) -> dict[str, Tensor]:
    """Checkpoint names -> names of CLIPVisionModel without its last block; an unknown name stays as it is."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_IMAGE_UNUSED) or name in _IMAGE_UNUSED_NAMES:
            continue
        if fused := re.fullmatch(r"visual\.transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)", name):
            # [3 * dim, ...]: rows of q, then k, then v
            thirds = zip("qkv", tensor.chunk(3), strict=False)
            split |= {f"encoder.layers.{fused[1]}.self_attn.{part}_proj.{fused[2]}": third for part, third in thirds}
        elif name == "visual.cls_embedding":
            split[name] = tensor.flatten()  # [1, 1, dim] -> [dim]
        elif name == "visual.pos_embedding":
            split[name] = tensor.squeeze(0)  # [1, 1 + patches, dim] -> [1 + patches, dim]
        else:
            split[name] = tensor
    last_block = f"encoder.layers.{config.num_layers - 1}."
    return {name: tensor for name, tensor in _renamed(split, _image_name).items() if not name.startswith(last_block)}


def _text_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if (block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module)) and block[2] in _TEXT_BLOCK:
        return f"block.{block[1]}.{_TEXT_BLOCK[block[2]]}.{leaf}"
    return f"{_TEXT_OUTSIDE[module]}.{leaf}" if module in _TEXT_OUTSIDE else name.removeprefix("encoder.")


def _image_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if (block := re.fullmatch(r"visual\.transformer\.(\d+)\.(.+)", module)) and block[2] in _IMAGE_BLOCK:
        return f"encoder.layers.{block[1]}.{_IMAGE_BLOCK[block[2]]}.{leaf}"
    if name.startswith("visual."):
        return _IMAGE_OUTSIDE.get(name.removeprefix("visual."), name)
    return name.removeprefix("vision_model.")


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    origin: dict[str, str] = {}
    for name in tensors:
        twin = origin.setdefault(rename(name), name)
        if twin != name:
            raise CheckpointMismatch(f"{twin} and {name} are two names of the same weight")
    return {renamed: tensors[name] for renamed, name in origin.items()}


def _on_meta(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}


def _mismatches(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    return mismatches(module, {name: tuple(tensor.shape) for name, tensor in weights.items()})


def _names(files: Sequence[Path]) -> str:
    return ", ".join(path.name for path in files)
