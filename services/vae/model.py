"""The Wan video VAEs: frames <-> latents, a few frames at a time and in constant memory.

Frames are float [B, 3, n, H, W] in [-1, 1]. Latents are float32 [B, z_dim, T, H/8, W/8] (H/16, W/16 for Wan 2.2),
normalised per channel. The first frame of a clip becomes the first latent frame and every further four frames become
one more: T = 1 + (n - 1) // 4.

Every layer sees a clip in chunks, and never a later frame than the one it computes. What it has to remember of earlier
frames is kept in a `Past`, one per clip, and not in the module, so clips in different threads cannot mix. A chunk may
have any length: `encode_stream` and `decode_stream` take four frames at a time for the least memory, training takes
whole clips, and both compute the same numbers (up to rounding).

Modules and parameters have the names of the released checkpoints.
Source: Wan-Video/Wan2.2 wan/modules/vae2_1.py and vae2_2.py, commit 42bf4cf.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# fmt: off
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
    -0.1922, -0.9497, 0.2503, -0.2921,
)
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
    1.6382, 1.1253, 2.8251, 1.9160,
)
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of a VAE and the statistics of its latents; the defaults are those of Wan 2.1.

    Attributes:
        dim: channels of the encoder's first stage; stage i has dim * dim_mult[i].
        decoder_dim: the same of the decoder, None where it is as wide as the encoder.
        z_dim: channels of a latent.
        num_res_blocks: residual blocks of an encoder stage; a decoder stage has one more.
        temporal_downsample: of every stage but the last, all of which halve height and width: whether it halves the
            frame rate too.
        patch_size: side of the pixel squares that are folded into channels before the encoder.
        residual_stages: whether an averaged copy of a stage's input is added to its output (Wan 2.2).
        latents_mean, latents_std: per channel, subtracted and divided by.

    Raises:
        ValueError: the lengths do not fit each other.
    """

    dim: int = 96
    decoder_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    residual_stages: bool = False
    latents_mean: tuple[float, ...] = WAN21_MEAN
    latents_std: tuple[float, ...] = WAN21_STD

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample needs {len(self.dim_mult) - 1} entries, got {len(self.temporal_downsample)}"
            )
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != self.z_dim:
                raise ValueError(f"{name} needs z_dim = {self.z_dim} entries, got {len(values)}")

    @property
    def frames_per_latent(self) -> int:
        return int(2 ** sum(self.temporal_downsample))

    @property
    def pixels_per_latent(self) -> int:
        """Height and width of the square of pixels that one latent position stands for."""
        return int(self.patch_size * 2 ** len(self.temporal_downsample))


PRESETS: Mapping[str, VaeConfig] = {
    "wan2.1": VaeConfig(),
    "wan2.2": VaeConfig(
        dim=160,
        decoder_dim=256,
        z_dim=48,
        patch_size=2,
        residual_stages=True,
        latents_mean=WAN22_MEAN,
        latents_std=WAN22_STD,
    ),
}


