"""Plans for a number of bytes: within it, the best there is, or refused with the numbers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.budget import DoesNotFit
from services.denoiser.model import PRESETS, DiffusionTransformer
from services.denoiser.placement import Placement
from services.denoiser.plan import (
    GIB,
    Weights,
    activations,
    animation_tokens,
    context_keys,
    plan_memory,
)

SCAIL = PRESETS["scail-14b"]
MIB = 1024**2
# SCAIL 14B in int8: 299 MB a block, 105 MB of the context, the timestep's projection 629 MB
WEIGHTS = Weights(
    block=286 * MIB,
    context=100 * MIB,
    context_linear=125 * MIB,
    rest=5 * MIB,
    on_demand=600 * MIB,
    on_demand_together=811 * MIB,
    each_step=705 * MIB,
    dequantised=0,
    num_blocks=40,
    is_fused=True,
)
EXACT = replace(WEIGHTS, dequantised=270 * MIB, is_fused=False)
LONGEST = animation_tokens(512, 896, 81)


def test_tokens_of_an_animation_are_those_of_the_sheet() -> None:
    assert LONGEST == 48832
    assert animation_tokens(480, 832, 81) == 42510


def test_without_a_budget_everything_stays() -> None:
    plan = plan_memory(WEIGHTS, SCAIL, LONGEST, None)
    assert (plan.resident, plan.is_whole, plan.tokens_at_once, plan.streamed_bytes) == (40, True, 0, 0)


def test_four_gib_stream_every_block_of_scail() -> None:
    plan = plan_memory(WEIGHTS, SCAIL, LONGEST, 4 * GIB)
    assert plan.device_bytes <= 4 * GIB
    assert plan.resident < 4
    assert plan.tokens_at_once == 2432
    assert plan.streamed_bytes > 36 * WEIGHTS.block


def test_sixteen_gib_hold_every_block_but_not_what_computes_once_per_request() -> None:
    plan = plan_memory(WEIGHTS, SCAIL, LONGEST, 16 * GIB)
    assert (plan.resident, plan.is_whole) == (40, False)
    assert plan.device_bytes <= 15.5 * GIB
    assert plan.host_bytes > 40 * WEIGHTS.context
    # in each pass, still: the timestep's embedding, and the keys and values of the context
    assert plan.streamed_bytes == WEIGHTS.each_step + 40 * context_keys(SCAIL)


def test_what_is_dequantised_or_not_fused_needs_more() -> None:
    with pytest.raises(DoesNotFit, match=r"need 4\.2\d GiB"):
        plan_memory(EXACT, SCAIL, LONGEST, 4 * GIB)
    for budget in (None, 8 * GIB):
        fused, exact = (plan_memory(weights, SCAIL, LONGEST, budget) for weights in (WEIGHTS, EXACT))
        assert exact.device_bytes - exact.resident * EXACT.block > fused.device_bytes - fused.resident * WEIGHTS.block


def test_the_keys_of_both_branches_stay_on_the_device_where_everything_does() -> None:
    without = replace(SCAIL, image_dim=None)
    fewer, all_keys = (plan_memory(WEIGHTS, config, LONGEST, None).device_bytes for config in (without, SCAIL))
    assert all_keys - fewer == 2 * 40 * 257 * 5120 * 2 * 2


def test_pieces_come_before_streaming() -> None:
    whole = plan_memory(WEIGHTS, SCAIL, LONGEST, None).device_bytes
    plan = plan_memory(WEIGHTS, SCAIL, LONGEST, whole)
    assert (plan.resident, plan.is_whole, plan.tokens_at_once) == (40, True, 0)
    less = plan_memory(WEIGHTS, SCAIL, LONGEST, whole - 1)
    assert (less.resident, less.is_whole, less.tokens_at_once) == (40, True, 16896)


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
    # where the least fits, longer pieces are worth more than a block
    assert more.resident >= plan.resident or more.tokens_at_once > plan.tokens_at_once
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
    assert activations(WEIGHTS, SCAIL, LONGEST, 768, 2) > activations(WEIGHTS, SCAIL, LONGEST, 768)
    assert activations(WEIGHTS, SCAIL, LONGEST, 768, 2) >= LONGEST * 5120 * 4 * 3
    assert activations(WEIGHTS, SCAIL, LONGEST, LONGEST, 2) == activations(WEIGHTS, SCAIL, LONGEST, LONGEST)


def test_a_request_is_refused_where_the_pieces_that_were_planned_are_too_long() -> None:
    whole = plan_memory(WEIGHTS, SCAIL, LONGEST, None).device_bytes
    plan = plan_memory(WEIGHTS, SCAIL, LONGEST, whole)
    assert (plan.is_whole, plan.tokens_at_once) == (True, 0)
    model = DiffusionTransformer.__new__(DiffusionTransformer)
    object.__setattr__(model, "config", SCAIL)
    placed = Placement(model, WEIGHTS, plan, whole)
    placed.check(LONGEST)
    with pytest.raises(
        DoesNotFit, match="48832 tokens with a step cache fit 16896 at once where 48832 would be computed"
    ):
        placed.check(LONGEST, 2)
    placed.check(LONGEST // 2, 2)
    tight = Placement(model, WEIGHTS, plan, 15 * GIB)
    with pytest.raises(DoesNotFit, match=r"leave room for 3\d blocks on the device where all weights were placed"):
        tight.check(LONGEST)


def test_a_model_without_images_keeps_fewer_keys() -> None:
    plain = replace(SCAIL, image_dim=None)
    assert (
        plan_memory(WEIGHTS, plain, LONGEST, 8 * GIB).host_bytes
        < plan_memory(WEIGHTS, SCAIL, LONGEST, 8 * GIB).host_bytes
    )


def test_blocks_that_end_up_on_the_device_need_room_in_host_memory_first() -> None:
    blocks = 40 * (WEIGHTS.block + WEIGHTS.context) + WEIGHTS.on_demand_together
    few, most = (plan_memory(WEIGHTS, SCAIL, LONGEST, size * GIB) for size in (12, 80))
    assert few.host_bytes < few.most_host_bytes == blocks
    assert most.is_whole
    assert most.most_host_bytes == blocks
    assert plan_memory(WEIGHTS, SCAIL, LONGEST, None).most_host_bytes == 0
