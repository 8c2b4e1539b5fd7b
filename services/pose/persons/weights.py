"""Released checkpoint files -> the back-ends that make masks of people.

Names of the original releases and of transformers files are both understood; weights of any dtype become float32. What a
file holds beyond what is used is listed here by name and left alone; any other unknown name is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from runtime.weights import CheckpointMismatch, build_on_meta, load_weights, mismatches, read_checkpoint
from services.pose.persons.matanyone.config import MatAnyoneConfig, PropagationConfig
from services.pose.persons.matanyone.masks import MatAnyoneMasks
from services.pose.persons.matanyone.network import MatAnyone
from services.pose.persons.matanyone.resnet import PIXEL_DIMS
from services.pose.persons.sam import Segmenter, SegmenterConfig, SegmenterModel
from services.pose.persons.sam2 import Sam2Config, Sam2Masks, Sam2Network

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Rules = Sequence[tuple[str, str]]

NON_COMMERCIAL_NOTICE = (
    "mask back-end matanyone: code and weights of MatAnyone are under the NTU S-Lab License 1.0, for non-commercial use "
    "only; the back-end sam2 is under Apache-2.0"
)

_HEAD = r"(iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d+|object_pointer_proj)"
# three-layer perceptrons; in this order, since the second rule makes what the first one reads
_PERCEPTRONS: Rules = (
    (rf"{_HEAD}\.layers\.0\.", r"\1.proj_in."),
    (rf"{_HEAD}\.layers\.1\.", r"\1.layers.0."),
    (rf"{_HEAD}\.layers\.2\.", r"\1.proj_out."),
)
_PROMPTS_AND_DECODER: Rules = (
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"\.norm", ".layer_norm"),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    *_PERCEPTRONS,
)
_SAM_RULES: Rules = (
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    *_PROMPTS_AND_DECODER,
)
_SAM2_RULES: Rules = (
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^obj_ptr_proj\.", "object_pointer_proj."),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.12\.", "memory_encoder.mask_downsampler.final_conv."),
    (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
    (r"\.gamma$", ".scale"),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    *_PROMPTS_AND_DECODER,
)
# layers of the mask downsampler: of three modules in a row the first is a convolution, the second a norm
_SAM2_DOWNSAMPLER = re.compile(r"memory_encoder\.mask_downsampler\.encoder\.(\d+)\.(.+)")
_SAM2_LAST_CONVOLUTION = "12"
_SAM2_POINTS, _SAM2_POINT_KINDS = "prompt_encoder.point_embed", 4
# levels of the input, in case a file has them
_SAM_UNUSED = frozenset(("pixel_mean", "pixel_std"))
_PLACES = ("prompt_encoder.shared_embedding.positional_embedding", "shared_image_embedding.positional_embedding")

# for training only: a segmentation beside the matte, and what the recurrent state says by itself
_MATANYONE_UNUSED = re.compile(r"(mask_decoder\.pred_seg|aux_computer)\..+")
_MATANYONE_CONFIG = {
    "pixel_mean": "pixel_mean",
    "pixel_std": "pixel_std",
    "pixel_dim": "pixel_dim",
    "key_dim": "key_dim",
    "value_dim": "value_dim",
    "sensory_dim": "sensory_dim",
    "embed_dim": "embed_dim",
    "pixel_pe_scale": "position_scale",
    "object_transformer.ff_dim": "ff_dim",
    "object_transformer.num_heads": "num_heads",
    "object_transformer.num_blocks": "num_blocks",
    "object_transformer.num_queries": "num_queries",
    "mask_decoder.up_dims": "up_dims",
}


def load_sam2_masks(files: Sequence[Path], config: Sam2Config, *, device: torch.device) -> Sam2Masks:
    """Reads Segment Anything 2.1, as its authors released it (`.pt`) or in transformers' format.

    Raises:
        CheckpointMismatch: names or shapes that do not fit `config`.
        FileNotFoundError: a file is missing.
    """
    return Sam2Masks(sam2_network(_read_sam2(files), config, device=device, source=_names(files)))


def load_matanyone_masks(
    segmenter_files: Sequence[Path],
    segmenter_config: SegmenterConfig,
    matanyone_files: Sequence[Path],
    *,
    device: torch.device,
    segmenter_device: torch.device | None = None,
    propagation: PropagationConfig | None = None,
) -> MatAnyoneMasks:
    """Reads Segment Anything and MatAnyone; says in the log that the latter is for non-commercial use only.

    Args:
        segmenter_device: where Segment Anything computes, which looks at one frame of a clip; None: on `device`.

    Raises:
        CheckpointMismatch: names or shapes that do not fit.
        FileNotFoundError: a file is missing.
    """
    _log.warning(NON_COMMERCIAL_NOTICE)
    segmenter = segmenter_model(
        read_checkpoint(segmenter_files),
        segmenter_config,
        device=segmenter_device or device,
        source=_names(segmenter_files),
    )
    network = matanyone_network(
        read_checkpoint(matanyone_files), MatAnyoneConfig(), device=device, source=_names(matanyone_files)
    )
    return MatAnyoneMasks(Segmenter(segmenter), network, propagation)


def segmenter_model(
    tensors: Mapping[str, Tensor], config: SegmenterConfig, *, device: torch.device, source: str
) -> SegmenterModel:
    """Segment Anything from tensors under checkpoint names; `source` is what an error calls them."""
    model = build_on_meta(lambda: SegmenterModel(config))
    load_weights(model.sam, segmenter_weights(tensors), source=source)
    return model.to(device, torch.float32).eval()


def matanyone_network(
    tensors: Mapping[str, Tensor], config: MatAnyoneConfig, *, device: torch.device, source: str
) -> MatAnyone:
    """MatAnyone from tensors under checkpoint names; `source` is what an error calls them."""
    network = build_on_meta(lambda: MatAnyone(config))
    load_weights(network, matanyone_weights(tensors, config), source=source)
    return network.to(device, torch.float32).eval()


def sam2_network(
    tensors: Mapping[str, Tensor], config: Sam2Config, *, device: torch.device, source: str
) -> Sam2Network:
    """Segment Anything 2.1 from tensors under checkpoint names; `source` is what an error calls them."""
    network = build_on_meta(lambda: Sam2Network(config))
    load_weights(network.sam, sam2_weights(tensors), source=source)
    # no checkpoint holds these buffers, so nothing has taken them off the meta device
    attention = network.sam.memory_attention
    attention.rotary_emb = type(attention.rotary_emb)(network.sam.config)
    attention.position_ids = attention.precompute_positions(network.sam.config)
    return network.to(device, torch.float32).eval()


def sam2_problems(shapes: Mapping[str, Sequence[int]], config: Sam2Config) -> list[str]:
    """What does not fit in a SAM 2.1 checkpoint of these names and shapes, in words; empty when all of it does."""
    return _problems(build_on_meta(lambda: Sam2Network(config)).sam, sam2_weights(_on_meta(shapes)))


def segmenter_problems(shapes: Mapping[str, Sequence[int]], config: SegmenterConfig) -> list[str]:
    """What does not fit in a Segment Anything checkpoint of these names and shapes, in words; empty when all of it does."""
    return _problems(build_on_meta(lambda: SegmenterModel(config)).sam, segmenter_weights(_on_meta(shapes)))


def matanyone_problems(shapes: Mapping[str, Sequence[int]], config: MatAnyoneConfig | None = None) -> list[str]:
    """What does not fit in a MatAnyone checkpoint of these names and shapes, in words; empty when all of it does."""
    config = config or MatAnyoneConfig()
    return _problems(build_on_meta(lambda: MatAnyone(config)), matanyone_weights(_on_meta(shapes), config))


def segmenter_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint names -> names of SamModel; an unknown name stays as it is, to be reported."""
    used = {name: tensor for name, tensor in tensors.items() if name not in _SAM_UNUSED}
    if any(name.startswith("image_encoder.") for name in used):
        used = {renamed(name, _SAM_RULES): tensor for name, tensor in used.items()}
    return _with_both_places(used)


