"""The supervisor with small programs in place of the stages: start, crashes, stop, and its own death."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bunraku.supervisor import (
    Child,
    ProcessState,
    Restarts,
    Supervisor,
    SystemFailed,
    SystemSettings,
    system_programs,
)
from tests.bunraku.processes import alive, eventually, fake_program, gone

QUICK = Restarts(limit=1, within_s=60, first_wait_s=0.01, longest_wait_s=0.01)


def pids(supervisor: Supervisor) -> list[int]:
    return [child.process.pid for child in supervisor.children if child.process is not None]


async def started_again(child: Child, pid: int) -> int:
    """Process id of a program once it is another one."""

    def seen() -> bool:
        return child.process is not None and child.process.pid != pid

    assert await asyncio.to_thread(eventually, seen)
    assert child.process is not None
    return child.process.pid


async def test_system_is_entered_when_all_are_ready_and_left_when_all_have_stopped(tmp_path: Path) -> None:
    notes, loaded = tmp_path / "notes", tmp_path / "loaded"
    changes: list[tuple[str, ProcessState]] = []
    stage = fake_program("vae", FAKE_NOTES=str(notes), FAKE_LOAD_UNTIL=str(loaded), FAKE_CHILD="1")
    gateway = fake_program("gateway", FAKE_NOTES=str(notes), FAKE_STOP_S="0.3")
    lines: list[tuple[str, str]] = []

    def changed(child: Child) -> None:
        changes.append((child.program.name, child.state))
        if changes[-1] == ("vae", ProcessState.LOADING):
            loaded.touch()

    async with Supervisor(
        [stage, gateway],
        data=tmp_path,
        on_change=changed,
        on_line=lambda name, line: lines.append((name, line)),
    ) as supervisor:
        processes = pids(supervisor)
        assert all(child.state is ProcessState.READY for child in supervisor.children)
        assert supervisor.address == gateway.address
        processes += [int(line.split()[-1]) for line in notes.read_text().splitlines() if "child" in line]
        assert len(processes) == 3
        assert all(map(alive, processes))
    assert gone(processes)
    seen_of_stage = [state for name, state in changes if name == "vae"]
    assert seen_of_stage == [
        ProcessState.STARTING,
        ProcessState.LOADING,
        ProcessState.READY,
        ProcessState.STOPPED,
    ]
    # the gateway stops, in its own time, before the stage is told to
    ends = [line.removeprefix(gateway.address) for line in notes.read_text().splitlines() if "stop" in line]
    assert ends == [" stopping", " stopped", f"{stage.address} stopping", f"{stage.address} stopped"]
    assert sorted(lines) == [("gateway", "a line of its log"), ("vae", "a line of its log")]
    assert (tmp_path / "logs" / "vae.log").read_text() == "a line of its log\n"


async def test_program_that_ends_while_starting_is_told_with_its_last_words(tmp_path: Path) -> None:
    programs = [fake_program("vae", FAKE_LOAD_UNTIL="never"), fake_program("gateway", FAKE_EXIT="no bundle.toml here")]
    supervisor = Supervisor(programs, data=tmp_path, grace_s=0.0)
    with pytest.raises(SystemFailed, match="the gateway process exited with status 1 before it was ready") as caught:
        async with supervisor:
            pass
    assert caught.value.last_lines == ("no bundle.toml here",)
    assert gone(pids(supervisor))


async def test_program_that_dies_is_started_again_until_it_dies_too_often(tmp_path: Path) -> None:
    programs = [fake_program("vae"), fake_program("gateway")]
    async with Supervisor(programs, data=tmp_path, restarts=QUICK) as supervisor:
        watching = asyncio.create_task(supervisor.watch())
        stage = supervisor.children[0]
        first = pids(supervisor)[0]
        os.kill(first, signal.SIGKILL)
        second = await started_again(stage, first)
        assert await asyncio.to_thread(eventually, lambda: stage.state is ProcessState.READY)
        assert not watching.done()
        os.kill(second, signal.SIGKILL)
        with pytest.raises(SystemFailed, match="the vae process was killed by SIGKILL, 2 times within 60 s") as caught:
            await asyncio.wait_for(watching, 10)
        assert caught.value.last_lines == ("a line of its log",) * 2
        processes = pids(supervisor)
    assert gone(processes)


async def test_crashes_of_long_ago_are_forgotten(tmp_path: Path) -> None:
    restarts = Restarts(limit=1, within_s=0.0, first_wait_s=0.01)
    async with Supervisor([fake_program("gateway")], data=tmp_path, restarts=restarts) as supervisor:
        pid = pids(supervisor)[0]
        for _ in range(2):
            os.kill(pid, signal.SIGKILL)
            pid = await started_again(supervisor.children[0], pid)


async def test_program_that_does_not_stop_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    programs = [fake_program("vae", FAKE_STUBBORN="1"), fake_program("gateway")]
    async with Supervisor(programs, data=tmp_path, grace_s=0.2) as supervisor:
        processes = pids(supervisor)
    assert gone(processes, 0.5)


async def test_stop_that_is_cut_short_kills(tmp_path: Path) -> None:
    programs = [fake_program("vae"), fake_program("gateway", FAKE_STUBBORN="1")]
    supervisor = await Supervisor(programs, data=tmp_path, grace_s=60).__aenter__()
    stopping = asyncio.create_task(supervisor.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert gone(pids(supervisor), 1.0)


async def test_one_supervisor_at_a_time_uses_a_directory_and_the_log_before_is_kept(tmp_path: Path) -> None:
    for _ in range(2):
        supervisor = Supervisor([fake_program("gateway", FAKE_EXIT="bye")], data=tmp_path)
        with pytest.raises(SystemFailed, match="exited with status 1"):
            await supervisor.__aenter__()
    assert (tmp_path / "logs" / "gateway.log.1").read_text() == "bye\n"
    with (tmp_path / "supervisor.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("123")
        lock.flush()
        with pytest.raises(SystemFailed, match=r"process 123.* already runs a system in"):
            await supervisor.__aenter__()


def test_no_program_survives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bunraku.processes", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        processes = [int(pid) for pid in supervisor.stdout.readline().split()]
        assert len(processes) == 2
        assert all(map(alive, processes))
        supervisor.kill()
    assert gone(processes)


def test_programs_of_a_system_get_their_settings(tmp_path: Path) -> None:
    settings = SystemSettings(
        tmp_path / "bundle",
        tmp_path / "data",
        models=tmp_path / "models",
        port=0,
        devices={"vae": "cuda:1"},
        grace_s=3,
        otlp_endpoint="http://collector:4317",
        environments={"denoiser": {"BUNRAKU_VRAM": "4GiB"}},
    )
    *stages, gateway = system_programs(settings)
    assert [stage.environment.get("BUNRAKU_VRAM") for stage in stages] == [None, None, "4GiB", None]
    assert [stage.name for stage in stages] == ["encoder", "pose", "denoiser", "vae"]
    assert stages[2].command[1:] == ("-m", "services.denoiser")
    assert stages[2].service == "bunraku.v1.DenoiserService"
    assert len({program.address for program in (*stages, gateway)}) == 5
    for program in (*stages, gateway):
        assert program.environment["BUNRAKU_ADDRESS"] == program.address
        assert program.environment["BUNRAKU_BUNDLE"] == str(tmp_path / "bundle")
        assert program.environment["BUNRAKU_MODELS"] == str(tmp_path / "models")
        assert program.environment["BUNRAKU_OTLP_ENDPOINT"] == "http://collector:4317"
        assert program.environment["BUNRAKU_GRACE_S"] == "3"
    assert [stage.environment["BUNRAKU_DEVICE"] for stage in stages] == ["auto", "auto", "auto", "cuda:1"]
    assert (gateway.command[1:], gateway.service) == (("-m", "gateway"), "bunraku.v1.GatewayService")
    assert gateway.environment["BUNRAKU_DATA"] == str(tmp_path / "data")
    assert [gateway.environment[f"BUNRAKU_{stage.name.upper()}"] for stage in stages] == [
        stage.address for stage in stages
    ]


def test_port_of_the_gateway_that_is_taken_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(SystemFailed, match=f"port {port} cannot be had"):
            system_programs(SystemSettings(tmp_path, tmp_path, port=port))


def test_this_machine_is_not_reached_through_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "intern.example")
    programs = system_programs(SystemSettings(tmp_path, tmp_path, port=0))
    assert {program.environment["no_grpc_proxy"] for program in programs} == {"intern.example,127.0.0.1"}
