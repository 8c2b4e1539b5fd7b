"""Calls to stages: the mirror of runtime.server.

A `StageClient` knows the addresses of one stage (a DNS name may stand for many), keeps a channel to each, sends a call
to the one with the least work, agrees on shared memory where both sides share a host, passes the deadline and the trace
on, and turns a failed call back into the error that the stage raised.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc
import tenacity
from google.protobuf.message import Message
from opentelemetry.trace import SpanKind

from bunraku.errors import DeadlineExceeded, InvalidRequest, NotReady, StageBroken, from_rpc_error
from bunraku.v1 import stage_pb2, stage_pb2_grpc
from runtime import telemetry
from runtime.server import FLOW_CONTROL, MAX_MESSAGE_BYTES, fast_deserializer
from runtime.shared_memory import LOST, SharedMemory, Sharing, boot_id
from runtime.tensors import CHUNK_BYTES, MAX_CALL_BYTES, WireTensor, receive, send_tensors, serialize

T = TypeVar("T")
Stub = TypeVar("Stub")
M = TypeVar("M", bound=Message)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    *FLOW_CONTROL,
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # the StageClient retries, on another address; retries of the library would multiply with those
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # despite its name, how long an attempt to connect may take: a host that is gone does not answer at all
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # two channels to one address must not share a connection that has failed
    ("grpc.use_local_subchannel_pool", 1),
)
_AGREEMENT_TIMEOUT_S = 2.0
_RESOLVE_INTERVAL_S = 5.0
_REST_AFTER_FAILURE_S = 1.0
# What grpc.aio says of a call whose request could not be written on, whatever the reason
_WRITE_FAILED = "Internal error from Core"
_STATUS_ARRIVES_S = 1.0
_ENDED = "STAGE_ENDED_CALL"
# What writing to a call raises that the stage has ended
_ENDED_BY_STAGE = (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError)


@dataclass(frozen=True)
class Retry:
    """When a call that found its stage not ready is tried again.

    Attributes:
        attempts: in all, the first included.
        patience_s: how long after the first attempt another may begin; a stage that is started again loads its
            weights meanwhile.
        first_wait_s, longest_wait_s: the wait doubles from one to the other, with jitter; a stage that says when to
            come back is believed up to the longest wait.
    """

    attempts: int = 1000
    patience_s: float = 120.0
    first_wait_s: float = 0.25
    longest_wait_s: float = 4.0

    def wait_s(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt."""
        backoff = tenacity.wait_random_exponential(self.first_wait_s, self.longest_wait_s)
        error = state.outcome.exception() if state.outcome else None
        asked = (error.retry_after_s or 0.0) if isinstance(error, NotReady) else 0.0
        return min(self.longest_wait_s, max(asked, backoff(state)))


async def retrying(
    attempt: Callable[[int], Awaitable[T]],
    budget: Budget,
    retry: Retry = Retry(),
    before_wait: Callable[[NotReady], None] | None = None,
) -> T:
    """Runs `attempt(number)` until it succeeds, while a stage is not ready and there is time.

    Args:
        attempt: must be safe to repeat; everything a stage computes is.
        budget: the time that there is.
        retry: how often and how soon.
        before_wait: told why it must wait.

    Raises:
        NotReady: it never succeeded; the message names the stage.
        DeadlineExceeded: the budget is spent.
    """

    def waiting(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if before_wait is not None and isinstance(error, NotReady):
            before_wait(error)

    policy = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(NotReady),
        stop=tenacity.stop_after_attempt(retry.attempts) | tenacity.stop_before_delay(retry.patience_s),
        wait=retry.wait_s,
        before_sleep=waiting,
        reraise=True,
    )
    try:
        async with asyncio.timeout(budget.remaining_s):
            async for trial in policy:
                with trial:
                    return await attempt(trial.retry_state.attempt_number)
    except NotReady as error:
        if not error.stage:
            raise
        text = f"the {error.stage} stage is not available: {error.message}"
        raise NotReady(text, reason="STAGE_UNAVAILABLE", stage=error.stage, retry_after_s=5.0) from error
    except TimeoutError:
        raise DeadlineExceeded("the time for this request is over") from None
    raise AssertionError("tenacity ends with a result or an error")


@dataclass
class Budget:
    """The time that a request still has."""

    ends_at: float

    @classmethod
    def of(cls, seconds: float) -> Budget:
        return cls(time.monotonic() + seconds)

    @property
    def remaining_s(self) -> float:
        """Raises DeadlineExceeded when nothing is left."""
        remaining = self.ends_at - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("the time for this request is over")
        return remaining


