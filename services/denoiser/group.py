"""The processes of a denoiser over several devices: a leader that serves, workers that do what it does.

The leader hands every call on (parameters and tensors as they came) and says when to take a step; the ranks then compute
together (`parallel`) and only the leader answers. A connection between the leader and each worker carries these orders
and, every second, a sign of life. If one of them ends or falls silent the others end too, so that whoever started them
starts all of them again; a call under way fails with GroupBroken.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # missing in its stubs

from bunraku.errors import BunrakuError, NotReady
from runtime import telemetry
from runtime.gpu import WorkCancelled
from runtime.server import ServerSettings, Service, StageServer, run, stop_signal
from runtime.stage import StageRuntime, State
from runtime.tensors import WireTensor
from services.denoiser.model import DiffusionTransformer
from services.denoiser.parallel import DeviceTeam, connect

T = TypeVar("T")
_log = logging.getLogger(__name__)
_LINKS = "links"  # under which the leader says where the workers find it
_LAST_MOMENT_S = 10.0
_NOTICE_S = 0.5  # below the second that a broken stage leaves its calls


class GroupBroken(NotReady):
    """A process of the group is gone. All of them are started again; a call goes on from its last checkpoint then."""

    default_reason = "GROUP_BROKEN"


@dataclass(frozen=True)
class Patience:
    """Seconds that the processes of a group wait for each other."""

    join_s: float = 1200.0  # until all have been started and have loaded: what a startupProbe allows
    silence_s: float = 30.0  # without a sign of life
    beat_s: float = 1.0  # between two signs


@dataclass(frozen=True)
class Place:
    """Which of the processes this is, and where the leader (rank 0) is."""

    rank: int
    world_size: int
    leader: str
    port: int
    patience: Patience = Patience()


@dataclass(frozen=True)
class Message:
    """What goes over a link."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    parameters: bytes = b""
    tensors: Mapping[str, WireTensor] = field(default_factory=dict)


class Link:
    """A connection between the leader and a worker; a thread reads it, any thread may send."""

    def __init__(self, connection: socket.socket, patience: Patience) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(True)
        # also of a message that has begun
        seconds, microseconds = divmod(round(patience.silence_s * 1e6), 1_000_000)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, microseconds))
        self._connection = Connection(connection.detach())
        self._patience = patience
        self._sending = threading.Lock()

    def send(self, kind: str, *, parameters: bytes = b"", tensors: Iterable[WireTensor] = (), **fields: object) -> None:
        """Raises OSError when the other side is gone."""
        sent = list(tensors)
        described = [(tensor.name, tensor.dtype, tensor.shape) for tensor in sent]
        head = json.dumps({"kind": kind, "fields": fields, "tensors": described}).encode()
        with self._sending:
            self._connection.send_bytes(head)
            self._connection.send_bytes(parameters)
            for tensor in sent:
                self._connection.send_bytes(tensor.data)  # type: ignore[arg-type]  # arrays are buffers, numpy says so later

    def receive(self) -> Message:
        """Raises OSError or EOFError when the other side is gone, or BlockingIOError when it is silent."""
        head = json.loads(self._connection.recv_bytes())
        parameters = self._connection.recv_bytes()
        tensors = {name: self._tensor(name, dtype, shape) for name, dtype, shape in head["tensors"]}
        return Message(head["kind"], head["fields"], parameters, tensors)

    def follow(self, handle: Callable[[Message], None], on_end: Callable[[str], None]) -> None:
        """Starts the threads that read (until `on_end`, which is told why) and that give signs of life."""
        over = threading.Event()

        def read() -> None:
            try:
                while True:
                    message = self.receive()
                    if message.kind != "beat":
                        handle(message)
            except BlockingIOError:
                on_end(f"has been silent for {self._patience.silence_s:g} s")
            except (OSError, EOFError):
                on_end("is gone")
            finally:
                over.set()

        def beat() -> None:
            with suppress(OSError):
                while not over.wait(self._patience.beat_s):
                    self.send("beat")

        for work in (read, beat):
            threading.Thread(target=work, name=f"group-{work.__name__}", daemon=True).start()

    def _tensor(self, name: str, dtype: int, shape: list[int]) -> WireTensor:
        data = np.frombuffer(bytearray(self._connection.recv_bytes()), np.uint8)  # writable: torch shares it
        return WireTensor(name, dtype, tuple(shape), data)


