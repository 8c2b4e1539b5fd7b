"""The walk: both halves of a VAE on frames whose channels are last in memory, [n, h, w, C].

It computes the numbers of `model.py`, up to rounding, from the same modules and with the same past, which is in
this layout. What it saves is memory traffic: a norm writes into the place from which the convolution after it reads,
so nothing is padded or concatenated on the way, and what a convolution leaves apart is added up where it is read.

Applied to a loaded VAE from outside: `walk_channels_last`. For inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.kernels import can_compile
from services.vae.convolution import Doubling, Form, arranged, best_form
from services.vae.glue import PLAIN, Glue, Sum
from services.vae.model import (
    AttentionBlock,
    AverageDown,
    CausalConv3d,
    Chain,
    Decoder,
    Downsample,
    DownStage,
    DuplicateUp,
    Encoder,
    Grid,
    Past,
    ResidualBlock,
    RMSNorm,
    Upsample,
    UpStage,
    Vae,
)
from services.vae.tiles import Cut, cut_of, steps_of

ChooseForm: TypeAlias = Callable[[CausalConv3d], Form]
_BYTES_OF_PICTURES = 8 * 1024**2  # before a change of size; one as large keeps a GPU busy
_OLDEST_CAPABILITY = (8, 0)  # of a GPU that Triton makes kernels for as a matter of course


def walk_channels_last(vae: Vae, *, glue: Glue | None = None, form: ChooseForm | None = None) -> None:
    """Makes a loaded VAE, which stays on its device from now on, compute by the walk.

    Args:
        glue: None: the best that its device has.
        form: of each convolution over time; None: the best for its device.
    """
    device = vae.conv1.weight.device
    use_walk(vae, Walk(vae, glue or best_glue(device), form or partial(best_form, device=device)))


def use_walk(vae: Vae, walk: Walk) -> None:
    for half in (vae.encoder, vae.decoder):
        half.forward = partial(walk.half, half)  # type: ignore[method-assign]  # hooks still apply


def best_glue(device: torch.device) -> Glue:
    """Fused where there are kernels for the device."""
    if not can_compile(device, _OLDEST_CAPABILITY):
        return PLAIN
    from services.vae.triton_glue import TRITON

    return TRITON


class Walk:
    """The layers of a VAE, each as a function of frames [n, h, w, C]."""

    def __init__(self, vae: Vae, glue: Glue, form: ChooseForm) -> None:
        self._glue = glue
        self._convolutions = {
            layer: arranged(layer, form(layer), adds_bias=not glue.takes_bias)
            for layer in vae.modules()
            if isinstance(layer, CausalConv3d)
        }
        self._doublings = {layer: Doubling(layer) for layer in vae.modules() if isinstance(layer, Upsample)}
        for layer in vae.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)

    def half(self, half: Encoder | Decoder, x: Tensor, past: Past) -> Tensor:
        """`Encoder.forward` and `Decoder.forward`: [B, C, n, h, w] -> [B, C', n', h', w']."""
        if len(x) > 1:
            return torch.cat([self.half(half, x[i : i + 1], past.part(i)) for i in range(len(x))])
        frames = x.squeeze(0).permute(1, 2, 3, 0)
        frames = self._in_tiles(half, frames, past) if past.is_in_tiles else self.run(steps_of(half), frames, past)
        return frames.permute(3, 0, 1, 2).unsqueeze(0)

    def _in_tiles(self, half: Encoder | Decoder, x: Tensor, past: Past) -> Tensor:
        cut = cut_of(half)
        if isinstance(half, Encoder):
            return self.run(cut.whole, self._tiled(cut, x, past, inside=cut.scale, outside=1), past)
        return self._tiled(cut, self.run(cut.whole, x, past), past, inside=1, outside=cut.scale)

    def _tiled(self, cut: Cut, x: Tensor, past: Past, *, inside: int, outside: int) -> Tensor:
        """The layers of tiles, one tile after the other.

        Args:
            inside, outside: how many positions of `x`, and of the result, one at the cut is wide.
        """
        rows = cut.windows(x.shape[1] // inside, past.grid.rows)
        columns = cut.windows(x.shape[2] // inside, past.grid.columns)
        whole: Tensor | None = None
        for row, column in product(rows, columns):
            tile = x[:, row.computed(inside), column.computed(inside)].contiguous()
            y = self.tile(cut, tile, past.tile((row.start, column.start)))
            if past.grid == Grid(1, 1):
                return y
            if whole is None:
                whole = y.new_empty(len(y), rows[-1].stop * outside, columns[-1].stop * outside, y.shape[-1])
            whole[:, row.place(outside), column.place(outside)] = y[:, row.kept(outside), column.kept(outside)]
        assert whole is not None
        return whole

    def tile(self, cut: Cut, tile: Tensor, past: Past) -> Tensor:
        """The layers of tiles on one, with a past of its own."""
        at_once = past.frames_at_once
        # the first frame of a clip passes the changes of frame rate by itself
        if at_once is None or past.at_start:
            return self.run(cut.tiled, tile, past)
        return torch.cat([self.run(cut.tiled, frames, past) for frames in torch.split(tile, at_once)])

    def run(self, layers: Iterable[nn.Module], x: Tensor, past: Past) -> Tensor:
        """Layers one after the other. `x` may be written into by none of them."""
        for layer in layers:
            x = self._layer(layer, x, past)
        return x

    def _layer(self, layer: nn.Module, x: Tensor, past: Past) -> Tensor:
        match layer:
            case CausalConv3d():
                return self._glue.total(self._after_past(layer, x, past))
            case ResidualBlock():
                return self._residual(layer, x, past)
            case AttentionBlock():
                return self._attention(layer, x)
            case Downsample():
                return self._downsample(layer, x, past)
            case Upsample():
                return self._upsample(layer, x, past)
            case DownStage():
                return self._glue.total(Sum((self.run(layer.downsamples, x, past), _averaged(layer.shortcut, x))))
            case UpStage():
                y = self.run(layer.upsamples, x, past)
                shortcut = layer.shortcut
                return y if shortcut is None else self._glue.total(Sum((y, _duplicated(shortcut, x, past))))
            case Chain():
                norm, _, convolution = layer  # a head
                assert isinstance(norm, RMSNorm)
                assert isinstance(convolution, CausalConv3d)
                return self._glue.total(self._activated(norm, convolution, Sum((x,)), past))
        raise AssertionError(f"the walk does not know {type(layer).__name__}")

    def _residual(self, block: ResidualBlock, x: Tensor, past: Past) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = block.residual
        assert isinstance(norm1, RMSNorm)
        assert isinstance(norm2, RMSNorm)
        assert isinstance(conv1, CausalConv3d)
        assert isinstance(conv2, CausalConv3d)
        y = self._activated(norm2, conv2, self._activated(norm1, conv1, Sum((x,)), past), past)
        shortcut = block.shortcut
        if isinstance(shortcut, nn.Conv3d):
            x = F.linear(x, shortcut.weight.flatten(1), shortcut.bias)
        return self._glue.total(y.plus(x))

    def _activated(self, norm: RMSNorm, layer: CausalConv3d, x: Sum, past: Past) -> Sum:
        """Norm, SiLU and a convolution over time of stride 1."""
        convolution, first = self._convolutions[layer], x.first
        frames = convolution.room(first)
        self._glue.normed(x, norm.gamma.flatten(), frames[-len(first) :], silu=True)
        del x, first  # before the convolution needs room
        return convolution(frames, past)

    def _after_past(self, layer: CausalConv3d, x: Tensor, past: Past) -> Sum:
        """A convolution over time of any stride."""
        convolution = self._convolutions[layer]
        frames = convolution.room(x)
        frames[-len(x) :] = x
        return convolution(frames, past)

    def _attention(self, block: AttentionBlock, x: Tensor) -> Tensor:
        n, h, w, channels = x.shape
        normed = torch.empty_like(x)
        self._glue.normed(Sum((x,)), block.norm.gamma.flatten(), normed, silu=False)
        qkv = F.linear(normed.view(n, 1, h * w, channels), block.to_qkv.weight.flatten(1), block.to_qkv.bias)
        del normed
        query, key, value = qkv.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)
        del qkv, query, key, value
        projected = F.linear(attended.view(n, h, w, channels), block.proj.weight.flatten(1), block.proj.bias)
        return self._glue.total(Sum((projected, x)))

    def _downsample(self, layer: Downsample, x: Tensor, past: Past) -> Tensor:
        x = per_picture(layer.resample, x)
        time_conv = layer.time_conv
        if time_conv is None:
            return x
        if past.at_start:
            past.remember(time_conv, x[:1])
        return _after_first(lambda later: self._glue.total(self._after_past(time_conv, later, past)), x, past)

    def _upsample(self, layer: Upsample, x: Tensor, past: Past) -> Tensor:
        time_conv = layer.time_conv
        if time_conv is not None:
            x = _after_first(lambda later: self._rate_doubled(time_conv, later, past), x, past)
        n, h, w, _ = x.shape
        doubling = self._doublings[layer]
        out = x.new_empty(n, 2 * h, 2 * w, doubling.out_channels)
        at_once = pictures_at_once(x)
        for part, place in zip(torch.split(x, at_once), torch.split(out, at_once), strict=True):
            self._glue.doubled(doubling(part), doubling.bias, place)
        return out

    def _rate_doubled(self, time_conv: CausalConv3d, x: Tensor, past: Past) -> Tensor:
        """The first half of the channels are the even frames, the second the odd ones."""
        y = self._glue.total(self._after_past(time_conv, x, past))
        n, h, w, _ = x.shape
        return y.view(n, h, w, 2, -1).permute(0, 3, 1, 2, 4).reshape(2 * n, h, w, -1)


def pictures_at_once(x: Tensor) -> int:
    """How many frames a layer for pictures takes that makes larger ones on the way; large ones go one by one."""
    return max(1, _BYTES_OF_PICTURES // x[0].nbytes)


def per_picture(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a layer for pictures [N, C, h, w] to every frame."""
    parts = [layer(part.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for part in torch.split(x, pictures_at_once(x))]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _after_first(layer: Callable[[Tensor], Tensor], x: Tensor, past: Past) -> Tensor:
    """Applies a layer that changes the frame rate to all frames but the first of the clip."""
    if not past.at_start:
        return layer(x)
    return torch.cat([x[:1], layer(x[1:])]) if len(x) > 1 else x


def _averaged(shortcut: AverageDown, x: Tensor) -> Tensor:
    """`AverageDown` on frames [n, h, w, C]."""
    frames, side = shortcut.frames, shortcut.side
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -len(x) % frames, 0))
    n, h, w, channels = x.shape
    x = x.view(n // frames, frames, h // side, side, w // side, side, channels)
    x = x.permute(0, 2, 4, 6, 1, 3, 5)  # [n, h, w, C, frame, row, column]
    return x.reshape(n // frames, h // side, w // side, shortcut.out_channels, -1).mean(dim=-1)


def _duplicated(shortcut: DuplicateUp, x: Tensor, past: Past) -> Tensor:
    """`DuplicateUp` on frames [n, h, w, C]."""
    frames, side = shortcut.frames, shortcut.side
    n, h, w, _ = x.shape
    x = x.repeat_interleave(shortcut.repeats, dim=-1).view(n, h, w, shortcut.out_channels, frames, side, side)
    x = x.permute(0, 4, 1, 5, 2, 6, 3)  # [n, frame, h, row, w, column, C]
    x = x.reshape(n * frames, h * side, w * side, shortcut.out_channels)
    return x[frames - 1 :] if past.at_start else x
