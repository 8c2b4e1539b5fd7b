"""A stage's server from its start to its end: interceptor, health, reflection, message limits, draining.

`run` serves from the first moment on (health says NOT_SERVING and every rpc says what is being loaded), loads the
models on the device's thread, serves, and on SIGTERM finishes what it has and takes nothing new.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from opentelemetry.trace import SpanKind

from bunraku.errors import BunrakuError, NotThereYet, StageBroken, to_status
from bunraku.tls import NO_TLS, TlsFiles
from bunraku.v1 import stage_pb2, stage_pb2_grpc
from runtime import telemetry
from runtime.budget import DoesNotFit
from runtime.bundles import BundleError
from runtime.stage import StageRuntime, StageServicer, State
from runtime.tensors import deserializer, serialize

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# Message and details travel in the trailer, of which gRPC takes 8 KiB; the details are in it in base64 and once more
# as the plain message, percent-encoded
MAX_STATUS_BYTES = 2048
_END_OF_WORK_S = 5.0
_log = logging.getLogger(__name__)
_SERVING = health_pb2.HealthCheckResponse.ServingStatus.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.ServingStatus.NOT_SERVING

Context = grpc.aio.ServicerContext[Any, Any]
Around = Callable[[str, Context], AbstractAsyncContextManager[None]]

# What may be on its way before the receiver has read it: left to its own estimate gRPC lets it grow, and with it the
# receiver's memory (docs/decisions/0003-tensor-stream.md)
FLOW_CONTROL = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4 * 1024 * 1024))
# How long the other side may take to answer a ping. It is the second of the two that ends a connection: the first is
# what the documentation names, and does nothing where the second is longer (60 s unless set)
PING_TIMEOUT = (("grpc.keepalive_timeout_ms", 8_000), ("grpc.http2.ping_timeout_ms", 8_000))
# The client pings every 10 s (runtime.client); a server that allowed less would answer "too_many_pings"
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    *FLOW_CONTROL,
    ("grpc.so_reuseport", 0),
    # a caller that is frozen or cut off does not keep the device: its calls end after this and PING_TIMEOUT together
    ("grpc.keepalive_time_ms", 5_000),
    *PING_TIMEOUT,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class Service(Protocol):
    """A stage's own service: loads its models and warms up, then answers its rpcs."""

    full_name: str

    def load(self) -> None:
        """Builds and fills the models, and computes with them once; runs on the device's thread, before any rpc is let in."""

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the generated servicer."""


@dataclass(frozen=True)
class ServerSettings:
    """How a stage serves.

    Attributes:
        address: `host:port` to listen on; port 0 takes a free one.
        grace_s: seconds that work in flight has after SIGTERM.
        otlp_endpoint: of an OpenTelemetry collector; empty: no traces.
        tls: with a certificate calls must come over TLS; with a CA, from clients that have a certificate of it.
        health_address: `host:port` where grpc.health.v1 alone is served without TLS; empty: nowhere.
        metrics_address: `host:port` where Prometheus finds the metrics over HTTP; empty: nowhere.
    """

    address: str = "127.0.0.1:0"
    grace_s: float = 30.0
    otlp_endpoint: str = ""
    tls: TlsFiles = NO_TLS
    health_address: str = ""
    metrics_address: str = ""


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs only
    """Wraps every rpc, of all four kinds, in the same context managers, and gives tensor rpcs their fast framing."""

    def __init__(self, *around: Around) -> None:
        self._around = around

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        return self._wrapped(handler, method)

    def _wrapped(self, handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        wrapped = self._streaming(behaviour, method) if handler.response_streaming else self._unary(behaviour, method)
        return make(
            wrapped,
            request_deserializer=fast_deserializer(handler.request_deserializer),
            response_serializer=serialize,
        )

    def _unary(self, behaviour: Any, method: str) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with AsyncExitStack() as stack:
                for around in self._around:
                    await stack.enter_async_context(around(method, context))
                return await behaviour(request, context)

        return call

    def _streaming(self, behaviour: Any, method: str) -> Any:
        # not an async generator: grpc would leave a cancelled one to the garbage collector, with all that it holds
        async def call(request: Any, context: Context) -> None:
            async with AsyncExitStack() as stack:
                for around in self._around:
                    await stack.enter_async_context(around(method, context))
                responses = await stack.enter_async_context(aclosing(behaviour(request, context)))
                async for response in responses:
                    with caller_may_be_gone():
                        await context.write(response)

        return call


def fast_deserializer(generated: Any) -> Any:
    """Framing read by hand for a message type that carries tensors, the generated function for any other."""
    message_type: Any = getattr(generated, "__self__", None)
    fields = getattr(getattr(message_type, "DESCRIPTOR", None), "fields_by_name", {})
    return deserializer(message_type) if "tensor_data" in fields else generated


@asynccontextmanager
async def translated(method: str, context: Context) -> AsyncIterator[None]:
    """Turns what an rpc raises into a status with details; the only place where that happens."""
    try:
        yield
    except (asyncio.CancelledError, KeyboardInterrupt, SystemExit, grpc.aio.BaseError):
        # of grpc.aio itself: the call was aborted or the server has stopped, so nobody can be told anything
        raise
    except BaseException as error:
        known = as_bunraku_error(error, method)
        if isinstance(known, StageBroken):
            _log.exception("%s failed", method)
        status = to_status(known)
        if status.ByteSize() > MAX_STATUS_BYTES:
            status = _shortened(status)
        with caller_may_be_gone():
            await context.abort_with_status(rpc_status.to_status(status))  # type: ignore[attr-defined]  # not in its stubs


@contextmanager
def caller_may_be_gone() -> Iterator[None]:
    """Ends a call whose caller left an instant ago as grpc.aio ends it an instant later."""
    try:
        yield
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def _shortened(status: status_pb2.Status) -> status_pb2.Status:
    """The same with the beginning of its message, without the field violations that the message lists as well."""
    details = [detail for detail in status.details if not detail.Is(error_details_pb2.BadRequest.DESCRIPTOR)]
    message = status.message.encode()[: MAX_STATUS_BYTES // 2].decode(errors="ignore")
    return status_pb2.Status(code=status.code, message=f"{message} ...", details=details)


def as_bunraku_error(error: BaseException, method: str = "") -> BunrakuError:
    """The error itself, the first of a group, or StageBroken for a bug."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, BunrakuError):
        return error
    if isinstance(error, NotImplementedError):
        # what grpc's generated servicer raises for a method that is not overridden
        return NotThereYet(f"{method.rpartition('/')[2]} is in the contract, but not in this version yet")
    return StageBroken(f"{type(error).__name__}: {error}", reason="BUG")


