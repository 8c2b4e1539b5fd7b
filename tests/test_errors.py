"""Errors and gRPC statuses: every kind travels, every status has a kind."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from bunraku import errors
from bunraku.errors import BunrakuError, Busy, InvalidRequest, NotReady, OutOfMemory, StageBroken, to_status

STATUSES = {
    "InvalidRequest": "INVALID_ARGUMENT",
    "NotReady": "UNAVAILABLE",
    "OutOfMemory": "RESOURCE_EXHAUSTED",
    "Busy": "RESOURCE_EXHAUSTED",
    "StageBroken": "INTERNAL",
    "NotThereYet": "UNIMPLEMENTED",
    "NotFound": "NOT_FOUND",
    "Conflict": "ALREADY_EXISTS",
    "WrongState": "FAILED_PRECONDITION",
    "DeadlineExceeded": "DEADLINE_EXCEEDED",
    "Cancelled": "CANCELLED",
    "PermissionDenied": "PERMISSION_DENIED",
    "Unauthenticated": "UNAUTHENTICATED",
}


def made(kind: type[BunrakuError], **options: Any) -> BunrakuError:
    if issubclass(kind, InvalidRequest):
        options.pop("retry_after_s", None)
        return kind(("shift", "must be 0.1 to 100"), ("seed", "must be 0 or more"), **options)
    return kind("a sentence", **options)


def failed_call(status: status_pb2.Status) -> grpc.aio.AioRpcError:
    """What a client of grpc.aio raises for a status with details."""
    sent: Any = rpc_status.to_status(status)
    trailing = grpc.aio.Metadata(*sent.trailing_metadata)
    return grpc.aio.AioRpcError(sent.code, grpc.aio.Metadata(), trailing, sent.details, None)


def details(error: BunrakuError) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for detail in to_status(error).details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if detail.Unpack(message):
                found[kind.DESCRIPTOR.name] = message
    return found


def test_every_kind_is_known_and_has_its_status() -> None:
    assert {kind.__name__: kind.status.name for kind in errors.KINDS} == STATUSES
    assert set(errors.KINDS) == set(BunrakuError.__subclasses__())


def test_reasons_are_upper_case_names_of_one_kind_each() -> None:
    reasons = [kind.default_reason for kind in errors.KINDS]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.isupper() and reason.replace("_", "").isalpha() for reason in reasons)


@pytest.mark.parametrize("kind", errors.KINDS)
def test_a_kind_comes_back_from_its_status(kind: type[BunrakuError]) -> None:
    # RetryInfo is what tells Busy from OutOfMemory
    sent = made(kind, reason="A_REASON", stage="vae", retry_after_s=None if kind is OutOfMemory else 2.5)
    got = errors.from_rpc_error(failed_call(to_status(sent)))
    assert type(got) is kind
    assert (got.message, got.reason, got.stage, got.retry_after_s) == (
        sent.message,
        "A_REASON",
        "vae",
        sent.retry_after_s,
    )
    if isinstance(sent, InvalidRequest):
        assert isinstance(got, InvalidRequest)
        assert got.violations == sent.violations


@pytest.mark.parametrize("kind", errors.KINDS)
def test_a_kind_has_its_own_reason_where_none_is_given(kind: type[BunrakuError]) -> None:
    assert details(made(kind))["ErrorInfo"].reason == kind.default_reason


def test_field_violations_are_a_bad_request() -> None:
    error = made(InvalidRequest)
    violations = details(error)["BadRequest"].field_violations
    assert [(v.field, v.description) for v in violations] == [
        ("shift", "must be 0.1 to 100"),
        ("seed", "must be 0 or more"),
    ]
    assert error.message == "shift: must be 0.1 to 100; seed: must be 0 or more"
    assert InvalidRequest(("", "the stream is empty")).message == "the stream is empty"


def test_an_invalid_request_names_a_field() -> None:
    with pytest.raises(ValueError, match="at least one field"):
        InvalidRequest()


def test_when_to_come_back_is_a_retry_info_to_the_millisecond() -> None:
    assert details(Busy("full", retry_after_s=1.25))["RetryInfo"].retry_delay == duration_pb2.Duration(
        seconds=1, nanos=250_000_000
    )
    assert "RetryInfo" not in details(Busy("full"))


def test_error_info_names_the_domain_and_the_stage() -> None:
    info = details(StageBroken("nan", reason="NAN_IN_LATENTS", stage="denoiser"))["ErrorInfo"]
    assert (info.reason, info.domain, dict(info.metadata)) == ("NAN_IN_LATENTS", "bunraku", {"stage": "denoiser"})


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_that_a_client_can_meet_has_a_kind(code: grpc.StatusCode) -> None:
    bare = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "said by gRPC itself", None)
    got = errors.from_rpc_error(bare, stage="pose")
    assert (got.message, got.stage) == ("said by gRPC itself", "pose")
    same = {
        "OUT_OF_RANGE": "INVALID_ARGUMENT",
        "ABORTED": "UNAVAILABLE",
        "UNKNOWN": "INTERNAL",
        "DATA_LOSS": "INTERNAL",
    }
    assert got.status.name == same.get(code.name, code.name)
    assert errors.status_name(got) == got.status.name


def test_a_status_without_a_message_has_its_name_for_one() -> None:
    bare = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), None, None)
    assert errors.from_rpc_error(bare).message == "UNAVAILABLE"


def test_resource_exhausted_is_busy_only_with_retry_info() -> None:
    for delay, kind in ((None, OutOfMemory), (0.5, Busy)):
        got = errors.from_rpc_error(failed_call(to_status(Busy("full", retry_after_s=delay))))
        assert type(got) is kind


def test_the_stage_that_was_called_is_named_where_the_answer_names_none() -> None:
    status = to_status(NotReady("loading"))
    assert errors.from_status(status, stage="encoder").stage == "encoder"
    assert errors.from_status(to_status(NotReady("loading", stage="vae")), stage="encoder").stage == "vae"


def test_details_of_other_kinds_are_passed_over() -> None:
    other = any_pb2.Any()
    other.Pack(error_details_pb2.Help())
    status = to_status(NotReady("loading", reason="STAGE_LOADING", retry_after_s=1.0))
    status.details.insert(0, other)
    got = errors.from_status(status)
    assert (got.reason, got.retry_after_s) == ("STAGE_LOADING", 1.0)


@pytest.mark.parametrize("text", ["größer als 4 GiB", "two\nlines\r\n", "50 % of 100%", "日本語"])
def test_any_message_travels(text: str) -> None:
    assert errors.from_rpc_error(failed_call(to_status(StageBroken(text)))).message == text
