"""Plans for a number of bytes: within it, the best there is, or refused with the numbers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.model import PRESETS, DiffusionTransformer
from services.denoiser.placement import Placement
from services.denoiser.plan import (
    DEVICE_OVERHEAD_BYTES,
    GIB,
    DoesNotFit,
    Weights,
    activations,
    animation_tokens,
    plan_memory,
)

SCAIL = PRESETS["scail-14b"]
MIB = 1024**2
# SCAIL 14B in int8: 299 MB a block, 105 MB of the context, the timestep's projection 629 MB
WEIGHTS = Weights(
    block=285 * MIB, context=100 * MIB, context_linear=25 * MIB, rest=12 * MIB, on_demand=600 * MIB, num_blocks=40
)
LONGEST = animation_tokens(512, 896, 81)


def test_tokens_of_an_animation_are_those_of_the_sheet() -> None:
    assert LONGEST == 48832
    assert animation_tokens(480, 832, 81) == 42510


def test_without_a_budget_everything_stays() -> None:
    plan = plan_memory(WEIGHTS, SCAIL, LONGEST, None)
    assert (plan.resident, plan.tokens_at_once, plan.streamed_bytes) == (40, 0, 0)


def test_four_gib_stream_every_block_of_scail() -> None:
    plan = plan_memory(WEIGHTS, SCAIL, LONGEST, 4 * GIB)
    assert plan.device_bytes <= 4 * GIB
    assert plan.resident < 4
    assert 0 < plan.tokens_at_once <= 4096
    assert plan.streamed_bytes > 36 * WEIGHTS.block


def test_pieces_come_before_streaming() -> None:
    whole = plan_memory(WEIGHTS, SCAIL, LONGEST, None).device_bytes
    plan = plan_memory(WEIGHTS, SCAIL, LONGEST, whole)
    assert plan.resident == 40
    assert plan.tokens_at_once == 4096


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(DoesNotFit, match=r"48832 tokens need \d\.\d\d GiB .* the budget is 2\.00 GiB"):
        plan_memory(WEIGHTS, SCAIL, LONGEST, 2 * GIB)


@given(st.integers(2 * GIB, 40 * GIB), st.sampled_from([1560, 14040, LONGEST]))
def test_plans_keep_within_the_budget_and_use_more_where_there_is_more(budget: int, tokens: int) -> None:
    try:
        plan = plan_memory(WEIGHTS, SCAIL, tokens, budget)
    except DoesNotFit:
        return
    assert plan.device_bytes <= budget
    more = plan_memory(WEIGHTS, SCAIL, tokens, budget + GIB)
    assert more.resident >= plan.resident
    assert 0 <= plan.resident <= 40


def test_a_step_cache_takes_two_bytes_a_value_of_each_branch() -> None:
    without = plan_memory(WEIGHTS, SCAIL, LONGEST, None).device_bytes
    one, two = (plan_memory(WEIGHTS, SCAIL, LONGEST, None, branches).device_bytes for branches in (1, 2))
    assert one - without == two - one == LONGEST * 5120 * 2


def test_a_step_cache_leaves_less_room_for_blocks_and_none_where_it_was_short() -> None:
    assert (
        plan_memory(WEIGHTS, SCAIL, LONGEST, 8 * GIB, 2).resident
        < plan_memory(WEIGHTS, SCAIL, LONGEST, 8 * GIB).resident
    )
    assert plan_memory(WEIGHTS, SCAIL, LONGEST, 4 * GIB).resident < 4
    with pytest.raises(DoesNotFit, match=r"the budget is 4\.00 GiB"):
        plan_memory(WEIGHTS, SCAIL, LONGEST, 4 * GIB, 2)


def test_a_step_cache_embeds_the_tokens_once_more_beside_the_residual_stream() -> None:
    # with the shortest pieces three float32 streams are more than a block needs
    assert activations(SCAIL, LONGEST, 512, 2) > activations(SCAIL, LONGEST, 512)
    assert activations(SCAIL, LONGEST, 512, 2) >= LONGEST * 5120 * 4 * 3
    assert activations(SCAIL, LONGEST, LONGEST, 2) == activations(SCAIL, LONGEST, LONGEST)


def test_a_request_is_refused_where_the_pieces_that_were_planned_are_too_long() -> None:
    whole = plan_memory(WEIGHTS, SCAIL, LONGEST, None).device_bytes + DEVICE_OVERHEAD_BYTES
    plan = plan_memory(WEIGHTS, SCAIL, LONGEST, whole)
    assert (plan.resident, plan.tokens_at_once) == (40, 0)
    model = DiffusionTransformer.__new__(DiffusionTransformer)
    object.__setattr__(model, "config", SCAIL)
    placed = Placement(model, WEIGHTS, plan, whole)
    placed.check(LONGEST)
    with pytest.raises(
        DoesNotFit, match="48832 tokens with a step cache fit 4096 at once where 48832 would be computed"
    ):
        placed.check(LONGEST, 2)
    placed.check(LONGEST // 2, 2)


def test_a_model_without_images_keeps_fewer_keys() -> None:
    plain = replace(SCAIL, image_dim=None)
    assert (
        plan_memory(WEIGHTS, plain, LONGEST, 8 * GIB).host_bytes
        < plan_memory(WEIGHTS, SCAIL, LONGEST, 8 * GIB).host_bytes
    )
