"""`bunraku animate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bunraku.cli import options

if TYPE_CHECKING:
    from bunraku.client import AnimateArguments


def animate(
    context: typer.Context,
    reference_image: options.Image,
    pose_video: options.PoseVideo = None,
    driving_video: options.DrivingVideo = None,
    prompt: options.Prompt = "",
    negative_prompt: options.NegativePrompt = None,
    seed: options.Seed = None,
    num_inference_steps: options.Steps = None,
    size: options.Size = None,
    size_mode: options.SizeMode = None,
    num_frames: options.Frames = None,
    frames_per_second: options.Fps = None,
    guidance_scale: options.Guidance = None,
    guidance_scale_low_noise: options.GuidanceLowNoise = None,
    shift: options.Shift = None,
    solver: options.Solver = None,
    step_cache: options.StepCache = None,
    guidance_interval: options.GuidanceInterval = None,
    cfg_zero_star: options.CfgZeroStar = False,
    zero_init_steps: options.ZeroInitSteps = None,
    crf: options.Crf = None,
    model: options.Model = None,
    window_overlap_frames: options.Overlap = None,
    color_correction_strength: options.ColorCorrection = None,
    preset: options.Preset = None,
    people: options.People = None,
    mask_video: options.MaskVideo = None,
    timeout_seconds: options.Timeout = None,
    priority: options.Priority = None,
    output: options.Output = Path("out.mp4"),
    gateway: options.Gateway = None,
    detach: Annotated[bool, typer.Option("--detach", help="Queue it, print its name and end.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Start a system for this call and stop it after.")] = False,
    bundle: options.Bundle = None,
    models: options.Models = None,
    devices: options.Devices = "",
) -> None:
    """Makes the character of a picture move as a video does. What is not given takes the model's default."""
    if (pose_video is None) == (driving_video is None):
        raise typer.BadParameter("exactly one of the two is needed", param_hint="--pose-video or --driving-video")
    if detach and local:
        raise typer.BadParameter("cannot be given together with --local", param_hint="--detach")
    _check_output(output, reference_image, pose_video, driving_video, mask_video)
    arguments = _arguments({**context.params, **_parsed(size, step_cache, guidance_interval)})
    from bunraku.cli.signals import run

    if local:
        run(_animate_locally(arguments, output, bundle, models, devices))
    else:
        run(_animate(arguments, output, gateway, detach=detach))


def _parsed(size: str | None, step_cache: str | None, guidance_interval: str | None) -> dict[str, object]:
    """Fields of the request that several to one option are."""
    width, height = options.parse_size(size) if size is not None else (None, None)
    method, speedup, start = options.parse_step_cache(step_cache) if step_cache is not None else (None, None, None)
    begin, end = options.parse_interval(guidance_interval) if guidance_interval is not None else (None, None)
    return {
        "width": width,
        "height": height,
        "step_cache": method,
        "step_cache_speedup": speedup,
        "step_cache_start": start,
        "guidance_start": begin,
        "guidance_end": end,
    }


def _arguments(given: dict[str, Any]) -> AnimateArguments:
    """Those of the parameters that are fields of the request: they have the fields' names."""
    from bunraku.client import AnimateArguments

    return cast("AnimateArguments", {name: given[name] for name in AnimateArguments.__annotations__ if name in given})


def _check_output(output: Path, *inputs: Path | None) -> None:
    """Finds out before the work is done that its result could not be written."""
    if not output.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {output.parent}", param_hint="--output")
    if output.exists() and any(source is not None and output.samefile(source) for source in inputs):
        raise typer.BadParameter(f"{output} would be overwritten", param_hint="--output")


async def _animate(arguments: AnimateArguments, output: Path, address: str | None, *, detach: bool) -> None:
    from rich.console import Console

    from bunraku.cli.generation import GenerationDisplay, animate, connected, summary

    async with connected(address) as client:
        with GenerationDisplay(Console(stderr=True)) as display:
            generation = await animate(client, arguments, display, detach=detach)
        if detach:
            typer.echo(generation.name)
            return
        await client.download(generation.video, output)
    typer.echo(summary(generation, output))


async def _animate_locally(
    arguments: AnimateArguments, output: Path, bundle: Path | None, models: Path | None, devices: str
) -> None:
    from rich.console import Console

    from bunraku.cli.system import bundle_directory, local_system, parse_devices, while_running

    directory, device_of = bundle_directory(bundle), parse_devices(devices)
    async with local_system(Console(stderr=True), bundle=directory, models=models, devices=device_of) as supervisor:
        await while_running(supervisor, _animate(arguments, output, supervisor.address, detach=False))
