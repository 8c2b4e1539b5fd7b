"""The encoder's stored cases pass, and stop passing when the model is built a little differently."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.parity.encoder  # noqa: F401 (registers the checks)
from services.encoder.image import ImageEncoderConfig, preprocess, resize_bicubic
from services.encoder.weights import text_model
from tests.parity.cases import Case
from tests.parity.families import check_for
from tests.parity.manifests import Manifest

GOLDENS = Path(__file__).parents[2] / "goldens"
MANIFESTS = Path(__file__).parents[2] / "manifests"


def failures(name: str, **overrides: Any) -> list[str]:
    """The outputs of a stored case that do not pass; `overrides` go into its config."""
    case = Case(name, GOLDENS)
    if overrides:
        case.spec["config"] |= overrides
    check = check_for(name)
    assert check is not None
    with torch.inference_mode():
        return [comparison.name for comparison in check(case) if not comparison.verdict()[0]]


@pytest.mark.parametrize("name", ["umt5", "umt5-long", "text-clean", "clip-visual", "clip-resize"])
def test_stored_case_passes(name: str) -> None:
    assert failures(name) == []


@pytest.mark.parametrize(
    "name",
    [
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth",
    ],
)
def test_inventory_maps_onto_the_full_size_model(name: str) -> None:
    assert Manifest(name, MANIFESTS / f"{name}.json.gz").problems() == []


@pytest.fixture
def without_position_table(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Case.weights

    def weights(case: Case, prefix: str = "") -> dict[str, Tensor]:
        table = "blocks.1.pos_embedding.embedding.weight"
        return {name: torch.zeros_like(w) if name == table else w for name, w in whole(case, prefix).items()}

    monkeypatch.setattr(Case, "weights", weights)


@pytest.mark.usefixtures("without_position_table")
@pytest.mark.parametrize("name", ["umt5", "umt5-long"])
def test_case_fails_when_a_layer_lacks_its_own_position_table(name: str) -> None:
    assert failures(name) == ["hidden", "hidden_valid"]


def test_case_fails_when_distances_are_bucketed_differently() -> None:
    assert failures("umt5-long", max_distance=64) == ["hidden", "hidden_valid"]


def test_case_fails_when_the_mask_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(*args: Any, **kwargs: Any) -> Any:
        model = text_model(*args, **kwargs)
        return lambda ids, mask: model(ids, torch.ones_like(mask))

    monkeypatch.setattr("tests.parity.encoder.text_model", unmasked)
    assert failures("umt5") == ["hidden", "hidden_valid"]


def test_case_fails_on_the_last_hidden_state_instead_of_the_one_before() -> None:
    # with one more layer announced, the file's last block is the last but one and runs
    assert failures("clip-visual", num_layers=4) == ["features"]


@pytest.mark.parametrize("setting", [{"activation": "quick_gelu"}, {"norm_eps": 1e-2}, {"num_heads": 8}])
def test_case_fails_with_another_setting_of_the_vision_tower(setting: dict[str, Any]) -> None:
    assert failures("clip-visual", **setting) == ["features"]


def test_case_fails_with_the_other_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lanczos(picture: Tensor, config: ImageEncoderConfig) -> Tensor:
        return preprocess(picture, replace(config, preprocessing="wan2gp"))

    monkeypatch.setattr("tests.parity.encoder.preprocess", lanczos)
    assert failures("clip-visual") == ["features", "preprocessed"]


def test_resize_case_fails_with_the_other_way_to_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.parity.encoder.resize_lanczos", resize_bicubic)
    assert failures("clip-resize") == ["out"]
