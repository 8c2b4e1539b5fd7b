"""A stage's server over real gRPC: state, health, reflection, queue, errors, draining, cancelling."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from bunraku.errors import (
    BunrakuError,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    NotThereYet,
    OutOfMemory,
    StageBroken,
    from_rpc_error,
)
from bunraku.v1 import stage_pb2, tensor_pb2, vae_pb2, vae_pb2_grpc
from runtime import server as server_module
from runtime.client import CHANNEL_OPTIONS, Budget
from runtime.gpu import raise_if_cancelled
from runtime.server import SERVER_OPTIONS, as_bunraku_error, fast_deserializer
from runtime.stage import Limits, LoadedComponent, State
from runtime.tensors import UINT8, TensorData, WireTensor
from tests.runtime.fakes import (
    FIRST_DECODE,
    FIRST_ENCODE,
    FakeVae,
    Tensors,
    channel,
    client,
    decode,
    encode,
    stage,
    status_of,
    until,
    zeros,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(address: str, service: str) -> Any:
    async with channel(address) as opened:
        request = health_pb2.HealthCheckRequest(service=service)
        return (await health_pb2_grpc.HealthStub(opened).Check(request)).status


class Endless:
    """Work of a Decode that goes on until it is cancelled; `computing` and `closed` tell of it."""

    def __init__(self, item_bytes: int = 1) -> None:
        self.item_bytes = item_bytes
        self.computing, self.closed = threading.Event(), threading.Event()
        self.made = 0

    def __call__(self, tensors: Tensors) -> Iterator[WireTensor]:
        try:
            while True:
                raise_if_cancelled()
                self.made += 1
                yield zeros(self.item_bytes)
        finally:
            self.closed.set()


class Stuck(Endless):
    """One item, and then work that never ends unless it is cancelled."""

    def __call__(self, tensors: Tensors) -> Iterator[WireTensor]:
        try:
            yield zeros(1)
            self.computing.set()
            while True:
                raise_if_cancelled()
                time.sleep(0.001)
        finally:
            self.closed.set()


def waiting_to_load(go_on: threading.Event) -> Callable[[], None]:
    def load() -> None:
        assert go_on.wait(10)

    return load


def waiting(begun: threading.Event, go_on: threading.Event) -> Callable[[Tensors], list[WireTensor]]:
    """Work of an Encode that ends when it is let go on."""

    def work(tensors: Tensors) -> list[WireTensor]:
        begun.set()
        assert go_on.wait(10)
        return [zeros(1)]

    return work


async def test_a_stage_that_loads_says_so_and_then_serves() -> None:
    go_on = threading.Event()
    async with stage(load=False) as loading, client(loading.address) as caller:
        loading.service.load_work = waiting_to_load(go_on)
        task = asyncio.create_task(loading.server.load())
        await asyncio.sleep(0)
        with pytest.raises(NotReady, match="the vae stage is loading: loading tiny") as error:
            await encode(caller, zeros(1))
        assert (error.value.reason, error.value.stage, error.value.retry_after_s) == ("STAGE_LOADING", "vae", 1.0)
        assert loading.service.begun == 0
        assert await health_of(loading.address, FakeVae.full_name) == NOT_SERVING
        assert await health_of(loading.address, "") == SERVING
        go_on.set()
        await task
        assert await health_of(loading.address, FakeVae.full_name) == SERVING
        assert len(await encode(caller, zeros(1))) == 1


async def test_a_refusal_is_told_while_a_large_request_is_still_being_written() -> None:
    """grpc.aio would put a status of its own in place of the stage's."""
    async with stage(load=False) as loading, client(loading.address) as caller:
        for _ in range(20):
            with pytest.raises(NotReady, match="the vae stage is loading: starting"):
                await encode(caller, zeros(1_000_000))


