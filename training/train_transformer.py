"""Trains the transformer of a bundle, with its text and image encoders: drawn clips in, the bundle's files out.

    python -m training.train_transformer --bundle bundles/tiny --state runs/transformer.pt --log docs/training

Flow matching (Lipman et al. 2022, arXiv:2210.02747) on latents of the bundle's own VAE, which must be trained first.
The state file holds everything that is needed to go on: the same command, called again, does.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.bundles import Bundle, configuration, load_bundle
from services.denoiser.attention import PlainAttending
from services.denoiser.model import PRESETS as TRANSFORMERS
from services.denoiser.model import DiffusionTransformer, TransformerConfig
from services.encoder.image import PRESETS as IMAGE_ENCODERS
from services.encoder.image import ImageEncoderConfig, ImageModel
from services.encoder.text import PRESETS as TEXT_ENCODERS
from services.encoder.text import PromptTokenizer, TextEncoderConfig, TextModel
from training.conditions import (
    TIMESTEPS,
    Geometry,
    Learners,
    Samples,
    encode_tokens,
    model_input,
    pose_input,
    predict_velocity,
    token_rows,
)
from training.encoded_clips import encode_clips
from training.export import on_cpu, write_learners
from training.optimise import Average, Optimiser, RecordedStep, Schedule
from training.runs import Log, Progress, State, run_steps
from training.tiny_tokenizer import write_tokenizer

_VALIDATION_TIMES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Recipe:
    """How the transformer is trained.

    Attributes:
        clips: drawn and encoded once, then seen many times.
        batch, steps, rate: of the optimiser.
        average_decay: of the weights' running average, which is what is kept.
        time_shift: of the noise levels, above 1 towards noise.
        figure_weight: of the loss where the figure is; 1 elsewhere.
        no_text: share of samples whose caption is empty or the negative prompt, so that guidance has something to leave.
        no_reference: share without reference picture (neither latents nor image embeddings).
        known_first: share that go on from a frame of the window before.
    """

    clips: int = 40960
    batch: int = 128
    steps: int = 25000
    rate: float = 1.5e-3
    average_decay: float = 0.9985
    time_shift: float = 3.0
    figure_weight: float = 3.0
    no_text: float = 0.12
    no_reference: float = 0.03
    known_first: float = 0.15
    held_out_clips: int = 256
    seed: int = 20


class Training:
    """Losses of a batch, drawn on the device from the encoded clips."""

    def __init__(self, learners: Learners, samples: Samples, recipe: Recipe, no_text: Tensor, pose_time_origin: int):
        """
        Args:
            no_text: ids [k, text_len] of prompts that say nothing of a clip, one of which stands for a caption left out.
        """
        self.learners, self.recipe, self.samples, self._no_text = learners, recipe, samples, no_text
        config = learners.transformer.config
        geometry = Geometry.of(samples.pick(slice(0, 1)), config.head_dim, pose_time_origin=pose_time_origin)
        device = samples.video.device
        self._geometry = Geometry(geometry.rope.to(device), geometry.masks.to(device))

    def loss(self) -> Tensor:
        """Of a batch: clips, noise, times and omissions by chance."""
        recipe, device = self.recipe, self.samples.video.device
        rows = torch.randint(len(self.samples), (recipe.batch,), device=device)
        batch = self.samples.pick(rows)
        # stratified: every batch has all noise levels
        even = (torch.arange(recipe.batch, device=device) + torch.rand((), device=device)) / recipe.batch
        sigmas = recipe.time_shift * even / (1 + (recipe.time_shift - 1) * even)

        def chosen(share: float) -> Tensor:
            return torch.rand(recipe.batch, device=device) < share

        omit = Omissions(chosen(recipe.no_text), chosen(recipe.no_reference), chosen(recipe.known_first))
        noise = torch.randn(batch.video.shape, device=device)
        return self.error(batch, sigmas, noise, omit).mean()

    def error(self, batch: Samples, sigmas: Tensor, noise: Tensor, omit: Omissions) -> Tensor:
        """Weighted squared error of the velocity, [B]: of frames that are not given."""
        clean = batch.video.float()
        velocity = self.predicted(batch, sigmas, noise, omit)
        squared = (velocity - (noise - clean)).square().mean(dim=1)  # [B, T, h, w]
        weight = 1 + (self.recipe.figure_weight - 1) * batch.figure.float()
        first_counts = (~omit.known_first).float()[:, None, None]
        weight = torch.cat([weight[:, :1] * first_counts[:, None], weight[:, 1:]], dim=1)
        return (squared * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))

    def predicted(self, batch: Samples, sigmas: Tensor, noise: Tensor, omit: Omissions) -> Tensor:
        """Velocity of the video frames, [B, C, T, h, w]."""
        learners = self.learners
        seen = (~omit.reference).float()
        nothing = self._no_text[torch.arange(len(omit.text), device=noise.device) % len(self._no_text)]
        given = Samples(
            video=batch.video.float(),
            reference=batch.reference.float() * seen[:, None, None, None, None],
            pose=batch.pose.float(),
            picture=batch.picture.float(),
            tokens=torch.where(omit.text[:, None], nothing, batch.tokens),
            figure=batch.figure,
        )
        level = sigmas[:, None, None, None, None]
        noisy = (1 - level) * given.video + level * noise
        prompt_embeds = encode_tokens(learners.text, given.tokens)
        image_embeds = learners.image(given.picture) * seen[:, None, None]
        state = model_input(noisy, given, omit.known_first, self._geometry)
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=noise.device.type == "cuda"):
            context = learners.transformer.embed_context(prompt_embeds, image_embeds)
            velocity = predict_velocity(
                learners.transformer, state, sigmas * TIMESTEPS, context, self._geometry.rope, pose_input(given)
            )
        return velocity[:, :, 1:].float()

    @torch.no_grad()
    def validation(self, held_out: Samples) -> dict[float, float]:
        """Mean squared error by noise level, over clips that were not learned from, everything given; seeded noise."""
        device, count = held_out.video.device, len(held_out)
        noise = torch.randn(held_out.video.shape, generator=torch.Generator().manual_seed(0)).to(device)
        nothing = torch.zeros(count, dtype=torch.bool, device=device)
        omit = Omissions(nothing, nothing, nothing)
        errors = {}
        for sigma in _VALIDATION_TIMES:
            velocity = self.predicted(held_out, torch.full((count,), sigma, device=device), noise, omit)
            errors[sigma] = float(F.mse_loss(velocity, noise - held_out.video.float()))
        return errors


@dataclass(frozen=True)
class Omissions:
    """What samples of a batch go without, or are given besides: bool [B] each."""

    text: Tensor
    reference: Tensor
    known_first: Tensor


def build_learners(bundle: Bundle, seed: int) -> Learners:
    """Fresh models of a bundle's sizes; the head predicts nothing at first."""
    torch.manual_seed(seed)
    text = configuration(bundle.component("text_encoder"), TEXT_ENCODERS, TextEncoderConfig)
    image = configuration(bundle.component("image_encoder"), IMAGE_ENCODERS, ImageEncoderConfig)
    transformer = DiffusionTransformer(
        configuration(bundle.component("transformer"), TRANSFORMERS, TransformerConfig), attention=PLAIN
    )
    nn.init.zeros_(transformer.head.head.weight)
    assert transformer.head.head.bias is not None
    nn.init.zeros_(transformer.head.head.bias)
    return Learners(transformer, TextModel(text), ImageModel(image))


