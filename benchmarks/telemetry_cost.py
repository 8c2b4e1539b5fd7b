"""What traces and metrics cost of a generation's time.

`python -m benchmarks.telemetry_cost [--requests N]` adds up processor time, which other programs do not change: of the
gateway, with spans sent to a collector and without, in turns, with stages that answer at once; and of the stages, for
as many calls and steps as the generation has. It is held against the time of the same generation by the real processes
of the embedded bundle, which is the least favourable one: a generation of the real models takes a hundred times as long
and has the same spans.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import psutil
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.trace import SpanKind

from benchmarks.gateway_overhead import ROOT, serve_stages, until_up
from bunraku.client import Client
from bunraku.v1 import gateway_pb2 as pb
from runtime import telemetry
from tests.system.conftest import start_system, stop_system, wait_until_up
from tests.system.media import write_picture, write_pose_video

SIDE, FRAMES, STEPS = 64, 9, 6
# what the embedded bundle makes unless told otherwise
BUNDLE_SIDE, BUNDLE_FRAMES = 128, 17
# of one generation: EncodeText, EncodeImage, Encode of the reference and of the poses, FitPoseVideo, Denoise, Decode
CALLS = 7
ROUND = 10
TARGET = 0.01


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans and drops them."""

    def Export(self, request: Any, context: Any) -> Any:
        return trace_service_pb2.ExportTraceServiceResponse()


def serve_collector(connection: Connection) -> None:
    """A collector in a process of its own; sends its address."""
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(f"http://127.0.0.1:{port}")
    server.wait_for_termination()


