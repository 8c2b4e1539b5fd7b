"""Mutual TLS between parts: who is let in, by which name a stage is known, and certificates that are renewed."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from bunraku.errors import NotReady
from bunraku.tls import NO_TLS, TlsFiles
from bunraku.v1 import stage_pb2, stage_pb2_grpc, vae_pb2_grpc
from runtime.client import StageClient, open_channel
from runtime.replicas import stage_status
from runtime.server import StageServer, listen
from runtime.settings import StageSettings
from runtime.stage import StageRuntime
from scripts.certificates import Authority, write_certificates
from tests.runtime.fakes import BUNDLE, FakeVae


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    write_certificates(directory)
    return directory


def files(directory: Path, name: str, ca: str = "ca") -> TlsFiles:
    return TlsFiles(directory / f"{ca}.crt", directory / f"{name}.crt", directory / f"{name}.key")


@asynccontextmanager
async def serving(tls: TlsFiles, health_address: str = "") -> AsyncIterator[int]:
    runtime = StageRuntime("vae", BUNDLE)
    server = StageServer(FakeVae(runtime), runtime)
    await server.start("127.0.0.1:0", tls, health_address)
    await server.load()
    try:
        yield server.port
    finally:
        await server.drain(0)


async def status(address: str, tls: TlsFiles = NO_TLS, server_name: str = "") -> Any:
    channel = open_channel(address, tls, server_name)
    try:
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        return await stub.GetStatus(stage_pb2.GetStatusRequest(), timeout=5)
    finally:
        await channel.close(None)


async def is_refused(address: str, tls: TlsFiles = NO_TLS, server_name: str = "") -> bool:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await status(address, tls, server_name)
    return raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_part_with_a_certificate_is_let_in_and_nobody_else(certificates: Path, tmp_path: Path) -> None:
    Authority.at(tmp_path / "ca", "forged").sign(tmp_path / "gateway", "gateway", [])
    forged = TlsFiles(certificates / "ca.crt", tmp_path / "gateway.crt", tmp_path / "gateway.key")
    async with serving(files(certificates, "vae")) as port:
        address = f"localhost:{port}"
        assert (await status(address, files(certificates, "gateway"))).stage == "vae"
        assert await is_refused(address)  # without TLS
        assert await is_refused(address, TlsFiles(certificates / "ca.crt"))  # without a certificate
        assert await is_refused(address, files(certificates, "client"))  # of the authority of clients
        assert await is_refused(address, forged)


async def test_a_stage_must_have_the_name_that_it_is_called_by(certificates: Path) -> None:
    gateway = files(certificates, "gateway")
    async with serving(files(certificates, "vae")) as port:
        assert (await status(f"127.0.0.1:{port}", gateway, "vae")).stage == "vae"
        assert await is_refused(f"127.0.0.1:{port}", gateway, "encoder")
        assert await is_refused(f"127.0.0.1:{port}", files(certificates, "gateway", ca="clients-ca"))


async def test_addresses_that_a_name_stands_for_are_checked_for_the_name(certificates: Path) -> None:
    gateway = files(certificates, "gateway")
    async with serving(files(certificates, "vae")) as port:
        client: StageClient[Any] = StageClient("vae", vae_pb2_grpc.VaeServiceStub, [f"localhost:{port}"], tls=gateway)
        (endpoint,) = await client.endpoints()
        assert endpoint.address == f"127.0.0.1:{port}"
        assert (await stage_status(endpoint)).stage == "vae"
        await client.close()


async def test_without_an_authority_any_client_may_call_over_tls(certificates: Path) -> None:
    server = TlsFiles(None, certificates / "vae.crt", certificates / "vae.key")
    async with serving(server) as port:
        assert (await status(f"localhost:{port}", TlsFiles(certificates / "ca.crt"))).stage == "vae"
        assert await is_refused(f"localhost:{port}")


async def test_health_is_told_without_tls_where_probes_ask_for_it(certificates: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with (
        serving(files(certificates, "vae"), f"127.0.0.1:{port}"),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="bunraku.v1.VaeService")
        assert (await health.Check(request, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetStatus(stage_pb2.GetStatusRequest(), timeout=5)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def renew(directory: Path, certificates: Path) -> None:
    """Puts other files in the place of those of a directory."""
    for path in certificates.iterdir():
        shutil.copy(path, directory)
        os.utime(directory / path.name, (1, 1))  # also where a clock is coarse


async def test_renewed_certificates_are_used_without_a_restart(certificates: Path, tmp_path: Path) -> None:
    old, used = tmp_path / "old", tmp_path / "used"
    write_certificates(old)
    shutil.copytree(old, used)
    async with serving(files(used, "vae")) as port:
        address = f"127.0.0.1:{port}"
        assert (await status(address, files(old, "gateway"), "vae")).stage == "vae"
        assert await is_refused(address, files(certificates, "gateway"), "vae")
        renew(used, certificates)  # of another authority altogether
        assert (await status(address, files(certificates, "gateway"), "vae")).stage == "vae"
        assert await is_refused(address, files(old, "gateway"), "vae")


async def test_files_in_the_middle_of_being_replaced_leave_the_old_certificate(
    certificates: Path, tmp_path: Path
) -> None:
    write_certificates(tmp_path)
    async with serving(files(tmp_path, "vae")) as port:
        (tmp_path / "vae.key").unlink()
        gateway = files(tmp_path, "gateway")
        assert (await status(f"127.0.0.1:{port}", gateway, "vae")).stage == "vae"


def test_half_of_a_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs its key"):
        TlsFiles(None, tmp_path / "a.crt", None)
    with pytest.raises(ValueError, match="needs its key"):
        TlsFiles(None, None, tmp_path / "a.key")
    for name in ("tls_certificate", "tls_key", "tls_ca"):
        with pytest.raises(ValidationError):
            StageSettings.model_validate({"bundle": tmp_path, name: tmp_path})


async def test_a_server_without_a_usable_certificate_does_not_begin_to_listen(certificates: Path) -> None:
    server = grpc.aio.server()
    missing = TlsFiles(None, certificates / "none.crt", certificates / "none.key")
    for tls in (missing, TlsFiles(certificates / "ca.crt")):
        with pytest.raises(OSError, match=r"none\.|cannot listen"):
            listen(server, "127.0.0.1:0", tls)
    assert TlsFiles() == NO_TLS
    assert not NO_TLS
    await server.stop(None)


async def test_a_stage_that_refuses_a_certificate_is_not_ready(certificates: Path) -> None:
    async with serving(files(certificates, "vae")) as port:
        client: StageClient[Any] = StageClient("vae", vae_pb2_grpc.VaeServiceStub, [f"127.0.0.1:{port}"])
        (endpoint,) = await client.endpoints()
        with pytest.raises(NotReady):
            await stage_status(endpoint)
        await client.close()
