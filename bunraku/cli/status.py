"""`bunraku status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from bunraku.cli import options

if TYPE_CHECKING:
    from bunraku.v1 import gateway_pb2 as pb


def status(gateway: options.Gateway = None, json: options.Json = False) -> None:
    """Shows the stages: state, device, memory, queue and work. Exit status 1 when a stage is down."""
    from rich.console import Console

    from bunraku.cli.display import write_table
    from bunraku.cli.signals import run

    answer = run(_ask(gateway))
    if json:
        from google.protobuf import json_format

        typer.echo(json_format.MessageToJson(answer, preserving_proto_field_name=True))
    else:
        columns = ["stage", "address", "state", "device", "memory", "queue", "work"]
        write_table(Console(), columns, [_row(endpoint) for endpoint in answer.stages])
        work = f"{answer.running_generations} running, {answer.queued_generations} queued"
        typer.echo(f"gateway {answer.version}: {work}")
    serving = {endpoint.stage for endpoint in answer.stages if _serves(endpoint)}
    if not answer.stages or serving != {endpoint.stage for endpoint in answer.stages}:
        raise typer.Exit(1)


async def _ask(gateway: str | None) -> pb.GetSystemStatusResponse:
    from bunraku.cli.generation import connected

    async with connected(gateway) as client:
        return await client.status()


def _serves(endpoint: pb.StageEndpoint) -> bool:
    from bunraku.v1 import stage_pb2

    return endpoint.reachable and endpoint.status.state == stage_pb2.STAGE_STATE_SERVING


def _row(endpoint: pb.StageEndpoint) -> list[str]:
    from bunraku.cli.display import seconds, size
    from bunraku.v1 import stage_pb2

    if not endpoint.reachable:
        return [endpoint.stage, endpoint.address, f"unreachable: {endpoint.problem}", "", "", "", ""]
    stage = endpoint.status
    state = stage_pb2.StageState.Name(stage.state).removeprefix("STAGE_STATE_").lower()
    kind, memory = ("VRAM", stage.vram) if stage.vram.total_bytes else ("RAM", stage.ram)
    work = [f"{job.rpc} {seconds(job.elapsed.ToTimedelta().total_seconds())}" for job in stage.work]
    return [
        endpoint.stage,
        endpoint.address,
        ": ".join(filter(None, [state, stage.state_detail])),
        stage.device if stage.device_name.lower() in ("", stage.device) else f"{stage.device} ({stage.device_name})",
        f"{size(memory.used_bytes)} of {size(memory.total_bytes)} {kind}",
        f"{stage.queued_requests} of {stage.max_queued_requests}",
        ", ".join(work),
    ]
