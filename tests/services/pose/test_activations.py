"""What is counted on the meta device is what the steps take: the same code with real tensors, as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.alive import Alive
from services.pose.activations import boxes_bytes, joints_bytes, people_bytes
from services.pose.clip import Batch
from services.pose.detect import YoloxDetector
from services.pose.keypoints import WholeBodyEstimator
from services.pose.nlf.crops import linear_light
from services.pose.nlf.detector import DetectorConfig, PersonDetector
from services.pose.nlf.weights import load_nlf, sizes_of
from services.pose.onnx_file import OnnxSizes
from services.pose.upload import Upload
from services.pose.whole_body import find_people

NLF = Path(__file__).resolve().parents[3] / "bundles" / "tiny" / "pose" / "nlf_tiny.safetensors"
CPU = torch.device("cpu")
COUNT, HEIGHT, WIDTH, CROPS = 8, 192, 320, 4
DETECTOR, WHOLE_BODY = OnnxSizes(0, 256, 256), OnnxSizes(0, 96, 64)
CELLS = 32 * 32 + 16 * 16 + 8 * 8


class Network:
    """Gives as many numbers as a network of its kind would, on the device; nothing of it is seen by the count."""

    source, gives, batch = "stand-in", "", CROPS

    def __init__(self, sizes: OnnxSizes, shapes: dict[str, tuple[int, ...]]) -> None:
        self.height, self.width, self.shapes = sizes.height, sizes.width, shapes

    def run_on_device(self, pictures: Tensor) -> dict[str, Tensor]:
        return {name: pictures.new_zeros(len(pictures), *shape) for name, shape in self.shapes.items()}


def frames() -> list[Any]:
    return [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * COUNT


def test_looking_for_people_takes_what_is_counted() -> None:
    detector: Any = Network(DETECTOR, {"output": (CELLS, 85)})
    points: Any = Network(WHOLE_BODY, {"x": (133, 2 * WHOLE_BODY.width), "y": (133, 2 * WHOLE_BODY.height)})
    networks = YoloxDetector(detector), WholeBodyEstimator(points)
    with torch.inference_mode(), Alive() as alive:
        list(find_people(frames(), *networks, batch_frames=COUNT, phantom=True, upload=Upload(CPU)))
    assert people_bytes(DETECTOR, WHOLE_BODY, CROPS, Batch(COUNT), HEIGHT, WIDTH) == pytest.approx(alive.most, rel=0.01)


def one_person(pictures: Tensor) -> Tensor:
    """What a detector gives for pictures with somebody in each."""
    raw = pictures.new_zeros(len(pictures), sum((pictures.shape[2] // stride) ** 2 for stride in (8, 16, 32)), 85)
    raw[:, 0, 2:4], raw[:, 0, 4:6] = 2.0, 1.0
    return raw


@torch.inference_mode()
def test_the_detectors_pictures_are_counted_beside_those_they_are_made_of() -> None:
    detector = PersonDetector(one_person, DetectorConfig(side=DETECTOR.height))
    with Alive() as alive:
        pictures = Upload(CPU).of(frames())
        detector.detect(linear_light(pictures, torch.float32))
    assert boxes_bytes(DETECTOR, COUNT, HEIGHT, WIDTH) == pytest.approx(alive.most, rel=0.01)


@pytest.mark.parametrize("crops", [1, CROPS])
def test_locating_people_takes_what_is_counted(crops: int) -> None:
    small = OnnxSizes(0, 64, 64)  # so that most is taken by the crops
    detector = PersonDetector(one_person, DetectorConfig(side=small.height))
    estimator = load_nlf(NLF, device=CPU, dtype=torch.float32)
    estimator.crops_at_once = crops
    with Alive() as alive:
        estimator.find_joints(Upload(CPU).of(frames()), detector)
    counted = joints_bytes(sizes_of(NLF), torch.float32, small, Batch(COUNT, crops), HEIGHT, WIDTH)
    assert counted == pytest.approx(alive.most, rel=0.02)
