"""The denoiser within a number of bytes: what each budget costs in time, and what the process really takes. Needs a GPU.

`python -m benchmarks.memory [--budgets 4,6,8,12,16,24,80] [--json FILE]` writes SCAIL 14B with random INT8 weights to a
file of the released layout (15.5 GiB) and, for each budget (in GiB; 0: gpu_only, which comes first) in a process of its
own, loads it as the service does and computes 896x512, 81 frames (48,832 tokens) twice with the same context. Beside
what was planned stand the peaks, loading included: allocated and reserved by PyTorch, taken of the device by the
driver's count (the CUDA context included), and the process's resident memory, which pinned memory is part of.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.denoiser import GIB, inputs, timed
from benchmarks.precision import clocks
from runtime.vram import Peak
from runtime.weights import build_on_meta
from services.denoiser.model import PRESETS, DiffusionTransformer, TransformerConfig
from services.denoiser.placement import place
from services.denoiser.plan import animation_tokens
from services.denoiser.precision import BALANCED, PRECISIONS
from services.denoiser.quantisation import DATA, SCALE, UNUSED, block_linears, write_quanto
from services.denoiser.weights import load_transformer

HEIGHT, WIDTH, FRAMES = 512, 896, 81
_SPREAD = 28  # deviation of int8 numbers of which the largest in a row is about 127
_COLUMNS = (
    "budget GiB",
    "plan",
    "s per forward",
    "of gpu_only",
    "planned GiB",
    "allocated",
    "reserved",
    "driver",
    "host RSS",
    "from gpu_only",
    "load s",
)


def main() -> None:
    options = _options()
    config = dataclasses.replace(PRESETS["scail-14b"], num_layers=options.layers)
    if options.write:
        write_random(options.checkpoint, config, torch.device("cuda:0"))
        return
    if options.checkpoint is not None:
        print(json.dumps(measured(config, options)))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        checkpoint = Path(directory) / "random_quanto_int8.safetensors"
        begun = time.perf_counter()
        # in a process of its own too: the CUDA context of this one would count as memory of the device
        subprocess.run([*_command(options, checkpoint), "--write"], check=True)
        size = checkpoint.stat().st_size
        print(f"{device_name()}, {clocks()}; {options.precision}; {size / GIB:.1f} GiB of random weights,")
        print(f"written in {time.perf_counter() - begun:.0f} s; of host memory {1.1 * size / GIB + 4 / 1.0737:.1f} GiB")
        print(f"are allowed\n\n| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}")
        rows: list[dict[str, Any]] = []
        for budget in [0.0, *(float(text) for text in options.budgets.split(","))]:
            rows.append(_in_a_process(options, checkpoint, budget))
            print(_line(rows), flush=True)
    print(f"\nafterwards: {clocks()}")
    if options.json is not None:
        options.json.write_text(json.dumps({"weights": size, "rows": rows}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", default="4,6,8,12,16,24,80", help="GiB")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--precision", choices=PRECISIONS, default=BALANCED)
    parser.add_argument("--layers", type=int, default=40, help="blocks; fewer for a trial")
    parser.add_argument("--directory", type=Path, help="for 15.5 GiB of weights and the results, best in memory")
    parser.add_argument("--offload-folder", type=Path, help="streamed blocks wait in files here, not in host memory")
    parser.add_argument("--checkpoint", type=Path, help="measure one budget with these weights, and print JSON")
    parser.add_argument("--write", action="store_true", help="with --checkpoint: write the weights")
    parser.add_argument("--budget", type=float, default=0.0, help="with --checkpoint; GiB, 0: gpu_only")
    return parser.parse_args()


def write_random(path: Path, config: TransformerConfig, device: torch.device) -> None:
    """A checkpoint as released, with int8 weights of the spread that a trained model has; made on the device."""
    model = build_on_meta(lambda: DiffusionTransformer(config))
    modules = set(block_linears(model))
    generator = torch.Generator(device).manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        values = torch.randn(tensor.shape, generator=generator, device=device)
        if module in modules:
            tensors[module + DATA] = (values * _SPREAD).round().clamp(-127, 127).to(torch.int8).cpu()
            tensors[module + SCALE] = torch.full((len(tensor), 1), 1 / _SPREAD / tensor.shape[1] ** 0.5).bfloat16()
            tensors |= {module + suffix: torch.ones((), dtype=torch.bfloat16) for suffix in UNUSED}
        elif tensor.dim() == 1:
            tensors[name] = (values * 0.1 + (1 if name.endswith("weight") else 0)).bfloat16().cpu()
        else:
            tensors[name] = (values * tensor[0].numel() ** -0.5).bfloat16().cpu()
    write_quanto(path, tensors, modules, {})


def _command(options: argparse.Namespace, checkpoint: Path) -> list[str]:
    given = ["--checkpoint", str(checkpoint), "--precision", options.precision, "--layers", str(options.layers)]
    if options.offload_folder is not None:
        given += ["--offload-folder", str(options.offload_folder)]
    return [sys.executable, "-m", "benchmarks.memory", *given]


def _in_a_process(options: argparse.Namespace, checkpoint: Path, budget: float) -> dict[str, Any]:
    """What `measured` finds in a new process, or why it found nothing."""
    command = [*_command(options, checkpoint), "--budget", str(budget)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        return {"budget": budget, "failed": f"exit status {ended.returncode}"}
    row: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return row


def measured(config: TransformerConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Loads, places and runs; a dict of what it took, in bytes and seconds."""
    device, tokens = torch.device("cuda:0"), animation_tokens(HEIGHT, WIDTH, FRAMES)
    budget = round(options.budget * GIB) or None
    torch.zeros(1, device=device)
    begun = time.perf_counter()
    with Peak(device) as loading:
        home = device if budget is None else torch.device("cpu")
        model = load_transformer([options.checkpoint], config, device=home, compute_dtype=torch.bfloat16)
        placement = place(model, device, budget, tokens, precision=options.precision, folder=options.offload_folder)
        torch.cuda.synchronize()
    loaded_s = time.perf_counter() - begun
    with Peak(device) as running:
        predicted, seconds = forward(model, device)
    taken: dict[str, Any] = {
        name: max(getattr(loading, name), getattr(running, name))
        for name in ("allocated_bytes", "reserved_bytes", "driver_bytes")
    }
    return taken | {
        "budget": options.budget,
        "plan": str(placement),
        "planned": placement.plan.device_bytes,
        "planned_host": placement.plan.host_bytes,
        "seconds": seconds,
        "load_seconds": loaded_s,
        "loading_driver_bytes": loading.driver_bytes,
        "of_this_process_alone": running.is_own,
        "difference": difference(predicted, options.checkpoint.with_name("expected.pt")),
        "allocator": {name: torch.cuda.memory_stats(device)[name] for name in ("num_alloc_retries", "num_ooms")},
        **host_peaks(),
    }