def sam2_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint names -> names of Sam2VideoModel; an unknown name stays as it is, to be reported."""
    used = dict(tensors)
    if any(name.startswith("image_encoder.") for name in used):
        used = {renamed(_sam2_downsampler(name), _SAM2_RULES): tensor for name, tensor in used.items()}
        points = [f"{_SAM2_POINTS}.{kind}.weight" for kind in range(_SAM2_POINT_KINDS)]
        if all(name in used for name in points):
            used[f"{_SAM2_POINTS}.weight"] = torch.cat([used.pop(name) for name in points])
    return _with_both_places(used)


def _with_both_places(used: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one tensor that prompts and pictures find their places by, under both of transformers' names for it."""
    for name, twin in (_PLACES, _PLACES[::-1]):
        if name in used:
            used.setdefault(twin, used[name])
    return used


def _sam2_downsampler(name: str) -> str:
    match = _SAM2_DOWNSAMPLER.fullmatch(name)
    if match is None or match[1] == _SAM2_LAST_CONVOLUTION:
        return name
    layer, part = divmod(int(match[1]), 3)
    return f"memory_encoder.mask_downsampler.layers.{layer}.{('conv', 'layer_norm')[part]}.{match[2]}"


def matanyone_weights(tensors: Mapping[str, Tensor], config: MatAnyoneConfig) -> dict[str, Tensor]:
    """Checkpoint names -> ours, which are the same; an unknown name stays as it is, to be reported.

    Files for several objects at once have a channel more in two places, the other objects' mask; it comes last, and is
    always zero where one object is followed, so it is left out.
    """
    used = {name: tensor for name, tensor in tensors.items() if not _MATANYONE_UNUSED.fullmatch(name)}
    channels = {"mask_encoder.conv1.weight": 4, "pixel_fuser.sensory_compress.weight": config.sensory_dim + 1}
    for name, expected in channels.items():
        if name in used and used[name].shape[1] == expected + 1:
            used[name] = used[name][:, :expected]
    return used


