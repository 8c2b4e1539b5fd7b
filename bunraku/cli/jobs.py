"""`bunraku jobs`: generations that are or were on a gateway."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bunraku.cli import options

if TYPE_CHECKING:
    from bunraku.v1 import gateway_pb2 as pb

jobs = typer.Typer(help="Generations of a gateway.", pretty_exceptions_enable=False, no_args_is_help=False)


class State(StrEnum):
    """Where a generation stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@jobs.command("list")
def list_jobs(
    state: Annotated[list[State] | None, typer.Option("--state", help="Only these; may be given again.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="The most to show.")] = 20,
    gateway: options.Gateway = None,
    json: options.Json = False,
) -> None:
    """Shows generations, newest first."""
    from rich.console import Console

    from bunraku.cli.display import write_table
    from bunraku.cli.signals import run
    from bunraku.v1 import gateway_pb2 as pb

    found = run(_list(gateway, state or [], limit))
    if json:
        _write_json(pb.ListGenerationsResponse(generations=found))
        return
    write_table(Console(), ["name", "state", "done", "created", "prompt"], [_row(generation) for generation in found])


@jobs.command("get")
def get(name: options.Name, gateway: options.Gateway = None, json: options.Json = False) -> None:
    """Shows a generation as it stands."""
    from bunraku.cli.signals import run

    generation = run(_get(gateway, name))
    if json:
        _write_json(generation)
        return
    for label, value in _facts(generation):
        typer.echo(f"{label}: {value}")


@jobs.command("watch")
def watch(name: options.Name, gateway: options.Gateway = None) -> None:
    """Shows the progress of a generation until it ends. Ctrl-C stops watching; the generation goes on."""
    from bunraku.cli.signals import run

    run(_watch(gateway, name))


@jobs.command("cancel")
def cancel(name: options.Name, gateway: options.Gateway = None) -> None:
    """Asks for a generation to stop."""
    from bunraku.cli.generation import state_name
    from bunraku.cli.signals import run
    from bunraku.client import ENDED

    generation = run(_cancel(gateway, name))
    state = state_name(generation.state)
    typer.echo(f"{generation.name}: {state if generation.state in ENDED else 'cancelling'}")


@jobs.command("delete")
def delete(name: options.Name, gateway: options.Gateway = None) -> None:
    """Deletes a generation that has ended, with its results."""
    from bunraku.cli.signals import run

    run(_delete(gateway, name))


@jobs.command("download")
def download(
    name: options.Name,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", dir_okay=False, show_default="ID.mp4", help="Video to write.")
    ] = None,
    gateway: options.Gateway = None,
) -> None:
    """Writes the video of a generation that has succeeded."""
    from bunraku.cli.signals import run

    full_name = options.generation_name(name)
    run(_download(gateway, full_name, output or Path(f"{full_name.rpartition('/')[2]}.mp4")))


async def _list(gateway: str | None, states: list[State], limit: int) -> list[pb.Generation]:
    from contextlib import aclosing

    from bunraku.cli.generation import connected
    from bunraku.v1 import gateway_pb2 as pb

    wanted = [pb.GenerationState.Value(f"GENERATION_STATE_{state.upper()}") for state in states]
    found: list[pb.Generation] = []
    async with connected(gateway) as client, aclosing(client.list(states=wanted, page_size=limit)) as generations:
        async for generation in generations:
            found.append(generation)
            if len(found) == limit:
                break
    return found


async def _get(gateway: str | None, name: str) -> pb.Generation:
    from bunraku.cli.generation import connected

    async with connected(gateway) as client:
        return await client.get(options.generation_name(name))


async def _watch(gateway: str | None, name: str) -> None:
    from rich.console import Console

    from bunraku.cli.generation import GenerationDisplay, connected, follow, summary
    from bunraku.client import succeeded

    async with connected(gateway) as client:
        with GenerationDisplay(Console(stderr=True)) as display:
            generation = await follow(client, options.generation_name(name), display)
    typer.echo(summary(succeeded(generation)))


async def _cancel(gateway: str | None, name: str) -> pb.Generation:
    from bunraku.cli.generation import connected

    async with connected(gateway) as client:
        return await client.cancel(options.generation_name(name))


async def _delete(gateway: str | None, name: str) -> None:
    from bunraku.cli.generation import connected

    async with connected(gateway) as client:
        await client.delete(options.generation_name(name))


async def _download(gateway: str | None, name: str, output: Path) -> None:
    from bunraku.cli.generation import connected, summary
    from bunraku.client import succeeded

    async with connected(gateway) as client:
        generation = succeeded(await client.get(name))
        await client.download(generation.video, output)
    typer.echo(summary(generation, output))


def _row(generation: pb.Generation) -> list[str]:
    from bunraku.cli.generation import state_name

    created = generation.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
    prompt = generation.request.animate.prompt
    shown = prompt if len(prompt) <= 40 else f"{prompt[:39]}…"
    done = f"{generation.progress.fraction:.0%}"
    return [generation.name, state_name(generation.state), done, created, " ".join(shown.split())]


def _facts(generation: pb.Generation) -> list[tuple[str, object]]:
    from bunraku.cli.display import size
    from bunraku.cli.generation import state_name

    request, error = generation.request, generation.error
    sampling, passes = request.sampling, generation.progress.forward_passes
    stage = f"{error.stage}: " if error.stage else ""
    facts: list[tuple[str, object]] = [
        ("name", generation.name),
        ("state", state_name(generation.state)),
        ("done", f"{generation.progress.fraction:.0%}"),
        ("error", f"{stage}{error.message} ({error.reason})" if generation.HasField("error") else ""),
        ("model", request.model),
        ("prompt", request.animate.prompt),
        ("size", f"{request.output.width}x{request.output.height}" if request.output.width else ""),
        ("frames", request.output.num_frames or ""),
        ("seed", sampling.seed if sampling.HasField("seed") else ""),
        ("steps", sampling.num_inference_steps or ""),
        ("step cache", f"{sampling.step_cache} {sampling.step_cache_speedup:g}" if sampling.step_cache else ""),
        ("forward passes", f"{passes.computed} computed, {passes.reused} reused" if passes.computed else ""),
        ("video", f"{generation.video.name} ({size(generation.video.size_bytes)})" if generation.video.name else ""),
        ("created", f"{generation.create_time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"),
        ("trace", generation.trace_id),
    ]
    return [(label, value) for label, value in facts if value != ""]


def _write_json(message: pb.Generation | pb.ListGenerationsResponse) -> None:
    from google.protobuf import json_format

    typer.echo(json_format.MessageToJson(message, preserving_proto_field_name=True))
