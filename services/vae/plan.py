"""What encoding and decoding take in bytes, and into how many tiles frames must be cut to keep within a budget.

The bytes are counted, not estimated: a group of frames passes through the walk itself on the meta device, which makes
every tensor of the real sizes and none of their contents, and the most that is alive at once is noted. What the count
cannot see, what the driver takes and gaps between allocations, stands in the constants below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from runtime.alive import Alive
from runtime.budget import DoesNotFit
from runtime.vram import OVERHEAD_BYTES as DEVICE_OVERHEAD_BYTES
from runtime.weights import build_on_meta
from services.vae.channels_last import ChooseForm, Walk, use_walk
from services.vae.color import match_colors
from services.vae.convolution import best_form
from services.vae.glue import PLAIN, Glue, Sum
from services.vae.hosting import HostedPast
from services.vae.model import Grid, Past, Vae, VaeConfig, from_uint8, to_uint8
from services.vae.tiles import Cut, cut_of

GIB = 1024**3
_HOST_OVERHEAD_BYTES = 512 * 1024**2  # on a CPU: the interpreter, PyTorch, messages under way
_GAPS = 1.1  # allocated, of what is used
_FEWEST_PIXELS = 64  # on a side of a tile; less is mostly surroundings
CLIPS_AT_A_TIME = 2  # unless BUNRAKU_MAX_CONCURRENT says otherwise
_MOST_TILES_ON_DEVICE = 4  # more of them save nothing, as what all of them remember stays
Direction = Literal["encode", "decode"]


@dataclass(frozen=True)
class Tiling:
    """How the frames of a clip are computed, and what that takes.

    Attributes:
        grid: of tiles.
        is_hosted: whether what tiles remember of earlier frames waits in host memory until their next turn.
        device_bytes: at the worst moment, without weights and the driver's own.
        host_bytes: pinned, of one clip.
        frames_at_once: of a group, in a tile; None: all.
    """

    grid: Grid
    is_hosted: bool
    device_bytes: int
    host_bytes: int
    frames_at_once: int | None = None

    def past(self) -> Past:
        """For a new clip."""
        return HostedPast(self.grid) if self.is_hosted else Past(self.grid, self.frames_at_once)

    def __str__(self) -> str:
        tiles = "whole frames" if self.grid == Grid(1, 1) else f"{self.grid} tiles"
        at_once = "" if self.frames_at_once is None else f", {self.frames_at_once} at a time"
        return f"{tiles}{at_once}{' from host memory' if self.is_hosted else ''}"


WHOLE = Tiling(Grid(1, 1), is_hosted=False, device_bytes=0, host_bytes=0)
"""Where nobody says how much memory there is."""


@dataclass(frozen=True)
class Machine:
    """What the count depends on besides the sizes of a clip."""

    config: VaeConfig
    dtype: torch.dtype
    device_type: str  # `cuda` or `cpu`
    is_fused: bool  # whether norms and sums are kernels that need no memory of their own

    @property
    def fixed_bytes(self) -> int:
        """What is taken before the first clip."""
        overhead = DEVICE_OVERHEAD_BYTES if self.device_type == "cuda" else _HOST_OVERHEAD_BYTES
        return weight_bytes(self.config, self.dtype) + overhead


def plan_tiles(machine: Machine, direction: Direction, height: int, width: int, budget: int, clips: int = 1) -> Tiling:
    """The tiling that costs the least time and keeps within `budget` bytes.

    Args:
        height, width: of the frames, in pixels.
        budget: for everything: weights, what the process needs besides, and `clips` clips.
        clips: that may be under way at the same time, each with an equal share of what weights leave.

    Raises:
        DoesNotFit: even with the smallest tiles.
    """
    fixed = machine.fixed_bytes
    least: Tiling | None = None
    for candidate in _candidates(machine, direction, height, width):
        tiling = _counted(machine, direction, height, width, candidate)
        if fixed + clips * tiling.device_bytes <= budget:
            return tiling
        least = tiling if least is None or tiling.device_bytes < least.device_bytes else least
    assert least is not None
    raise DoesNotFit(
        f"to {direction} {width}x{height} takes {(fixed + clips * least.device_bytes) / GIB:.2f} GiB with {least}"
        f"{f' and {clips} clips at a time' if clips > 1 else ''}; the budget is {budget / GIB:.2f} GiB"
    )


@lru_cache(maxsize=32)
def weight_bytes(config: VaeConfig, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in build_on_meta(lambda: Vae(config)).parameters()) * dtype.itemsize


def _candidates(machine: Machine, direction: Direction, height: int, width: int) -> Iterator[Tiling]:
    """Ways to compute frames, cheapest first; nothing is counted yet."""
    grids = _grids(height, width)
    fewer = _frames_at_once(machine.config, direction)
    yield WHOLE
    yield from (replace(WHOLE, frames_at_once=count) for count in fewer)
    least = replace(WHOLE, frames_at_once=fewer[-1] if fewer else None)
    yield from (replace(least, grid=grid) for grid in grids[1:] if grid.rows * grid.columns <= _MOST_TILES_ON_DEVICE)
    if machine.device_type == "cuda":
        yield from (replace(WHOLE, grid=grid, is_hosted=True) for grid in grids)


@lru_cache(maxsize=8)
def _frames_at_once(config: VaeConfig, direction: Direction) -> Sequence[int]:
    """Of those that tiles get in a group: half as many, and so on."""
    vae = build_on_meta(lambda: Vae(config))
    rate = cut_of(vae.encoder).frames if direction == "encode" else cut_of(vae.decoder).frames
    most = config.frames_per_latent if direction == "encode" else config.frames_per_latent // rate
    fewest = rate if direction == "encode" else 1
    return [most // 2**i for i in range(1, most.bit_length()) if most // 2**i >= fewest]


def _grids(height: int, width: int) -> Sequence[Grid]:
    """Ways to cut frames into tiles that are about square, each with about half as many more tiles as the one before."""
    found, rows, columns = [Grid(1, 1)], 1, 1
    while True:
        rows, columns = (rows + 1, columns) if height / rows > width / columns else (rows, columns + 1)
        if min(height // rows, width // columns) < _FEWEST_PIXELS:
            return found
        if rows * columns >= 1.5 * found[-1].rows * found[-1].columns:
            found.append(Grid(rows, columns))


@lru_cache(maxsize=256)
def _counted(machine: Machine, direction: Direction, height: int, width: int, tiling: Tiling) -> Tiling:
    """Two groups after the first: by the second, every layer remembers what it ever will."""
    vae, past = _meta_vae(machine), tiling.past()
    past.at_start = False
    with torch.inference_mode(), _AttentionInPlace(), Alive() as alive:
        for _ in range(2):
            _pass(vae, direction, height, width, past)
    host = sum(tensor.nbytes for tensor in past.hosted()) if isinstance(past, HostedPast) else 0
    return replace(tiling, device_bytes=int((alive.most - host) * _GAPS), host_bytes=host)


def _pass(vae: Vae, direction: Direction, height: int, width: int, past: Past) -> None:
    """What the service does with a group of frames."""
    config, device = vae.config, vae.conv1.weight.device
    if direction == "encode":
        levels = torch.zeros(config.frames_per_latent, height, width, 3, dtype=torch.float16, device=device)
        vae.encode_group(from_uint8(levels), past)
    else:
        side = config.pixels_per_latent
        shape = (1, config.z_dim, 1, height // side, width // side)
        frames = to_uint8(vae.decode_group(torch.zeros(shape, device=device), past))
        match_colors(frames[:1], frames[0], 1.0)  # it takes one at a time


def _meta_vae(machine: Machine) -> Vae:
    vae = build_on_meta(lambda: Vae(machine.config)).to(machine.dtype).requires_grad_(False)
    form = partial(best_form, device=torch.device(machine.device_type))
    use_walk(vae, _WalkOfSizes(vae, _WITHOUT_MEMORY if machine.is_fused else PLAIN, form))
    return vae


class _WalkOfSizes(Walk):
    """Of all tiles of a size, two pass through the layers; the others only take their place in memory.

    Two, as the very first tile of a frame finds less in memory than any other.
    """

    def __init__(self, vae: Vae, glue: Glue, form: ChooseForm) -> None:
        super().__init__(vae, glue, form)
        self._models: dict[torch.Size, list[Past]] = {}
        self._results: dict[torch.Size, torch.Size] = {}

    def tile(self, cut: Cut, tile: Tensor, past: Past) -> Tensor:
        models = self._models.setdefault(tile.shape, [])
        if past not in models and len(models) < 2:
            models.append(past)
        if past in models:
            y = super().tile(cut, tile, past)
            self._results[tile.shape] = y.shape
            return y
        past.as_large_as(models[0])
        return tile.new_empty(self._results[tile.shape])


class _GlueWithoutMemory:
    """Stands for kernels that write where they are told to and need nothing besides."""

    takes_bias = True

    def normed(self, x: Sum, gamma: Tensor, out: Tensor, *, silu: bool) -> None:
        pass

    def total(self, x: Sum) -> Tensor:
        return x.first if x.first.is_contiguous() else torch.empty_like(x.first, memory_format=torch.contiguous_format)

    def doubled(self, phases: Tensor, bias: Tensor | None, out: Tensor) -> None:
        pass


_WITHOUT_MEMORY: Glue = _GlueWithoutMemory()


class _AttentionInPlace(TorchFunctionMode):
    """Attention as fused kernels do it, which never have all its weights at once."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0], memory_format=torch.contiguous_format)
        return function(*args, **(kwargs or {}))
