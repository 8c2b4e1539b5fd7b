"""Convolutions over time on frames [n, h, w, C], in the form that is fastest for their number of channels.

cuDNN's convolution over three axes is made for many channels. With fewer, three convolutions of pictures take less
time, one for each tap of the kernel: not of the frames that a tap looks at for a result, but of those that are new, as
what they add to later results can be remembered instead of the frames themselves. Then nothing of the past has to lie
before them in memory. With very few channels, one convolution of pictures does, of the channels of three frames or to
those of three taps. On a CPU the convolution over three axes is never behind
(`python -m benchmarks.vae --forms` measures them all).
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.vae.glue import Sum, Taps
from services.vae.model import CausalConv3d, Past, Upsample, convolve

_MOST_FOR_PICTURES = 192  # channels, on a GPU
_FEW = 16
_CHANNELS_TOGETHER = 8  # that a half-precision product on a GPU takes at once, in and out


class Form(Enum):
    VOLUME = "over three axes"
    PICTURES = "three of pictures"
    GATHERED = "one of pictures with the channels of three frames"
    STACKED = "one of pictures to the channels of three taps"


class Convolution(Protocol):
    def room(self, like: Tensor) -> Tensor:
        """Where the frames [n, h, w, C] must be written that are to be convolved, as many and as large as `like`.

        Returns:
            [k + n, h, w, C]: they are the last n.
        """
        ...

    def __call__(self, frames: Tensor, past: Past) -> Sum:
        """The convolution [n', h, w, C'] of the last frames in a `room` and what `past` knows of earlier ones.

        Until it is used up nothing else may be remembered.
        """
        ...


def best_form(layer: CausalConv3d, device: torch.device) -> Form:
    if device.type != "cuda" or layer.kernel_size != (3, 3, 3):
        return Form.VOLUME
    if layer.in_channels <= _FEW:
        return Form.GATHERED
    if layer.out_channels <= _FEW:
        return Form.STACKED
    return Form.PICTURES if layer.in_channels == layer.out_channels <= _MOST_FOR_PICTURES else Form.VOLUME


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
        case Form.STACKED:
            return _Stacked(layer)
    return _Volume(layer, adds_bias=adds_bias)


class _OnFrames:
    """A form that looks at the frames of the past, which therefore lie before the new ones."""

    def __init__(self, layer: CausalConv3d) -> None:
        self._layer, self._count = layer, layer.kernel_size[0] - layer.stride[0]

    def room(self, like: Tensor) -> Tensor:
        return like.new_empty(self._count + len(like), *like.shape[1:])

    def __call__(self, frames: Tensor, past: Past) -> Sum:
        layer, newest = self._layer, frames[-self._count :]
        before = past.recall(layer)
        frames[: self._count] = 0 if before is None else before
        if before is None:
            past.remember(layer, newest)
        else:
            before.copy_(newest)
        return self._convolved(frames, only_newest=before is None and len(frames) == layer.kernel_size[0])

    def _convolved(self, frames: Tensor, *, only_newest: bool) -> Sum:
        """only_newest: there is one frame and the past is zeros, so only the kernel's newest tap meets anything."""
        raise NotImplementedError


class _Volume(_OnFrames):
    def __init__(self, layer: CausalConv3d, *, adds_bias: bool) -> None:
        super().__init__(layer)
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        self._adds_bias = adds_bias

    def _convolved(self, frames: Tensor, *, only_newest: bool) -> Sum:
        layer = self._layer
        bias, later = (layer.bias, None) if self._adds_bias else (None, layer.bias)
        if only_newest:
            return Sum((_over_pictures(frames[-1:], layer.weight[:, :, -1], bias, layer.borders),), later)
        volume = frames.permute(3, 0, 1, 2).unsqueeze(0)  # [1, C, k + n, h, w], channels last in memory
        y = convolve(volume, layer.weight, bias, layer.stride, (0, *layer.borders))
        return Sum((y.squeeze(0).permute(1, 2, 3, 0),), later)


class _Gathered(_OnFrames):
    """Holds a weight of its own, padded with zeros: small, as its channels are few."""

    def __init__(self, layer: CausalConv3d) -> None:
        super().__init__(layer)
        _require_three_frames(layer)
        weight = layer.weight.data.transpose(1, 2).flatten(1, 2)  # [C', time * C, row, column]
        inner = -weight.shape[1] % _CHANNELS_TOGETHER
        weight = _filled_up(F.pad(weight, (0, 0, 0, 0, 0, inner)))
        self._weight = weight.contiguous(memory_format=torch.channels_last)

    def _convolved(self, frames: Tensor, *, only_newest: bool) -> Sum:
        layer = self._layer
        taps = torch.cat([frames[:-2], frames[1:-1], frames[2:]], dim=-1)
        taps = F.pad(taps, (0, self._weight.shape[1] - taps.shape[-1]))
        y = _over_pictures(taps, self._weight, None, layer.borders)
        return Sum((y[..., : layer.out_channels].contiguous(),), layer.bias)


