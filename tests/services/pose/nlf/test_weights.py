"""A checkpoint in the released layout loads; one that does not fit is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.weights import CheckpointMismatch
from services.pose.nlf import backbone
from services.pose.nlf.config import NlfConfig, NlfQuirks
from services.pose.nlf.weights import checkpoint_problems, config_of, load_nlf
from tests.parity.manifests import Manifest
from tests.services.pose.nlf.tiny import STAGES, canonical_points, crop_model, random_frames

CPU = torch.device("cpu")
INVENTORY = "nlf_l_multi_0.3.2.eager.safetensors"
SETTINGS: Mapping[str, Any] = {
    "crop_model": {
        "proc_side": 64,
        "stride_test": 8,
        "centered_stride": True,
        "depth": 4,
        "box_size_m": 2.2,
        "uncert_bias": -0.5,
        "uncert_bias2": 0.002,
        "fix_uncert_factor": True,
        "mix_3d_inside_fov": 0.25,
        "weak_perspective": True,
        "backbone_link_dim": 16,
        "backbone": "tiny",
    },
    "pad_white_pixels": False,
    "cano_all_keys": ["smpl", "smplx"],
    "skeleton_infos": {},
}
FIELD = "crop_model.heatmap_head.weight_field."


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbone.BACKBONES, "tiny", STAGES)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    network = {f"crop_model.{name}": tensor for name, tensor in crop_model().state_dict().items()}
    return {**network, "__meta_cano_all_smpl": canonical_points(), "__meta_cano_all_smplx": torch.zeros(79, 3)}


def write(tensors: Mapping[str, Tensor], directory: Path, settings: Mapping[str, Any] = SETTINGS) -> Path:
    save_file(dict(tensors), directory / "nlf.eager.safetensors")
    (directory / "nlf.eager.meta.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory / "nlf.eager.safetensors"


def without(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**settings, "crop_model": {key: value for key, value in settings["crop_model"].items() if key != name}}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_checkpoint_loads_with_the_settings_beside_it(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    quirks = NlfQuirks(linearise_twice=False)
    estimator = load_nlf(write(tensors, tmp_path), device=CPU, dtype=torch.float32, quirks=quirks)
    assert estimator.config == NlfConfig(
        proc_side=64,
        stride=8,
        centered_stride=True,
        depth=4,
        box_size_m=2.2,
        uncertainty_bias=-0.5,
        uncertainty_floor=0.002,
        fix_uncertainty_factor=True,
        mix_3d_inside_fov=0.25,
        weak_perspective=True,
        pad_white_pixels=False,
        backbone="tiny",
    )
    assert estimator.quirks == quirks
    assert torch.equal(estimator.canonical_points, canonical_points())
    loaded = estimator.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in crop_model().state_dict().items())
    assert not any(tensor.requires_grad for tensor in estimator.model.parameters())
    assert not estimator.model.training


def test_half_precision_leaves_the_weight_field_alone(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    estimator = load_nlf(write(halves, tmp_path), device=CPU, dtype=torch.bfloat16)
    model = estimator.model
    for module in (model.backbone, model.heatmap_head.layer):
        assert {tensor.dtype for tensor in module.parameters()} == {torch.bfloat16}
    field = model.heatmap_head.weight_field
    assert {tensor.dtype for tensor in [*field.parameters(), *field.buffers()]} == {torch.float32}
    assert estimator.canonical_points.dtype == torch.float32
    joints = estimator.estimate(random_frames(1), [torch.tensor([[20.0, 15, 30, 30]])])
    assert joints.shape == (1, 24, 3)


def test_scalars_may_have_an_axis_and_counters_and_scale_may_be_missing(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    odd = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    odd["crop_model.backbone.0.mean"] = torch.tensor([0.25])
    del odd["crop_model.backbone.0.std"]
    loaded = load_nlf(write(odd, tmp_path), device=CPU, dtype=torch.float32).model.state_dict()
    assert loaded["backbone.0.mean"].item() == 0.25
    assert loaded["backbone.0.std"].item() == 0.5
    assert checkpoint_problems(shapes_of(odd), "tiny") == []


@pytest.mark.parametrize(
    "name",
    [
        "crop_model.backbone.1.0.0.weight",
        "crop_model.backbone.1.3.1.block.2.fc1.bias",
        "crop_model.heatmap_head.layer.1.running_var",
        f"{FIELD}r_sqrt_eigva",
        f"{FIELD}gps_net.maxi",
        f"{FIELD}gps_net.mlp.0.bias",
        f"{FIELD}pred_mlp.0.weight",
    ],
)
def test_missing_tensor_is_named(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    del tensors[name]
    with pytest.raises(CheckpointMismatch, match=name.removeprefix("crop_model.").replace(".", r"\.")):
        load_nlf(write(tensors, tmp_path), device=CPU, dtype=torch.float32)
    assert name.removeprefix("crop_model.") in checkpoint_problems(shapes_of(tensors), "tiny")[0]


def test_unknown_tensor_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("crop_model.heatmap_head.extra", "crop_model.canonical_other", "ema.backbone"):
        tensors[name] = torch.zeros(1)
    with pytest.raises(CheckpointMismatch, match=r"3 unknown .*canonical_other, ema\.backbone, heatmap_head\.extra"):
        load_nlf(write(tensors, tmp_path), device=CPU, dtype=torch.float32)


def test_network_of_another_depth_than_the_settings_say_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    settings = {**SETTINGS, "crop_model": {**SETTINGS["crop_model"], "depth": 8}}
    with pytest.raises(CheckpointMismatch, match=r"pred_mlp\.2\.weight \[102, 6\] instead of \[170, 6\]"):
        load_nlf(write(tensors, tmp_path, settings), device=CPU, dtype=torch.float32)


def test_head_for_another_backbone_is_refused(tensors: dict[str, Tensor]) -> None:
    tensors["crop_model.heatmap_head.layer.0.weight"] = torch.zeros(16, 640, 1, 1)
    assert (
        "layer.0.weight [16, 640, 1, 1] instead of [16, 1280, 1, 1]"
        in checkpoint_problems(shapes_of(tensors), "tiny")[0]
    )


def test_missing_setting_is_named() -> None:
    for name in ("proc_side", "uncert_bias2", "weak_perspective"):
        with pytest.raises(CheckpointMismatch, match=f"lacks crop_model.{name}"):
            config_of(without(SETTINGS, name), source="it")


def test_defaults_are_those_of_the_released_program() -> None:
    config = config_of({"crop_model": without(SETTINGS, "backbone")["crop_model"]}, source="it")
    assert config.backbone == "efficientnetv2-l"
    assert config.pad_white_pixels
    plain = NlfConfig(proc_side=384, stride=32, centered_stride=True, depth=8, box_size_m=2.2)
    assert (plain.uncertainty_bias, plain.uncertainty_floor, plain.mix_3d_inside_fov) == (0, 0.001, 0.5)
    assert (plain.fix_uncertainty_factor, plain.weak_perspective, plain.pad_white_pixels) == (False, False, True)


def test_unknown_backbone_is_refused() -> None:
    settings = {**SETTINGS, "crop_model": {**SETTINGS["crop_model"], "backbone": "resnet50"}}
    with pytest.raises(CheckpointMismatch, match="backbone resnet50; known are efficientnetv2-l"):
        config_of(settings, source="it")


def test_missing_files_are_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tensors, tmp_path)
    (tmp_path / "nlf.eager.meta.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"nlf\.eager\.meta\.json does not exist; it holds the settings"):
        load_nlf(path, device=CPU, dtype=torch.float32)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors does not exist"):
        load_nlf(tmp_path / "absent.safetensors", device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("points", [None, torch.zeros(23, 3), torch.zeros(40, 2)])
def test_points_of_the_body_must_be_there(points: Tensor | None, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    del tensors["__meta_cano_all_smpl"]
    if points is not None:
        tensors["__meta_cano_all_smpl"] = points
    with pytest.raises(CheckpointMismatch, match="__meta_cano_all_smpl"):
        load_nlf(write(tensors, tmp_path), device=CPU, dtype=torch.float32)


def test_tensors_that_the_inventory_lists_without_shapes_are_left_alone() -> None:
    manifest = Manifest(INVENTORY, Path(__file__).parents[3] / "manifests" / f"{INVENTORY}.json.gz")
    further = [
        text.split()[0].replace("<name>", "coco_19") for text in manifest.content["further_tensors_shapes_unknown"]
    ]
    assert len(further) > 40
    assert checkpoint_problems(manifest.shapes | dict.fromkeys(further, (7, 3))) == []
