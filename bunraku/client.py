"""The client of a gateway: files in, generations made and watched, videos out.

    with Client("localhost:50050") as client:
        generation = client.animate(reference_image="hero.png", pose_video="dance.mp4", seed=7)
        client.download(client.wait(generation.name).video, "out.mp4")

`AsyncClient` has the verbs as coroutines; `Client` has the same ones for code without an event loop. Every call has a
deadline, what is safe to repeat is repeated while the gateway cannot be reached, uploads, downloads and watches go on
where they broke off, and a failed call raises an error of `bunraku.errors`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import (
    Any,
    BinaryIO,
    Concatenate,
    ParamSpec,
    Protocol,
    Required,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
)

import grpc
import tenacity
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from bunraku.errors import (
    DOMAIN,
    BunrakuError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NotReady,
    StageBroken,
    WrongState,
    from_rpc_error,
    from_status,
)
from bunraku.tls import NO_TLS, TlsFiles
from bunraku.v1 import gateway_pb2 as pb
from bunraku.v1 import gateway_pb2_grpc

P = ParamSpec("P")
R = TypeVar("R")
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Call = TypeVar("Call", bound="_Cancellable")
Request_contra = TypeVar("Request_contra", bound=Message, contravariant=True)
Response_co = TypeVar("Response_co", bound=Message, covariant=True)

FilePath: TypeAlias = str | os.PathLike[str]
Source: TypeAlias = FilePath | pb.Asset
TransferProgress: TypeAlias = Callable[[int, int], None]
Metadata: TypeAlias = tuple[tuple[str, str], ...]

DEFAULT_ADDRESS = "localhost:50050"
ENDED = (pb.GENERATION_STATE_SUCCEEDED, pb.GENERATION_STATE_FAILED, pb.GENERATION_STATE_CANCELLED)
# What asyncio moves fastest; the contract allows 1 MiB
CHUNK_BYTES = 256 * 1024
# ErrorInfo.reason of the errors that are found on this side
UNREACHABLE, CHECKSUM_MISMATCH = "GATEWAY_UNREACHABLE", "CHECKSUM_MISMATCH"

_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_MAX_FILENAME = 255
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # a peer that vanished without a word is noticed while a watch waits for its next event
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # without this one the line above does nothing: 60 s (docs/decisions/0007-stage-outputs.md)
    ("grpc.http2.ping_timeout_ms", 10_000),
    # the client retries; retries of the library would multiply with those
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True)
class Retry:
    """When a call is tried again that found no gateway.

    Attributes:
        attempts: in a row, the first included; a transfer or a watch that moved on counts anew.
        first_wait_s, longest_wait_s: the wait doubles from one to the other, with jitter; a gateway that says when to
            come back is believed up to the longest wait.
    """

    attempts: int = 10
    first_wait_s: float = 0.25
    longest_wait_s: float = 8.0


class AnimateArguments(TypedDict, total=False):
    """What `animate` takes: fields of CreateGenerationRequest and of its messages, under the fields' own names.

    gateway.proto says what each means; what is left out or None takes the model's default. Files are given as a path,
    as the asset of an upload, or as a URL that the gateway fetches.
    """

    reference_image: Required[Source]
    pose_video: Source | None
    driving_video: Source | None
    mask_video: Source | None
    prompt: str | None
    negative_prompt: str | None
    people: int | None
    window_overlap_frames: int | None
    color_correction_strength: float | None
    preset: str | None
    seed: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_scale_low_noise: float | None
    shift: float | None
    solver: str | None
    step_cache: str | None
    step_cache_speedup: float | None
    step_cache_start: float | None
    guidance_start: float | None
    guidance_end: float | None
    cfg_zero_star: bool | None
    zero_init_steps: int | None
    height: int | None
    width: int | None
    size_mode: str | None
    num_frames: int | None
    frames_per_second: float | None
    crf: int | None
    previews: bool | None
    request_id: str | None
    model: str | None
    timeout_seconds: int | None
    priority: int | None


FILE_FIELDS = ("reference_image", "pose_video", "driving_video", "mask_video")


class _Unary(Protocol[Request_contra, Response_co]):
    """A method of the generated stub that takes one message and gives one."""

    def __call__(
        self, request: Request_contra, /, *, timeout: float | None, metadata: Metadata
    ) -> Awaitable[Response_co]: ...


class _Cancellable(Protocol):
    """A call under way."""

    def cancel(self) -> bool: ...


class AsyncClient:
    """Calls a gateway; made inside a running event loop.

    Args:
        address: `host:port` of the gateway.
        api_key: shown with every call, where the gateway asks for one; whoever can read the connection can read it,
            so it goes with TLS.
        tls: files of this side; the CA that the gateway's certificate comes from, and a certificate of this side where
            the gateway asks for one. None: the connection is not encrypted.
        retry: when the gateway cannot be reached.
        call_timeout_s: of one attempt of a plain call.
        stream_timeout_s: of one stream; what takes longer goes on in another one.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        retry: Retry = Retry(),
        call_timeout_s: float = 30.0,
        stream_timeout_s: float = 600.0,
        api_key: str = "",
        tls: TlsFiles = NO_TLS,
    ) -> None:
        self.address = address
        self._retry, self._call_timeout_s, self._stream_timeout_s = retry, call_timeout_s, stream_timeout_s
        self._metadata: Metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._credentials, options = tls.channel_credentials() if tls else None, _channel_options(address)
        self._channel = (
            grpc.aio.secure_channel(address, self._credentials, options=options)
            if self._credentials is not None
            else grpc.aio.insecure_channel(address, options=options)
        )
        self._threads_channel: grpc.Channel | None = None
        self._stub = gateway_pb2_grpc.GatewayServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        await self._channel.close(None)
        if self._threads_channel is not None:
            self._threads_channel.close()

    async def connect(self, timeout_s: float = 5.0) -> None:
        """Connects now instead of with the first call, and without retries.

        Raises:
            NotReady: nothing answers at the address.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (state := self._channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise NotReady(f"no gateway answers at {self.address}", reason=UNREACHABLE)
                    await self._channel.wait_for_state_change(state)
        except TimeoutError:
            raise NotReady(f"no gateway answers at {self.address} within {timeout_s:g} s", reason=UNREACHABLE) from None

    async def upload(self, path: FilePath, *, on_progress: TransferProgress | None = None) -> pb.Asset:
        """Stores a file, unless the gateway has it already.

        Args:
            path: the file.
            on_progress: is told bytes sent and bytes in all; at once all of them for a file that is there already.

        Raises:
            OSError: the file cannot be read.
            InvalidRequest: the gateway does not take it.
        """
        path = Path(path)
        upload_id, received_bytes = uuid.uuid4().hex, 0
        size_bytes, sha256 = await asyncio.to_thread(_measured, path)
        if size_bytes == 0:
            raise InvalidRequest(("size_bytes", f"the file {path} is empty"))
        report = on_progress or _silent
        async for trial in self._retrying(NotReady, Cancelled, DeadlineExceeded):
            with trial:
                # On a later attempt too: the answer to a complete upload may have been what was lost
                with suppress(NotFound):
                    found = await self._once(self._stub.GetAsset, pb.GetAssetRequest(name=f"assets/{sha256}"))
                    report(size_bytes, size_bytes)
                    return found.asset
                offset_bytes = await self._received(upload_id) if trial.retry_state.attempt_number > 1 else 0
                if offset_bytes > received_bytes:
                    trial.retry_state.attempt_number, received_bytes = 1, offset_bytes
                metadata = pb.UploadMetadata(
                    upload_id=upload_id,
                    filename=_shown(path),
                    size_bytes=size_bytes,
                    sha256=sha256,
                    offset_bytes=offset_bytes,
                )
                return await self._send(path, metadata, report)
        raise AssertionError("tenacity ends with a result or an error")

    async def prepare(
        self, *, on_upload: Callable[[str, int, int], None] | None = None, **arguments: Unpack[AnimateArguments]
    ) -> pb.CreateGenerationRequest:
        """Checks the arguments, uploads the files and gives the request for `create`; nothing is created yet.

        Args:
            on_upload: is told the field that a file is for, bytes sent and bytes in all.
            arguments: see AnimateArguments.

        Raises:
            InvalidRequest: names the field as the contract does, such as `sampling.seed`.
        """
        request = animate_request(arguments)
        for field in FILE_FIELDS:
            source: Source | None = arguments.get(field)  # type: ignore[assignment]  # mypy: the key is not a literal
            if source is not None:
                setattr(request.animate, field, await self._stored(field, source, on_upload))
        return request

    async def create(self, request: pb.CreateGenerationRequest) -> pb.Generation:
        """Queues a generation. One without a request_id is given one, so that trying again does not make two.

        One that names files by URL takes as long as the gateway needs to fetch them.
        """
        if not request.request_id:
            named = pb.CreateGenerationRequest(request_id=uuid.uuid4().hex)
            named.MergeFrom(request)
            request = named
        fetches = any(_is_url(getattr(request.animate, field)) for field in FILE_FIELDS)
        timeout_s = self._stream_timeout_s if fetches else self._call_timeout_s
        return (await self._call(self._stub.CreateGeneration, request, timeout_s)).generation

    async def animate(
        self, *, on_upload: Callable[[str, int, int], None] | None = None, **arguments: Unpack[AnimateArguments]
    ) -> pb.Generation:
        """Uploads the files and queues a character animation: `prepare`, then `create`."""
        return await self.create(await self.prepare(on_upload=on_upload, **arguments))

    async def get(self, name: str) -> pb.Generation:
        """A generation as it stands."""
        return (await self._call(self._stub.GetGeneration, pb.GetGenerationRequest(name=name))).generation

    async def list(
        self, *, states: Collection[pb.GenerationState.ValueType] = (), page_size: int = 0
    ) -> AsyncGenerator[pb.Generation, None]:
        """Generations, newest first, read page by page as they are asked for."""
        request = pb.ListGenerationsRequest(page_size=page_size, states=states)
        while True:
            page = await self._call(self._stub.ListGenerations, request)
            for generation in page.generations:
                yield generation
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def watch(self, name: str, *, after_sequence: int = 0) -> AsyncGenerator[pb.WatchGenerationResponse, None]:
        """Events of a generation until it ends: each once and in order, whatever happens to the connection.

        Args:
            name: `generations/{id}`.
            after_sequence: only events after this one.
        """
        held_s = 0.0
        async for trial in self._retrying(NotReady, Cancelled, DeadlineExceeded):
            with trial:
                if held_s > self._retry.longest_wait_s:
                    # No failure if the gateway is still there: something between closes streams that are quiet
                    await self._once(self._stub.GetGeneration, pb.GetGenerationRequest(name=name))
                    trial.retry_state.attempt_number = 1
                begun = time.monotonic()
                try:
                    async with aclosing(self._events(name, after_sequence)) as events:
                        async for event in events:
                            trial.retry_state.attempt_number = 1
                            after_sequence = event.sequence
                            yield event
                finally:
                    held_s = time.monotonic() - begun

    async def wait(self, name: str, *, timeout_s: float | None = None) -> pb.Generation:
        """The generation once it has succeeded.

        Args:
            name: `generations/{id}`.
            timeout_s: how long to wait; the generation itself goes on when this is over.

        Raises:
            DeadlineExceeded: it has not ended in time.
            BunrakuError: it failed or was cancelled; see `succeeded`.
        """
        try:
            async with asyncio.timeout(timeout_s), aclosing(self.watch(name)) as events:
                async for _ in events:
                    pass
        except TimeoutError:
            raise DeadlineExceeded(f"{name} has not ended within {timeout_s:g} s") from None
        return succeeded(await self.get(name))

    async def cancel(self, name: str) -> pb.Generation:
        """Asks for a generation to stop; gives it as it stands now, which may still be RUNNING."""
        return (await self._call(self._stub.CancelGeneration, pb.CancelGenerationRequest(name=name))).generation

    async def delete(self, name: str) -> None:
        """Deletes a generation that has ended, with its results. Tried once: a second try would find nothing."""
        await self._once(self._stub.DeleteGeneration, pb.DeleteGenerationRequest(name=name))

    async def download(
        self, asset: pb.Asset | str, path: FilePath, *, on_progress: TransferProgress | None = None
    ) -> Path:
        """Writes a file of the gateway to `path`, which appears (or is replaced) only once it is whole and checked.

        Args:
            asset: the file, or its name `assets/{id}`.
            path: where to; its directory must be there.
            on_progress: is told bytes received and bytes in all.

        Raises:
            StageBroken: what arrived has another SHA-256 than the gateway said (reason CHECKSUM_MISMATCH).
            OSError: it cannot be written.
        """
        path = Path(path)
        name = asset if isinstance(asset, str) else asset.name
        with _unfinished(path) as (part, file):
            sha256 = await self._receive(name, file, on_progress or _silent)
            file.flush()
            found = await asyncio.to_thread(_measured, part)
            if found[1] != sha256:
                text = f"{name} arrived damaged: its SHA-256 is {found[1]}, not {sha256}"
                raise StageBroken(text, reason=CHECKSUM_MISMATCH)
            part.replace(path)
        return path

    async def models(self) -> tuple[pb.Model, ...]:
        """Models that can be asked for, with their defaults and limits."""
        return tuple((await self._call(self._stub.ListModels, pb.ListModelsRequest())).models)

    async def status(self) -> pb.GetSystemStatusResponse:
        """State of the gateway and of every stage."""
        return await self._call(self._stub.GetSystemStatus, pb.GetSystemStatusRequest())

    async def _call(
        self, method: _Unary[Request, Response], request: Request, timeout_s: float | None = None
    ) -> Response:
        """A call that is safe to repeat."""
        async for trial in self._retrying(NotReady):
            with trial:
                return await self._once(method, request, timeout_s)
        raise AssertionError("tenacity ends with a result or an error")

    async def _once(
        self, method: _Unary[Request, Response], request: Request, timeout_s: float | None = None
    ) -> Response:
        with self._translated():
            return await method(request, timeout=timeout_s or self._call_timeout_s, metadata=self._metadata)

    async def _stored(self, field: str, source: Source, on_upload: Callable[[str, int, int], None] | None) -> str:
        """Name of the asset of a file; what is wrong with the file is said of the field that it is for."""
        if isinstance(source, pb.Asset):
            return source.name
        if isinstance(source, str) and _is_url(source):
            return source
        try:
            asset = await self.upload(
                source, on_progress=(lambda done, total: on_upload(field, done, total)) if on_upload else None
            )
        except InvalidRequest as error:
            violations = tuple((f"animate.{field}", text) for _, text in error.violations)
            raise InvalidRequest(*violations, reason=error.reason) from error
        return asset.name

    async def _received(self, upload_id: str) -> int:
        """Bytes of an upload that have arrived; 0 where the gateway does not know of it."""
        try:
            return (await self._once(self._stub.GetUpload, pb.GetUploadRequest(upload_id=upload_id))).received_bytes
        except NotFound:
            return 0

    async def _send(self, path: Path, metadata: pb.UploadMetadata, report: TransferProgress) -> pb.Asset:
        """One attempt to send a file from an offset to its end.

        By gRPC's threads: where a gateway refuses a file while it is being sent, grpc.aio loses what it said
        (grpc/grpc issue 36066).
        """
        loop = asyncio.get_running_loop()
        if self._threads_channel is None:
            options = _channel_options(self.address)
            self._threads_channel = (
                grpc.secure_channel(self.address, self._credentials, options=options)
                if self._credentials is not None
                else grpc.insecure_channel(self.address, options=options)
            )
        stub = gateway_pb2_grpc.GatewayServiceStub(self._threads_channel)
        with _opened(path) as file, self._translated():
            file.seek(metadata.offset_bytes)

            def messages() -> Iterator[pb.UploadAssetRequest]:
                yield pb.UploadAssetRequest(metadata=metadata)
                sent_bytes = metadata.offset_bytes
                # a call that was given up: the file, or even the loop, may be closed before gRPC's thread knows
                with suppress(ValueError, RuntimeError):
                    while data := file.read(CHUNK_BYTES):
                        yield pb.UploadAssetRequest(data=data)
                        sent_bytes += len(data)
                        loop.call_soon_threadsafe(report, sent_bytes, metadata.size_bytes)

            with _abandoned(
                stub.UploadAsset.future(messages(), timeout=self._stream_timeout_s, metadata=self._metadata)
            ) as call:
                return (await asyncio.to_thread(call.result)).asset

    async def _receive(self, name: str, file: BinaryIO, report: TransferProgress) -> str:
        """Appends an asset to an empty file, going on after every break; gives the SHA-256 that it should have."""
        asset, received_bytes = pb.Asset(), 0
        async for trial in self._retrying(NotReady, Cancelled, DeadlineExceeded):
            request = pb.DownloadAssetRequest(name=name, offset_bytes=received_bytes)
            opened = self._stub.DownloadAsset(request, timeout=self._stream_timeout_s, metadata=self._metadata)
            with trial, self._translated(), _abandoned(opened) as call:
                async for message in call:
                    if message.HasField("asset"):
                        asset = message.asset
                        continue
                    trial.retry_state.attempt_number = 1
                    received_bytes += file.write(message.data)
                    report(received_bytes, asset.size_bytes)
        return asset.sha256

    async def _events(self, name: str, after_sequence: int) -> AsyncGenerator[pb.WatchGenerationResponse, None]:
        """One attempt to watch; ends when the generation has ended, and raises where the stream does so earlier."""
        request = pb.WatchGenerationRequest(name=name, after_sequence=after_sequence)
        watching = self._stub.WatchGeneration(request, timeout=self._stream_timeout_s, metadata=self._metadata)
        with self._translated(), _abandoned(watching) as call:
            async for event in call:
                yield event
                if event.generation.state in ENDED:
                    return
        found = await self._once(self._stub.GetGeneration, pb.GetGenerationRequest(name=name))
        if found.generation.state not in ENDED:
            raise NotReady(f"the gateway at {self.address} broke off the events of {name}")

    def _retrying(self, *kinds: type[BunrakuError]) -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(kinds),
            stop=tenacity.stop_after_attempt(self._retry.attempts),
            wait=self._wait,
            sleep=asyncio.sleep,
            reraise=True,
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        backoff = tenacity.wait_random_exponential(self._retry.first_wait_s, self._retry.longest_wait_s)
        error = state.outcome.exception() if state.outcome else None
        asked = (error.retry_after_s or 0.0) if isinstance(error, BunrakuError) else 0.0
        return min(self._retry.longest_wait_s, max(asked, backoff(state)))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns a failed call into the error that it stands for."""
        try:
            yield
        except grpc.RpcError as error:
            known = from_rpc_error(cast("grpc.aio.AioRpcError", error))  # or its twin without asyncio
            # An answer of a gateway has details; one without comes from the connection
            if isinstance(known, NotReady) and rpc_status.from_call(cast("grpc.Call", error)) is None:
                text = f"no gateway answers at {self.address}: {known.message}"
                raise NotReady(text, reason=UNREACHABLE) from error
            raise known from error


