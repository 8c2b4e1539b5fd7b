"""Calls to stages: balancing, retries, deadlines, what a caller is told."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from bunraku.errors import Cancelled, DeadlineExceeded, InvalidRequest, NotReady, StageBroken
from bunraku.v1 import stage_pb2, stage_pb2_grpc, vae_pb2, vae_pb2_grpc
from runtime import replicas
from runtime.client import Budget, Retry, StageClient, retrying
from runtime.gpu import raise_if_cancelled
from runtime.replicas import stage_status
from runtime.stage import Limits
from runtime.tensors import WireTensor
from tests.runtime.fakes import (
    FIRST_ENCODE,
    FakeVae,
    Stage,
    Tensors,
    client,
    decode,
    encode,
    stage,
    until,
    zeros,
)

AT_ONCE = Retry(attempts=4, first_wait_s=0.001, longest_wait_s=0.002)


def dead_address() -> str:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def failing(*errors: BaseException) -> Callable[[int], Awaitable[str]]:
    """An attempt that raises these one after another and then succeeds with the number of the attempt."""
    waiting = list(errors)

    async def attempt(number: int) -> str:
        if waiting:
            raise waiting.pop(0)
        return f"attempt {number}"

    return attempt


async def test_what_is_not_ready_is_tried_again() -> None:
    told: list[NotReady] = []
    errors = [NotReady("loading", stage="vae"), NotReady("still", stage="vae")]
    assert await retrying(failing(*errors), Budget.of(5), AT_ONCE, told.append) == "attempt 3"
    assert told == errors


@pytest.mark.parametrize("error", [InvalidRequest(("x", "y")), StageBroken("nan"), Cancelled("c"), ValueError("bug")])
async def test_what_would_not_help_is_not_tried_again(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        await retrying(failing(error), Budget.of(5), AT_ONCE)
    assert raised.value is error


async def test_a_stage_that_never_becomes_ready_is_named() -> None:
    attempts = [NotReady(f"no {number}", stage="vae") for number in range(9)]
    with pytest.raises(NotReady, match="the vae stage is not available: no 3") as error:
        await retrying(failing(*attempts), Budget.of(5), AT_ONCE)
    assert (error.value.reason, error.value.stage) == ("STAGE_UNAVAILABLE", "vae")
    assert error.value.retry_after_s is not None


async def test_the_budget_ends_an_attempt_and_the_waiting_between_two() -> None:
    async def endless(number: int) -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded):
        await retrying(endless, Budget.of(0.02), AT_ONCE)
    slow = Retry(attempts=5, first_wait_s=100, longest_wait_s=100)
    with pytest.raises(DeadlineExceeded):
        await retrying(failing(NotReady("x", retry_after_s=50)), Budget.of(0.02), slow)
    with pytest.raises(DeadlineExceeded):
        await retrying(failing(), Budget.of(0), AT_ONCE)


async def test_cancelling_a_retried_call_is_a_cancellation() -> None:
    begun = asyncio.Event()

    async def endless(number: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(retrying(endless, Budget.of(5), AT_ONCE))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class Waited:
    """Stands in for tenacity's state after an error."""

    def __init__(self, error: Exception, attempt_number: int) -> None:
        self.attempt_number = attempt_number
        self.outcome = self
        self._error = error

    def exception(self) -> Exception:
        return self._error


def test_a_stage_that_says_when_to_come_back_is_believed_up_to_the_longest_wait() -> None:
    retry = Retry(first_wait_s=0.25, longest_wait_s=8.0)

    def wait_s(after: float | None, attempt: int) -> float:
        return retry.wait_s(Waited(NotReady("x", retry_after_s=after), attempt))  # type: ignore[arg-type]

    assert all(3 <= wait_s(3.0, 1) <= 8 for _ in range(20))
    assert wait_s(100.0, 1) == 8.0
    assert all(0 <= wait_s(None, 1) <= 0.25 for _ in range(50))
    assert max(wait_s(None, 3) for _ in range(200)) > 0.5
    assert max(wait_s(None, 30) for _ in range(200)) <= 8.0


async def test_retry_info_of_a_stage_reaches_the_policy() -> None:
    waits: list[float | None] = []
    async with stage(load=False) as loading, client(loading.address) as caller:

        async def attempt(number: int) -> list[WireTensor]:
            if number == 3:
                await loading.server.load()
            return await encode(caller, zeros(1))

        got = await retrying(attempt, Budget.of(5), AT_ONCE, lambda error: waits.append(error.retry_after_s))
    assert waits == [1.0, 1.0]
    assert len(got) == 1