def matanyone_config(settings: Mapping[str, Any]) -> MatAnyoneConfig:
    """Sizes as the released `config.json` has them under `cfg.model`.

    Raises:
        CheckpointMismatch: backbones of other sizes than those known here.
    """
    widths = tuple(settings["pixel_encoder"]["ms_dims"])
    backbones = (settings["pixel_encoder"]["type"], settings["mask_encoder"]["type"])
    if backbones != ("resnet50", "resnet18") or widths != PIXEL_DIMS:
        raise CheckpointMismatch(f"MatAnyone with {backbones} of widths {widths} is not known here")
    values: dict[str, Any] = {}
    for theirs, ours in _MATANYONE_CONFIG.items():
        value: Any = settings
        for key in theirs.split("."):
            value = value[key]
        values[ours] = tuple(value) if isinstance(value, list) else value
    return MatAnyoneConfig(**values)


def renamed(name: str, rules: Rules) -> str:
    """A name after all rules (regular expression, replacement), one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _read_sam2(files: Sequence[Path]) -> Mapping[str, Tensor]:
    if len(files) == 1 and files[0].suffix in (".pt", ".pth") and files[0].exists():
        loaded = torch.load(files[0], map_location="cpu", mmap=True, weights_only=True)
        # its authors put the tensors under one name
        if isinstance(loaded, dict) and isinstance(tensors := loaded.get("model"), dict):
            return tensors
    return read_checkpoint(files)


def _on_meta(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}


def _problems(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    return mismatches(module, {name: tuple(tensor.shape) for name, tensor in weights.items()})


def _names(files: Sequence[Path]) -> str:
    return ", ".join(path.name for path in files)
