"""The stored cases of the denoiser pass, and would not if a sign, an order, a constant or a weight were another."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tests.parity.denoiser as checks
from services.denoiser import conditioning, denoise, glue, model, quantisation, rope, sampling
from tests.parity.cases import Case, cases
from tests.parity.families import check_for
from tests.parity.manifests import Manifest, manifests

TESTS = Path(checks.__file__).parent.parent
CASES = {
    case.name: case
    for case in cases(TESTS / "goldens")
    if (check := check_for(case.name)) and getattr(check, "func", check).__module__ == checks.__name__
}
INVENTORIES = {manifest.name: manifest for manifest in manifests(TESTS / "manifests")}


def differences(case: Case) -> dict[str, str]:
    """The comparisons of a case that fail."""
    check = check_for(case.name)
    assert check is not None
    with torch.inference_mode():
        verdicts = [(comparison.name, *comparison.verdict()) for comparison in check(case)]
    assert verdicts, "nothing was compared"
    return {name: text for name, passed, text in verdicts if not passed}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_case_agrees_with_the_reference(case: Case) -> None:
    assert differences(case) == {}


@pytest.mark.parametrize("name", ["dit-t2v", "dit-ti2v", "dit-i2v21", "dit-scail", "e2e-scail", "e2e-t2v-experts"])
def test_differences_are_far_below_the_tolerance(name: str) -> None:
    case = CASES[name]
    check = check_for(name)
    assert check is not None
    with torch.inference_mode():
        for comparison in check(case):
            error = (comparison.actual.double() - comparison.expected.double()).abs().max()
            assert float(error) < 3e-5, comparison.name


@pytest.mark.parametrize(
    "name",
    [
        "Wan2.1-I2V-14B",
        "Wan2.2-I2V-A14B",
        "Wan2.2-T2V-A14B",
        "Wan2.2-TI2V-5B",
        "wan2.1_scail_preview_14B_bf16.safetensors",
        "wan2.1_scail_preview_14B_quanto_bf16_int8.safetensors",
    ],
)
def test_inventory_maps_onto_the_model(name: str) -> None:
    assert INVENTORIES[name].problems() == []


class Incomplete(Manifest):
    """An inventory with one tensor renamed and one of another shape."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes
        shapes["blocks.3.ffn.1.bias"] = shapes.pop("blocks.3.ffn.0.bias")
        return shapes | {"head.head.bias": (65,)}


def test_inventory_that_does_not_fit_is_reported_by_name() -> None:
    whole = INVENTORIES["Wan2.2-TI2V-5B"]
    assert Incomplete(whole.name, whole.path).problems() == [
        "1 missing (blocks.3.ffn.0.bias)",
        "1 unknown (blocks.3.ffn.1.bias)",
        "1 of another shape (head.head.bias [65] instead of [192])",
    ]


def sine_first(timestep: Tensor, dim: int) -> Tensor:
    return SINUSOID(timestep, dim).roll(dim // 2, dims=-1)


def backwards(heads: Tensor, tables: rope.Rope) -> Tensor:
    return ROTATE(heads, rope.Rope(tables.cos, -tables.sin))


def scaled_only(eps: float, factor: Tensor, addend: Tensor, row: Tensor, plus: float) -> glue.Affine:
    return AFFINE(eps, factor, addend, row, plus=0)


def one_later(frames_given: int, *size: int) -> Tensor:
    return MASK(frames_given + 1, *size)


def unpooled_mean(axis: Tensor, pool: int) -> Tensor:
    """The first of the neighbours instead of their mean."""
    return axis[::pool]


def other_guidance(positive: Tensor, negative: Tensor, guidance_scale: float, *, zero_star: bool) -> Tensor:
    return -GUIDED(positive, negative, guidance_scale, zero_star=zero_star)


def first_order(self: sampling.UniPC, i: int, order: int, *rest: object) -> Tensor:
    return PREDICT(self, i, 1, *rest)  # type: ignore[arg-type]  # passed on as they came


def uncorrected(self: sampling.UniPC, state: sampling.SolverState, x0: Tensor) -> Tensor:
    return state.latents


def floored(weight: Tensor) -> tuple[Tensor, Tensor]:
    _, scale = QUANTIZE(weight)
    return (weight / scale).floor().clamp(-128, 127).to(torch.int8), scale


SINUSOID, ROTATE, MASK, AFFINE = model.sinusoid, rope.rotate, conditioning.known_frames_mask, glue.Affine
GUIDED, PREDICT, QUANTIZE = denoise.guided_velocity, sampling.UniPC.predict, quantisation.quantize_weight

MUTATIONS: list[tuple[str, object, str, object]] = [
    ("time-embedding", checks, "sinusoid", sine_first),
    ("dit-t2v", model, "sinusoid", sine_first),
    ("dit-t2v", glue, "rotate", backwards),
    ("dit-i2v22", model, "Affine", scaled_only),
    ("dit-i2v21", model, "_CLIP_EPS", 1e-1),
    ("dit-scail", rope, "POSE_COLUMN_OFFSET", 119),
    ("dit-scail", rope, "_pooled", unpooled_mean),
    ("rope-scail", rope, "_THETA", 10001.0),
    ("rope-scail", rope, "_pooled", unpooled_mean),
    ("i2v-mask", checks, "known_frames_mask", one_later),
    ("dit-scail-history", conditioning, "known_frames_mask", one_later),
    ("sampler-unipc", sampling.UniPC, "predict", first_order),
    ("sampler-unipc", sampling.UniPC, "correct", uncorrected),
    ("sampler-dpmpp", sampling, "_TRAIN_TIMESTEPS", 999),
    ("sampler-euler", sampling, "_TRAIN_TIMESTEPS", 999),
    ("e2e-t2v", denoise, "guided_velocity", other_guidance),
    ("e2e-scail", conditioning.Conditioning, "with_known", lambda self, latents: latents),
    ("quanto-int8", quantisation, "quantize_weight", floored),
]


@pytest.mark.parametrize(("case", "owner", "name", "mutant"), MUTATIONS, ids=[f"{m[0]}-{m[2]}" for m in MUTATIONS])
def test_case_notices_a_mutation(
    monkeypatch: pytest.MonkeyPatch, case: str, owner: object, name: str, mutant: object
) -> None:
    monkeypatch.setattr(owner, name, mutant)
    assert differences(CASES[case]) != {}


def swapped(weights: dict[str, Tensor], one: str, other: str) -> dict[str, Tensor]:
    return weights | {one: weights[other], other: weights[one]}


WEIGHT_MUTATIONS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "a weight": lambda w: w | {"blocks.1.ffn.2.bias": w["blocks.1.ffn.2.bias"] * 1.01},
    "key for value": lambda w: swapped(w, "blocks.0.self_attn.k.weight", "blocks.0.self_attn.v.weight"),
    "text for image": lambda w: swapped(w, "blocks.1.cross_attn.k.weight", "blocks.1.cross_attn.k_img.weight"),
    "pose for video": lambda w: swapped(w, "patch_embedding.weight", "pose_patch_embedding.weight"),
    "a row of modulation": lambda w: w | {"blocks.1.modulation": w["blocks.1.modulation"].roll(1, dims=1)},
}


@pytest.mark.parametrize("change", WEIGHT_MUTATIONS.values(), ids=WEIGHT_MUTATIONS)
def test_case_notices_another_weight(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    weights = change(CASES["dit-scail"].weights())
    monkeypatch.setattr(Case, "weights", lambda _self, _prefix="": weights)
    assert "out" in differences(CASES["dit-scail"])
