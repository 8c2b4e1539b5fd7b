"""The loop: guidance, experts, known frames, continuing, stopping."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.denoiser.conditioning import (
    Conditioning,
    first_frame_to_video,
    seeded_noise,
    text_to_video,
)
from services.denoiser.denoise import (
    Expert,
    Forwards,
    Options,
    choose_expert,
    denoise,
    guided_velocity,
    plan_steps,
    preview_rgb,
)
from services.denoiser.model import Context, DiffusionTransformer
from services.denoiser.sampling import SOLVERS, SolverState, make_solver
from services.denoiser.step_cache import STEP_CACHES, StepCache
from tests.services.denoiser.tiny import SCAIL, TEXT_TO_VIDEO, animation_of, normal, prompt, transformer

SIZE = (2, 4, 4)
NOISE = seeded_noise((1, 16, *SIZE), 7)
PLAIN = text_to_video(SIZE, TEXT_TO_VIDEO.head_dim)
PROMPT = prompt(TEXT_TO_VIDEO)


def contexts_seen(model: DiffusionTransformer) -> list[Context]:
    """The context of every later call of the model, in order."""
    seen: list[Context] = []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[2]))
    return seen


def final(
    experts: list[Expert],
    steps: int = 4,
    noise: Tensor = NOISE,
    conditioning: Conditioning = PLAIN,
    name: str = "unipc",
) -> Tensor:
    solver = make_solver(name, steps, shift=3.0)
    states = list(denoise(experts, solver, solver.start(noise), conditioning, PROMPT))
    assert [state.step for state in states] == list(range(1, steps + 1))
    return conditioning.result(states[-1].latents)


def test_same_seed_gives_same_latents() -> None:
    experts = [Expert(transformer(TEXT_TO_VIDEO), 4.0)]
    first = final(experts)
    assert torch.equal(first, final(experts, noise=seeded_noise((1, 16, *SIZE), 7)))
    assert not torch.allclose(first, final(experts, noise=seeded_noise((1, 16, *SIZE), 8)))


def test_guidance_of_one_runs_the_positive_branch_only() -> None:
    model = transformer(TEXT_TO_VIDEO)
    seen = contexts_seen(model)
    solver = make_solver("euler", 2, shift=1.0)
    positive_only = replace(PROMPT, negative_prompt_embeds=None)
    list(denoise([Expert(model, 1.0)], solver, solver.start(NOISE), PLAIN, positive_only))
    positive = model.embed_context(PROMPT.prompt_embeds).text
    assert len(seen) == 2
    assert all(torch.equal(context.text, positive) for context in seen)


def test_guidance_runs_positive_then_negative_and_goes_beyond_the_positive() -> None:
    model = transformer(TEXT_TO_VIDEO)
    seen = contexts_seen(model)
    solver = make_solver("euler", 1, shift=1.0)
    (state,) = denoise([Expert(model, 3.0)], solver, solver.start(NOISE), PLAIN, PROMPT)
    assert PROMPT.negative_prompt_embeds is not None
    positive, negative = (model.embed_context(e) for e in (PROMPT.prompt_embeds, PROMPT.negative_prompt_embeds))
    assert torch.equal(seen[0].text, positive.text)
    assert torch.equal(seen[1].text, negative.text)
    with torch.no_grad():
        towards, away = (model(NOISE, torch.tensor([1000.0]), context, PLAIN.rope) for context in (positive, negative))
    torch.testing.assert_close(state.latents, NOISE - (away + 3 * (towards - away)))


def test_context_is_embedded_once_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(TEXT_TO_VIDEO)
    calls = []
    model.text_embedding.register_forward_hook(lambda *_: calls.append(1))
    final([Expert(model, 3.0)], steps=5)
    assert len(calls) == 2


def test_experts_share_the_steps_at_the_boundary() -> None:
    high, low = transformer(TEXT_TO_VIDEO, seed=1), transformer(TEXT_TO_VIDEO, seed=2)
    seen_high, seen_low = contexts_seen(high), contexts_seen(low)
    solver = make_solver("unipc", 6, shift=3.0)
    boundary = int(solver.timesteps[2])  # the step at the boundary itself is still the high expert's
    list(denoise([Expert(low, 1.0), Expert(high, 2.0, boundary)], solver, solver.start(NOISE), PLAIN, PROMPT))
    assert (len(seen_high), len(seen_low)) == (3 * 2, 3)
    assert torch.equal(seen_low[0].text, low.embed_context(PROMPT.prompt_embeds).text)  # not the other's embedding
    assert torch.equal(seen_high[0].text, high.embed_context(PROMPT.prompt_embeds).text)


def test_timestep_without_an_expert_is_refused_before_the_first_step() -> None:
    model = transformer(TEXT_TO_VIDEO)
    solver = make_solver("unipc", 4, shift=1.0)
    with pytest.raises(ValueError, match=r"no expert is for timestep 749\.0"):
        denoise([Expert(model, 1.0, 875.0)], solver, solver.start(NOISE), PLAIN, PROMPT)
    assert choose_expert([Expert(model, 1.0, 875.0)], torch.tensor(875)).min_timestep == 875


def test_state_of_another_solver_is_refused_before_the_first_step() -> None:
    experts, euler = [Expert(transformer(TEXT_TO_VIDEO), 1.0)], make_solver("euler", 4, shift=1.0)
    state = next(denoise(experts, euler, euler.start(NOISE), PLAIN, PROMPT))
    with pytest.raises(ValueError, match="history is not that of unipc after step 1"):
        denoise(experts, make_solver("unipc", 4, shift=1.0), state, PLAIN, PROMPT)


def test_guidance_without_a_negative_prompt_is_refused() -> None:
    solver = make_solver("unipc", 4, shift=1.0)
    positive_only = replace(PROMPT, negative_prompt_embeds=None)
    with pytest.raises(ValueError, match="negative_prompt_embeds must be given unless guidance_scale is 1"):
        denoise([Expert(transformer(TEXT_TO_VIDEO), 5.0)], solver, solver.start(NOISE), PLAIN, positive_only)


@pytest.mark.parametrize("name", SOLVERS)
def test_run_continued_from_stored_tensors_is_bit_identical(name: str) -> None:
    experts = [Expert(transformer(SCAIL), 2.0)]
    conditioning, embeds = animation_of(), prompt(SCAIL)
    solver = make_solver(name, 4, shift=3.0)
    start = solver.start(seeded_noise((1, 16, 3, 8, 8), 1))
    states = list(denoise(experts, solver, start, conditioning, embeds))
    for stored in states:
        continued = SolverState.from_tensors(*stored.to_tensors())
        rest = list(denoise(experts, make_solver(name, 4, shift=3.0), continued, conditioning, embeds))
        assert [state.step for state in rest] == list(range(stored.step + 1, 5))
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, states[stored.step :], strict=True))


def block_runs(model: DiffusionTransformer) -> list[int]:
    """Grows by one for every later run of the stack of blocks."""
    runs: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    return runs


def calm() -> DiffusionTransformer:
    """With a time embedding that changes little from step to step, as that of a trained model does."""
    model = transformer(SCAIL)
    with torch.no_grad():
        model.get_submodule("time_embedding.2").weight.mul_(0.05)  # type: ignore[operator]  # a tensor
    return model


def scail_states(
    options: Options, steps: int = 8, guidance_scale: float = 2.0, name: str = "unipc"
) -> tuple[list[SolverState], Forwards, int]:
    """A run's states, what it was planned to compute, and how often the blocks did run."""
    experts = [Expert(calm(), guidance_scale)]
    solver = make_solver(name, steps, shift=3.0)
    start = solver.start(seeded_noise((1, 16, 3, 8, 8), 1))
    planned = Forwards.of(plan_steps(experts, solver, options, start.latents))
    runs = block_runs(experts[0].model)
    states = list(denoise(experts, solver, start, animation_of(), prompt(SCAIL), options))
    return states, planned, len(runs)


