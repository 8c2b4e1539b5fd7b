"""The pose models of a bundle as files, mask back-ends included: loaded as the process loads them, and asked."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtime.bundles import Bundle, BundleComponent, load_bundle
from services.pose.models import load_models
from services.pose.networks import NetworkModels
from services.pose.nlf.config import NlfQuirks
from services.pose.onnx import OnnxNetwork
from services.pose.persons.masks import PersonPrompt
from services.pose.persons.matanyone.config import MatAnyoneConfig
from services.pose.persons.matanyone.network import MatAnyone
from services.pose.persons.weights import NON_COMMERCIAL_NOTICE
from tests.parity.cases import Case, recipe_weight
from tests.parity.pose_persons import sam2_config, segmenter_config
from tests.services.pose.drawn import ANN, ANN_BOX, BEN, BEN_BOX, DrawnModels, picture
from tests.services.pose.test_service import driving, extraction, series, stage

ROOT = Path(__file__).resolve().parents[3]
GOLDENS = ROOT / "tests" / "goldens"
CPU = torch.device("cpu")
PROMPTS = [
    PersonPrompt((4.0, 6.0, 30.0, 60.0), ((17.0, 12.0),)),
    PersonPrompt((40.0, 6.0, 70.0, 60.0), ((55.0, 12.0),)),
]


@pytest.fixture
def tiny() -> Bundle:
    return load_bundle(ROOT / "bundles" / "tiny")


@pytest.fixture
def sam2(tmp_path: Path) -> BundleComponent:
    """Segment Anything 2.1 of a small size, under its released names."""
    case = Case("sam2", GOLDENS)
    save_file(case.weights(), tmp_path / "sam2.safetensors")
    return BundleComponent("person_masks", (tmp_path / "sam2.safetensors",), config=asdict(sam2_config(case.config)))


@pytest.fixture
def matanyone(tmp_path: Path) -> tuple[BundleComponent, BundleComponent]:
    """Segment Anything of a small size, and MatAnyone, which has one size only."""
    case = Case("sam", GOLDENS)
    weights = case.weights()
    save_file(weights, tmp_path / "sam.safetensors")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in MatAnyone(MatAnyoneConfig()).state_dict().items()}
    save_file({name: recipe_weight(name, shape) for name, shape in shapes.items()}, tmp_path / "matanyone.safetensors")
    return (
        BundleComponent(
            "person_segmenter",
            (tmp_path / "sam.safetensors",),
            config=asdict(segmenter_config(case.config, weights)),
        ),
        BundleComponent("person_mattes", (tmp_path / "matanyone.safetensors",)),
    )


def with_components(bundle: Bundle, *components: BundleComponent) -> Bundle:
    return replace(bundle, components={**bundle.components, **{each.name: each for each in components}})


def check_masks(models: NetworkModels, backend: str) -> None:
    """Both people have a mask in every frame."""
    frames = [torch.from_numpy(picture(n, {ANN: ANN_BOX, BEN: BEN_BOX})) for n in range(3)]
    clip = models.masks[backend].begin(frames[0], PROMPTS)
    for frame in frames[1:]:
        masks = clip.follow(frame)
        assert masks.shape == (2, *frame.shape[:2])
        assert bool(((masks >= 0) & (masks <= 1)).all())


def test_a_bundle_without_mask_files_has_no_back_end(tiny: Bundle, tmp_path: Path, sam2: BundleComponent) -> None:
    models, loaded = load_models(tiny, CPU)
    assert models.masks == {}
    assert [component.name for component in loaded] == ["person_detector", "whole_body_keypoints", "joints_3d"]
    absent = replace(sam2, files=(tmp_path / "not-there.safetensors",))
    assert load_models(with_components(tiny, absent), CPU)[0].masks == {}


def test_sam2_is_loaded_under_its_released_names_and_follows_people(tiny: Bundle, sam2: BundleComponent) -> None:
    models, loaded = load_models(with_components(tiny, sam2), CPU)
    assert list(models.masks) == ["sam2"]
    assert loaded[-1].name == "person_masks"
    assert loaded[-1].parameters > 0
    check_masks(models, "sam2")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_pictures_stay_where_they_are_unless_a_network_is_elsewhere(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """A network that claims to be on a GPU is given arrays of the host, one on the same device tensors."""
    ways: list[str] = []

    def watched(name: str) -> Any:
        way = getattr(OnnxNetwork, name)

        def run(network: OnnxNetwork, pictures: Any) -> Any:
            ways.append(name)
            return way(network, pictures)

        return run

    for name in ("run", "run_on_device"):
        monkeypatch.setattr(OnnxNetwork, name, watched(name))
    if elsewhere:
        monkeypatch.setattr("services.pose.onnx._device_of", lambda session: torch.device("cuda", 0))
    models, _ = load_models(tiny, CPU)
    frames = [picture(n, {ANN: ANN_BOX}) for n in range(3)]
    joints = models.joints(frames, NlfQuirks())
    assert joints.shape == (3, 24, 3)
    assert set(ways) == {"run" if elsewhere else "run_on_device"}
    ways.clear()
    assert len(models.people(frames, phantom=True)) == 3
    # frames of the host are made pictures of by the processor
    assert set(ways) == {"run"}


@pytest.mark.slow
def test_matanyone_is_loaded_with_its_segmenter_and_says_that_it_is_for_non_commercial_use(
    tiny: Bundle, matanyone: tuple[BundleComponent, BundleComponent], caplog: pytest.LogCaptureFixture
) -> None:
    models, loaded = load_models(with_components(tiny, *matanyone), CPU)
    assert list(models.masks) == ["matanyone"]
    assert [component.name for component in loaded[-2:]] == ["person_segmenter", "person_mattes"]
    assert NON_COMMERCIAL_NOTICE in caplog.messages
    check_masks(models, "matanyone")


async def test_the_service_follows_two_people_with_the_masks_of_its_bundle(
    tiny: Bundle, sam2: BundleComponent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks are real, with weights that know nothing: what is found is drawn, what comes of it is of no meaning."""
    networks, loaded = load_models(with_components(tiny, sam2), CPU)
    models = DrawnModels(masks=networks.masks)
    monkeypatch.setattr("services.pose.models.load_models", lambda *_: (models, loaded))
    frames = [picture(n, {ANN: ANN_BOX, BEN: BEN_BOX}) for n in range(5)]
    async with stage(with_components(tiny, sam2)) as pose:
        answers = await pose.ask(
            "ExtractPose", extraction(people=2, mask_backend="sam2", give_joints=True), driving(frames)
        )
        assert "person_masks" in {component.name for component in pose.runtime.components}
    joints = answers.one("joints").numpy()
    assert joints.shape == (5, 2, 24, 3)
    assert np.isfinite(joints).all()
    assert len(series(answers, "pose_frames")) == 5