@dataclass(frozen=True)
class Grid:
    """Into how many tiles frames are cut where that is asked for (services/vae/tiles.py)."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


class Past:
    """What the layers remember of one clip between chunks: the last input frames of every convolution over time.

    Or what these frames add to the next ones, which is as large: the channels-last walk decides.
    """

    def __init__(self, grid: Grid = Grid(1, 1), frames_at_once: int | None = None) -> None:
        """For a new clip.

        Args:
            grid: of the tiles that the channels-last walk computes one by one; a plain forward pass has no tiles.
            frames_at_once: of those of a chunk that the walk computes in a tile; None: all.
        """
        self.grid, self.frames_at_once = grid, frames_at_once
        self.at_start = True
        """Whether the chunk under way holds the clip's first frame; it passes the changes of frame rate alone."""
        self.frames: dict[nn.Module, Tensor] = {}
        self._parts: dict[Hashable, Past] = {}

    @property
    def is_in_tiles(self) -> bool:
        """Whether some layers do not see whole chunks."""
        return self.grid != Grid(1, 1) or self.frames_at_once is not None

    def part(self, key: Hashable) -> Past:
        """The past of a part of the clip that is computed by itself: of one sample of a batch."""
        return self._kept(key, lambda: Past(self.grid, self.frames_at_once))

    def tile(self, key: Hashable) -> Past:
        """The past of a tile."""
        return self.part(key)

    def as_large_as(self, other: Past) -> None:
        """Remembers as many bytes as another past of the same layers, of any values."""
        self.frames = {layer: torch.empty_like(frames) for layer, frames in other.frames.items()}

    def recall(self, layer: nn.Module) -> Tensor | None:
        """What `layer` remembers, which may be written to until another layer's is asked for; None: nothing yet."""
        return self.frames.get(layer)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Makes `frames`, which nothing else uses, what `layer` remembers."""
        self.frames[layer] = frames

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        self.keep(layer, frames.clone())  # a view would keep the whole chunk alive

    def join(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """Puts the last `count` frames that `layer` saw (at first zeros) before `x`; remembers the new last ones."""
        before = self.recall(layer)
        if before is None:
            before = x.new_zeros(*x.shape[:2], count, *x.shape[3:])
        joined = torch.cat([before, x], dim=2)
        self.remember(layer, joined[:, :, -count:])
        return joined

    def _kept(self, key: Hashable, make: Callable[[], Past]) -> Past:
        """The part of a key, made the first time."""
        if key not in self._parts:
            self._parts[key] = make()
        self._parts[key].at_start = self.at_start
        return self._parts[key]


class Causal:
    """Marks the layers that look back in time and are called as `layer(x, past)`."""


class Chain(nn.ModuleList):
    """Layers one after the other, some of them causal."""

    def forward(self, x: Tensor, past: Past) -> Tensor:
        for layer in self:
            x = layer(x, past) if isinstance(layer, Causal) else layer(x)
        return x


_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch does not annotate it


class CausalConv3d(Causal, nn.Conv3d):
    """A convolution over the frames up to the present one; zeros precede the first."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3), *, time_stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=(time_stride, 1, 1))
        self.borders = (kernel[1] // 2, kernel[2] // 2)

    def forward(self, x: Tensor, past: Past) -> Tensor:  # type: ignore[override]  # takes the past besides
        is_first = self not in past.frames
        x = past.join(self, x, self.kernel_size[0] - self.stride[0])
        if is_first and x.shape[2] == self.kernel_size[0]:
            # one frame behind nothing but zeros meets only the kernel's last tap: a third of the work
            return F.conv2d(x[:, :, -1], self.weight[:, :, -1], self.bias, padding=self.borders).unsqueeze(2)
        return convolve(x, self.weight, self.bias, self.stride, (0, *self.borders))


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, int, int]
) -> Tensor:
    """F.conv3d, without its own choice for small inputs on a CPU, which is 4 to 15 times slower than oneDNN."""
    if _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


class RMSNorm(nn.Module):
    """Scales the channel vector at every position to the length sqrt(C), then each channel by gamma."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        # 1e-12 is 0 in half precision, where 0 / 0 must not happen either
        smallest = max(1e-12, torch.finfo(x.dtype).tiny)
        scaled: Tensor = x / channel_norm(x).clamp_min(smallest) * (self.gamma * self.gamma.shape[0] ** 0.5)
        return scaled


def channel_norm(x: Tensor) -> Tensor:
    """The length of the channel vector at every position: [B, C, ...] -> [B, 1, ...]."""
    if x.dtype == torch.float32:
        return x.square().sum(dim=1, keepdim=True).sqrt()  # on the CPU in a twentieth of vector_norm's time
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # squares overflow in float16; this sums in float32
    return norm


class ResidualBlock(Causal, nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = Chain(
            [
                RMSNorm(in_channels),
                nn.SiLU(),
                CausalConv3d(in_channels, out_channels),
                RMSNorm(out_channels),
                nn.SiLU(),
                nn.Identity(),  # dropout in the released code; the names count it
                CausalConv3d(out_channels, out_channels),
            ]
        )
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y: Tensor = self.residual(x, past) + self.shortcut(x)
        return y


class AttentionBlock(nn.Module):
    """Attention between the positions of a frame, with a single head; frames do not see each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self.attend, x)

    def attend(self, x: Tensor) -> Tensor:
        # contiguous: the fused attention kernels want a position's channels side by side
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()  # [B*n, 1, h*w, 3C]
        attended = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        y: Tensor = x + self.proj(attended.transpose(2, 3).reshape(x.shape))
        return y