class Leader:
    """Rank 0.

    Attributes:
        broken: why the group is; done when it is.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.broken: Future[GroupBroken] = Future()
        self.broken.set_running_or_notify_cancel()  # who waits for it may be cancelled; it may not
        self._closing = False
        self._links: dict[int, Link] = {}
        self._ready: SimpleQueue[tuple[int, str]] = SimpleQueue()
        self._calls = count()
        self._breaking = threading.Lock()
        self._team: DeviceTeam

    def join(self, device: torch.device, num_heads: int) -> None:
        """Waits until all are there. Raises OSError or torch's DistError when they do not come, ValueError as DeviceTeam."""
        place = self.place
        with _listener() as listener:
            store = _store(place)
            store.set(_LINKS, str(listener.getsockname()[1]))
            listener.settimeout(place.patience.join_s)
            while len(self._links) < place.world_size - 1:
                link = Link(listener.accept()[0], place.patience)
                # whoever is no worker of ours is let go
                with suppress(OSError, EOFError, ValueError, KeyError):
                    self._links[link.receive().fields["rank"]] = link
        for rank, link in self._links.items():
            link.follow(partial(self._heard, rank), partial(self._lost, rank))
        connect(store, place.rank, place.world_size, device)
        self._team = DeviceTeam(num_heads)

    def ready(self, model: DiffusionTransformer, weights: str) -> Callable[[], None]:
        """Makes the loaded model compute with the others', once all have loaded; returns the check before each block.

        Raises:
            GroupBroken: a worker is gone, has loaded other weights, or has not loaded in time.
        """
        until = time.monotonic() + self.place.patience.join_s
        missing = set(self._links)
        while missing:
            self._raise_if_broken()
            if time.monotonic() > until:
                raise GroupBroken(f"workers {sorted(missing)} of the group have not loaded")
            with suppress(Empty):
                rank, loaded = self._ready.get(timeout=0.1)
                if loaded != weights:
                    text = f"worker {rank} of the group has loaded other weights or settings: {loaded}, not {weights}"
                    raise GroupBroken(text)
                missing.discard(rank)
        self._team.join(model)
        return self._team.check

    def steps(self, parameters: bytes, tensors: Mapping[str, WireTensor], own: Iterator[T]) -> Iterator[T]:
        """The items of the leader's own run, each computed with the workers; on the thread that computes."""
        call = next(self._calls)
        try:
            self._order("begin", call, parameters, tensors.values())
            while True:
                self._order("step", call)
                try:
                    item = next(own)
                except StopIteration:
                    return
                yield item
        except (WorkCancelled, BunrakuError):
            raise  # on all ranks in the same place
        except Exception as error:
            # the others wait for this rank in the middle of a block, from where nothing brings them back
            with suppress(TimeoutError):
                raise self.broken.result(timeout=1.0) from error
            self._break(GroupBroken(f"the leader of the group failed: {error}"))
            raise
        finally:
            with suppress(GroupBroken):
                self._order("end", call)

    def watched(self, items: AsyncIterator[T]) -> AsyncIterator[T]:
        """The items, or GroupBroken as soon as the group is: the thread that computes them may be held up for good."""
        return _Watched(items, asyncio.wrap_future(self.broken))

    def close(self) -> None:
        """Lets the workers end."""
        self._closing = True
        for link in self._links.values():
            with suppress(OSError):
                link.send("quit")

    def _order(self, kind: str, call: int, parameters: bytes = b"", tensors: Iterable[WireTensor] = ()) -> None:
        """Tells all workers. Raises GroupBroken if the group is."""
        sent = list(tensors)
        for rank, link in self._links.items():
            self._raise_if_broken()
            try:
                link.send(kind, parameters=parameters, tensors=sent, call=call)
            except OSError:
                self._lost(rank, "is gone")
        self._raise_if_broken()

    def _heard(self, rank: int, message: Message) -> None:
        if message.kind == "ready":
            self._ready.put((rank, message.fields["weights"]))
        elif message.kind == "failed":
            text = f"worker {rank} of the group failed: {message.fields['text']}"
            self._break(GroupBroken(text))
        elif message.kind == "stopping":
            _log.info("worker %d of the group is to end: so is the group", rank)
            os.kill(os.getpid(), signal.SIGTERM)

    def _lost(self, rank: int, why: str) -> None:
        if not self._closing:
            self._break(GroupBroken(f"worker {rank} of the group {why}"))

    def _break(self, error: GroupBroken) -> None:
        with self._breaking:
            if not self.broken.done():
                self.broken.set_result(error)

    def _raise_if_broken(self) -> None:
        if self.broken.done():
            raise self.broken.result()


class _Watched(AsyncIterator[T], Generic[T]):
    def __init__(self, items: AsyncIterator[T], broken: asyncio.Future[GroupBroken]) -> None:
        self._items, self._broken = items, broken

    async def __anext__(self) -> T:
        item: asyncio.Future[T] = asyncio.ensure_future(anext(self._items))
        first: set[asyncio.Future[Any]] = {item, self._broken}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            item.cancel()
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            raise
        if not item.done():
            # most often what computes notices it at the same time
            await asyncio.wait({item}, timeout=_NOTICE_S)
            item.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at: nobody else will
            raise self._broken.result()
        return item.result()


