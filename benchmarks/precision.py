"""The transformer's forward pass at each precision: seconds, and where they go. Needs a GPU.

`python -m benchmarks.precision [--layers N] [--profile] [--peer] [--json FILE]` fills SCAIL 14B with random INT8 weights
and prints, for 32,760 tokens (832x480, 81 frames, without pose) and 48,832 (SCAIL at 896x512, 81 frames), the seconds of
a forward pass as it is at every step but the first (keys and values of the context are there), the ratio to the same
matrix products at the chip's bf16 rate, and how far the result is from that of `exact`. `--peer`: then diffusers' Wan
2.1 I2V 14B (if installed) with random bf16 weights, cuDNN attention and compiled blocks, over as many tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.denoiser import GIB, matmul_rate, operations, timed
from runtime.weights import build_on_meta
from services.denoiser.conditioning import Conditioning, animation, seeded_noise, text_to_video
from services.denoiser.model import PRESETS, Context, DiffusionTransformer, TransformerConfig
from services.denoiser.precision import (
    BALANCED,
    EXACT,
    FAST,
    PRECISIONS,
    attention_of,
    fast_attention,
    set_precision,
    use_attention,
)
from services.denoiser.quantisation import Int8Linear, block_linears, quantize_modules


@dataclasses.dataclass(frozen=True)
class Row:
    precision: str
    attention: str
    tokens: int
    seconds: float
    floor_s: float
    ratio: float
    peak_gib: float
    from_exact: float | None  # relative

    def __str__(self) -> str:
        difference = "" if self.from_exact is None else f"{self.from_exact:.4f}"
        return (
            f"| {self.precision} | {self.attention} | {self.tokens} | {self.seconds:.3f} | {self.floor_s:.2f} | "
            f"{self.ratio:.2f} | {self.peak_gib:.1f} | {difference} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=40, help="blocks; fewer for a trial")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="in this order, with commas between")
    parser.add_argument("--profile", action="store_true", help="print the kernels that took the longest")
    parser.add_argument("--peer", action="store_true", help="measure diffusers too")
    parser.add_argument("--json", type=Path, help="to write")
    options = parser.parse_args()
    config = dataclasses.replace(PRESETS["scail-14b"], num_layers=options.layers)
    device = torch.device("cuda:0")
    rate = matmul_rate(device)
    name = f"{torch.cuda.get_device_name(device)}, bf16 matrix products: {rate / 1e12:.0f} TFLOP/s; {clocks()}"
    print(
        f"{name}\n\n| precision | attention | tokens | s per forward | bf16 floor s | ratio | peak GiB | from exact |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = ours(config, device, rate, options.repeats, options.profile, options.precisions.split(","))
    gc.collect()
    torch.cuda.empty_cache()
    if options.peer:
        rows += peer(config, device, rate, options.repeats)
    print(f"\nafterwards: {clocks()}")
    if options.json:
        document = {"device": name, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def ours(
    config: TransformerConfig, device: torch.device, rate: float, repeats: int, profiled: bool, precisions: list[str]
) -> list[Row]:
    model = random_model(config, device)
    exact: dict[int, Tensor] = {}
    rows = []
    for index, precision in enumerate(precisions):
        if precision == FAST and BALANCED in precisions[:index]:
            use_attention(model, fast_attention(device))  # all else is as in `balanced`
        else:
            set_precision(model, precision)
        for conditioning in (clip(480, 832, config, device), animated(512, 896, config, device)):
            rows.append(measured(model, conditioning, precision, rate, repeats, exact))
            print(rows[-1], flush=True)
        if profiled:
            print(profile(model, animated(512, 896, config, device)), flush=True)
    return rows


def random_model(config: TransformerConfig, device: torch.device) -> DiffusionTransformer:
    """SCAIL with int8 block weights of the spread that a trained model has, on the device at once."""
    model = build_on_meta(lambda: DiffusionTransformer(config))
    quantize_modules(model, block_linears(model))
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            values = torch.randn(tensor.shape, generator=generator, device=device)
            if name == "_data":
                filled = (values * 28).round().clamp(-127, 127).to(torch.int8)
            elif name == "_scale":
                filled = torch.full(tensor.shape, 1 / 28 / 5120**0.5, device=device, dtype=torch.bfloat16)
            elif tensor.dim() == 1:
                filled = values * 0.1 + (1 if name == "weight" else 0)
            else:
                filled = values * tensor[0].numel() ** -0.5
            if isinstance(tensor, torch.nn.Parameter):
                setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
            else:
                setattr(module, name, filled)
    for module in model.blocks.modules():
        if isinstance(module, Int8Linear) and module.bias is not None:
            module.bias = torch.nn.Parameter(module.bias.bfloat16(), requires_grad=False)
    return model.eval()


def clip(height: int, width: int, config: TransformerConfig, device: torch.device) -> Conditioning:
    """81 frames without reference and pose, the size that other systems publish."""
    return text_to_video((21, height // 8, width // 8), config.head_dim, device)


def animated(height: int, width: int, config: TransformerConfig, device: torch.device) -> Conditioning:
    h, w = height // 8, width // 8
    reference, pose = seeded_noise((1, 16, 1, h, w), 1), seeded_noise((1, 16, 21, h // 2, w // 2), 2)
    return animation(reference.to(device), pose.to(device), config.head_dim, pose_time_origin=1)


@torch.inference_mode()
def measured(
    model: DiffusionTransformer,
    conditioning: Conditioning,
    precision: str,
    rate: float,
    repeats: int,
    exact: dict[int, Tensor],
) -> Row:
    tokens, context = len(conditioning.rope.cos), embedded(model, conditioning)
    noise = noise_of(model, conditioning)
    seconds, peak, predicted = best(lambda: forward(model, conditioning, context, noise), repeats)
    floor = operations(model.config, tokens) / rate
    if precision == EXACT:
        exact[tokens] = predicted
    expected = exact.get(tokens)
    difference = None if expected is None else float((predicted - expected).norm() / expected.norm())
    return Row(precision, attention_of(model), tokens, seconds, floor, seconds / floor, peak, difference)


def best(work: Callable[[], Tensor], repeats: int) -> tuple[float, float, Tensor]:
    """Seconds and peak GiB of a pass after the first, which compiles kernels and makes what is kept; its result."""
    predicted = work()
    torch.cuda.reset_peak_memory_stats()
    with timed(predicted.device) as seconds:
        for _ in range(repeats):
            predicted = work()
    return seconds() / repeats, torch.cuda.max_memory_allocated() / GIB, predicted


@torch.inference_mode()
def peer(config: TransformerConfig, device: torch.device, rate: float, repeats: int) -> list[Row]:
    """diffusers, as fast as its own settings make it."""
    models: Any = importlib.import_module("diffusers")
    with torch.device("meta"):
        model = models.WanTransformer3DModel(
            in_channels=36,
            image_dim=config.image_dim,
            added_kv_proj_dim=config.dim,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    # its tables of positions are buffers that are computed where it is built
    model.rope = type(model.rope)(config.head_dim, config.patch, 1024).to(device)
    for parameter_name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(parameter_name.rpartition(".")[0])
        values = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * parameter[0].numel() ** -0.5
        setattr(owner, parameter_name.rpartition(".")[2], torch.nn.Parameter(values, requires_grad=False))
    model.eval().set_attention_backend("_native_cudnn")
    model.compile_repeated_blocks(fullgraph=True)
    rows = []
    for frames, height, width in ((21, 60, 104), (109, 32, 56)):
        tokens = frames * height * width // 4
        given = {
            "hidden_states": torch.randn(1, 36, frames, height, width, device=device, dtype=torch.bfloat16),
            "timestep": torch.tensor([999], device=device),
            "encoder_hidden_states": torch.randn(1, 512, 4096, device=device, dtype=torch.bfloat16),
            "encoder_hidden_states_image": torch.randn(1, 257, 1280, device=device, dtype=torch.bfloat16),
            "return_dict": False,
        }
        seconds, peak, _ = best(lambda given=given: model(**given)[0], repeats)  # type: ignore[misc]
        floor = operations(config, tokens) / rate
        rows.append(Row("diffusers, bf16", "cudnn", tokens, seconds, floor, seconds / floor, peak, None))
        print(rows[-1], flush=True)
    return rows


def embedded(model: DiffusionTransformer, conditioning: Conditioning) -> Context:
    """Text and image; computed once per request, as the keys and values are that the blocks make of it."""
    device, config = conditioning.rope.cos.device, model.config
    text = seeded_noise((1, config.text_len, config.text_dim), 3).to(device)
    image = seeded_noise((1, 257, config.image_dim or 0), 4).to(device)
    return model.embed_context(text, image)


def noise_of(model: DiffusionTransformer, conditioning: Conditioning) -> Tensor:
    """What a solver starts from, once per request."""
    if conditioning.pose_latents is None:
        shape = [1, model.config.in_dim, 21, 60, 104]
    else:
        shape = [1, 16, 22, *(2 * side for side in conditioning.pose_latents.shape[3:])]
    return seeded_noise(shape, 5).to(conditioning.rope.cos.device)


def forward(model: DiffusionTransformer, conditioning: Conditioning, context: Context, noise: Tensor) -> Tensor:
    """One prediction, as at every step but the first."""
    pose = conditioning.pose_latents
    latents = noise if pose is None else conditioning.model_input(noise)
    predicted: Tensor = model(latents, torch.tensor([999]), context, conditioning.rope, pose)
    return predicted


@torch.inference_mode()
def profile(model: DiffusionTransformer, conditioning: Conditioning) -> str:
    context, noise = embedded(model, conditioning), noise_of(model, conditioning)
    forward(model, conditioning, context, noise)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        forward(model, conditioning, context, noise)
        torch.cuda.synchronize()
    averages = sorted(profiler.key_averages(), key=lambda average: -average.self_device_time_total)
    lines = [f"| {a.key[:80]} | {a.count} | {a.self_device_time_total / 1000:.1f} |" for a in averages[:16]]
    return "\n".join(["\n| kernel | calls | ms |", "| --- | ---: | ---: |", *lines, ""])


def clocks() -> str:
    query = "--query-gpu=clocks.sm,power.draw,power.limit,clocks_event_reasons.active"
    return subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
