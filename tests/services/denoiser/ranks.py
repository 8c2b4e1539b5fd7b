"""Real processes as the ranks of a group, and what they run in the tests of `parallel`."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]  # missing in its stubs

from runtime import gpu
from runtime.gpu import WorkCancelled, gate_blocks
from services.denoiser.chunking import run_in_pieces
from services.denoiser.conditioning import Conditioning, first_frame_to_video, text_to_video
from services.denoiser.denoise import FULL, Expert, Options, denoise
from services.denoiser.model import DiffusionTransformer
from services.denoiser.parallel import DeviceTeam, connect
from services.denoiser.precision import set_precision
from services.denoiser.quantisation import Int8Linear, block_linears, quantize_modules, quantize_weight
from services.denoiser.sampling import make_solver
from services.denoiser.step_cache import MAG, StepCache
from tests.services.denoiser.tiny import SCAIL, TEXT_TO_VIDEO, animation_of, normal, prompt, transformer

# steps that take over what the blocks did, with and after guidance
REUSING = Options(guidance_end=0.5, step_cache=StepCache(MAG, speedup=2.0))
CPU = torch.device("cpu")
MODELS = {
    "scail": replace(SCAIL, num_heads=4),
    "text": replace(TEXT_TO_VIDEO, num_heads=4),
    "first_frame": replace(TEXT_TO_VIDEO, num_heads=4, in_dim=48, out_dim=48),
}


class Processes:
    """A pool that runs a function as each rank of a group at the same time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(max_workers=4, mp_context=context)
        self._groups = 0

    def run(self, directory: Path, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returns."""
        self._groups += 1
        store = str(directory / f"store-{self._groups}")
        ranks = range(world_size)
        running = [self._pool.submit(_as_rank, rank, world_size, store, function, arguments) for rank in ranks]
        return [each.result(60) for each in running]

    def close(self) -> None:
        self._pool.shutdown()


def _as_rank(rank: int, world_size: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    connect(FileStore(store, world_size), rank, world_size, CPU)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def model_of(kind: str, weights: str = "float") -> DiffusionTransformer:
    """weights: `float`, `pieces` (the same, block by block in pieces of tokens), `int8` (weight-only), or `balanced`
    (int8 arithmetic on int8 weights)."""
    model = transformer(MODELS[kind])
    if weights == "pieces":
        run_in_pieces(model, 4)
    if weights in ("float", "pieces"):
        return model
    names = block_linears(model)
    linears = {name: model.get_submodule(name) for name in names}
    quantize_modules(model, names)
    for name, linear in linears.items():
        into = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert isinstance(into, Int8Linear)
        into.weight._data, into.weight._scale = quantize_weight(linear.weight.detach())
        into.bias = linear.bias
    if weights == "balanced":
        set_precision(model, "balanced", CPU)
    return model


def conditioning_of(kind: str, head_dim: int) -> tuple[Conditioning, Tensor]:
    """And the noise. Tokens: 56 of `scail`, 9 of `text`, 27 of `first_frame`."""
    if kind == "scail":
        return animation_of(head_dim=head_dim), normal(1, 16, 3, 8, 8)
    if kind == "text":
        return text_to_video((1, 6, 6), head_dim), normal(1, 16, 1, 6, 6)
    return first_frame_to_video(normal(1, 48, 1, 6, 6, seed=7), (3, 6, 6), head_dim), normal(1, 48, 3, 6, 6)


@torch.inference_mode()
def denoised(model: DiffusionTransformer, kind: str, guidance_scale: float, options: Options = FULL) -> Tensor:
    """Latents of four steps, or eight with options."""
    conditioning, noise = conditioning_of(kind, model.config.head_dim)
    solver = make_solver("unipc", 4 if options == FULL else 8, 3.0)
    expert = Expert(model, guidance_scale)
    *_, last = denoise([expert], solver, solver.start(noise), conditioning, prompt(model.config), options)
    return conditioning.result(last.latents)


def latents_together(kind: str, weights: str, guidance_scale: float, options: Options = FULL) -> tuple[Any, list[int]]:
    """The latents as an array, and how many tokens each block of this rank was given."""
    model = model_of(kind, weights)
    team = DeviceTeam(model.config.num_heads)
    team.join(model)
    gate_blocks(model.blocks, CPU, team.check)
    lengths: list[int] = []

    def before(module: nn.Module, arguments: Any) -> None:
        lengths.append(arguments[0].shape[1])

    for block in model.blocks:
        block.register_forward_pre_hook(before)
    return denoised(model, kind, guidance_scale, options).numpy(), lengths


def blocks_until_cancelled(kind: str, guidance_scale: float, cancelled_rank: int, after: int) -> int:
    """Blocks that this rank runs when the work of one rank is cancelled while its block number `after` runs."""
    model = model_of(kind)
    team = DeviceTeam(model.config.num_heads)
    team.join(model)
    ran = 0

    def count(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal ran
        ran += 1
        if ran == after and dist.get_rank() == cancelled_rank:
            flag.set()

    gate_blocks(model.blocks, CPU, team.check)
    for block in model.blocks:
        block.register_forward_hook(count)
    flag = threading.Event()
    gpu._work.cancelled = flag
    try:
        denoised(model, kind, guidance_scale)
    except WorkCancelled:
        return ran
    finally:
        gpu._work.cancelled = None
    raise AssertionError("nothing was cancelled")
