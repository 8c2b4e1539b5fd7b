"""Convolutions over time on frames [n, h, w, C], in the form that is fastest for their number of channels.

cuDNN's convolution over three axes is made for many channels. With few, three convolutions of pictures, one for each
frame that is looked at, take half its time; with very few, one of pictures whose channels are those of three frames.
On a CPU the convolution over three axes is never behind (`python -m benchmarks.vae --forms` measures them all).
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.vae.glue import Sum
from services.vae.model import CausalConv3d, convolve

_MOST_FOR_PICTURES = 96  # channels in, on a GPU
_MOST_FOR_GATHERED = 16
_CHANNELS_TOGETHER = 8  # that a half-precision product on a GPU takes at once, in and out


class Form(Enum):
    VOLUME = "over three axes"
    PICTURES = "three of pictures"
    GATHERED = "one of pictures with the channels of three frames"


class Convolution(Protocol):
    """Frames with the past before them [k + n, h, w, C] -> their convolution [n', h, w, C']."""

    def __call__(self, frames: Tensor, *, only_newest: bool) -> Sum:
        """only_newest: there is one frame and the past is zeros, so only the kernel's newest tap meets anything."""
        ...


def best_form(layer: CausalConv3d, device: torch.device) -> Form:
    if device.type != "cuda" or layer.kernel_size != (3, 3, 3):
        return Form.VOLUME
    if layer.in_channels <= _MOST_FOR_GATHERED:
        return Form.GATHERED
    return Form.PICTURES if layer.in_channels <= _MOST_FOR_PICTURES else Form.VOLUME


def arranged(layer: CausalConv3d, form: Form, *, adds_bias: bool) -> Convolution:
    """The layer in a form; its weight is put into the order that the form reads.

    Args:
        adds_bias: whether a convolution over three axes adds the bias, and does not leave it to who reads the `Sum`.
    """
    match form:
        case Form.PICTURES:
            return _Pictures(layer)
        case Form.GATHERED:
            return _Gathered(layer)
    return _Volume(layer, adds_bias=adds_bias)


class _Volume:
    def __init__(self, layer: CausalConv3d, *, adds_bias: bool) -> None:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        self._layer, self._adds_bias = layer, adds_bias

    def __call__(self, frames: Tensor, *, only_newest: bool) -> Sum:
        layer = self._layer
        bias, later = (layer.bias, None) if self._adds_bias else (None, layer.bias)
        if only_newest:
            return Sum((_over_pictures(frames[-1:], layer.weight[:, :, -1], bias, layer.borders),), later)
        volume = frames.permute(3, 0, 1, 2).unsqueeze(0)  # [1, C, k + n, h, w], channels last in memory
        y = convolve(volume, layer.weight, bias, layer.stride, (0, *layer.borders))
        return Sum((y.squeeze(0).permute(1, 2, 3, 0),), later)


class _Pictures:
    def __init__(self, layer: CausalConv3d) -> None:
        _require_three_frames(layer)
        # every tap's weight [C', C, 3, 3] is dense with channels last, and the layer's own is a view of the three
        taps = layer.weight.data.permute(2, 0, 3, 4, 1)
        taps = F.pad(taps, (0, 0) * 3 + (0, -layer.out_channels % _CHANNELS_TOGETHER)).contiguous()
        layer.weight.data = taps[:, : layer.out_channels].permute(1, 4, 0, 2, 3)
        self._taps, self._layer = taps.permute(0, 1, 4, 2, 3), layer

    def __call__(self, frames: Tensor, *, only_newest: bool) -> Sum:
        layer, count = self._layer, len(frames) - 2
        terms = [
            _first_channels(_over_pictures(frames[tap : tap + count], self._taps[tap], None, layer.borders), layer)
            for tap in ((2,) if only_newest else (0, 1, 2))
        ]
        return Sum(tuple(terms), layer.bias)


class _Gathered:
    """Holds a weight of its own, padded with zeros: small, as its channels are few."""

    def __init__(self, layer: CausalConv3d) -> None:
        _require_three_frames(layer)
        weight = layer.weight.data.transpose(1, 2).flatten(1, 2)  # [C', time * C, row, column]
        outer, inner = -layer.out_channels % _CHANNELS_TOGETHER, -weight.shape[1] % _CHANNELS_TOGETHER
        weight = F.pad(weight, (0, 0, 0, 0, 0, inner, 0, outer))
        self._weight, self._layer = weight.contiguous(memory_format=torch.channels_last), layer

    def __call__(self, frames: Tensor, *, only_newest: bool) -> Sum:
        layer = self._layer
        taps = torch.cat([frames[:-2], frames[1:-1], frames[2:]], dim=-1)
        taps = F.pad(taps, (0, self._weight.shape[1] - taps.shape[-1]))
        return Sum((_first_channels(_over_pictures(taps, self._weight, None, layer.borders), layer),), layer.bias)


def _require_three_frames(layer: CausalConv3d) -> None:
    assert layer.kernel_size[0] == 3
    assert layer.stride[0] == 1


def _first_channels(frames: Tensor, layer: CausalConv3d) -> Tensor:
    """Without those that only filled up."""
    return frames[..., : layer.out_channels].contiguous()


def _over_pictures(frames: Tensor, weight: Tensor, bias: Tensor | None, borders: tuple[int, int]) -> Tensor:
    """[n, h, w, C] -> [n, h, w, C'] with a weight [C', C, rows, columns]."""
    return F.conv2d(frames.permute(0, 3, 1, 2), weight, bias, padding=borders).permute(0, 2, 3, 1)
