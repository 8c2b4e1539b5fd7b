"""The Triton kernels of the transformer one by one, beside the time that their bytes or products take. Needs a GPU.

`python -m benchmarks.kernels [--tokens N] [--tune]`: ms of each kernel at width 5120, ms of the floor (its bytes at the
rate of a copy; its products at that of `torch._int_mm`), and their ratio. --tune tries other numbers of warps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from services.denoiser import triton_glue
from services.denoiser.fp8_attention import FP8, Fp8Tokens
from services.denoiser.glue import Affine, HeadNorm
from services.denoiser.int8 import Int8Tokens, TurnedInt8Linear
from services.denoiser.model import Linear
from services.denoiser.rope import Rope
from services.denoiser.triton_fp8 import centred
from services.denoiser.triton_int8 import TritonArithmetic

DIM, HIDDEN, HEADS = 5120, 13824, 40
DEVICE = torch.device("cuda:0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48832)
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    tokens = options.tokens
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name(DEVICE)}: a copy moves {rate / 1e12:.2f} TB/s\n")
    print("| kernel | ms | floor ms | ratio |\n| --- | ---: | ---: | ---: |")
    for name, work, moved in (*glue_kernels(tokens), *quantising(tokens)):
        show(name, work, moved / rate * 1000)
    for name, work, floor in products(tokens):
        show(name, work, milliseconds(floor))
    if options.tune:
        tune(tokens, rate)


def glue_kernels(tokens: int) -> list[tuple[str, Callable[[], object], float]]:
    """Name, work and the bytes that it has to move."""
    stream = torch.randn(1, tokens, DIM, device=DEVICE)
    values = torch.randn(1, tokens, DIM, device=DEVICE, dtype=torch.bfloat16)
    rows = torch.randn(1, DIM, device=DEVICE)
    only = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    affine = Affine(1e-6, rows, rows, only, 1)
    angles = torch.randn(tokens, DIM // HEADS // 2, device=DEVICE)
    rope = Rope(angles.cos(), angles.sin())
    linear = TurnedInt8Linear(
        Linear(DIM, 128).to(DEVICE), TritonArithmetic(), input_is_turned=False, group=128, gelu=False
    )
    glue, size = triton_glue.TRITON, float(tokens * DIM)
    heads = torch.unflatten(values, -1, (HEADS, -1))
    centred_heads = centred(heads)
    attended = Fp8Tokens(centred_heads.data.flatten(2), centred_heads.scale, centred_heads.mean.flatten())
    return [
        ("norm, modulate, turn, int8", lambda: glue.normed(stream, affine, linear), 5 * size),
        ("RMS norm and rotary positions", lambda: glue.turn(values, HeadNorm(1e-6, rows[0], HEADS), rope), 4 * size),
        ("the same, to 8-bit floats", lambda: glue.turn(values, HeadNorm(1e-6, rows[0], HEADS, FP8), rope), 3 * size),
        ("values less their mean, to 8-bit floats", lambda: centred(heads), 5 * size),
        ("what 8-bit attention gathered, to int8", lambda: TritonArithmetic().quantize(attended, 1), 2 * size),
    ]


def quantising(tokens: int) -> list[tuple[str, Callable[[], object], float]]:
    narrow, also = torch.randn(2, tokens, DIM, device=DEVICE, dtype=torch.bfloat16)
    wide = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    arithmetic = TritonArithmetic()
    return [
        ("int8 of 5120", lambda: arithmetic.quantize(narrow, 1), 3 * narrow.numel()),
        ("int8 of the sum of two", lambda: arithmetic.quantize(narrow, 1, also), 5 * narrow.numel()),
        ("turn, int8 of 13824", lambda: arithmetic.quantize(wide, 128), 3 * wide.numel()),
    ]


def products(tokens: int) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, work, and the same integer product without anything around it."""
    found: list[tuple[str, Callable[[], object], Callable[[], object]]] = []
    for k, n, gelu in ((DIM, DIM, False), (DIM, HIDDEN, True), (HIDDEN, DIM, False)):
        product = Product(tokens, k, n)
        name = f"product {k} -> {n}"
        found.append((f"{name}{', GELU' if gelu else ''}", partial(product.made, gelu), product.bare))
        if not gelu:
            found.append((f"{name}, added gated", product.added, product.bare))
    return found


class Product:
    """Random numbers [tokens, k] and weights [n, k]."""

    def __init__(self, tokens: int, k: int, n: int) -> None:
        data = torch.randint(-127, 128, (tokens, k), device=DEVICE, dtype=torch.int8)
        self.tokens = Int8Tokens(data, torch.rand(tokens, 1, device=DEVICE))
        self.weight = torch.randint(-127, 128, (n, k), device=DEVICE, dtype=torch.int8)
        self.scale, self.bias = torch.rand(n, device=DEVICE), torch.randn(n, device=DEVICE, dtype=torch.bfloat16)
        self.stream = torch.zeros(1, tokens if n == DIM else 0, n, device=DEVICE)
        self.gate, self.row = self.scale[None] * 1e-6, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)

    def made(self, gelu: bool) -> object:
        return TritonArithmetic().multiply(self.tokens, self.weight, self.scale, self.bias, torch.bfloat16, gelu)

    def added(self) -> object:
        TritonArithmetic().add_product(
            self.stream, self.tokens, self.weight, self.scale, self.bias, self.gate, self.row
        )
        return self.stream

    def bare(self) -> object:
        return torch._int_mm(self.tokens.data, self.weight.T)


def tune(tokens: int, rate: float) -> None:
    print("\n| warps | registers | kernel | ms | floor ms | ratio |\n| ---: | ---: | --- | ---: | ---: | ---: |")
    for warps, registers in ((4, 255), (4, 128), (8, 255), (8, 128), (8, 80), (16, 128), (16, 64)):
        triton_glue.NORM_WARPS, triton_glue.NORM_REGISTERS = warps, registers
        for name, work, moved in glue_kernels(tokens)[:2]:
            print(f"| {warps} | {registers} ", end="")
            show(name, work, moved / rate * 1000)


def show(name: str, work: Callable[[], object], floor: float) -> None:
    taken = milliseconds(work)
    print(f"| {name} | {taken:.2f} | {floor:.2f} | {taken / floor:.2f} |", flush=True)


def copy_rate() -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 2**30 / (milliseconds(lambda: target.copy_(source)) / 1000)


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    work()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begun.record()
    for _ in range(repeats):
        work()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / repeats


if __name__ == "__main__":
    main()