async def test_an_answer_that_does_not_wait_for_the_whole_request_is_a_success() -> None:
    class Hasty(FakeVae):
        async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            yield vae_pb2.EncodeResponse(progress=vae_pb2.VaeProgress(completed_frames=7))

    async with stage(kind=Hasty) as serving, client(serving.address) as caller:
        for _ in range(20):
            async with caller.call(Budget.of(5)) as call:
                answers = [item async for item in call.stream(call.stub.Encode, FIRST_ENCODE, [zeros(1_000_000)])]
            assert [item.progress.completed_frames for item in answers] == [7]  # type: ignore[union-attr]


async def test_health_turns_when_the_stage_stops() -> None:
    begun, go_on = threading.Event(), threading.Event()
    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = waiting(begun, go_on)
        work = asyncio.create_task(encode(caller, zeros(1)))
        await until(begun.is_set)
        draining = asyncio.create_task(serving.server.drain(10))
        await until(lambda: serving.runtime.draining)
        with pytest.raises(NotReady):
            serving.runtime._refuse_unless_serving()
        go_on.set()
        assert len(await work) == 1
        await draining


async def test_reflection_lists_the_services_of_a_stage() -> None:
    async with stage() as serving, channel(serving.address) as opened:
        stub = reflection_pb2_grpc.ServerReflectionStub(opened)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    assert {service.name for service in answer.list_services_response.service} == {
        "bunraku.v1.VaeService",
        "bunraku.v1.StageService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_a_full_queue_is_not_ready_with_a_time_to_come_back() -> None:
    begun, go_on = threading.Event(), threading.Event()
    async with stage(limits=Limits(max_concurrent=1, max_queued=1)) as serving, client(serving.address) as caller:
        serving.service.encode_work = waiting(begun, go_on)
        first = asyncio.create_task(encode(caller, zeros(1)))
        await until(begun.is_set)
        second = asyncio.create_task(encode(caller, zeros(1)))
        await until(lambda: serving.runtime.status().queued_requests == 1)
        with pytest.raises(NotReady, match="the vae stage has 1 calls waiting already") as error:
            await encode(caller, zeros(1))
        assert (error.value.reason, error.value.retry_after_s) == ("STAGE_QUEUE_FULL", 1.0)
        assert serving.service.begun == 1
        go_on.set()
        await asyncio.gather(first, second)
        assert serving.service.begun == 2


async def test_no_more_calls_run_at_once_than_the_limit() -> None:
    go_on = asyncio.Event()

    class Waits(FakeVae):
        async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            self.begun += 1
            await go_on.wait()
            yield vae_pb2.EncodeResponse(progress=vae_pb2.VaeProgress())

    async with stage(kind=Waits, limits=Limits(max_concurrent=2)) as serving, client(serving.address) as caller:
        tasks = [asyncio.create_task(encode(caller)) for _ in range(4)]
        await until(lambda: serving.runtime.status().queued_requests == 2)
        assert serving.service.begun == 2
        assert len(serving.runtime.status().work) == 2
        go_on.set()
        await asyncio.gather(*tasks)


async def test_a_caller_that_leaves_the_queue_makes_room() -> None:
    begun, go_on = threading.Event(), threading.Event()
    async with stage(limits=Limits(max_queued=1)) as serving, client(serving.address) as caller:
        serving.service.encode_work = waiting(begun, go_on)
        first = asyncio.create_task(encode(caller, zeros(1)))
        await until(begun.is_set)
        with pytest.raises(DeadlineExceeded):
            await encode(caller, zeros(1), seconds=0.05)
        await until(lambda: serving.runtime.status().queued_requests == 0)
        go_on.set()
        await first
        assert serving.service.begun == 1


async def test_status_tells_what_the_stage_is_and_does() -> None:
    begun, go_on = threading.Event(), threading.Event()
    async with stage(limits=Limits(max_queued=5)) as serving, client(serving.address) as caller:
        serving.runtime.components.append(LoadedComponent("vae", 12, 48, "float32", "abc"))
        serving.runtime.attention_backend = "sdpa"
        serving.service.encode_work = waiting(begun, go_on)

        async def call() -> None:
            async with caller.call(Budget.of(10), generation="g-1") as call:
                async for _ in call.stream(call.stub.Encode, FIRST_ENCODE, [zeros(1)]):
                    pass

        task = asyncio.create_task(call())
        await until(begun.is_set)
        status = await status_of(serving.address)
        go_on.set()
        await task
    assert (status.stage, status.state, status.state_detail) == ("vae", stage_pb2.STAGE_STATE_SERVING, "")
    assert (status.bundle, status.bundle_revision) == ("tiny", "0123456789ab")
    assert (status.device, status.device_name, status.vram.total_bytes) == ("cpu", "CPU", 0)
    assert status.ram.total_bytes > status.ram.used_bytes > 2**20
    assert status.ram.peak_bytes >= status.ram.used_bytes // 2
    [component] = status.components
    assert (component.name, component.parameters, component.size_bytes) == ("vae", 12, 48)
    assert (component.dtype, component.sha256) == ("float32", "abc")
    [work] = status.work
    assert (work.rpc, work.generation) == ("Encode", "g-1")
    assert 0 < work.elapsed.ToNanoseconds() < 20e9
    assert (status.max_queued_requests, status.attention_backend) == (5, "sdpa")
    assert abs(status.start_time.ToSeconds() - time.time()) < 60
    assert status.version


async def test_draining_finishes_work_in_flight_and_refuses_what_waits() -> None:
    begun, go_on = threading.Event(), threading.Event()
    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = waiting(begun, go_on)
        in_work = asyncio.create_task(encode(caller, zeros(1)))
        await until(begun.is_set)
        waits = asyncio.create_task(encode(caller, zeros(1)))
        await until(lambda: serving.runtime.status().queued_requests == 1)
        draining = asyncio.create_task(serving.server.drain(10))
        await until(lambda: serving.runtime.draining)
        go_on.set()
        assert len(await in_work) == 1
        with pytest.raises(NotReady, match="the vae stage is draining") as error:
            await waits
        assert error.value.reason == "STAGE_DRAINING"
        await draining
        with pytest.raises(NotReady):
            await encode(caller, zeros(1))
        assert serving.service.begun == 1


async def test_work_that_outlives_the_grace_period_is_ended_and_may_be_repeated() -> None:
    stuck = Stuck()
    async with stage() as serving, client(serving.address) as caller:
        serving.service.decode_work = stuck
        answers = decode(caller)
        await anext(answers)
        await until(stuck.computing.is_set)
        task = asyncio.ensure_future(answers.__anext__())
        await serving.server.drain(0.05)
        assert stuck.closed.is_set()
        with pytest.raises(NotReady):
            await task


async def test_a_device_that_hangs_does_not_keep_a_stage_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_END_OF_WORK_S", 0.05)
    begun, go_on = threading.Event(), threading.Event()
    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = waiting(begun, go_on)
        task = asyncio.create_task(encode(caller, zeros(1)))
        await until(begun.is_set)
        await serving.server.drain(0)
        with pytest.raises(NotReady):
            await task
        go_on.set()


async def test_a_deadline_ends_the_call_and_the_work_on_the_device() -> None:
    stuck = Stuck()
    async with stage() as serving, client(serving.address) as caller:
        serving.service.decode_work = stuck
        with pytest.raises(DeadlineExceeded) as error:
            async for _ in decode(caller, seconds=0.2):
                pass
        assert error.value.stage == "vae"
        await until(stuck.closed.is_set)
        await until(lambda: not serving.runtime.status().work)


async def test_a_client_that_leaves_ends_the_work_on_the_device() -> None:
    stuck = Stuck()
    async with stage() as serving, client(serving.address) as caller:
        serving.service.decode_work = stuck
        answers = decode(caller)
        await anext(answers)
        await until(stuck.computing.is_set)
        await answers.aclose()  # type: ignore[attr-defined]
        await until(stuck.closed.is_set)
        await until(lambda: not serving.runtime.status().work)


async def test_a_client_that_does_not_read_holds_up_the_work_and_ends_it_when_it_leaves() -> None:
    endless = Endless(item_bytes=2**20)
    async with stage() as serving, channel(serving.address) as opened:
        serving.service.decode_work = endless
        call = vae_pb2_grpc.VaeServiceStub(opened).Decode(iter([FIRST_DECODE]))
        await call.read()
        made = -1
        while endless.made != made:
            made = endless.made
            await asyncio.sleep(0.1)
        # what lies in the windows of HTTP/2 and the socket, and one ahead
        assert made < 40
        call.cancel()
        await until(endless.closed.is_set)
        await until(lambda: not serving.runtime.status().work)
        serving.service.decode_work = lambda tensors: iter([zeros(1)])
        async with client(serving.address) as caller:
            assert len([tensor async for tensor in decode(caller)]) == 1


async def test_the_device_is_free_of_a_call_before_the_next_is_let_in() -> None:
    order: list[str] = []

    def slow_to_close(tensors: Tensors) -> Iterator[WireTensor]:
        try:
            while True:
                raise_if_cancelled()
                yield zeros(1)
        finally:
            time.sleep(0.05)
            order.append("closed")

    def follow(tensors: Tensors) -> list[WireTensor]:
        order.append("next")
        return []

    async with stage() as serving, client(serving.address) as caller:
        serving.service.decode_work = slow_to_close
        serving.service.encode_work = follow
        answers = decode(caller)
        await anext(answers)
        following = asyncio.create_task(encode(caller, zeros(1)))
        await until(lambda: serving.runtime.status().queued_requests == 1)
        await answers.aclose()  # type: ignore[attr-defined]
        await following
    assert order == ["closed", "next"]


def raising(error: BaseException) -> Callable[[Tensors], list[WireTensor]]:
    def work(tensors: Tensors) -> list[WireTensor]:
        raise error

    return work


ERRORS: dict[str, tuple[BaseException, type[BunrakuError], str, str]] = {
    "ours": (InvalidRequest(("shift", "wrong")), InvalidRequest, "INVALID_REQUEST", "shift: wrong"),
    "a group": (
        ExceptionGroup("two", [ExceptionGroup("one", [OutOfMemory("too little")]), ValueError("other")]),
        OutOfMemory,
        "GPU_OUT_OF_MEMORY",
        "too little",
    ),
    "a bug": (ValueError("shapes differ: größer"), StageBroken, "BUG", "ValueError: shapes differ: größer"),
    "unicode": (NotReady("zwei\nZeilen: ü %"), NotReady, "NOT_READY", "zwei\nZeilen: ü %"),
}


@pytest.mark.parametrize("case", ERRORS)
async def test_what_a_service_raises_reaches_the_caller(case: str, caplog: pytest.LogCaptureFixture) -> None:
    error, kind, reason, text = ERRORS[case]
    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = raising(error)
        with pytest.raises(kind) as raised:
            await encode(caller, zeros(1))
    assert (raised.value.reason, raised.value.message, raised.value.stage) == (reason, text, "vae")
    # only what is broken is worth a line in the log
    assert ("Encode failed" in caplog.text) == (kind is StageBroken)


async def test_violations_reach_a_caller_of_any_kind_as_details() -> None:
    async with stage() as serving, channel(serving.address) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(vae_pb2_grpc.VaeServiceStub(opened).Encode(iter([vae_pb2.EncodeRequest()]))))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(raised.value)  # type: ignore[arg-type]
    kinds = [detail.type_url.rpartition(".")[2] for detail in status.details]
    assert kinds == ["ErrorInfo", "BadRequest"]
    bad = error_details_pb2.BadRequest()
    status.details[1].Unpack(bad)
    assert "a message of the stream is empty" in bad.field_violations[0].description


