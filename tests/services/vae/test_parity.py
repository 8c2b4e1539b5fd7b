"""The stored cases of both VAEs pass, and stop passing when the model is built a little differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tests.parity.vae  # noqa: F401 (registers the checks)
from services.vae import model
from services.vae.model import DuplicateUp, Past, RMSNorm, Upsample, after_first_frame
from tests.parity.cases import Case
from tests.parity.families import check_for
from tests.parity.manifests import Manifest

GOLDENS = Path(__file__).parents[2] / "goldens"
MANIFESTS = Path(__file__).parents[2] / "manifests"
SMALL = ["encode5", "decode5"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def failures(case: Case) -> set[str]:
    """Those of the case's outputs that do not pass in every way they are computed."""
    check = check_for(case.name)
    assert check is not None
    with torch.inference_mode():
        return {comparison.name.split()[0] for comparison in check(case) if not comparison.verdict()[0]}


def only(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    monkeypatch.setattr(Case, "expected_names", lambda _: names)


@pytest.mark.parametrize("name", ["vae21", "vae22"])
def test_stored_case_passes(name: str) -> None:
    assert failures(Case(name, GOLDENS)) == set()


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "Wan2.2_VAE.pth"])
def test_inventory_maps_onto_the_full_size_model(name: str) -> None:
    assert Manifest(name, MANIFESTS / f"{name}.json.gz").problems() == []


@pytest.mark.parametrize(("name", "preset"), [("vae21", "wan2.1"), ("vae22", "wan2.2")])
def test_preset_has_the_latent_statistics_of_the_reference(name: str, preset: str) -> None:
    config, released = Case(name, GOLDENS).config, model.PRESETS[preset]
    # stored as float32
    assert released.latents_mean == pytest.approx(config["latents_mean"], rel=1e-6)
    assert released.latents_std == pytest.approx(config["latents_std"], rel=1e-6)


@pytest.mark.parametrize("statistic", ["latents_mean", "latents_std"])
def test_case_fails_when_one_latent_statistic_is_off(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, SMALL)
    case = Case("vae21", GOLDENS)
    case.config[statistic][7] *= 1.01
    assert failures(case) == set(SMALL)


def odd_frames_first(up: Upsample, x: Tensor, past: Past) -> Tensor:
    assert up.time_conv is not None
    even, odd = up.time_conv(x, past).chunk(2, dim=1)
    return torch.stack([odd, even], dim=3).flatten(2, 3)


def looking_back_on_the_first_frame(up: Upsample, x: Tensor, past: Past) -> Tensor:
    if up.time_conv is not None:
        if past.at_start:
            past.remember(up.time_conv, torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :1]], dim=2))
        x = after_first_frame(up.double_rate, x, past)
    return model.per_frame(up.resample, x)


def never_dropping(up: DuplicateUp, x: Tensor, past: Past) -> Tensor:
    first = Past()
    first.at_start = False
    doubled = duplicate(up, x, first)
    return doubled[:, :, : doubled.shape[2] - (up.frames - 1)] if past.at_start else doubled


def mean_square(norm: RMSNorm, x: Tensor) -> Tensor:
    scaled: Tensor = x / (x.square().mean(dim=1, keepdim=True) + 1e-2).sqrt() * norm.gamma
    return scaled


def columns_fastest(frames: Tensor, side: int) -> Tensor:
    return patches(frames.transpose(3, 4), side).transpose(3, 4)


duplicate, patches = DuplicateUp.forward, model.patchify


@pytest.mark.parametrize(
    ("case", "place", "name", "replacement", "failed"),
    [
        ("vae21", Upsample, "double_rate", odd_frames_first, {"decode5"}),
        ("vae21", Upsample, "forward", looking_back_on_the_first_frame, {"decode5"}),
        ("vae21", RMSNorm, "forward", mean_square, {"encode5", "decode5"}),
        ("vae22", DuplicateUp, "forward", never_dropping, {"decode5"}),
        ("vae22", model, "patchify", columns_fastest, {"encode5"}),
    ],
)
def test_case_fails_when_a_detail_differs(
    case: str,
    place: object,
    name: str,
    replacement: Callable[..., Tensor],
    failed: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch, SMALL)
    monkeypatch.setattr(place, name, replacement)
    assert failures(Case(case, GOLDENS)) == failed
