"""EfficientNetV2: pictures [n, 3, H, W], normalised to [-1, 1] -> features [n, 1280, H/32, W/32].

Modules are nested so that their tensors have the names of the released checkpoints (torchvision's).
Source: Tan and Le 2021 (arXiv:2104.00298); the centred stride is NLF's, Sárándi and Pons-Moll 2024 (arXiv:2407.07532).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

OUT_CHANNELS = 1280
_NORM_EPS = 1e-3


@dataclass(frozen=True)
class Stage:
    """Blocks of one width; the stride is that of the first. `fused` blocks expand with their 3x3 convolution."""

    fused: bool
    expand: int
    stride: int
    channels: int
    repeats: int


BACKBONES: Mapping[str, tuple[Stage, ...]] = {
    "efficientnetv2-s": (
        Stage(True, 1, 1, 24, 2),
        Stage(True, 4, 2, 48, 4),
        Stage(True, 4, 2, 64, 4),
        Stage(False, 4, 2, 128, 6),
        Stage(False, 6, 1, 160, 9),
        Stage(False, 6, 2, 256, 15),
    ),
    "efficientnetv2-l": (
        Stage(True, 1, 1, 32, 4),
        Stage(True, 4, 2, 64, 7),
        Stage(True, 4, 2, 96, 7),
        Stage(False, 4, 2, 192, 10),
        Stage(False, 6, 1, 224, 19),
        Stage(False, 6, 2, 384, 25),
        Stage(False, 6, 1, 640, 7),
    ),
    # of the tiny bundle; features are [n, 1280, H/16, W/16]
    "efficientnetv2-tiny": (
        Stage(True, 1, 1, 24, 1),
        Stage(True, 4, 2, 48, 2),
        Stage(True, 4, 2, 64, 2),
        Stage(False, 4, 2, 128, 3),
    ),
}


def efficientnet(stages: Sequence[Stage], *, centered_stride: bool, norm_eps: float = _NORM_EPS) -> nn.Sequential:
    """A feature extractor: stem, stages and the last 1x1 convolution, in this order.

    Args:
        stages: what BACKBONES has, say; the stem is as wide as the first of them.
        centered_stride: the last convolution with a stride starts at the first pixel instead of one before it, which
            puts its outputs on the centres of 32-pixel cells.
        norm_eps: of all batch norms.
    """
    channels = stages[0].channels
    last_strided = max(index for index, stage in enumerate(stages) if stage.stride == 2)
    modules: list[nn.Module] = [conv_norm(3, channels, 3, stride=2, eps=norm_eps)]
    for index, stage in enumerate(stages):
        shifted = centered_stride and index == last_strided
        blocks = []
        for repeat in range(stage.repeats):
            stride = stage.stride if repeat == 0 else 1
            blocks.append(Block(channels, stage, stride, shifted=shifted and repeat == 0, eps=norm_eps))
            channels = stage.channels
        modules.append(nn.Sequential(*blocks))
    modules.append(conv_norm(channels, OUT_CHANNELS, 1, eps=norm_eps))
    return nn.Sequential(*modules)


class Block(nn.Module):
    """An inverted bottleneck, with a residual where input and output have the same shape."""

    def __init__(self, channels: int, stage: Stage, stride: int, *, shifted: bool, eps: float) -> None:
        super().__init__()
        wide = channels * stage.expand
        if stage.fused and stage.expand == 1:
            parts: list[nn.Module] = [conv_norm(channels, stage.channels, 3, stride=stride, eps=eps)]
        elif stage.fused:
            parts = [
                conv_norm(channels, wide, 3, stride=stride, eps=eps),
                conv_norm(wide, stage.channels, 1, activate=False, eps=eps),
            ]
        else:
            parts = [
                conv_norm(channels, wide, 1, eps=eps),
                conv_norm(wide, wide, 3, stride=stride, groups=wide, shifted=shifted, eps=eps),
                SqueezeExcitation(wide, channels // 4),
                conv_norm(wide, stage.channels, 1, activate=False, eps=eps),
            ]
        self.block = nn.Sequential(*parts)
        self.residual = stride == 1 and channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return x + out if self.residual else out


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate that is computed from the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc2(functional.silu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))))
        return x * gate


class ShiftedConv2d(nn.Conv2d):
    """A convolution whose zero padding is all on the right and at the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        missing = self.kernel_size[0] - 1
        return super().forward(functional.pad(x, (0, missing, 0, missing)))


def conv_norm(
    channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    activate: bool = True,
    shifted: bool = False,
    eps: float,
) -> nn.Sequential:
    """Convolution without bias, batch norm and, unless told otherwise, SiLU."""
    build, padding = (ShiftedConv2d, 0) if shifted else (nn.Conv2d, kernel // 2)
    conv = build(channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out_channels, eps=eps)
    return nn.Sequential(conv, norm, nn.SiLU()) if activate else nn.Sequential(conv, norm)