def helper(serve: Callable[[Connection], None], stack: ExitStack) -> str:
    """Starts a process; gives the address that it sends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    stack.callback(process.terminate)
    return str(ours.recv())


def start_gateway(directory: Path, stages: str, collector: str, stack: ExitStack) -> subprocess.Popen[bytes]:
    """A gateway that sends spans to a collector, or to none."""
    directory.mkdir()
    environment = {
        **os.environ,
        "BUNRAKU_ADDRESS": f"unix:{directory}/gateway.sock",
        "BUNRAKU_DATA": str(directory / "data"),
        "BUNRAKU_BUNDLE": str(ROOT / "bundles" / "tiny"),
        "BUNRAKU_LOG_LEVEL": "WARNING",
        "BUNRAKU_OTLP_ENDPOINT": collector,
        "BUNRAKU_OUTPUT_CACHE_BYTES": "0",
        **{f"BUNRAKU_{stage}": stages for stage in ("ENCODER", "POSE", "DENOISER", "VAE")},
    }
    process = subprocess.Popen([sys.executable, "-m", "gateway"], cwd=ROOT, env=environment)
    stack.callback(process.wait, 30)
    stack.callback(process.terminate)
    return process


def gateway_ms(directory: Path, collector: str, requests: int, stack: ExitStack) -> tuple[float, float]:
    """Processor milliseconds of a gateway per request, without spans and with; medians of rounds in turns."""
    stages = helper(serve_stages, stack)
    systems = []
    for name, address in (("plain", ""), ("traced", collector)):
        process = start_gateway(directory / name, stages, address, stack)
        client = stack.enter_context(Client(f"unix:{directory / name}/gateway.sock"))
        until_up(client, process)
        systems.append((psutil.Process(process.pid), client))
    spent: tuple[list[float], list[float]] = ([], [])
    for number in range(1 + max(1, requests // ROUND)):
        for (process_of, client), into in zip(systems, spent, strict=True):
            times = process_of.cpu_times()
            before = times.user + times.system
            for _ in range(ROUND):
                animated(client, directory)
            time.sleep(1.5)  # spans are sent once a second
            times = process_of.cpu_times()
            if number:  # the first round warms up
                into.append(1000 * (times.user + times.system - before) / ROUND)
    return statistics.median(spent[0]), statistics.median(spent[1])


def animated(client: Client, directory: Path, side: int = SIDE, pose: str = "pose.mp4") -> float:
    """One generation; its seconds."""
    began = time.perf_counter()
    generation = client.animate(
        reference_image=directory / "ref.png",
        pose_video=directory / pose,
        num_inference_steps=STEPS,
        height=side,
        width=side,
    )
    for event in client.watch(generation.name):
        if event.generation.state == pb.GENERATION_STATE_FAILED:
            raise RuntimeError(event.generation.error.message)
    return time.perf_counter() - began


def stage_ms(collector: str) -> tuple[float, float]:
    """Processor milliseconds of a stage for the telemetry of a call, and of a step, sending included."""
    provider = telemetry.configure("vae", collector)
    assert provider is not None
    with telemetry.span("caller"):
        metadata = telemetry.outgoing()

    def call(steps: int) -> None:
        with telemetry.span("bunraku.v1.VaeService/Decode", kind=SpanKind.SERVER, parent=telemetry.incoming(metadata)):
            with telemetry.ADMISSION_SECONDS.time(stage="vae"), telemetry.CALL_SECONDS.time(stage="vae", rpc="Decode"):
                for step in range(steps):
                    telemetry.STEP_SECONDS.record(0.1)
                    attributes = {telemetry.ATTRIBUTE_STEP: step, telemetry.ATTRIBUTE_SIGMA: 0.5}
                    telemetry.event(telemetry.EVENT_STEP, {**attributes, telemetry.ATTRIBUTE_SECONDS: 0.1})
            telemetry.CALLS.add(stage="vae", rpc="Decode", status="OK")

    def spent(steps: int, repeats: int = 400) -> float:
        before = time.process_time()
        for _ in range(repeats):
            call(steps)
        provider.force_flush()
        return 1000 * (time.process_time() - before) / repeats

    spent(1)
    without = statistics.median(spent(0) for _ in range(5))
    with_steps = statistics.median(spent(20) for _ in range(5))
    provider.shutdown()
    return without, max(0.0, with_steps - without) / 20


async def watching_ms_per_s() -> float:
    """Processor milliseconds that watching an idle event loop takes in a second."""
    watching = asyncio.create_task(telemetry.watch_event_loop())
    before = time.process_time()
    await asyncio.sleep(4)
    watching.cancel()
    return 1000 * (time.process_time() - before) / 4


def job_s(directory: Path, count: int) -> float:
    """Seconds of a generation by the real processes of the embedded bundle, not traced."""
    data = directory / "system"
    data.mkdir()
    system = start_system(data, BUNRAKU_OUTPUT_CACHE_BYTES="0")
    try:
        wait_until_up(system)
        with Client(system.address) as client:
            write_pose_video(directory / "long.mp4", BUNDLE_FRAMES, BUNDLE_SIDE, BUNDLE_SIDE)
            animated(client, directory, BUNDLE_SIDE, "long.mp4")
            return statistics.median(animated(client, directory, BUNDLE_SIDE, "long.mp4") for _ in range(count))
    finally:
        stop_system(system)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100)
    requests = parser.parse_args().requests
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        write_picture(directory / "ref.png", SIDE, SIDE)
        write_pose_video(directory / "pose.mp4", FRAMES, SIDE, SIDE)
        collector = helper(serve_collector, stack)
        call_ms, step_ms = stage_ms(collector)
        watching = asyncio.run(watching_ms_per_s())
        plain, traced = gateway_ms(directory, collector, requests, stack)
        job = job_s(directory, 5)
    stages = CALLS * call_ms + STEPS * step_ms + 5 * watching * job
    cost_s = (max(0.0, traced - plain) + stages) / 1000
    print("| | |\n| --- | ---: |")
    print(f"| gateway, processor ms a request: without spans, with | {plain:.1f}, {traced:.1f} |")
    print(f"| stages, processor ms: a call, a step | {call_ms:.3f}, {step_ms:.4f} |")
    print(f"| five event loops watched, ms a second | {5 * watching:.2f} |")
    print(f"| all of it, ms a generation of {STEPS} steps | {1000 * cost_s:.1f} |")
    print(f"| the generation by the embedded bundle, ms | {1000 * job:.0f} |")
    print(f"| **share** (target {TARGET:.0%}) | {cost_s / job:.2%} |")
    return 0 if cost_s <= TARGET * job else 1


if __name__ == "__main__":
    sys.exit(main())
