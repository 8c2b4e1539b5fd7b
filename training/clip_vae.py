"""The VAE as it is trained: whole clips at once, and the weights that it starts from.

The numbers are those of services/vae/model.py, whose modules it walks. What differs is the form: a clip is one tensor
in channels-last layout, a convolution over time is one over pictures whose channels are those of three frames, and
norm, activation and the gathering of the three frames are compiled into few kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.vae.model import (
    AttentionBlock,
    CausalConv3d,
    Chain,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Upsample,
    Vae,
)

_LOG_VARIANCE_AT_START = -6.0  # at 0, the decoder would see mostly noise
_OLDER_TAPS = 0.1  # what the two older taps of a 3x3x3 convolution start with, of the newest one's size

Elementwise = Callable[[Tensor, Tensor], Tensor]


class ClipVae:
    """A VAE for whole clips [B, 3, n, H, W], n = 4k + 1.

    Attributes:
        vae: the modules, of Wan 2.1's kind (no patches, no averaged shortcuts).
    """

    def __init__(self, vae: Vae, *, compiled: bool) -> None:
        """`compiled`: whether norms and activations are compiled, as pays on a GPU."""
        self.vae, self._compiled = vae, compiled

    def posterior(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, z_dim, T, h, w] of the latents, not normalised, as `Vae.posterior`."""
        encoder = self.vae.encoder
        x = self._convolved(encoder.conv1, _channels_last(frames))
        x = self._chain(encoder.downsamples, x)
        x = self._chain(encoder.head, self._chain(encoder.middle, x))
        mean, log_variance = self.vae.conv1(x).chunk(2, dim=1)
        return mean, log_variance

    def generate(self, latents: Tensor) -> Tensor:
        """Frames of latents that are not normalised, as `Vae.generate`."""
        decoder = self.vae.decoder
        x = self._convolved(decoder.conv1, _channels_last(self.vae.conv2(latents)))
        x = self._chain(decoder.middle, x)
        return self._chain(decoder.head, self._chain(decoder.upsamples, x))

    def _chain(self, layers: Chain, x: Tensor) -> Tensor:
        remaining = iter(layers)
        for layer in remaining:
            match layer:
                case RMSNorm():
                    # always followed by SiLU and, past what stood for dropout, a convolution over time
                    convolution = next(after for after in remaining if isinstance(after, CausalConv3d))
                    x = self._activated_convolved(layer, convolution, x)
                case ResidualBlock():
                    x = self._chain(layer.residual, x) + self._projected(layer.shortcut, x)
                case AttentionBlock():
                    x = _by_picture(layer.attend, x)
                case Downsample():
                    x = self._downsampled(layer, x)
                case Upsample():
                    x = self._upsampled(layer, x)
        return x

    def _projected(self, shortcut: nn.Module, x: Tensor) -> Tensor:
        if isinstance(shortcut, nn.Identity):
            return x
        assert isinstance(shortcut, nn.Conv3d)
        return _by_picture(lambda pictures: F.conv2d(pictures, shortcut.weight[:, :, 0], shortcut.bias), x)

    def _activated_convolved(self, norm: RMSNorm, layer: CausalConv3d, x: Tensor) -> Tensor:
        gamma, last = norm.gamma.flatten(), x.movedim(1, -1)  # [B, n, h, w, C]
        positions = last.flatten(2, 3)
        if x.shape[2] == 1:
            active = _elementwise(_normed_silu, self._compiled)(positions, gamma)
            return self._convolved(layer, active.view(last.shape).movedim(-1, 1))
        gathered = _elementwise(_normed_silu_with_past, self._compiled)(positions, gamma)
        return _over_frames(layer, gathered.view(*last.shape[:-1], -1).movedim(-1, 1))

    def _convolved(self, layer: CausalConv3d, x: Tensor) -> Tensor:
        """A causal convolution of stride 1, zeros before the first frame."""
        if x.shape[2] == 1:
            newest = layer.weight[:, :, -1]
            return _by_picture(lambda frames: F.conv2d(frames, newest, layer.bias, padding=layer.borders), x)
        return _over_frames(layer, _with_past(x.movedim(1, -1)).movedim(-1, 1))

    def _downsampled(self, layer: Downsample, x: Tensor) -> Tensor:
        x = _by_picture(layer.resample, x)
        if layer.time_conv is None or x.shape[2] == 1:
            return x
        # later frames in twos, each two with the frame before them
        taps = [x[:, :, 0:-2:2], x[:, :, 1:-1:2], x[:, :, 2::2]]
        return torch.cat([x[:, :, :1], _over_frames(layer.time_conv, torch.cat(taps, dim=1))], dim=2)

    def _upsampled(self, layer: Upsample, x: Tensor) -> Tensor:
        if layer.time_conv is not None and x.shape[2] > 1:
            # for it the clip's first frame does not exist
            even, odd = self._convolved(layer.time_conv, x[:, :, 1:]).chunk(2, dim=1)
            doubled = torch.stack([even, odd], dim=3).flatten(2, 3)
            x = torch.cat([x[:, :, :1], doubled], dim=2)
        return _by_picture(layer.resample, x)


