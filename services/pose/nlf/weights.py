"""The released NLF checkpoint -> NlfEstimator.

`NAME.safetensors` holds the tensors, `NAME.meta.json` beside it the settings. Every tensor of the backbone and the head
must be there and fit; what only serves body models and skeletons of other datasets is listed here and left alone; any
other name is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.weights import CheckpointMismatch, build_on_meta, load_weights, mismatches, read_checkpoint
from services.pose.nlf.backbone import BACKBONES, OUT_CHANNELS, efficientnet
from services.pose.nlf.config import HeadSizes, NlfConfig, NlfQuirks, NlfSizes
from services.pose.nlf.model import NUM_JOINTS, CropModel, NlfEstimator

_PREFIX = "crop_model."
_POINTS = "__meta_cano_all_"
_BODY = "smpl"
# body models and their fitters, the points of other bodies and skeletons, and the points that training started from
_UNUSED = re.compile(
    r"(body_models|fitters)\..+|__meta_(cano_all|skeleton)_.+"
    r"|crop_model\.(canonical_(lefts|centers|locs_init|delta_mask)|inv_permutation)"
)
# the side file's name for a setting -> ours
_SETTINGS = {
    "proc_side": "proc_side",
    "stride_test": "stride",
    "centered_stride": "centered_stride",
    "depth": "depth",
    "box_size_m": "box_size_m",
    "uncert_bias": "uncertainty_bias",
    "uncert_bias2": "uncertainty_floor",
    "fix_uncert_factor": "fix_uncertainty_factor",
    "mix_3d_inside_fov": "mix_3d_inside_fov",
    "weak_perspective": "weak_perspective",
}
_HEAD = "heatmap_head."
_FIELD = f"{_HEAD}weight_field."
_COUNTER = ".num_batches_tracked"


def load_nlf(
    file: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quirks: NlfQuirks | None = None,
) -> NlfEstimator:
    """Reads a released estimator.

    Args:
        file: `NAME.safetensors`, with `NAME.meta.json` beside it.
        dtype: of the backbone and the head's first layer; float16 is what the weights are released in, bfloat16 has too
            few digits for heatmaps to be read to a fraction of a cell. The weight field is always float32.

    Raises:
        CheckpointMismatch: names, shapes or settings that do not fit each other.
        FileNotFoundError: one of the two files is missing.
    """
    tensors = read_checkpoint([file])
    config = config_of(read_settings(file), source=file.name)
    points = canonical_points(tensors, source=file.name)
    model = crop_model(tensors, config, device=device, dtype=dtype, source=file.name)
    return NlfEstimator(config, model, points.to(device, torch.float32), quirks=quirks)


def sizes_of(file: Path) -> NlfSizes:
    """What the bytes of an estimator follow from, of a released one; raises as `load_nlf`."""
    tensors = read_checkpoint([file])
    shapes = {name: tensor.shape for name, tensor in network_weights(tensors).items()}
    head = replace(head_sizes(shapes, source=file.name), in_channels=OUT_CHANNELS)
    points = canonical_points(tensors, source=file.name)
    return NlfSizes(config_of(read_settings(file), source=file.name), head, len(points))


def unloaded_nlf(sizes: NlfSizes, dtype: torch.dtype) -> NlfEstimator:
    """An estimator on the meta device, of `dtype` as for `load_nlf`: what its bytes are counted with."""
    config = sizes.config

    def build() -> CropModel:
        return CropModel(
            config, sizes.head, efficientnet(BACKBONES[config.backbone], centered_stride=config.centered_stride)
        )

    model = in_precision(build_on_meta(build), dtype)
    return NlfEstimator(config, model.eval(), torch.empty(sizes.num_points, 3, device="meta"))


def in_precision(model: CropModel, dtype: torch.dtype) -> CropModel:
    """The model with backbone and the head's first layer in `dtype`, the weight field in float32."""
    model.backbone.to(dtype)
    model.heatmap_head.layer.to(dtype)
    model.heatmap_head.weight_field.float()
    return model


def read_settings(file: Path) -> dict[str, Any]:
    """The side file of a checkpoint."""
    path = file.with_suffix(".meta.json")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it holds the settings of {file.name}")
    return json.loads(path.read_text(encoding="utf-8"))


def config_of(settings: Mapping[str, Any], *, source: str) -> NlfConfig:
    """The side file's settings; all that the network depends on must be there."""
    described = settings.get("crop_model", {})
    missing = sorted(_SETTINGS.keys() - described.keys())
    if missing:
        raise CheckpointMismatch(f"the side file of {source} lacks crop_model.{', crop_model.'.join(missing)}")
    backbone = described.get("backbone", NlfConfig.backbone)
    if backbone not in BACKBONES:
        raise CheckpointMismatch(f"{source} has the backbone {backbone}; known are {', '.join(sorted(BACKBONES))}")
    return NlfConfig(
        **{ours: described[theirs] for theirs, ours in _SETTINGS.items()},
        pad_white_pixels=settings.get("pad_white_pixels", NlfConfig.pad_white_pixels),
        backbone=backbone,
    )