def animate_request(arguments: AnimateArguments) -> pb.CreateGenerationRequest:
    """The request that the arguments stand for, without the files; what they lack stays unset.

    Raises:
        InvalidRequest: a value cannot be sent, or two exclude each other.
        TypeError: there is no such argument.
    """
    if arguments.get("pose_video") is not None and arguments.get("driving_video") is not None:
        raise InvalidRequest(("animate.driving_video", "cannot be given together with a pose video"))
    request = pb.CreateGenerationRequest(request_id=uuid.uuid4().hex)
    request.animate.SetInParent()
    for name, value in arguments.items():
        if name not in FILE_FIELDS and value is not None:
            _set(request, name, value)
    return request


def _set(request: pb.CreateGenerationRequest, name: str, value: object) -> None:
    """Sets the field of that name, wherever in the request it stands."""
    messages: dict[str, Message] = {
        "animate.": request.animate,
        "sampling.": request.sampling,
        "output.": request.output,
        "": request,
    }
    for prefix, message in messages.items():
        if name not in message.DESCRIPTOR.fields_by_name:
            continue
        try:
            setattr(message, name, _size_mode(str(value)) if name == "size_mode" else value)
        except (TypeError, ValueError) as error:
            raise InvalidRequest((prefix + name, f"{error}, got {value!r}")) from error
        return
    raise TypeError(f"there is no argument {name!r}")


