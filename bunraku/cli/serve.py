"""`bunraku serve`."""

from __future__ import annotations

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

    settings = SystemSettings(
        bundle_directory(bundle),
        data_directory(data),
        models,
        port,
        parse_devices(devices),
        grace,
        certificates=certificates,
    )
    asyncio.run(_serve(settings, verbose=verbose))


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
