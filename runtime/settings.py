"""Settings of a stage process, read once from the environment, and the start of one.

Every variable is called BUNRAKU_ and the name of the field in capitals, such as BUNRAKU_ADDRESS.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from bunraku.tls import TlsFiles
from runtime.bundles import Bundle, BundleError, load_bundle
from runtime.logs import Form, configure_logging
from runtime.server import ServerSettings, Service, run
from runtime.shared_memory import DIRECTORY, SharedMemory
from runtime.stage import Limits, StageRuntime
from runtime.tensors import CHUNK_BYTES, MAX_CALL_BYTES

_log = logging.getLogger(__name__)


class StageSettings(BaseSettings):
    """What every stage reads."""

    model_config = SettingsConfigDict(env_prefix="BUNRAKU_", frozen=True)

    address: str = Field("0.0.0.0:50050", description="host:port to listen on")
    bundle: Path = Field(description="directory of the bundle, with bundle.toml")
    models: Path | None = Field(None, description="directory that the bundle's file names are relative to")
    device: str = Field("auto", description="as torch names it; auto: cuda:0 if there is one, else cpu")
    vram_fraction: float = Field(1.0, gt=0, le=1, description="of the device's memory that this process may take")
    max_concurrent: int | None = Field(
        None, ge=1, le=64, description="calls at the same time; not set: the stage's own"
    )
    max_queued: int = Field(8, ge=0, le=1024, description="calls that may wait")
    max_call_bytes: int = Field(MAX_CALL_BYTES, ge=1024, description="tensors of one call together")
    chunk_bytes: int = Field(CHUNK_BYTES, ge=1024, le=8 * 1024**2, description="payload of a tensor message")
    shared_memory: bool = Field(True, description="hand tensors over through shared memory where both sides can")
    shared_memory_directory: Path = Field(DIRECTORY, description="in memory, the same for all that are to share")
    shared_memory_bytes: int = Field(2 * 1024**3, ge=0, description="the most that this process takes of it")
    grace_s: float = Field(30.0, ge=0, le=3600, description="seconds for work in flight after SIGTERM")
    tls_certificate: Path | None = Field(None, description="PEM file; given: calls must come over TLS")
    tls_key: Path | None = Field(None, description="PEM file: private key of tls_certificate")
    tls_ca: Path | None = Field(None, description="PEM file; given: callers must have a certificate of this authority")
    health_address: str = Field("", description="host:port of a health service without TLS, for probes; empty: none")
    otlp_endpoint: str = Field("", description="of an OpenTelemetry collector; empty: no traces")
    metrics_address: str = Field("", description="host:port of Prometheus' metrics over HTTP; empty: none")
    log_level: str = Field("INFO", description="of Python's logging")
    log_format: Form = Field("text", description="text for people, json with trace ids for whoever collects logs")

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Self:
        if self.tls_ca is not None and self.tls_certificate is None:
            raise ValueError("callers can show certificates over TLS only: tls_ca needs tls_certificate")
        self.server_settings()
        return self

    def server_settings(self) -> ServerSettings:
        """How to serve. Raises ValueError where certificate and key do not come together."""
        tls = TlsFiles(self.tls_ca, self.tls_certificate, self.tls_key)
        return ServerSettings(
            self.address, self.grace_s, self.otlp_endpoint, tls, self.health_address, self.metrics_address
        )


MakeService = Callable[[StageRuntime, Bundle], Service]
Serve = Callable[[Any, StageRuntime, ServerSettings], Awaitable[int]]


def serve_stage(
    stage: str,
    make_service: MakeService,
    *,
    max_concurrent: int = 1,
    uses_torch: bool = True,
    serve: Serve = run,
) -> None:
    """The whole life of a stage process; ends it with an exit status.

    Args:
        stage: `encoder`, `pose`, `denoiser` or `vae`.
        make_service: makes the service on its runtime and bundle.
        max_concurrent: calls at the same time where the settings do not say.
        uses_torch: whether `device` is to be looked for with torch.
        serve: serves the service on its runtime until the end and gives the exit status.
    """
    settings = StageSettings()  # type: ignore[call-arg]  # its fields come from the environment
    configure_logging(stage, settings.log_level, settings.log_format)
    try:
        sys.exit(asyncio.run(_serve(stage, make_service, settings, max_concurrent, uses_torch, serve)))
    except (BundleError, OSError) as error:
        _log.error("%s", error)
        sys.exit(2)


async def _serve(
    stage: str,
    make_service: MakeService,
    settings: StageSettings,
    max_concurrent: int,
    uses_torch: bool,
    serve: Serve,
) -> int:
    bundle = load_bundle(settings.bundle, settings.models)
    runtime = StageRuntime(
        stage,
        bundle,
        device=_device(settings.device, settings.vram_fraction) if uses_torch else "cpu",
        limits=Limits(
            max_concurrent=settings.max_concurrent or max_concurrent,
            max_queued=settings.max_queued,
            max_call_bytes=settings.max_call_bytes,
            chunk_bytes=settings.chunk_bytes,
        ),
        shared_memory=open_shared_memory(settings),
    )
    service = make_service(runtime, bundle)
    return await serve(service, runtime, settings.server_settings())


def open_shared_memory(settings: StageSettings) -> SharedMemory | None:
    """Shared memory as the settings ask for it; None where it is off or cannot be had."""
    if not settings.shared_memory:
        return None
    return SharedMemory.create(settings.shared_memory_directory, settings.shared_memory_bytes)


def _device(wanted: str, vram_fraction: float) -> str:
    """The device to work on. More than the fraction of its memory is refused as if the device had no more."""
    if wanted == "cpu":
        return wanted
    import torch

    device = wanted if wanted != "auto" else "cuda:0" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and vram_fraction < 1:
        torch.cuda.set_per_process_memory_fraction(vram_fraction, device)
    return device
