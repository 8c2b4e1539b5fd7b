"""`bunraku plan`."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from bunraku.cli import options
from bunraku.cli.plan_vae import show_vae

if TYPE_CHECKING:
    from bunraku.cli.plan_device import Clip
    from runtime.bundles import Bundle
    from services.denoiser.model import TransformerConfig
    from services.denoiser.plan import MemoryPlan, Weights

GIB = 1024**3


_DEVICES = (12, 16, 24, 32, 48, 80)  # GiB


class PlannedStage(StrEnum):
    DENOISER = "denoiser"
    VAE = "vae"
    ENCODER = "encoder"
    ALL = "all"


class PlannedPrecision(StrEnum):
    BALANCED = "balanced"
    EXACT = "exact"


def plan(
    bundle: options.Bundle = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Name of one of the bundles that come with Bunraku, instead of --bundle."),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT; not given: the bundle's.")] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Of one window; not given: the bundle's.")
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option("--vram", help="What the stage (or all) may use, as 4GiB; not given: a table of sizes."),
    ] = None,
    step_cache: Annotated[bool, typer.Option("--step-cache", help="Leave room for a step cache.")] = False,
    stage: Annotated[
        PlannedStage, typer.Option("--stage", help="Of which stage; all: how all share one GPU.")
    ] = PlannedStage.DENOISER,
    precision: Annotated[
        PlannedPrecision, typer.Option("--precision", help="Of the denoiser; fast needs what balanced does.")
    ] = PlannedPrecision.BALANCED,
) -> None:
    """Says beforehand what of a stage fits into a GPU's memory, and what it costs. Needs no GPU and no weights."""
    from bunraku.cli.plan_device import Clip
    from bunraku.cli.system import bundle_directory, named_bundle
    from runtime.bundles import load_bundle

    found = load_bundle(named_bundle(model) if model is not None else bundle_directory(bundle))
    width, height = _parsed_size(size) if size else (found.video.width, found.video.height)
    budget = parsed_bytes(vram) if vram else None
    clip = Clip(width, height, frames or found.video.window_frames, 2 if step_cache else 0)
    if stage is PlannedStage.VAE:
        show_vae(found, width, height, budget)
    elif stage is PlannedStage.ENCODER:
        _show_encoder(found, budget)
    elif stage is PlannedStage.ALL:
        _show_all(found, clip, budget)
    else:
        _show_denoiser(found, clip, budget, precision)


def _show_denoiser(bundle: Bundle, clip: Clip, budget: int | None, precision: PlannedPrecision) -> None:
    from rich.console import Console

    from bunraku.cli.display import write_table
    from runtime.budget import DoesNotFit
    from runtime.bundles import configuration
    from services.denoiser.model import PRESETS, TransformerConfig
    from services.denoiser.placement import weights_of
    from services.denoiser.plan import animation_tokens, plan_memory
    from services.denoiser.weights import unloaded_transformer

    component = bundle.component("transformer")
    config = configuration(component, PRESETS, TransformerConfig)
    weights = weights_of(unloaded_transformer(config, quantized=bool(component.quantization)))
    if precision is not PlannedPrecision.EXACT:
        weights = replace(weights, dequantised=0, is_fused=True)
    tokens, branches = animation_tokens(clip.height, clip.width, clip.num_frames), clip.cached_branches
    typer.echo(f"{bundle.name}: {clip.width}x{clip.height}, {clip.num_frames} frames, {tokens} tokens, {precision}")
    if budget is not None:
        try:
            _show_one(plan_memory(weights, config, tokens, budget, branches), weights)
        except DoesNotFit as error:
            raise typer.BadParameter(f"{error}; use a smaller size or fewer frames", param_hint="--vram") from error
        return
    rows = [_row(weights, config, tokens, gibibytes, branches) for gibibytes in (4, 6, 8, 12, 16, 24, 32, 48, 80)]
    columns = ["vram", "blocks on the device", "tokens at once", "peak", "host memory", "streamed each pass"]
    write_table(Console(), columns, rows)


