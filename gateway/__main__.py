"""`python -m gateway`: the gateway as a process.

Settings are read once from the environment; every variable is called BUNRAKU_ and the name of the field in capitals.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress
from pathlib import Path

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from bunraku.v1 import gateway_pb2_grpc
from gateway.assets import AssetStore
from gateway.requests import ModelSpec
from gateway.service import GatewayService
from gateway.stages import connect
from gateway.store import JobStore
from gateway.worker import Worker, WorkerSettings
from runtime import telemetry
from runtime.bundles import BundleError, load_bundle
from runtime.client import Retry
from runtime.server import build_server, stop_signal
from runtime.shared_memory import DIRECTORY, SharedMemory

_log = logging.getLogger("gateway")
_STALE_UPLOAD_S = 24 * 3600.0
_CLEANING_INTERVAL_S = 3600.0


class GatewaySettings(BaseSettings):
    """What the gateway reads."""

    model_config = SettingsConfigDict(env_prefix="BUNRAKU_", frozen=True)

    address: str = Field("0.0.0.0:50050", description="host:port to listen on")
    data: Path = Field(description="directory of the database and of files")
    bundle: Path = Field(description="directory of the bundle that the stages serve")
    encoder: str = Field(description="addresses of the encoder stage, host:port, separated by commas")
    pose: str = Field(description="of the pose stage")
    denoiser: str = Field(description="of the denoiser stage")
    vae: str = Field(description="of the VAE stage")
    max_running: int = Field(3, ge=1, le=1000, description="generations that are worked on at the same time")
    max_queued: int = Field(1000, ge=0, description="generations that may wait")
    max_seconds: float = Field(6 * 3600.0, gt=0, description="that a generation may take from its creation")
    max_upload_bytes: int = Field(2 << 30, ge=1, description="the largest file that may be sent")
    stage_patience_s: float = Field(120.0, ge=0, description="how long a stage that is not ready is tried again")
    checkpoint_every_steps: int = Field(5, ge=0, description="steps that a dead denoiser costs at most; 0: all")
    shared_memory: bool = Field(True, description="hand tensors over through shared memory where both sides can")
    shared_memory_directory: Path = Field(DIRECTORY, description="in memory, the same for all that are to share")
    grace_s: float = Field(10.0, ge=0, le=3600, description="seconds for calls under way after SIGTERM")
    otlp_endpoint: str = Field("", description="of an OpenTelemetry collector; empty: no traces")
    log_level: str = Field("INFO", description="of Python's logging")

    def stage_addresses(self) -> dict[str, list[str]]:
        stages = {"encoder": self.encoder, "pose": self.pose, "denoiser": self.denoiser, "vae": self.vae}
        return {name: [address.strip() for address in value.split(",")] for name, value in stages.items()}


async def serve(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT. Generations that were being worked on are taken up again at the next start."""
    stop = stop_signal()
    provider = telemetry.configure("gateway", settings.otlp_endpoint)
    bundle = load_bundle(settings.bundle)
    models = [ModelSpec.from_bundle(bundle)]
    settings.data.mkdir(parents=True, exist_ok=True)
    shared_memory = SharedMemory.create(settings.shared_memory_directory) if settings.shared_memory else None
    store = JobStore(settings.data / "gateway.sqlite", max_queued=settings.max_queued)
    assets = AssetStore(settings.data / "assets", max_size_bytes=settings.max_upload_bytes)
    stages = connect(settings.stage_addresses(), shared_memory)
    await store.open()
    for job in await store.requeue_running():
        _log.info("%s was being worked on when the gateway stopped", job.name)
    worker = Worker(store, assets, stages, {bundle.name: bundle}, _worker_settings(settings))
    server = build_server()
    service = GatewayService(store, assets, stages, models, int(settings.max_seconds))
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(service, server)
    healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in its stubs
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection([GatewayService.full_name, reflection.SERVICE_NAME], server)
    port = server.add_insecure_port(settings.address)
    await server.start()
    for name in ("", GatewayService.full_name):
        await healthy.set(name, health_pb2.HealthCheckResponse.ServingStatus.SERVING)
    _log.info("listening on port %d, data in %s", port, settings.data)
    tasks = [asyncio.create_task(worker.run()), asyncio.create_task(_clean(assets))]
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        stopping.cancel()
        await healthy.enter_graceful_shutdown()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop(settings.grace_s)
        await stages.close()
        await store.close()
        if shared_memory is not None:
            shared_memory.close()
        if provider is not None:
            provider.shutdown()


def _worker_settings(settings: GatewaySettings) -> WorkerSettings:
    return WorkerSettings(
        max_running=settings.max_running,
        max_seconds=settings.max_seconds,
        retry=Retry(patience_s=settings.stage_patience_s),
        checkpoint_every_steps=settings.checkpoint_every_steps,
    )


async def _clean(assets: AssetStore) -> None:
    while True:
        with suppress(OSError):
            await assets.remove_stale_uploads(_STALE_UPLOAD_S)
        await asyncio.sleep(_CLEANING_INTERVAL_S)


def main() -> None:
    settings = GatewaySettings()  # type: ignore[call-arg]  # its fields come from the environment
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s gateway: %(message)s")
    try:
        asyncio.run(serve(settings))
    except (BundleError, OSError) as error:
        _log.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
