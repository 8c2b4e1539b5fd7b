"""Trained models -> the files of a bundle, in the formats and with the names of the real release.

The transformer's blocks become int8, the rest of it and the text encoder bfloat16, VAE and image encoder float16.
bundle.toml keeps what belongs to the weights: the statistics of the latents, and the digest of every file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.bundles import Bundle, configuration
from services.denoiser.quantisation import block_linears, quantize_state_dict, write_quanto
from services.encoder.image import PRESETS as IMAGE_ENCODERS
from services.encoder.image import ImageEncoderConfig
from services.encoder.text import PRESETS as TEXT_ENCODERS
from services.encoder.text import TextEncoderConfig
from services.encoder.weights import image_weights, text_weights
from services.vae.model import Vae
from training.conditions import Learners
from training.random_bundle import Shapes, image_encoder_shapes, random_tensor, save, text_encoder_shapes

_LEARNT = ("transformer", "text_encoder", "image_encoder")
Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def write_learners(directory: Path, bundle: Bundle, learners: Learners) -> None:
    """Writes transformer, text encoder and image encoder, and their digests."""
    transformer, text, image = (bundle.component(name) for name in _LEARNT)
    tensors = on_cpu(learners.transformer, torch.bfloat16)
    modules = block_linears(learners.transformer)
    write_quanto(transformer.files[0], quantize_state_dict(tensors, modules), modules, dict(transformer.config))

    text_config = configuration(text, TEXT_ENCODERS, TextEncoderConfig)
    stack = on_cpu(learners.text.stack, torch.bfloat16)
    save(text.files[0], released(stack, text_encoder_shapes(text_config), text_weights, torch.bfloat16))

    image_config = configuration(image, IMAGE_ENCODERS, ImageEncoderConfig)
    clip = on_cpu(learners.image.clip, torch.float16)
    shapes = image_encoder_shapes(image_config)
    save(image.files[0], released(clip, shapes, lambda names: image_weights(names, image_config), torch.float16))
    for name in _LEARNT:
        write_digests(directory, bundle, name)


def write_vae(directory: Path, bundle: Bundle, vae: Vae, mean: Tensor, std: Tensor) -> None:
    """Writes the VAE, and into bundle.toml the statistics [z_dim] of its latents."""
    component = bundle.component("vae")
    save(component.files[0], on_cpu(vae, torch.float16))
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        rounded = [round(value, 4) for value in values.tolist()]
        set_entry(directory / "bundle.toml", "components.vae.config", name, json.dumps(rounded))
    write_digests(directory, bundle, "vae")


def on_cpu(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in module.state_dict().items()}


def released(tensors: Mapping[str, Tensor], shapes: Shapes, rename: Rename, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one of our modules under the names and in the shapes of a released file.

    What a released file holds beyond the part that is used (CLIP's last block) is there too, with random numbers.

    Args:
        rename: what reads such a file: released names -> ours; one released tensor may be several of ours.
    """
    written = {}
    for name, shape in shapes.items():
        ours = list(rename({name: torch.empty(shape)}))
        if ours and ours[0] in tensors:
            written[name] = torch.cat([tensors[part] for part in ours]).reshape(shape) if shape else tensors[ours[0]]
        else:
            written[name] = random_tensor(name, shape).to(dtype)
    return written


def write_digests(directory: Path, bundle: Bundle, component: str) -> None:
    """States the SHA-256 of a component's files in bundle.toml."""
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in bundle.component(component).files]
    set_entry(directory / "bundle.toml", f"components.{component}", "sha256", json.dumps(digests))


def set_entry(path: Path, table: str, name: str, value: str) -> None:
    """Sets an entry on one line of a table that stands in a TOML file; everything else, comments too, stays as it is.

    Raises:
        ValueError: there is no such table.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    begin = lines.index(f"[{table}]") + 1
    end = next((number for number, line in enumerate(lines) if number >= begin and line.startswith("[")), len(lines))
    others = [line for line in lines[begin:end] if not re.match(rf"{name}\s*=", line)]
    used = len(others) - next((blank for blank, line in enumerate(reversed(others)) if line), len(others))
    others.insert(used, f"{name} = {value}")
    path.write_text("\n".join([*lines[:begin], *others, *lines[end:]]), encoding="utf-8")
