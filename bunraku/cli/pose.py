"""`bunraku pose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bunraku.cli import options

if TYPE_CHECKING:
    from bunraku.cli.extraction import Extraction
    from bunraku.tls import TlsFiles

Video = Annotated[Path, typer.Argument(help="Video of people.", exists=True, dir_okay=False, readable=True)]
Overlay = Annotated[bool, typer.Option("--overlay", help="Draw the skeletons over the video rather than on black.")]
Image = Annotated[
    Path | None,
    typer.Option("--image", help="Picture that one person is fitted to.", exists=True, dir_okay=False, readable=True),
]
Preset = Annotated[
    Literal["recommended", "wan2gp", "official"] | None,
    typer.Option("--preset", help="Choices where released code contradicts itself."),
]
MaskExpand = Annotated[int, typer.Option("--mask-expand", min=-10, max=50, help="Grow the bright part, or shrink it.")]
Masks = Annotated[
    Literal["sam2", "matanyone"] | None,
    typer.Option("--masks", help="What tells several people apart; matanyone is for non-commercial use only."),
]
Address = Annotated[
    str | None,
    typer.Option("--pose", envvar="BUNRAKU_POSE", metavar="HOST:PORT", help="Pose stage; none: one is started here."),
]
Output = Annotated[Path, typer.Option("-o", "--output", dir_okay=False, writable=True, help="Video to write.")]


def pose(
    video: Video,
    output: Output = Path("pose.mp4"),
    overlay: Overlay = False,
    people: options.People = None,
    preset: Preset = None,
    image: Image = None,
    mask_video: options.MaskVideo = None,
    mask_expand: MaskExpand = 0,
    masks: Masks = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="WxH", help="Size in pixels, multiples of 32; none: near the video's."),
    ] = None,
    num_frames: Annotated[int | None, typer.Option("--frames", min=1, help="The most frames, 4k + 1.")] = None,
    crf: options.Crf = None,
    address: Address = None,
    bundle: options.Bundle = None,
    models: options.Models = None,
    devices: options.Devices = "",
) -> None:
    """Finds the people of a video and draws their skeletons, as the character of a picture is made to move by."""
    if not output.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {output.parent}", param_hint="--output")
    if output.exists() and any(source and output.samefile(source) for source in (video, image, mask_video)):
        raise typer.BadParameter(f"{output} would be overwritten", param_hint="--output")
    width, height = options.parse_size(size) if size is not None else (None, None)
    try:
        from bunraku.cli.extraction import Extraction
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"needs {error.name}: pip install bunraku[runtime]", param_hint="bunraku pose"
        ) from error
    from bunraku.cli.signals import run
    from bunraku.tls import TlsFiles

    extraction = Extraction(
        video=video,
        output=output,
        overlay=overlay,
        people=people or 1,
        preset=preset or "",
        image=image,
        mask_video=mask_video,
        mask_expand=mask_expand,
        mask_backend=masks or "",
        height=height,
        width=width,
        max_frames=num_frames or 0,
        crf=15 if crf is None else crf,
    )
    if address is not None:
        run(_extract(extraction, address, TlsFiles.of_environment()))
    else:
        run(_extract_locally(extraction, bundle, models, devices))


async def _extract(extraction: Extraction, address: str, tls: TlsFiles) -> None:
    from rich.console import Console

    from bunraku.cli.display import Display

    with Display(Console(stderr=True)) as display:
        summary = await extraction.run(address, display, tls)
    typer.echo(summary)


async def _extract_locally(extraction: Extraction, bundle: Path | None, models: Path | None, devices: str) -> None:
    from rich.console import Console

    from bunraku.cli.system import bundle_directory, local_system, parse_devices, while_running
    from bunraku.tls import NO_TLS

    directory, device_of, console = bundle_directory(bundle), parse_devices(devices), Console(stderr=True)
    system = local_system(console, bundle=directory, models=models, devices=device_of, only="pose")
    async with system as supervisor:
        await while_running(supervisor, _extract(extraction, supervisor.address, NO_TLS))
