"""The command line: what it sends, what it writes, and how it ends."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import typing
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
from rich.console import Console

from bunraku import cli, supervisor
from bunraku.cli import generation, options
from bunraku.cli.animate import animate
from bunraku.cli.display import Display, Row, seconds, size, write_table
from bunraku.cli.system import parse_devices, while_running
from bunraku.client import DEFAULT_ADDRESS, AsyncClient, Retry
from bunraku.errors import (
    BunrakuError,
    Busy,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NotReady,
    NotThereYet,
    StageBroken,
)
from bunraku.v1 import gateway_pb2 as pb
from tests.bunraku.fake_gateway import NAME, VIDEO, FakeGateway, GatewayThread, asset, serving_stage, stage_event
from tests.bunraku.processes import FAKE_GATEWAY, alive, eventually, gone


class CommandLine:
    """Runs `bunraku ...` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str | Path) -> int:
        """Gives the exit status; what was written stands in `out` and `err`."""
        self._monkeypatch.setattr(sys, "argv", ["bunraku", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        self.out, self.err = self._capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code


@pytest.fixture
def bunraku(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gateway: GatewayThread, tmp_path: Path
) -> CommandLine:
    monkeypatch.setenv("BUNRAKU_GATEWAY", gateway.address)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hero.png").write_bytes(b"picture")
    (tmp_path / "dance.mp4").write_bytes(b"dance")
    return CommandLine(monkeypatch, capsys)


ANIMATE = ("animate", "--image", "hero.png", "--pose-video", "dance.mp4")


def test_animate_makes_a_video_and_says_what_it_is(bunraku: CommandLine, fake: FakeGateway, tmp_path: Path) -> None:
    fake.succeed()
    assert bunraku(*ANIMATE, "--seed", "42", "--size", "832x480", "--steps", "8", "-o", "new.mp4") == 0
    assert bunraku.out == "new.mp4: 832x480, 81 frames at 16 fps, 1.05 MB, seed 42, 7.0 s\n"
    assert (tmp_path / "new.mp4").read_bytes() == VIDEO
    (request,) = fake.requests("CreateGeneration")
    assert request.animate.reference_image == asset(b"picture").name
    assert request.animate.pose_video == asset(b"dance").name
    assert (request.output.width, request.output.height) == (832, 480)
    assert (request.sampling.seed, request.sampling.num_inference_steps) == (42, 8)


def test_progress_is_plain_lines_where_there_is_no_terminal(bunraku: CommandLine, fake: FakeGateway) -> None:
    fake.succeed()
    assert bunraku(*ANIMATE) == 0
    assert bunraku.err.splitlines() == [
        "upload of --image: done, 7 B of 7 B",
        "upload of --pose-video: done, 5 B of 5 B",
        f"{NAME}: queued",
        "text: running, 1.5 s",
        "text: done, 1 of 1, 1.5 s",
        "denoise: running, 3 of 8, 1.5 s",
        "denoise: done, 8 of 8, 1.5 s",
    ]


def test_detach_prints_the_name_alone(bunraku: CommandLine, fake: FakeGateway) -> None:
    assert bunraku(*ANIMATE, "--detach") == 0
    assert bunraku.out == f"{NAME}\n"
    assert fake.requests("WatchGeneration") == []


def test_every_field_of_an_animation_has_an_option_and_every_option_its_field() -> None:
    messages = pb.AnimateTask.DESCRIPTOR, pb.SamplingParameters.DESCRIPTOR, pb.OutputParameters.DESCRIPTOR
    prefixes = ("animate.", "sampling.", "output.")
    fields = {
        prefix + name for prefix, message in zip(prefixes, messages, strict=True) for name in message.fields_by_name
    }
    fields |= {"model", "timeout_seconds", "priority"}
    # a command line shows no previews
    assert fields - {"output.previews"} <= options.OPTION_OF_FIELD.keys()
    hints = typing.get_type_hints(animate, include_extras=True)
    del hints["return"], hints["context"]
    given = [hint.__metadata__[0] for hint in hints.values()]
    written = {name for option in given for name in (option.default, *option.param_decls)}
    assert {options.OPTION_OF_FIELD[field] for field in fields - {"output.previews"}} <= written


@pytest.mark.parametrize(
    ("option", "value", "field", "sent"),
    [
        ("--prompt", "a cat", "animate.prompt", "a cat"),
        ("--negative-prompt", "dogs", "animate.negative_prompt", "dogs"),
        ("--people", "2", "animate.people", 2),
        ("--overlap", "9", "animate.window_overlap_frames", 9),
        ("--color-correction", "0.5", "animate.color_correction_strength", 0.5),
        ("--preset", "official", "animate.preset", "official"),
        ("--guidance", "3.5", "sampling.guidance_scale", 3.5),
        ("--guidance-low-noise", "2.5", "sampling.guidance_scale_low_noise", 2.5),
        ("--shift", "7", "sampling.shift", 7.0),
        ("--solver", "euler", "sampling.solver", "euler"),
        ("--step-cache", "mag", "sampling.step_cache", "mag"),
        ("--step-cache", "tea:2.5", "sampling.step_cache", "tea"),
        ("--step-cache", "tea:2.5", "sampling.step_cache_speedup", 2.5),
        ("--step-cache", "MAG:2:0.1", "sampling.step_cache_start", 0.1),
        ("--guidance-interval", "0.1:0.8", "sampling.guidance_start", 0.1),
        ("--guidance-interval", "0.1:0.8", "sampling.guidance_end", 0.8),
        ("--zero-init-steps", "2", "sampling.zero_init_steps", 2),
        ("--size-mode", "fit", "output.size_mode", pb.SIZE_MODE_FIT),
        ("--frames", "33", "output.num_frames", 33),
        ("--fps", "24", "output.frames_per_second", 24.0),
        ("--crf", "0", "output.crf", 0),
        ("--model", "tiny", "model", "tiny"),
        ("--timeout", "60", "timeout_seconds", 60),
        ("--priority", "9", "priority", 9),
    ],
)
def test_option_sets_its_field(
    bunraku: CommandLine, fake: FakeGateway, option: str, value: str, field: str, sent: object
) -> None:
    assert options.OPTION_OF_FIELD[field] == option
    assert bunraku(*ANIMATE, "--detach", option, value) == 0
    found: object = fake.requests("CreateGeneration")[0]
    for name in field.split("."):
        found = getattr(found, name)
    assert found == sent


def test_cfg_zero_star_is_a_switch(bunraku: CommandLine, fake: FakeGateway) -> None:
    assert bunraku(*ANIMATE, "--detach") == 0
    assert bunraku(*ANIMATE, "--detach", "--cfg-zero-star") == 0
    assert [request.sampling.cfg_zero_star for request in fake.requests("CreateGeneration")] == [False, True]


def test_a_step_cache_without_numbers_leaves_them_to_the_gateway(bunraku: CommandLine, fake: FakeGateway) -> None:
    assert bunraku(*ANIMATE, "--detach", "--step-cache", "tea") == 0
    [request] = fake.requests("CreateGeneration")
    assert not request.sampling.HasField("step_cache_speedup")


@pytest.mark.parametrize(
    "size_given", ["", "832", "832x", "x480", "0x480", "832x0", "-832x480", "8.5x4", "axb", "1000000000x480", "٣x٤"]
)
def test_size_that_is_none_is_told_before_anything_is_sent(
    bunraku: CommandLine, fake: FakeGateway, size_given: str
) -> None:
    assert bunraku(*ANIMATE, f"--size={size_given}") == 2
    assert re.fullmatch(r"error: Invalid value for --size: .*\n", bunraku.err)
    assert repr(size_given) in bunraku.err
    assert fake.calls == []


@pytest.mark.parametrize("written", ["832x480", "832X480", "832*480", " 832x480 "])
def test_size_is_width_times_height(written: str) -> None:
    assert options.parse_size(written) == (832, 480)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("animate",), "--image"),
        (("animate", "--image", "none.png", "--pose-video", "dance.mp4"), "--image"),
        (("animate", "--image", "hero.png"), "--pose-video or --driving-video"),
        ((*ANIMATE, "--driving-video", "dance.mp4"), "--pose-video or --driving-video"),
        ((*ANIMATE, "--seed", "-1"), "--seed"),
        ((*ANIMATE, "--steps", "0"), "--steps"),
        ((*ANIMATE, "--frames", "99999999999"), "--frames"),
        ((*ANIMATE, "--solver", "magic"), "--solver"),
        ((*ANIMATE, "--step-cache", "magic"), "--step-cache"),
        ((*ANIMATE, "--step-cache", "mag:fast"), "--step-cache"),
        ((*ANIMATE, "--step-cache", "mag:2:0:1"), "--step-cache"),
        ((*ANIMATE, "--guidance-interval", "0.5"), "--guidance-interval"),
        ((*ANIMATE, "--guidance-interval", "0.1:x"), "--guidance-interval"),
        ((*ANIMATE, "-o", "nowhere/out.mp4"), "--output"),
        ((*ANIMATE, "-o", "dance.mp4"), "--output"),
        ((*ANIMATE, "--local", "--detach"), "--detach"),
        ((*ANIMATE, "--local", "--bundle", "."), "--bundle"),
        ((*ANIMATE, "--local", "--devices", "brain=cpu"), "--devices"),
        (("animat",), "animat"),
    ],
)
def test_bad_input_is_one_line_that_names_the_option(
    bunraku: CommandLine,
    fake: FakeGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    named: str,
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.toml").touch()
    monkeypatch.setenv("BUNRAKU_BUNDLE", "bundle")
    assert bunraku(*arguments) == 2
    assert bunraku.err.count("\n") == 1
    assert named in bunraku.err
    assert fake.calls == []


@pytest.mark.parametrize(
    ("error", "exit_status", "lines"),
    [
        (InvalidRequest(("output.num_frames", "must be at most 81")), 2, ["error: --frames: must be at most 81"]),
        (
            InvalidRequest(("output.height", "must be even"), ("output.width", "must be even"), ("model", "unknown")),
            2,
            ["error: --size: must be even", "error: --model: unknown"],
        ),
        (InvalidRequest(("sampling.seed", "is odd")), 2, ["error: --seed: is odd"]),
        (InvalidRequest(("new.field", "is new")), 2, ["error: new.field: is new"]),
        (NotReady("draining", retry_after_s=5), 3, ["error: draining (try again in 5 s)"]),
        (Busy("the queue is full", retry_after_s=30), 3, ["error: the queue is full (try again in 30 s)"]),
        (DeadlineExceeded("too late"), 4, ["error: too late"]),
        (Cancelled("taken back"), 130, ["taken back"]),
        (
            NotThereYet("animate.driving_video is not there yet: give animate.pose_video, see bundle.toml"),
            1,
            ["error: --driving-video is not there yet: give --pose-video, see bundle.toml"],
        ),
        (Conflict("used before"), 1, ["error: used before"]),
        (NotFound("nothing [there]"), 1, ["error: nothing [there]"]),
        (StageBroken("NaN", stage="denoiser"), 1, ["error: denoiser: NaN"]),
    ],
)
def test_error_of_the_gateway_is_told_in_the_words_of_the_command_line(
    bunraku: CommandLine,
    fake: FakeGateway,
    monkeypatch: pytest.MonkeyPatch,
    error: BunrakuError,
    exit_status: int,
    lines: list[str],
) -> None:
    monkeypatch.setattr(
        AsyncClient.__init__, "__kwdefaults__", {**(AsyncClient.__init__.__kwdefaults__ or {}), "retry": Retry(1)}
    )
    fake.failures["CreateGeneration"] = [error]
    assert bunraku(*ANIMATE) == exit_status
    assert bunraku.err.splitlines()[2:] == lines


def test_generation_that_fails_is_told_like_a_call_that_does(bunraku: CommandLine, fake: FakeGateway) -> None:
    fake.succeed()
    error = pb.GenerationError(status="UNAVAILABLE", stage="vae", message="the vae stage is not available")
    fake.generation.state = pb.GENERATION_STATE_FAILED
    fake.events[-1].generation.state = pb.GENERATION_STATE_FAILED
    fake.events[-1].generation.error.CopyFrom(error)
    assert bunraku(*ANIMATE) == 3
    assert bunraku.err.splitlines()[-1] == "error: vae: the vae stage is not available"


def test_gateway_that_is_not_there_is_told_with_how_to_start_one(bunraku: CommandLine, gateway: GatewayThread) -> None:
    gateway.stop()
    for command in (ANIMATE, ("status",), ("jobs", "list")):
        assert bunraku(*command) == 3
        assert bunraku.err.startswith(f"error: no gateway answers at {gateway.address}; start one with `bunraku serve`")
        assert bunraku.err.count("\n") == 1
    gateway.start()


def test_address_of_the_gateway_is_what_the_help_says() -> None:
    (option,) = typing.get_args(options.Gateway)[1:]
    assert option.show_default == DEFAULT_ADDRESS


def test_ctrl_c_cancels_the_generation(fake: FakeGateway, gateway: GatewayThread, tmp_path: Path) -> None:
    fake.succeed()
    fake.events.pop()
    fake.generation.state, fake.hold_watch = pb.GENERATION_STATE_RUNNING, True
    for name in ("hero.png", "dance.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    with subprocess.Popen(
        [sys.executable, "-m", "bunraku.cli", *ANIMATE, "--gateway", gateway.address],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert fake.watching.wait(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"cancelled {NAME}"
    assert out == ""
    assert [request.name for request in fake.requests("CancelGeneration")] == [NAME]
    assert len(fake.requests("CreateGeneration")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dance.mp4", "hero.png"]


async def test_interrupt_while_the_generation_is_created_cancels_it_too(
    fake: FakeGateway, gateway: GatewayThread, tmp_path: Path
) -> None:
    fake.hold_create = True
    async with AsyncClient(gateway.address) as client:
        image = pb.Asset(name="assets/1")
        display = generation.GenerationDisplay(Console(stderr=True))
        work = generation.animate(client, {"reference_image": image, "pose_video": image}, display, detach=True)
        task = asyncio.create_task(work)
        assert await asyncio.to_thread(fake.creating.wait, 10)
        task.cancel()
        with pytest.raises(Cancelled, match=f"cancelled {NAME}"):
            await task
    first, second = fake.requests("CreateGeneration")
    assert first.request_id == second.request_id != ""
    assert [request.name for request in fake.requests("CancelGeneration")] == [NAME]


def test_status_is_a_table_and_fails_when_a_stage_is_down(bunraku: CommandLine, fake: FakeGateway) -> None:
    fake.stages = [serving_stage("vae"), serving_stage("denoiser")]
    assert bunraku("status") == 0
    header, vae, _, last = bunraku.out.splitlines()
    assert header.split() == ["stage", "address", "state", "device", "VRAM", "RAM", "queue", "work"]
    assert re.split(r"\s{2,}", vae) == [
        "vae",
        "127.0.0.1:1",
        "serving",
        "cuda:0 (H100)",
        "3 GB of 80 GB, peak 5 GB, 70 GB free",
        "2 GB of 64 GB, peak 4 GB, 20 GB free",
        "0 of 8",
    ]
    assert last == "gateway 1.2: 1 running, 0 queued"
    fake.stages.append(pb.StageEndpoint(stage="vae", address="127.0.0.1:2", problem="connection refused"))
    assert bunraku("status") == 0  # the other one serves
    fake.stages.append(pb.StageEndpoint(stage="pose", address="127.0.0.1:3", problem="connection refused"))
    assert bunraku("status") == 1
    assert "unreachable: connection refused" in bunraku.out
    fake.stages = []
    assert bunraku("status") == 1


@pytest.mark.slow
def test_status_is_watched_until_ctrl_c_also_while_the_gateway_is_away(
    bunraku: CommandLine, fake: FakeGateway, gateway: GatewayThread
) -> None:
    fake.stages = [serving_stage("vae")]

    def interrupt() -> None:
        written: Any = sys.stdout
        assert eventually(lambda: written.getvalue().count("gateway 1.2: 1 running") >= 2, 40)
        gateway.stop()
        assert eventually(lambda: "the gateway does not answer" in written.getvalue(), 40)
        gateway.start()
        shown = written.getvalue().count("gateway 1.2: 1 running")
        assert eventually(lambda: written.getvalue().count("gateway 1.2: 1 running") > shown, 40)
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    assert bunraku("status", "--watch", "--interval", "0.1") == 130
    interrupting.join()


def test_models_are_shown_with_their_defaults(bunraku: CommandLine, fake: FakeGateway) -> None:
    sampling = pb.SamplingParameters(num_inference_steps=8, guidance_scale=1, solver="unipc")
    fake.models = [
        pb.Model(name="tiny", task="animate", default_sampling=sampling, default_height=64, default_width=96)
    ]
    assert bunraku("models") == 0
    assert "96x64" in bunraku.out
    assert bunraku("models", "--json") == 0
    assert json.loads(bunraku.out)["models"][0]["default_sampling"]["solver"] == "unipc"


def test_jobs_are_listed_newest_first_up_to_the_limit(bunraku: CommandLine, fake: FakeGateway) -> None:
    fake.pages = [[pb.Generation(name="generations/3")], [pb.Generation(name=f"generations/{n}") for n in (2, 1)]]
    assert bunraku("jobs", "list", "--limit", "2", "--state", "running", "--state", "queued") == 0
    assert [line.split()[0] for line in bunraku.out.splitlines()] == ["name", "generations/3", "generations/2"]
    wanted = [pb.GENERATION_STATE_RUNNING, pb.GENERATION_STATE_QUEUED]
    assert list(fake.requests("ListGenerations")[0].states) == wanted


def test_jobs_are_shown_watched_cancelled_deleted_and_downloaded(
    bunraku: CommandLine, fake: FakeGateway, tmp_path: Path
) -> None:
    fake.succeed()
    summary = "832x480, 81 frames at 16 fps, 1.05 MB, seed 42, 7.0 s"
    assert bunraku("jobs", "get", "0123") == 0
    assert "state: succeeded\n" in bunraku.out
    assert "seed: 42\n" in bunraku.out
    assert bunraku("jobs", "get", NAME, "--json") == 0
    assert json.loads(bunraku.out)["name"] == NAME
    assert bunraku("jobs", "watch", "0123") == 0
    assert bunraku.out == f"{NAME}: {summary}\n"
    assert bunraku("jobs", "cancel", "0123") == 0
    assert bunraku.out == f"{NAME}: succeeded\n"
    assert bunraku("jobs", "download", "0123") == 0
    assert bunraku.out == f"0123.mp4: {summary}\n"
    assert (tmp_path / "0123.mp4").read_bytes() == VIDEO
    assert bunraku("jobs", "delete", "0123") == 0
    named = [request for rpc, request in fake.calls if rpc not in ("DownloadAsset", "WatchGeneration")]
    assert {request.name for request in named} == {NAME}


def test_download_of_a_job_that_has_no_video_yet_is_an_error(bunraku: CommandLine, fake: FakeGateway) -> None:
    fake.generation.state = pb.GENERATION_STATE_RUNNING
    assert bunraku("jobs", "download", "0123") == 1
    assert bunraku.err == f"error: {NAME} has not ended yet\n"


def test_help_is_read_without_what_the_commands_need() -> None:
    code = (
        "import sys; sys.argv = ['bunraku', 'animate', '--help']\n"
        "from bunraku.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "heavy = {'torch', 'numpy', 'grpc', 'google.protobuf', 'asyncio', 'services', 'runtime', 'gateway'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "--driving-video" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "[]"


def test_client_needs_neither_torch_nor_the_servers_packages() -> None:
    code = (
        "import sys, bunraku.client, bunraku.cli.generation, bunraku.cli.failures\n"
        "heavy = {'torch', 'numpy', 'PIL', 'av', 'runtime', 'services', 'gateway', 'bunraku.supervisor', 'pydantic_settings'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "[]\n"


@pytest.fixture
def fake_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Fake stages in place of the real ones; the file tells their process ids."""
    notes = tmp_path / "notes"
    command = (sys.executable, "-c", _STAGE_BY_NAME)
    for stage in supervisor.STAGES:
        service = f"bunraku.v1.{stage.capitalize()}Service"
        monkeypatch.setitem(supervisor.COMMANDS, stage, (*command, service))
    monkeypatch.setitem(supervisor.COMMANDS, supervisor.GATEWAY, FAKE_GATEWAY)
    monkeypatch.setenv("FAKE_NOTES", str(notes))
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.toml").touch()
    monkeypatch.setenv("BUNRAKU_BUNDLE", str(tmp_path / "bundle"))
    return notes


_STAGE_BY_NAME = (
    "import os, sys; os.environ['FAKE_SERVICE'] = sys.argv[1]\nfrom tests.bunraku.fake_stage import main; main()"
)


def test_animate_local_starts_a_system_for_the_call_and_stops_it(
    bunraku: CommandLine,
    fake: FakeGateway,
    fake_system: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert bunraku(*ANIMATE, "--local") == 0
    assert bunraku.out.startswith("out.mp4: 832x480, 81 frames")
    assert (tmp_path / "out.mp4").read_bytes() == VIDEO
    for name in (*supervisor.STAGES, supervisor.GATEWAY):
        assert re.search(rf"^{name}: ready, 127\.0\.0\.1:\d+", bunraku.err, re.MULTILINE)
    processes = [int(line.split()[-1]) for line in fake_system.read_text().splitlines() if "started" in line]
    assert len(processes) == 4
    assert gone(processes)
    assert fake.calls == []
    assert list((tmp_path / "temporary").iterdir()) == []


def test_serve_runs_until_ctrl_c(bunraku: CommandLine, fake_system: Path, tmp_path: Path) -> None:
    log = tmp_path / "data" / "logs" / "gateway.log"

    def interrupt() -> None:
        written: Any = sys.stdout
        assert eventually(lambda: "the gateway listens on 127.0.0.1:" in written.getvalue())
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    assert bunraku("serve", "--data", tmp_path / "data", "--port", "0", "--grace", "5", "--verbose") == 0
    interrupting.join()
    assert bunraku.out.splitlines()[-1] == "stopped"
    assert "[vae] a line of its log" in bunraku.out
    assert log.exists()
    processes = [int(line.split()[-1]) for line in fake_system.read_text().splitlines() if "started" in line]
    assert gone(processes)
    assert not any(map(alive, processes))


async def test_work_is_given_up_when_the_system_fails(tmp_path: Path) -> None:
    class Failing(supervisor.Supervisor):
        async def watch(self) -> NoReturn:
            raise supervisor.SystemFailed("the vae process died")

    given_up = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            given_up.set()

    with pytest.raises(supervisor.SystemFailed, match="the vae process died"):
        await while_running(Failing([], data=tmp_path), work())
    assert given_up.is_set()


async def test_interrupted_work_has_the_last_word(tmp_path: Path) -> None:
    class Running(supervisor.Supervisor):
        async def watch(self) -> NoReturn:
            await asyncio.sleep(60)
            raise AssertionError

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise Cancelled("cancelled generations/1") from None

    task = asyncio.create_task(while_running(Running([], data=tmp_path), work()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(Cancelled, match="cancelled generations/1"):
        await task


def test_devices_are_given_by_stage_or_for_all() -> None:
    assert parse_devices("") == {}
    assert parse_devices("encoder=cuda:0, denoiser=cuda:1") == {"encoder": "cuda:0", "denoiser": "cuda:1"}
    assert parse_devices("cpu") == dict.fromkeys(supervisor.STAGES, "cpu")
    for wrong in ("encoder=", "encoder=a,encoder=b", "cuda:0,vae=cpu"):
        with pytest.raises(typer.BadParameter):
            parse_devices(wrong)


def test_row_that_only_moves_on_is_written_once_in_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(Console(), interval_s=5.0)
    for at, completed in ((0.0, 1), (4.0, 2), (5.0, 3), (6.0, 4)):
        display.show("denoise", Row("denoise", "running", f"{completed} of 8", ticking=True, at=at))
    for at in (7.0, 70.0):
        display.show("denoise", Row("denoise", "done", "8 of 8", at=at))
    assert re.findall(r"denoise: (\w+, \d of 8)", capsys.readouterr().out) == [
        "running, 1 of 8",
        "running, 3 of 8",
        "done, 8 of 8",
    ]


def test_terminal_shows_bars_and_the_time_that_is_left() -> None:
    console = Console(force_terminal=True, width=100, record=True)
    display = generation.GenerationDisplay(console)
    running = pb.Generation(name=NAME, state=pb.GENERATION_STATE_RUNNING)
    running.progress.fraction = 0.25
    running.progress.remaining.FromSeconds(90)
    denoise = stage_event("denoise", 2, 8)
    denoise.progress.window, denoise.progress.windows = 1, 3
    with display:
        display.happened(pb.WatchGenerationResponse(generation=running))
        display.happened(denoise)
    shown = console.export_text()
    assert re.search(r"denoise \(window 2 of 3\)\s+running\s+━.*2 of 8\s+1\.\d s", shown)
    assert "running, 25%, 1 min 30 s left" in shown


def test_a_generation_that_waits_shows_its_place_in_the_queue_until_it_is_begun() -> None:
    display = generation.GenerationDisplay(Console())
    queued = pb.WatchGenerationResponse()
    queued.generation.state = pb.GENERATION_STATE_QUEUED
    display.happened(queued)
    place = pb.WatchGenerationResponse()
    place.queue.position = 3
    place.queue.remaining.FromSeconds(120)
    display.happened(place)
    assert display.footer().startswith("queued, number 3 in the queue, ")
    assert display.footer().endswith(" left")
    running = pb.WatchGenerationResponse()
    running.generation.state = pb.GENERATION_STATE_RUNNING
    display.happened(running)
    assert "queue" not in display.footer()


def test_tables_hold_brackets_as_they_are() -> None:
    console = Console(force_terminal=True, width=60, record=True)
    write_table(console, ["name"], [["[red]text[/red]"]])
    assert "[red]text[/red]" in console.export_text()


def test_times_and_sizes_are_written_for_people() -> None:
    assert [seconds(value) for value in (0.04, 59.9, 65, 7800)] == ["0.0 s", "59.9 s", "1 min 05 s", "2 h 10 min"]
    assert [size(value) for value in (7, 1_300_000, 80e9, 2e12)] == ["7 B", "1.3 MB", "80 GB", "2 TB"]


def test_commands_say_what_they_do() -> None:
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert inspect.getdoc(command.callback)