@pytest.mark.parametrize("length", [1_000, 5_000, 100_000])
async def test_a_long_message_is_cut_rather_than_lost(length: int) -> None:
    async with stage() as serving, client(serving.address) as caller:
        for letter in ("x", "ü"):
            text = letter * length
            serving.service.encode_work = raising(InvalidRequest(*[("field", text)] * 3, reason="LONG"))
            with pytest.raises(InvalidRequest) as error:
                await encode(caller, zeros(1))
            assert error.value.reason == "LONG"
            assert error.value.message.startswith(f"field: {letter * 100}")


async def test_a_broken_device_breaks_the_stage() -> None:
    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = raising(RuntimeError("CUDA error: an illegal memory access was encountered"))
        with pytest.raises(StageBroken, match="the device failed: CUDA error") as error:
            await encode(caller, zeros(1))
        assert error.value.reason == "DEVICE_FAULT"
        await asyncio.wait_for(serving.runtime.broken.wait(), 5)
        assert serving.runtime.state == State.STAGE_STATE_BROKEN
        with pytest.raises(NotReady, match="the vae stage is broken: the device failed"):
            await encode(caller, zeros(1))
        status = await status_of(serving.address)
        assert (status.state, status.state_detail[:17]) == (stage_pb2.STAGE_STATE_BROKEN, "the device failed")


