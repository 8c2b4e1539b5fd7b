"""The VAE at full width: seconds and memory of encoding and decoding, beside a peer and the physical floor.

`python -m benchmarks.vae [--size 832x480] [--frames 81] [--budgets 2,3,4] [--forms] [--json FILE]` fills the VAE of
Wan 2.1 with random weights and prints a row for each way through it: `ours`, the channels-last walk as the service
computes it (float16 on a GPU, float32 on a CPU); `modules`, the same weights in the released form (one tensor
[B, C, n, h, w], float32); diffusers' AutoencoderKLWan with the same weights and dtype as `ours`, if it is installed;
and `ours` again within each of `--budgets` GiB, in the tiles that the plan chooses.

Peak is what a pass added to the weights (on a GPU as the allocator reserved it), planned what the plan says of it. The
floor is the arithmetic of the convolutions at the rate of a matrix product of the same run, or the bytes of their
inputs and outputs at the rate of a copy, whichever is longer. `--forms` measures each convolution in every form.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.denoiser import GIB, timed
from benchmarks.precision import clocks
from runtime.weights import build_on_meta
from services.vae.channels_last import best_glue, walk_channels_last
from services.vae.convolution import Form, arranged, best_form
from services.vae.glue import PLAIN
from services.vae.model import PRESETS, CausalConv3d, Past, Vae, VaeConfig
from services.vae.plan import Direction, DoesNotFit, Machine, Tiling, plan_tiles
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
    peak_gib: float
    planned_gib: float | None
    floor_s: float
    ratio: float
    difference: float | None  # relative, from `modules`


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
        frames = torch.rand(1, 3, num_frames, height, width, generator=generator) * 2 - 1
        side, latents = config.pixels_per_latent, (num_frames - 1) // config.frames_per_latent + 1
        noise = torch.randn(1, config.z_dim, latents, height // side, width // side, generator=generator)
        self.clip: dict[Direction, Tensor] = {"encode": frames.to(device), "decode": noise.to(device)}

    def rows(self, budgets: list[float]) -> list[Row]:
        """Measures and prints; `modules` come first, as the others are compared with them."""
        print("| what | | dtype | tiles | s | peak GiB | planned | floor s | ratio | difference |")
        print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        found: list[Row] = []
        truth: dict[Direction, Tensor] = {}
        modules = self.vae(torch.float32)
        for way in DIRECTIONS:
            result = self.measured(found, "modules", way, torch.float32, partial(passed, modules, way, Past))
            truth[way] = result
        del modules
        if importlib.util.find_spec("diffusers") is not None:
            peer = self.diffusers()
            for way in DIRECTIONS:
                self.measured(found, "diffusers", way, self.dtype, partial(passed_by_diffusers, peer, way))
            del peer
        ours = self.vae(self.dtype)
        walk_channels_last(ours)
        for way in DIRECTIONS:
            for budget in (None, *budgets):
                self.within(found, ours, way, budget, truth[way])
        return found

    def within(self, found: list[Row], vae: Vae, way: Direction, budget: float | None, truth: Tensor) -> None:
        """The walk, in the tiles of a budget."""
        machine = Machine(self.config, self.dtype, self.device.type, is_fused=self.is_fused)
        try:
            tiling = plan_tiles(machine, way, self.height, self.width, int(budget * GIB) if budget else _PLENTY)
        except DoesNotFit as error:
            print(f"| ours | {error} |", flush=True)
            return
        name = "ours" if budget is None else f"ours, {budget:g} GiB"
        self.measured(found, name, way, self.dtype, partial(passed, vae, way, tiling.past), tiling, truth)

    def measured(
        self,
        found: list[Row],
        what: str,
        way: Direction,
        dtype: torch.dtype,
        run: Callable[[Tensor], Tensor],
        tiling: Tiling | None = None,
        truth: Tensor | None = None,
    ) -> Tensor:
        """Runs, prints a row and gives the result, on the CPU."""
        clip = self.clip[way]
        result = run(clip).float().cpu()  # what is done but once is done
        peak = PeakMemory(self.device)
        taken = []
        for _ in range(self.repeats):
            with timed(self.device) as seconds:
                run(clip)
            taken.append(seconds())
        floor = self.floor(way, dtype)
        difference = None if truth is None else float((result - truth).norm() / truth.norm())
        row = Row(
            what, way, str(dtype).removeprefix("torch."), str(tiling or "whole frames"), min(taken), peak.gib(),
            None if tiling is None else tiling.device_bytes / GIB, floor, min(taken) / floor, difference,
        )  # fmt: skip
        found.append(row)
        print("| " + " | ".join(cell(value) for value in asdict(row).values()) + " |", flush=True)
        return result

    def floor(self, way: Direction, dtype: torch.dtype) -> float:
        work = work_of(self.config, way, self.height, self.width, self.num_frames)
        moved = work.moved_values * dtype.itemsize
        return max(work.operations / product_rate(self.device, dtype), moved / copy_rate(self.device))

    def vae(self, dtype: torch.dtype) -> Vae:
        vae = build_on_meta(lambda: Vae(self.config)).requires_grad_(False)
        weights = {name: weight.to(self.device, dtype, copy=True) for name, weight in self.weights.items()}
        vae.load_state_dict(weights, assign=True)
        return vae.eval()

    def diffusers(self) -> Any:
        vae = importlib.import_module("diffusers").AutoencoderKLWan(base_dim=self.config.dim)
        vae.load_state_dict({diffusers_name(name, self.config): weight for name, weight in self.weights.items()})
        return vae.to(self.device, self.dtype).eval()


def passed(vae: Vae, way: Direction, past: Callable[[], Past], clip: Tensor) -> Tensor:
    """A clip through the VAE as a stream, whose pieces go to the CPU, as in the service."""
    if way == "encode":
        pieces = vae.encode_stream([clip], past())
    else:
        pieces = vae.decode_stream(torch.split(clip, 1, dim=2), past())
    return torch.cat([piece.cpu() for piece in pieces], dim=2)


def passed_by_diffusers(vae: Any, way: Direction, clip: Tensor) -> Tensor:
    clip = clip.to(vae.dtype)
    result: Tensor = vae.encode(clip).latent_dist.mode() if way == "encode" else vae.decode(clip).sample
    return result.cpu()


class PeakMemory:
    """The most that was taken since it was made, beyond what was then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_reserved(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self._before = _status("VmRSS")

    def gib(self) -> float:
        peak = torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else _status("VmHWM")
        return (peak - self._before) / GIB


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


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: a @ b, device)


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
    """Milliseconds of each size of convolution over time, four frames at a time, in every form."""
    lines = ["| channels | height | " + " | ".join(form.value for form in Form) + " | chosen |", "| --- " * 6 + "|"]
    dim = bench.config.dim
    for channels, out, factor in (
        (3, dim, 1),
        (dim, dim, 1),
        (dim, 3, 1),
        (2 * dim, 2 * dim, 2),
        (4 * dim, 4 * dim, 4),
    ):
        shape = (6, bench.height // factor, bench.width // factor, channels)
        layer = CausalConv3d(channels, out).to(bench.device, bench.dtype).requires_grad_(False)
        frames = torch.randn(shape, device=bench.device).to(bench.dtype)
        cells = []
        for form in Form:
            convolution = arranged(layer, form, adds_bias=not bench.is_fused)
            seconds = best_seconds(partial(convolution, frames, only_newest=False), bench.device)
            cells.append(f"{seconds * 1000:.2f}")
        chosen = best_form(layer, bench.device).value
        lines.append(f"| {channels} -> {out} | {shape[1]} | " + " | ".join(cells) + f" | {chosen} |")
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