@pytest.mark.parametrize("method", STEP_CACHES)
def test_step_cache_runs_the_blocks_for_the_computed_steps_only(method: str) -> None:
    states, planned, runs = scail_states(Options(step_cache=StepCache(method, 2.0)))
    full, all_computed, all_runs = scail_states(Options())
    assert (all_computed, all_runs) == (Forwards(16, 0, 0), 16)
    assert (planned.computed, planned.reused, planned.omitted) == (runs, 16 - runs, 0)
    assert 6 <= runs <= 10
    assert not torch.equal(states[-1].latents, full[-1].latents)
    # so small a model changes little from step to step
    torch.testing.assert_close(states[-1].latents, full[-1].latents, rtol=0, atol=0.2)


@pytest.mark.parametrize("method", STEP_CACHES)
@pytest.mark.parametrize("name", SOLVERS)
def test_run_with_a_step_cache_continued_from_stored_tensors_is_bit_identical(name: str, method: str) -> None:
    options = Options(guidance_start=0.25, guidance_end=0.8, step_cache=StepCache(method, 2.0))
    experts = [Expert(calm(), 2.0)]
    solver = make_solver(name, 8, shift=3.0)
    start = solver.start(seeded_noise((1, 16, 3, 8, 8), 1))
    states = list(denoise(experts, solver, start, animation_of(), prompt(SCAIL), options))
    assert any(state.reused_latents is not None for state in states)
    for stored in states:
        continued = SolverState.from_tensors(*stored.to_tensors())
        rest = list(denoise(experts, solver, continued, animation_of(), prompt(SCAIL), options))
        assert len(rest) == 8 - stored.step
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, states[stored.step :], strict=True))


