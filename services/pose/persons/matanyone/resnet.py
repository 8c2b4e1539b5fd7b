"""The two residual networks of MatAnyone: of pictures (ResNet-50) and of a picture with a mask (ResNet-18), up to 1/16.

Modules are nested so that their tensors have the released names. Source: He et al. 2015 (arXiv:1512.03385).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

PIXEL_DIMS = (1024, 512, 256, 64, 3)
"""Widths of the picture's features at 1/16, 1/8, 1/4, 1/2 and 1/1 of its size."""

MASK_DIM = 256
"""Width of the features of a picture with a mask, at 1/16."""


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * 4
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class BasicBlock(nn.Module):
    """3x3 (with the stride), 3x3."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class PixelEncoder(nn.Module):
    """ResNet-50 without its last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.res2 = _bottlenecks(64, 64, repeats=3, stride=1)
        self.layer2 = _bottlenecks(256, 128, repeats=4, stride=2)
        self.layer3 = _bottlenecks(512, 256, repeats=6, stride=2)

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        """[1, 3, H, W] normalised -> features at 1/16, 1/8, 1/4, 1/2 and the picture itself."""
        half = functional.relu(self.bn1(self.conv1(picture)))
        quarter = self.res2(functional.max_pool2d(half, 3, stride=2, padding=1))
        eighth = self.layer2(quarter)
        return self.layer3(eighth), eighth, quarter, half, picture


def mask_layers() -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """The stages of ResNet-18 without its last, from 64 channels at 1/4 to MASK_DIM at 1/16."""
    return _basics(64, 64, stride=1), _basics(64, 128, stride=2), _basics(128, MASK_DIM, stride=2)


def _bottlenecks(channels: int, width: int, *, repeats: int, stride: int) -> nn.Sequential:
    first = Bottleneck(channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(width * 4, width, 1) for _ in range(repeats - 1)))


def _basics(channels: int, out: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(channels, out, stride), BasicBlock(out, out, 1))


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    if channels == out and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
