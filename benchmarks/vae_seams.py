"""What tiles change in a picture: at their seams and elsewhere, beside the usual way of making them.

`python -m benchmarks.vae_seams [--bundle DIR] [--grid ROWSxCOLUMNS] [--picture FILE]` draws clips, passes them through
the trained VAE of the bundle whole and in tiles, and prints the largest and the mean difference of levels (0 to 255)
within 8 pixels of a seam, and elsewhere. Three kinds of tiles: `ours`, which see all that counts around them;
`bare`, which do not; and `blended`, independent tiles that overlap by half and fade into each other. `--picture` writes
a decoded frame of each kind, and the whole one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor

from runtime.bundles import configuration, load_bundle
from services.vae import channels_last
from services.vae.channels_last import walk_channels_last
from services.vae.model import PRESETS, Grid, Past, Vae, VaeConfig, from_uint8, to_uint8
from services.vae.tiles import cut_of
from services.vae.weights import load_vae
from training.figures.clips import sample_batch

_NEAR = 8  # pixels on either side of a seam
_LEVEL = 127.5  # of a frame in [-1, 1]
Tiled = Callable[[Vae, Tensor, Grid], Tensor]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Difference:
    """Of levels, 0 to 255."""

    largest_at_seams: float
    mean_at_seams: float
    largest_elsewhere: float
    mean_elsewhere: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/tiny"))
    parser.add_argument("--grid", default="2x3", help="rows x columns of tiles")
    parser.add_argument("--size", default="384x256", help="width x height")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--picture", type=Path, help="to write")
    parser.add_argument("--json", type=Path, help="to write")
    options = parser.parse_args()
    grid = Grid(*map(int, options.grid.split("x")))
    width, height = map(int, options.size.split("x"))
    vae, frames = trained_vae(options.bundle), drawn_frames(height, width, options.frames)
    with torch.inference_mode():
        found = differences(vae, frames, grid, list(KINDS))
        if options.picture:
            picture(vae, frames, grid).save(options.picture)
    print(
        "| tiles | of | at seams: largest | mean | elsewhere: largest | mean |\n| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for (kind, what), difference in found.items():
        print(f"| {kind} | {what} | " + " | ".join(f"{value:.3g}" for value in asdict(difference).values()) + " |")
    if options.json:
        rows = [{"tiles": kind, "of": what} | asdict(difference) for (kind, what), difference in found.items()]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def trained_vae(bundle: Path) -> Vae:
    component = load_bundle(bundle).component("vae")
    config = configuration(component, PRESETS, VaeConfig)
    vae = load_vae(component.files, config, device=CPU, dtype=torch.float32)
    walk_channels_last(vae)
    return vae


def drawn_frames(height: int, width: int, count: int, seed: int = 7) -> Tensor:
    """A drawn clip [1, 3, n, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    batch = sample_batch(1, generator, frames=count, height=height, width=width, held_out=True, driving=False)
    return from_uint8(batch.target[0])


def differences(vae: Vae, frames: Tensor, grid: Grid, kinds: Sequence[str]) -> dict[tuple[str, str], Difference]:
    """By kind of tiles: what they change in decoded frames, and in frames whose latents were made in tiles."""
    latents = vae.encode(frames)
    whole = vae.decode(latents)
    found: dict[tuple[str, str], Difference] = {}
    for kind in kinds:
        encode, decode = KINDS[kind]
        found[kind, "decode"] = difference(decode(vae, latents, grid), whole, grid)
        found[kind, "encode"] = difference(vae.decode(encode(vae, frames, grid)), whole, grid)
    return found


def difference(tiled: Tensor, whole: Tensor, grid: Grid) -> Difference:
    """Of frames [1, 3, n, H, W] in [-1, 1]."""
    levels = (tiled - whole).abs().amax(dim=(0, 1, 2)) * _LEVEL  # [H, W]
    near = near_seams(levels.shape[0], levels.shape[1], grid)
    at, elsewhere = levels[near], levels[~near]
    return Difference(*(float(value) for value in (at.max(), at.mean(), elsewhere.max(), elsewhere.mean())))


def near_seams(height: int, width: int, grid: Grid) -> Tensor:
    """bool [H, W]."""
    near = torch.zeros(height, width, dtype=torch.bool)
    for row in range(1, grid.rows):
        near[round(row * height / grid.rows) - _NEAR : round(row * height / grid.rows) + _NEAR] = True
    for column in range(1, grid.columns):
        near[:, round(column * width / grid.columns) - _NEAR : round(column * width / grid.columns) + _NEAR] = True
    return near


def encoded_in_tiles(vae: Vae, frames: Tensor, grid: Grid) -> Tensor:
    return torch.cat(list(vae.encode_stream([frames], Past(grid))), dim=2)


def decoded_in_tiles(vae: Vae, latents: Tensor, grid: Grid) -> Tensor:
    return torch.cat(list(vae.decode_stream(torch.split(latents, 1, dim=2), Past(grid))), dim=2)


def bare(tiled: Tiled) -> Tiled:
    """Tiles that end where what they are for ends."""

    def compute(vae: Vae, clip: Tensor, grid: Grid) -> Tensor:
        with patch.object(channels_last, "cut_of", lambda half: replace(cut_of(half), reach=0)):
            return tiled(vae, clip, grid)

    return compute


def blended(vae: Vae, clip: Tensor, grid: Grid, *, decode: bool) -> Tensor:
    """Each tile by itself, attention too, a quarter wider on every side than it need be, faded in and out."""
    side = vae.config.pixels_per_latent
    rows, columns = clip.shape[3] // (1 if decode else side), clip.shape[4] // (1 if decode else side)
    scale_in, scale_out = (1, side) if decode else (side, 1)
    total: Tensor | float = 0.0
    weights: Tensor | float = 0.0
    for row, column in product(_overlapping(rows, grid.rows), _overlapping(columns, grid.columns)):
        piece = clip[..., _scaled(row, scale_in), _scaled(column, scale_in)].contiguous()
        y = vae.decode(piece) if decode else vae.encode(piece)
        fade = _fade(row, rows, scale_out)[:, None] * _fade(column, columns, scale_out)
        around = (
            column.start * scale_out, (columns - column.stop) * scale_out,
            row.start * scale_out, (rows - row.stop) * scale_out,
        )  # fmt: skip
        total = total + torch.nn.functional.pad(y * fade, around)
        weights = weights + torch.nn.functional.pad(fade, around)
    assert isinstance(total, Tensor)
    return total / weights


def _overlapping(size: int, count: int) -> list[slice]:
    """Windows that reach a quarter of a tile over each seam."""
    margin = max(1, size // count // 4)
    edges = [round(i * size / count) for i in range(count + 1)]
    return [slice(max(0, edges[i] - margin), min(size, edges[i + 1] + margin)) for i in range(count)]


def _scaled(window: slice, scale: int) -> slice:
    return slice(window.start * scale, window.stop * scale)


def _fade(window: slice, size: int, scale: int) -> Tensor:
    """Rises from the sides that have a neighbour, over the overlap."""
    length = (window.stop - window.start) * scale
    ramp = max(1, length // 3)
    up = ((torch.arange(length) + 0.5) / ramp).clamp(max=1)
    ones = torch.ones(length)
    return (ones if window.start == 0 else up) * (ones if window.stop == size else up.flip(0))


KINDS: dict[str, tuple[Tiled, Tiled]] = {
    "ours": (encoded_in_tiles, decoded_in_tiles),
    "bare": (bare(encoded_in_tiles), bare(decoded_in_tiles)),
    "blended": (
        lambda vae, frames, grid: blended(vae, frames, grid, decode=False),
        lambda vae, latents, grid: blended(vae, latents, grid, decode=True),
    ),
}


def picture(vae: Vae, frames: Tensor, grid: Grid) -> Image.Image:
    """The last frame decoded whole, and by each kind of tiles, side by side."""
    latents = vae.encode(frames)
    kinds = [vae.decode(latents), *(decode(vae, latents, grid) for _, decode in KINDS.values())]
    return Image.fromarray(torch.cat([to_uint8(kind[:, :, -1:])[0] for kind in kinds], dim=1).numpy())


if __name__ == "__main__":
    main()
