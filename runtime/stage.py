"""What every stage has beside its own rpcs: state, admission, memory agreement, status.

A service holds one `StageRuntime` and uses it to receive and send tensors and to reach the device; the interceptor in
`runtime.server` asks it whether a call may begin.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from bunraku.errors import NotReady, StageBroken
from bunraku.v1 import stage_pb2, stage_pb2_grpc
from runtime import telemetry
from runtime.bundles import Bundle
from runtime.fingerprint import fingerprint
from runtime.gpu import GpuThread
from runtime.memory import MemoryUse, device_memory, device_name, host_memory
from runtime.shared_memory import LOST, SharedMemory, Sharing, boot_id
from runtime.telemetry import METADATA_GENERATION, METADATA_LOAD, METADATA_REVISION, METADATA_SHARED_MEMORY
from runtime.tensors import CHUNK_BYTES, MAX_CALL_BYTES, TensorData, WireTensor, receive, receive_call, send_tensors

M = TypeVar("M", bound=Message)
State = stage_pb2.StageState
_RETRY_AFTER_S = 1.0
_NONCE_STAYS_S = 10.0


@dataclass(frozen=True)
class Limits:
    """Bounds of a stage.

    Attributes:
        max_concurrent: calls that are worked on at the same time.
        max_queued: calls that may wait beyond those; one more is refused.
        max_call_bytes: tensors of one call together.
        chunk_bytes: payload of a tensor message.
    """

    max_concurrent: int = 1
    max_queued: int = 8
    max_call_bytes: int = MAX_CALL_BYTES
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True)
class LoadedComponent:
    """A model that has been loaded, for the status."""

    name: str
    parameters: int
    size_bytes: int
    dtype: str
    sha256: str = ""
    loras: tuple[str, ...] = ()  # with their multipliers


@dataclass(eq=False)
class _Work:
    rpc: str
    generation: str
    begun: float = field(default_factory=time.monotonic)


class StageRuntime:
    """State, device and admission of one stage process.

    Args:
        stage: `encoder`, `pose`, `denoiser` or `vae`.
        bundle: whose models it serves.
        device: as torch names it.
        limits: bounds.
        shared_memory: for handing tensors over on this host; None: only bytes.
        memory_mode: how weights are placed.

    Attributes:
        decisive: settings of a service that change what it computes, by name; to be filled while it loads.
        revision: of what the stage computes from the same inputs; empty until it has loaded.
        warm_up_s: seconds of the first computation on the loaded models; None: there was none.
    """

    def __init__(
        self,
        stage: str,
        bundle: Bundle,
        *,
        device: str = "cpu",
        limits: Limits = Limits(),
        shared_memory: SharedMemory | None = None,
        memory_mode: stage_pb2.MemoryMode.ValueType = stage_pb2.MemoryMode.MEMORY_MODE_UNSPECIFIED,
    ) -> None:
        self.stage, self.bundle, self.device, self.limits = stage, bundle, device, limits
        self.shared_memory = shared_memory
        self.memory_mode = memory_mode
        self.gpu = GpuThread(f"{stage}-gpu", on_fault=self._on_fault)
        self.components: list[LoadedComponent] = []
        self.decisive: dict[str, str] = {}
        self.fingerprints: dict[str, str] = {}
        self.revision = ""
        self.attention_backend = ""
        self.warm_up_s: float | None = None
        self.state: State.ValueType = State.STAGE_STATE_LOADING
        self.state_detail = "starting"
        self.broken = asyncio.Event()
        self.sessions: dict[str, str] = {}
        self._loop = asyncio.get_running_loop()
        self._start = datetime.now(UTC)
        self._slots = asyncio.Semaphore(limits.max_concurrent)
        self._work: list[_Work] = []
        self._work_ended = asyncio.Event()
        self._queued = 0
        self._calls: dict[int, Sharing] = {}

    @property
    def draining(self) -> bool:
        """Whether work should be finished soon or given back."""
        return self.state == State.STAGE_STATE_DRAINING

    def set_state(self, state: State.ValueType, detail: str = "") -> None:
        self.state, self.state_detail = state, detail

    def identify(self) -> None:
        """Works out what tells this stage from one that would compute something else; called when it has loaded.

        Reads samples of the components' files, so it must not run on the event loop.
        """
        known = self.bundle.components
        self.fingerprints = {c.name: fingerprint(known[c.name]) for c in self.components if c.name in known}
        decisive = (
            self.stage,
            self.bundle.name,
            self.bundle.revision,
            [(c.name, c.sha256, c.dtype, self.fingerprints.get(c.name, "")) for c in self.components],
            self.attention_backend,
            sorted(self.decisive.items()),
            program_version(),
        )
        self.revision = hashlib.sha256(repr(decisive).encode()).hexdigest()[:32]

    def greeting(self) -> tuple[tuple[str, str], ...]:
        """Initial metadata of every answer: what computes it, and how busy the stage is."""
        load = f"{len(self._work)}/{self._queued}/{self.limits.max_concurrent}"
        return ((METADATA_REVISION, self.revision), (METADATA_LOAD, load))

    @asynccontextmanager
    async def admitted(self, rpc: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        """Lets a call begin when it is its turn.

        Raises:
            NotReady: weights are loading, the stage is draining or broken, or too many calls wait.
        """
        self._refuse_unless_serving()
        if self._slots.locked() and self._queued >= self.limits.max_queued:
            raise NotReady(
                f"the {self.stage} stage has {self._queued} calls waiting already",
                reason="STAGE_QUEUE_FULL",
                stage=self.stage,
                retry_after_s=_RETRY_AFTER_S,
            )
        self._queued += 1
        try:
            waiting = telemetry.span(telemetry.SPAN_ADMISSION) if self._slots.locked() else nullcontext()
            with telemetry.ADMISSION_SECONDS.time(stage=self.stage), waiting:
                await self._slots.acquire()
        finally:
            self._queued -= 1
        work = _Work(rpc, _metadata(context).get(METADATA_GENERATION, ""))
        self._work.append(work)
        try:
            self._refuse_unless_serving()
            yield
        finally:
            self._work.remove(work)
            self._work_ended.set()
            self._slots.release()

    @asynccontextmanager
    async def lending(self, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        """Keeps what a call has in shared memory, and gives it up when the caller has gone.

        After an error of ours the caller still reads what was sent before it, such as a checkpoint.

        Raises:
            NotReady: the caller agreed on shared memory with another process than this one; it may agree anew.
        """
        session = _metadata(context).get(METADATA_SHARED_MEMORY, "")
        peer = self.sessions.get(session)
        if session and (peer is None or self.shared_memory is None):
            text = f"this process of the {self.stage} stage has not agreed on shared memory with the caller"
            raise NotReady(text, reason=LOST, stage=self.stage)
        if self.shared_memory is not None and peer is not None:
            self._calls[id(context)] = Sharing(self.shared_memory, peer)
        try:
            yield
        except asyncio.CancelledError:
            if id(context) in self._calls:
                self._calls[id(context)].ended()
            raise
        finally:
            self._calls.pop(id(context), None)

    async def receive_call(
        self, requests: AsyncIterator[M], context: grpc.aio.ServicerContext[Any, Any], names: Collection[str]
    ) -> tuple[M, dict[str, WireTensor]]:
        """The parameters and tensors of a call; see runtime.tensors.receive_call."""
        return await receive_call(
            requests, names, max_bytes=self.limits.max_call_bytes, shared=self._calls.get(id(context))
        )

    def receive(
        self, requests: AsyncIterator[M], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[M | WireTensor]:
        """Messages and tensors of a call as they come; see runtime.tensors.receive."""
        return receive(requests, max_bytes=self.limits.max_call_bytes, shared=self._calls.get(id(context)))

    def send(
        self, message_type: type[M], tensors: Iterable[WireTensor], context: grpc.aio.ServicerContext[Any, Any]
    ) -> Iterator[M | TensorData]:
        """The messages that carry tensors to the caller; see runtime.tensors.send_tensors."""
        return send_tensors(
            message_type, tensors, chunk_bytes=self.limits.chunk_bytes, shared=self._calls.get(id(context))
        )

    def status(self) -> stage_pb2.GetStatusResponse:
        """What GetStatus answers."""
        now = time.monotonic()
        response = stage_pb2.GetStatusResponse(
            stage=self.stage,
            state=self.state,
            state_detail=self.state_detail,
            bundle=self.bundle.name,
            bundle_revision=self.bundle.revision,
            components=[
                stage_pb2.Component(
                    name=c.name,
                    sha256=c.sha256,
                    parameters=c.parameters,
                    size_bytes=c.size_bytes,
                    dtype=c.dtype,
                    fingerprint=self.fingerprints.get(c.name, ""),
                    loras=c.loras,
                )
                for c in self.components
            ],
            device=self.device,
            device_name=device_name(self.device),
            memory_mode=self.memory_mode,
            vram=_memory(device_memory(self.device)),
            ram=_memory(host_memory()),
            queued_requests=self._queued,
            max_queued_requests=self.limits.max_queued,
            attention_backend=self.attention_backend,
            version=program_version(),
            revision=self.revision,
            max_concurrent_requests=self.limits.max_concurrent,
        )
        response.start_time.FromDatetime(self._start)
        for work in list(self._work):
            entry = response.work.add(rpc=work.rpc, generation=work.generation)
            entry.elapsed.FromNanoseconds(int((now - work.begun) * 1e9))
        return response

    def publish_levels(self) -> None:
        """Lets the metrics tell what this stage is like at the moment; they ask on a thread of their own."""
        stage = self.stage
        telemetry.CALLS_WAITING.follow(lambda: self._queued, stage=stage)
        telemetry.CALLS_IN_WORK.follow(lambda: len(self._work), stage=stage)
        telemetry.CALL_SLOTS.put(self.limits.max_concurrent, stage=stage)
        for state in State.values()[1:]:
            name = State.Name(state).removeprefix("STAGE_STATE_").lower()
            telemetry.STAGE_STATE.follow(partial(self._is_in, state), stage=stage, state=name)
        for memory, read in (("vram", lambda: device_memory(self.device)), ("ram", host_memory)):
            for kind in ("total", "free", "used", "peak"):
                telemetry.MEMORY_BYTES.follow(partial(_bytes, read, kind), stage=stage, memory=memory, kind=kind)

    def _is_in(self, state: State.ValueType) -> bool:
        return self.state == state

    async def idle(self, timeout_s: float) -> None:
        """Waits until nothing is worked on, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._work:
                    self._work_ended.clear()
                    await self._work_ended.wait()

    def _refuse_unless_serving(self) -> None:
        if self.state == State.STAGE_STATE_SERVING:
            return
        reason = State.Name(self.state).removeprefix("STAGE_STATE_")
        detail = f": {self.state_detail}" if self.state_detail else ""
        raise NotReady(
            f"the {self.stage} stage is {reason.lower()}{detail}",
            reason=f"STAGE_{reason}",
            stage=self.stage,
            retry_after_s=_RETRY_AFTER_S,
        )

    def _on_fault(self, fault: StageBroken) -> None:
        def on_loop() -> None:
            self.set_state(State.STAGE_STATE_BROKEN, fault.message)
            self.broken.set()

        self._loop.call_soon_threadsafe(on_loop)