@asynccontextmanager
async def traced(method: str, context: Context) -> AsyncIterator[None]:
    """A span of the caller's trace around an rpc."""
    parent = telemetry.incoming(context.invocation_metadata())
    with telemetry.span(method.removeprefix("/"), kind=SpanKind.SERVER, parent=parent):
        yield


@contextmanager
def _counted(stage: str, rpc: str) -> Iterator[None]:
    """Counts a call under the status that it ends with."""
    status = "OK"
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        status = "CANCELLED"
        raise
    except BaseException as error:
        status = as_bunraku_error(error).status.name
        raise
    finally:
        telemetry.CALLS.add(stage=stage, rpc=rpc, status=status)


def build_server(*around: Around) -> grpc.aio.Server:
    """A server whose rpcs run inside `around`, outermost first; errors are translated and calls are traced."""
    return grpc.aio.server(interceptors=[CallInterceptor(translated, traced, *around)], options=SERVER_OPTIONS)


def listen(server: grpc.aio.Server, address: str, tls: TlsFiles) -> int:
    """Takes an address, `host:port`, for a server that has not started; gives the port.

    Raises:
        OSError: the address is taken, or a certificate cannot be used.
    """
    try:
        if tls:
            return server.add_secure_port(address, tls.server_credentials())
        return server.add_insecure_port(address)
    except (RuntimeError, ValueError) as error:
        raise OSError(f"cannot listen on {address}: {error}") from error


