"""`bunraku plan`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from bunraku.cli import options
from bunraku.cli.plan_vae import show_vae

if TYPE_CHECKING:
    from services.denoiser.model import TransformerConfig
    from services.denoiser.plan import MemoryPlan, Weights

GIB = 1024**3


class PlannedStage(StrEnum):
    DENOISER = "denoiser"
    VAE = "vae"


def plan(
    bundle: options.Bundle = None,
    size: Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT; not given: the bundle's.")] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Of one window; not given: the bundle's.")
    ] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", help="What the stage may use, as 4GiB; not given: a table of sizes.")
    ] = None,
    step_cache: Annotated[bool, typer.Option("--step-cache", help="Leave room for a step cache.")] = False,
    stage: Annotated[PlannedStage, typer.Option("--stage", help="Of which stage.")] = PlannedStage.DENOISER,
) -> None:
    """Says beforehand what of a stage fits into a GPU's memory, and what it costs. Needs no GPU and no weights."""
    from rich.console import Console

    from bunraku.cli.display import write_table
    from bunraku.cli.system import bundle_directory
    from runtime.bundles import configuration, load_bundle
    from services.denoiser.model import PRESETS, TransformerConfig
    from services.denoiser.placement import weights_of
    from services.denoiser.plan import DoesNotFit, animation_tokens, plan_memory
    from services.denoiser.weights import unloaded_transformer

    found = load_bundle(bundle_directory(bundle))
    width, height = _parsed_size(size) if size else (found.video.width, found.video.height)
    if stage is PlannedStage.VAE:
        show_vae(found, width, height, _parsed_bytes(vram) if vram else None)
        return
    component = found.component("transformer")
    config = configuration(component, PRESETS, TransformerConfig)
    num_frames = frames or found.video.window_frames
    weights = weights_of(unloaded_transformer(config, quantized=bool(component.quantization)))
    tokens, branches = animation_tokens(height, width, num_frames), 2 if step_cache else 0
    typer.echo(f"{found.name}: {width}x{height}, {num_frames} frames, {tokens} tokens")
    if vram is not None:
        try:
            _show_one(plan_memory(weights, config, tokens, _parsed_bytes(vram), branches), weights)
        except DoesNotFit as error:
            raise typer.BadParameter(f"{error}; use a smaller size or fewer frames", param_hint="--vram") from error
        return
    rows = [_row(weights, config, tokens, gibibytes, branches) for gibibytes in (4, 6, 8, 12, 16, 24, 32, 48, 80)]
    columns = ["vram", "blocks on the device", "tokens at once", "peak", "host memory", "streamed each pass"]
    write_table(Console(), columns, rows)


def _row(weights: Weights, config: TransformerConfig, tokens: int, gibibytes: int, branches: int) -> list[str]:
    from services.denoiser.plan import DoesNotFit, plan_memory

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
        f"{found.host_bytes / GIB:.1f} GiB",
        f"{found.streamed_bytes / GIB:.1f} GiB",
    ]


def _show_one(found: MemoryPlan, weights: Weights) -> None:
    blocks, pieces, peak, host, streamed = _cells(found, weights)
    typer.echo(f"blocks on the device: {blocks}")
    typer.echo(f"tokens at once in the token-wise parts: {pieces}")
    typer.echo(f"peak on the device: {peak}; pinned host memory: {host}; streamed in each forward pass: {streamed}")


def _parsed_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()) or min(int(width), int(height)) < 32:
        raise typer.BadParameter(f"must be WIDTHxHEIGHT, both at least 32, got {text!r}", param_hint="--size")
    return int(width), int(height)


def _parsed_bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise typer.BadParameter(f"must be a number of bytes as 4GiB, got {text!r}", param_hint="--vram") from error
