"""Every span and attribute name, declared once; one request is one trace through all processes.

The trace context travels as W3C `traceparent` metadata: `outgoing` writes it, `incoming` reads it. Spans go out over
OTLP when an endpoint is set; without one nothing is recorded and nothing costs anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

SPAN_GENERATION = "generation"
SPAN_STAGE_PREFIX = "stage."

ATTRIBUTE_GENERATION = "bunraku.generation"
ATTRIBUTE_STAGE = "bunraku.stage"
ATTRIBUTE_ADDRESS = "bunraku.address"
ATTRIBUTE_ATTEMPT = "bunraku.attempt"

METADATA_GENERATION = "bunraku-generation"
METADATA_SHARED_MEMORY = "bunraku-shared-memory"

_propagator = TraceContextTextMapPropagator()
Metadata = Iterable[tuple[str, str | bytes]]


def configure(service: str, endpoint: str) -> TracerProvider | None:
    """Sends the spans of this process to an OTLP collector.

    Args:
        service: name of the program, such as `denoiser`.
        endpoint: `http://host:port` of a collector (gRPC); empty: spans are not recorded.

    Returns:
        The provider, whose `shutdown` sends what is left; None without an endpoint.
    """
    if not endpoint:
        return None
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=Resource.create({"service.name": f"bunraku-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint), schedule_delay_millis=1000))
    trace.set_tracer_provider(provider)
    return provider


@contextmanager
def span(
    name: str,
    attributes: Mapping[str, Any] | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: Context | None = None,
) -> Iterator[Span]:
    """A span around a piece of work; an exception is recorded on it and goes on."""
    before = otel_context.get_current()
    current = trace.get_tracer("bunraku").start_span(name, context=parent, kind=kind, attributes=dict(attributes or {}))
    otel_context.attach(trace.set_span_in_context(current))
    try:
        yield current
    except Exception as error:
        current.record_exception(error)
        current.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        raise
    finally:
        current.end()
        # not `detach`: around a generator that the event loop closes, this is another task than the one above
        otel_context.attach(before)


def outgoing() -> list[tuple[str, str]]:
    """Metadata that continues the current trace in the process that is called."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return list(carrier.items())


def incoming(metadata: Metadata | None) -> Context:
    """The trace context that a call came with."""
    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    return _propagator.extract(carrier)


def trace_parent() -> str:
    """The current trace as a `traceparent` header, empty outside a recorded trace: to go on with it later."""
    return dict(outgoing()).get("traceparent", "")


def from_trace_parent(trace_parent: str) -> Context:
    """The context of a `traceparent` header that was stored; an empty one begins a new trace."""
    return _propagator.extract({"traceparent": trace_parent}) if trace_parent else otel_context.Context()


def trace_id() -> str:
    """Id of the current trace, 32 hexadecimal digits; empty outside a recorded trace."""
    current = trace.get_current_span().get_span_context()
    return format(current.trace_id, "032x") if current.is_valid else ""