async def test_a_stage_that_is_down_is_not_ready_and_named() -> None:
    async with client(dead_address()) as caller:

        async def attempt(number: int) -> list[WireTensor]:
            return await encode(caller, zeros(1))

        with pytest.raises(NotReady, match="the vae stage is not available"):
            await retrying(attempt, Budget.of(5), AT_ONCE)


async def test_a_restarted_stage_on_the_same_port_is_found_again() -> None:
    async with stage() as first, client(first.address) as caller:
        await encode(caller, zeros(1))
        await first.server.drain(0)
        with pytest.raises(NotReady):
            await encode(caller, zeros(1))
        async with stage(port=first.server.port) as second:

            async def attempt(number: int) -> list[WireTensor]:
                return await encode(caller, zeros(1))

            await retrying(attempt, Budget.of(10), Retry(attempts=100, first_wait_s=0.02, longest_wait_s=0.1))
            assert second.service.begun == 1


async def test_a_stage_that_dies_in_the_middle_of_an_answer_is_not_ready() -> None:
    def two(tensors: Tensors) -> Iterator[WireTensor]:
        yield zeros(1)
        while True:
            raise_if_cancelled()
            time.sleep(0.001)

    async with stage() as serving, client(serving.address) as caller:
        serving.service.decode_work = two
        answers = decode(caller)
        await anext(answers)
        stopping = asyncio.create_task(serving.server.drain(0))
        with pytest.raises(NotReady) as error:
            await anext(answers)
        assert error.value.stage == "vae"
        await stopping


async def stages(stack: AsyncExitStack, count: int) -> list[Stage]:
    return [await stack.enter_async_context(stage(limits=Limits(max_concurrent=8))) for _ in range(count)]


async def test_calls_one_after_another_go_to_each_address_in_turn() -> None:
    async with AsyncExitStack() as stack:
        serving = await stages(stack, 3)
        caller = await stack.enter_async_context(client(*(each.address for each in serving)))
        for _ in range(6):
            await encode(caller, zeros(1))
        assert [each.service.begun for each in serving] == [2, 2, 2]


async def test_a_call_goes_to_the_address_with_the_least_work() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def waits(tensors: Tensors) -> list[WireTensor]:
        begun.set()
        assert go_on.wait(10)
        return []

    async with AsyncExitStack() as stack:
        serving = await stages(stack, 2)
        caller = await stack.enter_async_context(client(*(each.address for each in serving)))
        for each in serving:
            each.service.encode_work = waits
        long = asyncio.create_task(encode(caller, zeros(1)))
        await until(begun.is_set)
        busy, idle = sorted(serving, key=lambda each: -each.service.begun)
        idle.service.encode_work = lambda tensors: []
        for _ in range(5):
            await encode(caller, zeros(1))
        assert (busy.service.begun, idle.service.begun) == (1, 5)
        go_on.set()
        await long


async def test_calls_that_start_together_spread() -> None:
    async with AsyncExitStack() as stack:
        serving = await stages(stack, 4)
        caller = await stack.enter_async_context(client(*(each.address for each in serving)))
        await asyncio.gather(*(encode(caller, zeros(1)) for _ in range(8)))
        assert [each.service.begun for each in serving] == [2, 2, 2, 2]


async def test_an_address_that_is_dead_is_avoided() -> None:
    async with stage() as serving, client(dead_address(), serving.address) as caller:
        failed = 0
        for _ in range(10):
            try:
                await encode(caller, zeros(1))
            except NotReady:
                failed += 1
        assert failed <= 1
        assert serving.service.begun == 10 - failed


async def test_an_address_that_failed_is_tried_again_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_REST_S", 0.01)
    async with stage(load=False) as late, stage() as early, client(late.address, early.address) as caller:
        for _ in range(3):
            for task in [asyncio.create_task(encode(caller, zeros(1))) for _ in range(2)]:
                await asyncio.wait([task])
                task.exception()
            await asyncio.sleep(0.02)
        assert late.service.begun == 0
        await late.server.load()
        await asyncio.sleep(0.02)
        for _ in range(4):
            await encode(caller, zeros(1))
        assert late.service.begun == 2


