"""`python -m gateway`: the gateway as a process.

Settings are read once from the environment; every variable is called BUNRAKU_ and the name of the field in capitals.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Collection
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import Field

from bunraku.errors import BunrakuError, NotReady
from bunraku.v1 import gateway_pb2_grpc
from gateway.assets import AssetStore
from gateway.blobs import BlobStore, open_blobs
from gateway.callers.authentication import Authentication
from gateway.callers.keys import KeyStore
from gateway.callers.settings import AccessSettings
from gateway.cleaning import Ages, keep_clean
from gateway.jobs.store import JobStore
from gateway.levels import publish_levels
from gateway.outputs import OutputStore
from gateway.requests import ModelSpec
from gateway.service import GatewayService
from gateway.stages import Stages, connect
from gateway.worker import Worker, WorkerSettings
from runtime import telemetry
from runtime.bundles import Bundle, BundleError, load_bundle
from runtime.client import Retry
from runtime.logs import Form, configure_logging
from runtime.server import build_server, health_server, listen, stop_signal
from runtime.shared_memory import DIRECTORY, SharedMemory

_log = logging.getLogger("gateway")
_OPEN_AGAIN_S = 1.0


class GatewaySettings(AccessSettings):
    """What the gateway reads."""

    address: str = Field("0.0.0.0:50050", description="host:port to listen on")
    data: Path = Field(description="directory of the database and of files")
    database: str = Field("", description="postgresql://user:password@host:port/name; empty: SQLite in `data`")
    storage: str = Field("", description="s3://bucket/prefix of files and stage outputs; empty: directories in `data`")
    output_cache_bytes: int = Field(4 << 30, ge=0, description="that kept outputs of stages may take")
    bundle: Path = Field(description="directory of the bundle that the stages serve")
    encoder: str = Field(description="addresses of the encoder stage, host:port, separated by commas")
    pose: str = Field(description="of the pose stage")
    denoiser: str = Field(description="of the denoiser stage")
    vae: str = Field(description="of the VAE stage")
    max_running: int = Field(3, ge=1, le=1000, description="generations that are worked on at the same time")
    max_queued: int = Field(1000, ge=0, description="generations that may wait")
    max_seconds: float = Field(6 * 3600.0, gt=0, description="that a generation may take from its creation")
    keep_events_days: float = Field(7.0, ge=0, description="events of a generation, from its end; 0: for ever")
    keep_generations_days: float = Field(30.0, ge=0, description="generations and videos, from their end; 0: for ever")
    keep_assets_days: float = Field(7.0, ge=0, description="files that no generation names; 0: for ever")
    stage_patience_s: float = Field(120.0, ge=0, description="how long a stage that is not ready is tried again")
    checkpoint_every_steps: int = Field(5, ge=0, description="steps that a dead denoiser costs at most; 0: all")
    shared_memory: bool = Field(True, description="hand tensors over through shared memory where both sides can")
    shared_memory_directory: Path = Field(DIRECTORY, description="in memory, the same for all that are to share")
    grace_s: float = Field(10.0, ge=0, le=3600, description="seconds for calls under way after SIGTERM")
    otlp_endpoint: str = Field("", description="of an OpenTelemetry collector; empty: no traces")
    metrics_address: str = Field("", description="host:port of Prometheus' metrics over HTTP; empty: none")
    log_level: str = Field("INFO", description="of Python's logging")
    log_format: Form = Field("text", description="text for people, json with trace ids for whoever collects logs")

    def blobs(self, kind: str) -> BlobStore:
        """Where `outputs` or `assets` are kept."""
        return open_blobs(f"{self.storage.rstrip('/')}/{kind}" if self.storage else self.data / kind)

    def ages(self) -> Ages:
        days = 24 * 3600.0
        return Ages(self.keep_events_days * days, self.keep_generations_days * days, self.keep_assets_days * days)

    def stage_addresses(self) -> dict[str, list[str]]:
        stages = {"encoder": self.encoder, "pose": self.pose, "denoiser": self.denoiser, "vae": self.vae}
        return {name: [address.strip() for address in value.split(",")] for name, value in stages.items()}


@dataclass(frozen=True)
class Parts:
    """What the gateway is made of."""

    bundle: Bundle
    store: JobStore
    assets: AssetStore
    outputs: OutputStore
    stages: Stages


async def serve(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT. Generations that were being worked on are taken up again at the next start."""
    stop = stop_signal()
    async with AsyncExitStack() as closing:  # in the reverse order
        parts = _parts(settings, closing)
        if not await _opened(parts.store, stop):
            return
        if not settings.database:  # nobody else works on what is in the file
            for job in await parts.store.claims.take_back():
                _log.info("%s was being worked on when the gateway stopped", job.name)
        healthy = await _listening(settings, parts, closing)
        closing.enter_context(telemetry.metrics_endpoint(settings.metrics_address))
        tasks = _working(settings, parts, closing)
        closing.push_async_callback(healthy.enter_graceful_shutdown)
        await _ended(stop, tasks)


