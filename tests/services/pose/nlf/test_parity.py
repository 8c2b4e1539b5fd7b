"""The stored NLF cases pass, and stop passing when a detail is different."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.parity.pose_nlf  # noqa: F401 (registers the checks)
from services.pose.nlf import crops, detector, head, model
from services.pose.nlf.config import NlfQuirks
from services.pose.nlf.head import PointHead, WeightField
from tests.parity import pose_nlf
from tests.parity.cases import Case, Comparison
from tests.parity.families import check_for
from tests.parity.manifests import Manifest

GOLDENS = Path(__file__).parents[3] / "goldens"
MANIFESTS = Path(__file__).parents[3] / "manifests"
INVENTORY = "nlf_l_multi_0.3.2.eager.safetensors"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def results(name: str) -> dict[str, Comparison]:
    check = check_for(name)
    assert check is not None
    with torch.inference_mode():
        return {comparison.name: comparison for comparison in check(Case(name, GOLDENS))}


def failures(name: str) -> set[str]:
    """Those of the case's outputs that do not pass; without `poses3d`, which a bit decides (`several_threads`)."""
    return {output for output, comparison in results(name).items() if not comparison.verdict()[0]} - {"poses3d"}


@pytest.mark.parametrize("name", ["nlf-detector", "nlf-head", "nlf-poses"])
def test_stored_case_passes(name: str) -> None:
    assert failures(name) == set()


def test_stored_points_are_met_up_to_what_rounding_moves_them() -> None:
    """`poses3d` meets its tolerance only on processors that round as the reference's did: this holds on all."""
    compared = results("nlf-poses")["poses3d"]
    difference = (compared.actual.double() - compared.expected.double()).abs()
    assert difference[..., 2].max() < 60
    # sideways they are exact, as the directions are
    rays = [points[..., :2] / points[..., 2:] for points in (compared.actual, compared.expected)]
    torch.testing.assert_close(rays[0], rays[1], atol=5e-4, rtol=0)


@pytest.mark.slow
def test_stored_backbone_passes() -> None:
    assert failures("nlf-backbone-l") == set()


def test_inventory_maps_onto_the_full_size_model() -> None:
    assert Manifest(INVENTORY, MANIFESTS / f"{INVENTORY}.json.gz").problems() == []


def test_test_time_augmentation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**Case("nlf-poses", GOLDENS).config, "num_aug": 3}
    monkeypatch.setattr(Case, "config", settings)
    with pytest.raises(ValueError, match="one crop per box"):
        results("nlf-poses")


def no_tone(pictures: Tensor, side: int) -> Tensor:
    return letterboxed(pictures, side) ** 2.2


def first_points_mirrored(field: WeightField, points: Tensor) -> Tensor:
    return field_forward(field, -points)


def without_uncertainty_limit(points: PointHead, given: head.RelativePoints, intrinsics: Tensor) -> Any:
    return absolute(points, given._replace(uncertainties=given.uncertainties * 0), intrinsics)


def not_normalised(logits: Tensor, *, dims: int) -> Tensor:
    return normalised(logits * 1.001, dims=dims)


def half_pixel_camera(height: int, width: int, fov_degrees: float) -> Tensor:
    return default_intrinsics(height + 1, width + 1, fov_degrees)


letterboxed, field_forward, absolute = detector.letterboxed, WeightField.forward, PointHead.absolute
normalised, default_intrinsics = head.normalised, crops.default_intrinsics


@pytest.mark.parametrize(
    ("case", "place", "name", "replacement", "failed"),
    [
        ("nlf-detector", detector, "_PADDING", 0.45, {"small", "small_up"}),
        ("nlf-detector", detector, "DISPLAY_GAMMA", 2.21, {"small", "small_up"}),
        ("nlf-head", head, "_FIELD_SCALE", 0.101, {"w_tensor", "coords2d", "coords3d_abs"}),
        ("nlf-head", WeightField, "forward", first_points_mirrored, {"w_tensor", "b_tensor_flipped"}),
        ("nlf-head", head, "_NORM_EPS", 1e-5, {"features_processed"}),
        ("nlf-head", head, "_MAX_UNCERTAINTY", 0.2, {"given_abs"}),
        ("nlf-head", head, "_MIXED_BORDER", 1.2, {"given_abs"}),
        ("nlf-head", head, "_TRUSTED_BORDER", 0.3, {"given_abs"}),
        ("nlf-head", head, "normalised", not_normalised, {"coords2d", "coords3d"}),
        ("nlf-head", PointHead, "absolute", without_uncertainty_limit, {"uncertainties_out", "given_abs"}),
        ("nlf-poses", crops, "CROP_GAMMA", 0.81, {"crops"}),
        ("nlf-poses", model, "DISPLAY_GAMMA", 2.25, {"crops"}),
        (
            "nlf-poses",
            pose_nlf,
            "default_intrinsics",
            half_pixel_camera,
            {"crop_intrinsics", "crop_rotation", "poses2d"},
        ),
    ],
)
def test_case_fails_when_a_detail_differs(
    case: str,
    place: object,
    name: str,
    replacement: Callable[..., Any] | float,
    failed: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, name, replacement)
    assert failed <= failures(case)


def test_case_fails_when_pictures_are_linearised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pose_nlf, "NlfQuirks", lambda **given: replace(NlfQuirks(**given), linearise_twice=False))
    assert "crops" in failures("nlf-poses")
