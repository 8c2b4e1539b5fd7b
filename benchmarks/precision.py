"""The transformer's forward pass at each precision: seconds, and where they go. Needs a GPU.

`python -m benchmarks.precision [--layers N] [--profile]` fills SCAIL 14B with random INT8 weights and prints, for 32,760
tokens (832x480, 81 frames, without pose) and 48,832 (SCAIL at 896x512, 81 frames), the seconds of a forward pass, the
ratio to the same matrix products at the chip's bf16 rate, and how far the result is from that of `exact`.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess

import torch
from torch import Tensor

from benchmarks.denoiser import GIB, matmul_rate, operations, timed
from runtime.weights import build_on_meta
from services.denoiser.conditioning import Conditioning, animation, seeded_noise, text_to_video
from services.denoiser.model import PRESETS, DiffusionTransformer, TransformerConfig
from services.denoiser.precision import PRECISIONS, set_precision
from services.denoiser.quantisation import Int8Linear, block_linears, quantize_modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=40, help="blocks; fewer for a trial")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print the kernels that took the longest")
    options = parser.parse_args()
    config = dataclasses.replace(PRESETS["scail-14b"], num_layers=options.layers)
    device = torch.device("cuda:0")
    rate = matmul_rate(device)
    print(f"{torch.cuda.get_device_name(device)}, bf16 matrix products: {rate / 1e12:.0f} TFLOP/s; {clocks()}\n")
    model = random_model(config, device)
    print("| precision | tokens | s per forward | bf16 floor s | ratio | peak GiB | from exact |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    exact: dict[int, Tensor] = {}
    for precision in PRECISIONS:
        set_precision(model, precision)
        for conditioning in (clip(480, 832, config, device), animated(512, 896, config, device)):
            print(row(model, conditioning, precision, rate, options.repeats, exact), flush=True)
        if options.profile:
            print(profile(model, animated(512, 896, config, device)), flush=True)
    print(f"\nafterwards: {clocks()}")


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
def row(
    model: DiffusionTransformer,
    conditioning: Conditioning,
    precision: str,
    rate: float,
    repeats: int,
    exact: dict[int, Tensor],
) -> str:
    tokens = len(conditioning.rope.cos)
    predicted = forward(model, conditioning)
    torch.cuda.reset_peak_memory_stats()
    with timed(predicted.device) as seconds:
        for _ in range(repeats):
            predicted = forward(model, conditioning)
    taken, floor = seconds() / repeats, operations(model.config, tokens) / rate
    expected = exact.setdefault(tokens, predicted)
    difference = float((predicted - expected).norm() / expected.norm())
    peak = torch.cuda.max_memory_allocated() / GIB
    return (
        f"| {precision} | {tokens} | {taken:.3f} | {floor:.2f} | {taken / floor:.2f} | {peak:.1f} | {difference:.4f} |"
    )


def forward(model: DiffusionTransformer, conditioning: Conditioning) -> Tensor:
    """One prediction; the keys of the context are made each time, as at the first step."""
    device, config = conditioning.rope.cos.device, model.config
    text = seeded_noise((1, config.text_len, config.text_dim), 3).to(device)
    image = seeded_noise((1, 257, config.image_dim or 0), 4).to(device)
    context = model.embed_context(text, image)
    if conditioning.pose_latents is None:
        latents = seeded_noise((1, config.in_dim, 21, 60, 104), 5).to(device)
        predicted: Tensor = model(latents, torch.tensor([999]), context, conditioning.rope)
        return predicted
    noise = seeded_noise((1, 16, 22, *(2 * side for side in conditioning.pose_latents.shape[3:])), 5).to(device)
    posed: Tensor = model(
        conditioning.model_input(noise), torch.tensor([999]), context, conditioning.rope, conditioning.pose_latents
    )
    return posed


@torch.inference_mode()
def profile(model: DiffusionTransformer, conditioning: Conditioning) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        forward(model, conditioning)
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
