"""The diffusion transformer at full size on one GPU: loading, seconds per forward, memory, cancelling, resuming.

`python -m benchmarks.denoiser [--directory DIR] [--layers N]` writes a checkpoint of random INT8 weights in the quanto
layout, loads it as the service does, and prints a markdown table. Beside each forward stands the time that the same
matrix products take at the chip's measured bf16 rate, as a ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from runtime.gpu import GpuThread, gate_blocks
from runtime.weights import build_on_meta
from services.denoiser.attention import AUTO
from services.denoiser.conditioning import Conditioning, animation, seeded_noise
from services.denoiser.denoise import Expert, Prompt, denoise
from services.denoiser.model import PRESETS, DiffusionTransformer, TransformerConfig
from services.denoiser.quantisation import block_linears, quantize_state_dict, write_quanto
from services.denoiser.sampling import SolverState, make_solver
from services.denoiser.weights import load_transformer

SIZES = ((480, 832, 81), (512, 896, 81))  # height, width, num_frames
GIB = 1024**3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="for the checkpoint (17 GB); default: a temporary one")
    parser.add_argument("--layers", type=int, help="blocks, for a trial on a small machine")
    parser.add_argument("--sizes", default="", help="HxWxF,... instead of the usual ones")
    options = parser.parse_args()
    config = PRESETS["scail-14b"]
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")] if options.sizes else list(SIZES)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        model = loaded(config, Path(directory) / "random_quanto_int8.safetensors", device)
    rate = matmul_rate(device)
    print(f"bf16 matrix products: {rate / 1e12:.0f} TFLOP/s\n")
    print("| size | tokens | s per forward | floor s | ratio | peak GiB |\n| --- | --- | --- | --- | --- | --- |")
    for height, width, num_frames in sizes:
        print(forward_row(model, device, rate, height, width, num_frames), flush=True)
    height, width, num_frames = sizes[0]
    print("\n" + resume_line(model, device, height, width, num_frames))
    print(cancel_line(model, device, height, width, num_frames))


def loaded(config: TransformerConfig, path: Path, device: torch.device) -> DiffusionTransformer:
    """Writes a random checkpoint and loads it; prints how long the loading took."""
    model = build_on_meta(lambda: DiffusionTransformer(config))
    generator = torch.Generator(device).manual_seed(0)

    def random(name: str, shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        if len(shape) == 1:
            return (values * 0.1 + (1 if name.endswith("weight") else 0)).bfloat16().cpu()
        return (values / math.sqrt(math.prod(shape[1:]))).bfloat16().cpu()

    modules = block_linears(model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        quantised = [name.removesuffix(".weight")] if name.removesuffix(".weight") in modules else []
        tensors |= quantize_state_dict({name: random(name, tensor.shape)}, quantised)
    write_quanto(path, tensors, modules, {})
    size = path.stat().st_size
    del tensors
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begun = time.perf_counter()
    transformer = load_transformer([path], config, device=device, compute_dtype=dtype, attention=AUTO)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    print(
        f"loaded {size / GIB:.1f} GiB in {seconds:.1f} s ({size / GIB / seconds:.2f} GiB/s, file in the page cache)\n"
    )
    return transformer


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large bf16 matrix product."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    a @ b
    with timed(device) as seconds:
        for _ in range(20):
            a @ b
    return 20 * 2 * side**3 / seconds()


def forward_row(
    model: DiffusionTransformer, device: torch.device, rate: float, height: int, width: int, num_frames: int
) -> str:
    conditioning, prompt, latents = inputs(model.config, device, height, width, num_frames)
    context = model.embed_context(prompt.prompt_embeds, prompt.image_embeds)
    timestep = torch.tensor([999])

    def forward() -> Tensor:
        predicted: Tensor = model(
            conditioning.model_input(latents), timestep, context, conditioning.rope, conditioning.pose_latents
        )
        return predicted

    with torch.inference_mode():
        forward()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with timed(device) as seconds:
            forward()
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    frames = (num_frames - 1) // 4 + 1
    tokens = (1 + frames) * height * width // 256 + frames * height * width // 1024
    floor = operations(model.config, tokens) / rate
    taken = seconds()
    return (
        f"| {width}x{height}, {num_frames} | {tokens} | {taken:.2f} | {floor:.2f} | {taken / floor:.2f} | {peak:.1f} |"
    )


def operations(config: TransformerConfig, tokens: int) -> float:
    """Floating-point operations of the blocks' matrix products and of attention."""
    d, hidden = config.dim, config.ffn_dim
    context = config.text_len + 257
    linears = 2.0 * tokens * (4 * d * d + 2 * d * d + 2 * d * hidden) + 2.0 * context * 2 * d * d
    attention = 4.0 * tokens * tokens * d + 4.0 * tokens * context * d
    return config.num_layers * (linears + attention)


