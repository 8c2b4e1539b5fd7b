"""`bunraku models`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from bunraku.cli import options

if TYPE_CHECKING:
    from bunraku.v1 import gateway_pb2 as pb


def models(gateway: options.Gateway = None, json: options.Json = False) -> None:
    """Shows the models of the gateway with their defaults and limits."""
    from rich.console import Console

    from bunraku.cli.display import write_table
    from bunraku.cli.signals import run
    from bunraku.v1 import gateway_pb2 as pb

    found = run(_ask(gateway))
    if json:
        from google.protobuf import json_format

        answer = pb.ListModelsResponse(models=found)
        typer.echo(json_format.MessageToJson(answer, preserving_proto_field_name=True))
        return
    columns = ["model", "task", "family", "size", "frames", "steps", "guidance", "solver", "limits"]
    write_table(Console(), columns, [_row(model) for model in found])


async def _ask(gateway: str | None) -> tuple[pb.Model, ...]:
    from bunraku.cli.generation import connected

    async with connected(gateway) as client:
        return await client.models()


def _row(model: pb.Model) -> list[str]:
    sampling = model.default_sampling
    return [
        model.name,
        model.task,
        model.family,
        f"{model.default_width}x{model.default_height}",
        f"{model.window_frames} per window, {model.window_overlap_frames} shared",
        str(sampling.num_inference_steps),
        f"{sampling.guidance_scale:g}",
        sampling.solver,
        f"{model.max_frames} frames, {model.max_pixels} pixels",
    ]
