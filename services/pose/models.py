"""The networks of an extraction, from the files that a bundle names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from runtime.bundles import Bundle, BundleComponent, configuration, require_files
from runtime.stage import LoadedComponent
from runtime.torch_stage import loaded_component
from services.pose.detect import YoloxConfig, YoloxDetector
from services.pose.extract import Float32s, Frame
from services.pose.keypoints import WholeBodyEstimator
from services.pose.nlf.config import NlfQuirks
from services.pose.nlf.detector import DetectorConfig, PersonDetector
from services.pose.nlf.model import NlfEstimator
from services.pose.nlf.weights import load_nlf
from services.pose.onnx import OnnxNetwork, OnnxSettings
from services.pose.whole_body import Person, find_people


class NetworkModels:
    """People by YOLOX and RTMPose, joints by NLF, which looks for people in its own pictures with the same YOLOX."""

    def __init__(self, detector: YoloxDetector, estimator: WholeBodyEstimator, nlf: NlfEstimator) -> None:
        self._detector, self._estimator, self._nlf = detector, estimator, nlf
        network = detector.network
        [output] = network.shapes

        def cells(pictures: Tensor) -> Tensor:
            found = network.run(pictures.cpu().numpy())[output]
            return torch.from_numpy(found).to(pictures.device)

        self._nlf_detector = PersonDetector(cells, DetectorConfig(side=network.height))

    @property
    def device(self) -> torch.device:
        return self._nlf.model.device

    def people(self, frames: Sequence[Frame], *, phantom: bool) -> list[list[Person]]:
        """As extract.PoseModels."""
        return list(find_people(frames, self._detector, self._estimator, phantom=phantom))

    def joints(self, frames: Sequence[Frame], quirks: NlfQuirks) -> Float32s:
        """As extract.PoseModels."""
        nlf = self._nlf
        estimator = NlfEstimator(nlf.config, nlf.model, nlf.canonical_points, quirks=quirks, batch_size=nlf.batch_size)
        joints = estimator.find_joints(torch.from_numpy(np.stack(frames)), self._nlf_detector)
        return joints.cpu().numpy().astype(np.float32, copy=False)


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
    loaded = [_of_file(person_detector), _of_file(whole_body), loaded_component(joints_3d, nlf.model)]
    return NetworkModels(detector, estimator, nlf), loaded


def _onnx_device(device: torch.device) -> str:
    """The same device where this onnxruntime can use it; images without its GPU build find people on the CPU."""
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return str(device)
    return "cpu"


def _of_file(component: BundleComponent) -> LoadedComponent:
    """An ONNX file; how many of its bytes are parameters is not looked at."""
    size_bytes = sum(file.stat().st_size for file in component.files)
    return LoadedComponent(component.name, 0, size_bytes, component.dtype or "float32", ",".join(component.sha256))
