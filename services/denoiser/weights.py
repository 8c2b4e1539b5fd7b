"""Checkpoints of the transformer -> `DiffusionTransformer`, under any of the names of `names`, with LoRAs merged in.

The linears of blocks and context take the compute dtype, everything else float32; int8 weights stay int8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from runtime.bundles import Lora
from runtime.offload import in_file
from runtime.weights import (
    CheckpointMismatch,
    build_on_meta,
    load_weights,
    mismatches,
    read_checkpoint,
    read_metadata,
)
from services.denoiser.attention import AUTO, Attention
from services.denoiser.lora import read_loras
from services.denoiser.model import DiffusionTransformer, Linear, TransformerConfig
from services.denoiser.names import released_names
from services.denoiser.quantisation import (
    DATA,
    block_linears,
    check_quantization,
    quantize_modules,
    quantized_names,
)


def load_transformer(
    files: Sequence[Path],
    config: TransformerConfig,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    attention: Attention = AUTO,
    loras: Sequence[Lora] = (),
    folder: Path | None = None,
) -> DiffusionTransformer:
    """The transformer of these files, ready to run.

    Args:
        files: of one transformer: safetensors (float, or int8 as quanto writes it), a shard index, or .pth.
        config: sizes the checkpoint must have.
        device: where the weights go, tensor by tensor; on the CPU those that keep their dtype stay memory-mapped.
        compute_dtype: of the linears of blocks and context.
        attention: backend of the attention layers.
        loras: are added to the weights; what they change is held in memory, not mapped.
        folder: what they change is held in files here instead. For weights on the CPU.

    Raises:
        CheckpointMismatch: names, shapes or quantisation do not fit, of the files or of a LoRA; nothing has been put on
            the device then.
        OSError: a file is not there, or the folder has no room.
    """
    tensors = read_checkpoint(files)
    headers = [read_metadata(path) for path in files if path.suffix == ".safetensors"]
    check_quantization(tensors, headers)
    renamed = {name: tensors[original] for original, name in released_names(tensors).items()}
    source = files[0].name
    model, dtypes = _build(config, renamed.keys(), compute_dtype, attention)
    shapes = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    if problems := mismatches(model, shapes):
        raise CheckpointMismatch(f"{source} does not fit {type(model).__name__}: " + "; ".join(problems))
    changes = read_loras(loras, config, shapes)
    placed: dict[str, Tensor] = {}
    for name in renamed:
        for part, tensor in changes.merged(name, renamed).items():
            placed[part] = tensor.to(device=device, dtype=dtypes[part])
            if folder is not None and tensor is not renamed[part]:
                placed[part] = in_file(placed[part], folder)
    load_weights(model, placed, source=source)
    return model


def unloaded_transformer(config: TransformerConfig, *, quantized: bool) -> DiffusionTransformer:
    """The model on the meta device, in the dtypes that it has on a GPU: for counting bytes before there are weights."""
    quantised = [f"{name}{DATA}" for name in _block_linear_names(config)] if quantized else []
    model, dtypes = _build(config, quantised, torch.bfloat16, AUTO)
    tensors = {name: torch.empty_like(tensor, dtype=dtypes[name]) for name, tensor in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model


def _block_linear_names(config: TransformerConfig) -> list[str]:
    return block_linears(build_on_meta(lambda: DiffusionTransformer(config)))


def checkpoint_problems(config: TransformerConfig, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What a checkpoint of these names and shapes lacks or has too much for `config`; empty when it fits."""
    renamed = {name: shapes[original] for original, name in released_names(shapes).items()}
    try:
        model, _ = _build(config, renamed.keys(), torch.float32, AUTO)
    except CheckpointMismatch as mismatch:
        return [str(mismatch)]
    return mismatches(model, renamed)


def _build(
    config: TransformerConfig, names: Iterable[str], compute_dtype: torch.dtype, attention: Attention
) -> tuple[DiffusionTransformer, dict[str, torch.dtype]]:
    """The model on the meta device, quantised where the names say so, and the dtype of each of its tensors."""
    model = build_on_meta(lambda: DiffusionTransformer(config, attention))
    computing = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    quantize_modules(model, quantized_names(names))
    dtypes = {}
    for name in model.state_dict():
        if name.endswith(DATA):
            dtypes[name] = torch.int8
        else:
            module = re.sub(r"\.(weight|bias|weight\._scale)$", "", name)
            dtypes[name] = compute_dtype if module in computing else torch.float32
    return model, dtypes
