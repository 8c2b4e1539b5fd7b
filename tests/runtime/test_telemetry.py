"""One request is one trace, in this process and across a call, up to a collector."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
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
from bunraku.v1 import denoiser_pb2, encoder_pb2, pose_pb2, vae_pb2
from runtime import telemetry
from runtime.client import Budget
from runtime.logs import JsonFormatter
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


def sample(name: str, **labels: str) -> float:
    """A metric as it is now."""
    return telemetry.REGISTRY.get_sample_value(name, labels) or 0.0


async def test_tensors_of_a_call_are_events_with_bytes_and_time(spans: InMemorySpanExporter) -> None:
    tensor = zeros(70_000)
    before = sample("bunraku_tensor_bytes_total", stage="vae", direction="sent", transport="bytes")
    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = lambda tensors: [tensors["frames"].named("latents")]
        async with caller.call(Budget.of(5)) as call:
            [_ async for _ in call.stream(call.stub.Encode, FIRST_ENCODE, [tensor])]
        await until(lambda: len(spans.get_finished_spans()) == 2)
    events = {event.name: dict(event.attributes or {}) for event in by_name(spans)["stage.vae"].events}
    assert events.keys() == {"sent", "received"}
    assert events["sent"]["bunraku.tensor"] == tensor.name
    for event in events.values():
        assert event["bunraku.size_bytes"] == 70_000
        assert event["bunraku.transport"] == "bytes"
        assert 0 < float(str(event["bunraku.milliseconds"])) < 5000
    after = sample("bunraku_tensor_bytes_total", stage="vae", direction="sent", transport="bytes")
    assert after - before == 70_000


async def test_calls_are_counted_under_the_status_that_they_end_with() -> None:
    def counts() -> list[float]:
        calls = [
            sample("bunraku_stage_calls_total", stage="vae", rpc="Encode", status=status)
            for status in ("OK", "INVALID_ARGUMENT")
        ]
        attempts = [
            sample("bunraku_stage_attempts_total", stage="vae", result=result) for result in ("succeeded", "failed")
        ]
        return [*calls, *attempts, sample("bunraku_stage_call_seconds_count", stage="vae", rpc="Encode")]

    before = counts()
    async with stage() as serving, client(serving.address) as caller:
        await encode(caller, zeros(1))

        def fails(tensors: Tensors) -> list[WireTensor]:
            raise InvalidRequest(("shift", "wrong"))

        serving.service.encode_work = fails
        with pytest.raises(InvalidRequest):
            await encode(caller, zeros(1))
        await until(lambda: counts()[-1] - before[-1] == 2)
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1, 1, 1, 1, 2]


async def test_a_call_that_waits_for_its_turn_has_a_span_for_it(spans: InMemorySpanExporter) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work(tensors: Tensors) -> list[WireTensor]:
        begun.set()
        go_on.wait(5)
        return []

    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = work
        first = asyncio.create_task(encode(caller, zeros(1)))
        await asyncio.to_thread(begun.wait, 5)
        second = asyncio.create_task(encode(caller, zeros(1)))
        await until(lambda: serving.runtime.status().queued_requests == 1)
        go_on.set()
        await asyncio.gather(first, second)
        await until(lambda: len(spans.get_finished_spans()) == 5)
    names = [span.name for span in spans.get_finished_spans()]
    assert names.count("admission") == 1


def test_what_a_caller_sends_makes_no_series() -> None:
    telemetry.CALLS.add(stage="vae", rpc="Decode/../../etc", status="OK")
    telemetry.CALLS.add(stage="of-my-own", rpc="Decode", status="OK")
    assert sample("bunraku_stage_calls_total", stage="vae", rpc="other", status="OK") == 1
    assert sample("bunraku_stage_calls_total", stage="other", rpc="Decode", status="OK") == 1


def test_metrics_are_few_and_bounded() -> None:
    assert sum(metric.max_series for metric in telemetry.METRICS) <= 1500
    assert len({metric.name for metric in telemetry.METRICS}) == len(telemetry.METRICS)


def test_rpcs_and_stages_are_those_of_the_contract() -> None:
    files = {"encoder": encoder_pb2, "pose": pose_pb2, "denoiser": denoiser_pb2, "vae": vae_pb2}
    services = [file.DESCRIPTOR.services_by_name[f"{name.capitalize()}Service"] for name, file in files.items()]
    assert set(telemetry.RPCS) == {method.name for service in services for method in service.methods}
    assert tuple(files) == telemetry.STAGES


def test_a_level_is_asked_when_it_is_read() -> None:
    level = 3.0
    telemetry.CALLS_WAITING.follow(lambda: level, stage="pose")
    assert sample("bunraku_stage_calls_waiting", stage="pose") == 3
    level = 4.0
    assert sample("bunraku_stage_calls_waiting", stage="pose") == 4


def test_metrics_are_served_over_http_while_the_endpoint_is_open() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with telemetry.metrics_endpoint(address):
        text = urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode()
    assert "# TYPE bunraku_stage_call_seconds histogram" in text
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{address}/metrics", timeout=1)
    with telemetry.metrics_endpoint(""):
        pass


async def test_an_event_loop_that_is_held_up_is_seen() -> None:
    watching = asyncio.create_task(telemetry.watch_event_loop())
    await asyncio.sleep(0)
    time.sleep(1.0)  # noqa: ASYNC251 - what is to be seen
    await until(lambda: sample("bunraku_event_loop_lag_seconds") > 0.25)
    watching.cancel()


def test_a_wait_that_is_over_becomes_a_span(spans: InMemorySpanExporter) -> None:
    with telemetry.span("generation"):
        telemetry.past_span("generation.queue", time.time() - 3)
    queue = by_name(spans)["generation.queue"]
    assert queue.parent is not None
    assert queue.start_time is not None
    assert queue.end_time is not None
    assert 3 <= (queue.end_time - queue.start_time) / 1e9 < 4


def test_json_logs_say_which_trace_they_belong_to(spans: InMemorySpanExporter) -> None:
    formatter = JsonFormatter("vae")
    record = logging.LogRecord("runtime.server", logging.WARNING, "", 1, "%s of %d", ("one", 2), None)
    entry = json.loads(formatter.format(record))
    assert (entry["level"], entry["program"], entry["logger"]) == ("WARNING", "vae", "runtime.server")
    assert entry["message"] == "one of 2"
    assert datetime.fromisoformat(entry["time"]).utcoffset() == timedelta(0)
    assert "trace_id" not in entry
    with telemetry.span("generation"):
        entry = json.loads(formatter.format(record))
        assert entry["trace_id"] == telemetry.trace_id()
        assert len(entry["span_id"]) == 16


def test_json_logs_hold_an_exception_in_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "failed", None, sys.exc_info())
    line = JsonFormatter("vae").format(record)
    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["exception"]
