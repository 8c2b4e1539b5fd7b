"""The VAE at full width: seconds and memory of encoding and decoding, beside a peer and the physical floor.

`python -m benchmarks.vae [--size 832x480] [--frames 81] [--budgets 2,3,4] [--forms] [--profile] [--json FILE]` fills
the VAE of Wan 2.1 with random weights and prints a row for each way through it: `ours`, the channels-last walk as the
service computes it (float16 on a GPU, float32 on a CPU), within each of `--budgets` GiB too, in the tiles that the plan
chooses and with the cap that the service sets; `modules`, the same weights in the released form (one tensor
[B, C, n, h, w], float32); and diffusers' AutoencoderKLWan with the same weights and dtype as `ours`, if it is
installed. Ours goes from host memory to host memory, group by group and as bytes, the others from device to device.

On a GPU the peaks are the process' in all: of tensors, of what PyTorch's allocator held, and by the driver's count,
which is the one that a budget is for; on a CPU what a pass added to the resident memory. Planned is what the plan says,
the weights and the driver's own included. The floor is the arithmetic of the convolutions at the rate of a matrix
product of the same run, or the bytes of their inputs and outputs at the rate of a copy, whichever is longer. `--forms`
measures each convolution in every form with the sum after it; `--profile` lists the kernels that take longest.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.denoiser import GIB, timed
from benchmarks.precision import clocks
from runtime.budget import DoesNotFit
from runtime.vram import Peak, cap_memory
from runtime.weights import build_on_meta
from services.vae.channels_last import best_glue, walk_channels_last
from services.vae.convolution import Convolution, Form, arranged, best_form
from services.vae.glue import PLAIN, Glue
from services.vae.model import PRESETS, CausalConv3d, Past, Vae, VaeConfig, from_uint8, to_uint8
from services.vae.plan import WHOLE, Direction, Machine, Tiling, plan_tiles
from services.vae.transfer import OneBehind, to_device
from services.vae.weights import diffusers_name

DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")
_PLENTY = 2**50


@dataclass(frozen=True)
class Row:
    what: str
    direction: str
    dtype: str
    tiles: str
    seconds: float
    allocated_gib: float
    reserved_gib: float
    driver_gib: float
    planned_gib: float | None
    floor_s: float
    ratio: float
    difference: float | None = None  # relative, from `modules`


@dataclass(frozen=True)
class Work:
    """Of a clip."""

    operations: float
    moved_values: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--size", default="832x480" if on_gpu else "96x64", help="width x height")
    parser.add_argument("--frames", type=int, default=81 if on_gpu else 5)
    parser.add_argument("--dim", type=int, default=96, help="of the first stage; smaller for a trial")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budgets", default="", help="GiB, with commas between")
    parser.add_argument("--forms", action="store_true", help="measure each convolution in every form, and nothing else")
    parser.add_argument("--profile", action="store_true", help="list the kernels of both directions, and nothing else")
    parser.add_argument("--json", type=Path, help="to write")
    options = parser.parse_args()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    width, height = map(int, options.size.split("x"))
    bench = Bench(replace(PRESETS["wan2.1"], dim=options.dim), device, height, width, options.frames, options.repeats)
    print(f"{bench.name}; {options.size}, {options.frames} frames, width {options.dim}\n", flush=True)
    with torch.inference_mode():
        if options.forms:
            print(forms_table(bench))
            return
        if options.profile:
            print(profile(bench))
            return
        rows = bench.rows([float(budget) for budget in options.budgets.split(",") if budget])
    if options.json:
        document = {
            "device": bench.name,
            "size": options.size,
            "frames": options.frames,
            "rows": list(map(asdict, rows)),
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


class Bench:
    """The same weights and the same clip for all who are measured."""

    def __init__(
        self, config: VaeConfig, device: torch.device, height: int, width: int, num_frames: int, repeats: int
    ) -> None:
        self.config, self.device, self.repeats = config, device, repeats
        self.height, self.width, self.num_frames = height, width, num_frames
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.is_fused = best_glue(device) is not PLAIN
        threads = f"CPU, {torch.get_num_threads()} threads"
        self.name = f"{torch.cuda.get_device_name(device)}, {clocks()}" if device.type == "cuda" else threads
        torch.manual_seed(0)
        self.weights = Vae(config).state_dict()
        generator = torch.Generator().manual_seed(1)
        self.levels = torch.randint(0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator)
        side, latents = config.pixels_per_latent, (num_frames - 1) // config.frames_per_latent + 1
        self.noise = torch.randn(1, config.z_dim, latents, height // side, width // side, generator=generator)

    def rows(self, budgets: list[float]) -> list[Row]:
        """Measures and prints. Ours come first, when the driver's count holds nothing of the others."""
        for way, dtype in product(DIRECTIONS, (self.dtype, torch.float32)):
            self.floor(way, dtype)  # it needs room that a budget may not leave
        names = [name.removesuffix("_gib").removesuffix("_s") for name in Row.__dataclass_fields__]
        print("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")
        found: list[Row] = []
        results: list[Tensor] = []
        ours = self.vae(self.dtype)
        walk_channels_last(ours)
        for way in DIRECTIONS:
            for budget in (None, *budgets):
                self.within(found, results, ours, way, budget)
        del ours
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        truth = self.modules(found)
        if importlib.util.find_spec("diffusers") is not None:
            self.diffusers(found)
        for place, result in enumerate(results):
            expected = truth[found[place].direction]
            difference = float((result - expected).norm() / expected.norm())
            found[place] = replace(found[place], difference=difference)
            print(f"{found[place].what}, {found[place].direction}: {difference:.3g} from modules")
        return found

    def modules(self, found: list[Row]) -> dict[str, Tensor]:
        """Measures the released form, and gives what it makes of the clips."""
        vae, truth = self.vae(torch.float32), dict[str, Tensor]()
        for way in DIRECTIONS:
            truth[way] = self.collected(vae, way, Past())
            self.measured(found, "modules", way, torch.float32, partial(passed, vae, way, self.clip(way)))
        return truth

    def diffusers(self, found: list[Row]) -> None:
        vae = importlib.import_module("diffusers").AutoencoderKLWan(base_dim=self.config.dim)
        vae.load_state_dict({diffusers_name(name, self.config): weight for name, weight in self.weights.items()})
        vae = vae.to(self.device, self.dtype).eval()
        for way in DIRECTIONS:
            run = partial(passed_by_diffusers, vae, way, self.clip(way).to(self.dtype))
            self.measured(found, "diffusers", way, self.dtype, run)

    def within(self, found: list[Row], results: list[Tensor], vae: Vae, way: Direction, budget: float | None) -> None:
        """The walk, in the tiles of a budget and with its cap."""
        machine = Machine(self.config, self.dtype, self.device.type, is_fused=self.is_fused)
        try:
            tiling = plan_tiles(machine, way, self.height, self.width, int(budget * GIB) if budget else _PLENTY)
        except DoesNotFit as error:
            print(f"| ours | {error} |", flush=True)
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
            cap_memory(self.device, int(budget * GIB) if budget else _PLENTY)
        name = "ours" if budget is None else f"ours, {budget:g} GiB"
        run = partial(self.served, vae, way, tiling)
        try:
            result = self.collected(vae, way, tiling.past())
            self.measured(found, name, way, self.dtype, run, tiling, machine.fixed_bytes)
        except torch.OutOfMemoryError as error:
            print(f"| {name} | {way} | {tiling} take more than was planned: {error} |", flush=True)
        else:
            results.append(result)

    def measured(
        self,
        found: list[Row],
        what: str,
        way: Direction,
        dtype: torch.dtype,
        run: Callable[[], object],
        tiling: Tiling | None = None,
        fixed_bytes: int = 0,
    ) -> None:
        """Runs and prints a row."""
        run()  # what is done but once is done
        taken = []
        with self.peak() as peak:
            for _ in range(self.repeats):
                with timed(self.device) as seconds:
                    run()
                taken.append(seconds())
        floor = self.floor(way, dtype)
        planned = None if tiling is None else (fixed_bytes + tiling.device_bytes) / GIB
        row = Row(
            what, way, str(dtype).removeprefix("torch."), str(tiling or "whole frames"), min(taken),
            peak.allocated_bytes / GIB, peak.reserved_bytes / GIB, peak.driver_bytes / GIB, planned, floor,
            min(taken) / floor,
        )  # fmt: skip
        found.append(row)
        print("| " + " | ".join(cell(value) for value in asdict(row).values()) + " |", flush=True)

    def peak(self) -> Peak | HostPeak:
        if self.device.type != "cuda":
            return HostPeak()
        torch.cuda.empty_cache()
        return Peak(self.device)

    def clip(self, way: Direction) -> Tensor:
        """On the device: frames [1, 3, n, H, W], or latents."""
        return from_uint8(self.levels.to(self.device)) if way == "encode" else self.noise.to(self.device)

    def served(self, vae: Vae, way: Direction, tiling: Tiling) -> list[tuple[Tensor, ...]]:
        """A clip through the VAE as the service does it, from and to host memory."""
        past, leaving = tiling.past(), OneBehind()
        results: list[tuple[Tensor, ...]] = []
        for group in self.groups(way):
            if way == "encode":
                results += leaving.add(vae.encode_group(group, past))
            else:
                results += leaving.add(to_uint8(vae.decode_group(group, past)))
        return results + leaving.rest()

    def collected(self, vae: Vae, way: Direction, past: Past) -> Tensor:
        """What becomes of a clip, float32 on the CPU."""
        pass_group = vae.encode_group if way == "encode" else vae.decode_group
        return torch.cat([pass_group(group, past).cpu() for group in self.groups(way)], dim=2)

    def groups(self, way: Direction) -> Iterator[Tensor]:
        """Of a clip in host memory, each on the device."""
        if way == "decode":
            yield from (to_device(latents, self.device) for latents in torch.split(self.noise, 1, dim=2))
            return
        rest = (self.num_frames - 1) // self.config.frames_per_latent
        for levels in torch.split(self.levels, [1] + [self.config.frames_per_latent] * rest):
            yield from_uint8(to_device(levels, self.device))

    def floor(self, way: Direction, dtype: torch.dtype) -> float:
        work = work_of(self.config, way, self.height, self.width, self.num_frames)
        moved = work.moved_values * dtype.itemsize
        return max(work.operations / product_rate(self.device, dtype), moved / copy_rate(self.device))

    def vae(self, dtype: torch.dtype) -> Vae:
        vae = build_on_meta(lambda: Vae(self.config)).requires_grad_(False)
        weights = {name: weight.to(self.device, dtype, copy=True) for name, weight in self.weights.items()}
        vae.load_state_dict(weights, assign=True)
        return vae.eval()


