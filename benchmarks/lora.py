"""What becomes of a LoRA that is merged into int8 weights, against the same one added beside each layer in float32.

`python -m benchmarks.lora [--small] [--json FILE]`; needs no GPU (four blocks of 1,024 channels take two minutes on one
core). The weights are random with the outliers of trained ones (`benchmarks.outliers`), in int8 as a file of Wan2GP has
them. Every linear of the blocks has a LoRA of rank 64 that changes it by a part of its own size; what the LoRA looks at is
mixed at random from what the layer is given, as it is in trained ones, whose gradients consist of that. The part decides
everything, so there is a row for each.

Columns: the change of a weight in steps of its int8 numbers; for scales as they are chosen and for the smallest ones that
there may be: the relative error of the merged weights, how much of the LoRA is left in them (1: all of it, 0: it was
rounded away), and the error of the velocity as a part of what the LoRA changes in it (1: as if there were none).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import Bench, in_float32, int8_checkpoint, relative, rms, twin
from benchmarks.outliers import outlier_model
from services.denoiser.lora import Changes, Product
from services.denoiser.model import PRESETS, DiffusionTransformer
from services.denoiser.quantisation import DATA, SCALE, quantize_weight, quantized_names

CPU = torch.device("cpu")
RANK = 64
PARTS = (0.003, 0.01, 0.03, 0.1, 0.3)
Merge = Callable[[Changes, str, Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """Of a LoRA that changes each weight by `part` of its size."""

    part: float
    steps: float
    error: float
    left: float
    velocity: float
    smallest_error: float
    smallest_left: float
    smallest_velocity: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a trial of two narrow blocks")
    parser.add_argument("--json", type=Path, help="to write")
    options = parser.parse_args()
    config = replace(
        PRESETS["scail-14b"], dim=1024, ffn_dim=2816, num_heads=8, num_layers=4, text_dim=64, text_len=64, image_dim=64
    )
    if options.small:
        config = replace(config, dim=128, ffn_dim=256, num_heads=1, num_layers=2)
    with torch.inference_mode():
        model = int8_checkpoint(outlier_model(config, CPU))
        bench = Bench(config, CPU, num_frames=5, steps=1)
        print("| change | steps | error | left | velocity | smallest scales: error | left | velocity |")
        print("| --- " * len(fields(Row)) + "|")
        given = inputs_of_linears(bench, model)
        rows = [measured(bench, model, given, part) for part in PARTS]
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def inputs_of_linears(bench: Bench, model: DiffusionTransformer) -> dict[str, Tensor]:
    """What each int8 linear is given in a pass: [tokens, in] float32."""
    given: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Tensor]) -> None:
        given[name] = arguments[0].float().flatten(0, -2)

    truth = in_float32(model)
    for name in quantized_names(model.state_dict()):
        truth.get_submodule(name).register_forward_pre_hook(partial(keep, name))
    bench.velocity(truth, bench.prompt.prompt_embeds)
    return given


def measured(bench: Bench, model: DiffusionTransformer, given: Mapping[str, Tensor], part: float) -> Row:
    """Merges a LoRA in both ways, and prints and gives what comes of it."""
    tensors = model.state_dict()
    terms = {name: random_lora(dequantised(tensors, name), inputs, part) for name, inputs in sorted(given.items())}
    changes = Changes({f"{name}.weight": [term] for name, term in terms.items()})
    text = bench.prompt.prompt_embeds
    plain = bench.velocity(in_float32(model), text)
    truth = bench.velocity(beside(in_float32(model), terms), text)
    steps = [rms(change(terms[name])) / float(tensors[name + SCALE].float().mean()) for name in terms]
    found: list[float] = []
    for merge in (Changes.merged, with_smallest_scales):
        merged = dict(tensors)
        for name in terms:
            merged |= merge(changes, name + DATA, tensors)
        errors, lefts = zip(*(of_a_weight(name, terms[name], tensors, merged) for name in terms), strict=True)
        predicted = bench.velocity(in_float32(with_tensors(model, merged)), text)
        effect = float((predicted - truth).norm() / (plain - truth).norm())
        found += [mean(errors), mean(lefts), effect]
    row = Row(part, mean(steps), *found)
    print("| " + " | ".join(f"{value:.3g}" for value in asdict(row).values()) + " |", flush=True)
    return row


def random_lora(weight: Tensor, inputs: Tensor, part: float) -> Product:
    """A product whose norm is `part` of the weight's and whose rows are mixtures of the inputs [tokens, in]."""
    generator = torch.Generator().manual_seed(sum(weight.shape))
    up = torch.randn(len(weight), RANK, generator=generator)
    down = torch.randn(RANK, len(inputs), generator=generator) @ inputs
    return Product(up, down, part * float(weight.norm() / (up @ down).norm()))


def beside(model: DiffusionTransformer, terms: Mapping[str, Product]) -> DiffusionTransformer:
    """The model with each LoRA added to what its layer gives."""
    for name, term in terms.items():
        model.get_submodule(name).register_forward_hook(partial(_add, term))
    return model


def _add(term: Product, module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    return output + term.scale * F.linear(F.linear(arguments[0].float(), term.down), term.up)


def with_smallest_scales(changes: Changes, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `Changes.merged`, with the scales that would be chosen for weights that have not been quantised before."""
    module = name.removesuffix(DATA)
    weight = f"{module}.weight"
    total = changes.merged(weight, {weight: dequantised(tensors, module)})[weight]
    data, scale = quantize_weight(total)
    data, scale = quantize_weight(total, scale.to(tensors[module + SCALE].dtype))
    return {name: data, module + SCALE: scale}


def of_a_weight(
    name: str, term: Product, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Relative error of a merged weight, and how much of the LoRA is left in it."""
    added, weight, merged = change(term), dequantised(before, name), dequantised(after, name)
    return relative(merged, weight + added), float(((merged - weight) * added).sum() / added.square().sum())


def change(term: Product) -> Tensor:
    """[out, in]."""
    return term.scale * (term.up @ term.down)


def dequantised(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """[out, in] float32."""
    return tensors[name + DATA].float() * tensors[name + SCALE].float()


def with_tensors(model: DiffusionTransformer, tensors: Mapping[str, Tensor]) -> DiffusionTransformer:
    """Another model of the same modules."""
    other = twin(model)
    other.load_state_dict(dict(tensors), assign=True)
    return other


def mean(values: list[float] | tuple[float, ...]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