class StageServicer(stage_pb2_grpc.StageServiceServicer):
    """StageService of any stage."""

    def __init__(self, runtime: StageRuntime) -> None:
        self._runtime = runtime

    async def GetStatus(
        self, request: stage_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> stage_pb2.GetStatusResponse:
        # reading the device may wait for its driver
        return await asyncio.to_thread(self._runtime.status)

    async def OpenSharedMemory(
        self, request: stage_pb2.OpenSharedMemoryRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> stage_pb2.OpenSharedMemoryResponse:
        memory = self._runtime.shared_memory
        if memory is None or request.boot_id != boot_id():
            return stage_pb2.OpenSharedMemoryResponse()
        found = memory.read_nonce(request.segment)
        if found is None or found[1] != request.nonce:
            return stage_pb2.OpenSharedMemoryResponse()
        peer, nonce = found
        try:
            segment = memory.nonce_segment(nonce)
        except OSError:
            return stage_pb2.OpenSharedMemoryResponse()
        # the caller reads it at once; it need not stay longer than its answer takes
        asyncio.get_running_loop().call_later(_NONCE_STAYS_S, memory.remove_nonce, segment)
        self._forget_dead_sessions(memory)
        session = f"{peer}-{memory.instance}"
        self._runtime.sessions[session] = peer
        return stage_pb2.OpenSharedMemoryResponse(accepted=True, segment=segment, session=session)

    def _forget_dead_sessions(self, memory: SharedMemory) -> None:
        sessions = self._runtime.sessions
        for session in [session for session, peer in sessions.items() if not memory.is_alive(peer)]:
            del sessions[session]


def program_version() -> str:
    """Version of the installed package."""
    try:
        return version("bunraku")
    except PackageNotFoundError:
        return "0"


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _bytes(read: Callable[[], MemoryUse], kind: str) -> float:
    return float(getattr(read(), f"{kind}_bytes"))


def _memory(use: MemoryUse) -> stage_pb2.Memory:
    return stage_pb2.Memory(
        total_bytes=use.total_bytes, free_bytes=use.free_bytes, used_bytes=use.used_bytes, peak_bytes=use.peak_bytes
    )