def _is_url(source: str) -> bool:
    return source.lower().startswith(("https://", "http://"))


def _size_mode(name: str) -> pb.SizeMode.ValueType:
    if name not in ("budget", "fit", "crop"):
        raise ValueError("must be budget, fit or crop")
    return pb.SizeMode.Value(f"SIZE_MODE_{name.upper()}")


def succeeded(generation: pb.Generation) -> pb.Generation:
    """The generation, if it has succeeded.

    Raises:
        Cancelled: it was cancelled.
        WrongState: it has not ended.
        BunrakuError: it failed; the error that it failed with, of the same kind as a failed call would raise.
    """
    if generation.state == pb.GENERATION_STATE_CANCELLED:
        raise Cancelled(f"{generation.name} was cancelled")
    if generation.state == pb.GENERATION_STATE_FAILED:
        raise from_status(_status(generation.error))
    if generation.state != pb.GENERATION_STATE_SUCCEEDED:
        raise WrongState(f"{generation.name} has not ended yet")
    return generation


def _status(error: pb.GenerationError) -> status_pb2.Status:
    known = error.status in code_pb2.Code.keys()  # noqa: SIM118  # an enum wrapper is no mapping
    code = code_pb2.Code.Value(error.status) if known else code_pb2.UNKNOWN
    status = status_pb2.Status(code=code, message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"stage": error.stage})
    status.details.add().Pack(info)
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def _channel_options(address: str) -> tuple[tuple[str, int], ...]:
    """This machine is never reached through a proxy, whatever the environment says."""
    local = address.removeprefix("dns:///").rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]")
    return (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)) if local else _CHANNEL_OPTIONS


