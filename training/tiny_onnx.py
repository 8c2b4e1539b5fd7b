"""Writes two tiny ONNX networks with the inputs and outputs of the released ones: a person detector and a whole-body one.

`python -m training.tiny_onnx DIRECTORY` writes detector.onnx and whole_body.onnx. Nothing in them is learnt: the person is
what differs from the picture's top left pixel, and each keypoint is where the picture has that keypoint's colour. So
they stand in for the real ones in tests and in the tiny bundle, and what they find is right or wrong and not just there.

ONNX files are protobuf messages. The few fields needed are written by hand, which spares a package; the numbers of
fields, types and operators are those of onnx.proto (https://github.com/onnx/onnx).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.pose.detect import YoloxConfig
from services.pose.keypoints import MEAN, NUM_KEYPOINTS, STD

DETECTOR_SIDE = 160
WHOLE_BODY_HEIGHT, WHOLE_BODY_WIDTH = 96, 72  # the proportions of the released network, 384 x 288

PERSON_SCORE = 0.9
_CONTRAST = 48.0  # levels by which a pixel of the person differs from the background
_PADDING = 114.0
_NUM_CLASSES = 80
_NUM_POINTS = NUM_KEYPOINTS - 1  # without the neck
_COLOUR_RADIUS = 32.0  # levels from a point's colour at which its score has fallen from 1 to 0
_BINS_PER_PIXEL = 2

_IR_VERSION, _OPSET = 8, 13
_FLOAT, _INT64 = 1, 7
_OF_INT, _OF_INTS = 2, 7

Sizes = Mapping[str, Sequence[int | str]]


def main() -> None:
    write_networks(Path(sys.argv[1]))


def write_networks(directory: Path) -> None:
    """detector.onnx takes one picture at a time and whole_body.onnx any number, like the released ones."""
    (directory / "detector.onnx").write_bytes(detector(DETECTOR_SIDE, DETECTOR_SIDE))
    (directory / "whole_body.onnx").write_bytes(whole_body(WHOLE_BODY_HEIGHT, WHOLE_BODY_WIDTH, "batch"))


def colours() -> npt.NDArray[np.float32]:
    """The colours that the keypoints are known by, in the network's order: levels [133, 3], R G B, none of them dark."""
    levels = np.meshgrid([51, 102, 153, 204, 255], np.arange(0, 256, 51), np.arange(0, 256, 51), indexing="ij")
    return np.stack(levels, axis=-1).reshape(-1, 3)[:_NUM_POINTS].astype(np.float32)


