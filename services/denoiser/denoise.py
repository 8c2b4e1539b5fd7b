"""The denoising loop: experts, solver, conditioning and prompt in, a solver state after every step out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.denoiser.conditioning import Conditioning
from services.denoiser.model import Context, DiffusionTransformer, sinusoid
from services.denoiser.sampling import Solver, SolverState
from services.denoiser.step_cache import ModelInputs, Residuals, StepCache, computed_steps

_PIXELS_PER_LATENT = 8 * 8


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
class Options:
    """What is computed otherwise than at every step in full; by default nothing.

    Attributes:
        guidance_start, guidance_end: parts of the steps, 0 to 1, between which there is guidance; before and after it
            the positive branch alone is computed (Kynkaanniemi et al. 2024, arXiv:2404.07724).
        cfg_zero_star: guides with the negative branch scaled to the positive one (Fan et al. 2025, arXiv:2503.18886).
        zero_init_steps: steps, from the first, that are taken with a velocity of zero; the other half of that method.
        step_cache: takes over what the blocks did at earlier steps.
    """

    guidance_start: float = 0.0
    guidance_end: float = 1.0
    cfg_zero_star: bool = False
    zero_init_steps: int = 0
    step_cache: StepCache | None = None


FULL = Options()


@dataclass(frozen=True)
class Step:
    """What a step is going to do.

    Attributes:
        guided: whether both guidance branches take part.
        source: the step whose run of the blocks it uses: itself, or an earlier one; None: its velocity is zero.
    """

    number: int
    timestep: Tensor
    expert: Expert
    guided: bool
    source: int | None

    @property
    def reuses(self) -> bool:
        return self.source is not None and self.source < self.number


@dataclass(frozen=True)
class Forwards:
    """Forward passes of a run, each of one guidance branch at one step."""

    computed: int
    reused: int  # the blocks' part of them was taken from an earlier step
    omitted: int  # without guidance, or with a velocity of zero

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Forwards:
        branches = [1 + step.guided if step.source is not None else 0 for step in steps]
        reused = sum(count for step, count in zip(steps, branches, strict=True) if step.reuses)
        in_full = sum(1 + (step.expert.guidance_scale != 1) for step in steps)
        return cls(sum(branches) - reused, reused, in_full - sum(branches))


@dataclass(frozen=True)
class _Branches:
    """The contexts of the two guidance branches, embedded by one expert."""

    positive: Context
    negative: Context | None


def denoise(
    experts: Sequence[Expert],
    solver: Solver,
    state: SolverState,
    conditioning: Conditioning,
    prompt: Prompt,
    options: Options = FULL,
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
        ValueError: `state` is not one of this solver and these options, guidance lacks a negative prompt, or a timestep
            has no expert.
    """
    solver.check(state)
    if prompt.negative_prompt_embeds is None and any(expert.guidance_scale != 1 for expert in experts):
        raise ValueError("negative_prompt_embeds must be given unless guidance_scale is 1")
    steps = plan_steps(experts, solver, options, state.latents)
    check_reuse(steps, state)
    return _steps(steps, solver, state, conditioning, prompt, options)


@torch.no_grad()
def plan_steps(experts: Sequence[Expert], solver: Solver, options: Options, latents: Tensor) -> list[Step]:
    """What every step of a run is going to do; `latents` [B, C, T, h, w] are asked for their size only.

    Raises:
        ValueError: a timestep has no expert, or there is no such step cache.
    """
    chosen = [choose_expert(experts, timestep) for timestep in solver.timesteps]
    begin, end = (round(part * len(chosen)) for part in (options.guidance_start, options.guidance_end))
    guided = [expert.guidance_scale != 1 and begin <= number < end for number, expert in enumerate(chosen)]
    computed = [number >= options.zero_init_steps for number in range(len(chosen))]
    if options.step_cache is not None:
        computed = computed_steps(
            options.step_cache,
            torch.stack([_embedded(expert, t) for expert, t in zip(chosen, solver.timesteps, strict=True)]),
            latents.shape[3] * latents.shape[4] * _PIXELS_PER_LATENT,
            guided=any(guided),
            # also where guidance ends: a group of processes shares the tokens of a single branch in another way
            fresh=[n for n in range(1, len(chosen)) if chosen[n] is not chosen[n - 1] or guided[n] != guided[n - 1]],
            silent=options.zero_init_steps,
        )
    steps: list[Step] = []
    source: int | None = None
    for number, (timestep, expert) in enumerate(zip(solver.timesteps, chosen, strict=True)):
        if computed[number]:
            source = number
        steps.append(Step(number, timestep, expert, guided[number], source))
    return steps


