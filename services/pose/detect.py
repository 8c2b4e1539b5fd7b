"""Frames -> boxes of the people in them, by a YOLOX network.

Source: YOLOX, Ge et al. 2021 (arXiv:2107.08430), fed and read as zai-org/SCAIL-Pose 830da75
DWPoseProcess/dwpose/onnxdet.py does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.pose.bilinear import Floats, Frame, bilinear, bilinear_on_device
from services.pose.onnx import OnnxNetwork
from services.pose.onnx_file import WrongNetwork
from services.pose.threads import beside_each_other

Float32s = npt.NDArray[np.float32]
Boxes = Float32s
"""[n, 5]: left, top, right, bottom in pixels, score; best score first. Boxes may reach beyond the frame."""

_PADDING = 114


@dataclass(frozen=True)
class YoloxConfig:
    """What is taken for a person.

    Attributes:
        strides: pixels per cell of the network's grids, in the order of its output.
        person: index of the class.
        candidate_threshold: boxes of a higher score compete.
        max_iou: of two that overlap by more than this, the better stays.
        threshold: winners of a higher score are people.
    """

    strides: tuple[int, ...] = (8, 16, 32)
    person: int = 0
    candidate_threshold: float = 0.1
    max_iou: float = 0.45
    threshold: float = 0.3


class YoloxDetector:
    """Boxes of the people in each frame."""

    def __init__(self, network: OnnxNetwork, config: YoloxConfig = YoloxConfig()) -> None:
        """Raises WrongNetwork: its output is not that of YOLOX for its input."""
        self.network, self.config = network, config
        # kept: the system takes as long to give so much memory as the pictures take to make
        self._pictures = np.empty((0, 3, network.height, network.width), np.float32)
        cells = sum((network.height // stride) * (network.width // stride) for stride in config.strides)
        classes = config.person + 1
        self._output, shape = next(iter(network.shapes.items()))
        if len(network.shapes) > 1 or len(shape) != 2 or shape[0] != cells or shape[1] < 5 + classes:
            raise WrongNetwork(
                f"{network.source}: a YOLOX detector of {network.height}x{network.width} pictures gives one output "
                f"[n, {cells}, 5 + at least {classes} classes], this network gives {network.gives}"
            )

    def detect(self, frames: Sequence[Frame] | Tensor) -> list[Boxes]:
        """People per frame.

        Args:
            frames: uint8 RGB [H, W, 3], of any size; all are held in memory at the network's size. Or [n, H, W, 3] on the
                network's device, where then all is done but the last: the same people come out, to the last bit.
        """
        if isinstance(frames, Tensor):
            return self._detect_on_device(frames)
        height, width = self.network.height, self.network.width
        if self._pictures.shape != (len(frames), 3, height, width):
            self._pictures = np.empty((len(frames), 3, height, width), np.float32)
        pictures = self._pictures

        def put_in(picture: Float32s, frame: Frame) -> float:
            canvas, ratio = letterbox(frame, height, width)
            picture[:] = canvas[..., ::-1].transpose(2, 0, 1)  # BGR, as the network was trained
            return ratio

        ratios = beside_each_other(put_in, pictures, frames)
        raw = self.network.run(pictures)[self._output]
        return [self._people(cells, ratio) for cells, ratio in zip(raw, ratios, strict=True)]

    def _detect_on_device(self, frames: Tensor) -> list[Boxes]:
        network, config = self.network, self.config
        canvas, ratio = letterbox_on_device(frames, network.height, network.width)
        pictures = canvas.flip(-1).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        raw = network.run_on_device(pictures)[self._output]
        scores = raw[..., 4] * raw[..., 5 + config.person]
        chosen = (scores > config.candidate_threshold).nonzero(as_tuple=True)
        picture, cell = (index.cpu().numpy() for index in chosen)
        numbers = torch.cat([raw[..., :4][chosen], scores[chosen][:, None]], dim=1).cpu().numpy()
        found = _boxes(numbers[:, :4], numbers[:, 4], cell, network.height, network.width, ratio, config)
        return [self._winners(found[picture == index]) for index in range(len(frames))]

    def _people(self, raw: Float32s, ratio: float) -> Boxes:
        return self._winners(candidates(raw, self.network.height, self.network.width, ratio, self.config))

    def _winners(self, found: Boxes) -> Boxes:
        winners = suppress(found, self.config.max_iou)
        return winners[winners[:, 4] > self.config.threshold]


def letterbox(frame: Frame, height: int, width: int) -> tuple[Frame, float]:
    """A frame scaled to fit into the top left corner of a grey canvas.

    Args:
        frame: uint8 [H, W, 3].

    Returns:
        uint8 [height, width, 3], and pixels of the canvas per pixel of the frame.
    """
    ratio, rows, columns = _places(frame.shape[0], frame.shape[1], height, width)
    canvas = np.full((height, width, frame.shape[2]), _PADDING, np.uint8)
    canvas[: len(rows), : len(columns)] = bilinear(frame, rows, columns, outside="edge")
    return canvas, ratio


def letterbox_on_device(frames: Tensor, height: int, width: int) -> tuple[Tensor, float]:
    """As `letterbox`, of frames uint8 [n, H, W, 3] on any device: uint8 [n, height, width, 3]."""
    count = len(frames)
    ratio, rows, columns = _places(frames.shape[1], frames.shape[2], height, width)
    scaled = bilinear_on_device(
        frames, torch.arange(count), np.tile(rows, (count, 1)), np.tile(columns, (count, 1)), outside="edge"
    )
    canvas = frames.new_full((count, height, width, frames.shape[3]), _PADDING)
    canvas[:, : len(rows), : len(columns)] = scaled
    return canvas, ratio


def _places(old_height: int, old_width: int, height: int, width: int) -> tuple[float, Floats, Floats]:
    """Pixels of the canvas per pixel of the frame, and the places in the frame of the canvas' rows and columns."""
    ratio = min(height / old_height, width / old_width)
    sides = [(max(1, int(old * ratio)), old) for old in (old_height, old_width)]
    rows, columns = ((np.arange(new) + 0.5) * (old / new) - 0.5 for new, old in sides)
    return ratio, rows, columns