def passed(vae: Vae, way: Direction, clip: Tensor) -> None:
    if way == "encode":
        vae.encode(clip)
    else:
        vae.decode(clip)


def passed_by_diffusers(vae: Any, way: Direction, clip: Tensor) -> None:
    if way == "encode":
        vae.encode(clip).latent_dist.mode()
    else:
        vae.decode(clip)


class HostPeak:
    """The resident memory that a `with` block added at most, beyond what was there; under the names of `Peak`."""

    allocated_bytes = reserved_bytes = driver_bytes = 0

    def __enter__(self) -> HostPeak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.driver_bytes = _status("VmHWM") - self._before


def _status(name: str) -> int:
    """Bytes of a line of the process' status (Linux)."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def work_of(config: VaeConfig, way: Direction, height: int, width: int, num_frames: int) -> Work:
    """Counted on the modules, of a group after the first, times the groups."""
    vae, past = build_on_meta(lambda: Vae(config)).requires_grad_(False), Past()
    past.at_start = False
    side = config.pixels_per_latent
    with torch.inference_mode(), FlopCounterMode(display=False) as operations, _Moved() as moved:
        if way == "encode":
            vae.encode_group(torch.empty(1, 3, config.frames_per_latent, height, width, device="meta"), past)
        else:
            vae.decode_group(torch.empty(1, config.z_dim, 1, height // side, width // side, device="meta"), past)
    groups = num_frames / config.frames_per_latent
    return Work(operations.get_total_flops() * groups, moved.values * groups)


class _Moved(TorchDispatchMode):
    """Counts the values that convolutions read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.values = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if str(function).startswith("aten.conv"):
            self.values += args[0].numel() + result.numel()
        return result