class _OnNewFrames:
    """A form that computes what new frames add to their own result and to the next two."""

    def __init__(self, layer: CausalConv3d) -> None:
        _require_three_frames(layer)
        self._layer = layer

    def room(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def __call__(self, frames: Tensor, past: Past) -> Sum:
        layer = self._layer
        carried = past.recall(layer)
        is_first = carried is None
        if carried is None:
            carried = frames.new_empty(2, *frames.shape[1:3], layer.out_channels)
            past.keep(layer, carried)
        return Sum((), layer.bias, Taps(*self._products(frames), carried, is_first))

    def _products(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the newest, the middle and the oldest tap."""
        raise NotImplementedError


class _Pictures(_OnNewFrames):
    def __init__(self, layer: CausalConv3d) -> None:
        super().__init__(layer)
        # every tap's weight [C', C, 3, 3] is dense with channels last, and the layer's own is a view of the three
        taps = layer.weight.data.permute(2, 0, 3, 4, 1)
        taps = F.pad(taps, (0, 0) * 3 + (0, -layer.out_channels % _CHANNELS_TOGETHER)).contiguous()
        layer.weight.data = taps[:, : layer.out_channels].permute(1, 4, 0, 2, 3)
        self._taps = taps.permute(0, 1, 4, 2, 3)

    def _products(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer = self._layer
        now, later, latest = (
            _over_pictures(frames, self._taps[tap], None, layer.borders)[..., : layer.out_channels] for tap in (2, 1, 0)
        )
        return now, later, latest


class _Stacked(_OnNewFrames):
    """Holds a weight of its own, padded with zeros: small, as its channels are few."""

    def __init__(self, layer: CausalConv3d) -> None:
        super().__init__(layer)
        weight = _filled_up(layer.weight.data.flip(2).permute(2, 0, 1, 3, 4).flatten(0, 1))  # [tap * C', C, 3, 3]
        self._weight = weight.contiguous(memory_format=torch.channels_last)

    def _products(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = self._layer.out_channels
        now, later, latest = torch.split(
            _over_pictures(frames, self._weight, None, self._layer.borders)[..., : 3 * count], count, dim=-1
        )
        return now, later, latest


class Doubling:
    """Twice the height and width by repeating, then a convolution of 3x3, as one of 2x2 on the frames as they were.

    Of the nine positions that a result looks at, most are the same one repeated: it has four, whose weights are sums.
    Which, differs between even and odd rows and columns, so there are four results where there was one position.
    """

    def __init__(self, layer: Upsample) -> None:
        convolution = layer.resample[1]
        assert isinstance(convolution, nn.Conv2d)
        weight = convolution.weight.data
        # of even and odd rows: the larger frame's rows above, at and below that fall on the first and second row
        falls = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        phases = torch.einsum("pri,qsj,ocij->pqocrs", falls.to(wide.dtype), falls.to(wide.dtype), wide)
        self._weight = phases.flatten(0, 2).to(weight.dtype).contiguous(memory_format=torch.channels_last)
        self.bias, self.out_channels = convolution.bias, convolution.out_channels

    def __call__(self, frames: Tensor) -> Tensor:
        """[n, h, w, C] -> [n, h + 1, w + 1, 4 * C'], to be put together by `Glue.doubled`."""
        return _over_pictures(frames, self._weight, None, (1, 1))


def _require_three_frames(layer: CausalConv3d) -> None:
    assert layer.kernel_size[0] == 3
    assert layer.stride[0] == 1


def _filled_up(weight: Tensor) -> Tensor:
    """A weight [C', C, 3, 3] with so many channels out, the last of them zeros, as are computed at once."""
    return F.pad(weight, (0, 0) * 3 + (0, -weight.shape[0] % _CHANNELS_TOGETHER))


def _over_pictures(frames: Tensor, weight: Tensor, bias: Tensor | None, borders: tuple[int, int]) -> Tensor:
    """[n, h, w, C] -> [n, h, w, C'] with a weight [C', C, rows, columns]."""
    return F.conv2d(frames.permute(0, 3, 1, 2), weight, bias, padding=borders).permute(0, 2, 3, 1)