def _show_encoder(bundle: Bundle, budget: int | None) -> None:
    from rich.console import Console

    from bunraku.cli.display import write_table
    from bunraku.cli.plan_device import EncoderDemand
    from runtime.budget import DoesNotFit

    demand = EncoderDemand(bundle)
    least, enough = (-(-size // GIB) for size in (demand.least, demand.enough))
    rows = []
    for vram_bytes in (size * GIB for size in range(least, enough + 1)) if budget is None else (budget,):
        try:
            share = demand.share(vram_bytes)
        except DoesNotFit as error:
            raise typer.BadParameter(str(error), param_hint="--vram") from error
        rows.append([f"{vram_bytes / GIB:g} GiB", share.words, f"{share.host_bytes / GIB:.1f} GiB"])
    write_table(Console(), ["vram", "", "host memory"], rows)


def _show_all(bundle: Bundle, clip: Clip, budget: int | None) -> None:
    """How the stages share a GPU: what each gets of one, or of several sizes."""
    from rich.console import Console

    from bunraku.cli.display import write_table
    from bunraku.cli.plan_device import device_shares
    from runtime.budget import DoesNotFit

    typer.echo(
        f"{bundle.name}: {clip.width}x{clip.height}, {clip.num_frames} frames, all stages on one GPU; "
        "the denoiser is counted in exact, which needs the most"
    )
    if budget is not None:
        try:
            shares = device_shares(bundle, clip, budget)
        except DoesNotFit as error:
            raise typer.BadParameter(str(error), param_hint="--vram") from error
        cells = [
            [share.stage, f"{share.vram_bytes / GIB:.2f} GiB", f"{share.host_bytes / GIB:.1f} GiB", share.words]
            for share in shares
        ]
        write_table(Console(), ["stage", "vram", "host memory", ""], cells)
        return
    rows = []
    for gibibytes in _DEVICES:
        try:
            found = device_shares(bundle, clip, gibibytes * GIB)
            rows.append([f"{gibibytes} GiB", *(f"{share.vram_bytes / GIB:.2f} GiB" for share in found)])
        except DoesNotFit:
            rows.append([f"{gibibytes} GiB", "does not fit", "", "", ""])
    write_table(Console(), ["vram", "encoder", "pose", "denoiser", "vae"], rows)


def _row(weights: Weights, config: TransformerConfig, tokens: int, gibibytes: int, branches: int) -> list[str]:
    from runtime.budget import DoesNotFit
    from services.denoiser.plan import plan_memory

    try:
        found = plan_memory(weights, config, tokens, gibibytes * GIB, branches)
    except DoesNotFit:
        return [f"{gibibytes} GiB", "does not fit", "", "", "", ""]
    return [f"{gibibytes} GiB", *_cells(found, weights)]


def _cells(found: MemoryPlan, weights: Weights) -> list[str]:
    return [
        f"{found.resident} of {weights.num_blocks}",
        str(found.tokens_at_once or "all"),
        f"{found.device_bytes / GIB:.2f} GiB",
        f"{found.most_host_bytes / GIB:.1f} GiB",
        f"{found.streamed_bytes / GIB:.1f} GiB",
    ]


def _show_one(found: MemoryPlan, weights: Weights) -> None:
    blocks, pieces, peak, host, streamed = _cells(found, weights)
    typer.echo(f"blocks on the device: {blocks}")
    typer.echo(f"tokens at once in the token-wise parts: {pieces}")
    typer.echo(
        f"peak on the device: {peak}; most pinned host memory: {host}; streamed in each forward pass: {streamed}"
    )
    if found.disk_bytes:
        disk, beside = found.disk_bytes / GIB, found.host_bytes_with_disk / GIB
        typer.echo(f"with an offload folder: {disk:.1f} GiB of it, and {beside:.1f} GiB of pinned host memory")


def _parsed_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()) or min(int(width), int(height)) < 32:
        raise typer.BadParameter(f"must be WIDTHxHEIGHT, both at least 32, got {text!r}", param_hint="--size")
    return int(width), int(height)


def parsed_bytes(text: str) -> int:
    """Of `--vram`. Raises BadParameter: it is no number of bytes."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise typer.BadParameter(f"must be a number of bytes as 4GiB, got {text!r}", param_hint="--vram") from error
