"""Frames that are on the networks' device: the same people are found as in frames of the host, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from services.pose.bilinear import bilinear, bilinear_on_device
from services.pose.detect import YoloxConfig, YoloxDetector, letterbox, letterbox_on_device
from services.pose.keypoints import WholeBodyEstimator
from services.pose.onnx import OnnxNetwork, OnnxSettings
from services.pose.upload import HostCopy, Upload
from services.pose.whole_body import find_people
from training.tiny_onnx import colours, write_networks

Float32s = npt.NDArray[np.float32]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def on(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.zeros(0, device=name).device


class Network:
    """Gives stored answers on either side, and keeps the pictures that it was given."""

    source, gives, batch = "stored", "", 3

    def __init__(self, height: int, width: int, answers: Mapping[str, Float32s], device: torch.device) -> None:
        self.height, self.width, self.device = height, width, device
        self.answers, self.given = answers, list[Float32s]()
        self.shapes = {name: values.shape[1:] for name, values in answers.items()}

    def run(self, pictures: Float32s) -> dict[str, Float32s]:
        self.given.append(pictures.copy())
        return {name: values[: len(pictures)] for name, values in self.answers.items()}

    def run_on_device(self, pictures: Tensor) -> dict[str, Tensor]:
        assert pictures.device == self.device
        assert pictures.is_contiguous()
        answers = self.run(pictures.cpu().numpy())
        return {name: torch.from_numpy(values).to(self.device) for name, values in answers.items()}


def some_frames(count: int, height: int, width: int) -> list[npt.NDArray[np.uint8]]:
    return list(np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("outside", ["edge", "black"])
def test_places_are_read_alike(name: str, outside: Any) -> None:
    device, generator = on(name), np.random.default_rng(0)
    frames = some_frames(3, 50, 70)
    rows, columns = generator.uniform(-3, 55, (5, 31)), generator.uniform(-3, 75, (5, 23))
    which = [0, 2, 1, 1, 0]
    there = bilinear_on_device(
        torch.from_numpy(np.stack(frames)).to(device), torch.tensor(which), rows, columns, outside
    )
    here = [
        bilinear(frames[index], *places, outside)
        for index, places in zip(which, zip(rows, columns, strict=True), strict=True)
    ]
    np.testing.assert_array_equal(there.cpu(), here)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("size", [(64, 112), (100, 60), (9, 200)])
def test_letterboxes_are_alike(name: str, size: tuple[int, int]) -> None:
    frames = some_frames(4, *size)
    there, ratio = letterbox_on_device(torch.from_numpy(np.stack(frames)).to(on(name)), 80, 72)
    here = [letterbox(frame, 80, 72) for frame in frames]
    np.testing.assert_array_equal(there.cpu(), [canvas for canvas, _ in here])
    assert {ratio} == {one for _, one in here}


@pytest.mark.parametrize("name", DEVICES)
def test_the_detector_sees_and_finds_the_same(name: str) -> None:
    raw = np.random.default_rng(0).normal(0, 1, (5, 84, 7)).astype(np.float32)
    raw[..., 4:] = 1 / (1 + np.exp(-raw[..., 4:]))
    raw[2, :, 4] = 0  # nobody
    network: Any = Network(64, 64, {"output": raw}, on(name))
    detector = YoloxDetector(network, YoloxConfig(person=1))
    frames = some_frames(5, 50, 90)
    here, there = detector.detect(frames), detector.detect(Upload(on(name)).of(frames))
    np.testing.assert_array_equal(*network.given)
    assert [len(rows) > 0 for rows in here] == [True, True, False, True, True]
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@pytest.mark.parametrize("name", DEVICES)
def test_the_estimator_sees_and_finds_the_same(name: str) -> None:
    generator = np.random.default_rng(1)
    # few levels, so that several bins are best
    answers = {
        "x": (generator.integers(-2, 8, (3, 133, 48)) / 8).astype(np.float32),
        "y": (generator.integers(-2, 8, (3, 133, 64)) / 8).astype(np.float32),
    }
    answers["x"][:, 5] = -0.25
    network: Any = Network(32, 24, answers, on(name))
    estimator = WholeBodyEstimator(network)
    frames = some_frames(3, 60, 80)
    boxes = [np.array([[5, 5, 45, 50], [-9, 20, 90, 70]]), np.zeros((0, 5)), np.array([[30, 2, 60, 58], [1, 1, 9, 8]])]
    here, there = estimator.estimate(frames, boxes), estimator.estimate(Upload(on(name)).of(frames), boxes)
    assert [len(pictures) for pictures in network.given] == [3, 1, 3, 1]
    np.testing.assert_array_equal(np.concatenate(network.given[:2]), np.concatenate(network.given[2:]))
    assert [points.shape for points in there] == [(2, 134, 3), (0, 134, 3), (2, 134, 3)]
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("batch_frames", [2, 8])
def test_the_same_people_are_found_by_real_sessions(tmp_path: Path, batch_frames: int) -> None:
    write_networks(tmp_path)
    settings = OnnxSettings(device="cpu", num_threads=1)
    detector, whole_body = (
        OnnxNetwork.load(tmp_path / f"{name}.onnx", settings) for name in ("detector", "whole_body")
    )
    networks = (YoloxDetector(detector), WholeBodyEstimator(whole_body))
    frames = np.zeros((5, 80, 120, 3), np.uint8)
    for index, frame in enumerate(frames):
        if index != 2:
            frame[10:70, 30:70] = 140
            frame[20:25, 40 + index : 45 + index] = colours()[0]
    upload = Upload(torch.device("cpu"))
    for phantom in (False, True):
        here = list(find_people(frames, *networks, phantom=phantom))
        there = list(find_people(frames, *networks, phantom=phantom, batch_frames=batch_frames, upload=upload))
        assert [len(people) for people in there] == [1, 1, int(phantom), 1, 1]
        for one, other in zip(chain(*here), chain(*there), strict=True):
            np.testing.assert_array_equal(one.box, other.box)
            np.testing.assert_array_equal(one.keypoints, other.keypoints)
            assert one.score == other.score


@pytest.mark.parametrize("name", DEVICES)
def test_frames_arrive_whole_one_batch_after_the_other(name: str) -> None:
    upload = Upload(on(name))
    batches = [some_frames(count, *size) for count, size in ((3, (8, 6)), (2, (90, 70)), (5, (8, 6)), (5, (8, 6)))]
    uploaded = [upload.of(batch) for batch in batches]
    for batch, tensor in zip(batches, uploaded, strict=True):
        assert tensor.device == on(name)
        np.testing.assert_array_equal(tensor.cpu(), batch)


@pytest.mark.parametrize("name", DEVICES)
def test_pictures_are_copied_to_the_host(name: str) -> None:
    host = HostCopy()
    for value in (1.0, 2.0):
        pictures = torch.full((2, 3), value, device=on(name))
        assert host.of(pictures).device.type == "cpu"
        assert host.of(pictures).tolist() == [[value] * 3] * 2
