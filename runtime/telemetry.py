"""Every span, attribute, event and metric, declared once; one request is one trace through all processes.

The trace context travels as W3C `traceparent` metadata: `outgoing` writes it, `incoming` reads it. Spans go out over
OTLP when an endpoint is set; without one nothing is recorded and nothing costs anything.

Metrics are counted always and served in Prometheus' form where an address is set. A label has one of the values that
are declared with it, or `other`: what a caller sends can never make a series.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

# Spans of a generation, in the gateway: all of it, what it waited for, and each step of its pipeline
SPAN_GENERATION = "generation"
SPAN_QUEUE = "generation.queue"
SPAN_READ = "generation.read"
SPAN_KEEP = "generation.keep"
SPAN_FINISH = "generation.finish"
SPAN_PIPELINE_PREFIX = "pipeline."
# One attempt at a call of a stage, in the gateway; the stage's own span is named after the rpc
SPAN_STAGE_PREFIX = "stage."
# A call that waits for its turn, in the stage
SPAN_ADMISSION = "admission"

# Events: a tensor that went to a stage or came from it, and a step of the denoiser
EVENT_SENT = "sent"
EVENT_RECEIVED = "received"
EVENT_STEP = "step"

ATTRIBUTE_GENERATION = "bunraku.generation"
ATTRIBUTE_STAGE = "bunraku.stage"
ATTRIBUTE_ADDRESS = "bunraku.address"
ATTRIBUTE_ATTEMPT = "bunraku.attempt"
ATTRIBUTE_WINDOW = "bunraku.window"
ATTRIBUTE_WINDOWS = "bunraku.windows"
ATTRIBUTE_TENSOR = "bunraku.tensor"
ATTRIBUTE_SIZE_BYTES = "bunraku.size_bytes"
ATTRIBUTE_MILLISECONDS = "bunraku.milliseconds"
ATTRIBUTE_TRANSPORT = "bunraku.transport"
ATTRIBUTE_STEP = "bunraku.completed_steps"
ATTRIBUTE_SIGMA = "bunraku.sigma"
ATTRIBUTE_SECONDS = "bunraku.seconds"

METADATA_GENERATION = "bunraku-generation"
METADATA_SHARED_MEMORY = "bunraku-shared-memory"
# Initial metadata of an answer: GetStatusResponse.revision, and calls in work / calls that wait / calls at a time
METADATA_REVISION = "bunraku-revision"
METADATA_LOAD = "bunraku-load"

REGISTRY = CollectorRegistry(auto_describe=True)
ProcessCollector(registry=REGISTRY)

OTHER = "other"
STAGES = ("encoder", "pose", "denoiser", "vae")
RPCS = (
    *("EncodeText", "EncodeImage", "EncodeAudio", "FitPoseVideo", "ExtractPose", "RenderPose"),
    *("Denoise", "Encode", "Decode"),
)
STATUSES = tuple(code.name for code in grpc.StatusCode)
# From what the event loop needs to what a long denoise takes; a factor of 3 tells a figure well enough
_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
Labels = Mapping[str, Iterable[str]]


class _Series:
    """A metric with labels of bounded values."""

    def __init__(self, metric: Counter | Gauge | Histogram, name: str, labels: Labels) -> None:
        self._metric, self.name = metric, name
        self.labels = {label: frozenset(values) for label, values in labels.items()}

    @property
    def max_series(self) -> int:
        """The most combinations of labels that there can ever be."""
        return math.prod(len(values) + 1 for values in self.labels.values())

    def _of(self, labels: Mapping[str, str]) -> Any:
        if not self.labels:
            return self._metric
        return self._metric.labels(
            *(labels[name] if labels[name] in self.labels[name] else OTHER for name in self.labels)
        )


class Count(_Series):
    """What only grows."""

    def __init__(self, name: str, text: str, **labels: Iterable[str]) -> None:
        super().__init__(Counter(name, text, list(labels), registry=REGISTRY), name, labels)

    def add(self, amount: float = 1, **labels: str) -> None:
        self._of(labels).inc(amount)


class Level(_Series):
    """What goes up and down."""

    def __init__(self, name: str, text: str, **labels: Iterable[str]) -> None:
        super().__init__(Gauge(name, text, list(labels), registry=REGISTRY), name, labels)

    def put(self, value: float, **labels: str) -> None:
        self._of(labels).set(value)

    def follow(self, read: Callable[[], float], **labels: str) -> None:
        """`read` is asked, on a thread of its own, each time that the metrics are read."""
        self._of(labels).set_function(read)


class Seconds(_Series):
    """How often something took how long."""

    def __init__(self, name: str, text: str, **labels: Iterable[str]) -> None:
        super().__init__(Histogram(name, text, list(labels), registry=REGISTRY, buckets=_SECONDS), name, labels)

    def record(self, seconds: float, **labels: str) -> None:
        self._of(labels).observe(seconds)

    @contextmanager
    def time(self, **labels: str) -> Iterator[None]:
        """Records what its block takes, however it ends."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.record(time.monotonic() - begun, **labels)