@torch.inference_mode()
def forward(model: DiffusionTransformer, device: torch.device) -> tuple[Tensor, list[float]]:
    """Predicts twice with the same context; the result, and the seconds of each."""
    conditioning, prompt, latents = inputs(model.config, device, HEIGHT, WIDTH, FRAMES)
    context = model.embed_context(prompt.prompt_embeds, prompt.image_embeds)
    taken = []
    for _ in range(2):
        with timed(device) as seconds:
            predicted: Tensor = model(
                conditioning.model_input(latents),
                torch.tensor([999]),
                context,
                conditioning.rope,
                conditioning.pose_latents,
            )
        taken.append(seconds())
    return predicted, taken


def difference(predicted: Tensor, expected: Path) -> float:
    """Relative, to what the first process left in a file; 0 for that one and for the same bits."""
    if not expected.exists():
        torch.save(predicted.cpu(), expected)
    before = torch.load(expected, weights_only=True)
    return float((predicted.cpu() - before).norm() / before.norm())


def device_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def host_peaks() -> dict[str, int]:
    """The most resident memory of the process, and what of it is resident now, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: text for name, _, text in (line.partition(":") for line in lines)}
    return {
        name: int(fields[name].split()[0]) * 1024
        for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")
        if name in fields
    }


def _line(rows: list[dict[str, Any]]) -> str:
    """The last of the rows as one of the table."""
    row = rows[-1]
    if "failed" in row:
        return f"| {row['budget']:g} | {row['failed']} |{' |' * (len(_COLUMNS) - 2)}"
    taken = row["seconds"][-1]
    cells = [
        f"{row['budget']:g}" if row["budget"] else "gpu_only",
        row["plan"],
        f"{taken:.3f}",
        f"{taken / rows[0]['seconds'][-1]:.3f}",
        *(
            f"{row[name] / GIB:.2f}"
            for name in ("planned", "allocated_bytes", "reserved_bytes", "driver_bytes", "VmHWM")
        ),
        f"{row['difference']:.1e}" if row["difference"] else "the same bits",
        f"{row['load_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
