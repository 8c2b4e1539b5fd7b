"""Trains the transformer of a finished bundle a little further, and keeps it before and after it is quantised.

    python -m training.refine_transformer --bundle bundles/tiny --output runs/refined

leaves in the folder a whole bundle, whose transformer is quantised again, and `transformer_float.safetensors`, the same
weights before that. `python -m benchmarks.quality --bundle runs/refined --bf16 runs/refined/transformer_float.safetensors`
then says what quantising costs, where the weights of the first training were not kept. Minutes on a processor: the
encoders stay as they are, and the weights need only leave the grid that they were rounded to.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.bundles import Bundle, BundleComponent, configuration, load_bundle
from runtime.weights import load_weights, read_checkpoint
from services.denoiser.model import PRESETS as TRANSFORMERS
from services.denoiser.model import DiffusionTransformer, TransformerConfig
from services.denoiser.quantisation import (
    DATA,
    SCALE,
    block_linears,
    quantize_state_dict,
    quantized_names,
    write_quanto,
)
from services.encoder.image import PRESETS as IMAGE_ENCODERS
from services.encoder.image import ImageEncoderConfig
from services.encoder.text import PRESETS as TEXT_ENCODERS
from services.encoder.text import PromptTokenizer, TextEncoderConfig
from services.encoder.weights import image_model, text_model
from training.conditions import Learners, token_rows
from training.encoded_clips import encode_clips
from training.export import on_cpu, write_digests
from training.train_transformer import PLAIN, Recipe, Training

_RATE, _GRADIENT_NORM = 3e-5, 1.0
_TOLD_EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("bundles/tiny"))
    parser.add_argument("--output", type=Path, required=True, help="folder for the bundle; must not exist")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    shutil.copytree(arguments.bundle, arguments.output)
    bundle = load_bundle(arguments.output)
    learners, tokenizer = trained_learners(bundle)
    recipe = Recipe(clips=arguments.clips, batch=arguments.batch, steps=arguments.steps)
    refine(bundle, learners, tokenizer, recipe)
    write_both(arguments.output, bundle, learners.transformer)


def trained_learners(bundle: Bundle) -> tuple[Learners, PromptTokenizer]:
    """The models of a bundle in float32, and its tokenizer."""
    text, image = bundle.component("text_encoder"), bundle.component("image_encoder")
    text_config = configuration(text, TEXT_ENCODERS, TextEncoderConfig)
    image_config = configuration(image, IMAGE_ENCODERS, ImageEncoderConfig)
    transformer = configuration(bundle.component("transformer"), TRANSFORMERS, TransformerConfig)
    model = DiffusionTransformer(transformer, attention=PLAIN)
    load_weights(model, dequantized(_tensors(bundle.component("transformer"))), source="transformer")
    cpu, dtype = torch.device("cpu"), torch.float32
    assert text.tokenizer is not None
    return (
        Learners(
            model,
            text_model(_tensors(text), text_config, device=cpu, dtype=dtype, source="text encoder"),
            image_model(_tensors(image), image_config, device=cpu, dtype=dtype, source="image encoder"),
        ),
        PromptTokenizer(text.tokenizer, text_config),
    )


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint in the quanto layout as float32 weights."""
    names = quantized_names(tensors)
    plain = {key: tensor.float() for key, tensor in tensors.items() if not any(key.startswith(f"{n}.") for n in names)}
    biases = {f"{name}.bias": tensors[f"{name}.bias"].float() for name in names if f"{name}.bias" in tensors}
    weights = {f"{name}.weight": tensors[name + DATA].float() * tensors[name + SCALE].float() for name in names}
    return {**plain, **biases, **weights}


def refine(bundle: Bundle, learners: Learners, tokenizer: PromptTokenizer, recipe: Recipe) -> None:
    """Trains the transformer of `learners` for so many steps, at a small constant rate."""
    cpu = torch.device("cpu")
    samples = encode_clips(bundle, tokenizer, recipe.clips, seed=recipe.seed + 2, held_out=False, device=cpu)
    prompts = ["", bundle.sampling.negative_prompt]
    no_text = token_rows(prompts, tokenizer, learners.transformer.config.text_len)
    training = Training(learners, samples, recipe, no_text, bundle.quirks.pose_time_origin)
    parameters = list(learners.transformer.requires_grad_(True).parameters())
    optimiser = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)
    torch.manual_seed(recipe.seed + 3)
    for step in range(1, recipe.steps + 1):
        loss = training.loss()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        optimiser.step()
        if step % _TOLD_EVERY == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def write_both(directory: Path, bundle: Bundle, transformer: DiffusionTransformer) -> None:
    """Writes the transformer in bfloat16, and quantised into the bundle."""
    tensors, modules = on_cpu(transformer, torch.bfloat16), block_linears(transformer)
    save_file(tensors, directory / "transformer_float.safetensors")
    component = bundle.component("transformer")
    write_quanto(component.files[0], quantize_state_dict(tensors, modules), modules, dict(component.config))
    write_digests(directory, bundle, "transformer")


def _tensors(component: BundleComponent) -> dict[str, Tensor]:
    return dict(read_checkpoint(component.files))


if __name__ == "__main__":
    main()
