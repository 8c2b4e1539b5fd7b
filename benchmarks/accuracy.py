"""How far each precision is from float32: every block of SCAIL 14B, and the latents after 30 steps with guidance.

`python -m benchmarks.accuracy [--steps 30] [--frames 17] [--small] [--json FILE]` needs a GPU of 80 GB and takes some
minutes, most of them for the two references; `--small` is a trial of a few layers on any machine.

The weights are random, with the outliers of trained ones (`benchmarks.outliers`), in bfloat16; what the linears are
given then is printed first. From them, and from the int8 checkpoint that they make, every row computes the same clip
from the same noise. The reference of a family of rows computes with its very weights, turned to float32 block by block,
in float32 without TF32: so a row's error is that of its arithmetic, and for the bfloat16 family that of quantising too.

Columns: the relative error of what a block adds to the residual stream, given the reference's tokens (its own error) and
of the stream itself when the pass has run up to there (what has gathered, flattered by the outliers that the stream has
from the start); of the velocity of one pass; of the latents after the last step. The last column is the latents' error
over that of bfloat16, which is what the weights' dtype costs by itself: `balanced` is to stay below 2.

What this does not show: random velocities are no trained denoiser, which pulls a sample that was put a little off its way
back to the likely ones. So that the figures mean something all the same, the size of the latents is printed at each
step: it must neither run off nor fall to nothing. So is how far the two guidance branches are apart, because guidance
multiplies what they differ by, errors too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.denoiser import timed
from benchmarks.outliers import Moments, outlier_model
from runtime.weights import build_on_meta
from services.denoiser.attention import BACKENDS
from services.denoiser.conditioning import Conditioning, animation, seeded_noise
from services.denoiser.denoise import Expert, Prompt, denoise
from services.denoiser.glue import Consumer, Gate, PlainGlue, Prepared
from services.denoiser.model import PRESETS, DiffusionTransformer, TimeEmbedding, TransformerConfig
from services.denoiser.precision import EXACT, PRECISIONS, set_precision, use_glue
from services.denoiser.quantisation import DATA, SCALE, block_linears, quantize_modules, quantize_weight
from services.denoiser.sampling import make_solver

GUIDANCE_SCALE, SHIFT = 5.0, 7.0  # of bundles/scail-14b
SIDE = 256  # of the clip
FIRST_TIMESTEP = 999
BF16, INT8 = "bfloat16", "int8 checkpoint"
_HEADINGS = """\
| computes | weights | s a pass | own: mean | max | stream: mean | max | velocity | latents | ratio |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
_WATCHED = {"q, k, v": "self_attn.q", "values gathered": "self_attn.o", "FFN": "ffn.0", "hidden": "ffn.2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--frames", type=int, default=17, help="4k + 1; 17 are 1,856 tokens")
    parser.add_argument("--small", action="store_true", help="a trial of a few narrow layers")
    parser.add_argument("--json", type=Path, help="to write")
    options = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    config = PRESETS["scail-14b"]
    if options.small:
        config = replace(config, dim=256, ffn_dim=768, num_heads=2, num_layers=4, text_dim=64, image_dim=64)
    with torch.inference_mode():
        bench = Bench(config, device, options.frames, options.steps)
        document = bench.run(outlier_model(config, device))
    if options.json:
        options.json.write_text(json.dumps(document, indent=2) + "\n")


@dataclass(frozen=True)
class Row:
    """Of one way to compute. Errors are relative to the float32 reference of its weights; None: that of the reference."""

    what: str
    weights: str
    pass_s: float
    own_mean: float | None = None
    own_max: float | None = None
    stream_mean: float | None = None
    stream_max: float | None = None
    velocity: float | None = None
    latents: float | None = None
    ratio: float | None = None  # of `latents` to those of bfloat16 with the same weights


@dataclass(frozen=True)
class Reference:
    """What float32 gives."""

    stream: list[Tensor]  # [B, L, D] before the first block and after each
    velocity: Tensor
    latents: Tensor
    pass_s: float


