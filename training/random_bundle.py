"""Random weights of a bundle's sizes, in the formats of the real release: for tests, which need no trained ones.

The numbers depend on the tensors' names alone, so every machine writes the same files. Also the names and shapes of
released encoder files, which trained weights are written with (export.py).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime.bundles import Bundle, configuration
from runtime.weights import build_on_meta
from services.denoiser.model import PRESETS as TRANSFORMERS
from services.denoiser.model import DiffusionTransformer, TransformerConfig
from services.denoiser.quantisation import block_linears, quantize_state_dict, write_quanto
from services.encoder.image import PRESETS as IMAGE_ENCODERS
from services.encoder.image import ImageEncoderConfig
from services.encoder.text import PRESETS as TEXT_ENCODERS
from services.encoder.text import TextEncoderConfig
from services.vae.model import PRESETS as VAES
from services.vae.model import Vae, VaeConfig
from training.tiny_tokenizer import write_tokenizer

Shapes = Mapping[str, tuple[int, ...]]


def write_transformer(bundle: Bundle) -> None:
    """Block linears as int8, everything else in bfloat16, as Wan2GP's files have it."""
    component = bundle.component("transformer")
    config = configuration(component, TRANSFORMERS, TransformerConfig)
    model = build_on_meta(lambda: DiffusionTransformer(config))
    tensors = random_tensors(shapes_of(model), torch.bfloat16)
    modules = block_linears(model)
    write_quanto(component.files[0], quantize_state_dict(tensors, modules), modules, dict(component.config))


def write_vae(bundle: Bundle) -> None:
    component = bundle.component("vae")
    config = configuration(component, VAES, VaeConfig)
    save(component.files[0], random_tensors(shapes_of(build_on_meta(lambda: Vae(config))), torch.float16))


def write_text_encoder(bundle: Bundle) -> None:
    component = bundle.component("text_encoder")
    config = configuration(component, TEXT_ENCODERS, TextEncoderConfig)
    assert component.tokenizer is not None
    write_tokenizer(component.tokenizer, config.vocab)
    save(component.files[0], random_tensors(text_encoder_shapes(config), torch.bfloat16))


def write_image_encoder(bundle: Bundle) -> None:
    component = bundle.component("image_encoder")
    config = configuration(component, IMAGE_ENCODERS, ImageEncoderConfig)
    save(component.files[0], random_tensors(image_encoder_shapes(config), torch.float16))


def text_encoder_shapes(config: TextEncoderConfig) -> Shapes:
    """Names and shapes of a released UMT5 file (`models_t5_umt5-xxl-enc-bf16.pth`)."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocab, config.dim),
        "norm.weight": (config.dim,),
    }
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.norm{n}.weight": (config.dim,) for n in (1, 2)}
        shapes |= {f"{block}.attn.{name}.weight": (config.dim_attn, config.dim) for name in "qkv"}
        shapes |= {
            f"{block}.attn.o.weight": (config.dim, config.dim_attn),
            f"{block}.pos_embedding.embedding.weight": (config.num_buckets, config.num_heads),
            f"{block}.ffn.gate.0.weight": (config.dim_ffn, config.dim),
            f"{block}.ffn.fc1.weight": (config.dim_ffn, config.dim),
            f"{block}.ffn.fc2.weight": (config.dim, config.dim_ffn),
        }
    return shapes


def image_encoder_shapes(config: ImageEncoderConfig) -> Shapes:
    """Names and shapes of a released CLIP file with the vision tower alone (`...-onlyvisual.pth`)."""
    dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "log_scale": (),
        "visual.cls_embedding": (1, 1, dim),
        "visual.pos_embedding": (1, tokens, dim),
        "visual.patch_embedding.weight": (dim, 3, config.patch_size, config.patch_size),
        "visual.head": (dim, dim),
    }
    norms = ["pre_norm", "post_norm"]
    for layer in range(config.num_layers):
        block = f"transformer.{layer}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linears = {
            "attn.to_qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.0": (hidden, dim),
            "mlp.2": (dim, hidden),
        }
        for name, (rows, columns) in linears.items():
            shapes |= {f"visual.{block}.{name}.weight": (rows, columns), f"visual.{block}.{name}.bias": (rows,)}
    for norm in norms:
        shapes |= {f"visual.{norm}.weight": (dim,), f"visual.{norm}.bias": (dim,)}
    return shapes


def shapes_of(module: nn.Module) -> Shapes:
    """Of modules whose names are those of the released file."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def random_tensors(shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: random_tensor(name, shape).to(dtype) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Scales near 1, biases near 0, matrices that keep the variance of what goes through them."""
    values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape, dtype=np.float32)
    if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
        return torch.from_numpy(1 + 0.1 * values)
    if len(shape) <= 1:
        return torch.from_numpy(np.asarray(0.1 * values, dtype=np.float32))
    return torch.from_numpy(values / math.sqrt(math.prod(shape[1:])))


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(tensors), path)
