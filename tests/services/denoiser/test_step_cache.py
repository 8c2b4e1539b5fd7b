"""Which steps TeaCache and MagCache compute, by hand-computed numbers of the reference sheet; residuals of the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from services.denoiser import step_cache
from services.denoiser.chunking import run_in_pieces
from services.denoiser.step_cache import (
    MAG,
    STEP_CACHES,
    TEA,
    ModelInputs,
    Residuals,
    StepCache,
    computed_steps,
    mag_ratios,
    mag_steps,
    nearest_to,
    tea_changes,
    tea_steps,
)
from tests.services.denoiser.tiny import SCAIL, animation_of, normal, prompt, transformer

SMALL, LARGE = 1280 * 720 - 1, 1280 * 720


def schedule(method: str, steps: int, speedup: float, **changes: object) -> list[bool]:
    """Of time embeddings that change more and more, as those of a shifted schedule do."""
    angles = torch.linspace(0, 1, steps).square()[:, None] * torch.linspace(0.5, 2, 8)
    arguments: dict[str, object] = {"guided": True, "fresh": [], **changes}
    start = float(str(arguments.pop("start", 0.0)))
    return computed_steps(StepCache(method, speedup, start), angles.cos() + 2, SMALL, **arguments)  # type: ignore[arg-type]  # passed on


def runs_of_false(computed: list[bool]) -> int:
    """The longest run of steps that are not computed."""
    return max(map(len, "".join("x" if step else "-" for step in computed).split("x")))


def test_change_of_the_time_embedding_goes_through_the_polynomial() -> None:
    embeddings = torch.tensor([[1.0, 1.0], [1.1, 0.9], [1.08, 0.88]])  # changes by 10 %, then by 2 %
    # -302.33167 * 1e-4 + 223.948934 * 1e-3 - 52.546397 * 1e-2 + 5.8734844 * 0.1 - 0.201973289 = 0.0536269, and so on
    assert tea_changes(embeddings, SMALL) == pytest.approx([0, 0.0536269, 0.1037789], abs=1e-5)
    assert tea_changes(embeddings[:2], LARGE) == pytest.approx([0, 0.1229981], abs=1e-5)


def test_a_step_is_computed_where_the_changes_add_up_to_the_threshold() -> None:
    assert tea_steps([0, 0.1, 0.1, 0.1, 0.1], {0}, 0.2) == [True, False, True, False, True]
    assert tea_steps([0, 0.1, 0.1, 0.1, 0.1], {0}, 0.21) == [True, False, False, True, False]
    # a step that is computed anyway begins a new sum
    assert tea_steps([0, 0.1, 0.1, 0.1, 0.1], {0, 1}, 0.2) == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("pixels", "steps", "step", "pair"),
    [
        (SMALL, 40, 0, (1.0, 1.0)),
        (SMALL, 40, 1, (0.98783, 0.98993)),
        (SMALL, 40, 39, (0.92617, 0.92616)),
        (SMALL, 20, 1, (0.97559, 0.97593)),  # round(39 / 19) is step 2 of 40
        (SMALL, 20, 10, (0.98543, 0.98544)),  # round(20.53) is step 21
        (LARGE, 40, 1, (0.99428, 0.99498)),
        (LARGE, 40, 39, (0.8679, 0.86768)),
        (SMALL, 1, 0, (0.92617, 0.92616)),
    ],
)
def test_ratios_are_those_of_the_nearest_of_forty_steps(
    pixels: int, steps: int, step: int, pair: tuple[float, float]
) -> None:
    ratios = mag_ratios(steps, pixels)
    assert ratios.shape == (steps, 2)
    assert tuple(ratios[step]) == pair


def test_a_step_is_computed_where_the_error_of_the_residual_would_exceed_the_threshold() -> None:
    # sizes 0.9, 0.81, 0.729: errors add up to 0.1, 0.29, 0.561
    ratios = np.full((6, 1), 0.9)
    assert mag_steps(ratios, {0}, 0.3) == [True, False, False, True, False, False]
    assert mag_steps(ratios, {0}, 0.28) == [True, False, True, False, True, False]
    assert mag_steps(ratios, {0}, 0.09) == [True] * 6


def test_at_most_two_steps_in_a_row_reuse_a_residual() -> None:
    assert mag_steps(np.ones((7, 1)), {0}, 0.6) == [True, False, False, True, False, False, True]


def test_both_branches_are_computed_where_one_has_to_be() -> None:
    ratios = np.array([[1.0, 1.0], [1.0, 0.8], [1.0, 1.0]])
    assert mag_steps(ratios, {0}, 0.15) == [True, True, False]
    assert mag_steps(ratios[:, :1], {0}, 0.15) == [True, False, False]


def test_threshold_is_the_lowest_that_comes_nearest_to_the_target() -> None:
    asked: list[float] = []

    def steps_at(threshold: float) -> list[bool]:
        asked.append(threshold)
        return [True] * (6 if threshold < 0.1 else 4 if threshold < 0.2 else 3)

    assert sum(nearest_to(4, steps_at)) == 4
    assert sum(nearest_to(5, steps_at)) == 6  # as near as 4, and computes more
    assert asked[:60] == [hundredths / 100 for hundredths in range(1, 61)]


@pytest.mark.parametrize("method", STEP_CACHES)
@pytest.mark.parametrize(("speedup", "target"), [(1.5, 20), (1.75, 17), (2.0, 15), (2.5, 12)])
def test_speedup_sets_how_many_steps_are_computed(method: str, speedup: float, target: int) -> None:
    computed = schedule(method, 30, speedup)
    assert len(computed) == 30
    assert abs(sum(computed) - target) <= 1
    assert computed[0]
    assert runs_of_false(computed) <= (2 if method == MAG else 30)


def test_tea_cache_always_computes_the_last_step() -> None:
    assert all(schedule(TEA, steps, 2.5)[-1] for steps in range(4, 30))
    assert not all(schedule(MAG, steps, 2.5)[-1] for steps in range(4, 30))


@pytest.mark.parametrize("method", STEP_CACHES)
def test_some_steps_are_computed_in_any_case(method: str) -> None:
    assert all(schedule(method, 30, 2.5, start=0.2)[:7])  # int(0.2 * 30) = 6, and step 6 itself
    assert not all(schedule(method, 30, 2.5, start=0.2)[:8])
    plain = schedule(method, 30, 2.5)
    reused = [step for step, computed in enumerate(plain) if not computed]
    assert all(schedule(method, 30, 2.5, fresh=reused[3:6])[step] for step in reused[3:6])


@pytest.mark.parametrize("method", STEP_CACHES)
def test_silent_steps_are_not_asked_and_the_one_after_them_is_computed(method: str) -> None:
    computed = schedule(method, 30, 2.0, silent=6)
    assert computed[:7] == [False] * 6 + [True]
    assert abs(sum(computed) - 12) <= 1  # half of the 24 that are asked


def test_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="step_cache must be one of tea, mag, got none"):
        schedule("none", 4, 2.0)


def inputs(seed: int = 0) -> ModelInputs:
    conditioning = animation_of()
    latents = conditioning.model_input(normal(1, 16, 3, 8, 8, seed=seed))
    return ModelInputs(latents, torch.tensor([500]), conditioning.rope, conditioning.pose_latents)


def velocity(residuals: Residuals | None, given: ModelInputs, pieces: int = 0, reuse: bool = False) -> Tensor:
    model, embeds = transformer(SCAIL), prompt(SCAIL)
    if pieces:
        run_in_pieces(model, pieces)
    with torch.no_grad():
        context = model.embed_context(embeds.prompt_embeds, embeds.image_embeds)
        if residuals is None:
            plain: Tensor = model(given.latents, given.timesteps, context, given.rope, given.pose_latents)
            return plain
        if reuse:
            return residuals.reuse("positive", model, given)
        return residuals.compute("positive", model, given, context)


@pytest.mark.parametrize("pieces", [0, 7])
def test_a_computed_step_has_the_bits_of_the_model_and_its_residual_gives_them_again(pieces: int) -> None:
    residuals = Residuals()
    assert not residuals
    computed = velocity(residuals, inputs(), pieces)
    assert residuals
    assert torch.equal(computed, velocity(None, inputs(), pieces))
    # the residual is rounded to bfloat16
    torch.testing.assert_close(velocity(residuals, inputs(), pieces, reuse=True), computed, rtol=0, atol=0.02)


def test_a_reused_step_sees_its_own_tokens_but_not_the_blocks() -> None:
    residuals = Residuals()
    velocity(residuals, inputs(seed=0))
    other = velocity(residuals, inputs(seed=1), reuse=True)
    assert not torch.allclose(other, velocity(residuals, inputs(seed=0), reuse=True), atol=0.05)
    model = transformer(SCAIL)
    for block in model.blocks:
        block.register_forward_hook(lambda *_: pytest.fail("a block ran"))
    with torch.no_grad():
        residuals.reuse("positive", model, inputs())


def test_residuals_are_kept_in_half_of_the_streams_bytes() -> None:
    residuals = Residuals()
    velocity(residuals, inputs())
    [kept] = residuals._kept.values()
    assert kept.dtype == step_cache.RESIDUAL_DTYPE == torch.bfloat16
    assert kept.shape == (1, 3 * 16 + 2 * 4, SCAIL.dim)
