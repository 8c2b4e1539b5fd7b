"""Attention backends against the formula."""

import pytest
import torch

from services.denoiser.attention import BACKENDS, attention_backend, usable_backends
from tests.services.denoiser.tiny import normal

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", usable_backends(CPU, torch.float32, 16))
def test_every_backend_is_softmax_of_scaled_products(backend: str) -> None:
    queries, keys, values = normal(2, 5, 3, 16), normal(2, 7, 3, 16, seed=1), normal(2, 7, 3, 16, seed=2)
    weights = (torch.einsum("blhd,bkhd->bhlk", queries, keys) / 16**0.5).softmax(-1)
    expected = torch.einsum("bhlk,bkhd->blhd", weights, values)
    torch.testing.assert_close(attention_backend(backend)(queries, keys, values), expected)


def test_backends_carry_the_name_they_are_chosen_by() -> None:
    assert {name: backend.name for name, backend in BACKENDS.items()} == {name: name for name in BACKENDS}
    assert attention_backend("flash") is BACKENDS["flash"]


def test_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"attention must be one of auto, cudnn, .* got fastest"):
        attention_backend("fastest")


def test_a_backend_whose_package_is_not_there_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="attention sage needs sageattention 2 or newer, which is not installed"):
        attention_backend("sage")


def test_only_backends_that_run_here_are_usable() -> None:
    usable = usable_backends(CPU, torch.float32, 16)
    assert {"auto", "math"} <= set(usable)
    assert "cudnn" not in usable