def _embedded(expert: Expert, timestep: Tensor) -> Tensor:
    """[D], the time embedding."""
    embedding = expert.model.time_embedding
    device = next(embedding.parameters()).device
    rows: Tensor = embedding(sinusoid(timestep[None], expert.model.config.freq_dim).to(device))
    return rows[0]


def check_reuse(steps: Sequence[Step], state: SolverState) -> None:
    """Raises ValueError unless a run of these steps can have left `state`."""
    reuses = state.step < len(steps) and steps[state.step].reuses
    if reuses != (state.reused_latents is not None):
        raise ValueError(f"checkpoint reused_latents must be {'given' if reuses else 'absent'} after step {state.step}")


def choose_expert(experts: Sequence[Expert], timestep: Tensor) -> Expert:
    """The expert with the highest min_timestep that is not above `timestep`."""
    fitting = [expert for expert in experts if float(timestep) >= expert.min_timestep]
    if not fitting:
        raise ValueError(f"no expert is for timestep {float(timestep)}")
    return max(fitting, key=lambda expert: expert.min_timestep)


def _steps(
    steps: Sequence[Step],
    solver: Solver,
    state: SolverState,
    conditioning: Conditioning,
    prompt: Prompt,
    options: Options,
) -> Iterator[SolverState]:
    sources = {step.source for step in steps if step.reuses}
    residuals, reused_latents = Residuals(), state.reused_latents
    expert: Expert | None = None
    for step in steps[state.step :]:
        if expert is not step.expert:
            expert, branches = step.expert, _embed(step.expert, prompt)  # each expert has its own text embedding
        state = replace(state, latents=conditioning.with_known(state.latents))
        if step.reuses and not residuals:  # a checkpoint has not the residual, but what it was made of
            assert reused_latents is not None
            assert step.source is not None
            _velocity(steps[step.source], branches, conditioning, reused_latents, residuals, options)
        if step.number in sources:
            reused_latents = state.latents
        keeps = residuals if step.number in sources or step.reuses else None
        state = solver.step(state, _velocity(step, branches, conditioning, state.latents, keeps, options))
        if state.step < len(steps) and steps[state.step].reuses:
            state = replace(state, reused_latents=reused_latents)
        yield state


@torch.no_grad()
def _embed(expert: Expert, prompt: Prompt) -> _Branches:
    positive = expert.model.embed_context(prompt.prompt_embeds, prompt.image_embeds)
    if expert.guidance_scale == 1 or prompt.negative_prompt_embeds is None:
        return _Branches(positive, None)
    return _Branches(positive, expert.model.embed_context(prompt.negative_prompt_embeds, prompt.image_embeds))


@torch.no_grad()
def _velocity(
    step: Step,
    branches: _Branches,
    conditioning: Conditioning,
    latents: Tensor,
    residuals: Residuals | None,
    options: Options,
) -> Tensor:
    """The velocity that a step is taken with. residuals: where the blocks' part is kept or found; None: neither."""
    if step.source is None:
        return torch.zeros_like(latents)
    model, inputs = step.expert.model, _model_inputs(conditioning, latents, step.timestep)

    def velocity(branch: str, context: Context) -> Tensor:
        if residuals is None:
            predicted: Tensor = model(inputs.latents, inputs.timesteps, context, inputs.rope, inputs.pose_latents)
            return predicted
        if step.reuses:
            return residuals.reuse(branch, model, inputs)
        return residuals.compute(branch, model, inputs, context)

    context = branches.negative
    if context is None or not step.guided:
        return velocity("positive", branches.positive)
    positive, negative = model.team.both(
        lambda: velocity("positive", branches.positive), lambda: velocity("negative", context)
    )
    return guided_velocity(positive, negative, step.expert.guidance_scale, zero_star=options.cfg_zero_star)


def _model_inputs(conditioning: Conditioning, latents: Tensor, timestep: Tensor) -> ModelInputs:
    timesteps = conditioning.timesteps(timestep, latents)
    return ModelInputs(conditioning.model_input(latents), timesteps, conditioning.rope, conditioning.pose_latents)


def guided_velocity(positive: Tensor, negative: Tensor, guidance_scale: float, *, zero_star: bool = False) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): negative + scale * (positive - negative).

    zero_star: the negative velocity [B, ...] is first multiplied by <positive, negative> / |negative|^2 of each sample,
    with which it is nearest to the positive one (Fan et al. 2025, arXiv:2503.18886).
    """
    if zero_star:
        p, n = positive.flatten(1), negative.flatten(1)
        nearest = (p * n).sum(dim=1) / (n.square().sum(dim=1) + 1e-8)  # [B]
        negative = negative * nearest.view(-1, *[1] * (negative.dim() - 1))
    return negative + guidance_scale * (positive - negative)


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
