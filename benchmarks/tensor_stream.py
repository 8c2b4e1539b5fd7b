"""How fast tensors travel between two processes, beside what gRPC and the memory themselves can do.

`python -m benchmarks.tensor_stream` prints markdown tables. Everything that is compared is measured in turn within one
run (A B C A B C ...), and ratios are taken per turn, so that a busy machine slows all of them alike.

tensors: this system's stream over TCP, from an array to an array. bare: slices of the payload as they are through
grpc.aio, in messages of the same size and without protobuf, counted and dropped. bare, kept: the same, copied into a
buffer that is there already. shared: this system's stream through shared memory, from an array to an array. copy: one
process, one copy into memory that is there already. The receiver looks at every page of what it was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bunraku.v1 import vae_pb2, vae_pb2_grpc
from runtime.bundles import Bundle, Quirks, Sampling, Video
from runtime.client import Budget, StageClient, open_channel
from runtime.server import SERVER_OPTIONS, StageServer
from runtime.shared_memory import DIRECTORY, SharedMemory
from runtime.stage import Limits, StageRuntime
from runtime.tensors import CHUNK_BYTES, WireTensor

MIB = 2**20
SIZES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)
MANY = 64
_PAGE = 4096
_BUNDLE = Bundle(
    "benchmark",
    "animate",
    "scail",
    "",
    "",
    {},
    Sampling(1, 1.0, 1.0, "euler"),
    Video(16, 16, 5, 1, 256, 5, 16, 1.0),
    "official",
    {"official": Quirks()},
)
_FIRST = vae_pb2.EncodeRequest(parameters=vae_pb2.EncodeParameters())
Way = Callable[[], Awaitable[None]]


class Receiver(vae_pb2_grpc.VaeServiceServicer):
    """Takes tensors and keeps the last; Decode gives one back of the size of the one it was sent."""

    full_name = vae_pb2.DESCRIPTOR.services_by_name["VaeService"].full_name

    def __init__(self, runtime: StageRuntime) -> None:
        self.runtime = runtime
        self.kept: WireTensor | None = None
        self.seen = 0
        self.answer = WireTensor.from_bytes("frames", b"")

    def load(self) -> None:
        """There is no model."""

    def add_to(self, server: grpc.aio.Server) -> None:
        vae_pb2_grpc.add_VaeServiceServicer_to_server(self, server)

    async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self.kept = None
        async for item in self.runtime.receive(requests, context):
            if isinstance(item, WireTensor):
                self.kept = item
                self.seen += int(item.data[::_PAGE].sum())
        yield vae_pb2.EncodeResponse(progress=vae_pb2.VaeProgress())

    async def Decode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        first: Any = await anext(self.runtime.receive(requests, context))
        size_bytes = first.parameters.skip_frames
        if self.answer.size_bytes != size_bytes:
            self.answer = payload(size_bytes)
        for message in self.runtime.send(vae_pb2.DecodeResponse, [self.answer], context):
            yield message


class Bare(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stubs only
    """Streams of bytes without protobuf, and the receiver's memory."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.buffer = np.empty(0, np.uint8)

    def service(self, handler_call_details: Any) -> Any:
        name = handler_call_details.method.rpartition("/")[2]
        if name in ("count", "keep"):
            return grpc.stream_unary_rpc_method_handler(getattr(self, name))
        if name in ("memory", "cpu"):
            return grpc.unary_unary_rpc_method_handler(getattr(self, name))
        return None

    async def count(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        received = 0
        async for chunk in requests:
            received += len(chunk)
        return received.to_bytes(8, "little")

    async def keep(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        size_bytes = int.from_bytes(await anext(aiter(requests)), "little")
        if self.buffer.nbytes != size_bytes:
            self.buffer = np.zeros(size_bytes, np.uint8)
        received = 0
        async for chunk in requests:
            self.buffer[received : received + len(chunk)] = memoryview(chunk)
            received += len(chunk)
        return received.to_bytes(8, "little")

    async def cpu(self, request: bytes, context: Any) -> bytes:
        """Seconds of processor that this process has used."""
        return str(time.process_time()).encode()

    async def memory(self, request: bytes, context: Any) -> bytes:
        """What `resident_and_peak` says, after letting go of what was received if the request is `drop`."""
        if request == b"drop":
            self.receiver.kept = None
        return json.dumps(resident_and_peak()).encode()


def resident_and_peak() -> tuple[int, int]:
    """Resident memory of this process now and at most since the last time, in bytes; starts a new peak."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    fields = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Vm")}
    return int(fields["VmRSS"]) * 1024, int(fields["VmHWM"]) * 1024


def payload(size_bytes: int) -> WireTensor:
    """Bytes that are all in memory and not all zero."""
    data = np.empty(size_bytes, np.uint8)
    data[:] = np.arange(256, dtype=np.uint8).repeat(-(-size_bytes // 256))[:size_bytes]
    return WireTensor.from_numpy("frames", data)


async def serve(directory: str, chunk_bytes: int) -> None:
    """The receiving process; ends when its standard input is closed."""
    runtime = StageRuntime("vae", _BUNDLE, limits=Limits(chunk_bytes=chunk_bytes), shared_memory=_memory(directory))
    service = Receiver(runtime)
    stage = StageServer(service, runtime)
    await stage.start("127.0.0.1:0")
    await stage.load()
    bare = grpc.aio.server(options=SERVER_OPTIONS)
    bare.add_generic_rpc_handlers([Bare(service)])
    bare_port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    print(stage.port, bare_port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await bare.stop(0)
    await stage.drain(0)


def _memory(directory: str) -> SharedMemory:
    return SharedMemory(Path(directory), capacity_bytes=4 * 1024**3)


class Sender:
    """The sending process: every way of sending a payload."""

    def __init__(self, stage_port: int, bare_port: int, memory: SharedMemory, chunk_bytes: int) -> None:
        stub: Any = vae_pb2_grpc.VaeServiceStub
        address = [f"127.0.0.1:{stage_port}"]
        self.over_tcp: StageClient[Any] = StageClient("vae", stub, address, chunk_bytes=chunk_bytes)
        self.shared: StageClient[Any] = StageClient("vae", stub, address, chunk_bytes=chunk_bytes, shared_memory=memory)
        self.channel = open_channel(f"127.0.0.1:{bare_port}")
        self.chunk_bytes = chunk_bytes
        self.copied = np.empty(0, np.uint8)

    async def close(self) -> None:
        await self.over_tcp.close()
        await self.shared.close()
        await self.channel.close(None)

    async def tensors(self, client: StageClient[Any], tensor: WireTensor, count: int = 1) -> None:
        async with client.call(Budget.of(600)) as call:
            async for _ in call.stream(call.stub.Encode, _FIRST, [tensor] * count):
                pass

    async def answers(self, client: StageClient[Any], tensor: WireTensor) -> None:
        first = vae_pb2.DecodeRequest(parameters=vae_pb2.DecodeParameters(skip_frames=tensor.size_bytes))
        async with client.call(Budget.of(600)) as call:
            async for item in call.stream(call.stub.Decode, first):
                assert isinstance(item, WireTensor)
                assert item.size_bytes == tensor.size_bytes

    async def bare(self, tensor: WireTensor, *, keep: bool, count: int = 1) -> None:
        data, size_bytes = tensor.data.data, tensor.size_bytes * count

        async def chunks() -> AsyncIterator[bytes]:
            if keep:
                yield size_bytes.to_bytes(8, "little")
            for _ in range(count):
                for start in range(0, data.nbytes, self.chunk_bytes):
                    yield bytes(data[start : start + self.chunk_bytes])

        rpc: Any = self.channel.stream_unary("/benchmark/keep" if keep else "/benchmark/count")  # type: ignore[call-arg]
        assert int.from_bytes(await rpc(chunks()), "little") == size_bytes

    async def copy(self, tensor: WireTensor, count: int = 1) -> None:
        if self.copied.nbytes != tensor.size_bytes:
            self.copied = np.zeros(tensor.size_bytes, np.uint8)
        for _ in range(count):
            self.copied[:] = tensor.data

    async def cpu(self) -> float:
        """Seconds of processor that both processes have used."""
        rpc: Any = self.channel.unary_unary("/benchmark/cpu")  # type: ignore[call-arg]
        return float(await rpc(b"")) + time.process_time()

    async def memory(self, request: bytes = b"") -> tuple[int, int]:
        rpc: Any = self.channel.unary_unary("/benchmark/memory")  # type: ignore[call-arg]
        resident, peak = json.loads(await rpc(request))
        return resident, peak


@contextlib.asynccontextmanager
async def two_processes(chunk_bytes: int) -> AsyncIterator[Sender]:
    """A fresh receiving process and a sender to it."""
    with tempfile.TemporaryDirectory(dir=DIRECTORY) as directory:
        memory = _memory(directory)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __spec__.name, "--serve", directory, "--chunk-bytes", str(chunk_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        stage_port, bare_port = (await process.stdout.readline()).split()
        sender = Sender(int(stage_port), int(bare_port), memory, chunk_bytes)
        try:
            yield sender
        finally:
            await sender.close()
            memory.close()
            await process.communicate(b"")


@dataclass(frozen=True)
class Cost:
    """What one transfer took: seconds that passed, and seconds of processor in both processes together."""

    wall_s: float
    cpu_s: float


Costs = Mapping[str, Sequence[Cost]]


async def in_turn(sender: Sender, ways: Mapping[str, Way], rounds: int) -> Costs:
    """The cost of every way in every round, after one round that is not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            cpu, begun = await sender.cpu(), time.perf_counter()
            await way()
            wall_s = time.perf_counter() - begun
            if turn:
                costs[name].append(Cost(wall_s, await sender.cpu() - cpu))
    return costs


def ratio(costs: Costs, faster: str, slower: str, of: str = "wall_s") -> str:
    """How many times as fast, as the median over the rounds."""
    pairs = zip(costs[faster], costs[slower], strict=True)
    return f"{statistics.median(getattr(b, of) / getattr(a, of) for a, b in pairs):.2f}"


def rate(costs: Costs, name: str, size_bytes: int) -> str:
    """Median in MB/s."""
    return f"{size_bytes / statistics.median(cost.wall_s for cost in costs[name]) / 1e6:,.0f}"


def rounds_for(size_bytes: int, rounds: int) -> int:
    return max(5, min(rounds, rounds * 16 * MIB // size_bytes))


async def throughput(sizes: Sequence[int], rounds: int, chunk_bytes: int) -> None:
    print("Client to server, MB/s (medians):\n")
    print("| size | rounds | tensors | bare | bare, kept | shared | copy |\n|" + " ---: |" * 7)
    measured = {}
    for size_bytes in sizes:
        tensor = payload(size_bytes)
        async with two_processes(chunk_bytes) as sender:
            costs = await in_turn(sender, ways_to_send(sender, tensor), rounds_for(size_bytes, rounds))
        rates = " | ".join(rate(costs, name, size_bytes) for name in costs)
        print(f"| {size_bytes // MIB} MiB | {len(costs['tensors'])} | {rates} |", flush=True)
        measured[size_bytes] = costs
    for of, text in (("wall_s", "Time"), ("cpu_s", "Processor time of both processes together")):
        print(f"\n{text}, as ratios (medians of the ratios of each round; above 1 the first is the cheaper):\n")
        print("| size | tensors / bare | tensors / bare, kept | shared / bare |\n|" + " ---: |" * 4)
        for size_bytes, costs in measured.items():
            pairs = (("tensors", "bare"), ("tensors", "bare, kept"), ("shared", "bare"))
            print(f"| {size_bytes // MIB} MiB | {' | '.join(ratio(costs, *pair, of) for pair in pairs)} |")


def ways_to_send(sender: Sender, tensor: WireTensor, count: int = 1) -> dict[str, Way]:
    """Every way of sending a tensor so many times in one call."""
    return {
        "tensors": lambda: sender.tensors(sender.over_tcp, tensor, count),
        "bare": lambda: sender.bare(tensor, keep=False, count=count),
        "bare, kept": lambda: sender.bare(tensor, keep=True, count=count),
        "shared": lambda: sender.tensors(sender.shared, tensor, count),
        "copy": lambda: sender.copy(tensor, count),
    }


async def many(rounds: int, chunk_bytes: int) -> None:
    print(f"\n{MANY} tensors of 1 MiB in one call, MB/s and ratios of time:\n")
    print("| tensors | bare | bare, kept | shared | copy | tensors / bare | shared / bare |\n|" + " ---: |" * 7)
    async with two_processes(chunk_bytes) as sender:
        costs = await in_turn(sender, ways_to_send(sender, payload(MIB), MANY), rounds_for(MANY * MIB, rounds))
    rates = " | ".join(rate(costs, name, MANY * MIB) for name in costs)
    print(f"| {rates} | {ratio(costs, 'tensors', 'bare')} | {ratio(costs, 'shared', 'bare')} |", flush=True)


async def answers(sizes: Sequence[int], rounds: int, chunk_bytes: int) -> None:
    print(
        "\nServer to client, MB/s:\n\n| size | tensors | shared | to the server, in the same run |\n|" + " ---: |" * 4
    )
    for size_bytes in sizes:
        tensor = payload(size_bytes)
        async with two_processes(chunk_bytes) as sender:
            ways: dict[str, Way] = {
                "tensors": partial(sender.answers, sender.over_tcp, tensor),
                "shared": partial(sender.answers, sender.shared, tensor),
                "to the server": partial(sender.tensors, sender.over_tcp, tensor),
            }
            costs = await in_turn(sender, ways, rounds_for(size_bytes, rounds))
        rates = " | ".join(rate(costs, name, size_bytes) for name in costs)
        print(f"| {size_bytes // MIB} MiB | {rates} |", flush=True)


async def memory(sizes: Sequence[int], chunk_bytes: int) -> None:
    print("\nPeak resident memory of a fresh receiver beyond the payload, MiB (target: at most 16):\n")
    print("| size | bytes | shared |\n|" + " ---: |" * 3)
    for size_bytes in sizes:
        beyond = []
        for kind in ("over_tcp", "shared"):
            async with two_processes(chunk_bytes) as sender:
                client: StageClient[Any] = getattr(sender, kind)
                await sender.tensors(client, payload(MIB))
                resident, _ = await sender.memory(b"drop")
                await sender.tensors(client, payload(size_bytes))
                _, peak = await sender.memory()
                beyond.append(f"{(peak - resident - size_bytes) / MIB:+.1f}")
        print(f"| {size_bytes // MIB} MiB | {' | '.join(beyond)} |", flush=True)


async def measure(sizes: Sequence[int], rounds: int, chunk_bytes: int) -> None:
    await throughput(sizes, rounds, chunk_bytes)
    await many(rounds, chunk_bytes)
    await answers(sizes, rounds, chunk_bytes)
    await memory(sizes, chunk_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[size // MIB for size in SIZES], help="in MiB")
    parser.add_argument("--rounds", type=int, default=40, help="for up to 16 MiB; fewer for more")
    parser.add_argument("--chunk-bytes", type=int, default=CHUNK_BYTES, help="payload of a message")
    parser.add_argument("--serve", metavar="DIRECTORY", help="be the receiving process")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.chunk_bytes))
    else:
        asyncio.run(measure([size * MIB for size in options.sizes], options.rounds, options.chunk_bytes))


if __name__ == "__main__":
    main()
