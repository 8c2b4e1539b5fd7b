"""All stages on one GPU within a number of bytes: an animation through the gateway and the real processes. Needs a GPU.

`python -m benchmarks.one_gpu [--budgets 0,24,16,12] [--steps 3] [--json FILE]` writes random weights of real size under the
names of SCAIL's release (30 GiB). For each budget (GiB for all stages together; 0: each takes what it likes, and comes
first) it starts `bunraku serve --vram`, waits until every stage has warmed up, and has a picture animated twice, 896x512,
81 frames, with guidance. nvidia-smi tells every 50 ms what each process takes of the device, from before the start.

The poses are a ready video: in random weights NLF finds nobody. Its network has the released size; the two ONNX networks
are those of bundles/tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from benchmarks.memory import device_name, write_random
from benchmarks.pose_chain import random_nlf
from benchmarks.precision import clocks
from bunraku.client import Client
from bunraku.supervisor import GATEWAY, STAGES
from bunraku.v1 import gateway_pb2 as pb
from runtime.bundles import Bundle, configuration, load_bundle
from runtime.weights import build_on_meta
from services.denoiser.model import PRESETS as TRANSFORMERS
from services.denoiser.model import TransformerConfig
from services.denoiser.precision import PRECISIONS
from services.encoder.image import PRESETS as IMAGE_ENCODERS
from services.encoder.image import ImageEncoderConfig
from services.encoder.text import PRESETS as TEXT_ENCODERS
from services.encoder.text import TextEncoderConfig
from services.vae.model import PRESETS as VAES
from services.vae.model import Vae, VaeConfig
from tests.system.media import read_video, write_picture, write_pose_video
from training.pose_models.export import write_nlf
from training.random_bundle import Shapes, image_encoder_shapes, save, shapes_of, text_encoder_shapes
from training.tiny_tokenizer import write_tokenizer

MIB = 1024**2
BUNDLES = Path(__file__).parents[1] / "bundles"
BUNDLE = BUNDLES / "scail-14b"
HEIGHT, WIDTH = 512, 896
_READY = "the gateway listens on "
_START_S, _STOP_S = 400.0, 60.0
_COLUMNS = (
    "budget GiB",
    *(f"{stage}" for stage in STAGES),
    "all, GiB",
    "start s",
    "first request s",
    "second s",
    "denoise s a step",
    "of no budget",
    "frames differ by: mean, most",
)


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        models = Path(directory) / "models"
        # in a process of its own: the context of what is made on the device would count as memory of it later
        subprocess.run([sys.executable, "-m", "benchmarks.one_gpu", "--write", str(models)], check=True)
        budgets = [float(text) for text in options.budgets.split(",")]
        print(f"{device_name()}, {clocks()}; {options.precision}; {WIDTH}x{HEIGHT}, {options.frames} frames,")
        print(f"{options.steps} steps with guidance; GiB of the device by nvidia-smi")
        print(f"\n| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}")
        rows: list[Row] = []
        for budget in budgets:
            rows.append(measured(budget, models, Path(directory), options))
            print(_line(rows), flush=True)
        print(f"\nafterwards: {clocks()}\n")
        for row in rows:
            print("\n".join([f"{row.budget:g} GiB", *(f"  {line}" for line in row.shares)]))
            print("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row.second.stages.items()))
    if options.json is not None:
        options.json.write_text(json.dumps([row.document() for row in rows], indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", default="0,24,16,12", help="GiB")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[-1], help="of the denoiser")
    parser.add_argument("--directory", type=Path, help="for the weights, best in memory")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--write", type=Path, help="only write the weights, to this directory")
    options = parser.parse_args()
    if options.write is not None:
        write_models(load_bundle(BUNDLE, options.write), torch.device("cuda:0"))
        sys.exit()
    return options


def write_models(bundle: Bundle, device: torch.device) -> None:
    """Random weights of what the stages load, made on the device."""
    component = bundle.component("transformer")
    component.files[0].parent.mkdir(parents=True)
    write_random(component.files[0], configuration(component, TRANSFORMERS, TransformerConfig), device)
    text = bundle.component("text_encoder")
    text_config = configuration(text, TEXT_ENCODERS, TextEncoderConfig)
    save(text.files[0], random_on(device, text_encoder_shapes(text_config), torch.bfloat16))
    assert text.tokenizer is not None
    write_tokenizer(text.tokenizer, text_config.vocab)
    image = bundle.component("image_encoder")
    shapes = image_encoder_shapes(configuration(image, IMAGE_ENCODERS, ImageEncoderConfig))
    save(image.files[0], random_on(device, shapes, torch.float16))
    vae = bundle.component("vae")
    vae_config = configuration(vae, VAES, VaeConfig)
    save(vae.files[0], random_on(device, shapes_of(build_on_meta(lambda: Vae(vae_config))), torch.float32))
    joints = bundle.component("joints_3d").files[0]
    joints.parent.mkdir(parents=True)
    write_joints(joints)
    tiny = load_bundle(BUNDLES / "tiny")
    for name in ("person_detector", "whole_body_keypoints"):
        shutil.copyfile(tiny.component(name).files[0], bundle.component(name).files[0])


def write_joints(file: Path) -> None:
    network = random_nlf(torch.device("cpu"))
    write_nlf(network.model, network.canonical_points, network.config, file)


def random_on(device: torch.device, shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    """As training.random_bundle.random_tensors, made where it is quick."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, device=device)
        if len(shape) > 1:
            values *= values[0].numel() ** -0.5
        else:
            values = values * 0.1 + (1 if name.endswith(("gamma", "weight")) else 0)
        tensors[name] = values.to(dtype).cpu()
    return tensors