async def test_too_little_memory_does_not_break_the_stage() -> None:
    async with stage() as serving, client(serving.address) as caller:
        serving.service.encode_work = raising(MemoryError("Unable to allocate 8 GiB"))
        with pytest.raises(OutOfMemory, match="does not fit the memory of the device"):
            await encode(caller, zeros(1))
        serving.service.encode_work = lambda tensors: [zeros(1)]
        assert len(await encode(caller, zeros(1))) == 1


async def test_a_method_that_is_not_there_is_unimplemented_with_a_sentence() -> None:
    async with stage(kind=Unfinished) as serving, client(serving.address) as caller:
        for method, answers in (("Encode", encode(caller)), ("Decode", anext(decode(caller)))):
            with pytest.raises(NotThereYet, match=f"{method} is in the contract, but not in this version yet"):
                await answers


class Unfinished(FakeVae):
    """Has only what grpc generated."""

    Encode = vae_pb2_grpc.VaeServiceServicer.Encode  # type: ignore[assignment]
    Decode = vae_pb2_grpc.VaeServiceServicer.Decode  # type: ignore[assignment]


async def test_a_method_that_nobody_knows_is_unimplemented() -> None:
    async with stage() as serving, channel(serving.address) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await opened.unary_unary("/bunraku.v1.VaeService/Paint", bytes, bytes)(b"")
    assert isinstance(from_rpc_error(error.value), NotThereYet)