@dataclass(frozen=True)
class PlainAttention:
    """PyTorch's choice of kernel, without the holding-to that a compiled block cannot have."""

    name: str = "plain"
    dtype: torch.dtype | None = None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)

    def over(self, keys: Tensor, values: Tensor) -> PlainAttending:
        return PlainAttending(self, keys, values)


PLAIN = PlainAttention()


def make_optimiser(learners: Learners, rate: float) -> Optimiser:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    blocks = learners.transformer.blocks
    linears = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    matrices = [weight for linear in linears if isinstance(weight := linear.weight, nn.Parameter)]
    chosen = {id(weight) for weight in matrices}
    everything = [parameter for module in learners.modules().values() for parameter in module.parameters()]
    return Optimiser(matrices, [parameter for parameter in everything if id(parameter) not in chosen], rate)


def train(arguments: argparse.Namespace, recipe: Recipe) -> None:
    deadline = time.monotonic() + arguments.seconds
    device = torch.device(arguments.device)
    bundle = load_bundle(arguments.bundle)
    tokenizer = prepared_tokenizer(bundle)
    learners = build_learners(bundle, recipe.seed)
    text_len = learners.transformer.config.text_len
    begun = time.monotonic()
    samples = encoded(bundle, tokenizer, recipe, arguments.samples, device)
    held_out = encode_clips(bundle, tokenizer, recipe.held_out_clips, seed=recipe.seed, held_out=True, device=device)
    print(f"encoded {len(samples)} clips in {time.monotonic() - begun:.0f} s", flush=True)
    for module in learners.modules().values():
        module.to(device)
    if arguments.compile:
        for block in learners.transformer.blocks:
            block.compile()
    no_text = token_rows(["", bundle.sampling.negative_prompt], tokenizer, text_len).to(device)
    training = Training(learners, samples, recipe, no_text, bundle.quirks.pose_time_origin)
    optimiser = make_optimiser(learners, recipe.rate)
    parameters = [parameter for module in learners.modules().values() for parameter in module.parameters()]
    average = Average(parameters, recipe.average_decay)

    def one_step() -> Tensor:
        loss = training.loss()
        optimiser.step(loss)
        average.update()
        return loss.detach()

    torch.manual_seed(recipe.seed + 1)
    state, progress = State(learners.modules(), optimiser, average), Progress()
    resumed = arguments.state.exists()
    if resumed:
        one_step()  # makes the optimiser's memory, into which the saved one is read
        progress = state.restore(arguments.state)
    log = Log(arguments.log / "transformer.csv", append=resumed)
    schedule = Schedule(recipe.steps, warm_up_steps=200, decay_from=0.5, final=0.02)
    step = RecordedStep(one_step, device)
    progress = run_steps(
        step, optimiser, schedule, progress, until_step=recipe.steps, deadline=deadline, stage="transformer", log=log
    )
    state.save(arguments.state, progress)
    log.draw("transformer")
    average.swap()
    for sigma, error in training.validation(held_out).items():
        print(f"validation error at noise {sigma}: {error:.4f}", flush=True)
    write_learners(arguments.bundle, bundle, learners)
    if arguments.float_weights is not None:
        save_file(on_cpu(learners.transformer, torch.bfloat16), arguments.float_weights)


