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
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc
import tenacity
from google.protobuf.message import Message
from opentelemetry.trace import SpanKind

from bunraku.errors import DeadlineExceeded, InvalidRequest, NotReady, StageBroken, from_rpc_error
from bunraku.v1 import stage_pb2, stage_pb2_grpc
from runtime import telemetry
from runtime.server import MAX_MESSAGE_BYTES, fast_deserializer
from runtime.shared_memory import SharedMemory, Sharing, boot_id
from runtime.tensors import CHUNK_BYTES, MAX_CALL_BYTES, WireTensor, receive, send_tensors, serialize

T = TypeVar("T")
Stub = TypeVar("Stub")
M = TypeVar("M", bound=Message)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # the StageClient retries, on another address; retries of the library would multiply with those
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # two channels to one address must not share a connection that has failed
    ("grpc.use_local_subchannel_pool", 1),
)
_AGREEMENT_TIMEOUT_S = 2.0
_RESOLVE_INTERVAL_S = 5.0
_REST_AFTER_FAILURE_S = 1.0


@dataclass(frozen=True)
class Retry:
    """When a call that found its stage not ready is tried again.

    Attributes:
        attempts: in all, the first included.
        first_wait_s, longest_wait_s: the wait doubles from one to the other, with jitter; a stage that says when to
            come back is believed up to the longest wait.
    """

    attempts: int = 8
    first_wait_s: float = 0.25
    longest_wait_s: float = 8.0


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
        retry: when a stage is not ready.
    """

    def __init__(
        self,
        stage: str,
        stub: Callable[..., Stub],
        addresses: Sequence[str],
        *,
        shared_memory: SharedMemory | None = None,
        retry: Retry = Retry(),
        chunk_bytes: int = CHUNK_BYTES,
        max_call_bytes: int = MAX_CALL_BYTES,
    ) -> None:
        if not addresses:
            raise ValueError(f"stage {stage} has no address")
        self.stage, self._stub, self._addresses = stage, stub, tuple(addresses)
        self._shared_memory, self._retry = shared_memory, retry
        self._chunk_bytes, self._max_call_bytes = chunk_bytes, max_call_bytes
        self._endpoints: dict[str, Endpoint] = {}
        self._resolved_at = -_RESOLVE_INTERVAL_S
        self._next = 0

    async def close(self) -> None:
        """Closes the channels; calls under way are cancelled."""
        endpoints, self._endpoints = list(self._endpoints.values()), {}
        await asyncio.gather(*(endpoint.channel.close(None) for endpoint in endpoints))

    async def endpoints(self) -> list[Endpoint]:
        """Every address of the stage at present."""
        now = time.monotonic()
        if now - self._resolved_at >= _RESOLVE_INTERVAL_S:
            self._resolved_at = now
            await self._resolve()
        return list(self._endpoints.values())

    async def retrying(self, attempt: Callable[[int], Awaitable[T]], budget: Budget) -> T:
        """Runs `attempt(number)` until it succeeds, while the stage is not ready and there is time.

        `attempt` must be safe to repeat: everything a stage computes is.

        Raises:
            NotReady: it never was; the message names the stage.
            DeadlineExceeded: the budget is spent.
        """
        policy = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(NotReady),
            stop=tenacity.stop_after_attempt(self._retry.attempts),
            wait=self._wait,
            sleep=asyncio.sleep,
            reraise=True,
        )
        async with asyncio.timeout(budget.remaining_s) as timeout:
            try:
                async for trial in policy:
                    with trial:
                        return await attempt(trial.retry_state.attempt_number)
            except NotReady as error:
                text = f"the {self.stage} stage is not available: {error.message}"
                raise NotReady(text, reason="STAGE_UNAVAILABLE", stage=self.stage, retry_after_s=5.0) from error
            except asyncio.CancelledError:
                if timeout.expired():
                    text = f"the time for this request ended in the {self.stage} stage"
                    raise DeadlineExceeded(text, stage=self.stage) from None
                raise
        raise AssertionError("tenacity ends with a result or an error")

    def _wait(self, state: tenacity.RetryCallState) -> float:
        backoff = tenacity.wait_random_exponential(self._retry.first_wait_s, self._retry.longest_wait_s)
        error = state.outcome.exception() if state.outcome else None
        asked = (error.retry_after_s or 0.0) if isinstance(error, NotReady) else 0.0
        return min(self._retry.longest_wait_s, max(asked, backoff(state)))

    @asynccontextmanager
    async def call(self, budget: Budget, *, generation: str = "", attempt: int = 1) -> AsyncIterator[StageCall[Stub]]:
        """One call on the address with the least work.

        Raises what the stage raised; an address that does not answer is NotReady.
        """
        endpoint = self._choose(await self.endpoints())
        sharing = await self._agree(endpoint)
        attributes = {
            telemetry.ATTRIBUTE_STAGE: self.stage,
            telemetry.ATTRIBUTE_ADDRESS: endpoint.address,
            telemetry.ATTRIBUTE_ATTEMPT: attempt,
            telemetry.ATTRIBUTE_GENERATION: generation,
        }
        endpoint.calls += 1
        ended_well = False
        try:
            with telemetry.span(telemetry.SPAN_STAGE_PREFIX + self.stage, attributes, kind=SpanKind.CLIENT):
                metadata = [*telemetry.outgoing(), (telemetry.METADATA_GENERATION, generation)]
                if sharing is not None:
                    metadata.append((telemetry.METADATA_SHARED_MEMORY, endpoint.session))
                stub = self._stub(TensorChannel(endpoint.channel))
                yield StageCall(
                    self.stage, stub, metadata, budget.remaining_s, sharing, self._chunk_bytes, self._max_call_bytes
                )
                ended_well = True
        except grpc.aio.AioRpcError as error:
            known = from_rpc_error(error, stage=self.stage)
            if isinstance(known, NotReady):
                endpoint.failed()
            raise known from error
        finally:
            endpoint.calls -= 1
            if sharing is not None and not ended_well:
                sharing.failed()

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

    async def _agree(self, endpoint: Endpoint) -> Sharing | None:
        """Shared memory with the process at an address; None where there is none to share."""
        if self._shared_memory is None:
            return None
        async with endpoint.lock:
            if endpoint.agreed is None:
                endpoint.agreed = await self._open_shared_memory(endpoint, self._shared_memory)
        return Sharing(self._shared_memory, endpoint.peer) if endpoint.agreed else None

    async def _open_shared_memory(self, endpoint: Endpoint, memory: SharedMemory) -> bool:
        nonce = os.urandom(16)
        segment = ""
        try:
            segment = memory.nonce_segment(nonce)
            request = stage_pb2.OpenSharedMemoryRequest(segment=segment, nonce=nonce, boot_id=boot_id())
            stub: Any = stage_pb2_grpc.StageServiceStub(endpoint.channel)
            answer = await stub.OpenSharedMemory(request, timeout=_AGREEMENT_TIMEOUT_S)
        except (OSError, grpc.aio.AioRpcError):
            return False
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

    async def stream(
        self, rpc: Any, parameters: M, tensors: Iterable[WireTensor] | AsyncIterable[WireTensor] = ()
    ) -> AsyncIterator[Message | WireTensor]:
        """Calls a streaming-request rpc with parameters and tensors; gives its answers as they come.

        Args:
            rpc: method of the stub.
            parameters: first message of the request.
            tensors: the tensors after it, at hand or as they come.
        """
        messages = self._messages(type(parameters), parameters, tensors)
        call = rpc(messages, timeout=self.timeout_s, metadata=self.metadata)
        async for item in self.answers(call):
            yield item

    async def unary(self, rpc: Any, request: Message) -> AsyncIterator[Message | WireTensor]:
        """Calls a rpc that takes one message; gives its answers as they come."""
        async for item in self.answers(rpc(request, timeout=self.timeout_s, metadata=self.metadata)):
            yield item

    async def answers(self, call: Any) -> AsyncIterator[Message | WireTensor]:
        try:
            async for item in receive(call, max_bytes=self.max_call_bytes, shared=self.sharing):
                yield item
        except InvalidRequest as error:
            # what a stage sends is not the caller's doing
            raise StageBroken(f"the {self.stage} stage answered badly: {error.message}", stage=self.stage) from error
        finally:
            call.cancel()

    async def _messages(
        self, message_type: type[M], parameters: M, tensors: Iterable[WireTensor] | AsyncIterable[WireTensor]
    ) -> AsyncIterator[Any]:
        yield parameters
        async for tensor in _as_they_come(tensors):
            for message in send_tensors(message_type, [tensor], chunk_bytes=self.chunk_bytes, shared=self.sharing):
                yield message


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
