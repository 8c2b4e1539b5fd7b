"""The networks of an extraction, from the files that a bundle names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnxruntime
import torch
from torch import nn

from runtime.bundles import Bundle, BundleComponent, configuration, require_files
from runtime.stage import LoadedComponent
from runtime.streaming import into_host_memory, stream_blocks, weights_of
from runtime.torch_stage import loaded_component
from runtime.vram import cap_memory
from services.pose.detect import YoloxConfig, YoloxDetector
from services.pose.keypoints import WholeBodyEstimator
from services.pose.networks import NetworkModels
from services.pose.nlf.weights import load_nlf
from services.pose.onnx import OnnxNetwork, OnnxSettings
from services.pose.onnx_file import count_parameters
from services.pose.people import COMPONENTS
from services.pose.persons.masks import PersonMasks
from services.pose.plan import (
    DEVICE_OVERHEAD_BYTES,
    KeptPlan,
    Masks,
    Networks,
    PoseMemory,
    PosePlan,
    mask_components,
    missing_files,
    plan_pose,
)

if TYPE_CHECKING:
    from services.pose.persons.sam2 import Sam2Network

_log = logging.getLogger(__name__)


def load_within(
    bundle: Bundle, device: torch.device, budget: int, clips: int
) -> tuple[NetworkModels, list[LoadedComponent], KeptPlan]:
    """As `load_models`, within so many bytes of a GPU by the driver's count, to which the process is held from now on.

    Args:
        clips: that may be under way at the same time.

    Raises:
        DoesNotFit: there is too little for a frame of the bundle's size at a time.
        OutOfMemory: for a picture at a time of one of onnxruntime's networks, which are held to what was planned.
    """
    for name in COMPONENTS:
        require_files(bundle.component(name))
    memory = PoseMemory(Networks.of(bundle), clips, has_onnx=_onnx_device(device) != "cpu")
    plan = plan_pose(memory, bundle.video.height, bundle.video.width, budget)
    cap_memory(device, budget - memory.outside(plan.onnx_batch), DEVICE_OVERHEAD_BYTES)
    kept = KeptPlan(memory, plan, budget)
    _log.info("%s", plan)
    return *load_models(bundle, device, kept), kept


def load_models(
    bundle: Bundle, device: torch.device, kept: KeptPlan | None = None
) -> tuple[NetworkModels, list[LoadedComponent]]:
    """The models of a bundle, and what the status says of them.

    Args:
        kept: what memory there is room for; None: for all of them.

    Raises:
        BundleError: a component or a file is not there, or is not the network that is needed.
    """
    components = [bundle.component(name) for name in COMPONENTS]
    for component in components:
        require_files(component)
    person_detector, whole_body, joints_3d = components
    detecting, estimating = _onnx_settings(device, None if kept is None else kept.plan)
    detector = YoloxDetector(
        OnnxNetwork.load(person_detector.files[0], detecting), configuration(person_detector, {}, YoloxConfig)
    )
    estimator = WholeBodyEstimator(OnnxNetwork.load(whole_body.files[0], estimating))
    # half precision is what the weights are released in; most CPUs are slower in it
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    nlf = load_nlf(joints_3d.files[0], device=device, dtype=dtype)
    if device.type == "cuda":
        nlf.model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    loaded = [_of_file(person_detector), _of_file(whole_body), loaded_component(joints_3d, nlf.model)]
    masks, loaded_masks = _load_masks(bundle, device, None if kept is None else kept.plan.masks)
    models = NetworkModels(detector, estimator, nlf, masks, None if kept is None else kept.batch)
    return models, loaded + loaded_masks


def _load_masks(
    bundle: Bundle, device: torch.device, planned: Masks | None
) -> tuple[dict[str, PersonMasks], list[LoadedComponent]]:
    """The mask back-ends of which every file is there and that there is room for; the others are named in the log.

    Masks are needed for several people only, and their files are large: a bundle may name both and a volume have one.
    """
    masks: dict[str, PersonMasks] = {}
    loaded: list[LoadedComponent] = []
    for name, components in mask_components(bundle).items():
        missing = missing_files(components)
        if missing:
            _log.warning("mask back-end %s is left out, not there: %s", name, ", ".join(missing))
            continue
        if planned is not None and name not in planned.backends:
            _log.warning("mask back-end %s is left out: there is no room for it in BUNRAKU_VRAM", name)
            continue
        masks[name], modules = _LOAD_MASKS[name](components, device, planned or Masks())
        loaded += [loaded_component(*pair) for pair in zip(components, modules, strict=True)]
    return masks, loaded


def _load_sam2(
    components: Sequence[BundleComponent], device: torch.device, planned: Masks
) -> tuple[PersonMasks, list[nn.Module]]:
    # transformers, which both back-ends stand on, takes seconds to import
    from services.pose.persons.sam2 import PRESETS, Sam2Config
    from services.pose.persons.weights import load_sam2_masks

    [component] = components
    config = configuration(component, PRESETS, Sam2Config)
    home = torch.device("cpu") if planned.is_sam2_streamed else device
    masks = load_sam2_masks(component.files, config, device=home)
    if planned.is_sam2_streamed:
        stream_sam2(masks.network, device)
    return masks, [masks.network]


def stream_sam2(network: Sam2Network, device: torch.device) -> None:
    """Leaves the blocks in host memory, to be copied one after the other for each frame; all else goes to the device."""
    for owner, name, tensor in list(weights_of(network, apart=network.blocks)):
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(tensor.to(device), requires_grad=False)
        else:
            owner._buffers[name] = tensor.to(device)
    stream_blocks([(block, into_host_memory(block, device)) for block in network.blocks], device)


def _load_matanyone(
    components: Sequence[BundleComponent], device: torch.device, planned: Masks
) -> tuple[PersonMasks, list[nn.Module]]:
    """NON-COMMERCIAL: see docs/licences.md; loading says so in the log."""
    from services.pose.persons.sam import PRESETS, SegmenterConfig
    from services.pose.persons.weights import load_matanyone_masks

    segmenter, matanyone = components
    config = configuration(segmenter, PRESETS, SegmenterConfig)
    masks = load_matanyone_masks(
        segmenter.files,
        config,
        matanyone.files,
        device=device,
        segmenter_device=torch.device("cpu") if planned.is_segmenter_on_host else device,
    )
    return masks, [masks.segmenter.model, masks.network]


_LOAD_MASKS = {"sam2": _load_sam2, "matanyone": _load_matanyone}


def _onnx_settings(device: torch.device, plan: PosePlan | None) -> tuple[OnnxSettings, OnnxSettings]:
    """Of the detector and of the keypoint network."""
    place = _onnx_device(device)
    if plan is None:
        return OnnxSettings(place), OnnxSettings(place)
    first, second = (
        OnnxSettings(place, max_batch=plan.onnx_batch, arena_bytes=arena_bytes or None) for arena_bytes in plan.arenas
    )
    return first, second


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
