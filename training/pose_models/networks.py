"""The two networks that leave as ONNX files: who is where (YOLOX), and where each person's points are (RTMPose).

Both have the inputs and outputs of the released networks at smaller sizes; services/pose reads the sizes from the files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.pose.detect import YoloxConfig
from services.pose.keypoints import NUM_KEYPOINTS

NUM_POINTS = NUM_KEYPOINTS - 1
"""Of COCO-WholeBody; the neck is not among them."""

STRIDES = YoloxConfig().strides
DETECTOR_SIDE = 128
KEYPOINTS_HEIGHT, KEYPOINTS_WIDTH = 128, 96
"""The proportions of the released network, 384 x 288."""
BINS_PER_PIXEL = 2
_NUM_CLASSES = 80
_BOX, _OBJECT = 4, 1
_RARE_LOGIT = -4.0  # hardly any cell holds a person


def conv(channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, activate: bool = True) -> nn.Sequential:
    """Convolution without bias, batch norm and, unless told otherwise, ReLU, the cheapest on CPUs."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if activate else nn.Sequential(*layers)


class Residual(nn.Module):
    """Two convolutions that change what goes by; the shape stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv(channels, channels), conv(channels, channels, activate=False))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.convs(x))


def down(channels: int, out_channels: int) -> nn.Sequential:
    """To half the size."""
    return nn.Sequential(conv(channels, out_channels, stride=2), Residual(out_channels))


class DetectorNetwork(nn.Module):
    """Pictures [n, 3, H, W], BGR levels 0 to 255 -> [n, cells, 85] of YOLOX, H and W multiples of 32.

    Per cell: its place in cells, log size in cells, objectness 0 to 1, 80 class scores 0 to 1. The grids of the strides
    8, 16 and 32 follow each other, each row by row.
    """

    def __init__(self, channels: tuple[int, int, int, int, int] = (16, 32, 48, 64, 96), neck: int = 48) -> None:
        super().__init__()
        stem, quarter, *rest = channels
        self.scale = nn.BatchNorm2d(3)
        self.stem = nn.Sequential(conv(3, stem, stride=2), conv(stem, quarter, stride=2))
        sizes = [quarter, *rest]
        self.stages = nn.ModuleList(down(before, after) for before, after in zip(sizes, rest, strict=False))
        self.laterals = nn.ModuleList(conv(size, neck, 1) for size in rest)
        self.heads = nn.ModuleList(self._head(neck) for _ in rest)

    @staticmethod
    def _head(neck: int) -> nn.Sequential:
        last = nn.Conv2d(neck, _BOX + _OBJECT + _NUM_CLASSES, 1)
        nn.init.constant_(last.bias[_BOX:], _RARE_LOGIT)  # type: ignore[index]  # a convolution with a bias
        return nn.Sequential(conv(neck, neck), last)

    def forward(self, pictures: Tensor) -> Tensor:
        raw = self.logits(pictures)
        return torch.cat([raw[..., :_BOX], raw[..., _BOX:].sigmoid()], dim=-1)

    def logits(self, pictures: Tensor) -> Tensor:
        """As forward, with objectness and classes before the sigmoid."""
        x = self.stem(self.scale(pictures))
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        # what a coarse level knows of the whole person goes down to the finer ones
        merged = [self.laterals[-1](levels[-1])]
        for lateral, level in zip(list(self.laterals)[-2::-1], levels[-2::-1], strict=True):
            merged.insert(0, lateral(level) + functional.interpolate(merged[0], scale_factor=2.0, mode="nearest"))
        return torch.cat([head(level).flatten(2) for head, level in zip(self.heads, merged, strict=True)], dim=2).mT


class KeypointNetwork(nn.Module):
    """Pictures of one person each [n, 3, H, W], BGR normalised -> simcc_x [n, 133, 2 W] and simcc_y [n, 133, 2 H]; H and W
    are multiples of 16.

    Along either axis the best bin is where the point is, and its value, 0 to 1, how certain it is that the point is seen.
    """

    def __init__(
        self,
        height: int = KEYPOINTS_HEIGHT,
        width: int = KEYPOINTS_WIDTH,
        channels: tuple[int, int, int, int] = (24, 48, 80, 112),
        hidden: int = 96,
    ) -> None:
        super().__init__()
        stem, quarter, eighth, sixteenth = channels
        self.stem = nn.Sequential(conv(3, stem, stride=2), down(stem, quarter), down(quarter, eighth))
        self.coarse = nn.Sequential(down(eighth, sixteenth), Residual(sixteenth))
        self.fine = nn.Sequential(conv(eighth + sixteenth, eighth), nn.Conv2d(eighth, NUM_POINTS, 1))
        self.mix = nn.Sequential(nn.Linear((height // 8) * (width // 8), hidden), nn.ReLU())
        self.x = nn.Linear(hidden, width * BINS_PER_PIXEL)
        self.y = nn.Linear(hidden, height * BINS_PER_PIXEL)
        self.seen = nn.Linear(sixteenth, NUM_POINTS)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        x, y, seen = self.logits(pictures)
        certain = seen.sigmoid()[..., None]
        return self._peaked(x) * certain, self._peaked(y) * certain

    @staticmethod
    def _peaked(logits: Tensor) -> Tensor:
        """A distribution scaled so that its best bin is 1."""
        return (logits - logits.amax(dim=-1, keepdim=True)).exp()

    def logits(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the place along x [n, 133, 2 W] and y [n, 133, 2 H], and of being seen [n, 133]."""
        eighth = self.stem(pictures)
        sixteenth = self.coarse(eighth)
        merged = torch.cat([eighth, functional.interpolate(sixteenth, scale_factor=2.0, mode="nearest")], dim=1)
        points = self.mix(self.fine(merged).flatten(2))
        return self.x(points), self.y(points), self.seen(sixteenth.mean(dim=(2, 3)))
