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
from services.denoiser.denoise import Expert, choose_expert, denoise, preview_rgb
from services.denoiser.model import Context, DiffusionTransformer
from services.denoiser.sampling import SOLVERS, SolverState, make_solver
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