async def test_a_client_needs_an_address() -> None:
    with pytest.raises(ValueError, match="stage vae has no address"):
        StageClient("vae", vae_pb2_grpc.VaeServiceStub, [])


async def test_a_name_that_nobody_knows_is_not_ready() -> None:
    async with client("no-such-host.invalid:1") as caller:
        with pytest.raises(NotReady, match="the vae stage has no address at present"):
            await encode(caller, zeros(1))


def resolving(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str] | OSError]) -> list[str]:
    """Makes host names mean what `answers` says; gives the names that were asked for."""
    asked: list[str] = []

    async def getaddrinfo(self: Any, host: str, port: str, **options: Any) -> list[Any]:
        asked.append(host)
        await asyncio.sleep(0)
        found = answers[host]
        if isinstance(found, OSError):
            raise found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port))) for address in found]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


async def test_a_name_stands_for_all_its_addresses_as_they_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, list[str] | OSError] = {"vae": ["127.0.0.1", "127.0.0.2"]}
    asked = resolving(monkeypatch, answers)
    async with client("vae:50053") as caller:
        first = {endpoint.address: endpoint for endpoint in await caller.endpoints()}
        assert sorted(first) == ["127.0.0.1:50053", "127.0.0.2:50053"]
        await caller.endpoints()
        assert asked == ["vae"]

        answers["vae"] = ["127.0.0.2", "127.0.0.3"]
        first["127.0.0.1:50053"].calls = 1
        caller._replicas._resolved_at = -100.0
        second = {endpoint.address: endpoint for endpoint in await caller.endpoints()}
        # an address that is gone stays while it has calls
        assert sorted(second) == ["127.0.0.1:50053", "127.0.0.2:50053", "127.0.0.3:50053"]
        assert second["127.0.0.2:50053"] is first["127.0.0.2:50053"]

        first["127.0.0.1:50053"].calls = 0
        caller._replicas._resolved_at = -100.0
        assert sorted(e.address for e in await caller.endpoints()) == ["127.0.0.2:50053", "127.0.0.3:50053"]

        answers["vae"] = OSError("no answer")
        caller._replicas._resolved_at = -100.0
        assert len(await caller.endpoints()) == 2


async def test_calls_that_come_while_a_name_is_looked_up_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolving(monkeypatch, {"vae": ["127.0.0.1"]})
    async with client("vae:50053") as caller:
        found = await asyncio.gather(*(caller.endpoints() for _ in range(3)))
        assert [len(each) for each in found] == [1, 1, 1]
        assert asked == ["vae"]


async def test_the_deadline_of_the_request_reaches_the_stage() -> None:
    remaining: list[float] = []

    class Notes(FakeVae):
        async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            remaining.append(context.time_remaining())
            yield vae_pb2.EncodeResponse(progress=vae_pb2.VaeProgress())

    async with stage(kind=Notes) as serving, client(serving.address) as caller:
        await encode(caller, seconds=7)
    assert 6 < remaining[0] <= 7


async def test_a_budget_that_is_spent_calls_nobody() -> None:
    async with stage() as serving, client(serving.address) as caller:
        with pytest.raises(DeadlineExceeded):
            await encode(caller, zeros(1), seconds=0)
        assert serving.service.begun == 0
        [endpoint] = await caller.endpoints()
        assert endpoint.calls == 0


def test_a_budget_counts_down() -> None:
    budget = Budget.of(5)
    assert 4.9 < budget.remaining_s <= 5
    assert Budget(time.monotonic() + 1).remaining_s <= 1
    with pytest.raises(DeadlineExceeded, match="the time for this request is over"):
        _ = Budget.of(-1).remaining_s


async def test_tensors_may_come_bit_by_bit_and_answers_come_meanwhile() -> None:
    class Series(FakeVae):
        async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            received = self.runtime.receive(requests, context)
            await anext(received)
            async for item in received:
                assert isinstance(item, WireTensor)
                yield vae_pb2.EncodeResponse(progress=vae_pb2.VaeProgress(completed_frames=item.size_bytes))

    answered: asyncio.Queue[int] = asyncio.Queue()

    async def frames() -> AsyncIterator[WireTensor]:
        yield zeros(1)
        assert await answered.get() == 1
        yield zeros(2)
        assert await answered.get() == 2

    async with stage(kind=Series) as serving, client(serving.address) as caller, caller.call(Budget.of(5)) as call:
        async for item in call.stream(call.stub.Encode, FIRST_ENCODE, frames()):
            answered.put_nowait(item.progress.completed_frames)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["at hand", "as they come"])
