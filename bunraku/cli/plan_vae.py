"""The VAE's part of `bunraku plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from runtime.bundles import Bundle
    from services.vae.plan import Machine, Tiling

GIB = 1024**3
_BUDGETS = (3, 4, 6, 8, 12, 16, 24)  # GiB


def show_vae(bundle: Bundle, width: int, height: int, vram_bytes: int | None) -> None:
    """Prints how frames of a size are computed on a GPU within a number of bytes, or within several."""
    import torch
    from rich.console import Console

    from bunraku.cli.display import write_table
    from runtime.budget import DoesNotFit
    from runtime.bundles import configuration
    from services.vae.model import PRESETS, VaeConfig
    from services.vae.plan import CLIPS_AT_A_TIME, Machine

    config = configuration(bundle.component("vae"), PRESETS, VaeConfig)
    side = config.pixels_per_latent
    width, height = (-(-length // side) * side for length in (width, height))
    machine = Machine(config, torch.float16, "cuda", is_fused=True)
    fixed = machine.fixed_bytes / GIB
    typer.echo(f"{bundle.name}: {width}x{height}; {fixed:.2f} GiB, and {CLIPS_AT_A_TIME} clips at a time, each of:")
    if vram_bytes is None:
        rows = [[f"{gibibytes} GiB", *_row(machine, height, width, gibibytes * GIB)] for gibibytes in _BUDGETS]
        write_table(Console(), ["vram", "encode", "decode"], rows)
        return
    try:
        encode, decode = _tilings(machine, height, width, vram_bytes)
    except DoesNotFit as error:
        raise typer.BadParameter(f"{error}; use a smaller size", param_hint="--vram") from error
    typer.echo(f"encode: {_described(encode)}\ndecode: {_described(decode)}")


def _row(machine: Machine, height: int, width: int, budget: int) -> list[str]:
    from runtime.budget import DoesNotFit

    try:
        return [_described(tiling) for tiling in _tilings(machine, height, width, budget)]
    except DoesNotFit:
        return ["does not fit", ""]


def _tilings(machine: Machine, height: int, width: int, budget: int) -> tuple[Tiling, Tiling]:
    """For encoding and decoding."""
    from services.vae.plan import CLIPS_AT_A_TIME, plan_tiles

    return (
        plan_tiles(machine, "encode", height, width, budget, CLIPS_AT_A_TIME),
        plan_tiles(machine, "decode", height, width, budget, CLIPS_AT_A_TIME),
    )


def _described(tiling: Tiling) -> str:
    host = f" + {tiling.host_bytes / GIB:.1f} of host memory" if tiling.is_hosted else ""
    return f"{tiling}, {tiling.device_bytes / GIB:.2f} GiB{host}"
