"""The whole system on one machine: starts the four stages and the gateway, keeps them running, stops them.

    async with Supervisor(system_programs(settings), data=settings.data) as supervisor:  # all five are ready
        await supervisor.watch()  # restarts what dies; raises SystemFailed when that does not help

Every program gets its settings through its environment, a session of its own (so that Ctrl-C in the terminal reaches
the supervisor alone, which then stops the gateway before the stages), and a log file. Its output goes straight to that
file: no pipe that a busy supervisor could let run full.

No program outlives the supervisor, even one that was killed with SIGKILL: on Linux the kernel kills a process whose
parent dies if the process has asked for it with prctl(PR_SET_PDEATHSIG). A preexec_fn that asked between fork and exec
would run Python code in a copy of a process with threads, where any lock may be held for ever. So a few lines of Python
run first in the new process, ask, make sure that the parent has not died before that, and become the program with
exec, which keeps what was asked for. The kernel takes the thread that started the process for its parent: the event
loop of a Supervisor must run on a thread that lasts, such as the main one.
"""

from __future__ import annotations

import asyncio
import enum
import fcntl
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bunraku.tls import NO_TLS, TlsFiles

STAGES = ("encoder", "pose", "denoiser", "vae")
GATEWAY = "gateway"
COMMANDS: dict[str, tuple[str, ...]] = {
    **{stage: (sys.executable, "-m", f"services.{stage}") for stage in STAGES},
    GATEWAY: (sys.executable, "-m", "gateway"),
}

