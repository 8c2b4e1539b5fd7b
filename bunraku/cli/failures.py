"""What a failure says on the command line, and the exit status that it ends with."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bunraku.cli.options import OPTION_OF_FIELD
from bunraku.client import UNREACHABLE
from bunraku.errors import BunrakuError, Busy, Cancelled, DeadlineExceeded, InvalidRequest, NotReady

_EXIT_STATUS: tuple[tuple[type[BunrakuError], int], ...] = (
    (InvalidRequest, 2),
    (NotReady, 3),
    (Busy, 3),
    (DeadlineExceeded, 4),
    (Cancelled, 130),
    (BunrakuError, 1),
)
_HINT = "start one with `bunraku serve`, name another one with --gateway, or use `bunraku animate --local`"


@dataclass(frozen=True)
class Failure:
    """What is written on stderr before the process ends."""

    lines: tuple[str, ...]
    exit_status: int


def explained(error: Exception) -> Failure | None:
    """The failure that an error stands for; None for an error that should not happen and deserves its traceback."""
    if isinstance(error, BunrakuError):
        exit_status = next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))
        return Failure(_lines(error), exit_status)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return Failure((f"error: {place}{error.strerror or error}",), 1)
    from bunraku.supervisor import SystemFailed

    if isinstance(error, SystemFailed):
        return Failure((f"error: {error}", *(f"  {line}" for line in error.last_lines)), 1)
    return None


def _lines(error: BunrakuError) -> tuple[str, ...]:
    if isinstance(error, Cancelled):
        return (error.message,)
    if isinstance(error, InvalidRequest):
        # height and width are one option: what is wrong with both is said once
        lines = (f"error: {_named(field)}{_with_options(text)}" for field, text in error.violations)
        return tuple(dict.fromkeys(lines))
    if error.reason == UNREACHABLE:
        return (f"error: {error.message}; {_HINT}",)
    stage = f"{error.stage}: " if error.stage else ""
    later = f" (try again in {error.retry_after_s:.0f} s)" if error.retry_after_s is not None else ""
    return (f"error: {stage}{_with_options(error.message)}{later}",)


def _with_options(text: str) -> str:
    """The text with the options in place of fields' full names, such as `animate.pose_video`."""
    return re.sub(r"\b[a-z_]+\.[a-z_]+\b", lambda found: OPTION_OF_FIELD.get(found[0], found[0]), text)


def _named(field: str) -> str:
    return f"{OPTION_OF_FIELD.get(field, field)}: " if field else ""