class TensorChannel:
    """A channel whose streaming rpcs use the fast framing; generated stubs take it as any other."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, **options: Any) -> Any:
        return self._channel.unary_unary(method, **options)

    def unary_stream(self, method: str, **options: Any) -> Any:
        return self._channel.unary_stream(method, **_fast(options))

    def stream_unary(self, method: str, **options: Any) -> Any:
        return self._channel.stream_unary(method, **_fast(options))

    def stream_stream(self, method: str, **options: Any) -> Any:
        return self._channel.stream_stream(method, **_fast(options))


def _fast(options: dict[str, Any]) -> dict[str, Any]:
    deserialize = fast_deserializer(options["response_deserializer"])
    return {**options, "request_serializer": serialize, "response_deserializer": deserialize}


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel with this system's options. The caller closes it."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


@dataclass(eq=False)
class Endpoint:
    """One address of a stage and what is known of it."""

    address: str
    channel: grpc.aio.Channel
    calls: int = 0
    rests_until: float = 0.0
    agreed: bool | None = None
    session: str = ""
    peer: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def failed(self) -> None:
        """Others are tried first for a while, and shared memory is agreed on anew: it may be another process now."""
        self.rests_until = time.monotonic() + _REST_AFTER_FAILURE_S
        self.agreed = None


class StageClient(Generic[Stub]):
    """Calls one stage.

    Args:
        stage: its name, for errors and spans.
        stub: the generated stub class.
        addresses: `host:port`, one or several; a host name that resolves to several addresses stands for all of them.
        shared_memory: of this process; None: tensors go as bytes.
    """

    def __init__(
        self,
        stage: str,
        stub: Callable[..., Stub],
        addresses: Sequence[str],
        *,
        shared_memory: SharedMemory | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        max_call_bytes: int = MAX_CALL_BYTES,
    ) -> None:
        if not addresses:
            raise ValueError(f"stage {stage} has no address")
        self.stage, self._stub, self._addresses = stage, stub, tuple(addresses)
        self._shared_memory = shared_memory
        self._chunk_bytes, self._max_call_bytes = chunk_bytes, max_call_bytes
        self._endpoints: dict[str, Endpoint] = {}
        self._resolved_at = -_RESOLVE_INTERVAL_S
        self._resolving = asyncio.Lock()
        self._next = 0

    async def close(self) -> None:
        """Closes the channels; calls under way are cancelled."""
        endpoints, self._endpoints = list(self._endpoints.values()), {}
        await asyncio.gather(*(endpoint.channel.close(None) for endpoint in endpoints))

    async def endpoints(self) -> list[Endpoint]:
        """Every address of the stage at present."""
        async with self._resolving:
            if time.monotonic() - self._resolved_at >= _RESOLVE_INTERVAL_S:
                await self._resolve()
                self._resolved_at = time.monotonic()
        return list(self._endpoints.values())

    @asynccontextmanager
    async def call(self, budget: Budget, *, generation: str = "", attempt: int = 1) -> AsyncIterator[StageCall[Stub]]:
        """One call on the address with the least work.

        Raises what the stage raised; an address that does not answer is NotReady.
        """
        endpoint = self._choose(await self.endpoints())
        # counted from here on, so that the calls that come while this one agrees choose another address
        endpoint.calls += 1
        sharing: Sharing | None = None
        try:
            sharing = await self._agree(endpoint, budget)
            with telemetry.span(
                telemetry.SPAN_STAGE_PREFIX + self.stage,
                {
                    telemetry.ATTRIBUTE_STAGE: self.stage,
                    telemetry.ATTRIBUTE_ADDRESS: endpoint.address,
                    telemetry.ATTRIBUTE_ATTEMPT: attempt,
                    telemetry.ATTRIBUTE_GENERATION: generation,
                },
                kind=SpanKind.CLIENT,
            ):
                async with self._stage_call(endpoint, sharing, budget, generation) as call:
                    yield call
        except grpc.aio.AioRpcError as error:
            known = from_rpc_error(error, stage=self.stage)
            if isinstance(known, NotReady):
                endpoint.failed()
            raise known from error
        except NotReady as error:
            if error.reason in (LOST, _ENDED):
                endpoint.failed()
            raise
        finally:
            endpoint.calls -= 1
            if sharing is not None:
                sharing.ended()

    @asynccontextmanager
    async def _stage_call(
        self, endpoint: Endpoint, sharing: Sharing | None, budget: Budget, generation: str
    ) -> AsyncIterator[StageCall[Stub]]:
        metadata = [*telemetry.outgoing(), (telemetry.METADATA_GENERATION, generation)]
        if sharing is not None:
            metadata.append((telemetry.METADATA_SHARED_MEMORY, endpoint.session))
        stub = self._stub(TensorChannel(endpoint.channel))
        call = StageCall(
            self.stage, stub, metadata, budget.remaining_s, sharing, self._chunk_bytes, self._max_call_bytes
        )
        try:
            yield call
        finally:
            call.cancel()

    def _choose(self, endpoints: list[Endpoint]) -> Endpoint:
        """The least busy that has not just failed; in turn among equals."""
        if not endpoints:
            raise NotReady(f"the {self.stage} stage has no address at present", stage=self.stage)
        now = time.monotonic()
        self._next += 1
        turned = endpoints[self._next % len(endpoints) :] + endpoints[: self._next % len(endpoints)]
        return min(turned, key=lambda endpoint: (endpoint.rests_until > now, endpoint.calls))

    async def _resolve(self) -> None:
        """Brings the endpoints up to date with what the addresses mean now; channels that stay are kept."""
        found: set[str] = set()
        for address in self._addresses:
            host, _, port = address.rpartition(":")
            try:
                rows = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError:
                found |= {known for known in self._endpoints if known.endswith(f":{port}")}
                continue
            ipv4 = [row for row in rows if row[0] == socket.AF_INET]
            found |= {_join(str(row[4][0]), port) for row in ipv4 or rows}
        for address in found - self._endpoints.keys():
            self._endpoints[address] = Endpoint(address, open_channel(address))
        for address in self._endpoints.keys() - found:
            if self._endpoints[address].calls == 0:
                await self._endpoints.pop(address).channel.close(None)

    async def _agree(self, endpoint: Endpoint, budget: Budget) -> Sharing | None:
        """Shared memory with the process at an address; None where there is none to share."""
        if self._shared_memory is None:
            return None
        async with endpoint.lock:
            if endpoint.agreed is None:
                endpoint.agreed = await self._open_shared_memory(endpoint, self._shared_memory, budget.remaining_s)
        return Sharing(self._shared_memory, endpoint.peer) if endpoint.agreed else None

    async def _open_shared_memory(self, endpoint: Endpoint, memory: SharedMemory, remaining_s: float) -> bool | None:
        """Whether it was agreed on; None: the stage could not be asked, so another call may."""
        nonce = os.urandom(16)
        segment = ""
        try:
            segment = memory.nonce_segment(nonce)
            request = stage_pb2.OpenSharedMemoryRequest(segment=segment, nonce=nonce, boot_id=boot_id())
            stub: Any = stage_pb2_grpc.StageServiceStub(endpoint.channel)
            answer = await stub.OpenSharedMemory(request, timeout=min(_AGREEMENT_TIMEOUT_S, remaining_s))
        except OSError:
            return False
        except grpc.aio.AioRpcError as error:
            return False if error.code() is grpc.StatusCode.UNIMPLEMENTED else None
        finally:
            if segment:
                memory.remove_nonce(segment)
        found = memory.read_nonce(answer.segment) if answer.accepted else None
        if found is None or found[1] != nonce:
            return False
        endpoint.peer, endpoint.session = found[0], answer.session
        return True


@dataclass(frozen=True)
class StageCall(Generic[Stub]):
    """What one call needs: the stub, and how tensors go there and come back."""

    stage: str
    stub: Stub
    metadata: list[tuple[str, str]]
    timeout_s: float
    sharing: Sharing | None
    chunk_bytes: int
    max_call_bytes: int
    _calls: list[Any] = field(default_factory=list)

    async def stream(
        self, rpc: Any, parameters: M, tensors: Iterable[WireTensor] | AsyncIterable[WireTensor] = ()
    ) -> AsyncIterator[Message | WireTensor]:
        """Calls a streaming-request rpc with parameters and tensors; gives its answers as they come.

        Args:
            rpc: method of the stub.
            parameters: first message of the request.
            tensors: the tensors after it, at hand or as they come; what they raise ends the call and is raised here.
        """
        call = rpc(timeout=self.timeout_s, metadata=self.metadata)
        failures: list[Exception] = []
        writing = asyncio.create_task(self._write(call, parameters, tensors, failures))
        try:
            async for item in self.answers(call, failures):
                yield item
        finally:
            writing.cancel()
            await asyncio.wait([writing])

    async def unary(self, rpc: Any, request: Message) -> AsyncIterator[Message | WireTensor]:
        """Calls a rpc that takes one message; gives its answers as they come."""
        async for item in self.answers(rpc(request, timeout=self.timeout_s, metadata=self.metadata)):
            yield item

    async def answers(self, call: Any, failures: Sequence[Exception] = ()) -> AsyncIterator[Message | WireTensor]:
        """The answers of a call that was begun; `failures` is why its request could not be made, if so."""
        self._calls.append(call)
        ending = _Ending(call)
        try:
            async for item in receive(call, max_bytes=self.max_call_bytes, shared=self.sharing):
                yield item
        except InvalidRequest as error:
            # what a stage sends is not the caller's doing
            raise StageBroken(f"the {self.stage} stage answered badly: {error.message}", stage=self.stage) from error
        except grpc.aio.AioRpcError as error:
            actual = await ending.actual(error)
            if actual.code() is grpc.StatusCode.CANCELLED:
                # nobody here took it back: a stage, or something on the way to it, that is going away
                text = f"the {self.stage} stage ended the call: {actual.details()}"
                raise NotReady(text, reason=_ENDED, stage=self.stage) from None
            if actual.code() is not grpc.StatusCode.OK:
                raise actual from None
        except asyncio.CancelledError:
            # raised as well when it is `_write` that took the call back
            if failures and not _is_cancelled():
                raise failures[0] from None
            raise
        finally:
            call.cancel()

    def cancel(self) -> None:
        """Takes back what is still under way."""
        for call in self._calls:
            call.cancel()

    async def _write(
        self,
        call: Any,
        parameters: Message,
        tensors: Iterable[WireTensor] | AsyncIterable[WireTensor],
        failures: list[Exception],
    ) -> None:
        try:
            listening = await _written(call, [parameters])
            async for tensor in _as_they_come(tensors):
                if not listening:
                    return
                messages = send_tensors(type(parameters), [tensor], chunk_bytes=self.chunk_bytes, shared=self.sharing)
                listening = await _written(call, messages)
            if listening:
                with suppress(*_ENDED_BY_STAGE):
                    await call.done_writing()
        except Exception as error:
            failures.append(error)
            call.cancel()


async def _written(call: Any, messages: Iterable[Any]) -> bool:
    """Whether the stage still listens; if not, whoever reads its answers is told why."""
    for message in messages:
        try:
            await call.write(message)
        except _ENDED_BY_STAGE:
            return False
    return True


class _Ending:
    """How a stage ended a call.

    When a stage ends a call whose request is still being written, grpc.aio puts a status of its own in place of the
    stage's, before or after that one arrives. This hears of both, as a done callback.
    """

    def __init__(self, call: Any) -> None:
        self._actual: grpc.aio.AioRpcError | None = None
        self._arrived = asyncio.Event()
        call.add_done_callback(self._heard)

    async def actual(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """The error with the status that the stage gave, which may be OK."""
        if error.code() is not grpc.StatusCode.INTERNAL or error.details() != _WRITE_FAILED:
            return error
        with suppress(TimeoutError):
            async with asyncio.timeout(_STATUS_ARRIVES_S):
                await self._arrived.wait()
        return self._actual or error

    def _heard(self, call: Any) -> None:
        details = _at_once(call.details())
        if details != _WRITE_FAILED and self._actual is None:
            code, trailing = _at_once(call.code()), _at_once(call.trailing_metadata())
            self._actual = grpc.aio.AioRpcError(
                code, grpc.aio.Metadata(), trailing or grpc.aio.Metadata(), details, None
            )
            self._arrived.set()


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that does not wait, such as those that tell the status of a call that is done."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("the call is not done")


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _as_they_come(tensors: Iterable[WireTensor] | AsyncIterable[WireTensor]) -> AsyncIterator[WireTensor]:
    if isinstance(tensors, AsyncIterable):
        async for tensor in tensors:
            yield tensor
    else:
        for tensor in tensors:
            yield tensor


async def stage_status(endpoint: Endpoint, timeout_s: float = 2.0) -> stage_pb2.GetStatusResponse:
    """What the stage at an address says of itself.

    Raises:
        NotReady: it does not answer.
    """
    stub: Any = stage_pb2_grpc.StageServiceStub(endpoint.channel)
    try:
        return await stub.GetStatus(stage_pb2.GetStatusRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _join(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
