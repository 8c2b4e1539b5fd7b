"""Plans: counted right, within the budget, no more tiles than needed, refused with the numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.alive import Alive
from runtime.budget import DoesNotFit
from services.vae import plan
from services.vae.channels_last import walk_channels_last
from services.vae.hosting import HostedPast
from services.vae.model import PRESETS, Grid, Vae
from services.vae.plan import GIB, WHOLE, Direction, Machine, Tiling, plan_tiles, weight_bytes
from tests.services.vae.test_model import CONFIGS

H100 = Machine(PRESETS["wan2.1"], torch.float16, "cuda", is_fused=True)
SMALL = Machine(CONFIGS["flat"], torch.float16, "cuda", is_fused=True)
DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")
directions = pytest.mark.parametrize("direction", DIRECTIONS)


def fits(machine: Machine, direction: Direction, height: int, width: int, gibibytes: float, clips: int = 1) -> Tiling:
    return plan_tiles(machine, direction, height, width, int(gibibytes * GIB), clips)


@directions
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "tiling",
    [
        WHOLE,
        replace(WHOLE, grid=Grid(1, 3)),
        replace(WHOLE, is_hosted=True),
        replace(WHOLE, grid=Grid(1, 3), is_hosted=True),
        replace(WHOLE, frames_at_once=4),
    ],
    ids=str,
)
def test_count_without_numbers_is_that_of_a_real_pass(kind: str, tiling: Tiling, direction: Direction) -> None:
    machine = Machine(CONFIGS[kind], torch.float32, "cpu", is_fused=False)
    counted = plan._counted(machine, direction, 128, 192, tiling)
    vae, past = Vae(CONFIGS[kind]).requires_grad_(False), tiling.past()
    walk_channels_last(vae)
    past.at_start = False
    with torch.inference_mode(), plan._AttentionInPlace(), Alive() as alive:
        for _ in range(2):
            plan._pass(vae, direction, 128, 192, past)
    hosted = sum(frames.nbytes for frames in past.hosted()) if isinstance(past, HostedPast) else 0
    assert (hosted > 0) == tiling.is_hosted
    assert counted.host_bytes == hosted
    assert counted.device_bytes == pytest.approx((alive.most - hosted) * 1.1, rel=1e-5)  # constants that are moved
    kept = sum(frames.nbytes for frames in past.frames.values())
    kept += sum(frames.nbytes for part in past._parts.values() for frames in part.frames.values())
    assert 0 < kept + hosted <= alive.now < alive.most


def test_figures_of_the_released_vae() -> None:
    """These are in docs/operations.md: whoever changes them changes what fits where."""
    found = {
        direction: round(fits(H100, direction, 480, 832, 80).device_bytes / GIB, 1)
        for direction in ("encode", "decode")
    }
    assert found == {"encode": 2.8, "decode": 3.5}
    assert round(weight_bytes(PRESETS["wan2.1"], torch.float16) / 1e6) == 254


@directions
def test_frames_are_whole_where_they_fit(direction: Direction) -> None:
    tiling = fits(H100, direction, 480, 832, 80)
    assert (tiling.grid, tiling.is_hosted, tiling.host_bytes) == (Grid(1, 1), False, 0)
    assert str(tiling) == "whole frames"
    assert WHOLE.past().grid == Grid(1, 1)


def test_less_memory_takes_fewer_frames_at_a_time_then_tiles_and_then_the_host() -> None:
    kinds = list(dict.fromkeys(str(fits(H100, "decode", 480, 832, tenths / 10)) for tenths in range(60, 19, -1)))
    assert kinds == [
        "whole frames",
        "whole frames, 2 at a time",
        "whole frames, 1 at a time",
        "1x2 tiles from host memory",
        "2x2 tiles from host memory",
        "2x3 tiles from host memory",
        "3x4 tiles from host memory",
    ]
    assert str(fits(H100, "encode", 480, 832, 3)) == "1x2 tiles, 2 at a time"
    tiled, hosted = fits(H100, "decode", 480, 832, 3.7), fits(H100, "decode", 480, 832, 3)
    assert (tiled.past().frames_at_once, tiled.past().grid) == (1, Grid(1, 1))
    assert isinstance(hosted.past(), HostedPast)
    assert hosted.past().grid == hosted.grid
    assert hosted.host_bytes > GIB > tiled.host_bytes == 0


def test_encoder_gets_frames_in_pairs_and_the_decoder_one_by_one() -> None:
    found = {way: list(plan._frames_at_once(PRESETS["wan2.1"], way)) for way in DIRECTIONS}
    assert found == {"encode": [2], "decode": [2, 1]}
    found = {way: list(plan._frames_at_once(CONFIGS["flat"], way)) for way in DIRECTIONS}
    assert found == {"encode": [], "decode": [1]}


def test_a_cpu_has_no_host_to_move_to() -> None:
    machine = Machine(SMALL.config, torch.float32, "cpu", is_fused=False)
    assert not any(each.is_hosted for each in plan._candidates(machine, "decode", 480, 832))
    assert any(each.is_hosted for each in plan._candidates(SMALL, "decode", 480, 832))


@directions
def test_what_cannot_fit_is_refused_with_the_numbers(direction: Direction) -> None:
    text = rf"to {direction} 192x128 takes 0\.82 GiB with \d+x\d+ tiles from host memory; the budget is 0\.50 GiB"
    with pytest.raises(DoesNotFit, match=text):
        fits(SMALL, direction, 128, 192, 0.5)


def test_clips_at_a_time_share_the_budget() -> None:
    with pytest.raises(DoesNotFit, match=r"and 9 clips at a time; the budget is 0\.83 GiB"):
        fits(SMALL, "encode", 128, 192, 0.83, clips=9)
    assert fits(SMALL, "encode", 128, 192, 0.83).grid == Grid(1, 1)
    alone, shared = fits(H100, "decode", 480, 832, 6), fits(H100, "decode", 480, 832, 6, clips=2)
    assert shared.device_bytes * 2 + H100.fixed_bytes <= 6 * GIB < alone.device_bytes * 2 + H100.fixed_bytes


@settings(max_examples=20, deadline=None)
@given(kibibytes=st.integers(0, 15_000), direction=st.sampled_from(["encode", "decode"]))
def test_plans_keep_within_the_budget_and_more_memory_takes_no_more_tiles(kibibytes: int, direction: Direction) -> None:
    budget = SMALL.fixed_bytes + kibibytes * 1024
    try:
        tiling = plan_tiles(SMALL, direction, 128, 192, budget)
    except DoesNotFit:
        return
    assert SMALL.fixed_bytes + tiling.device_bytes <= budget
    more = plan_tiles(SMALL, direction, 128, 192, budget + 2**20)
    tiles, fewer = (each.grid.rows * each.grid.columns for each in (tiling, more))
    assert (more.is_hosted, fewer) <= (tiling.is_hosted, tiles)


def test_grids_grow_and_keep_tiles_about_square_and_not_too_small() -> None:
    grids = plan._grids(480, 832)
    tiles = [grid.rows * grid.columns for grid in grids]
    assert tiles[0] == 1
    assert all(1.5 * fewer <= more <= 3 * fewer for fewer, more in pairwise(tiles))
    assert all(480 // grid.rows >= 64 and 832 // grid.columns >= 64 for grid in grids)
    assert all(0.4 < 480 / grid.rows / (832 / grid.columns) < 2.5 for grid in grids)
    assert plan._grids(64, 64) == [Grid(1, 1)]
    assert [str(grid) for grid in plan._grids(64, 512)] == ["1x1", "1x2", "1x3", "1x5", "1x8"]