def initialise(vae: Vae, generator: torch.Generator) -> None:
    """Weights from which the VAE learns at all: variance kept, residual branches shut, time mostly ignored.

    Convolutions over space and time start as convolutions of the newest frame, and those that change the frame rate as
    copies of it; the latents' log-variance starts low.
    """
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, CausalConv3d):
                _initialise_causal(module, generator)
            elif isinstance(module, nn.Conv2d | nn.Conv3d):
                _normal(module.weight, 1 / module.weight[0].numel(), generator)
                _zero(module.bias)
        for module in vae.modules():
            if isinstance(module, ResidualBlock):
                last = module.residual[6]
                assert isinstance(last, CausalConv3d)
                last.weight.zero_()
            elif isinstance(module, AttentionBlock):
                module.proj.weight.zero_()
        z_dim = vae.config.z_dim
        bias = vae.conv1.bias
        assert bias is not None
        bias[z_dim:] = _LOG_VARIANCE_AT_START
        vae.conv1.weight[z_dim:].zero_()


def _initialise_causal(layer: CausalConv3d, generator: torch.Generator) -> None:
    _zero(layer.bias)
    out_channels, in_channels = layer.weight.shape[:2]
    if layer.kernel_size[1] == 1:
        layer.weight.zero_()
        newest = torch.eye(in_channels).repeat(out_channels // in_channels, 1)
        layer.weight[:, :, -1, 0, 0] = newest
        return
    _normal(layer.weight, 3 / layer.weight[0].numel(), generator)
    layer.weight[:, :, :-1] *= _OLDER_TAPS


def _normal(weight: Tensor, variance: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * math.sqrt(variance))


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        bias.zero_()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def _by_picture(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a layer for pictures [N, C, h, w] to every frame of [B, C, n, h, w]; channels stay last in memory."""
    pictures = x.transpose(1, 2).flatten(0, 1)
    y = layer(pictures.contiguous(memory_format=torch.channels_last))
    return torch.unflatten(y, 0, (x.shape[0], -1)).transpose(1, 2)


def _over_frames(layer: CausalConv3d, taps: Tensor) -> Tensor:
    """The convolution of pictures whose channels are those of three frames, oldest first: [B, 3 * C, n, h, w]."""
    # [out, in, time, row, column] -> [out, time * in, row, column]
    weight = layer.weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    return _by_picture(lambda frames: F.conv2d(frames, weight, layer.bias, padding=layer.borders), taps)


def _normed_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """RMSNorm over the last axis of [..., C], times gamma [C], then SiLU; in float32 inside."""
    wide = x.float()
    length = wide.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
    return F.silu(wide / length * (gamma * gamma.shape[0] ** 0.5)).to(x.dtype)


def _with_past(x: Tensor) -> Tensor:
    """[B, n, ..., C] -> [B, n, ..., 3 * C]: beside every frame the two before it, oldest first; zeros at the start."""
    borders = (0, 0) * (x.dim() - 2)
    earlier = [F.pad(x[:, :-count], (*borders, count, 0)) for count in (2, 1)]
    return torch.cat([*earlier, x], dim=-1)


def _normed_silu_with_past(x: Tensor, gamma: Tensor) -> Tensor:
    return _with_past(_normed_silu(x, gamma))


@cache
def _elementwise(function: Elementwise, compiled: bool) -> Elementwise:
    """A function of positions [B, n, h * w, C] and gamma [C], as it is or compiled."""
    if not compiled:
        return function
    faster = torch.compile(function)
    # once per number of channels, precision, and with or without gradient
    torch._dynamo.config.recompile_limit = 64

    def call(x: Tensor, gamma: Tensor) -> Tensor:
        for axis in range(3):
            torch._dynamo.maybe_mark_dynamic(x, axis)
        torch._dynamo.mark_static(x, 3)
        return faster(x, gamma)

    return call


def matrices_and_rest(vae: Vae) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights for Muon, which are the convolutions', and those for AdamW: norms, biases, first and last layers."""
    ends = {id(vae.encoder.conv1.weight), id(vae.decoder.head[2].weight), id(vae.conv1.weight), id(vae.conv2.weight)}
    matrices = [weight for weight in _weights(vae) if id(weight) not in ends]
    chosen = {id(weight) for weight in matrices}
    return matrices, [parameter for parameter in vae.parameters() if id(parameter) not in chosen]


def _weights(vae: Vae) -> Iterator[nn.Parameter]:
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            assert isinstance(module.weight, nn.Parameter)
            yield module.weight