def encoded(
    bundle: Bundle, tokenizer: PromptTokenizer, recipe: Recipe, path: Path | None, device: torch.device
) -> Samples:
    """The clips to learn from, read from a file that an earlier call has left, or made (and left there)."""
    if path is not None and path.exists():
        return Samples(**torch.load(path, map_location=device, weights_only=True))
    samples = encode_clips(bundle, tokenizer, recipe.clips, seed=recipe.seed, held_out=False, device=device)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(samples), path)
    return samples


def prepared_tokenizer(bundle: Bundle) -> PromptTokenizer:
    """The bundle's tokenizer, written anew."""
    component = bundle.component("text_encoder")
    config = configuration(component, TEXT_ENCODERS, TextEncoderConfig)
    assert component.tokenizer is not None
    write_tokenizer(component.tokenizer, config.vocab)
    return PromptTokenizer(component.tokenizer, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recipe = Recipe()
    parser.add_argument("--bundle", type=Path, default=Path("bundles/tiny"))
    parser.add_argument("--state", type=Path, required=True, help="file to go on from, and to leave")
    parser.add_argument("--samples", type=Path, help="file that keeps the encoded clips from call to call")
    parser.add_argument("--log", type=Path, required=True, help="folder for the losses")
    parser.add_argument("--float-weights", type=Path, help="file for the transformer before it is quantised")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, to be gone on with")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--clips", type=int, default=recipe.clips)
    parser.add_argument("--batch", type=int, default=recipe.batch)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    chosen = Recipe(steps=arguments.steps, clips=arguments.clips, batch=arguments.batch)
    train(arguments, chosen)


if __name__ == "__main__":
    main()
