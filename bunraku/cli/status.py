"""`bunraku status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bunraku.cli import options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bunraku.v1 import gateway_pb2 as pb
    from bunraku.v1 import stage_pb2

_COLUMNS = ["stage", "address", "state", "device", "VRAM", "RAM", "queue", "work"]


def status(
    gateway: options.Gateway = None,
    json: options.Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks of --watch.")] = 2.0,
) -> None:
    """Shows the stages: state, device, memory, queue and work. Exit status 1 when a stage is down."""
    from bunraku.cli.signals import run

    if watch:
        run(_watch(gateway, interval, json=json))
        return
    answer = run(_ask(gateway))
    _write(answer, json=json)
    serving = {endpoint.stage for endpoint in answer.stages if _serves(endpoint)}
    if not answer.stages or serving != {endpoint.stage for endpoint in answer.stages}:
        raise typer.Exit(1)


async def _ask(gateway: str | None) -> pb.GetSystemStatusResponse:
    from bunraku.cli.generation import connected

    async with connected(gateway) as client:
        return await client.status()


async def _watch(gateway: str | None, interval_s: float, *, json: bool) -> None:
    """Shows the status again and again: in place on a terminal, one after another elsewhere.

    A gateway that went away is waited for.
    """
    import asyncio

    from rich.console import Console
    from rich.live import Live

    from bunraku.cli.generation import connected
    from bunraku.errors import BunrakuError

    console = Console()
    async with connected(gateway) as client:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                try:
                    answer = await client.status()
                except BunrakuError as error:
                    text = f"the gateway does not answer: {error.message}"
                    if console.is_terminal:
                        live.update(text, refresh=True)
                    else:
                        typer.echo(text)
                else:
                    if console.is_terminal and not json:
                        live.update(_drawn(answer), refresh=True)
                    else:
                        _write(answer, json=json)
                await asyncio.sleep(interval_s)


def _write(answer: pb.GetSystemStatusResponse, *, json: bool) -> None:
    from rich.console import Console

    from bunraku.cli.display import write_table

    if json:
        from google.protobuf import json_format

        typer.echo(json_format.MessageToJson(answer, preserving_proto_field_name=True))
        return
    write_table(Console(), _COLUMNS, [_row(endpoint) for endpoint in answer.stages])
    typer.echo(_summary(answer))


def _drawn(answer: pb.GetSystemStatusResponse) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(*_COLUMNS)
    for endpoint in answer.stages:
        table.add_row(*map(Text, _row(endpoint)))
    return Group(table, Text(_summary(answer), style="dim"))


def _summary(answer: pb.GetSystemStatusResponse) -> str:
    work = f"{answer.running_generations} running, {answer.queued_generations} queued"
    return f"gateway {answer.version}: {work}"


def _serves(endpoint: pb.StageEndpoint) -> bool:
    from bunraku.v1 import stage_pb2

    return endpoint.reachable and endpoint.status.state == stage_pb2.STAGE_STATE_SERVING


def _row(endpoint: pb.StageEndpoint) -> list[str]:
    from bunraku.cli.display import seconds
    from bunraku.v1 import stage_pb2

    if not endpoint.reachable:
        return [endpoint.stage, endpoint.address, f"unreachable: {endpoint.problem}", "", "", "", "", ""]
    stage = endpoint.status
    state = stage_pb2.StageState.Name(stage.state).removeprefix("STAGE_STATE_").lower()
    work = [f"{job.rpc} {seconds(job.elapsed.ToTimedelta().total_seconds())}" for job in stage.work]
    return [
        endpoint.stage,
        endpoint.address,
        ": ".join(filter(None, [state, stage.state_detail])),
        stage.device if stage.device_name.lower() in ("", stage.device) else f"{stage.device} ({stage.device_name})",
        _memory(stage.vram),
        _memory(stage.ram),
        f"{stage.queued_requests} of {stage.max_queued_requests}",
        ", ".join(work),
    ]


def _memory(memory: stage_pb2.Memory) -> str:
    """What the process uses of a memory and has used at most, and what nobody uses; empty where there is none."""
    from bunraku.cli.display import size

    if not memory.total_bytes:
        return ""
    used = f"{size(memory.used_bytes)} of {size(memory.total_bytes)}"
    return f"{used}, peak {size(memory.peak_bytes)}, {size(memory.free_bytes)} free"
