"""What generations take of the GPUs, measured on those that have ended and foretold for those that come."""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from bunraku.v1 import gateway_pb2 as pb
from gateway.jobs.tables import COSTS

# Part of the newest measurement in the average: a few generations after a change it is forgotten
_NEWEST = 0.3


@dataclass(frozen=True)
class Cost:
    """What a generation took.

    Attributes:
        step_seconds: of the denoiser for one solver step of the whole video, all its windows together.
        other_seconds: of all the other stages together.
    """

    step_seconds: float
    other_seconds: float


@dataclass(frozen=True)
class _Known:
    model: str
    volume: float
    cost: Cost


class Costs:
    """Averages by kind of generation: model, size, length, and what of its steps is computed."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    async def load(self, connection: AsyncConnection) -> None:
        """Reads what this and other gateways have measured."""
        rows = await connection.execute(sa.select(COSTS).order_by(COSTS.c.update_time_us))
        self._known = {
            row.kind: _Known(row.model, row.volume, Cost(row.step_seconds, row.other_seconds)) for row in rows
        }

    def estimate(self, request: pb.CreateGenerationRequest) -> float | None:
        """Seconds of GPU that a request will take; None where its model was never measured.

        Of a size that was never measured it is in proportion to its pixels, from the one measured last.
        """
        same = self._known.get(_kind(request))
        if same is None:
            of_model = [known for known in self._known.values() if known.model == request.model]
            if not of_model:
                return None
            same = of_model[-1]
        scale = _volume(request) / same.volume
        return scale * (same.cost.step_seconds * request.sampling.num_inference_steps + same.cost.other_seconds)

    async def learn(self, connection: AsyncConnection, request: pb.CreateGenerationRequest, cost: Cost) -> None:
        """Takes in what a generation took."""
        kind, known = _kind(request), self._known.get(_kind(request))
        if known is not None:
            cost = Cost(
                _average(known.cost.step_seconds, cost.step_seconds),
                _average(known.cost.other_seconds, cost.other_seconds),
            )
        self._known.pop(kind, None)  # the one measured last is the last
        self._known[kind] = _Known(request.model, _volume(request), cost)
        insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        measured = {
            "step_seconds": cost.step_seconds,
            "other_seconds": cost.other_seconds,
            "update_time_us": time.time_ns() // 1000,
        }
        statement = insert(COSTS).values(kind=kind, model=request.model, volume=_volume(request), **measured)
        await connection.execute(statement.on_conflict_do_update(index_elements=["kind"], set_=measured))


def _kind(request: pb.CreateGenerationRequest) -> str:
    output = request.output
    size = f"{output.height}x{output.width}x{output.num_frames}"
    return "/".join((request.model, size, *_passes(request.sampling)))


def _passes(sampling: pb.SamplingParameters) -> list[str]:
    """What of every step the transformer computes."""
    guided = "guided" if sampling.guidance_scale != 1 else "plain"
    start, end = sampling.guidance_start, sampling.guidance_end if sampling.HasField("guidance_end") else 1.0
    if guided == "guided" and (start, end) != (0, 1):
        guided += f" {start:g}-{end:g}"
    cache = f"{sampling.step_cache} {sampling.step_cache_speedup:g} {sampling.step_cache_start:g}"
    return [guided, *([cache] if sampling.step_cache else [])]


def _volume(request: pb.CreateGenerationRequest) -> float:
    return float(max(1, request.output.height * request.output.width * request.output.num_frames))


def _average(before: float, newest: float) -> float:
    return before + _NEWEST * (newest - before)