def health_server(servicer: Any, address: str) -> grpc.aio.Server:
    """A server of grpc.health.v1 alone, without TLS: the probes of Kubernetes know no certificates. Not started yet."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    listen(server, address, NO_TLS)
    return server


class StageServer:
    """A stage that listens; `start` before the models are loaded, `load`, then `drain`."""

    def __init__(self, service: Service, runtime: StageRuntime) -> None:
        self._service, self._runtime = service, runtime
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in its stubs
        self._server = build_server(self._admitted)
        self._service.add_to(self._server)
        stage_pb2_grpc.add_StageServiceServicer_to_server(StageServicer(runtime), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [service.full_name, stage_pb2.DESCRIPTOR.services_by_name["StageService"].full_name]
        reflection.enable_server_reflection([*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], self._server)
        self._probed: grpc.aio.Server | None = None
        self.port = 0

    @asynccontextmanager
    async def _admitted(self, method: str, context: Context) -> AsyncIterator[None]:
        """Work is let in one by one; what asks for the state is always answered."""
        if not method.startswith(f"/{self._service.full_name}/"):
            yield
            return
        stage, rpc = self._runtime.stage, method.rpartition("/")[2]
        with _counted(stage, rpc):
            async with self._runtime.admitted(rpc, context), self._runtime.lending(context):
                # the caller learns that work has begun: should this process die now, it died of this call or beside it
                with caller_may_be_gone():
                    await context.send_initial_metadata(self._runtime.greeting())
                with telemetry.CALL_SECONDS.time(stage=stage, rpc=rpc):
                    yield

    async def start(self, address: str, tls: TlsFiles = NO_TLS, health_address: str = "") -> None:
        """Listens; see `ServerSettings`. Raises OSError when an address is taken or a certificate is of no use."""
        self.port = listen(self._server, address, tls)
        await self._health.set("", _SERVING)
        await self._health.set(self._service.full_name, _NOT_SERVING)
        if health_address:
            self._probed = health_server(self._health, health_address)
            await self._probed.start()
        await self._server.start()

    async def load(self) -> None:
        """Loads the models and lets work in."""
        self._runtime.set_state(State.STAGE_STATE_LOADING, f"loading {self._runtime.bundle.name}")
        begun = time.monotonic()
        await self._runtime.gpu.run(self._service.load)
        await asyncio.to_thread(self._runtime.identify)
        took_s = time.monotonic() - begun
        telemetry.LOAD_SECONDS.put(took_s, stage=self._runtime.stage)
        _log.info("%s: loaded in %.1f s", self._runtime.stage, took_s)
        warm_up_s = self._runtime.warm_up_s
        self._runtime.set_state(
            State.STAGE_STATE_SERVING, "" if warm_up_s is None else f"warmed up in {warm_up_s:.1f} s"
        )
        await self._health.set(self._service.full_name, _SERVING)

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new, waits for what is in work up to `grace_s`, then ends it."""
        if self._runtime.state != State.STAGE_STATE_BROKEN:
            self._runtime.set_state(State.STAGE_STATE_DRAINING)
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        if self._probed is not None:
            await self._probed.stop(None)
        # calls that were ended at the end of the grace period let go of the device first
        await asyncio.to_thread(self._runtime.gpu.shutdown, _END_OF_WORK_S)
        await self._runtime.idle(_END_OF_WORK_S)
        if self._runtime.shared_memory is not None:
            self._runtime.shared_memory.close()


async def run(service: Service, runtime: StageRuntime, settings: ServerSettings) -> int:
    """Serves until SIGTERM or SIGINT, or until the device breaks.

    Returns:
        The process's exit status: 0 after a signal, 1 when loading failed or the device broke, so that whoever
        started it starts it again.
    """
    provider = telemetry.configure(runtime.stage, settings.otlp_endpoint)
    stop = stop_signal()
    server = StageServer(service, runtime)
    watching = asyncio.create_task(telemetry.watch_event_loop())
    runtime.publish_levels()
    with telemetry.metrics_endpoint(settings.metrics_address):
        await server.start(settings.address, settings.tls, settings.health_address)
        _log.info("%s: listening on port %d", runtime.stage, server.port)
        loading = asyncio.create_task(server.load())
        status = 0
        try:
            status = await _until_ended(loading, stop, runtime)
        finally:
            loading.cancel()
            await server.drain(settings.grace_s if status == 0 else 1.0)
            watching.cancel()
            if provider is not None:
                provider.shutdown()
    return status


async def _until_ended(loading: asyncio.Task[None], stop: asyncio.Event, runtime: StageRuntime) -> int:
    stopped = asyncio.create_task(stop.wait())
    broken = asyncio.create_task(runtime.broken.wait())
    try:
        await asyncio.wait({loading, stopped, broken}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and (error := loading.exception()) is not None:
            says_enough = isinstance(error, BundleError | DoesNotFit)  # what to change; where in the code is no help
            _log.error("%s: %s", runtime.stage, error, exc_info=None if says_enough else error)
            return 1
        await asyncio.wait({stopped, broken}, return_when=asyncio.FIRST_COMPLETED)
        if broken.done():
            _log.error("%s: %s", runtime.stage, runtime.state_detail)
            return 1
        return 0
    finally:
        stopped.cancel()
        broken.cancel()


def stop_signal() -> asyncio.Event:
    """Set by SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    return stop
