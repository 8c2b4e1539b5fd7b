"""Checkpoint files -> a VAE.

The module has the names of the released `.pth` files, so those, and safetensors with the same names, need no mapping.
Files of diffusers' AutoencoderKLWan are recognised by their names and mapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from runtime.weights import build_on_meta, load_weights, mismatches, read_checkpoint
from services.vae.model import Vae, VaeConfig

# ours -> diffusers', tried in this order and each at most once per name
_DIFFUSERS_PARTS = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def load_vae(files: Sequence[Path], config: VaeConfig, *, device: torch.device, dtype: torch.dtype) -> Vae:
    """Reads a VAE; tensors that already have `device` and `dtype` stay memory-mapped.

    Raises:
        CheckpointMismatch: names or shapes that do not fit `config`.
        FileNotFoundError: a file is missing.
    """
    vae = build_on_meta(lambda: Vae(config))
    tensors = read_checkpoint(files)
    names = released_names(tensors, vae)
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    load_weights(vae, renamed, source=", ".join(path.name for path in files))
    return vae.to(device, dtype).eval()


def checkpoint_problems(shapes: Mapping[str, Sequence[int]], config: VaeConfig) -> list[str]:
    """What does not fit in a checkpoint of these names and shapes, in words; empty when all of it does."""
    vae = build_on_meta(lambda: Vae(config))
    names = released_names(shapes, vae)
    return mismatches(vae, {names[name]: shape for name, shape in shapes.items()})


def released_names(names: Iterable[str], vae: Vae) -> dict[str, str]:
    """The released name for every name of a checkpoint; an unknown one stays as it is, to be reported."""
    names = list(names)
    if not any(name.startswith(("encoder.conv_in.", "decoder.conv_in.")) for name in names):
        return {name: name for name in names}
    released = {diffusers_name(name, vae.config): name for name in vae.state_dict()}
    return {name: released.get(name, name) for name in names}


def diffusers_name(name: str, config: VaeConfig) -> str:
    """What diffusers' AutoencoderKLWan calls the parameter of this released name."""
    for pattern, replacement in _DIFFUSERS_PARTS:
        name = re.sub(pattern, replacement, name)
    if nested := re.match(r"(en|de)coder\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.", name):
        coder, direction, stage, layer = nested.groups()
        is_resnet = int(layer) < config.num_res_blocks + (direction == "up")
        part = f"resnets.{layer}" if is_resnet else f"{direction}sampler"
        return f"{coder}coder.{direction}_blocks.{stage}.{part}.{name[nested.end() :]}"
    if flat := re.match(r"decoder\.upsamples\.(\d+)\.", name):
        # a stage is num_res_blocks + 1 residual blocks and an Upsample
        stage, layer = divmod(int(flat[1]), config.num_res_blocks + 2)
        part = f"resnets.{layer}" if layer <= config.num_res_blocks else "upsamplers.0"
        return f"decoder.up_blocks.{stage}.{part}.{name[flat.end() :]}"
    return name.replace("encoder.downsamples.", "encoder.down_blocks.")
