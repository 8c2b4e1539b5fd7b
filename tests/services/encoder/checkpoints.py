"""Tiny random checkpoints under the names of the Wan releases, shared by the tests of the encoder stage."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from services.encoder.image import ImageEncoderConfig
from services.encoder.text import TextEncoder, TextEncoderConfig
from services.encoder.weights import load_text_encoder
from tests.parity.cases import recipe_weight
from training.tiny_tokenizer import write_tokenizer

CPU = torch.device("cpu")
# dim_attn, dim and dim_ffn all differ, so that a mix-up cannot fit
TEXT = TextEncoderConfig(vocab=1024, dim=24, dim_attn=32, dim_ffn=40, num_heads=4, num_layers=2, text_len=20)
IMAGE = ImageEncoderConfig(image_size=28, patch_size=14, dim=16, num_heads=2, num_layers=3, mlp_ratio=2)


def released_text_weights(config: TextEncoderConfig = TEXT) -> dict[str, Tensor]:
    """Every weight of a UMT5 encoder of these sizes, float32."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocab, config.dim),
        "norm.weight": (config.dim,),
    }
    for block in (f"blocks.{i}" for i in range(config.num_layers)):
        shapes |= {f"{block}.attn.{part}.weight": (config.dim_attn, config.dim) for part in "qkv"}
        shapes |= {f"{block}.norm{i}.weight": (config.dim,) for i in (1, 2)}
        shapes |= {f"{block}.ffn.{part}.weight": (config.dim_ffn, config.dim) for part in ("gate.0", "fc1")}
        shapes[f"{block}.attn.o.weight"] = (config.dim, config.dim_attn)
        shapes[f"{block}.ffn.fc2.weight"] = (config.dim, config.dim_ffn)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (config.num_buckets, config.num_heads)
    return {name: recipe_weight(name, shape) for name, shape in shapes.items()}


def released_image_weights(config: ImageEncoderConfig = IMAGE) -> dict[str, Tensor]:
    """Every weight of a CLIP file of these sizes, the unused ones too (of the text tower, a token), float32."""
    dim, mlp = config.dim, int(config.dim * config.mlp_ratio)
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "log_scale": (),
        "textual.token_embedding.weight": (11, 4),
        "visual.cls_embedding": (1, 1, dim),
        "visual.pos_embedding": (1, tokens, dim),
        "visual.patch_embedding.weight": (dim, 3, config.patch_size, config.patch_size),
        "visual.head": (dim, 5),
    }
    shapes |= {f"visual.{norm}_norm.{part}": (dim,) for norm in ("pre", "post") for part in ("weight", "bias")}
    for block in (f"visual.transformer.{i}" for i in range(config.num_layers)):
        sizes = {"attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.0": (mlp, dim), "mlp.2": (dim, mlp)}
        shapes |= {f"{block}.norm{i}.{part}": (dim,) for i in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{block}.{layer}.weight": size for layer, size in sizes.items()}
        shapes |= {f"{block}.{layer}.bias": size[:1] for layer, size in sizes.items()}
    return {name: recipe_weight(name, shape) for name, shape in shapes.items()}


def text_encoder(directory: Path, config: TextEncoderConfig = TEXT, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """A text encoder loaded from files that are written to `directory`."""
    torch.save(released_text_weights(config), directory / "text.pth")
    write_tokenizer(directory / "tokenizer", config.vocab)
    return load_text_encoder([directory / "text.pth"], config, directory / "tokenizer", device=CPU, dtype=dtype)