class Downsample(Causal, nn.Module):
    """Halves height and width and, if temporal, the frame rate: the first frame stays alone, then two become one."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        if past.at_start:
            past.remember(self.time_conv, x[:, :, :1])
        return after_first_frame(self.time_conv, x, past)


class Upsample(Causal, nn.Module):
    """Doubles height and width and, if temporal, the frame rate: the first frame stays alone, then one becomes two."""

    def __init__(self, in_channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.time_conv = CausalConv3d(in_channels, 2 * in_channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.time_conv is not None:
            # unlike in Downsample, the first frame is not part of what the later ones look back on
            x = after_first_frame(self.double_rate, x, past)
        return per_frame(self.resample, x)

    def double_rate(self, x: Tensor, past: Past) -> Tensor:
        assert self.time_conv is not None
        even, odd = self.time_conv(x, past).chunk(2, dim=1)
        return torch.stack([even, odd], dim=3).flatten(2, 3)  # 2 * [B, C, n, h, w] -> [B, C, 2n, h, w]


def after_first_frame(layer: Callable[[Tensor, Past], Tensor], x: Tensor, past: Past) -> Tensor:
    """Applies a layer that changes the frame rate to all frames but the first of the clip."""
    if not past.at_start:
        return layer(x, past)
    first, later = x[:, :, :1], x[:, :, 1:]
    return torch.cat([first, layer(later, past)], dim=2) if later.shape[2] else first


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a layer for pictures [N, C, h, w] to every frame of [B, C, n, h, w]."""
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return torch.unflatten(y, 0, (x.shape[0], -1)).transpose(1, 2)


class AverageDown(nn.Module):
    """Makes a stage's input as small as its output: blocks of positions become channels, averaged in groups."""

    def __init__(self, out_channels: int, *, frames: int, side: int) -> None:
        super().__init__()
        self.out_channels, self.frames, self.side = out_channels, frames, side

    def forward(self, x: Tensor) -> Tensor:
        # zeros stand beside the clip's first frame, which has no partner
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.frames, 0))
        batch, channels, count, height, width = x.shape
        n, h, w = count // self.frames, height // self.side, width // self.side
        x = x.reshape(batch, channels, n, self.frames, h, self.side, w, self.side)
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # [B, C, frame, row, column, n, h, w]
        return x.reshape(batch, self.out_channels, -1, n, h, w).mean(dim=2)


class DuplicateUp(Causal, nn.Module):
    """Makes a stage's input as large as its output: channels, repeated as needed, become blocks of positions."""

    def __init__(self, in_channels: int, out_channels: int, *, frames: int, side: int) -> None:
        super().__init__()
        self.out_channels, self.frames, self.side = out_channels, frames, side
        self.repeats = out_channels * frames * side * side // in_channels

    def forward(self, x: Tensor, past: Past) -> Tensor:
        batch, _, n, h, w = x.shape
        x = x.repeat_interleave(self.repeats, dim=1)
        x = x.reshape(batch, self.out_channels, self.frames, self.side, self.side, n, h, w)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, C, n, frame, h, row, w, column]
        x = x.reshape(batch, self.out_channels, n * self.frames, h * self.side, w * self.side)
        # the clip's first frame is not doubled
        return x[:, :, self.frames - 1 :] if past.at_start else x


class DownStage(Causal, nn.Module):
    def __init__(self, layers: Iterable[nn.Module], shortcut: AverageDown) -> None:
        super().__init__()
        self.downsamples = Chain(layers)
        self.shortcut = shortcut

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y: Tensor = self.downsamples(x, past) + self.shortcut(x)
        return y


class UpStage(Causal, nn.Module):
    def __init__(self, layers: Iterable[nn.Module], shortcut: DuplicateUp | None) -> None:
        super().__init__()
        self.upsamples = Chain(layers)
        self.shortcut = shortcut

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y: Tensor = self.upsamples(x, past)
        if self.shortcut is not None:
            y = y + self.shortcut(x, past)
        return y


