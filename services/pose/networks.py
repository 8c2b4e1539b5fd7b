"""The networks of an extraction at work: frames of the host in, people and joints out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.pose.clip import Batch, Frame, whole_batch
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
        batch_of: Callable[[int, int], Batch] | None = None,
    ) -> None:
        """batch_of: how much of a clip of a height and width is worked on at once; None: as much as suits the device."""
        self.masks = masks
        self._batch_of = batch_of
        self._detector, self._estimator, self._nlf = detector, estimator, nlf
        self._upload = Upload(self.device)
        self._nlf_detector = PersonDetector(_cells(detector.network), DetectorConfig(side=detector.network.height))

    @property
    def device(self) -> torch.device:
        return self._nlf.model.device

    def batch(self, height: int, width: int) -> Batch:
        """As extract.PoseModels."""
        if self._batch_of is not None:
            return self._batch_of(height, width)
        return whole_batch(height, width, on_gpu=self.device.type != "cpu")

    def people(self, frames: Sequence[Frame], *, phantom: bool) -> list[list[Person]]:
        """As extract.PoseModels."""
        networks = (self._detector, self._estimator)
        together = self.device.type != "cpu" and all(one.network.device == self.device for one in networks)
        upload = self._upload if together else None
        return list(find_people(frames, *networks, batch_frames=len(frames), phantom=phantom, upload=upload))

    def joints(self, frames: Sequence[Frame], quirks: NlfQuirks) -> Float32s:
        """As extract.PoseModels."""
        estimator = self._estimating(quirks, self.batch(*frames[0].shape[:2]).crops)
        return estimator.find_joints(self._upload.of(frames), self._nlf_detector).numpy()

    def warm_up(self, height: int, width: int) -> None:
        """Runs every network on black frames, as if each showed a person: libraries choose their kernels now."""
        batch = self.batch(height, width)
        count = 1 if self.device.type == "cpu" else batch.frames
        frames = [np.zeros((height, width, 3), np.uint8)] * count
        self.people(frames, phantom=True)
        self.joints(frames, NlfQuirks())
        box = torch.tensor([[0.0, 0.0, width, height]])
        self._estimating(NlfQuirks(), batch.crops).estimate(self._upload.of(frames), [box] * count)

    def _estimating(self, quirks: NlfQuirks, crops_at_once: int | None) -> NlfEstimator:
        nlf = self._nlf
        return NlfEstimator(
            nlf.config,
            nlf.model,
            nlf.canonical_points,
            quirks=quirks,
            batch_size=nlf.batch_size,
            crops_at_once=crops_at_once,
        )


def _cells(network: OnnxNetwork) -> Callable[[Tensor], Tensor]:
    """The only output of a network, where the pictures are; they are copied only if the network is elsewhere."""
    [output] = network.shapes
    on_host = HostCopy()

    def cells(pictures: Tensor) -> Tensor:
        if pictures.device == network.device:
            return network.run_on_device(pictures.contiguous())[output]
        return torch.from_numpy(network.run(on_host.of(pictures).numpy())[output]).to(pictures.device)

    return cells