@dataclass(frozen=True)
class Request:
    """What one animation took."""

    seconds: float
    stages: Mapping[str, float]
    frames: npt.NDArray[np.uint8]


@dataclass
class Row:
    """What one budget gave."""

    budget: float
    shares: list[str]
    start_s: float
    first: Request
    second: Request
    steps: int
    peaks: Mapping[str, int] = field(default_factory=dict)  # MiB of each process, and `all` together

    def difference(self, base: Row) -> str:
        """Of its frames from those of another row, in levels of 255."""
        levels = np.abs(self.second.frames.astype(np.int16) - base.second.frames)
        return f"{levels.mean():.2f}, {levels.max()}" if levels.any() else "the same"

    @property
    def step_s(self) -> float:
        return self.second.stages["denoise"] / self.steps

    def document(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "shares": self.shares,
            "start_s": self.start_s,
            "first_s": self.first.seconds,
            "second_s": self.second.seconds,
            "stages_s": dict(self.second.stages),
            "step_s": self.step_s,
            "peaks_mib": dict(self.peaks),
        }


def measured(budget: float, models: Path, directory: Path, options: argparse.Namespace) -> Row:
    """Serves within a budget, and animates twice."""
    picture = write_picture(directory / "picture.png", HEIGHT, WIDTH)
    poses = write_pose_video(directory / "poses.mp4", options.frames, HEIGHT, WIDTH, rate=16)
    data = Path(tempfile.mkdtemp(dir=directory))
    begun = time.perf_counter()
    with DeviceWatch() as device, serving(budget, models, data, options.precision) as (address, shares, serving_pid):
        start_s = time.perf_counter() - begun
        device.know(serving_pid)
        with Client(address) as client:
            arguments = (client, picture, poses, options, data / "video.mp4")
            first, second = animated(*arguments), animated(*arguments)
        row = Row(budget, shares, start_s, first, second, options.steps)
    row.peaks = device.peaks
    shutil.rmtree(data)
    return row