async def test_a_caller_that_half_closes_inside_a_tensor_is_refused() -> None:
    head = vae_pb2.EncodeRequest(tensor=tensor_pb2.TensorHeader(name="frames", dtype=UINT8, shape=[4], size_bytes=4))
    async with stage() as serving, channel(serving.address) as opened:
        messages = [FIRST_ENCODE, head, vae_pb2.EncodeRequest(tensor_data=b"abc")]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in vae_pb2_grpc.VaeServiceStub(opened).Encode(iter(messages)):
                pass
    assert from_rpc_error(error.value).reason == "TRUNCATED_TENSOR"
    assert error.value.details() == "frames: is truncated: 3 of 4 bytes came"


async def test_bytes_that_are_no_message_are_a_bad_request(caplog: pytest.LogCaptureFixture) -> None:
    async with stage() as serving, channel(serving.address) as opened:
        call = opened.stream_stream("/bunraku.v1.VaeService/Encode", bytes, bytes)(iter([b"\x12\x05abc"]))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be read" in str(error.value.details())
    assert "failed" not in caplog.text


async def test_a_plain_stub_is_served_and_reads_plain_messages() -> None:
    sent = WireTensor.from_bytes("frames", bytes(range(256)) * 3)
    described = tensor_pb2.TensorHeader(name="frames", dtype=UINT8, shape=sent.shape, size_bytes=sent.size_bytes)
    head = vae_pb2.EncodeRequest(tensor=described)
    content = sent.data.tobytes()
    chunks = [vae_pb2.EncodeRequest(tensor_data=content[start : start + 100]) for start in range(0, len(content), 100)]
    async with stage(limits=Limits(chunk_bytes=64)) as serving, channel(serving.address) as opened:
        call = vae_pb2_grpc.VaeServiceStub(opened).Encode(iter([FIRST_ENCODE, head, *chunks]))
        answers = [answer async for answer in call]
    assert [answer.WhichOneof("message") for answer in answers] == ["progress", "tensor", *["tensor_data"] * 12]
    assert answers[1].tensor.name == "latents"
    assert b"".join(answer.tensor_data for answer in answers[2:]) == content