class Encoder(nn.Module):
    """Patchified frames [B, 3 * patch_size^2, n, H, W] -> [B, 2 * z_dim, T, h, w], moments after `Vae.conv1`."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.dim * multiplier for multiplier in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3 * config.patch_size**2, widths[0])
        self.downsamples = Chain()
        for (width_in, width), halves_rate in zip(pairwise(widths), [*config.temporal_downsample, None], strict=True):
            layers = residual_blocks(width_in, width, config.num_res_blocks)
            if halves_rate is not None:
                layers.append(Downsample(width, temporal=halves_rate))
            if config.residual_stages:
                side = 1 if halves_rate is None else 2
                layers = [DownStage(layers, AverageDown(width, frames=2 if halves_rate else 1, side=side))]
            self.downsamples.extend(layers)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.downsamples(self.conv1(x, past), past)
        y: Tensor = self.head(self.middle(x, past), past)
        return y


class Decoder(nn.Module):
    """Latents [B, z_dim, T, h, w] after `Vae.conv2` -> patchified frames [B, 3 * patch_size^2, n, H, W]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [(config.decoder_dim or config.dim) * multiplier for multiplier in reversed(config.dim_mult)]
        width_in = widths[0]
        self.conv1 = CausalConv3d(config.z_dim, width_in)
        self.middle = middle(width_in)
        self.upsamples = Chain()
        for width, doubles_rate in zip(widths, [*reversed(config.temporal_downsample), None], strict=True):
            layers = residual_blocks(width_in, width, config.num_res_blocks + 1)
            width_out = width if config.residual_stages else width // 2
            if doubles_rate is not None:
                layers.append(Upsample(width, width_out, temporal=doubles_rate))
            if config.residual_stages:
                shortcut = DuplicateUp(width_in, width, frames=2 if doubles_rate else 1, side=2)
                layers = [UpStage(layers, None if doubles_rate is None else shortcut)]
            self.upsamples.extend(layers)
            width_in = width_out
        self.head = head(widths[-1], 3 * config.patch_size**2)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.middle(self.conv1(x, past), past)
        y: Tensor = self.head(self.upsamples(x, past), past)
        return y


def residual_blocks(channels_in: int, channels: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(channels_in if i == 0 else channels, channels) for i in range(count)]


def middle(channels: int) -> Chain:
    return Chain([ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)])


def head(channels_in: int, channels: int) -> Chain:
    return Chain([RMSNorm(channels_in), nn.SiLU(), CausalConv3d(channels_in, channels)])