def detector(height: int, width: int, batch: int | str = 1) -> bytes:
    """`images` [batch, 3, height, width], BGR levels -> `output` [batch, cells, 85] of YOLOX, the person in its first cell.

    Args:
        batch: pictures at a time, or a name: any number.
    """
    graph = Graph()
    corner = graph.add("Slice", "images", graph.integers(0, 0), graph.integers(1, 1), graph.integers(2, 3))
    contrast = graph.maximum(graph.distance("images", corner), 1)
    from_padding = graph.maximum(graph.distance("images", graph.number(_PADDING)), 1)
    person = graph.add("And", graph.above(contrast, _CONTRAST), graph.above(from_padding, 0.5))
    mask = graph.add("Cast", person, to=_FLOAT)  # [n, 1, height, width]
    spans = [graph.span(mask, (1, 2), width), graph.span(mask, (1, 3), height)]
    strides = YoloxConfig().strides
    middles = [graph.times(graph.add("Add", low, high), 0.5 / strides[0]) for low, high in spans]
    # at least a pixel, so that the logarithm of nobody's size exists
    sides = [graph.add("Max", graph.add("Sub", high, low), graph.number(1)) for low, high in spans]
    sizes = [graph.add("Log", graph.times(side, 1 / strides[0])) for side in sides]
    found = graph.maximum(graph.add("Flatten", mask), 1)
    cell = graph.add("Concat", *middles, *sizes, found, graph.times(found, PERSON_SCORE), axis=1)  # [n, 6]
    cells = sum((height // stride) * (width // stride) for stride in strides)
    pads = graph.integers(0, 0, 0, 0, cells - 1, _NUM_CLASSES - 1)
    graph.add("Pad", graph.add("Unsqueeze", cell, graph.integers(1)), pads, output="output")
    return graph.model({"images": (batch, 3, height, width)}, {"output": (batch, cells, 5 + _NUM_CLASSES)})


def whole_body(height: int, width: int, batch: int | str = 1) -> bytes:
    """`input` [batch, 3, height, width], BGR normalised -> `simcc_x`, `simcc_y` [batch, 133, 2 x width or height].

    Args:
        batch: pictures at a time, or a name: any number.
    """
    graph = Graph()
    levels = graph.add(
        "Add", graph.add("Mul", "input", graph.constant(_per_channel(STD))), graph.constant(_per_channel(MEAN))
    )
    # 1 - |level - colour|^2 / radius^2, multiplied out so that it is one convolution for all points
    wanted = colours()[:, ::-1] / _COLOUR_RADIUS
    weight = graph.constant((2 * wanted / _COLOUR_RADIUS)[:, :, None, None])
    bias = graph.constant(1 - (wanted**2).sum(axis=1))
    brightness = graph.add("ReduceSumSquare", levels, axes=(1,), keepdims=1)
    score = graph.add("Sub", graph.add("Conv", levels, weight, bias), graph.times(brightness, _COLOUR_RADIUS**-2))
    for name, others in (("simcc_x", 2), ("simcc_y", 3)):
        profile = graph.add("ReduceMax", score, axes=(others,), keepdims=0)
        bins = graph.add(
            "Tile", graph.add("Unsqueeze", profile, graph.integers(3)), graph.integers(1, 1, 1, _BINS_PER_PIXEL)
        )
        graph.add("Reshape", bins, graph.integers(0, 0, -1), output=name)
    outputs = {
        "simcc_x": (batch, _NUM_POINTS, _BINS_PER_PIXEL * width),
        "simcc_y": (batch, _NUM_POINTS, _BINS_PER_PIXEL * height),
    }
    return graph.model({"input": (batch, 3, height, width)}, outputs)


def _per_channel(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return values.reshape(3, 1, 1)


class Graph:
    """An ONNX graph under construction; values are known by their names."""

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self._constants: list[bytes] = []

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: int | Sequence[int]) -> str:
        """Appends an operator; gives the name of its only output."""
        output = output or f"value{len(self._nodes)}"
        node = [_field(1, name) for name in inputs] + [_field(2, output), _field(4, operator)]
        node += [_field(5, _attribute(name, value)) for name, value in attributes.items()]
        self._nodes.append(_field(1, b"".join(node)))
        return output

    def constant(self, values: npt.NDArray[Any]) -> str:
        """float32, or int64 where `values` are integers."""
        name = f"constant{len(self._constants)}"
        is_integer = np.issubdtype(values.dtype, np.integer)
        raw = np.ascontiguousarray(values, "<i8" if is_integer else "<f4").tobytes()
        sizes = [_field(1, size) for size in values.shape]
        tensor = [*sizes, _field(2, _INT64 if is_integer else _FLOAT), _field(8, name), _field(9, raw)]
        self._constants.append(_field(5, b"".join(tensor)))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def times(self, value: str, factor: float) -> str:
        return self.add("Mul", value, self.number(factor))

    def distance(self, one: str, other: str) -> str:
        return self.add("Abs", self.add("Sub", one, other))

    def above(self, value: str, threshold: float) -> str:
        return self.add("Greater", value, self.number(threshold))

    def maximum(self, value: str, axis: int) -> str:
        return self.add("ReduceMax", value, axes=(axis,), keepdims=1)

    def span(self, mask: str, others: Sequence[int], size: int) -> tuple[str, str]:
        """First and one past the last place [n, 1] at which a mask has a 1 along its axis that is not among `others`."""
        occupied = self.add("ReduceMax", mask, axes=others, keepdims=0)  # [n, size]
        places = np.arange(size, dtype=np.float32)
        from_end = self.maximum(self.add("Mul", occupied, self.constant(size - places)), 1)
        end = self.maximum(self.add("Mul", occupied, self.constant(places + 1)), 1)
        return self.add("Sub", self.number(size), from_end), end

    def model(self, inputs: Sizes, outputs: Sizes) -> bytes:
        """The file; sizes that are strings are free."""
        graph = b"".join([*self._nodes, _field(2, "graph"), *self._constants])
        graph += b"".join(_field(11, _value(name, sizes)) for name, sizes in inputs.items())
        graph += b"".join(_field(12, _value(name, sizes)) for name, sizes in outputs.items())
        return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, _field(2, _OPSET))


def _attribute(name: str, value: int | Sequence[int]) -> bytes:
    if isinstance(value, int):
        return _field(1, name) + _field(3, value) + _field(20, _OF_INT)
    return _field(1, name) + b"".join(_field(8, one) for one in value) + _field(20, _OF_INTS)


def _value(name: str, sizes: Sequence[int | str]) -> bytes:
    """A float32 input or output."""
    axes = b"".join(_field(1, _field(2 if isinstance(size, str) else 1, size)) for size in sizes)
    return _field(1, name) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, axes)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protobuf message: its number and kind, then a number, or a length and that many bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits per byte, lowest first."""
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


if __name__ == "__main__":
    main()