class Bench:
    """One clip, for all ways to compute it."""

    def __init__(self, config: TransformerConfig, device: torch.device, num_frames: int, steps: int) -> None:
        self.config, self.device, self.steps = config, device, steps
        side, frames = SIDE // 8, (num_frames - 1) // 4 + 1
        reference, pose = (
            seeded_noise((1, 16, 1, side, side), 1),
            seeded_noise((1, 16, frames, side // 2, side // 2), 2),
        )
        self.clip: Conditioning = animation(reference.to(device), pose.to(device), config.head_dim, pose_time_origin=1)
        text = (1, config.text_len, config.text_dim)
        self.prompt = Prompt(
            seeded_noise(text, 3).to(device),
            seeded_noise(text, 4).to(device),
            seeded_noise((1, 257, config.image_dim or 0), 5).to(device),
        )
        self.noise = seeded_noise((1, 16, 1 + frames, side, side), 6).to(device)
        self.rows: list[Row] = []

    def run(self, model: DiffusionTransformer) -> dict[str, Any]:
        """Measures and prints everything; gives it as a document."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        tokens = len(self.clip.rope.cos)
        print(f"{name}: {self.config.num_layers} blocks of {self.config.dim}, {tokens} tokens, {self.steps} steps\n")
        truth = in_float32(model)
        activations = self.activations(truth)
        norms: list[float] = []
        reference = self.reference(truth, norms.append)
        print("size of the latents, step by step: " + " ".join(f"{norm:.2f}" for norm in norms) + "\n")
        print(_HEADINGS)
        self._add(Row("float32", BF16, reference.pass_s))
        del truth
        self.row("bf16", BF16, model, reference)
        self.row("bf16, residual stream too", BF16, with_rounded_stream(model), reference)
        quantized = int8_checkpoint(model)
        of_int8 = self.row("exact (int8 weights)", BF16, quantized, reference)
        for precision in PRECISIONS:
            if precision != EXACT:
                self.row(precision, BF16, self.at(model, precision), reference)
        del model
        reference = self.reference(in_float32(quantized), lambda norm: None)
        self._add(Row("float32", INT8, reference.pass_s))
        self.row(EXACT, INT8, quantized, reference, of_int8)
        for precision in PRECISIONS:
            if precision != EXACT:
                self.row(precision, INT8, self.at(quantized, precision), reference)
        return {
            "device": name,
            "tokens": tokens,
            "steps": self.steps,
            "activations": activations,
            "norms": norms,
            "rows": list(map(asdict, self.rows)),
        }

    def at(self, model: DiffusionTransformer, precision: str) -> DiffusionTransformer:
        """Another model of the same weights, at a precision."""
        changed = twin(model)
        set_precision(changed, precision, self.device)
        return changed

    def activations(self, model: DiffusionTransformer) -> dict[str, Any]:
        """Of one pass: how heavy the tails are of what the linears are given, and of the residual stream."""
        moments: defaultdict[str, Moments] = defaultdict(Moments)
        handles = [
            block.get_submodule(path).register_forward_pre_hook(_adding(moments[name], 0))
            for block in model.blocks
            for name, path in _WATCHED.items()
        ]
        handles += [block.register_forward_pre_hook(_adding(moments["residual stream"], 0)) for block in model.blocks]
        positive, negative = (self.velocity(model, embeds) for embeds in self._texts())
        for handle in handles:
            handle.remove()
        apart = relative(negative, positive)
        print("| activations | kurtosis | largest / rms |\n| --- | ---: | ---: |")
        for name, seen in moments.items():
            print("| {} | {kurtosis:.0f} | {peak:.0f} |".format(name, **seen.row()))
        print(f"\nguidance: the branches are {apart:.3f} of the velocity apart, its size is {rms(positive):.2f}\n")
        return {name: seen.row() for name, seen in moments.items()} | {"guidance": apart}

    def reference(self, model: DiffusionTransformer, note: Callable[[float], object]) -> Reference:
        """Runs float32; `note` is told the size of the latents after each step."""
        stream = list(self.passed(model))
        with timed(self.device) as seconds:
            velocity = self.velocity(model, self.prompt.prompt_embeds)
        return Reference(stream, velocity, self.sampled(model, note), seconds())

    def row(
        self, what: str, weights: str, model: DiffusionTransformer, reference: Reference, latents: Tensor | None = None
    ) -> Tensor:
        """Measures a model and prints it; gives its latents, which may be known already."""
        own, stream = self.block_errors(model, reference)
        self.velocity(model, self.prompt.prompt_embeds)  # kernels are compiled here
        with timed(self.device) as seconds:
            velocity = self.velocity(model, self.prompt.prompt_embeds)
        latents = self.sampled(model, lambda norm: None) if latents is None else latents
        error = relative(latents, reference.latents)
        yardstick = next((row.latents for row in self.rows if row.weights == weights and row.latents), error)
        self._add(
            Row(
                what, weights, seconds(), sum(own) / len(own), max(own), sum(stream) / len(stream), max(stream),
                relative(velocity, reference.velocity), error, error / yardstick,
            )
        )  # fmt: skip
        return latents

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print("| " + " | ".join(_cell(value) for value in asdict(row).values()) + " |", flush=True)

    def block_errors(self, model: DiffusionTransformer, reference: Reference) -> tuple[list[float], list[float]]:
        """Of each block: of what it adds by itself, and of the stream behind it."""
        given, expected = reference.stream[:-1], reference.stream[1:]
        stream = [relative(*pair) for pair in zip(list(self.passed(model))[1:], expected, strict=True)]
        time, context = self._time(model), model.embed_context(self.prompt.prompt_embeds, self.prompt.image_embeds)
        own = [
            relative(block(before.clone(), time, context, self.clip.rope) - before, after - before)
            for block, before, after in zip(model.blocks, given, expected, strict=True)
        ]
        return own, stream

    def passed(self, model: DiffusionTransformer) -> Iterator[Tensor]:
        """The residual stream of one pass: before the first block and after each."""
        time, context = self._time(model), model.embed_context(self.prompt.prompt_embeds, self.prompt.image_embeds)
        tokens = model.embed_tokens(self._input(), self.clip.pose_latents)
        yield tokens.clone()
        for block in model.blocks:
            tokens = block(tokens, time, context, self.clip.rope)
            yield tokens.clone()  # kernels write into what they are given

    def velocity(self, model: DiffusionTransformer, prompt_embeds: Tensor) -> Tensor:
        context = model.embed_context(prompt_embeds, self.prompt.image_embeds)
        timestep = torch.tensor([FIRST_TIMESTEP])
        predicted: Tensor = model(self._input(), timestep, context, self.clip.rope, self.clip.pose_latents)
        return predicted

    def sampled(self, model: DiffusionTransformer, note: Callable[[float], object]) -> Tensor:
        """The latents after all steps; `note` is told their size after each."""
        solver = make_solver("unipc", self.steps, SHIFT)
        states = denoise([Expert(model, GUIDANCE_SCALE)], solver, solver.start(self.noise), self.clip, self.prompt)
        for state in states:
            latents = self.clip.result(state.latents)
            note(rms(latents))
        return latents

    def _texts(self) -> tuple[Tensor, Tensor]:
        assert self.prompt.negative_prompt_embeds is not None
        return self.prompt.prompt_embeds, self.prompt.negative_prompt_embeds

    def _input(self) -> Tensor:
        return self.clip.model_input(self.clip.with_known(self.noise))

    def _time(self, model: DiffusionTransformer) -> TimeEmbedding:
        return model.embed_timestep(torch.tensor([FIRST_TIMESTEP]), self.device)


def twin(model: DiffusionTransformer, attention: str = "auto") -> DiffusionTransformer:
    """Another model with the same tensors, so that changing its modules leaves the first as it is."""
    tensors = model.state_dict()
    copy = build_on_meta(lambda: DiffusionTransformer(model.config, BACKENDS[attention]))
    quantize_modules(copy, [name.removesuffix(DATA) for name in tensors if name.endswith(DATA)])
    copy.load_state_dict(tensors, assign=True)
    return copy.requires_grad_(False).eval()


def in_float32(model: DiffusionTransformer) -> DiffusionTransformer:
    """The same weights, computing in float32 throughout: also in attention, whose fused kernels would not.

    A block's weights are turned to float32 when it is called and let go of afterwards: all of them would take 66 GB.
    """
    truth = twin(model, "math")
    for part in (*truth.blocks, truth.text_embedding, truth.img_emb):
        held = [
            (table, name, tensor)
            for owner in part.modules()
            for table in (owner._parameters, owner._buffers)
            for name, tensor in table.items()
            if tensor is not None and tensor.is_floating_point()
        ]
        part.register_forward_pre_hook(partial(_turned, held))
        part.register_forward_hook(partial(_as_it_was, held))
    return truth


_Held = list[tuple[Any, str, Tensor]]


def _turned(held: _Held, module: nn.Module, arguments: Any) -> None:
    for table, name, tensor in held:
        table[name] = nn.Parameter(tensor.float(), requires_grad=False)


def _as_it_was(held: _Held, module: nn.Module, arguments: Any, output: Any) -> None:
    for table, name, tensor in held:
        table[name] = tensor


def int8_checkpoint(model: DiffusionTransformer) -> DiffusionTransformer:
    """The model as its int8 checkpoint would be loaded: as quanto rounds the linears of the blocks."""
    tensors, names = model.state_dict(), block_linears(model)
    for name in names:
        tensors[name + DATA], tensors[name + SCALE] = quantize_weight(tensors.pop(f"{name}.weight"))
    quantized = build_on_meta(lambda: DiffusionTransformer(model.config))
    quantize_modules(quantized, names)
    quantized.load_state_dict(tensors, assign=True)
    return quantized.requires_grad_(False).eval()


class _RoundedGlue(PlainGlue):
    """Rounds the residual stream to bfloat16 after each addition."""

    name = "rounded"

    def add(self, tokens: Tensor, linear: Consumer, inputs: Prepared, gate: Gate) -> Tensor:
        return super().add(tokens, linear, inputs, gate).bfloat16().float()


def with_rounded_stream(model: DiffusionTransformer) -> DiffusionTransformer:
    """As other programs run Wan in bfloat16 (diffusers, Wan2GP's plain Wan): the residual stream is bfloat16 too."""
    rounded = twin(model)
    use_glue(rounded, _RoundedGlue())
    return rounded


def _adding(moments: Moments, place: int) -> Callable[[nn.Module, Any], None]:
    def add(module: nn.Module, arguments: Any) -> None:
        moments.add(arguments[place])

    return add


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def rms(values: Tensor) -> float:
    return float(values.norm()) / math.sqrt(values.numel())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
