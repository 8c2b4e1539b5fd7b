"""Errors and their one mapping to gRPC statuses, in both directions.

Servers raise these where they know what is wrong and one interceptor turns them into a google.rpc.Status with details
(`to_status`); clients turn a failed call back into the same types (`from_rpc_error`). Deadlines and cancellation keep
their own statuses.
"""

from __future__ import annotations

from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "bunraku"


class BunrakuError(Exception):
    """Base of all errors that travel between processes.

    Attributes:
        message: a sentence for people.
        reason: stable upper-case name for programs, carried as google.rpc.ErrorInfo.reason.
        stage: the stage that it comes from, empty where it is the one that was called.
        retry_after_s: seconds after which trying again may help, None where it does not.
    """

    status: ClassVar[grpc.StatusCode]
    default_reason: ClassVar[str]

    def __init__(
        self, message: str, *, reason: str | None = None, stage: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.stage = stage
        self.retry_after_s = retry_after_s


class InvalidRequest(BunrakuError):
    """A field is wrong whatever the state of the server.

    Attributes:
        violations: (field, what is wrong with it), at least one; the field is named as in the proto, dotted.
    """

    status = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_REQUEST"

    def __init__(self, *violations: tuple[str, str], reason: str | None = None, stage: str = "") -> None:
        if not violations:
            raise ValueError("an invalid request names at least one field")
        super().__init__(
            "; ".join(f"{field}: {text}" if field else text for field, text in violations), reason=reason, stage=stage
        )
        self.violations = violations


class NotReady(BunrakuError):
    """Weights are loading, the server is draining, or its queue is full: another replica, or later."""

    status = grpc.StatusCode.UNAVAILABLE
    default_reason = "NOT_READY"


class OutOfMemory(BunrakuError):
    """This request does not fit this device; trying again does not help."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "GPU_OUT_OF_MEMORY"


class Busy(BunrakuError):
    """The gateway has as much to do as it takes on; `retry_after_s` says when to come back."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"


class StageBroken(BunrakuError):
    """A fault of the device, NaN in latents, or a bug."""

    status = grpc.StatusCode.INTERNAL
    default_reason = "STAGE_BROKEN"


class NotThereYet(BunrakuError):
    """The contract has it, this version does not; the message says so."""

    status = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "NOT_THERE_YET"


class NotFound(BunrakuError):
    """A named resource does not exist."""

    status = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class Conflict(BunrakuError):
    """The same request_id was used for something else."""

    status = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "REQUEST_ID_REUSED"


class WrongState(BunrakuError):
    """The request is fine, but not in the state that the resource is in."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "WRONG_STATE"


class DeadlineExceeded(BunrakuError):
    """The time that the caller gave is over."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(BunrakuError):
    """The caller took the request back."""

    status = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class PermissionDenied(BunrakuError):
    """The caller is not who may do this."""

    status = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class Unauthenticated(BunrakuError):
    """The caller did not say who it is."""

    status = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


KINDS: tuple[type[BunrakuError], ...] = (
    InvalidRequest,
    NotReady,
    OutOfMemory,
    Busy,
    StageBroken,
    NotThereYet,
    NotFound,
    Conflict,
    WrongState,
    DeadlineExceeded,
    Cancelled,
    PermissionDenied,
    Unauthenticated,
)

# Every status that a call can end with has a kind; those that nothing here raises come from gRPC itself.
_KIND_OF_STATUS: dict[grpc.StatusCode, type[BunrakuError]] = {
    **{kind.status: kind for kind in KINDS},
    grpc.StatusCode.RESOURCE_EXHAUSTED: OutOfMemory,  # without RetryInfo; with it, Busy
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.ABORTED: NotReady,
    grpc.StatusCode.UNKNOWN: StageBroken,
    grpc.StatusCode.DATA_LOSS: StageBroken,
}


def to_status(error: BunrakuError) -> status_pb2.Status:
    """The google.rpc.Status of an error, with BadRequest, RetryInfo and ErrorInfo where they apply."""
    code: int = error.status.value[0]
    details = [
        _packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"stage": error.stage}))
    ]
    if isinstance(error, InvalidRequest):
        details.append(
            _packed(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
                        for field, text in error.violations
                    ]
                )
            )
        )
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code, message=error.message, details=details)


def from_rpc_error(error: grpc.aio.AioRpcError, *, stage: str = "") -> BunrakuError:
    """The error that a failed call stands for.

    Args:
        error: what the call raised.
        stage: the stage that was called, used where the answer names none.
    """
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # reads the same two methods of both kinds of call
    if status is None:
        status = status_pb2.Status(code=error.code().value[0], message=error.details() or error.code().name)
    return from_status(status, stage=stage)


def from_status(status: status_pb2.Status, *, stage: str = "") -> BunrakuError:
    """The error that a google.rpc.Status stands for."""
    info, bad_request, retry_after_s = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), None
    for detail in status.details:
        if detail.Unpack(info) or detail.Unpack(bad_request):
            continue
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    kind = _kind(status, info, retry_after_s)
    stage = info.metadata.get("stage") or stage
    if issubclass(kind, InvalidRequest):
        violations = [(v.field, v.description) for v in bad_request.field_violations] or [("", status.message)]
        return kind(*violations, reason=info.reason or None, stage=stage)
    return kind(status.message, reason=info.reason or None, stage=stage, retry_after_s=retry_after_s)


def _kind(
    status: status_pb2.Status, info: error_details_pb2.ErrorInfo, retry_after_s: float | None
) -> type[BunrakuError]:
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after_s is not None:
        return Busy
    return _KIND_OF_STATUS[code]


def status_name(error: BunrakuError) -> str:
    """Name of the error's gRPC status, such as `UNAVAILABLE`."""
    return code_pb2.Code.Name(error.status.value[0])


def _packed(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]  # every detail is a protobuf message
    return packed
