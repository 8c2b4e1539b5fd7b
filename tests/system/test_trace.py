"""A request is one trace, and its spans leave no more than a hundredth of its time unexplained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from bunraku.client import Client
from bunraku.v1 import gateway_pb2 as pb
from runtime import telemetry
from tests.system.conftest import start_system, stop_system, wait_until_up
from tests.system.media import write_picture, write_pose_video

pytestmark = pytest.mark.slow  # a system with a collector of traces


@dataclass(frozen=True)
class Seen:
    """A span as the collector has it; times in seconds."""

    service: str
    name: str
    span_id: str
    parent_id: str
    begun: float
    ended: float
    events: tuple[tuple[str, dict[str, Any]], ...]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps whole spans by trace id."""

    def __init__(self) -> None:
        self.traces: dict[str, list[Seen]] = {}

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                events = tuple(
                    (event.name, {each.key: _value(each.value) for each in event.attributes}) for event in span.events
                )
                seen = Seen(
                    names["service.name"],
                    span.name,
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano / 1e9,
                    span.end_time_unix_nano / 1e9,
                    events,
                )
                self.traces.setdefault(span.trace_id.hex(), []).append(seen)
        return trace_service_pb2.ExportTraceServiceResponse()


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


def covered_s(spans: list[Seen], begun: float, ended: float) -> float:
    """Seconds between two times during which at least one of the spans was open."""
    total, reached = 0.0, begun
    for span in sorted(spans, key=lambda span: span.begun):
        start, end = max(span.begun, reached), min(span.ended, ended)
        if end > start:
            total, reached = total + end - start, end
    return total


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[pb.Generation, list[Seen]]]:
    """A generation, made by real processes, and its trace."""
    collector, server, data = Collector(), grpc.server(ThreadPoolExecutor(4)), tmp_path_factory.mktemp("traced")
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    system = start_system(data, BUNRAKU_OTLP_ENDPOINT=f"http://127.0.0.1:{port}")
    try:
        wait_until_up(system)
        with Client(system.address) as client:
            generation = client.animate(
                reference_image=write_picture(data / "ref.png"),
                pose_video=write_pose_video(data / "pose.mp4", 41, 64, 64),
                num_inference_steps=3,
                height=64,
                width=64,
            )
            for _ in client.watch(generation.name):
                pass
            generation = client.get(generation.name)
        assert generation.state == pb.GENERATION_STATE_SUCCEEDED, generation.error
        until = time.monotonic() + 30  # spans are sent in batches, once a second
        while not any(span.name == telemetry.SPAN_GENERATION for span in collector.traces.get(generation.trace_id, [])):
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(2)
        yield generation, collector.traces[generation.trace_id]
    finally:
        stop_system(system)
        server.stop(None).wait()


def test_spans_explain_ninety_nine_hundredths_of_the_time(traced: tuple[pb.Generation, list[Seen]]) -> None:
    generation, spans = traced
    parts = [span for span in spans if span.name != telemetry.SPAN_GENERATION]
    begun, ended = generation.create_time.ToMicroseconds() / 1e6, generation.end_time.ToMicroseconds() / 1e6
    share = covered_s(parts, begun, ended) / (ended - begun)
    assert share >= 0.99, sorted((round(s.begun - begun, 3), round(s.ended - begun, 3), s.name) for s in parts)


def test_every_span_hangs_on_another_one_of_the_trace(traced: tuple[pb.Generation, list[Seen]]) -> None:
    _, spans = traced
    ids = {span.span_id for span in spans}
    roots = [span.name for span in spans if span.parent_id not in ids]
    assert roots == ["bunraku.v1.GatewayService/CreateGeneration"]
    assert {span.service for span in spans} == {
        f"bunraku-{name}" for name in ("gateway", "encoder", "pose", "denoiser", "vae")
    }


def test_windows_steps_and_edges_are_in_the_trace(traced: tuple[pb.Generation, list[Seen]]) -> None:
    _, spans = traced
    named = [span.name for span in spans]
    assert named.count("pipeline.denoise") == named.count("pipeline.decode") == 3  # 41 frames in windows of 17
    for name in ("pipeline.text", "pipeline.image", "pipeline.reference", "pipeline.pose", "pipeline.write"):
        assert name in named
    for span in spans:
        if span.name == "bunraku.v1.DenoiserService/Denoise":
            steps = [attributes[telemetry.ATTRIBUTE_STEP] for name, attributes in span.events if name == "step"]
            assert steps == [1, 2, 3]
        if span.name == "stage.denoiser":
            tensors = {
                name: [attributes[telemetry.ATTRIBUTE_TENSOR] for each, attributes in span.events if each == name]
                for name in ("sent", "received")
            }
            assert "prompt_embeds" in tensors["sent"]
            assert tensors["received"][-1] == "latents"
            assert all(a[telemetry.ATTRIBUTE_SIZE_BYTES] > 0 for name, a in span.events if name in tensors)
