"""One request is one trace, in this process and across a call, up to a collector."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from bunraku.errors import InvalidRequest
from runtime import telemetry
from runtime.client import Budget
from runtime.tensors import WireTensor
from tests.runtime.fakes import FIRST_ENCODE, Tensors, client, encode, stage, until, zeros


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is recorded; the global provider, which can be set only once, is left alone."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


async def test_a_call_is_one_trace_through_client_server_and_device(spans: InMemorySpanExporter) -> None:
    seen: list[str] = []

    def work(tensors: Tensors) -> list[WireTensor]:
        seen.append(telemetry.trace_id())
        return []

    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = work
        with telemetry.span(telemetry.SPAN_GENERATION):
            async with caller.call(Budget.of(5), generation="g-7", attempt=2) as call:
                [_ async for _ in call.stream(call.stub.Encode, FIRST_ENCODE, [zeros(1)])]
        await until(lambda: len(spans.get_finished_spans()) == 3)
    found = by_name(spans)
    generation, called, served = (
        found["generation"],
        found["stage.vae"],
        found["bunraku.v1.VaeService/Encode"],
    )
    assert len({ids(span)[0] for span in found.values()}) == 1
    assert seen == [format(ids(generation)[0], "032x")]
    assert called.parent is not None
    assert called.parent.span_id == ids(generation)[1]
    assert served.parent is not None
    assert served.parent.span_id == ids(called)[1]
    assert (called.kind, served.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    assert dict(called.attributes or {}) == {
        "bunraku.stage": "vae",
        "bunraku.address": serving.address,
        "bunraku.attempt": 2,
        "bunraku.generation": "g-7",
    }


async def test_what_fails_is_marked_on_both_sides(spans: InMemorySpanExporter) -> None:
    def fails(tensors: Tensors) -> list[WireTensor]:
        raise InvalidRequest(("shift", "wrong"))

    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = fails
        with pytest.raises(InvalidRequest):
            await encode(caller, zeros(1))
        await until(lambda: len(spans.get_finished_spans()) == 2)
    for span in spans.get_finished_spans():
        assert span.status.status_code is StatusCode.ERROR
        assert "exception" in [event.name for event in span.events]


async def test_two_calls_are_two_traces(spans: InMemorySpanExporter) -> None:
    async with stage() as serving, client(serving.address) as caller:
        await encode(caller, zeros(1))
        await encode(caller, zeros(1))
        await until(lambda: len(spans.get_finished_spans()) == 4)
    assert len({ids(span)[0] for span in spans.get_finished_spans()}) == 2


def test_a_span_ends_where_it_began(spans: InMemorySpanExporter) -> None:
    with telemetry.span("outer", {"a": 1}):
        outer = trace.get_current_span()
        with telemetry.span("inner"):
            assert trace.get_current_span() is not outer
        assert trace.get_current_span() is outer
    assert not trace.get_current_span().get_span_context().is_valid
    assert [span.name for span in spans.get_finished_spans()] == ["inner", "outer"]


async def test_a_span_in_a_generator_that_the_loop_closes_is_no_error(spans: InMemorySpanExporter) -> None:
    """The fixture of every test here fails on what opentelemetry logs."""

    async def traced() -> AsyncIterator[int]:
        with telemetry.span("left"):
            yield 1

    async def leave() -> None:
        async for _ in traced():
            break

    await asyncio.create_task(leave())
    gc.collect()
    await until(lambda: [span.name for span in spans.get_finished_spans()] == ["left"])


def test_a_stored_trace_is_gone_on_with(spans: InMemorySpanExporter) -> None:
    with telemetry.span("first"):
        stored, trace_id = telemetry.trace_parent(), telemetry.trace_id()
        assert dict(telemetry.outgoing())["traceparent"] == stored
    with telemetry.span("later", parent=telemetry.from_trace_parent(stored)):
        assert telemetry.trace_id() == trace_id
    with telemetry.span("other", parent=telemetry.from_trace_parent("")):
        assert telemetry.trace_id() not in ("", trace_id)


def test_metadata_that_is_not_text_is_passed_over(spans: InMemorySpanExporter) -> None:
    with telemetry.span("first"):
        metadata: list[tuple[str, str | bytes]] = [*telemetry.outgoing(), ("some-bin", b"\x00")]
        trace_id = telemetry.trace_id()
    with telemetry.span("second", parent=telemetry.incoming(metadata)):
        assert telemetry.trace_id() == trace_id
    assert telemetry.incoming(None) == telemetry.from_trace_parent("")


def test_without_a_provider_nothing_is_recorded() -> None:
    assert telemetry.configure("vae", "") is None
    with telemetry.span("nothing"):
        assert telemetry.trace_id() == ""
        assert telemetry.trace_parent() == ""
        assert telemetry.outgoing() == []


async def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, context: Any) -> Any:
            requests.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    provided: list[TracerProvider] = []
    monkeypatch.setattr(trace, "set_tracer_provider", provided.append)
    provider = telemetry.configure("vae", f"http://127.0.0.1:{port}")
    assert provider is not None
    assert provided == [provider]
    with provider.get_tracer("bunraku").start_as_current_span("sent"):
        pass
    await asyncio.to_thread(provider.shutdown)
    await server.stop(None)
    [request] = requests
    [resource_spans] = request.resource_spans
    resource = {entry.key: entry.value.string_value for entry in resource_spans.resource.attributes}
    assert resource["service.name"] == "bunraku-vae"
    assert resource_spans.scope_spans[0].spans[0].name == "sent"
