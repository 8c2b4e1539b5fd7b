"""`bunraku serve`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bunraku.cli import options

if TYPE_CHECKING:
    from bunraku.supervisor import SystemSettings


def serve(
    bundle: options.Bundle = None,
    models: options.Models = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of the gateway; 0: a free one.")] = 50050,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            envvar="BUNRAKU_DATA",
            file_okay=False,
            show_default="~/.local/share/bunraku",
            help="Directory for generations, files and logs.",
        ),
    ] = None,
    devices: options.Devices = "",
    vram: Annotated[
        str | None,
        typer.Option(
            "--vram",
            help="As 16GiB: what all stages together may take of the one GPU that they share; `bunraku plan --stage all` "
            "shows what each gets. Not given: each takes what it likes.",
        ),
    ] = None,
    grace: options.Grace = 10.0,
    certificates: Annotated[
        Path | None,
        typer.Option(
            "--certificates",
            exists=True,
            file_okay=False,
            help="Directory as `make certs` writes it: mutual TLS between the parts and for clients.",
        ),
    ] = None,
    verbose: options.Verbose = False,
) -> None:
    """Starts the four stages and the gateway on this machine and keeps them running until Ctrl-C."""
    import asyncio

    from bunraku.cli.system import bundle_directory, data_directory, parse_devices
    from bunraku.supervisor import SystemSettings

    if vram is not None and devices:
        raise typer.BadParameter(
            "is of one GPU that all stages share; --devices gives them several", param_hint="--vram"
        )
    found = bundle_directory(bundle)
    settings = SystemSettings(
        found,
        data_directory(data),
        models,
        port,
        parse_devices(devices),
        grace,
        certificates=certificates,
        environments={} if vram is None else _within(vram, found, models),
    )
    asyncio.run(_serve(settings, verbose=verbose))


def _within(vram: str, bundle: Path, models: Path | None) -> dict[str, Mapping[str, str]]:
    """Settings by which each stage keeps to its share of a GPU. Raises BadParameter where the shares are too small."""
    from bunraku.cli.plan import parsed_bytes
    from bunraku.cli.plan_device import Clip, device_shares
    from runtime.budget import DoesNotFit
    from runtime.bundles import load_bundle
    from services.denoiser.__main__ import DenoiserSettings

    found = load_bundle(bundle, models)
    branches = 2 if DenoiserSettings().step_cache else 0  # inherited by the stage
    clip = Clip(found.video.width, found.video.height, found.video.window_frames, branches)
    try:
        shares = device_shares(found, clip, parsed_bytes(vram))
    except DoesNotFit as error:
        raise typer.BadParameter(str(error), param_hint="--vram") from error
    for share in shares:
        typer.echo(f"{share.stage}: {share.vram_bytes / 1024**3:.2f} GiB, {share.words}")
    return {share.stage: share.environment for share in shares}


async def _serve(settings: SystemSettings, *, verbose: bool) -> None:
    import asyncio
    import signal

    from rich.console import Console

    from bunraku.cli.system import SystemDisplay
    from bunraku.supervisor import Supervisor, system_programs

    display = SystemDisplay(Console())
    supervisor = Supervisor(
        system_programs(settings),
        data=settings.data,
        grace_s=settings.grace_s,
        on_change=display.changed,
        on_line=(lambda name, line: display.note(f"[{name}] {line}")) if verbose else None,
    )
    serving = asyncio.current_task()
    assert serving is not None

    def interrupted() -> None:
        """The first signal stops the system, the next one does not wait for what is in work."""
        if serving.cancelling():
            supervisor.kill()
        else:
            serving.cancel()

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signal_number, interrupted)
    try:
        with display:
            await supervisor.__aenter__()
        try:
            display.note(f"the gateway listens on {supervisor.address}; Ctrl-C stops it")
            await supervisor.watch()
        finally:
            await supervisor.stop()
    except asyncio.CancelledError:
        display.note("stopped")
