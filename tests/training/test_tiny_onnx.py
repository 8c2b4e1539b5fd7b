"""The tiny networks: the layout of the released ones, and the same bytes everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from training.tiny_onnx import colours, detector, whole_body, write_networks


def layout(content: bytes) -> tuple[list[Any], list[Any]]:
    """Names, types and shapes of the inputs, and of the outputs."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    inputs, outputs = (
        [[value.name, value.type, value.shape] for value in values]
        for values in (session.get_inputs(), session.get_outputs())
    )
    return inputs, outputs


def test_the_detector_has_the_layout_of_yolox() -> None:
    inputs, outputs = layout(detector(640, 640))
    assert inputs == [["images", "tensor(float)", [1, 3, 640, 640]]]
    assert outputs == [["output", "tensor(float)", [1, 8400, 85]]]


def test_the_whole_body_network_has_the_layout_of_rtmpose() -> None:
    inputs, outputs = layout(whole_body(384, 288, "batch"))
    assert inputs == [["input", "tensor(float)", ["batch", 3, 384, 288]]]
    assert outputs == [
        ["simcc_x", "tensor(float)", ["batch", 133, 576]],
        ["simcc_y", "tensor(float)", ["batch", 133, 768]],
    ]


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_networks(tmp_path / name)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"detector.onnx", "whole_body.onnx"}


def test_every_point_has_a_colour_of_its_own() -> None:
    assert len({tuple(colour) for colour in colours()}) == 133
    differences = np.linalg.norm(colours()[:, None] - colours(), axis=-1)
    assert np.sort(differences.ravel())[133] > 32