# Of a stage's process
CALLS = Count("bunraku_stage_calls", "Calls that have ended.", stage=STAGES, rpc=RPCS, status=STATUSES)
CALL_SECONDS = Seconds("bunraku_stage_call_seconds", "A call in work.", stage=STAGES, rpc=RPCS)
ADMISSION_SECONDS = Seconds("bunraku_stage_admission_seconds", "A call that waits for its turn.", stage=STAGES)
CALLS_WAITING = Level("bunraku_stage_calls_waiting", "Calls that wait for their turn.", stage=STAGES)
CALLS_IN_WORK = Level("bunraku_stage_calls_in_work", "Calls in work.", stage=STAGES)
CALL_SLOTS = Level("bunraku_stage_call_slots", "Calls that are worked on at the same time at most.", stage=STAGES)
STAGE_STATE = Level(
    "bunraku_stage_state",
    "1 for the state that the process is in, 0 for the others.",
    stage=STAGES,
    state=("loading", "serving", "draining", "broken"),
)
LOAD_SECONDS = Level("bunraku_stage_load_seconds", "What loading the models took.", stage=STAGES)
MEMORY_BYTES = Level(
    "bunraku_memory_bytes",
    "Memory of the device and of the host.",
    stage=STAGES,
    memory=("vram", "ram"),
    kind=("total", "free", "used", "peak"),
)
STEP_SECONDS = Seconds("bunraku_denoise_step_seconds", "A step of the denoiser.")

# Of the gateway
GENERATIONS = Level("bunraku_generations", "Generations that have not ended.", state=("queued", "running"))
GENERATIONS_ENDED = Count(
    "bunraku_generations_ended", "Generations that have ended.", state=("succeeded", "failed", "cancelled")
)
GENERATION_SECONDS = Seconds("bunraku_generation_seconds", "A generation from its creation to its end.")
QUEUE_SECONDS = Seconds("bunraku_generation_queue_seconds", "A generation from its creation to its first start.")
ATTEMPTS = Count(
    "bunraku_stage_attempts", "Attempts at calls of stages.", stage=STAGES, result=("succeeded", "not_ready", "failed")
)
TENSOR_BYTES = Count(
    "bunraku_tensor_bytes",
    "Tensors between the gateway and the stages.",
    stage=STAGES,
    direction=("sent", "received"),
    transport=("bytes", "shared_memory"),
)
OUTPUTS = Count("bunraku_outputs", "Stage outputs that were looked for.", stage=STAGES, result=("hit", "miss"))

# Of both
LOOP_LAG_SECONDS = Level("bunraku_event_loop_lag_seconds", "The longest that the event loop was held up of late.")

METRICS: tuple[_Series, ...] = tuple(metric for metric in list(globals().values()) if isinstance(metric, _Series))
_LOOP_INTERVAL_S = 0.5
_LOOP_WINDOW_S = 15.0

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


def event(name: str, attributes: Mapping[str, Any]) -> None:
    """Marks a moment on the current span."""
    current = trace.get_current_span()
    if current.is_recording():
        current.add_event(name, attributes=attributes)


def past_span(name: str, begun_s: float, attributes: Mapping[str, Any] | None = None) -> None:
    """A span that ends now and began at a time (Unix seconds) when nobody could say so yet, such as a wait."""
    tracer = trace.get_tracer("bunraku")
    tracer.start_span(name, start_time=int(begun_s * 1e9), attributes=dict(attributes or {})).end()


@contextmanager
def metrics_endpoint(address: str) -> Iterator[None]:
    """Serves the metrics over HTTP on `host:port`, on a thread of its own; an empty address: nowhere.

    Raises:
        OSError: the address is taken.
    """
    if not address:
        yield
        return
    host, _, port = address.rpartition(":")
    server, thread = start_http_server(int(port), host.strip("[]"), REGISTRY)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def watch_event_loop() -> None:
    """Measures how long the event loop is held up, until it is cancelled: leases are renewed and calls served on it."""
    lags: deque[float] = deque(maxlen=int(_LOOP_WINDOW_S / _LOOP_INTERVAL_S))
    while True:
        due = time.monotonic() + _LOOP_INTERVAL_S
        await asyncio.sleep(_LOOP_INTERVAL_S)
        lags.append(max(0.0, time.monotonic() - due))
        LOOP_LAG_SECONDS.put(max(lags))
