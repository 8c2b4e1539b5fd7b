"""Checkpoints of the transformer -> `DiffusionTransformer`: released names, those of Wan2GP's files and of diffusers.

The linears of blocks and context take the compute dtype, everything else float32; int8 weights stay int8.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from runtime.weights import (
    CheckpointMismatch,
    build_on_meta,
    load_weights,
    mismatches,
    read_checkpoint,
    read_metadata,
)
from services.denoiser.attention import AUTO, Attention
from services.denoiser.model import DiffusionTransformer, Linear, TransformerConfig
from services.denoiser.quantisation import (
    DATA,
    UNUSED,
    block_linears,
    check_quantization,
    quantize_modules,
    quantized_names,
)

# deepbeepmeep/Wan2GP 8681e9f models/wan/modules/model.py: other names its files may have, and what they carry besides
_WAN2GP_RENAMES = (
    (re.compile(r"^model\.diffusion_model\."), ""),
    (re.compile(r"^patch_embedding_pose\."), "pose_patch_embedding."),
    (re.compile(r"^(blocks\.\d+\.)block\."), r"\1"),
)
_NOT_OURS = re.compile(r"^vae\.|\.attn2\.norm_added_q\.")

# huggingface/diffusers 7d56827 scripts/convert_wan_to_diffusers.py; its norm2 is the affine norm before cross-attention
_DIFFUSERS_LAYOUT = "condition_embedder."
_DIFFUSERS_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"^(blocks\.\d+\.)scale_shift_table$", r"\1modulation"),
        (r"^(blocks\.\d+\.)norm2\.", r"\1norm3."),
        (r"^(blocks\.\d+\.)ffn\.net\.0\.proj\.", r"\1ffn.0."),
        (r"^(blocks\.\d+\.)ffn\.net\.2\.", r"\1ffn.2."),
        (r"^(blocks\.\d+\.)attn1\.", r"\1self_attn."),
        (r"^(blocks\.\d+\.)attn2\.", r"\1cross_attn."),
        (r"^(blocks\.\d+\.(?:self|cross)_attn\.)to_([qkv])\.", r"\1\2."),
        (r"^(blocks\.\d+\.(?:self|cross)_attn\.)to_out\.0\.", r"\1o."),
        (r"^(blocks\.\d+\.cross_attn\.)add_([kv])_proj\.", r"\1\2_img."),
        (r"^(blocks\.\d+\.cross_attn\.)norm_added_k\.", r"\1norm_k_img."),
    )
)


def load_transformer(
    files: Sequence[Path],
    config: TransformerConfig,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    attention: Attention = AUTO,
) -> DiffusionTransformer:
    """The transformer of these files, ready to run.

    Args:
        files: of one transformer: safetensors (float, or int8 as quanto writes it), a shard index, or .pth.
        config: sizes the checkpoint must have.
        device: where the weights go, tensor by tensor; on the CPU those that keep their dtype stay memory-mapped.
        compute_dtype: of the linears of blocks and context.
        attention: backend of the attention layers.

    Raises:
        CheckpointMismatch: names, shapes or quantisation do not fit; nothing has been put on the device then.
        FileNotFoundError: a file is not there.
    """
    tensors = read_checkpoint(files)
    headers = [read_metadata(path) for path in files if path.suffix == ".safetensors"]
    check_quantization(tensors, headers)
    renamed = {name: tensors[original] for original, name in released_names(tensors).items()}
    source = files[0].name
    model, dtypes = _build(config, renamed.keys(), compute_dtype, attention)
    if problems := mismatches(model, {name: tuple(tensor.shape) for name, tensor in renamed.items()}):
        raise CheckpointMismatch(f"{source} does not fit {type(model).__name__}: " + "; ".join(problems))
    placed = {name: tensor.to(device=device, dtype=dtypes[name]) for name, tensor in renamed.items()}
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


def released_names(names: Mapping[str, object]) -> dict[str, str]:
    """The names of a file, each with the released name of its tensor; what is not the transformer's is left out.

    Raises:
        CheckpointMismatch: two names mean the same tensor.
    """
    diffusers = any(_DIFFUSERS_LAYOUT in name for name in names)
    rules = (*_WAN2GP_RENAMES, *(_DIFFUSERS_RENAMES if diffusers else ()))
    released: dict[str, str] = {}
    for original in names:
        name = original
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        if _NOT_OURS.search(original) or name.endswith(UNUSED):
            continue
        released[original] = name
    if twice := sorted(name for name, count in Counter(released.values()).items() if count > 1):
        raise CheckpointMismatch(f"tensors stand under two names: {', '.join(twice[:8])}")
    return released


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