def test_only_a_state_before_a_reused_step_has_the_latents_that_it_needs() -> None:
    options = Options(step_cache=StepCache("mag", 2.0))
    states, _, _ = scail_states(options)
    experts, solver = [Expert(transformer(SCAIL), 2.0)], make_solver("unipc", 8, shift=3.0)
    steps = plan_steps(experts, solver, options, states[0].latents)
    assert [state.reused_latents is not None for state in states] == [step.reuses for step in steps[1:]] + [False]
    known = animation_of()
    first = known.with_known(solver.start(seeded_noise((1, 16, 3, 8, 8), 1)).latents)
    assert states[0].reused_latents is not None
    assert torch.equal(states[0].reused_latents, first)
    for state in (states[0], states[-2]):
        wrong = replace(state, reused_latents=None if state.reused_latents is not None else state.latents)
        with pytest.raises(ValueError, match=r"checkpoint reused_latents must be (given|absent) after step"):
            denoise(experts, solver, wrong, known, prompt(SCAIL), options)


def test_guidance_runs_the_second_branch_between_its_ends_only() -> None:
    model = transformer(TEXT_TO_VIDEO)
    assert PROMPT.negative_prompt_embeds is not None
    negative = model.embed_context(PROMPT.negative_prompt_embeds).text
    seen = contexts_seen(model)
    experts, solver = [Expert(model, 3.0)], make_solver("euler", 10, shift=1.0)
    options = Options(guidance_start=0.2, guidance_end=0.7)
    list(denoise(experts, solver, solver.start(NOISE), PLAIN, PROMPT, options))
    branches = ["negative" if torch.equal(context.text, negative) else "positive" for context in seen]
    assert branches == ["positive"] * 2 + ["positive", "negative"] * 5 + ["positive"] * 3
    assert Forwards.of(plan_steps(experts, solver, options, NOISE)) == Forwards(15, 0, 5)


def test_a_branch_that_begins_late_is_computed_first_though_the_other_could_be_reused() -> None:
    experts, solver = [Expert(transformer(SCAIL), 2.0)], make_solver("unipc", 12, shift=3.0)
    cache = StepCache("mag", 2.0)
    noise = normal(1, 16, 3, 8, 8)
    reused = [step.number for step in plan_steps(experts, solver, Options(step_cache=cache), noise) if step.reuses]
    begin = reused[2]
    steps = plan_steps(experts, solver, Options(guidance_start=begin / 12, step_cache=cache), noise)
    assert [step.guided for step in steps] == [number >= begin for number in range(12)]
    assert not steps[begin].reuses
    # nor where guidance ends: of two processes with a branch each one has no residual of the other's
    steps = plan_steps(experts, solver, Options(guidance_end=begin / 12, step_cache=cache), noise)
    assert [step.guided for step in steps] == [number < begin for number in range(12)]
    assert not steps[begin].reuses


def test_another_expert_finds_no_residual_of_the_one_before() -> None:
    high, low = transformer(TEXT_TO_VIDEO, seed=1), transformer(TEXT_TO_VIDEO, seed=2)
    solver = make_solver("unipc", 12, shift=3.0)
    options = Options(step_cache=StepCache("mag", 2.0))
    one = plan_steps([Expert(high, 2.0)], solver, options, NOISE)
    change = next(step.number for step in one[3:] if step.reuses)
    experts = [Expert(low, 1.0), Expert(high, 2.0, float(solver.timesteps[change - 1]))]
    assert not plan_steps(experts, solver, options, NOISE)[change].reuses
    runs = block_runs(high), block_runs(low)
    list(denoise(experts, solver, solver.start(NOISE), PLAIN, PROMPT, options))
    assert len(runs[0]) + len(runs[1]) == Forwards.of(plan_steps(experts, solver, options, NOISE)).computed