@contextmanager
def serving(budget: float, models: Path, data: Path, precision: str) -> Iterator[tuple[str, list[str], int]]:
    """`bunraku serve`: its address, what it says of the shares, and its process."""
    command = [sys.executable, "-m", "bunraku.cli", "serve", "--bundle", str(BUNDLE)]
    command += ["--models", str(models), "--data", str(data), "--port", "0"]
    if budget:
        command += ["--vram", f"{budget:g}GiB"]
    # without kept outputs both requests need every stage
    environment = {**os.environ, "BUNRAKU_PRECISION": precision, "BUNRAKU_OUTPUT_CACHE_BYTES": "0", "COLUMNS": "200"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    impatience = threading.Timer(_START_S, process.kill)
    impatience.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if _READY in line:
                break
        else:
            sys.exit("bunraku serve ended:\n" + "\n".join(lines[-40:]))
        impatience.cancel()
        reader = threading.Thread(target=_each_line, args=(process, lines.append), daemon=True)
        reader.start()  # so that its pipe never runs full
        address = line.partition(_READY)[2].split(";")[0].strip()
        yield address, [line for line in lines if "GiB," in line], process.pid
    finally:
        impatience.cancel()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def animated(client: Client, picture: Path, poses: Path, options: argparse.Namespace, video: Path) -> Request:
    """One animation, from the call to the file."""
    begun = time.perf_counter()
    generation = client.animate(
        reference_image=picture,
        pose_video=poses,
        prompt="a young woman in a red dress dances on a beach at sunset",
        num_inference_steps=options.steps,
        height=HEIGHT,
        width=WIDTH,
        num_frames=options.frames,
        seed=1,
    )
    done = client.wait(generation.name, timeout_s=600)
    if done.state != pb.GENERATION_STATE_SUCCEEDED:
        sys.exit(f"{done.name} {pb.GenerationState.Name(done.state)}: {done.error.message}")
    client.download(done.video, video)
    stages = {stage.stage: stage.seconds for stage in done.progress.stages}
    return Request(time.perf_counter() - begun, stages, read_video(video))


class DeviceWatch:
    """The most that each process takes of the device within a `with` block, and all together, by nvidia-smi, in MiB."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._of_process: dict[int, int] = defaultdict(int)
        self._all, self._before = 0, 0
        self._queries: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> DeviceWatch:
        self._before = int(subprocess.check_output([*_SMI, "--query-gpu=memory.used"], text=True))
        for query, note in (("gpu=memory.used", self._note_all), ("compute-apps=pid,used_memory", self._note_process)):
            command = [*_SMI, f"--query-{query}", "--loop-ms=50"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            thread = threading.Thread(target=_each_line, args=(process, note), daemon=True)
            thread.start()
            self._queries.append(process)
            self._threads.append(thread)
        return self

    def __exit__(self, *error: object) -> None:
        for process, thread in zip(self._queries, self._threads, strict=True):
            process.terminate()
            process.wait()
            thread.join()

    def know(self, pid: int) -> None:
        """Tells which processes `bunraku serve` of this number has started."""
        for child in psutil.Process(pid).children(recursive=True):
            for name in (*STAGES, GATEWAY):
                if f"services.{name}" in child.cmdline():
                    self._names[child.pid] = name

    @property
    def peaks(self) -> dict[str, int]:
        """`all` is less what the device had taken before."""
        found = {self._names.get(pid, f"process {pid}"): most for pid, most in self._of_process.items()}
        return {**found, "all": self._all - self._before}

    def _note_all(self, line: str) -> None:
        self._all = max(self._all, int(line))

    def _note_process(self, line: str) -> None:
        pid, _, used = line.partition(",")
        if used.strip().isdecimal():  # a process that is ending has none
            self._of_process[int(pid)] = max(self._of_process[int(pid)], int(used))


_SMI = ("nvidia-smi", "--format=csv,noheader,nounits")


def _each_line(process: subprocess.Popen[str], note: Any) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            note(line)


def _line(rows: list[Row]) -> str:
    """The last of the rows as one of the table."""
    row, base = rows[-1], rows[0]
    cells = [
        f"{row.budget:g}" if row.budget else "none",
        *(f"{row.peaks.get(name, 0) * MIB / 1024**3:.2f}" for name in (*STAGES, "all")),
        f"{row.start_s:.0f}",
        f"{row.first.seconds:.2f}",
        f"{row.second.seconds:.2f}",
        f"{row.step_s:.3f}",
        f"{row.step_s / base.step_s:.3f}",
        row.difference(base),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
