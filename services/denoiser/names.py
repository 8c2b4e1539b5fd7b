"""Names of the transformer's tensors in the files of others -> released names: those of Wan2GP's files and of diffusers.

What is renamed is a module with the tensor's name after it (`blocks.0.attn1.to_q.weight`); `lora` uses the same rules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from runtime.weights import CheckpointMismatch
from services.denoiser.quantisation import UNUSED

# deepbeepmeep/Wan2GP 8681e9f models/wan/modules/model.py: other names its files may have, and what they carry besides
_WAN2GP_RENAMES = (
    (re.compile(r"^model\.diffusion_model\."), ""),
    (re.compile(r"^patch_embedding_pose\."), "pose_patch_embedding."),
    (re.compile(r"^(blocks\.\d+\.)block\."), r"\1"),
)
_NOT_OURS = re.compile(r"^vae\.|\.attn2\.norm_added_q\.")

# huggingface/diffusers 7d56827 scripts/convert_wan_to_diffusers.py; its norm2 is the affine norm before cross-attention
_DIFFUSERS_LAYOUT = re.compile(r"condition_embedder\.|\.attn1\.|\.attn2\.(?:to|add)_|\.ffn\.net\.")
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


def released_names(names: Mapping[str, object]) -> dict[str, str]:
    """The names of a checkpoint, each with the released name of its tensor; what is not the transformer's is left out.

    Raises:
        CheckpointMismatch: two names mean the same tensor.
    """
    diffusers = is_of_diffusers(names)
    released = {
        name: released_name(name, diffusers=diffusers)
        for name in names
        if not _NOT_OURS.search(name) and not name.endswith(UNUSED)
    }
    if twice := sorted(name for name, count in Counter(released.values()).items() if count > 1):
        raise CheckpointMismatch(f"tensors stand under two names: {', '.join(twice[:8])}")
    return released


def is_of_diffusers(names: Iterable[str]) -> bool:
    """Whether a file's names are those of diffusers, some of which mean something else in released files."""
    return any(_DIFFUSERS_LAYOUT.search(name) for name in names)


def released_name(name: str, *, diffusers: bool) -> str:
    """The released name of one tensor. diffusers: of its file."""
    for pattern, replacement in (*_WAN2GP_RENAMES, *(_DIFFUSERS_RENAMES if diffusers else ())):
        name = pattern.sub(replacement, name)
    return name
