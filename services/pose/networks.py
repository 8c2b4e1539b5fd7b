"""The networks of an extraction at work: frames of the host in, people and joints out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.pose.clip import Frame, frames_together
from services.pose.detect import YoloxDetector
from services.pose.keypoints import WholeBodyEstimator
from services.pose.nlf.config import NlfQuirks
from services.pose.nlf.detector import DetectorConfig, PersonDetector
from services.pose.nlf.model import NlfEstimator
from services.pose.onnx import OnnxNetwork
from services.pose.persons.masks import PersonMasks
from services.pose.upload import HostCopy, Upload
from services.pose.whole_body import Person, find_people

Float32s = npt.NDArray[np.float32]


class NetworkModels:
    """People by YOLOX and RTMPose, joints by NLF, which looks for people in its own pictures with the same YOLOX."""

    def __init__(
        self,
        detector: YoloxDetector,
        estimator: WholeBodyEstimator,
        nlf: NlfEstimator,
        masks: Mapping[str, PersonMasks],
    ) -> None:
        self.masks = masks
        self._detector, self._estimator, self._nlf = detector, estimator, nlf
        self._upload = Upload(self.device)
        self._nlf_detector = PersonDetector(_cells(detector.network), DetectorConfig(side=detector.network.height))

    @property
    def device(self) -> torch.device:
        return self._nlf.model.device

    def people(self, frames: Sequence[Frame], *, phantom: bool) -> list[list[Person]]:
        """As extract.PoseModels."""
        networks = (self._detector, self._estimator)
        together = self.device.type != "cpu" and all(one.network.device == self.device for one in networks)
        upload = self._upload if together else None
        return list(find_people(frames, *networks, batch_frames=len(frames), phantom=phantom, upload=upload))

    def joints(self, frames: Sequence[Frame], quirks: NlfQuirks) -> Float32s:
        """As extract.PoseModels."""
        nlf = self._nlf
        estimator = NlfEstimator(nlf.config, nlf.model, nlf.canonical_points, quirks=quirks, batch_size=nlf.batch_size)
        return estimator.find_joints(self._upload.of(frames), self._nlf_detector).numpy()

    def warm_up(self, height: int, width: int) -> None:
        """Runs every network on black frames, as if each showed a person: libraries choose their kernels now."""
        count = 1 if self.device.type == "cpu" else frames_together(height, width, on_gpu=True)
        frames = [np.zeros((height, width, 3), np.uint8)] * count
        self.people(frames, phantom=True)
        self.joints(frames, NlfQuirks())
        box = torch.tensor([[0.0, 0.0, width, height]])
        self._nlf.estimate(self._upload.of(frames), [box] * count)


def _cells(network: OnnxNetwork) -> Callable[[Tensor], Tensor]:
    """The only output of a network, where the pictures are; they are copied only if the network is elsewhere."""
    [output] = network.shapes
    on_host = HostCopy()

    def cells(pictures: Tensor) -> Tensor:
        if pictures.device == network.device:
            return network.run_on_device(pictures.contiguous())[output]
        return torch.from_numpy(network.run(on_host.of(pictures).numpy())[output]).to(pictures.device)

    return cells
