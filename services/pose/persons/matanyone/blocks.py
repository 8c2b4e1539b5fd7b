"""Building blocks of MatAnyone: residual blocks, the fusion of a picture's features with a person's, the recurrent state.

In all shapes P is the number of people; h, w are a sixteenth of the picture's height and width. Modules are nested so
that their tensors have the released names. Source: pq-yang/MatAnyone e5ddc53, which builds on Cutie, Cheng et al. 2023
(arXiv:2310.12982).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_GATE_KERNEL = 5  # channels that a gate sees: log2 of the width, halved and made odd; every gated width is 256


def area_resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """[P, C, H, W] -> [P, C, *size]: means of the cells that fall on a new one."""
    return functional.interpolate(x, size=tuple(size), mode="area")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after a ReLU; the input joins by a 1x1 convolution where the width changes."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.downsample = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(functional.relu(self.conv1(functional.relu(x))))
        return out + self.downsample(x)


class GatedResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, scaled by a gate per channel that is computed from the channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv = nn.Conv1d(1, 1, _GATE_KERNEL, padding=_GATE_KERNEL // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(functional.relu(self.conv1(functional.relu(x))))
        gate = torch.sigmoid(self.conv(out.mean(dim=(2, 3))[:, None]))  # [P, 1, C]
        return out * gate.transpose(1, 2)[..., None] + x


class Distributor(nn.Module):
    """Adds a picture's features to those of each person."""

    def __init__(self, picture_dim: int, person_dim: int, out_dim: int) -> None:
        super().__init__()
        self.x_transform = nn.Conv2d(picture_dim, out_dim, 1)
        self.g_transform = nn.Conv2d(person_dim, out_dim, 1)

    def forward(self, picture: Tensor, person: Tensor) -> Tensor:
        """[1, C, h, w] and [P, C', h, w] -> [P, out_dim, h, w]."""
        added: Tensor = self.x_transform(picture) + self.g_transform(person)
        return added


class Fuser(nn.Module):
    """A picture's features and a person's -> one map per person."""

    def __init__(self, picture_dim: int, person_dim: int, out_dim: int) -> None:
        super().__init__()
        self.distributor = Distributor(picture_dim, person_dim, out_dim)
        self.block1 = GatedResidualBlock(out_dim)
        self.block2 = GatedResidualBlock(out_dim)

    def forward(self, picture: Tensor, person: Tensor) -> Tensor:
        fused: Tensor = self.block2(self.block1(self.distributor(picture, person)))
        return fused


class SensoryUpdate(nn.Module):
    """A gated recurrent step of the sensory state, by what was seen at 1/16 of the size."""

    def __init__(self, seen_dim: int, sensory_dim: int) -> None:
        super().__init__()
        self.transform = nn.Conv2d(seen_dim + sensory_dim, sensory_dim * 3, 3, padding=1)

    def update(self, seen: Tensor, sensory: Tensor) -> Tensor:
        """[P, seen_dim, h, w] and [P, sensory_dim, h, w] -> [P, sensory_dim, h, w]."""
        forget, update, new = self.transform(torch.cat([seen, sensory], dim=1)).chunk(3, dim=1)
        forget, update = torch.sigmoid(forget), torch.sigmoid(update)
        return forget * sensory * (1 - update) + update * torch.tanh(new)