class Vae(nn.Module):
    """A Wan VAE. It computes in the dtype of its weights; normalised latents and decoded frames are always float32.

    Whole clips go through `encode` and `decode`, clips that come in pieces through the streams, and a caller that keeps
    the `Past` of a clip itself calls `encode_group` and `decode_group`. Training uses `posterior` and `generate`.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def encode_stream(self, chunks: Iterable[Tensor], past: Past | None = None) -> Iterator[Tensor]:
        """Encodes frames as they come.

        Args:
            chunks: frames [B, 3, n, H, W] in [-1, 1], any n; H and W multiples of `config.pixels_per_latent`. Frames
                after the last whole group of four are dropped, as in the released code.
            past: a new one, to have tiles.

        Yields:
            latents [B, z_dim, 1, h, w], float32, normalised: one for the first frame, one for every further four.
        """
        past = past or Past()
        for group in regroup(chunks, first=1, then=self.config.frames_per_latent):
            yield self.encode_group(group, past)

    def decode_stream(self, latents: Iterable[Tensor], past: Past | None = None) -> Iterator[Tensor]:
        """Decodes latents as they come.

        Args:
            latents: [B, z_dim, t, h, w], normalised. With t = 1 the least memory is used; a larger t gives the same
                frames up to rounding.
            past: a new one, to have tiles.

        Yields:
            frames [B, 3, n, H, W], float32, about [-1, 1] but not clamped: 1 for the clip's first latent, 4 for others.
        """
        past = past or Past()
        for chunk in latents:
            yield self.decode_group(chunk, past)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, n, H, W] -> latents [B, z_dim, T, h, w]: what `encode_stream` yields, as one tensor."""
        return torch.cat(list(self.encode_stream([frames])), dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, z_dim, T, h, w] -> frames [B, 3, n, H, W]: what `decode_stream` yields, as one tensor."""
        return torch.cat(list(self.decode_stream(torch.split(latents, 1, dim=2))), dim=2)

    def encode_group(self, frames: Tensor, past: Past) -> Tensor:
        """Frames of the next group -> their latents, float32, normalised.

        Args:
            frames: [B, 3, n, H, W] with n = 1 + 4k for the first group of a clip and 4k for the others.
            past: a new one for every clip, the same one for all groups of it.
        """
        mean, _ = self.posterior(frames, past)
        return self.normalise(mean)

    def decode_group(self, latents: Tensor, past: Past) -> Tensor:
        """The next normalised latents of a clip -> their frames, float32, not clamped; `past` as in `encode_group`."""
        return self.generate(self.denormalise(latents), past).float()

    def posterior(self, frames: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of a group, not normalised. In use, the mean is the latent."""
        x = self.encoder(patchify(frames.to(self.dtype), self.config.patch_size), past)
        past.at_start = False
        mean, log_variance = self.conv1(x).chunk(2, dim=1)
        return mean, log_variance

    def generate(self, latents: Tensor, past: Past) -> Tensor:
        """Frames of a group of latents that are not normalised."""
        x = self.decoder(self.conv2(latents.to(self.dtype)), past)
        past.at_start = False
        return unpatchify(x, self.config.patch_size)

    def normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents.device)
        return (latents.float() - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents.device)
        return latents.float() * std + mean

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # made here and not kept as buffers: they are in no checkpoint, and stay float32 when the module is cast
        mean, std = torch.tensor([self.config.latents_mean, self.config.latents_std], device=device).view(
            2, -1, 1, 1, 1
        )
        return mean, std


def regroup(chunks: Iterable[Tensor], *, first: int, then: int) -> Iterator[Tensor]:
    """Cuts frames [B, C, n, H, W] into a group of `first` and then groups of `then`; an incomplete one is dropped."""
    group: list[Tensor] = []
    size = first
    for chunk in chunks:
        for frame in chunk.unbind(dim=2):
            group.append(frame.clone())  # a view would keep the whole chunk alive
            if len(group) == size:
                yield torch.stack(group, dim=2)
                group, size = [], then


def patchify(frames: Tensor, side: int) -> Tensor:
    """Folds squares of pixels into channels, row fastest: [B, C, n, H, W] -> [B, C*side*side, n, H/side, W/side]."""
    batch, channels, n, height, width = frames.shape
    x = frames.reshape(batch, channels, n, height // side, side, width // side, side)
    x = x.permute(0, 1, 6, 4, 2, 3, 5)  # [B, C, column, row, n, h, w]
    return x.reshape(batch, channels * side * side, n, height // side, width // side)


def unpatchify(x: Tensor, side: int) -> Tensor:
    """The inverse of `patchify`."""
    batch, channels, n, h, w = x.shape
    x = x.reshape(batch, channels // (side * side), side, side, n, h, w)
    x = x.permute(0, 1, 4, 5, 3, 6, 2)  # [B, C, n, h, row, w, column]
    return x.reshape(batch, channels // (side * side), n, h * side, w * side)


def from_uint8(frames: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] -> float32 [1, 3, n, H, W] in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).unsqueeze(0).contiguous().float() / 127.5 - 1


def to_uint8(frames: Tensor, rounding: Literal["round", "truncate"] = "round") -> Tensor:
    """Frames [1, 3, n, H, W], clamped to [-1, 1] -> uint8 [n, H, W, 3].

    Args:
        rounding: to the nearest level as Wan2GP does, or "truncate" as SCAIL does (half a level darker on average).
    """
    levels = (frames.squeeze(0).permute(1, 2, 3, 0).float().clamp(-1, 1) + 1) * 127.5
    return (levels.round() if rounding == "round" else levels).to(torch.uint8).contiguous()