@lru_cache(maxsize=4)
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: a @ b, device)


@lru_cache(maxsize=1)
def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written."""
    a = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / best_seconds(lambda: b.copy_(a), device)


def best_seconds(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    work()
    taken = []
    for _ in range(times):
        with timed(device) as seconds:
            work()
        taken.append(seconds())
    return min(taken)


def forms_table(bench: Bench) -> str:
    """Milliseconds of each size of convolution over time in every form, in the middle of a clip, with the sum."""
    heads = ["channels", "height", "frames", *(form.value for form in Form), "chosen"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    dim, glue = bench.config.dim, best_glue(bench.device)
    for channels, out, factor, n in (
        (3, dim, 1, 4),
        (dim, dim, 1, 4),
        (dim, dim, 1, 1),
        (dim, 3, 1, 4),
        (dim, 2 * dim, 2, 4),
        (2 * dim, 2 * dim, 2, 4),
        (2 * dim, 4 * dim, 4, 2),
        (4 * dim, 4 * dim, 4, 2),
        (4 * dim, 4 * dim, 8, 1),
    ):
        shape = (n, bench.height // factor, bench.width // factor, channels)
        layer = CausalConv3d(channels, out).to(bench.device, bench.dtype).requires_grad_(False)
        frames = torch.randn(shape, device=bench.device).to(bench.dtype)
        cells = []
        for form in Form:
            convolution = arranged(layer, form, adds_bias=not bench.is_fused)
            seconds = best_seconds(partial(added_up, glue, convolution, frames, Past()), bench.device)
            cells.append(f"{seconds * 1000:.2f}")
        chosen = best_form(layer, bench.device).value
        lines.append(f"| {channels} -> {out} | {shape[1]} | {n} | " + " | ".join(cells) + f" | {chosen} |")
    return "\n".join(lines)


def added_up(glue: Glue, convolution: Convolution, frames: Tensor, past: Past) -> Tensor:
    return glue.total(convolution(in_room(convolution, frames), past))


def in_room(convolution: Convolution, frames: Tensor) -> Tensor:
    room = convolution.room(frames)
    room[-len(frames) :] = frames
    return room


def profile(bench: Bench) -> str:
    """The kernels of a whole clip in both directions."""
    vae = bench.vae(bench.dtype)
    walk_channels_last(vae)
    lines = ["| direction | kernel | calls | ms |", "| --- | --- | ---: | ---: |"]
    for way in DIRECTIONS:
        bench.served(vae, way, WHOLE)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            bench.served(vae, way, WHOLE)
            torch.cuda.synchronize()
        averages = sorted(profiler.key_averages(), key=lambda average: -average.self_device_time_total)
        total = sum(average.self_device_time_total for average in averages)
        lines.append(f"| {way} | all | {sum(average.count for average in averages)} | {total / 1000:.1f} |")
        lines += [f"| | {a.key[:110]} | {a.count} | {a.self_device_time_total / 1000:.1f} |" for a in averages[:24]]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
