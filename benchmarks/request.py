"""One request, stage by stage: SCAIL 14B at full size on one GPU, all stages' models on it at once.

`python -m benchmarks.request [--precision fast] [--size 896x512] [--frames 65] [--steps 30] [--step-cache none,mag:2]`
prints seconds, peak memory and share of each stage, their sum beside the 12 minutes that SCAIL's own code takes for 65
frames (its README says so, on a GPU that it does not name), and a floor: the arithmetic of all stages at the rate that
bfloat16 matrix products reach in the same run.

Each stage's own code computes, as its service calls it, in this process and without gRPC: UMT5-XXL and CLIP ViT-H/14 in
bfloat16, the VAE in float16 with its frames copied from and to host memory, 30 steps of UniPC with guidance, looked at
after each. Weights are random, of real size. The negative prompt is the bundle's; words are cut by the tokenizer of
bundles/tiny, which makes more tokens of them than the released one does.

Poses: their networks have a benchmark of their own, which is run for as many frames and adds its seconds
(`--pose-fps` takes them from a rate measured before). Decoding and encoding the video files is not part of this.

`--measured-steps N` computes only N of the steps and says that the total is calculated. `--first` compares a first request
with a second, of `--steps 2` say, after the stages have warmed up, or without that (`--cold`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.denoiser import GIB, matmul_rate, operations, timed
from benchmarks.precision import clocks, random_model
from benchmarks.vae import work_of
from runtime.gpu import gate_blocks
from runtime.weights import build_on_meta
from services.denoiser.conditioning import animation, seeded_noise
from services.denoiser.denoise import FULL, Expert, Forwards, Options, Prompt, denoise, plan_steps
from services.denoiser.model import PRESETS, DiffusionTransformer, TransformerConfig
from services.denoiser.plan import animation_tokens
from services.denoiser.precision import PRECISIONS, arithmetic_of, attention_of, set_precision
from services.denoiser.sampling import make_solver
from services.denoiser.step_cache import DEFAULT_SPEEDUP, StepCache
from services.denoiser.warm_up import warm_up as warm_up_denoiser
from services.encoder import image, text
from services.encoder.image import ImageEncoder, ImageEncoderConfig, ImageModel
from services.encoder.text import PromptTokenizer, TextEncoder, TextEncoderConfig, TextModel
from services.vae.channels_last import walk_channels_last
from services.vae.model import PRESETS as VAES
from services.vae.model import Vae, VaeConfig, from_uint8, to_uint8
from services.vae.plan import WHOLE
from services.vae.warm_up import warm_up as warm_up_vae

Module = TypeVar("Module", bound=nn.Module)

OFFICIAL_S = 12 * 60.0  # zai-org/SCAIL's README, for 65 frames
_PUBLISHED = (512, 896, 65)
BUNDLES = Path(__file__).parents[1] / "bundles"
PROMPT = "A young woman in a red dress dances on a beach at sunset, waves behind her, the camera stands still."
_RATE = re.compile(r"([\d.]+) frames/s")


def main() -> None:
    options = _parser().parse_args()
    on_gpu = torch.cuda.is_available()
    width, height = map(int, options.size.split("x"))
    caches = [_step_cache(given) for given in options.step_cache.split(",")]
    clips = [Clip(height, width, options.frames, options.steps, cache) for cache in caches]
    if options.measured_steps and any(caches):
        sys.exit("--measured-steps: with a step cache no step stands for the others")
    device = torch.device("cuda:0" if on_gpu else "cpu")
    sizes = SMALL if options.small else FULL_SIZE
    pose_s = pose_seconds(options.frames, options.pose_fps) if options.pose_fps or on_gpu else None
    rate = matmul_rate(device)
    place = f"{torch.cuda.get_device_name(device)}, {clocks()}" if on_gpu else "CPU"
    print(f"{place}; bf16 matrix products: {rate / 1e12:.1f} TFLOP/s", flush=True)
    with torch.inference_mode():
        stages = Stages(sizes, device, options.precision)
        print(f"{options.precision}: {arithmetic_of(stages.transformer)}, attention {attention_of(stages.transformer)}")
        if options.first:
            print(first_beside_second(stages, clips[0], is_warm=not options.cold))
            return
        warm_s = sum(stages.warm_up(clips[0]).values())
        print(f"warmed up in {warm_s:.1f} s")
        reports = []
        for clip in clips:
            rows = stages.request(clip, options.measured_steps or clip.steps)
            if pose_s is not None:
                rows.insert(0, Row("poses", pose_s))
            floor_s = sum(stages.floors(clip)) / rate
            reports.append(Report(place, options.precision, clip, rows, floor_s, stages.step_s))
            print(reports[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps([report.document() for report in reports], indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[-1])
    parser.add_argument("--size", default="896x512", help="width x height")
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--step-cache",
        default="none",
        help="none, or tea or mag, a colon and the factor of fewer passes; several by commas",
    )
    parser.add_argument("--measured-steps", type=int, help="compute only so many")
    parser.add_argument("--pose-fps", type=float, help="frames of poses a second, as benchmarks.pose_chain prints")
    parser.add_argument("--first", action="store_true", help="a first request beside a second, and no total")
    parser.add_argument("--cold", action="store_true", help="of --first: without warming up")
    parser.add_argument("--small", action="store_true", help="small models, for a trial")
    parser.add_argument("--json", type=Path, help="to write")
    return parser


@dataclass(frozen=True)
class Clip:
    """What is asked for."""

    height: int
    width: int
    num_frames: int
    steps: int
    step_cache: StepCache | None

    @property
    def options(self) -> Options:
        return replace(FULL, step_cache=self.step_cache)

    def __str__(self) -> str:
        cache = f", {self.step_cache.method} cache {self.step_cache.speedup:g}" if self.step_cache else ""
        return f"{self.width}x{self.height}, {self.num_frames} frames, {self.steps} steps with guidance{cache}"


@dataclass(frozen=True)
class Sizes:
    transformer: TransformerConfig
    text: TextEncoderConfig
    image: ImageEncoderConfig
    vae: VaeConfig


FULL_SIZE = Sizes(PRESETS["scail-14b"], text.PRESETS["umt5-xxl"], image.PRESETS["clip-vit-h-14"], VAES["wan2.1"])
SMALL = Sizes(
    replace(PRESETS["scail-14b"], dim=256, ffn_dim=768, num_heads=2, num_layers=2, text_dim=64, image_dim=80),
    replace(text.PRESETS["umt5-xxl"], dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2),
    replace(image.PRESETS["clip-vit-h-14"], dim=80, num_heads=4, num_layers=2),
    replace(VAES["wan2.1"], dim=16),
)


@dataclass
class Row:
    stage: str
    seconds: float
    peak_gib: float | None = None  # allocated on the device, all models included


class Stages:
    """The models of all stages, on one device, and a request that passes through them."""

    def __init__(self, sizes: Sizes, device: torch.device, precision: str) -> None:
        self.device, self.sizes = device, sizes
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        tokenizer = PromptTokenizer(BUNDLES / "tiny" / "umt5", sizes.text)
        self.text = TextEncoder(sizes.text, _random(partial(TextModel, sizes.text), device, dtype), tokenizer)
        picture_model = _random(partial(ImageModel, sizes.image), device, dtype)
        embeddings = picture_model.clip.embeddings
        places = torch.arange(embeddings.num_positions, device=device)[None]
        embeddings.register_buffer("position_ids", places, persistent=False)
        self.image = ImageEncoder(sizes.image, picture_model)
        self.vae = Vae(sizes.vae).to(device, torch.float16 if device.type == "cuda" else torch.float32).eval()
        walk_channels_last(self.vae)
        self.transformer: DiffusionTransformer = random_model(sizes.transformer, device)
        set_precision(self.transformer, precision, device)
        gate_blocks(self.transformer.blocks, device)
        self.rows: list[Row] = []
        self.step_s: list[float] = []
        with (BUNDLES / "scail-14b" / "bundle.toml").open("rb") as file:
            self.sampling = tomllib.load(file)["sampling"]

    def warm_up(self, clip: Clip) -> dict[str, float]:
        """As the services do before they are ready; seconds of each."""
        work: dict[str, Callable[[], object]] = {
            "encode text": lambda: self.text.encode(["a person dances"]),
            "encode image": lambda: self.image.encode([torch.zeros(64, 64, 3, dtype=torch.uint8, device=self.device)]),
            "VAE": lambda: warm_up_vae(self.vae, clip.height, clip.width, lambda direction, height, width: WHOLE),
            "denoise": lambda: warm_up_denoiser(
                self.transformer, self.device, clip.height, clip.width, clip.num_frames
            ),
        }
        taken = {}
        for name, warm_up in work.items():
            with timed(self.device) as seconds:
                warm_up()
            taken[name] = seconds()
        return taken

    def request(self, clip: Clip, measured_steps: int) -> list[Row]:
        """Seconds and peak of each stage, in the order of the pipeline."""
        self.rows = []
        generator = torch.Generator().manual_seed(1)
        picture = torch.randint(0, 256, (1, clip.height, clip.width, 3), dtype=torch.uint8, generator=generator)
        shape = (clip.num_frames, clip.height // 2, clip.width // 2, 3)
        poses = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).half()
        with self.measured("encode text, twice"):
            texts = [
                self.text.encode([words]).prompt_embeds.cpu() for words in (PROMPT, self.sampling["negative_prompt"])
            ]
        with self.measured("encode image"):
            image_embeds = self.image.encode([picture[0].to(self.device)]).cpu()
        with self.measured("VAE: encode reference"):
            reference = self.encode(picture)
        with self.measured("VAE: encode poses"):
            pose_latents = self.encode(poses)
        prompt = Prompt(*(tensor.to(self.device) for tensor in (*texts, image_embeds)))
        with self.measured(f"denoise, {measured_steps} steps"):
            latents = self.denoise(clip, prompt, reference, pose_latents, measured_steps)
        with self.measured("VAE: decode"):
            frames = self.decode(latents)
        assert frames.shape == (clip.num_frames, clip.height, clip.width, 3)
        return self.rows

    def encode(self, frames: Tensor) -> Tensor:
        """Levels [n, H, W, 3] on the host -> latents [1, 16, T, h, w] on the host, as VaeService.Encode."""
        groups = (from_uint8(group.to(self.device)) for group in torch.split(frames, 4))
        return torch.cat([latents.cpu() for latents in self.vae.encode_stream(groups)], dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents on the host -> frames uint8 [n, H, W, 3] on the host, as VaeService.Decode."""
        stream = self.vae.decode_stream(torch.split(latents.to(self.device), 1, dim=2))
        return torch.cat([to_uint8(frames).cpu() for frames in stream])

    def denoise(
        self, clip: Clip, prompt: Prompt, reference: Tensor, pose_latents: Tensor, measured_steps: int
    ) -> Tensor:
        """As DenoiserService.Denoise; what is left out of the steps is left out of the latents too."""
        config = self.sizes.transformer
        conditioning = animation(
            reference.to(self.device), pose_latents.to(self.device), config.head_dim, pose_time_origin=1
        )
        shape = (1, 16, 1 + pose_latents.shape[2], *reference.shape[3:])
        solver = make_solver(self.sampling["solver"], clip.steps, self.sampling["shift"])
        start = solver.start(seeded_noise(shape, 0).to(self.device))
        experts = [Expert(self.transformer, self.sampling["guidance_scale"])]
        self.step_s, begun = [], time.perf_counter()
        for state in islice(denoise(experts, solver, start, conditioning, prompt, clip.options), measured_steps):
            finite = bool(torch.isfinite(state.latents).all())  # waits for the device, as the service does
            assert finite
            self.step_s.append(time.perf_counter() - begun)
            begun = time.perf_counter()
        return conditioning.result(state.latents).cpu()

    def forwards(self, clip: Clip) -> Forwards:
        """Passes that the steps take."""
        solver = make_solver(self.sampling["solver"], clip.steps, self.sampling["shift"])
        latents = torch.empty(1, 16, 1, clip.height // 8, clip.width // 8)
        experts = [Expert(self.transformer, self.sampling["guidance_scale"])]
        return Forwards.of(plan_steps(experts, solver, clip.options, latents))

    def floors(self, clip: Clip) -> Iterator[float]:
        """Operations of each stage but the poses."""
        sizes, frames = self.sizes, clip.num_frames
        with FlopCounterMode(display=False) as counted:
            for words in (PROMPT, self.sampling["negative_prompt"]):
                self.text.encode([words])
            self.image.encode([torch.zeros(64, 64, 3, dtype=torch.uint8, device=self.device)])
        yield counted.get_total_flops()
        yield work_of(sizes.vae, "encode", clip.height, clip.width, 1).operations
        yield work_of(sizes.vae, "encode", clip.height // 2, clip.width // 2, frames).operations
        tokens = animation_tokens(clip.height, clip.width, frames)
        yield self.forwards(clip).computed * operations(sizes.transformer, tokens)
        yield work_of(sizes.vae, "decode", clip.height, clip.width, frames).operations

    @contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        with timed(self.device) as seconds:
            yield
        peak = torch.cuda.max_memory_allocated(self.device) / GIB if on_gpu else None
        self.rows.append(Row(stage, seconds(), peak))


@dataclass(frozen=True)
class Report:
    """Of one request."""

    place: str
    precision: str
    clip: Clip
    rows: list[Row]
    floor_s: float
    step_s: list[float]

    @property
    def calculated(self) -> bool:
        """Whether steps were left out."""
        return len(self.step_s) < self.clip.steps

    @property
    def denoise_s(self) -> float:
        """Of all steps; those that were left out take as long as the later half of the others."""
        steady = self.step_s[len(self.step_s) // 2 :]
        return sum(self.step_s) + (self.clip.steps - len(self.step_s)) * sum(steady) / len(steady)

    @property
    def total_s(self) -> float:
        measured = sum(row.seconds for row in self.rows)
        return measured + (self.denoise_s - sum(self.step_s) if self.calculated else 0.0)

    def document(self) -> dict[str, Any]:
        return {
            "place": self.place,
            "precision": self.precision,
            "request": str(self.clip),
            "rows": list(map(asdict, self.rows)),
            "step_s": self.step_s,
            "steps_calculated": self.clip.steps - len(self.step_s),
            "total_s": self.total_s,
            "floor_s": self.floor_s,
            "official_s": OFFICIAL_S,
        }

    def __str__(self) -> str:
        left_out = self.denoise_s - sum(self.step_s)
        rows = list(self.rows)
        if self.calculated:
            rows.append(Row(f"denoise, the other {self.clip.steps - len(self.step_s)} steps, CALCULATED", left_out))
        lines = ["", f"{self.clip}", "", "| stage | s | of the total | peak GiB |", "| --- | ---: | ---: | ---: |"]
        for row in rows:
            peak = "" if row.peak_gib is None else f"{row.peak_gib:.1f}"
            lines.append(f"| {row.stage} | {row.seconds:.2f} | {row.seconds / self.total_s:.1%} | {peak} |")
        total = f"**{self.total_s:.1f}**{' (calculated from some steps)' if self.calculated else ''}"
        lines += [
            f"| all | {total} | | |",
            f"| floor: all arithmetic at the bf16 rate | {self.floor_s:.1f}, ratio {self.total_s / self.floor_s:.2f} | | |",
        ]
        if (self.clip.height, self.clip.width, self.clip.num_frames) == _PUBLISHED:
            times = f"{OFFICIAL_S:.0f}, {OFFICIAL_S / self.total_s:.1f} times as long"
            lines.append(f"| SCAIL's own code, as published | {times} | | |")
        return "\n".join(lines)


def first_beside_second(stages: Stages, clip: Clip, *, is_warm: bool) -> str:
    """A table of the seconds that each stage takes to warm up, at a first request and at a second."""
    warm = stages.warm_up(clip) if is_warm else {}
    first, second = (stages.request(clip, clip.steps) for _ in range(2))
    lines = [f"{name}: warmed up in {seconds:.2f} s" for name, seconds in warm.items()] or ["not warmed up"]
    lines += ["", "| stage | first request, s | second, s | first - second |", "| --- | ---: | ---: | ---: |"]
    for one, other in zip(first, second, strict=True):
        late = one.seconds - other.seconds
        lines.append(f"| {one.stage} | {one.seconds:.2f} | {other.seconds:.2f} | {late:.2f} |")
    totals = [sum(row.seconds for row in rows) for rows in (first, second)]
    lines.append(f"| all | {totals[0]:.2f} | {totals[1]:.2f} | {totals[0] - totals[1]:.2f} |")
    return "\n".join(lines)


def pose_seconds(num_frames: int, frames_per_second: float | None) -> float:
    """Of the poses of so many frames; without a known rate the benchmark of the poses is run for them."""
    if frames_per_second is not None:
        return num_frames / frames_per_second
    command = [sys.executable, "-m", "benchmarks.pose_chain", "--frames", str(num_frames)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _RATE.search(printed)
    if found is None:
        sys.exit(f"benchmarks.pose_chain printed no rate:\n{printed}")
    return num_frames / float(found[1])


def _step_cache(given: str) -> StepCache | None:
    method, _, speedup = given.partition(":")
    return None if method == "none" else StepCache(method, float(speedup or DEFAULT_SPEEDUP))


def _random(build: Callable[[], Module], device: torch.device, dtype: torch.dtype) -> Module:
    """A model of random weights, made on the device at once."""
    model = build_on_meta(build).to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
