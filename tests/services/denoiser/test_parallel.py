"""A denoise over several processes gives what one process gives, and all of them stop together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.denoiser.parallel import tokens_between
from tests.services.denoiser.ranks import (
    REUSING,
    Processes,
    blocks_until_cancelled,
    denoised,
    latents_together,
    model_of,
)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes()
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("kind", "weights", "guidance_scale", "world_size", "tokens"),
    [
        ("scail", "float", 2.0, 2, 56),  # a branch each, with all tokens
        ("scail", "float", 1.0, 2, 28),
        ("scail", "int8", 2.0, 4, 28),  # both ways together
        ("scail", "balanced", 1.0, 4, 14),
        ("text", "float", 1.0, 2, 5),  # of 9: one is padding
        ("text", "pieces", 1.0, 2, 5),
        ("text", "int8", 1.0, 4, 3),  # of 9: one rank has nothing but padding
        ("first_frame", "float", 3.0, 4, 14),  # of 27, with timesteps of their own
    ],
)
def test_several_processes_give_the_latents_of_one(
    processes: Processes, tmp_path: Path, kind: str, weights: str, guidance_scale: float, world_size: int, tokens: int
) -> None:
    expected = denoised(model_of(kind, weights), kind, guidance_scale)
    given = processes.run(tmp_path, world_size, latents_together, kind, weights, guidance_scale)
    for latents, lengths in given:
        assert torch.allclose(torch.from_numpy(latents), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.from_numpy(latents), torch.from_numpy(given[0][0]))  # so that the next step agrees
        assert set(lengths) == {tokens}
        # with guidance each process has one of the two branches
        assert len(lengths) == 4 * 2


def test_steps_that_reuse_and_steps_without_guidance_are_shared_too(processes: Processes, tmp_path: Path) -> None:
    expected = denoised(model_of("scail"), "scail", 2.0, REUSING)
    given = processes.run(tmp_path, 4, latents_together, "scail", "float", 2.0, REUSING)
    for latents, lengths in given:
        assert torch.allclose(torch.from_numpy(latents), expected, rtol=1e-4, atol=1e-5)
        assert set(lengths) == {28, 14}  # of 56: between two ranks with guidance, between four without
        assert len(lengths) < 8 * 2


@pytest.mark.parametrize("cancelled_rank", [0, 3])
def test_ranks_that_are_cancelled_stop_in_front_of_the_same_block(
    processes: Processes, tmp_path: Path, cancelled_rank: int
) -> None:
    ran = processes.run(tmp_path, 4, blocks_until_cancelled, "scail", 2.0, cancelled_rank, 3)
    assert ran == [3, 3, 3, 3]


def test_heads_that_cannot_be_divided_are_refused() -> None:
    assert [tokens_between(40, size) for size in (1, 2, 4, 5, 8, 10, 16, 20)] == [1, 1, 2, 5, 4, 5, 8, 10]
    with pytest.raises(ValueError, match="2 attention heads cannot be divided among 3 ranks, as a group of 6 needs"):
        tokens_between(2, 6)
    with pytest.raises(ValueError, match=r"12 .* among 5 ranks, as a group of 5 needs; groups may have 1, 2, 3, 4, 6,"):
        tokens_between(12, 5)