class Worker:
    """Any other rank.

    Attributes:
        ended: the exit status of the process; done when the leader has ended, or the worker can do no more.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.ended: Future[int] = Future()
        self.ended.set_running_or_notify_cancel()
        self._device: torch.device
        self._link: Link
        self._orders: SimpleQueue[Message | None] = SimpleQueue()
        self._ending = threading.Lock()
        self._team: DeviceTeam

    def join(self, device: torch.device, num_heads: int) -> None:
        """As `Leader.join`."""
        place, self._device = self.place, device
        store = _store(place)
        address = (place.leader, int(store.get(_LINKS)))
        self._link = Link(socket.create_connection(address, timeout=place.patience.join_s), place.patience)
        self._link.send("hello", rank=place.rank)
        self._link.follow(self._heard, self._lost)
        connect(store, place.rank, place.world_size, device)
        self._team = DeviceTeam(num_heads)

    def ready(self, model: DiffusionTransformer, weights: str) -> Callable[[], None]:
        """As `Leader.ready`, without waiting."""
        self._team.join(model)
        self._link.send("ready", weights=weights)
        return self._team.check

    def follow(self, service: Following) -> None:
        """Does what the leader says until the group ends."""
        calls: dict[int, Iterator[Any]] = {}
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        try:
            while (order := self._orders.get()) is not None:
                call = order.fields["call"]
                if order.kind == "begin":
                    calls[call] = service.follow(order.parameters, order.tensors)
                elif order.kind == "end":
                    calls.pop(call, None)
                elif call in calls:
                    try:
                        next(calls[call], None)
                    except (WorkCancelled, BunrakuError):
                        del calls[call]  # the leader has met it too
        except Exception as error:
            _log.exception("rank %d cannot follow", self.place.rank)
            with suppress(OSError):
                self._link.send("failed", text=f"{type(error).__name__}: {error}")
            self.end(1)

    def stop(self) -> None:
        """Asks for the end of the group: this process has been told to end."""
        with suppress(OSError):
            self._link.send("stopping")

    def end(self, status: int) -> None:
        with self._ending:
            if not self.ended.done():
                self.ended.set_result(status)
        self._orders.put(None)

    def _heard(self, message: Message) -> None:
        if message.kind == "quit":
            self.end(0)
        else:
            self._orders.put(message)

    def _lost(self, why: str) -> None:
        if not self.ended.done():
            _log.error("the leader of the group %s", why)
        self.end(1)


class Following(Service, Protocol):
    """A service whose calls can be followed."""

    def follow(self, parameters: bytes, tensors: Mapping[str, WireTensor]) -> Iterator[Any]:
        """The steps of a call that the leader was given."""


class _WorkerService:
    """What a worker serves: it loads, and answers no rpc but those that every process answers."""

    def __init__(self, service: Service) -> None:
        self.full_name, self._service = service.full_name, service

    def load(self) -> None:
        self._service.load()

    def add_to(self, server: Any) -> None:
        """Nothing: calls go to the leader."""


async def serve_leader(leader: Leader, service: Service, runtime: StageRuntime, settings: ServerSettings) -> int:
    """As runtime.server.run, and ends with status 1 when the group is broken."""
    loop = asyncio.get_running_loop()

    def mark() -> None:
        runtime.set_state(State.STAGE_STATE_BROKEN, leader.broken.result().message)
        runtime.broken.set()

    def on_broken(_: object) -> None:
        _end_soon()
        loop.call_soon_threadsafe(mark)

    leader.broken.add_done_callback(on_broken)
    status = await run(service, runtime, settings)
    _end_soon()  # it may still wait for workers
    if status == 0:
        leader.close()
    return status


async def serve_worker(worker: Worker, service: Following, runtime: StageRuntime, settings: ServerSettings) -> int:
    """Health, metrics and the following of the leader, until it ends."""
    provider = telemetry.configure(runtime.stage, settings.otlp_endpoint)
    server = StageServer(_WorkerService(service), runtime)
    runtime.publish_levels()
    with telemetry.metrics_endpoint(settings.metrics_address):
        await server.start(settings.address, settings.tls, settings.health_address)
        status = await _until_ended(worker, service, server, settings.grace_s)
        _end_soon()
        await server.drain(0)
        if provider is not None:
            provider.shutdown()
    return status


async def _until_ended(worker: Worker, service: Following, server: StageServer, grace_s: float) -> int:
    """The life of a worker; gives its exit status."""
    stop = asyncio.create_task(stop_signal().wait())
    ended, loading = asyncio.wrap_future(worker.ended), asyncio.create_task(server.load())
    events: set[asyncio.Future[Any]] = {stop, ended}
    await asyncio.wait({loading, *events}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return 0 if stop.done() else 1
    if loading.exception() is not None:
        _log.error("%s", loading.exception(), exc_info=loading.exception())
        return 1
    threading.Thread(target=worker.follow, args=(service,), name="group-follow", daemon=True).start()
    await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        worker.stop()  # the leader hands out the checkpoint of what is under way, then ends everyone
        await asyncio.wait({ended}, timeout=grace_s)
    return ended.result() if ended.done() else 1


def _end_soon() -> None:
    """Ends the process even if a collective operation keeps one of its threads for good."""

    def end() -> None:
        os._exit(1)

    timer = threading.Timer(_LAST_MOMENT_S, end)
    timer.daemon = True
    timer.start()


def _store(place: Place) -> TCPStore:
    """Where torch.distributed's ranks find each other; a worker may be there before the leader."""
    is_leader = place.rank == 0
    return TCPStore(
        "localhost" if is_leader else place.leader,
        place.port,
        place.world_size,
        is_master=is_leader,
        timeout=timedelta(seconds=place.patience.join_s),
    )


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
