"""A system of processes on this machine, as `bunraku serve` and `bunraku animate --local` start it."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console

import bunraku
from bunraku.cli.display import Display, Row
from bunraku.supervisor import (
    GATEWAY,
    STAGES,
    Child,
    ProcessState,
    Supervisor,
    SystemFailed,
    SystemSettings,
    system_programs,
)

T = TypeVar("T")
LOCAL_GRACE_S = 2.0
_REPOSITORY = Path(bunraku.__file__).parent.parent
_TINY = Path("bundles/tiny")


def bundle_directory(given: Path | None) -> Path:
    """The bundle that was given, or the tiny one of the repository.

    Raises:
        BadParameter: there is no bundle.
    """
    if given is not None:
        if not (given / "bundle.toml").is_file():
            raise typer.BadParameter(f"there is no bundle.toml in {given}", param_hint="--bundle")
        return given
    for place in (_REPOSITORY, Path.cwd()):
        if (place / _TINY / "bundle.toml").is_file():
            return place / _TINY
    raise typer.BadParameter(f"must be given: there is no {_TINY} here", param_hint="--bundle")


def named_bundle(name: str) -> Path:
    """The bundle of this name beside the tiny one.

    Raises:
        BadParameter: there is none of that name; those that there are stand in it.
    """
    beside = bundle_directory(None).parent
    known = sorted(path.parent.name for path in beside.glob("*/bundle.toml"))
    if name not in known:
        raise typer.BadParameter(f"must be one of {', '.join(known)}, got {name!r}", param_hint="--model")
    return beside / name


def data_directory(given: Path | None) -> Path:
    """The data directory that was given, or the one of this user."""
    if given is not None:
        return given
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "bunraku"


def parse_devices(text: str) -> dict[str, str]:
    """Device of each stage that is named: `encoder=cuda:0,denoiser=cuda:1`; of all stages: `cpu`.

    Raises:
        BadParameter: it is something else.
    """
    if text and "=" not in text:
        return dict.fromkeys(STAGES, text.strip())
    devices = {}
    for part in filter(None, text.split(",")):
        stage, separator, device = (word.strip() for word in part.partition("="))
        if stage not in STAGES or not separator or not device or stage in devices:
            expected = f"must be stage=device,... with each of the stages {', '.join(STAGES)} at most once"
            raise typer.BadParameter(f"{expected}, got {part!r}", param_hint="--devices")
        devices[stage] = device
    return devices


class SystemDisplay(Display):
    """One row per process; lines once it is no longer drawn."""

    def changed(self, child: Child) -> None:
        """Shows a process that has changed its state."""
        program = child.program
        device = program.environment.get("BUNRAKU_DEVICE", "") if program.name != GATEWAY else ""
        place = ", ".join(filter(None, [program.address, device]))
        row = Row(
            label=program.name,
            state=child.state.value,
            amount=child.ended if child.state is ProcessState.RESTARTING else place,
            seconds=time.monotonic() - child.started,
            ticking=child.state in (ProcessState.STARTING, ProcessState.LOADING),
        )
        self.show(program.name, row)


@asynccontextmanager
async def local_system(
    console: Console, *, bundle: Path, models: Path | None, devices: dict[str, str], only: str = ""
) -> AsyncIterator[Supervisor]:
    """A system of one's own on free ports, or `only` one of its stages, whose address is then the system's; its data goes
    with it, unless it failed and its logs are of use."""
    data = Path(tempfile.mkdtemp(prefix="bunraku-"))
    settings = SystemSettings(bundle, data, models, port=0, devices=devices, grace_s=LOCAL_GRACE_S)
    display = SystemDisplay(console)

    def changed(child: Child) -> None:
        # that it stops at the end is no news
        if child.state is not ProcessState.STOPPED:
            display.changed(child)

    try:
        programs = [program for program in system_programs(settings) if only in ("", program.name)]
        supervisor = Supervisor(programs, data=data, grace_s=settings.grace_s, on_change=changed)
        with display:
            await supervisor.__aenter__()
        try:
            yield supervisor
        finally:
            await supervisor.stop()
    except SystemFailed:
        raise
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        raise
    shutil.rmtree(data, ignore_errors=True)


async def while_running(supervisor: Supervisor, work: Coroutine[Any, Any, T]) -> T:
    """Does the work, and gives it up when the system cannot be kept running.

    Raises:
        SystemFailed: that was so.
    """
    working, watching = asyncio.create_task(work), asyncio.create_task(supervisor.watch())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            await watching
        return await working
    except asyncio.CancelledError:
        working.cancel()
        return await working
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait([working, watching])