def canonical_points(tensors: Mapping[str, Tensor], *, source: str) -> Tensor:
    """The body's points [P, 3] in metres, of which the last are the joints."""
    points = tensors.get(_POINTS + _BODY)
    if points is None:
        raise CheckpointMismatch(f"{source} lacks {_POINTS}{_BODY}")
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < NUM_JOINTS:
        shape = list(points.shape)
        raise CheckpointMismatch(f"{source}: {_POINTS}{_BODY} must be [at least {NUM_JOINTS}, 3], got {shape}")
    return points


def crop_model(
    tensors: Mapping[str, Tensor],
    config: NlfConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    source: str,
    features: torch.nn.Module | None = None,
) -> CropModel:
    """The network from tensors under checkpoint names.

    Args:
        source: what an error calls the checkpoint.
        features: another feature extractor than the one that `config` names.

    Raises:
        CheckpointMismatch: names or shapes that do not fit `config`.
    """
    named = network_weights(tensors)
    sizes = head_sizes({name: tensor.shape for name, tensor in named.items()}, source=source)
    if features is None:
        sizes = replace(sizes, in_channels=OUT_CHANNELS)
        features = build_on_meta(
            lambda: efficientnet(BACKBONES[config.backbone], centered_stride=config.centered_stride)
        )
    model = build_on_meta(lambda: CropModel(config, sizes, features))
    load_weights(model, _completed(named, model), source=source)
    return in_precision(model.to(device), dtype).eval()


def checkpoint_problems(shapes: Mapping[str, Sequence[int]], backbone: str = NlfConfig.backbone) -> list[str]:
    """What does not fit in a checkpoint of these names and shapes, in words; empty when all of it does."""
    on_meta = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    named = network_weights(on_meta)
    network_shapes = {name: tensor.shape for name, tensor in named.items()}
    try:
        sizes = replace(head_sizes(network_shapes, source="it"), in_channels=OUT_CHANNELS)
    except CheckpointMismatch as problem:
        return [str(problem)]
    depth = network_shapes[f"{_FIELD}pred_mlp.2.weight"][0] // (sizes.link_dim + 1) - 2
    config = NlfConfig(proc_side=0, stride=1, centered_stride=True, depth=depth, box_size_m=1, backbone=backbone)
    model = build_on_meta(lambda: CropModel(config, sizes, efficientnet(BACKBONES[backbone], centered_stride=True)))
    return mismatches(model, {name: tuple(tensor.shape) for name, tensor in _completed(named, model).items()})


def network_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors under our names; an unknown name stays as it is, to be reported."""
    named = {}
    for name, tensor in tensors.items():
        if not _UNUSED.fullmatch(name):
            ours = name.removeprefix(_PREFIX)
            # scalars may have been stored with one axis
            is_scalar = ours.startswith("backbone.0.") or ours.endswith(_COUNTER)
            named[ours] = tensor.reshape(()) if is_scalar and tensor.numel() == 1 else tensor
    return named


def head_sizes(shapes: Mapping[str, Sequence[int]], *, source: str) -> HeadSizes:
    """Widths of the head's layers, from the names and shapes of the network's tensors.

    Raises:
        CheckpointMismatch: one of the tensors that tell is missing.
    """
    names = {
        "layer": f"{_HEAD}layer.0.weight",
        "fourier": f"{_FIELD}gps_net.learnable_fourier.linear.weight",
        "gps": f"{_FIELD}gps_net.mlp.2.weight",
        "field": f"{_FIELD}pred_mlp.0.weight",
        "out": f"{_FIELD}pred_mlp.2.weight",
    }
    missing = [name for name in names.values() if len(shapes.get(name, ())) < 2]
    if missing:
        raise CheckpointMismatch(f"{source} lacks {', '.join(missing)}")
    layer, fourier, gps, field = (shapes[names[part]] for part in ("layer", "fourier", "gps", "field"))
    return HeadSizes(
        in_channels=layer[1],
        link_dim=layer[0],
        fourier_dim=fourier[0] * 2,
        gps_hidden_dim=gps[1],
        gps_dim=gps[0],
        field_dim=field[1],
        field_hidden_dim=field[0],
    )


def _completed(named: Mapping[str, Tensor], model: CropModel) -> dict[str, Tensor]:
    """Adds what a file may leave out: the scale of the pictures, and the counters of batch norms, which only training uses."""
    completed = dict(named)
    for name, expected in model.state_dict().items():
        if name.endswith(_COUNTER):
            completed.setdefault(name, torch.zeros((), dtype=expected.dtype))
        elif name.startswith("backbone.0."):
            completed.setdefault(name, torch.tensor(0.5))
    return completed
