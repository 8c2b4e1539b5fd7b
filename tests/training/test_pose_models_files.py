"""Files of the pose models: what is written is what was trained, and the committed ones find drawn people."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bunraku.v1 import pose_pb2 as pb
from runtime.bundles import load_bundle
from runtime.tensors import WireTensor
from services.pose.detect import YoloxDetector
from services.pose.nlf.weights import load_nlf
from services.pose.onnx import OnnxNetwork, OnnxSettings
from services.pose.service import PoseService
from services.pose.skeleton import Camera
from tests.services.pose.videos import lossless_mp4
from tests.services.serving import Served, serving
from training.figures import SIDE
from training.figures.cameras import as_camera
from training.figures.clips import Stories, sample_stories
from training.pose_models.detector import overlap
from training.pose_models.drawing import draw
from training.pose_models.joints import CONFIG, canonical_points, crop_model
from training.pose_models.networks import DetectorNetwork, KeypointNetwork

FRAMES = 5
BUNDLE = load_bundle(Path(__file__).parents[2] / "bundles" / "tiny")


def with_history(model: nn.Module) -> nn.Module:
    """Batch norms that have seen something, so that forgetting them is noticed."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.weight, module.bias):
                assert values is not None
                values.data.normal_(generator=generator).mul_(0.2).add_(0.3)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.mark.slow  # what exports takes ten seconds to be imported
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["detector", "keypoints"])
def test_an_onnx_file_computes_what_the_network_does(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from training.pose_models.export import write_onnx

    torch.manual_seed(0)
    model = DetectorNetwork((4, 4, 6, 6, 8), neck=6) if kind == "detector" else KeypointNetwork(32, 16, (4, 4, 6, 6), 8)
    height, width = (64, 64) if kind == "detector" else (32, 16)
    names = ["output"] if kind == "detector" else ["simcc_x", "simcc_y"]
    pictures = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(2))
    given = with_history(model)(pictures)
    expected = [given] if kind == "detector" else list(given)
    write_onnx(model, pictures[:2], "images", names, tmp_path / "model.onnx")
    network = OnnxNetwork.load(tmp_path / "model.onnx", OnnxSettings(device="cpu", num_threads=1))
    assert (network.height, network.width, network.batch) == (height, width, 8)
    found = network.run(pictures.numpy())
    assert list(found) == names
    for values, wanted in zip(found.values(), expected, strict=True):
        # weights in half precision
        np.testing.assert_allclose(values, wanted.numpy(), atol=0.02)
        assert float(wanted.std()) > 0.02
    stored = (tmp_path / "model.onnx").read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in stored


def test_an_nlf_file_computes_what_the_network_does(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from training.pose_models.export import write_nlf

    torch.manual_seed(0)
    model = with_history(crop_model())
    write_nlf(model, canonical_points(), CONFIG, tmp_path / "nlf.safetensors")  # type: ignore[arg-type]  # a CropModel
    loaded = load_nlf(tmp_path / "nlf.safetensors", device=torch.device("cpu"), dtype=torch.float32)
    assert loaded.config == CONFIG
    torch.testing.assert_close(loaded.canonical_points, canonical_points())
    crops = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    head, others = model.heatmap_head, loaded.model.heatmap_head
    found = [
        which.locate(which.layer(network.backbone(crops)), which.point_weights(canonical_points()))  # type: ignore[operator, union-attr]
        for which, network in ((head, model), (others, loaded.model))
    ]
    torch.testing.assert_close(found[0].pixels, found[1].pixels, rtol=0.01, atol=0.3)
    torch.testing.assert_close(found[0].metres, found[1].metres, rtol=0.01, atol=0.01)


def test_the_committed_detector_finds_everybody_at_any_size_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.pose_models.drawing._NOBODY", 0.3)
    pictures = draw(32, 23, torch.device("cpu"), held_out=True)
    settings = OnnxSettings(device="cpu", num_threads=1)
    detector = YoloxDetector(OnnxNetwork.load(BUNDLE.component("person_detector").files[0], settings))
    found = detector.detect(list(pictures.frames.numpy()))
    assert [len(boxes) for boxes in found] == pictures.shown.int().tolist()
    assert 0 < pictures.shown.sum() < len(pictures)
    boxes = torch.tensor(np.concatenate(found))[:, :4]
    truth = pictures.boxes[pictures.shown]
    heights = truth[:, 3] - truth[:, 1]
    assert heights.min() < 0.45 * SIDE < 0.8 * SIDE < heights.max()
    assert overlap(boxes, truth)[0].mean() > 0.85


@pytest.fixture(scope="module")
def stories() -> Stories:
    return sample_stories(3, torch.Generator().manual_seed(11), frames=FRAMES, held_out=True, fitted=1.0)


@pytest.fixture
async def pose() -> AsyncIterator[Served[PoseService]]:
    async with serving("pose", PoseService, BUNDLE) as stage:
        yield stage


async def extracted(
    stage: Served[PoseService], stories: Stories, index: int, **fields: object
) -> dict[str, np.ndarray]:
    parameters = pb.ExtractPoseParameters(height=SIDE, width=SIDE, give_joints=True, **fields)  # type: ignore[arg-type]
    frames = list(stories.draw_driving(SIDE, SIDE)[index].numpy())
    tensors = [
        WireTensor.from_bytes("video", lossless_mp4(frames)),
        WireTensor.from_numpy("reference_image", stories.draw_reference(SIDE, SIDE)[index].numpy()),
    ]
    answers = await stage.ask("ExtractPose", pb.ExtractPoseRequest(parameters=parameters), tensors)
    bridged = [frame for progress in answers.messages("progress") for frame in progress.bridged_frames]
    assert bridged == []
    return {name: answers.one(name).numpy() for name in ("joints", "camera", "pose_frames")}


async def test_the_committed_models_find_drawn_people_to_a_pixel_or_two(
    pose: Served[PoseService], stories: Stories
) -> None:
    plain, truth = Camera.of(SIDE, SIDE), stories.driving_joints().numpy()
    for index in range(len(stories)):
        found = await extracted(pose, stories, index)
        assert found["pose_frames"].shape == (FRAMES, SIDE // 2, SIDE // 2, 3)
        assert all(frame.any() for frame in found["pose_frames"])
        joints = found["joints"][:, 0]
        apart = np.linalg.norm(plain.project(joints) - plain.project(truth[index]), axis=-1)
        assert apart.mean() * 192 / SIDE < 4
        # the same person seen in a mirror: left for right
        mirrored = truth[index] * np.array([-1, 1, 1])
        wrong = np.linalg.norm(plain.project(joints) - plain.project(mirrored), axis=-1)
        assert wrong.mean() > 3 * apart.mean()
        assert np.linalg.norm(joints.mean(1) - truth[index].mean(1), axis=-1).mean() < 400
        # fitted to the reference picture as training assumes
        fitted = Camera.from_matrix(found["camera"]).project(joints)
        wanted = as_camera(stories.cameras[index], SIDE).project(truth[index])
        assert np.linalg.norm(fitted - wanted, axis=-1).mean() * 192 / SIDE < 6


@pytest.mark.parametrize("preset", ["wan2gp", "official"])
async def test_the_committed_models_serve_the_presets_of_the_released_programs(
    pose: Served[PoseService], stories: Stories, preset: str
) -> None:
    found = await extracted(pose, stories, 0, preset=preset)
    plain = Camera.of(SIDE, SIDE)
    apart = plain.project(found["joints"][:, 0]) - plain.project(stories.driving_joints()[0].numpy())
    assert np.linalg.norm(apart, axis=-1).mean() * 192 / SIDE < 5