def resume_line(model: DiffusionTransformer, device: torch.device, height: int, width: int, num_frames: int) -> str:
    """Whether a run that starts from the state after its first step ends with the same bits."""
    conditioning, prompt, noise = inputs(model.config, device, height, width, num_frames)
    solver = make_solver("unipc", 3, 7.0)
    experts = [Expert(model, 1.0)]
    with torch.inference_mode():
        states = list(denoise(experts, solver, solver.start(noise), conditioning, prompt))
        tensors, counters = states[0].to_tensors()
        stored = {name: tensor.cpu() for name, tensor in tensors.items()}
        restored = SolverState.from_tensors({name: tensor.to(device) for name, tensor in stored.items()}, counters)
        resumed = list(denoise(experts, solver, restored, conditioning, prompt))
    same = torch.equal(states[-1].latents, resumed[-1].latents)
    return f"resumed after step 1 of 3: {'the same bits' if same else 'OTHER BITS'}"


def cancel_line(model: DiffusionTransformer, device: torch.device, height: int, width: int, num_frames: int) -> str:
    """How long after a cancel the device is free, beside the time of one block; through the stage's own thread."""
    conditioning, prompt, noise = inputs(model.config, device, height, width, num_frames)
    solver = make_solver("unipc", 4, 7.0)
    undo = gate_blocks(model.blocks, device)

    @torch.inference_mode()
    def steps() -> Iterator[float]:
        for state in denoise([Expert(model, 1.0)], solver, solver.start(noise), conditioning, prompt):
            state.latents.sum().item()  # waits for the device
            yield time.perf_counter()

    async def cancelled_after() -> tuple[float, float]:
        thread = GpuThread()
        stream = thread.stream(steps)
        begun = time.perf_counter()
        step = await anext(stream) - begun
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.4 * step)
        asked = time.perf_counter()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        if device.type == "cuda":
            await asyncio.to_thread(torch.cuda.synchronize)
        taken = time.perf_counter() - asked
        await stream.aclose()
        thread.shutdown()
        return taken, step

    taken, step = asyncio.run(cancelled_after())
    undo()
    block = step / model.config.num_layers
    return f"cancelled: device free after {taken:.3f} s, {taken / block:.1f} blocks of {block:.3f} s"


def inputs(
    config: TransformerConfig, device: torch.device, height: int, width: int, num_frames: int
) -> tuple[Conditioning, Prompt, Tensor]:
    h, w, frames = height // 8, width // 8, (num_frames - 1) // 4 + 1
    image_dim = config.image_dim or 0
    conditioning = animation(
        seeded_noise((1, 16, 1, h, w), 1).to(device),
        seeded_noise((1, 16, frames, h // 2, w // 2), 2).to(device),
        config.head_dim,
        pose_time_origin=1,
    )
    prompt = Prompt(
        seeded_noise((1, config.text_len, config.text_dim), 3).to(device),
        image_embeds=seeded_noise((1, 257, image_dim), 4).to(device),
    )
    return conditioning, prompt, seeded_noise((1, 16, 1 + frames, h, w), 5).to(device)


@contextmanager
def timed(device: torch.device) -> Iterator[Callable[[], float]]:
    """Seconds of the block, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun, ended = time.perf_counter(), 0.0
    yield lambda: ended - begun
    if device.type == "cuda":
        torch.cuda.synchronize()
    ended = time.perf_counter()


if __name__ == "__main__":
    main()