def test_cfg_zero_star_scales_the_negative_to_the_positive_of_each_sample() -> None:
    positive = torch.tensor([[2.0, 1.0], [1.0, 0.0]]).view(2, 1, 1, 1, 2)
    negative = torch.tensor([[1.0, 0.0], [0.0, 4.0]]).view(2, 1, 1, 1, 2)
    # <p, n> / |n|^2 is 2 of the first sample, 0 of the second: 2n + 3 (p - 2n), and 3 p
    expected = torch.tensor([[2.0, 3.0], [3.0, 0.0]]).view(2, 1, 1, 1, 2)
    torch.testing.assert_close(guided_velocity(positive, negative, 3.0, zero_star=True), expected)
    assert torch.equal(guided_velocity(positive, negative, 3.0), negative + 3 * (positive - negative))
    assert guided_velocity(positive, torch.zeros_like(negative), 3.0, zero_star=True).isfinite().all()
    plain, star = (scail_states(Options(cfg_zero_star=on), steps=2)[0][-1].latents for on in (False, True))
    assert not torch.allclose(plain, star)


def test_zero_init_takes_the_first_steps_without_the_model() -> None:
    model = transformer(TEXT_TO_VIDEO)
    runs = block_runs(model)
    solver = make_solver("euler", 5, shift=1.0)
    options = Options(zero_init_steps=2)
    states = list(denoise([Expert(model, 3.0)], solver, solver.start(NOISE), PLAIN, PROMPT, options))
    assert len(runs) == 6
    assert torch.equal(states[1].latents, NOISE)
    assert not torch.equal(states[2].latents, NOISE)
    assert Forwards.of(plan_steps([Expert(model, 3.0)], solver, options, NOISE)) == Forwards(6, 0, 4)


def test_model_always_sees_the_reference_clean() -> None:
    model, conditioning = transformer(SCAIL), animation_of()
    assert conditioning.known is not None
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][:, :16, :1]))
    solver = make_solver("unipc", 3, shift=3.0)
    states = list(
        denoise([Expert(model, 1.0)], solver, solver.start(normal(1, 16, 3, 8, 8)), conditioning, prompt(SCAIL))
    )
    assert len(seen) == 3
    assert all(torch.equal(frame, conditioning.known) for frame in seen)
    assert conditioning.result(states[-1].latents).shape == (1, 16, 2, 8, 8)


def test_given_first_frame_comes_out_as_it_went_in() -> None:
    first_frame = normal(1, 16, 1, 4, 4, seed=3)
    conditioning = first_frame_to_video(first_frame, SIZE, TEXT_TO_VIDEO.head_dim)
    latents = final([Expert(transformer(TEXT_TO_VIDEO), 1.0)], conditioning=conditioning)
    assert torch.equal(latents[:, :, :1], first_frame)
    assert latents.shape == NOISE.shape


def test_consumer_may_stop_after_any_step() -> None:
    model = transformer(TEXT_TO_VIDEO)
    seen = contexts_seen(model)
    solver = make_solver("unipc", 5, shift=1.0)
    states = denoise([Expert(model, 1.0)], solver, solver.start(NOISE), PLAIN, PROMPT)
    next(states)
    states.close()  # type: ignore[attr-defined]  # a generator behind the Iterator
    assert len(seen) == 1


def test_preview_is_a_picture_per_latent_frame() -> None:
    picture = preview_rgb(normal(1, 16, 3, 4, 5))
    assert (picture.shape, picture.dtype) == ((3, 4, 5, 3), torch.uint8)
    assert 100 < float(picture.float().mean()) < 155
    assert bool((preview_rgb(torch.zeros(1, 48, 1, 2, 2)) == 128).all())


def test_preview_takes_the_factors_of_a_bundle() -> None:
    latents = torch.zeros(1, 2, 1, 1, 2)
    latents[0, 1, 0, 0, 1] = 2.0
    factors, bias = torch.tensor([[9.0, 9.0, 9.0], [0.1, 0.2, -5.0]]), torch.tensor([0.2, 0.6, 1.0])
    assert preview_rgb(latents, factors, bias)[0, 0].tolist() == [[51, 153, 255], [102, 255, 0]]
