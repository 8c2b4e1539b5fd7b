"""Trained networks -> the files that services/pose reads: two ONNX files, and an NLF checkpoint with its side file.

Weights are stored in half precision; they are rounded before they are compared with anything. `make check` needs none of
the packages that write ONNX files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from services.pose.nlf.config import NlfConfig
from services.pose.nlf.model import CropModel
from training.pose_models.detector import DetectorTask
from training.pose_models.joints import CONFIG, JointTask, canonical_points
from training.pose_models.keypoints import KeypointTask
from training.pose_models.loop import Task
from training.pose_models.networks import DETECTOR_SIDE

DETECTOR_FILE, KEYPOINTS_FILE, JOINTS_FILE = "detector.onnx", "whole_body.onnx", "nlf_tiny.safetensors"
_OPSET = 18
_FIELD = "heatmap_head.weight_field."


def write_bundle_files(trained: Path, directory: Path) -> None:
    """Reads `trained`/{detector,keypoints,joints}/checkpoint.pt and writes the four files of a bundle's pose models."""
    detector, keypoints, joints = DetectorTask(DETECTOR_SIDE), KeypointTask(), JointTask()
    tasks: dict[str, Task] = {"detector": detector, "keypoints": keypoints, "joints": joints}
    for name, task in tasks.items():
        saved = torch.load(trained / name / "checkpoint.pt", map_location="cpu", weights_only=True)
        task.model.load_state_dict(saved["model"])
        task.model.eval()
    picture = torch.zeros(2, 3, DETECTOR_SIDE, DETECTOR_SIDE)
    write_onnx(detector.model, picture, "images", ["output"], directory / DETECTOR_FILE)
    person = torch.zeros(2, 3, keypoints.height, keypoints.width)
    write_onnx(keypoints.model, person, "input", ["simcc_x", "simcc_y"], directory / KEYPOINTS_FILE)
    assert isinstance(joints.model, CropModel)
    write_nlf(joints.model, canonical_points(), CONFIG, directory / JOINTS_FILE)


def write_onnx(model: nn.Module, pictures: Tensor, name: str, outputs: list[str], path: Path) -> None:
    """Writes a network that takes any number of pictures of the size of `pictures` [2 or more, 3, H, W]."""
    fused = fuse(model)
    program = torch.onnx.export(
        fused,
        (pictures,),
        input_names=[name],
        output_names=outputs,
        opset_version=_OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    path.write_bytes(halved(program.model_proto).SerializeToString())


def fuse(model: nn.Module) -> nn.Module:
    """The same function with every batch norm taken into the convolution before it; changes `model`."""
    for child in model.children():
        fuse(child)
    if isinstance(model, nn.Sequential):
        for index in range(len(model) - 1):
            convolution, norm = model[index], model[index + 1]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                model[index] = fuse_conv_bn_eval(convolution, norm)
                model[index + 1] = nn.Identity()
    return model


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with its weights stored in half precision; it still computes in float32. Notes of the exporter,
    which hold paths of the machine, are left out."""
    graph = model.graph
    casts = []
    for stored in graph.initializer:
        if stored.data_type == TensorProto.FLOAT and len(stored.dims) > 1:
            wide = stored.name
            values = numpy_helper.to_array(stored).astype("float16")
            stored.CopyFrom(numpy_helper.from_array(values, f"{wide}_half"))
            casts.append(helper.make_node("Cast", [stored.name], [wide], name=f"{wide}_cast", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for node in graph.node:
        node.doc_string = ""
    described: list[Any] = [model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]
    for message in described:
        del message.metadata_props[:]
    del graph.value_info[:]
    onnx.checker.check_model(model)
    return model


def write_nlf(model: CropModel, points: Tensor, config: NlfConfig, path: Path) -> None:
    """Writes a checkpoint with the names of the released one: convolutions in half precision, the field in full."""
    tensors = {"__meta_cano_all_smpl": points.contiguous()}
    for name, tensor in model.state_dict().items():
        if name.endswith(".num_batches_tracked"):
            continue
        stored = tensor if name.startswith(_FIELD) else tensor.half()
        tensors[f"crop_model.{name}"] = stored.contiguous().clone()
    save_file(tensors, path)
    path.chmod(0o644)  # as any other file; services run as other users
    described = {
        "proc_side": config.proc_side,
        "stride_test": config.stride,
        "centered_stride": config.centered_stride,
        "backbone_link_dim": model.heatmap_head.layer[0].out_channels,
        "depth": config.depth,
        "box_size_m": config.box_size_m,
        "uncert_bias": config.uncertainty_bias,
        "uncert_bias2": config.uncertainty_floor,
        "fix_uncert_factor": config.fix_uncertainty_factor,
        "mix_3d_inside_fov": config.mix_3d_inside_fov,
        "weak_perspective": config.weak_perspective,
        "backbone": config.backbone,
    }
    settings = {"crop_model": described, "pad_white_pixels": config.pad_white_pixels, "cano_all_keys": ["smpl"]}
    path.with_suffix(".meta.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
