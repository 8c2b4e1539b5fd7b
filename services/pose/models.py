"""The networks of an extraction, from the files that a bundle names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import onnxruntime
import torch
from torch import nn

from runtime.bundles import Bundle, BundleComponent, configuration, require_files
from runtime.stage import LoadedComponent
from runtime.torch_stage import loaded_component
from services.pose.detect import YoloxConfig, YoloxDetector
from services.pose.keypoints import WholeBodyEstimator
from services.pose.networks import NetworkModels
from services.pose.nlf.weights import load_nlf
from services.pose.onnx import OnnxNetwork, OnnxSettings, count_parameters
from services.pose.persons.masks import PersonMasks

MASK_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "sam2": ("person_masks",),
    "matanyone": ("person_segmenter", "person_mattes"),
}
"""Components of a bundle that each mask back-end needs."""
_log = logging.getLogger(__name__)


def load_models(bundle: Bundle, device: torch.device) -> tuple[NetworkModels, list[LoadedComponent]]:
    """The models of a bundle, and what the status says of them.

    Raises:
        BundleError: a component or a file is not there, or is not the network that is needed.
    """
    names = ("person_detector", "whole_body_keypoints", "joints_3d")
    components = [bundle.component(name) for name in names]
    for component in components:
        require_files(component)
    person_detector, whole_body, joints_3d = components
    settings = OnnxSettings(device=_onnx_device(device))
    detector = YoloxDetector(
        OnnxNetwork.load(person_detector.files[0], settings), configuration(person_detector, {}, YoloxConfig)
    )
    estimator = WholeBodyEstimator(OnnxNetwork.load(whole_body.files[0], settings))
    # half precision is what the weights are released in; most CPUs are slower in it
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    nlf = load_nlf(joints_3d.files[0], device=device, dtype=dtype)
    if device.type == "cuda":
        nlf.model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    loaded = [_of_file(person_detector), _of_file(whole_body), loaded_component(joints_3d, nlf.model)]
    masks, loaded_masks = _load_masks(bundle, device)
    return NetworkModels(detector, estimator, nlf, masks), loaded + loaded_masks


def _load_masks(bundle: Bundle, device: torch.device) -> tuple[dict[str, PersonMasks], list[LoadedComponent]]:
    """The mask back-ends of which every file is there; the others are named in the log.

    Masks are needed for several people only, and their files are large: a bundle may name both and a volume have one.
    """
    masks: dict[str, PersonMasks] = {}
    loaded: list[LoadedComponent] = []
    for name, needed in MASK_COMPONENTS.items():
        components = [bundle.components[one] for one in needed if one in bundle.components]
        if len(components) < len(needed):
            continue
        missing = [str(file) for component in components for file in component.files if not file.is_file()]
        if missing:
            _log.warning("mask back-end %s is left out, not there: %s", name, ", ".join(missing))
            continue
        masks[name], modules = _LOAD_MASKS[name](components, device)
        loaded += [loaded_component(*pair) for pair in zip(components, modules, strict=True)]
    return masks, loaded


def _load_sam2(components: Sequence[BundleComponent], device: torch.device) -> tuple[PersonMasks, list[nn.Module]]:
    # transformers, which both back-ends stand on, takes seconds to import
    from services.pose.persons.sam2 import PRESETS, Sam2Config
    from services.pose.persons.weights import load_sam2_masks

    [component] = components
    masks = load_sam2_masks(component.files, configuration(component, PRESETS, Sam2Config), device=device)
    return masks, [masks.network]


def _load_matanyone(components: Sequence[BundleComponent], device: torch.device) -> tuple[PersonMasks, list[nn.Module]]:
    """NON-COMMERCIAL: see docs/licences.md; loading says so in the log."""
    from services.pose.persons.sam import PRESETS, SegmenterConfig
    from services.pose.persons.weights import load_matanyone_masks

    segmenter, matanyone = components
    config = configuration(segmenter, PRESETS, SegmenterConfig)
    masks = load_matanyone_masks(segmenter.files, config, matanyone.files, device=device)
    return masks, [masks.segmenter.model, masks.network]


_LOAD_MASKS = {"sam2": _load_sam2, "matanyone": _load_matanyone}


def _onnx_device(device: torch.device) -> str:
    """The same device where this onnxruntime can use it; images without its GPU build find people on the CPU."""
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return str(device)
    return "cpu"


def _of_file(component: BundleComponent) -> LoadedComponent:
    """An ONNX file."""
    parameters = sum(count_parameters(file) for file in component.files)
    size_bytes = sum(file.stat().st_size for file in component.files)
    return LoadedComponent(
        component.name, parameters, size_bytes, component.dtype or "float32", ",".join(component.sha256)
    )