async def test_a_plain_servicer_is_understood_by_our_client() -> None:
    class Plain(vae_pb2_grpc.VaeServiceServicer):
        async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            async for request in requests:
                kind = request.WhichOneof("message")
                if kind == "tensor":
                    yield vae_pb2.EncodeResponse(tensor=request.tensor)
                elif kind == "tensor_data":
                    yield vae_pb2.EncodeResponse(tensor_data=request.tensor_data)

        Decode = vae_pb2_grpc.VaeServiceServicer.Decode

    plain = grpc.aio.server()
    vae_pb2_grpc.add_VaeServiceServicer_to_server(Plain(), plain)
    port = plain.add_insecure_port("127.0.0.1:0")
    await plain.start()
    sent = WireTensor.from_bytes("frames", bytes(range(256)) * 5)
    async with client(f"127.0.0.1:{port}", chunk_bytes=100) as caller:
        [got] = await encode(caller, sent)
    await plain.stop(None)
    assert (got.name, got.shape, got.data.tobytes()) == ("frames", sent.shape, sent.data.tobytes())


def test_only_messages_that_carry_tensors_are_read_by_hand() -> None:
    plain = stage_pb2.GetStatusRequest.FromString
    assert fast_deserializer(plain) is plain
    assert fast_deserializer(None) is None
    fast = fast_deserializer(vae_pb2.DecodeResponse.FromString)
    assert isinstance(fast(vae_pb2.DecodeResponse(tensor_data=b"x").SerializeToString()), TensorData)


async def test_a_tensor_over_the_limit_of_the_stage_is_refused() -> None:
    async with stage(limits=Limits(max_call_bytes=99)) as serving, client(serving.address) as caller:
        with pytest.raises(InvalidRequest, match="brings the call to 100 bytes of tensors, the limit is 99"):
            await encode(caller, zeros(100))


async def test_an_address_that_is_taken_is_an_error() -> None:
    async with stage() as serving:
        with pytest.raises(OSError, match=f"cannot listen on {serving.address}"):
            async with stage(port=serving.server.port):
                pass


async def test_a_model_that_cannot_be_loaded_leaves_the_stage_loading() -> None:
    def missing() -> None:
        raise FileNotFoundError("vae.safetensors")

    async with stage(load=False) as loading:
        loading.service.load_work = missing
        with pytest.raises(FileNotFoundError):
            await loading.server.load()
        assert loading.runtime.state == State.STAGE_STATE_LOADING
        assert await health_of(loading.address, FakeVae.full_name) == NOT_SERVING


def test_the_pings_of_clients_are_within_what_servers_allow() -> None:
    """Or a server answers too_many_pings and closes the connection."""
    ours, theirs = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    assert ours["grpc.keepalive_time_ms"] > theirs["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert ours["grpc.keepalive_permit_without_calls"] == theirs["grpc.keepalive_permit_without_calls"] == 1
    assert ours["grpc.keepalive_timeout_ms"] < ours["grpc.keepalive_time_ms"]


def test_no_message_may_be_larger_than_16_mib_on_either_side() -> None:
    for options in (dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)):
        assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == 16 * 2**20


def test_the_first_error_of_a_group_is_the_one_that_counts() -> None:
    known = NotReady("first")
    assert as_bunraku_error(ExceptionGroup("", [known, InvalidRequest(("x", "y"))])) is known
    assert as_bunraku_error(known) is known
    assert as_bunraku_error(KeyError("x")).reason == "BUG"