_HOST = "127.0.0.1"
_LAST_LINES = 20
_POLL_S = 0.1
# After the time that a program was given to stop by itself
_MARGIN_S = 1.0
_PR_SET_PDEATHSIG = 1
_TIED_TO_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class SystemFailed(Exception):
    """The system cannot be started or cannot be kept running.

    Attributes:
        last_lines: of the log of the program that is to blame; may be empty.
    """

    def __init__(self, message: str, last_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.last_lines = tuple(last_lines)


@dataclass(frozen=True)
class Program:
    """A program of the system.

    Attributes:
        name: `encoder`, `pose`, `denoiser`, `vae` or `gateway`.
        command: what is run.
        address: `host:port` that it will listen on.
        service: name of its service in grpc.health.v1.
        environment: what it gets beside the environment of the supervisor.
        tls: what it is asked with how it is.
    """

    name: str
    command: tuple[str, ...]
    address: str
    service: str
    environment: Mapping[str, str]
    tls: TlsFiles = NO_TLS


@dataclass(frozen=True)
class SystemSettings:
    """What the system runs and where.

    Attributes:
        bundle: directory with bundle.toml.
        data: directory for generations, assets and logs.
        models: directory that the bundle's file names are relative to; None: the bundle's own.
        port: of the gateway; 0: a free one.
        devices: device of a stage, by its name; a stage that is not named chooses itself.
        grace_s: seconds that a program has to finish what it works on when it is stopped.
        otlp_endpoint: of an OpenTelemetry collector; empty: what the environment says.
        environments: of a stage, by its name: settings that it gets besides.
        certificates: directory as `make certs` writes it; the programs then talk over mutual TLS, and clients need a
            certificate too. None: none of that.
    """

    bundle: Path
    data: Path
    models: Path | None = None
    port: int = 50050
    devices: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = 10.0
    otlp_endpoint: str = ""
    certificates: Path | None = None
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Restarts:
    """When a program that died is started again.

    Attributes:
        limit: restarts of one program `within_s` seconds; one more stops the system.
        first_wait_s, longest_wait_s: the wait before a restart doubles with each recent one.
    """

    limit: int = 5
    within_s: float = 60.0
    first_wait_s: float = 0.5
    longest_wait_s: float = 10.0


class ProcessState(enum.Enum):
    """Where a program stands."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(eq=False)
class Child:
    """A program and its process.

    Attributes:
        log: file that its output goes to.
        state_since: time.monotonic() of the last change of state.
        started: time.monotonic() of its last start.
        crashed: time.monotonic() of each recent crash.
        ended: how its last process ended, such as `exited with status 1`; empty before.
        was_ready: set once it has been ready.
    """

    program: Program
    log: Path
    state: ProcessState = ProcessState.STARTING
    state_since: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.monotonic)
    process: asyncio.subprocess.Process | None = None
    crashed: deque[float] = field(default_factory=deque)
    ended: str = ""
    was_ready: asyncio.Event = field(default_factory=asyncio.Event)

    def last_lines(self) -> list[str]:
        """The end of its log."""
        return self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]

    def kill(self) -> None:
        """Kills what is left of the process and of those that it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def system_programs(settings: SystemSettings) -> list[Program]:
    """The programs of a system, the gateway last.

    Raises:
        SystemFailed: the port of the gateway is taken.
    """
    *stage_ports, gateway_port = _free_ports(0, 0, 0, 0, settings.port)
    addresses = {stage: f"{_HOST}:{port}" for stage, port in zip(STAGES, stage_ports, strict=True)}
    shared = {
        "BUNRAKU_BUNDLE": str(settings.bundle.resolve()),
        "BUNRAKU_GRACE_S": str(settings.grace_s),
        # threads that wait by spinning take the cores from the other programs on this machine: 5 times slower on two
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # gRPC would go through the environment's proxy to this machine too
        "no_grpc_proxy": ",".join(filter(None, (_without_proxy(), _HOST))),
    }
    if settings.models is not None:
        shared["BUNRAKU_MODELS"] = str(settings.models.resolve())
    if settings.otlp_endpoint:
        shared["BUNRAKU_OTLP_ENDPOINT"] = settings.otlp_endpoint
    stages = [
        Program(
            stage,
            COMMANDS[stage],
            address,
            f"bunraku.v1.{stage.capitalize()}Service",
            {
                **shared,
                **_tls_environment(settings.certificates, stage),
                "BUNRAKU_ADDRESS": address,
                "BUNRAKU_DEVICE": settings.devices.get(stage, "auto"),
                **settings.environments.get(stage, {}),
            },
            _tls_files(settings.certificates, GATEWAY),
        )
        for stage, address in addresses.items()
    ]
    gateway_address = f"{_HOST}:{gateway_port}"
    gateway = {
        **shared,
        **_tls_environment(settings.certificates, GATEWAY),
        **{f"BUNRAKU_{stage.upper()}": address for stage, address in addresses.items()},
        "BUNRAKU_ADDRESS": gateway_address,
        "BUNRAKU_DATA": str(settings.data.resolve()),
    }
    tls = _tls_files(settings.certificates, "client")
    return [*stages, Program(GATEWAY, COMMANDS[GATEWAY], gateway_address, "bunraku.v1.GatewayService", gateway, tls)]


def _tls_files(certificates: Path | None, name: str) -> TlsFiles:
    """Of a part of the system, or of a client, in a directory as scripts/certificates.py writes it."""
    if certificates is None:
        return NO_TLS
    return TlsFiles(certificates / "ca.crt", certificates / f"{name}.crt", certificates / f"{name}.key")


def _tls_environment(certificates: Path | None, name: str) -> dict[str, str]:
    if certificates is None:
        return {}
    files = _tls_files(certificates.resolve(), name)
    variables = {
        "BUNRAKU_TLS_CA": str(files.ca),
        "BUNRAKU_TLS_CERTIFICATE": str(files.certificate),
        "BUNRAKU_TLS_KEY": str(files.key),
    }
    if name == GATEWAY:
        variables["BUNRAKU_CLIENTS_CA"] = str(certificates.resolve() / "clients-ca.crt")
    return variables


class Supervisor:
    """Runs programs: entered once all of them are ready, left once all of them have stopped.

    Args:
        programs: they start together; the last one, the gateway, is stopped before the others.
        data: directory of the system, with its logs; one supervisor at a time uses it.
        restarts: what is done about programs that die.
        grace_s: seconds from SIGTERM to SIGKILL.
        on_change: is told of a program that has changed its state.
        on_line: is given name of the program and text of every line that is logged; None: nobody reads them.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        data: Path,
        restarts: Restarts = Restarts(),
        grace_s: float = 10.0,
        on_change: Callable[[Child], None] = lambda child: None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        logs = data / "logs"
        self.children = [Child(program, logs / f"{program.name}.log") for program in programs]
        self._data, self._restarts, self._grace_s = data, restarts, grace_s
        self._on_change, self._on_line = on_change, on_line
        self._resources = ExitStack()
        self._keeping: list[asyncio.Task[NoReturn]] = []
        self._reading: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()

    @property
    def address(self) -> str:
        """`host:port` of the gateway."""
        return self.children[-1].program.address

    async def __aenter__(self) -> Self:
        """Starts everything.

        Raises:
            SystemFailed: another supervisor uses the directory, or a program ended before it was ready.
        """
        self._resources.enter_context(_only_one(self._data))
        try:
            for child in self.children:
                _rotate(child.log)
                if self._on_line is not None:
                    self._reading.append(asyncio.create_task(self._read(child, self._on_line)))
                self._keeping.append(asyncio.create_task(self._keep(child)))
            ready = asyncio.create_task(self._all_ready())
            try:
                await asyncio.wait([ready, *self._keeping], return_when=asyncio.FIRST_COMPLETED)
                self._raise_failure()
            finally:
                ready.cancel()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def watch(self) -> NoReturn:
        """Waits for as long as the system can be kept running.

        Raises:
            SystemFailed: a program dies again and again.
        """
        while True:
            await asyncio.wait(self._keeping, return_when=asyncio.FIRST_COMPLETED)
            self._raise_failure()

    async def stop(self) -> None:
        """Stops the gateway, then all the others at the same time; SIGTERM, and after the grace period SIGKILL.

        Cancelled, it kills them all at once.
        """
        for task in self._keeping:
            task.cancel()
        try:
            await asyncio.gather(*self._keeping, return_exceptions=True)
            *stages, gateway = self.children
            await self._terminate(gateway)
            await asyncio.gather(*map(self._terminate, stages))
        except asyncio.CancelledError:
            self.kill()
            await asyncio.gather(*(child.process.wait() for child in self.children if child.process is not None))
            raise
        finally:
            self._stopping.set()
            self._resources.close()
        await asyncio.gather(*self._reading)

    def kill(self) -> None:
        """Cuts the grace period of a stop short."""
        for child in self.children:
            child.kill()

    async def _all_ready(self) -> None:
        for child in self.children:
            await child.was_ready.wait()

    def _raise_failure(self) -> None:
        for task in self._keeping:
            if task.done():
                task.result()

    async def _keep(self, child: Child) -> NoReturn:
        """Runs a program again and again."""
        while True:
            child.ended = _ended(await self._run(child))
            text = f"the {child.program.name} process {child.ended}"
            if not child.was_ready.is_set():
                raise SystemFailed(f"{text} before it was ready; its log: {child.log}", child.last_lines())
            now = time.monotonic()
            while child.crashed and child.crashed[0] < now - self._restarts.within_s:
                child.crashed.popleft()
            if len(child.crashed) >= self._restarts.limit:
                times = f"{len(child.crashed) + 1} times within {self._restarts.within_s:g} s"
                raise SystemFailed(f"{text}, {times}; its log: {child.log}", child.last_lines())
            wait_s = min(self._restarts.longest_wait_s, self._restarts.first_wait_s * 2 ** len(child.crashed))
            child.crashed.append(now)
            self._change(child, ProcessState.RESTARTING)
            await asyncio.sleep(wait_s)

    async def _run(self, child: Child) -> int:
        """Runs a program once and gives the exit status of its process."""
        child.started = time.monotonic()
        self._change(child, ProcessState.STARTING)
        with child.log.open("ab") as log:
            child.process = await asyncio.create_subprocess_exec(
                *_tied_to_this_process(child.program.command),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **child.program.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        exited = asyncio.create_task(child.process.wait())
        probing = asyncio.create_task(self._probe(child))
        try:
            await asyncio.wait([exited, probing], return_when=asyncio.FIRST_COMPLETED)
            if probing.done():
                await probing
            status = await exited
        finally:
            exited.cancel()
            probing.cancel()
            await asyncio.wait([exited, probing])
        child.kill()
        return status

    async def _probe(self, child: Child) -> None:
        """Asks a program how it is until it is ready."""
        options = (
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        )
        async with _channel(child.program, options) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=child.program.service)
            while child.state is not ProcessState.READY:
                state = await _probed(health, request)
                if state is not None and state is not child.state:
                    self._change(child, state)
                await asyncio.sleep(_POLL_S)

    def _change(self, child: Child, state: ProcessState) -> None:
        child.state, child.state_since = state, time.monotonic()
        if state is ProcessState.READY:
            child.was_ready.set()
        self._on_change(child)

    async def _terminate(self, child: Child) -> None:
        """Ends a process if there is one."""
        process = child.process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self._grace_s + _MARGIN_S)
            except TimeoutError:
                child.kill()
                await process.wait()
        child.kill()
        self._change(child, ProcessState.STOPPED)

    async def _read(self, child: Child, on_line: Callable[[str, str], None]) -> None:
        """Hands on what a program logs, until the system has stopped."""
        with child.log.open("rb") as log:
            rest = b""
            while True:
                stopping = self._stopping.is_set()
                *lines, rest = (rest + log.read()).split(b"\n")
                for line in lines:
                    on_line(child.program.name, line.decode(errors="replace"))
                if stopping:
                    return
                await asyncio.sleep(_POLL_S)


def _channel(program: Program, options: tuple[tuple[str, int], ...]) -> grpc.aio.Channel:
    if not program.tls:
        return grpc.aio.insecure_channel(program.address, options=options)
    return grpc.aio.secure_channel(program.address, program.tls.channel_credentials(), options=options)


async def _probed(health: Any, request: health_pb2.HealthCheckRequest) -> ProcessState | None:
    """What a program says of itself; None where it does not answer."""
    try:
        response = await health.Check(request, timeout=2.0)
    except grpc.aio.AioRpcError:
        return None
    serving = response.status == health_pb2.HealthCheckResponse.ServingStatus.SERVING
    return ProcessState.READY if serving else ProcessState.LOADING


def _tied_to_this_process(command: Sequence[str]) -> Sequence[str]:
    """The command of a process that dies with this one; see the top of this file."""
    if sys.platform != "linux":
        return command
    return (sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *command)


def _without_proxy() -> str:
    """Hosts that the environment says gRPC is not to use a proxy for."""
    # gRPC reads them in small letters
    return os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""  # noqa: SIM112


def _ended(status: int) -> str:
    return f"exited with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"


def _free_ports(*wanted: int) -> list[int]:
    """A port for each one wanted, 0 standing for any; all are different. Raises SystemFailed where one is taken."""
    with ExitStack() as stack:
        ports = []
        for port in wanted:
            listener = stack.enter_context(socket.socket())
            # a gateway that has just stopped leaves connections behind that do not matter
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(port != 0))
            try:
                listener.bind((_HOST, port))
            except OSError as error:
                raise SystemFailed(f"port {port} cannot be had ({error.strerror}); port 0 takes a free one") from error
            ports.append(listener.getsockname()[1])
        return ports


@contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Holds the directory for this process; the kernel lets go of it when the process dies."""
    (data / "logs").mkdir(parents=True, exist_ok=True)
    with (data / "supervisor.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemFailed(f"{_holder(lock)} already runs a system in {data}") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    pid = lock.read().strip()
    return f"process {pid}" if pid else "another process"


def _rotate(log: Path) -> None:
    """Begins a new log and keeps the one of the run before."""
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    log.touch()
