"""The denoising loop: experts, solver, conditioning and prompt in, a solver state after every step out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.denoiser.conditioning import Conditioning
from services.denoiser.model import Context, DiffusionTransformer
from services.denoiser.sampling import Solver, SolverState


@dataclass(frozen=True)
class Expert:
    """A transformer and the noise it is for. Most families have one; Wan 2.2 A14B has one for high and one for low noise."""

    model: DiffusionTransformer
    guidance_scale: float  # 1: no guidance
    min_timestep: float = 0.0  # takes the steps from this timestep (the family's boundary * 1000) upwards


@dataclass(frozen=True)
class Prompt:
    """Embeddings as the encoders give them; the padding to text_len is the model's."""

    prompt_embeds: Tensor  # [B, n, text_dim]
    negative_prompt_embeds: Tensor | None = None  # the same; needed for guidance
    image_embeds: Tensor | None = None  # [B, 257, 1280] for models with an image branch; serves both guidance branches


@dataclass(frozen=True)
class _Branches:
    """The contexts of the two guidance branches, embedded by one expert."""

    positive: Context
    negative: Context | None


def denoise(
    experts: Sequence[Expert], solver: Solver, state: SolverState, conditioning: Conditioning, prompt: Prompt
) -> Iterator[SolverState]:
    """Takes the steps that `state` has not taken yet and yields the state after each.

    The latents of a yielded state still hold what the solver made of known frames; `conditioning.result` gives the
    finished latents of the last one. Whoever consumes the states decides on progress, previews and checkpoints, and
    may stop at any of them; a forward hook on a block can stop within a step.

    Args:
        experts: every timestep has to be at or above the min_timestep of one of them; the highest that fits is taken.
        solver: of this run.
        state: `solver.start(noise)`, or one that an earlier run of the same arguments has left.
        conditioning, prompt: on the device of the latents and the models.

    Raises:
        ValueError: `state` is not one of this solver, guidance lacks a negative prompt, or a timestep has no expert.
    """
    solver.check(state)
    if prompt.negative_prompt_embeds is None and any(expert.guidance_scale != 1 for expert in experts):
        raise ValueError("negative_prompt_embeds must be given unless guidance_scale is 1")
    for timestep in solver.timesteps[state.step :]:
        choose_expert(experts, timestep)
    return _steps(experts, solver, state, conditioning, prompt)


def choose_expert(experts: Sequence[Expert], timestep: Tensor) -> Expert:
    """The expert with the highest min_timestep that is not above `timestep`."""
    fitting = [expert for expert in experts if float(timestep) >= expert.min_timestep]
    if not fitting:
        raise ValueError(f"no expert is for timestep {float(timestep)}")
    return max(fitting, key=lambda expert: expert.min_timestep)


def _steps(
    experts: Sequence[Expert], solver: Solver, state: SolverState, conditioning: Conditioning, prompt: Prompt
) -> Iterator[SolverState]:
    expert: Expert | None = None
    for step in range(state.step, solver.num_inference_steps):
        timestep = solver.timesteps[step]
        if expert is not (chosen := choose_expert(experts, timestep)):
            expert, branches = chosen, _embed(chosen, prompt)  # each expert has its own text embedding
        state = replace(state, latents=conditioning.with_known(state.latents))
        velocity = _guided_velocity(expert, branches, conditioning, state.latents, timestep)
        state = solver.step(state, velocity)
        yield state


@torch.no_grad()
def _embed(expert: Expert, prompt: Prompt) -> _Branches:
    positive = expert.model.embed_context(prompt.prompt_embeds, prompt.image_embeds)
    if expert.guidance_scale == 1 or prompt.negative_prompt_embeds is None:
        return _Branches(positive, None)
    return _Branches(positive, expert.model.embed_context(prompt.negative_prompt_embeds, prompt.image_embeds))


@torch.no_grad()
def _guided_velocity(
    expert: Expert, branches: _Branches, conditioning: Conditioning, latents: Tensor, timestep: Tensor
) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): negative + scale * (positive - negative)."""
    model_input = conditioning.model_input(latents)
    timesteps = conditioning.timesteps(timestep, latents)

    def velocity(context: Context) -> Tensor:
        predicted: Tensor = expert.model(model_input, timesteps, context, conditioning.rope, conditioning.pose_latents)
        return predicted

    positive = velocity(branches.positive)
    if branches.negative is None:
        return positive
    negative = velocity(branches.negative)
    return negative + expert.guidance_scale * (positive - negative)


def preview_rgb(latents: Tensor, factors: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A rough picture of latents without the VAE: each latent pixel mapped linearly to a colour.

    Args:
        latents: [1, C, T, h, w].
        factors: [C, 3], colours in 0..1 per unit of each channel, fitted to the VAE of the model; a bundle has them.
            Without them the picture is in FALSE colours, an approximation that shows where things are and how they
            move: red, green and blue are sums of every third channel.
        bias: [3], the colour of latents of zero; mid grey if left out.

    Returns:
        uint8 [T, h, w, 3] on the device of the latents.
    """
    channels = latents.shape[1]
    if factors is None:
        # latents have about unit variance, so the sum of C/3 channels deviates by (C/3)^0.5; two deviations span a range
        factors = torch.eye(3).repeat(-(-channels // 3), 1)[:channels] * 0.25 * (3 / channels) ** 0.5
    if bias is None:
        bias = torch.full((3,), 0.5)
    colours = latents[0].permute(1, 2, 3, 0) @ factors.to(latents) + bias.to(latents)  # [T, h, w, 3]
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8)
