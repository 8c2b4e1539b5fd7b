"""Options that commands share, and the fields of the contract that they stand for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

_MAX_SIDE = 16384
_MAX_SEED = 2**63 - 1

Image = Annotated[
    Path, typer.Option("--image", help="Picture of the character.", exists=True, dir_okay=False, readable=True)
]
PoseVideo = Annotated[
    Path | None,
    typer.Option("--pose-video", help="Skeleton on black that moves it.", exists=True, dir_okay=False, readable=True),
]
DrivingVideo = Annotated[
    Path | None,
    typer.Option(
        "--driving-video", help="Video of a person whose poses move it.", exists=True, dir_okay=False, readable=True
    ),
]
MaskVideo = Annotated[
    Path | None,
    typer.Option(
        "--mask-video", help="Bright where people are to be looked for.", exists=True, dir_okay=False, readable=True
    ),
]
People = Annotated[int | None, typer.Option("--people", min=1, max=5, help="People to follow in the driving video.")]
Prompt = Annotated[str, typer.Option("--prompt", help="What to show.")]
NegativePrompt = Annotated[str | None, typer.Option("--negative-prompt", help="What to avoid.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=_MAX_SEED, help="Seed of the noise.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, max=100, help="Steps of the solver.")]
Guidance = Annotated[float | None, typer.Option("--guidance", min=0, max=30, help="Strength of guidance; 1 is none.")]
GuidanceLowNoise = Annotated[
    float | None,
    typer.Option("--guidance-low-noise", min=0, max=30, help="Guidance of the low-noise expert, if there is one."),
]
Shift = Annotated[float | None, typer.Option("--shift", min=0.1, max=100, help="Shift of the noise levels.")]
Solver = Annotated[Literal["unipc", "dpm++", "euler"] | None, typer.Option("--solver", help="Solver.")]
StepCache = Annotated[
    str | None,
    typer.Option(
        "--step-cache",
        metavar="METHOD[:SPEEDUP[:START]]",
        show_default="none",
        help="tea or mag: takes over what the transformer did at earlier steps. SPEEDUP, 1 to 3: steps over those that are "
        "computed, by default 1.75. START, 0 to 1: part of the steps that is computed in any case.",
    ),
]
GuidanceInterval = Annotated[
    str | None,
    typer.Option(
        "--guidance-interval",
        metavar="START:END",
        show_default="0:1",
        help="Parts of the steps between which there is guidance.",
    ),
]
CfgZeroStar = Annotated[
    bool, typer.Option("--cfg-zero-star", help="Scales the negative branch to the positive one before guidance.")
]
ZeroInitSteps = Annotated[
    int | None, typer.Option("--zero-init-steps", min=0, max=99, help="First steps with a velocity of zero.")
]
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Width and height in pixels, such as 832x480.")]
SizeMode = Annotated[
    Literal["budget", "fit", "crop"] | None,
    typer.Option(
        "--size-mode",
        show_default="budget",
        help="What --size means: a number of pixels, a box to fit into, or exactly this, cropped.",
    ),
]
Frames = Annotated[int | None, typer.Option("--frames", min=1, help="The most frames.")]
Fps = Annotated[float | None, typer.Option("--fps", min=1, max=60, help="Frames per second.")]
Crf = Annotated[int | None, typer.Option("--crf", min=0, max=51, help="Quality of H.264; 0 is lossless.")]
Overlap = Annotated[
    int | None, typer.Option("--overlap", min=1, help="Frames that two windows of a long video share, 4k + 1.")
]
ColorCorrection = Annotated[
    float | None,
    typer.Option("--color-correction", min=0, max=1, help="How far windows take on the colours of those before."),
]
Preset = Annotated[
    Literal["wan2gp", "official"] | None,
    typer.Option("--preset", help="Choices where released code contradicts itself."),
]
Model = Annotated[str | None, typer.Option("--model", help="Model, as `bunraku models` names it.")]
Timeout = Annotated[int | None, typer.Option("--timeout", min=1, help="Seconds after which it is given up.")]
Priority = Annotated[int | None, typer.Option("--priority", min=0, max=9, show_default="0", help="Higher goes first.")]
Output = Annotated[Path, typer.Option("-o", "--output", dir_okay=False, writable=True, help="Video to write.")]

Gateway = Annotated[
    str | None,
    typer.Option(
        "--gateway", envvar="BUNRAKU_GATEWAY", metavar="HOST:PORT", show_default="localhost:50050", help="Gateway."
    ),
]
Bundle = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        envvar="BUNRAKU_BUNDLE",
        file_okay=False,
        show_default="bundles/tiny",
        help="Directory of the models' bundle.",
    ),
]
Models = Annotated[
    Path | None,
    typer.Option(
        "--models",
        envvar="BUNRAKU_MODELS",
        exists=True,
        file_okay=False,
        help="Directory that the bundle's file names are relative to.",
    ),
]
Devices = Annotated[
    str,
    typer.Option(
        "--devices",
        metavar="STAGE=DEVICE,...",
        help="Devices of the stages, such as encoder=cuda:0,denoiser=cuda:1, or one for all, such as cpu.",
    ),
]
Grace = Annotated[
    float, typer.Option("--grace", min=0, max=3600, help="Seconds to finish what is in work when stopped.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of the processes.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Name = Annotated[str, typer.Argument(help="Name of a generation; `generations/` may be left out.")]

# What is called what in the contract (gateway.proto) and here
OPTION_OF_FIELD = {
    "animate.reference_image": "--image",
    "animate.pose_video": "--pose-video",
    "animate.driving_video": "--driving-video",
    "animate.mask_video": "--mask-video",
    "animate.people": "--people",
    "animate.prompt": "--prompt",
    "animate.negative_prompt": "--negative-prompt",
    "animate.window_overlap_frames": "--overlap",
    "animate.color_correction_strength": "--color-correction",
    "animate.preset": "--preset",
    "sampling.seed": "--seed",
    "sampling.num_inference_steps": "--steps",
    "sampling.guidance_scale": "--guidance",
    "sampling.guidance_scale_low_noise": "--guidance-low-noise",
    "sampling.shift": "--shift",
    "sampling.solver": "--solver",
    "sampling.step_cache": "--step-cache",
    "sampling.step_cache_speedup": "--step-cache",
    "sampling.step_cache_start": "--step-cache",
    "sampling.guidance_start": "--guidance-interval",
    "sampling.guidance_end": "--guidance-interval",
    "sampling.cfg_zero_star": "--cfg-zero-star",
    "sampling.zero_init_steps": "--zero-init-steps",
    "output.height": "--size",
    "output.width": "--size",
    "output.size_mode": "--size-mode",
    "output.num_frames": "--frames",
    "output.frames_per_second": "--fps",
    "output.crf": "--crf",
    "model": "--model",
    "timeout_seconds": "--timeout",
    "priority": "--priority",
    "name": "NAME",
    "page_size": "--limit",
    "states": "--state",
}


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of `832x480`.

    Raises:
        BadParameter: it is something else, or no video has that size.
    """
    found = re.fullmatch(r"(\d{1,10})[x×*](\d{1,10})", text.strip().lower(), re.ASCII)  # noqa: RUF001  # people write it
    if found is None:
        raise typer.BadParameter(f"must be width x height, such as 832x480, got {text!r}", param_hint="--size")
    width, height = int(found[1]), int(found[2])
    if not (1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE):
        raise typer.BadParameter(f"width and height must be 1 to {_MAX_SIDE}, got {text!r}", param_hint="--size")
    return width, height


def parse_step_cache(text: str) -> tuple[str, float | None, float | None]:
    """Method, speedup and start of `mag`, `mag:1.8` or `mag:1.8:0.1`; None: not given.

    Raises:
        BadParameter: it is something else.
    """
    method, *numbers = text.strip().lower().split(":")
    try:
        if method not in ("tea", "mag") or len(numbers) > 2:
            raise ValueError
        speedup, start, *_ = [*(float(number) for number in numbers), None, None]
    except ValueError as error:
        text = f"must be tea or mag, then a speedup and a start as in mag:1.8:0.1, got {text!r}"
        raise typer.BadParameter(text, param_hint="--step-cache") from error
    return method, speedup, start


def parse_interval(text: str) -> tuple[float, float]:
    """Start and end of `0.1:0.8`.

    Raises:
        BadParameter: it is something else.
    """
    try:
        start, end = (float(part) for part in text.split(":"))
    except ValueError as error:
        text = f"must be start:end, such as 0.1:0.8, got {text!r}"
        raise typer.BadParameter(text, param_hint="--guidance-interval") from error
    return start, end


def generation_name(name: str) -> str:
    """The full name of a generation."""
    return name if name.startswith("generations/") else f"generations/{name}"
