"""A generation as the database keeps it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sqlalchemy as sa

from bunraku.errors import InvalidRequest
from bunraku.v1 import gateway_pb2 as pb

QUEUED, RUNNING = pb.GENERATION_STATE_QUEUED, pb.GENERATION_STATE_RUNNING
SUCCEEDED, FAILED = pb.GENERATION_STATE_SUCCEEDED, pb.GENERATION_STATE_FAILED
CANCELLED = pb.GENERATION_STATE_CANCELLED
ENDED = (SUCCEEDED, FAILED, CANCELLED)

_GENERATION_NAME = re.compile(r"generations/([0-9a-f]{32})")


@dataclass(frozen=True)
class Job:
    """A generation as it was when it was read.

    Attributes:
        number: counts up with every generation.
        request: as checked, with the defaults filled in.
        cancel_requested: the caller wants it stopped; it ends CANCELLED whatever the worker reports.
        attempts: times that work was begun.
        caller: whose it is; empty where callers have no names.
        weight: share of the GPUs that its caller has.
        claim_token: shown by the worker in every write; another claim has another one, and writes that show an earlier
            one are refused. Empty while nobody works on it.
        gpu_seconds: of stages' work so far, in all attempts.
        estimated_seconds: that it was thought to need when it was created; None: nothing like it was measured before.
        trace_parent: W3C traceparent of the call that created it, empty where tracing is off.
        deadline_us: when it is given up; None: never.
        start_time_us: when work began first, None before.
        end_time_us: when it ended, None before.
    """

    number: int
    id: str
    request: pb.CreateGenerationRequest
    state: pb.GenerationState.ValueType
    cancel_requested: bool
    attempts: int
    caller: str
    weight: float
    claim_token: str
    gpu_seconds: float
    estimated_seconds: float | None
    progress: pb.GenerationProgress
    error: pb.GenerationError | None
    video: pb.Asset | None
    trace_parent: str
    create_time_us: int
    deadline_us: int | None
    start_time_us: int | None
    end_time_us: int | None

    @classmethod
    def of(cls, row: sa.Row[tuple[object, ...]]) -> Job:
        """The job in a row of the table."""
        return cls(
            number=row.number,
            id=row.id,
            request=pb.CreateGenerationRequest.FromString(row.request),
            state=row.state,
            cancel_requested=row.cancel_requested,
            attempts=row.attempts,
            caller=row.caller,
            weight=row.weight,
            claim_token=row.claim_token or "",
            gpu_seconds=row.gpu_seconds,
            estimated_seconds=row.estimated_seconds,
            progress=pb.GenerationProgress.FromString(row.progress),
            error=None if row.error is None else pb.GenerationError.FromString(row.error),
            video=None if row.video is None else pb.Asset.FromString(row.video),
            trace_parent=row.trace_parent,
            create_time_us=row.create_time_us,
            deadline_us=row.deadline_us,
            start_time_us=row.start_time_us,
            end_time_us=row.end_time_us,
        )

    @property
    def name(self) -> str:
        """`generations/{id}`."""
        return f"generations/{self.id}"

    @property
    def priority(self) -> int:
        """0 to 9, higher first."""
        return self.request.priority

    def to_proto(self) -> pb.Generation:
        """The generation as callers see it."""
        generation = pb.Generation(
            name=self.name,
            request=self.request,
            state=self.state,
            progress=self.progress,
            error=self.error,
            video=self.video,
            attempts=self.attempts,
            trace_id=self.trace_parent.split("-")[1] if self.trace_parent else "",
        )
        generation.create_time.FromMicroseconds(self.create_time_us)
        if self.start_time_us is not None:
            generation.start_time.FromMicroseconds(self.start_time_us)
        if self.end_time_us is not None:
            generation.end_time.FromMicroseconds(self.end_time_us)
        return generation


def generation_id(name: str) -> str:
    """The id in `generations/{id}`.

    Raises:
        InvalidRequest: the name has another form.
    """
    match = _GENERATION_NAME.fullmatch(name)
    if match is None:
        raise InvalidRequest(("name", f"must be generations/ and 32 hexadecimal digits, got {name[:100]!r}"))
    return match[1]


def request_key(caller: str, request_id: str) -> str | None:
    """What a request_id is unique under; request_ids have no slash. None: no request_id, nothing to be unique."""
    if not request_id:
        return None
    return f"{caller}/{request_id}" if caller else request_id