async def test_an_error_of_the_tensors_source_ends_the_call_and_is_the_callers(kind: str) -> None:
    def at_hand() -> Iterable[WireTensor]:
        yield zeros(1)
        raise NotReady("the pose stage is loading", stage="pose")

    async def as_they_come() -> AsyncIterator[WireTensor]:
        for tensor in at_hand():
            yield tensor

    async with stage() as serving, client(serving.address) as caller:
        source: Any = at_hand() if kind == "at hand" else as_they_come()
        with pytest.raises(NotReady) as error:
            async with caller.call(Budget.of(5)) as call:
                [_ async for _ in call.stream(call.stub.Encode, FIRST_ENCODE, source)]
        assert error.value.stage == "pose"
        await until(lambda: not serving.runtime.status().work)
        [endpoint] = await caller.endpoints()
        # it was not this stage that failed
        assert endpoint.rests_until == 0


async def test_cancelling_a_caller_whose_tensors_still_come_is_a_cancellation() -> None:
    waits = asyncio.Event()

    async def frames() -> AsyncIterator[WireTensor]:
        waits.set()
        await asyncio.Event().wait()
        yield zeros(1)

    async with stage() as serving, client(serving.address) as caller:

        async def call_it() -> None:
            async with caller.call(Budget.of(5)) as call:
                [_ async for _ in call.stream(call.stub.Encode, FIRST_ENCODE, frames())]

        task = asyncio.create_task(call_it())
        await waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not serving.runtime.status().work)


async def test_leaving_a_call_ends_it_even_if_its_answers_are_kept() -> None:
    def endless(tensors: Tensors) -> Iterator[WireTensor]:
        while True:
            raise_if_cancelled()
            yield zeros(1)

    async with stage() as serving, client(serving.address) as caller:
        serving.service.decode_work = endless
        async with caller.call(Budget.of(10)) as call:
            answers = call.stream(call.stub.Decode, vae_pb2.DecodeRequest(parameters=vae_pb2.DecodeParameters()))
            await anext(answers)
        await until(lambda: not serving.runtime.status().work)
        await answers.aclose()  # type: ignore[attr-defined]


async def test_a_stage_that_answers_badly_is_broken() -> None:
    class Bad(FakeVae):
        async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            yield vae_pb2.EncodeResponse(tensor_data=b"abc")

    async with stage(kind=Bad) as serving, client(serving.address) as caller:
        with pytest.raises(StageBroken, match="the vae stage answered badly: tensor_data: comes without") as error:
            await encode(caller, zeros(1))
        assert error.value.stage == "vae"
        await until(lambda: not serving.runtime.status().work)


async def test_an_answer_over_the_limit_of_the_caller_is_refused() -> None:
    async with stage() as serving, client(serving.address, max_call_bytes=99) as caller:
        with pytest.raises(StageBroken, match="brings the call to 100 bytes of tensors, the limit is 99"):
            await encode(caller, zeros(100))


async def test_rpcs_of_one_message_are_called_too() -> None:
    async with stage() as serving, client(serving.address) as caller:
        stub: Any = stage_pb2_grpc.StageServiceStub
        of_state: StageClient[Any] = StageClient("vae", stub, [serving.address])
        async with of_state.call(Budget.of(5)) as call:
            status = await call.stub.GetStatus(stage_pb2.GetStatusRequest(), timeout=call.timeout_s)
        assert status.stage == "vae"
        await of_state.close()
        [endpoint] = await caller.endpoints()
        assert (await stage_status(endpoint)).bundle == "tiny"


async def test_the_status_of_a_stage_that_is_down_is_not_ready() -> None:
    async with client(dead_address()) as caller:
        [endpoint] = await caller.endpoints()
        with pytest.raises(NotReady):
            await stage_status(endpoint)


async def test_a_call_that_is_cancelled_from_the_other_side_is_not_ready() -> None:
    class Plain(FakeVae):
        async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            await context.abort(grpc.StatusCode.CANCELLED, "by itself")
            yield

    async with stage(kind=Plain) as serving, client(serving.address) as caller:
        with pytest.raises(NotReady, match="the vae stage ended the call: by itself"):
            await encode(caller, zeros(1))
