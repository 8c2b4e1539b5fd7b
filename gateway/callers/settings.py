"""Settings of the gateway about who may call it, over which connections, and what it takes in."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from bunraku.tls import TlsFiles
from gateway.fetch import Fetcher, FetchLimits
from gateway.media import ImageLimits, InputLimits
from runtime.video import VideoLimits


class AccessSettings(BaseSettings):
    """What the gateway reads about callers."""

    model_config = SettingsConfigDict(env_prefix="BUNRAKU_", frozen=True)

    require_keys: bool | None = Field(None, description="whether calls need an API key; not set: once there is one")
    reflection: bool = Field(True, description="answer grpc.reflection, which needs no key")
    tls_certificate: Path | None = Field(None, description="PEM file; given: calls must come over TLS")
    tls_key: Path | None = Field(None, description="PEM file: private key of tls_certificate")
    tls_ca: Path | None = Field(None, description="PEM file; given: stages are called over TLS, their authority")
    clients_ca: Path | None = Field(None, description="PEM file; given: clients need a certificate of this authority")
    health_address: str = Field("", description="host:port of a health service without TLS, for probes; empty: none")
    fetch: Literal["https", "http", "off"] = Field("https", description="URLs that are fetched; http: both kinds")
    fetch_networks: str = Field("", description="private networks that may be fetched from, separated by commas")
    fetch_seconds: float = Field(120.0, gt=0, le=3600, description="that fetching one file may take")
    max_upload_bytes: int = Field(2 << 30, ge=1, description="the largest file that may be sent or fetched")
    max_image_bytes: int = Field(64 << 20, ge=1, description="of a picture")
    max_image_pixels: int = Field(50_000_000, ge=1024, description="of a picture")
    max_video_pixels: int = Field(4096 * 2304, ge=1024, description="of a frame of a video")
    max_video_frames: int = Field(20_000, ge=5, description="of a video")
    max_video_seconds: float = Field(600.0, gt=0, description="of a video")

    @field_validator("fetch_networks")
    @classmethod
    def _are_networks(cls, value: str) -> str:
        for part in filter(None, value.split(",")):
            ip_network(part.strip())
        return value

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Self:
        self.stages_tls()
        self.clients_tls()
        return self

    def stages_tls(self) -> TlsFiles:
        """For calls to the stages; none where there is no authority of theirs."""
        return TlsFiles(self.tls_ca, self.tls_certificate, self.tls_key) if self.tls_ca else TlsFiles()

    def clients_tls(self) -> TlsFiles:
        """For calls of clients. Raises ValueError where certificate and key do not come together."""
        if self.clients_ca is not None and self.tls_certificate is None:
            raise ValueError("clients can show certificates over TLS only: clients_ca needs tls_certificate")
        return TlsFiles(self.clients_ca, self.tls_certificate, self.tls_key) if self.tls_certificate else TlsFiles()

    def fetcher(self) -> Fetcher | None:
        """What fetches URLs; None where nothing is to be fetched."""
        if self.fetch == "off":
            return None
        networks = tuple(ip_network(part.strip()) for part in self.fetch_networks.split(",") if part.strip())
        limits = FetchLimits(
            schemes=("https",) if self.fetch == "https" else ("https", "http"),
            networks=networks,
            max_bytes=self.max_upload_bytes,
            max_seconds=self.fetch_seconds,
        )
        return Fetcher(limits)

    def input_limits(self) -> InputLimits:
        """What is still taken of files."""
        return InputLimits(
            ImageLimits(self.max_image_bytes, self.max_image_pixels),
            VideoLimits(
                max_bytes=self.max_upload_bytes,
                max_pixels=self.max_video_pixels,
                max_frames=self.max_video_frames,
                max_seconds=self.max_video_seconds,
            ),
        )
