"""Calls to stages: the mirror of runtime.server.

A `StageClient` sends a call to the replica with the most free slots (runtime.replicas), agrees on shared memory where
both sides share a host, passes the deadline and the trace on, and turns a failed call back into the error that the
stage raised. A call that one replica does not take goes to another at once.
"""

from __future__ import annotations

import asyncio
import os
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
from grpc_status import rpc_status
from opentelemetry.trace import SpanKind

from bunraku.errors import DeadlineExceeded, InvalidRequest, NotReady, StageBroken, from_rpc_error
from bunraku.tls import NO_TLS, TlsFiles
from bunraku.v1 import stage_pb2, stage_pb2_grpc
from runtime import telemetry
from runtime.edges import Edge
from runtime.replicas import Endpoint, Replicas
from runtime.server import FLOW_CONTROL, MAX_MESSAGE_BYTES, PING_TIMEOUT, fast_deserializer
from runtime.shared_memory import LOST, SharedMemory, Sharing, boot_id
from runtime.tensors import CHUNK_BYTES, MAX_CALL_BYTES, WireTensor, receive, send_tensors, serialize

T = TypeVar("T")
Stub = TypeVar("Stub")
M = TypeVar("M", bound=Message)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    *FLOW_CONTROL,
    # a stage that is frozen, or a network that swallows everything, is noticed after this and PING_TIMEOUT together
    ("grpc.keepalive_time_ms", 10_000),
    *PING_TIMEOUT,
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
# What grpc.aio says of a call whose request could not be written on, whatever the reason
_WRITE_FAILED = "Internal error from Core"
_STATUS_ARRIVES_S = 1.0
_ENDED = "STAGE_ENDED_CALL"
# Reason of a NotReady after which the process that worked on the call is gone, or cannot be reached
LOST_AT_WORK = "STAGE_LOST_AT_WORK"
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
            come back is believed up to the longest wait, and where another replica may take the call there is none.
        losses: stages that may die while they work on it, before it is taken to be what kills them.
    """

    attempts: int = 1000
    patience_s: float = 120.0
    first_wait_s: float = 0.25
    longest_wait_s: float = 4.0
    losses: int = 5

    def wait_s(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt."""
        backoff = tenacity.wait_random_exponential(self.first_wait_s, self.longest_wait_s)
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, NotReady) else None
        if asked is None:
            return backoff(state)
        return 0.0 if asked == 0 else min(self.longest_wait_s, max(asked, backoff(state)))


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
        StageBroken: too many stages have died while they worked on it.
        DeadlineExceeded: the budget is spent.
    """
    losses = 0

    async def counted(number: int) -> T:
        nonlocal losses
        try:
            return await attempt(number)
        except NotReady as error:
            losses += error.reason == LOST_AT_WORK
            if losses < retry.losses:
                raise
            text = f"the {error.stage} stage died {losses} times while it worked on this: {error.message}"
            raise StageBroken(text, reason=LOST_AT_WORK, stage=error.stage) from error

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
        async with within(budget):
            async for trial in policy:
                with trial:
                    return await counted(trial.retry_state.attempt_number)
    except NotReady as error:
        if not error.stage:
            raise
        text = f"the {error.stage} stage is not available: {error.message}"
        raise NotReady(text, reason="STAGE_UNAVAILABLE", stage=error.stage, retry_after_s=5.0) from error
    raise AssertionError("tenacity ends with a result or an error")


@asynccontextmanager
async def within(budget: Budget) -> AsyncIterator[None]:
    """Ends its block when the time of the request is over. Raises DeadlineExceeded then."""
    try:
        async with asyncio.timeout(budget.remaining_s):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the time for this request is over") from None


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


def open_channel(address: str, tls: TlsFiles = NO_TLS, server_name: str = "") -> grpc.aio.Channel:
    """A channel with this system's options. The caller closes it.

    Args:
        tls: files of this side; without any, the channel is not encrypted.
        server_name: that the server's certificate must be of; empty: the host of the address.

    Raises:
        OSError: a file cannot be read.
    """
    if not tls:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    named = (("grpc.ssl_target_name_override", server_name),) if server_name else ()
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=(*CHANNEL_OPTIONS, *named))


class StageClient(Generic[Stub]):
    """Calls one stage.

    Args:
        stage: its name, for errors and spans.
        stub: the generated stub class.
        addresses: `host:port`, one or several; a host name that resolves to several addresses stands for all of them.
        shared_memory: of this process; None: tensors go as bytes.
        tls: files of this side; with any, the stage's certificate must be of the host name in the address.
    """

    def __init__(
        self,
        stage: str,
        stub: Callable[..., Stub],
        addresses: Sequence[str],
        *,
        shared_memory: SharedMemory | None = None,
        tls: TlsFiles = NO_TLS,
        chunk_bytes: int = CHUNK_BYTES,
        max_call_bytes: int = MAX_CALL_BYTES,
    ) -> None:
        self.stage, self._stub = stage, stub
        self._shared_memory, self._tls = shared_memory, tls
        self._chunk_bytes, self._max_call_bytes = chunk_bytes, max_call_bytes
        self._replicas = Replicas(stage, addresses, self._connect)

    async def close(self) -> None:
        """Closes the channels; calls under way are cancelled."""
        await self._replicas.close()

    async def endpoints(self) -> list[Endpoint]:
        """Every address of the stage at present."""
        return await self._replicas.known()

    async def revisions(self) -> set[str]:
        """Of what the replicas compute at present; usually one, empty while none has said."""
        return await self._replicas.revisions()

    def _connect(self, address: str, host: str) -> grpc.aio.Channel:
        return open_channel(address, self._tls, host)

    @asynccontextmanager
    async def call(self, budget: Budget, *, generation: str = "", attempt: int = 1) -> AsyncIterator[StageCall[Stub]]:
        """One call on the replica with the most free slots.

        Raises what the stage raised; an address that does not answer is NotReady.
        """
        endpoint = await self._replicas.take()
        sharing: Sharing | None = None
        result = "failed"
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
            result = "succeeded"
        except grpc.aio.AioRpcError as error:
            known = from_rpc_error(error, stage=self.stage)
            if isinstance(known, NotReady):
                result = "not_ready"
                self._avoid(endpoint, known)
            raise known from error
        except NotReady as error:
            result = "not_ready"
            if error.reason in (LOST, LOST_AT_WORK, _ENDED):
                self._avoid(endpoint, error)
            raise
        finally:
            telemetry.ATTEMPTS.add(stage=self.stage, result=result)
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
            self.stage, stub, metadata, budget.remaining_s, endpoint, sharing, self._chunk_bytes, self._max_call_bytes
        )
        try:
            yield call
        finally:
            call.cancel()

    def _avoid(self, endpoint: Endpoint, error: NotReady) -> None:
        """Has others tried first for a while: one of them at once, if there is one that may take the call."""
        if error.reason in (LOST, LOST_AT_WORK, _ENDED, NotReady.default_reason):
            endpoint.failed()
        else:
            # it has answered: it loads, drains or has enough to do
            endpoint.rest()
        if self._replicas.has_other(endpoint):
            error.retry_after_s = 0.0

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


@dataclass(eq=False)
class StageCall(Generic[Stub]):
    """What one call needs: the stub, and how tensors go there and come back.

    Attributes:
        revision: of what the stage computes, once the call has been let in.
    """

    stage: str
    stub: Stub
    metadata: list[tuple[str, str]]
    timeout_s: float
    endpoint: Endpoint
    sharing: Sharing | None
    chunk_bytes: int
    max_call_bytes: int
    revision: str = ""
    _begun: bool = False
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
            edge = Edge(self.stage, "received")
            async for item in receive(edge.receiving(call), max_bytes=self.max_call_bytes, shared=self.sharing):
                if not self._begun:
                    await self._take_greeting(call)
                if isinstance(item, WireTensor):
                    edge.passed(item)
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
            if actual.code() is grpc.StatusCode.UNAVAILABLE and await self._is_lost(call, actual):
                raise NotReady(str(actual.details()), reason=LOST_AT_WORK, stage=self.stage) from None
            if actual.code() is not grpc.StatusCode.OK:
                raise actual from None
        except asyncio.CancelledError:
            # raised as well when it is `_write` that took the call back
            if failures and not _is_cancelled():
                raise failures[0] from None
            raise
        finally:
            call.cancel()

    async def _take_greeting(self, call: Any) -> None:
        """Hears what came before the answers: that the call was let in, by what, and how busy the stage is."""
        self._begun = True
        if self.endpoint.greeted(await call.initial_metadata() or ()):
            self.revision = self.endpoint.revision

    async def _is_lost(self, call: Any, error: grpc.aio.AioRpcError) -> bool:
        """Whether the stage went away while it worked on the call, rather than said that it cannot."""
        if not self.revision:
            await self._take_greeting(call)
        return bool(self.revision) and rpc_status.from_call(error) is None  # type: ignore[arg-type]  # reads both kinds

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
            edge = Edge(self.stage, "sent")
            listening = await _written(call, [parameters])
            async for tensor in _as_they_come(tensors):
                if not listening:
                    return
                messages = send_tensors(type(parameters), [tensor], chunk_bytes=self.chunk_bytes, shared=self.sharing)
                listening = await _written(call, edge.sending(messages))
                edge.passed(tensor)
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