@contextmanager
def _abandoned(call: Call) -> Iterator[Call]:
    """Tells the gateway at the end that nobody reads on; for a call that has ended this does nothing."""
    try:
        yield call
    finally:
        call.cancel()


def _measured(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def _shown(path: Path) -> str:
    """Name of a file as protobuf can carry it: names of files need not be Unicode."""
    return path.name.encode(errors="replace").decode()[-_MAX_FILENAME:]


def _opened(path: Path) -> BinaryIO:
    return path.open("rb")


@contextmanager
def _unfinished(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new empty file beside `path`, open for writing; whoever fills it renames it, otherwise it is removed."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    with part.open("xb") as file:
        try:
            yield part, file
        finally:
            part.unlink(missing_ok=True)


def _silent(done_bytes: int, total_bytes: int) -> None:
    """Reports to nobody."""


def _blocking(
    verb: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Client, P], R]:
    """The verb of AsyncClient as a plain method of Client."""

    @wraps(verb)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(verb(self._client, *args, **kwargs))

    return call


def _iterating(
    verb: Callable[Concatenate[AsyncClient, P], AsyncGenerator[R, None]],
) -> Callable[Concatenate[Client, P], Iterator[R]]:
    """The asynchronous generator of AsyncClient as a plain generator of Client."""

    @wraps(verb)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        return self._iterate(verb(self._client, *args, **kwargs))

    return call


class Client:
    """AsyncClient for code without an event loop: the same arguments, verbs and errors.

    A thread of its own runs the event loop; callbacks are called on it. A Client may be used from several threads.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        retry: Retry = Retry(),
        call_timeout_s: float = 30.0,
        stream_timeout_s: float = 600.0,
        api_key: str = "",
        tls: TlsFiles = NO_TLS,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bunraku-client", daemon=True)
        self._thread.start()

        async def make() -> AsyncClient:
            return AsyncClient(
                address,
                retry=retry,
                call_timeout_s=call_timeout_s,
                stream_timeout_s=stream_timeout_s,
                api_key=api_key,
                tls=tls,
            )

        self._client = self._run(make())
        self.address = address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and ends the thread. May be called twice."""
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    connect = _blocking(AsyncClient.connect)
    upload = _blocking(AsyncClient.upload)
    prepare = _blocking(AsyncClient.prepare)
    create = _blocking(AsyncClient.create)
    animate = _blocking(AsyncClient.animate)
    get = _blocking(AsyncClient.get)
    list = _iterating(AsyncClient.list)
    watch = _iterating(AsyncClient.watch)
    wait = _blocking(AsyncClient.wait)
    cancel = _blocking(AsyncClient.cancel)
    delete = _blocking(AsyncClient.delete)
    download = _blocking(AsyncClient.download)
    models = _blocking(AsyncClient.models)
    status = _blocking(AsyncClient.status)

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            # Ctrl-C interrupts the waiting thread only; for a future that is done this does nothing
            future.cancel()

    def _iterate(self, items: AsyncGenerator[R, None]) -> Iterator[R]:
        arrived: queue.SimpleQueue[R | Future[None]] = queue.SimpleQueue()

        async def fetch() -> None:
            async with aclosing(items):
                async for item in items:
                    arrived.put(item)

        fetching = asyncio.run_coroutine_threadsafe(fetch(), self._loop)
        fetching.add_done_callback(arrived.put)
        try:
            while (item := arrived.get()) is not fetching:
                yield item  # type: ignore[misc]  # mypy does not narrow by identity
            fetching.result()
        finally:
            fetching.cancel()
