"""Parts of the system as real processes that talk over mutual TLS, as `bunraku serve --certificates` starts them."""

from __future__ import annotations

import asyncio
import filecmp
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bunraku.client import AsyncClient
from bunraku.errors import NotFound, NotReady, Unauthenticated
from bunraku.supervisor import Supervisor, SystemSettings, system_programs
from bunraku.tls import NO_TLS, TlsFiles
from gateway.callers.keys import KeyStore
from gateway.jobs.database import Database
from runtime.client import open_channel
from runtime.replicas import Endpoint, stage_status
from scripts.certificates import write_certificates
from tests.system.media import write_picture

TINY = Path(__file__).resolve().parent.parent.parent / "bundles" / "tiny"


class Running:
    """A gateway and the pose stage, the others left out: they take long to start."""

    def __init__(self, supervisor: Supervisor, data: Path, certificates: Path) -> None:
        self.data, self._certificates = data, certificates
        self.stage_address, self.address = (child.program.address for child in supervisor.children)

    def files(self, name: str) -> TlsFiles:
        directory = self._certificates
        return TlsFiles(directory / "ca.crt", directory / f"{name}.crt", directory / f"{name}.key")

    def authority(self) -> TlsFiles:
        """A client that knows the authority of the parts and has no certificate of its own."""
        return TlsFiles(self._certificates / "ca.crt")

    async def stage_answers(self, tls: TlsFiles) -> bool:
        channel = open_channel(self.stage_address, tls)
        try:
            return (await stage_status(Endpoint(self.stage_address, channel), timeout_s=5)).stage == "pose"
        except NotReady:
            return False
        finally:
            await channel.close(None)

    async def gateway_answers(self, tls: TlsFiles) -> bool:
        async with AsyncClient(self.address, tls=tls) as client:
            try:
                await client.connect(timeout_s=5)
                return len(await client.models()) == 1
            except NotReady:
                return False


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    certificates, data = tmp_path / "certificates", tmp_path / "data"
    write_certificates(certificates)
    programs = system_programs(SystemSettings(TINY, data, port=0, grace_s=2.0, certificates=certificates))
    started = [program for program in programs if program.name in ("pose", "gateway")]
    async with asyncio.timeout(100), Supervisor(started, data=data, grace_s=2.0) as supervisor:
        yield Running(supervisor, data, certificates)


@pytest.mark.slow
async def test_only_those_with_the_right_certificate_are_let_in(running: Running, tmp_path: Path) -> None:
    assert await running.gateway_answers(running.files("client"))
    for tls in (NO_TLS, running.authority(), running.files("gateway")):  # none, none of its own, of another authority
        assert not await running.gateway_answers(tls)
    assert await running.stage_answers(running.files("gateway"))
    for tls in (NO_TLS, running.authority(), running.files("client")):
        assert not await running.stage_answers(tls)
    # and the gateway itself reaches its stage
    async with AsyncClient(running.address, tls=running.files("client")) as client:
        stages = {stage.stage: stage for stage in (await client.status()).stages}
    assert stages["pose"].reachable
    assert stages["pose"].status.stage == "pose"
    assert not stages["vae"].reachable  # nobody listens there

    await check_keys(running, write_picture(tmp_path / "ref.png", 32, 32))


async def models_of_the_command_line(running: Running, key: str) -> int:
    """Exit status of `bunraku models` with key and certificates in its environment."""
    files = running.files("client")
    variables = {
        "BUNRAKU_API_KEY": key,
        "BUNRAKU_TLS_CA": str(files.ca),
        "BUNRAKU_TLS_CERTIFICATE": str(files.certificate),
        "BUNRAKU_TLS_KEY": str(files.key),
    }
    command = (sys.executable, "-m", "bunraku.cli", "models", "--gateway", running.address)
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **variables}, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


async def check_keys(running: Running, picture: Path) -> None:
    """A key that is made beside the running gateway closes it to those who have none, and keeps files apart."""
    database = Database(running.data / "gateway.sqlite")
    keys = KeyStore(database)
    _, studio = await keys.create("studio")
    _, rival = await keys.create("rival")
    await database.close()
    tls = running.files("client")
    async with AsyncClient(running.address, tls=tls) as nobody, asyncio.timeout(20):
        while True:
            try:
                await nobody.models()
                await asyncio.sleep(0.2)
            except Unauthenticated:
                break
    async with AsyncClient(running.address, tls=tls, api_key=studio) as client:
        asset = await client.upload(picture)
        await client.download(asset, picture.with_name("back.png"))
    assert await models_of_the_command_line(running, studio) == 0
    assert await models_of_the_command_line(running, "") == 1
    async with AsyncClient(running.address, tls=tls, api_key=rival) as client:
        with pytest.raises(NotFound):
            await client.download(asset, picture.with_name("stolen.png"))
    assert filecmp.cmp(picture.with_name("back.png"), picture, shallow=False)