def _parts(settings: GatewaySettings, closing: AsyncExitStack) -> Parts:
    provider = telemetry.configure("gateway", settings.otlp_endpoint)
    if provider is not None:
        closing.callback(provider.shutdown)
    bundle = load_bundle(settings.bundle)
    settings.data.mkdir(parents=True, exist_ok=True)
    shared_memory = SharedMemory.create(settings.shared_memory_directory) if settings.shared_memory else None
    if shared_memory is not None:
        closing.callback(shared_memory.close)
    addresses = settings.stage_addresses()
    store = JobStore(
        settings.database or settings.data / "gateway.sqlite",
        max_queued=settings.max_queued,
        parallel=len(addresses["denoiser"]),
    )
    closing.push_async_callback(store.close)
    files = settings.blobs("assets") if settings.storage else None
    assets = AssetStore(settings.data / "assets", files, max_size_bytes=settings.max_upload_bytes)
    outputs = OutputStore(settings.blobs("outputs"), capacity_bytes=settings.output_cache_bytes)
    closing.push_async_callback(outputs.close)
    stages = connect(addresses, shared_memory, settings.stages_tls())
    closing.push_async_callback(stages.close)
    return Parts(bundle, store, assets, outputs, stages)


async def _listening(settings: GatewaySettings, parts: Parts, closing: AsyncExitStack) -> health.aio.HealthServicer:  # type: ignore[name-defined]  # missing in its stubs
    """Begins to serve; at the end calls under way have `grace_s`."""
    server = build_server(Authentication(KeyStore(parts.store.database), required=settings.require_keys))
    service = GatewayService(
        parts.store,
        parts.assets,
        parts.stages,
        [ModelSpec.from_bundle(parts.bundle)],
        int(settings.max_seconds),
        settings.fetcher(),
        settings.input_limits(),
    )
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(service, server)
    healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in its stubs
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    if settings.reflection:
        reflection.enable_server_reflection([GatewayService.full_name, reflection.SERVICE_NAME], server)
    port = listen(server, settings.address, settings.clients_tls())
    servers = [server, *([health_server(healthy, settings.health_address)] if settings.health_address else [])]

    async def stop_servers() -> None:
        await asyncio.gather(*(each.stop(settings.grace_s) for each in servers))

    closing.push_async_callback(stop_servers)
    await asyncio.gather(*(each.start() for each in servers))
    for name in ("", GatewayService.full_name):
        await healthy.set(name, health_pb2.HealthCheckResponse.ServingStatus.SERVING)
    _log.info("listening on port %d, data in %s", port, settings.data)
    return healthy


def _working(settings: GatewaySettings, parts: Parts, closing: AsyncExitStack) -> list[asyncio.Task[None]]:
    """Begins to work on generations and to keep house."""
    bundles = {parts.bundle.name: parts.bundle}
    worker = Worker(parts.store, parts.assets, parts.stages, bundles, _worker_settings(settings), parts.outputs)
    works = (
        worker.run(),
        keep_clean(parts.store, parts.assets, settings.ages()),
        parts.outputs.keep_tidy(),
        publish_levels(parts.store),
        telemetry.watch_event_loop(),
    )
    tasks = [asyncio.create_task(work) for work in works]

    async def cancel() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    closing.push_async_callback(cancel)
    return tasks


async def _ended(stop: asyncio.Event, tasks: Collection[asyncio.Task[None]]) -> None:
    """Waits until the gateway is to stop. Raises what ends a task before its time."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    for task in tasks:
        if task.done():
            task.result()


def _worker_settings(settings: GatewaySettings) -> WorkerSettings:
    return WorkerSettings(
        max_running=settings.max_running,
        max_seconds=settings.max_seconds,
        retry=Retry(patience_s=settings.stage_patience_s),
        checkpoint_every_steps=settings.checkpoint_every_steps,
        image_limits=settings.input_limits().images,
    )


async def _opened(store: JobStore, stop: asyncio.Event) -> bool:
    """Opens the database, however long it is away; whether it was opened before the gateway is to stop."""
    while not stop.is_set():
        try:
            await store.open()
            return True
        except NotReady as error:
            _log.warning("%s", error.message)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _OPEN_AGAIN_S)
    return False


def main() -> None:
    settings = GatewaySettings()  # type: ignore[call-arg]  # its fields come from the environment
    configure_logging("gateway", settings.log_level, settings.log_format)
    try:
        asyncio.run(serve(settings))
    except (BundleError, BunrakuError, OSError) as error:
        _log.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
