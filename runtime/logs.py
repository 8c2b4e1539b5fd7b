"""Logs of a process: lines for people, or JSON with the trace that each line belongs to."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from opentelemetry import trace

Form = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (RFC 3339, UTC), level, program, logger, message, and where there are any
    trace_id, span_id and exception."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "program": self._program,
            "logger": record.name,
            "message": record.getMessage(),
        }
        current = trace.get_current_span().get_span_context()
        if current.is_valid:
            entry["trace_id"] = trace.format_trace_id(current.trace_id)
            entry["span_id"] = trace.format_span_id(current.span_id)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(program: str, level: str, form: Form) -> None:
    """Sends the logs of this process to standard error.

    Args:
        program: its name, such as `denoiser`.
        level: of Python's logging, such as `INFO`.
        form: `text` for people, `json` for whoever collects them.
    """
    text = logging.Formatter(f"%(asctime)s %(levelname)s {program}: %(message)s")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(program) if form == "json" else text)
    logging.basicConfig(level=level, handlers=[handler])