def candidates(raw: Float32s, height: int, width: int, ratio: float, config: YoloxConfig = YoloxConfig()) -> Boxes:
    """Boxes that may be people, of one picture.

    Args:
        raw: [cells, 5 + classes]: place in the cell, log size, objectness, class scores; grids one after the other,
            each row by row.
        height, width: of the network's input.
        ratio: pixels of it per pixel of the frame.

    Returns:
        in the order of the cells.
    """
    scores = raw[:, 4] * raw[:, 5 + config.person]
    (chosen,) = (scores > config.candidate_threshold).nonzero()
    return _boxes(raw[chosen, :4], scores[chosen], chosen, height, width, ratio, config)


def _boxes(
    numbers: Float32s,
    scores: Float32s,
    chosen: npt.NDArray[np.int64],
    height: int,
    width: int,
    ratio: float,
    config: YoloxConfig,
) -> Boxes:
    """Boxes in the frame of the numbers [k, 4] and scores [k] of chosen cells."""
    cells, strides = (values[chosen] for values in _grids(height, width, config.strides))
    middle = (numbers[:, :2] + cells) * strides
    half = np.exp(numbers[:, 2:]) * strides / 2
    corners = np.concatenate([middle - half, middle + half], axis=1) / np.float32(ratio)
    return np.concatenate([corners, scores[:, None]], axis=1)


@cache
def _grids(height: int, width: int, strides: tuple[int, ...]) -> tuple[Float32s, Float32s]:
    """x and y [cells, 2] of every cell in cells of its own grid, and its stride [cells, 1]."""
    cells, sizes = [], []
    for stride in strides:
        y, x = np.indices((height // stride, width // stride), np.float32).reshape(2, -1)
        cells.append(np.stack([x, y], axis=1))
        sizes.append(np.full((len(x), 1), stride, np.float32))
    return np.concatenate(cells), np.concatenate(sizes)


def suppress(boxes: Boxes, max_iou: float) -> Boxes:
    """Greedy non-maximum suppression among boxes of one class; other classes never suppress people."""
    remaining = boxes[np.argsort(-boxes[:, 4], kind="stable")]
    winners = [remaining[:0]]
    while len(remaining):
        winners.append(remaining[:1])
        overlaps = iou(remaining[0], remaining[1:])
        remaining = remaining[1:][overlaps <= max_iou]
    return np.concatenate(winners)


def iou(box: Float32s, others: Boxes) -> Float32s:
    """Intersection over union of one box [5] with others; corners are pixels that belong to the box, hence the + 1."""
    sides = np.minimum(box[2:4], others[:, 2:4]) - np.maximum(box[:2], others[:, :2]) + 1
    intersection = np.maximum(sides, 0).prod(axis=1)
    areas = (others[:, 2:4] - others[:, :2] + 1).prod(axis=1)
    overlaps: Float32s = intersection / ((box[2:4] - box[:2] + 1).prod() + areas - intersection)
    return overlaps
