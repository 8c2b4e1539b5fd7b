"""Cases and inventory of NLF, the estimator of 3D joints: backbone, person detector, point head, and poses from frames."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.weights import build_on_meta, load_weights
from services.pose.nlf.backbone import BACKBONES, efficientnet
from services.pose.nlf.config import NlfConfig, NlfQuirks
from services.pose.nlf.crops import default_intrinsics, linear_light, look_at
from services.pose.nlf.detector import DetectorConfig, PersonDetector, letterboxed
from services.pose.nlf.head import PointWeights, RelativePoints
from services.pose.nlf.model import NlfEstimator
from services.pose.nlf.poses import Poses, best_first, per_frame
from services.pose.nlf.weights import checkpoint_problems, crop_model
from tests.parity.cases import Case, Comparison, normals, recipe_weight
from tests.parity.families import family
from tests.parity.manifests import manifest

CPU = torch.device("cpu")
FIELD = "crop_model.heatmap_head.weight_field."
NUMBER = r"-?\d+(?:\.\d+)?"


@family("nlf-backbone", on_any_device=True)
def backbone(case: Case) -> Iterator[Comparison]:
    """The features, and the mean size of what each stage gives."""
    settings = case.config
    features = build_on_meta(
        lambda: efficientnet(
            BACKBONES[settings["backbone"]], centered_stride=settings["centered_stride"], norm_eps=settings["bn_eps"]
        )
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in features.state_dict().items()}
    weights = {
        name: recipe_weight(f"crop_model.backbone.1.{name}", shape).to(case.device) for name, shape in shapes.items()
    }
    load_weights(features, weights, source=case.name)
    features.eval()
    x = case.input("crop")
    actual = {}
    for index, stage in enumerate(features):
        x = stage(x)
        actual[f"stage{index}_mean_abs"] = x.abs().mean()[None]
    actual["out"] = x
    for name in case.expected_names():
        yield Comparison.within(name, actual[name], case.expected(name), case.tolerance)


@family("nlf-detector")
def detector(case: Case) -> Iterator[Comparison]:
    """Boxes from a made-up output of the network, and what the network is given, at a smaller size."""
    settings = case.config
    pictures = linear_light(
        picture_bytes(f"input:{case.name}:image", (1, 3, settings["H"], settings["W"])), torch.float32
    )
    config = DetectorConfig(settings["input"], settings["threshold"], settings["nms"], settings["max_detections"])
    raw = yolox_output(case, config.side)
    given: list[Tensor] = []

    def network(letterbox: Tensor) -> Tensor:
        given.append(letterbox)
        return raw

    boxes = PersonDetector(network, config).detect(pictures)
    yield Comparison("given to the network", torch.equal(given[0], letterboxed(pictures, config.side) * 255), True)
    height, width = (int(number) for number in found(r"top left (\d+)x(\d+)", case.call["small_up"]))
    corner = pictures[..., :height, :width]
    for name in case.expected_names():
        expected = case.expected(name)
        if name == "boxes":
            yield Comparison(name, boxes[0], expected, atol=case.tolerance["boxes"])
        else:
            source = corner if name == "small_up" else pictures
            yield Comparison(name, letterboxed(source, expected.shape[-1]), expected, atol=case.tolerance["small"])


def yolox_output(case: Case, side: int) -> Tensor:
    """What the case's text describes: YOLOX numbers of every cell, [1, cells, 85]."""
    text = case.spec["inputs"]["raw"]
    prefix = found(r"names (\S+?):\.\.\.", text)[0]
    offset, class_offset = (float(found(rf"{kind} offset ({NUMBER})", text)[0]) for kind in ("obj", "cls"))
    cells = sum((side // stride) ** 2 for stride in (8, 16, 32))

    def named(part: str, width: int) -> np.ndarray:
        return normals(f"{prefix}:{part}", (cells, width))

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)

    parts = [
        np.float32(0.5) * named("xy", 2),
        1 + np.float32(0.5) * named("wh", 2),
        sigmoid(2 * named("obj", 1) - offset),
        sigmoid(2 * named("cls", 80) - class_offset),
    ]
    return torch.from_numpy(np.concatenate(parts, axis=1))[None]


@family("nlf-head")
def head(case: Case) -> Iterator[Comparison]:
    """The field's weights, both ways round, and points from features, relative and absolute."""
    model = model_of(case)
    head = model.heatmap_head
    points = formula(case.spec["inputs"]["points"])
    weights = head.point_weights(points)
    flipped = head.point_weights(points * torch.tensor([-1.0, 1, 1]))
    features = head.layer(formula(case.spec["inputs"]["features"]))
    is_flipped = torch.tensor(case.call["flip"])
    located = both_ways(
        head.locate(features[~is_flipped], weights), head.locate(features[is_flipped], flipped), is_flipped
    )
    given = RelativePoints(case.input("given2d"), case.input("given3d"), case.input("given_uncertainty"))
    millimetres, uncertainties = head.absolute(located, case.input("intrinsics"))
    given_millimetres, given_uncertainties = head.absolute(given, case.input("intrinsics"))
    actual = {
        **named_weights(weights, ""),
        **named_weights(flipped, "_flipped"),
        "features_processed": features,
        "coords2d": located.pixels,
        "coords3d": located.metres,
        "uncertainties": located.uncertainties,
        "coords3d_abs": millimetres,
        "uncertainties_out": uncertainties,
        "given_abs": given_millimetres,
        "given_uncertainty_out": given_uncertainties,
    }
    limits = {
        "features_processed": "weights",
        "uncertainties_out": "uncertainties",
        "given_uncertainty_out": "uncertainties",
    }
    for name in case.expected_names():
        limit = "weights" if "_tensor" in name else limits.get(name, name)
        yield Comparison(name, actual[name], case.expected(name), atol=case.tolerance[limit])


def both_ways(straight: RelativePoints, mirrored: RelativePoints, is_flipped: Tensor) -> RelativePoints:
    """The rows of two results, in the order of the crops."""
    order = torch.cat([torch.nonzero(~is_flipped), torch.nonzero(is_flipped)])[:, 0].argsort()
    return RelativePoints(*(torch.cat(parts)[order] for parts in zip(straight, mirrored, strict=True)))


def named_weights(weights: PointWeights, suffix: str) -> dict[str, Tensor]:
    return {f"w_tensor{suffix}": weights.weight, f"b_tensor{suffix}": weights.bias}


@family("nlf-poses")
def poses(case: Case) -> Iterator[Comparison]:
    """Everything from frames and boxes to points, pixels and uncertainties, with the habits of the released programs."""
    settings, inputs = case.config, case.spec["inputs"]
    if settings["num_aug"] != 1:
        raise ValueError("one crop per box is made here, without test-time augmentation")
    # the stored numbers were made in float32 and in one batch
    quirks = NlfQuirks(linearise_twice=True, half_precision_crops=False, negative_odd_batches=True)
    estimator = NlfEstimator(config_of(settings), model_of(case), formula(inputs["points"]), quirks=quirks)
    frames = pictures_of(inputs["images"])
    rows_per_frame = json.loads(found(r"(\[\[.*\]\])", inputs["boxes"])[0])
    boxes = [torch.tensor(rows, dtype=torch.float32).reshape(-1, 5) for rows in rows_per_frame]
    intrinsics = default_intrinsics(settings["H"], settings["W"], settings["fov_degrees"])
    frame_of_box = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(rows) for rows in boxes]))
    of_box = intrinsics.expand(len(frame_of_box), 3, 3)
    cameras = look_at(torch.cat(boxes), of_box, settings["proc_side"])
    with several_threads():
        made = estimator.poses(frames, boxes, intrinsics)
    kept = kept_per_frame(made, boxes, settings["suppress_implausible"])
    actual = {
        "crops": estimator.crops(frames, frame_of_box, of_box, cameras),
        "crop_intrinsics": cameras.intrinsics,
        "crop_rotation": cameras.rotation,
        "poses3d": torch.cat([left.millimetres for left in kept]),
        "poses2d": torch.cat([left.pixels for left in kept]),
        "uncertainties": torch.cat([left.uncertainties for left in kept]),
        "boxes_left": torch.tensor([len(left) for left in kept]),
    }
    for name in case.expected_names():
        yield compared(name, actual[name], case.expected(name), case.tolerance)


def kept_per_frame(made: Poses, boxes: list[Tensor], suppress: bool) -> list[Poses]:
    """The people of each frame that are handed out, in order."""
    people = per_frame(made, [len(rows) for rows in boxes])
    return [here[best_first(here, rows)] if suppress else here for here, rows in zip(people, boxes, strict=True)]


@contextmanager
def several_threads() -> Iterator[None]:
    """Computes as the stored numbers were: one thread gets other convolution kernels, which round differently.

    With the random weights of these cases all points of a person fall within a tenth of a pixel, so its distance hangs
    on the last bits: a change of one rounding moves it by up to thirty millimetres, ten times the tolerance.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compared(name: str, actual: Tensor, expected: Tensor, tolerance: Mapping[str, Any]) -> Comparison:
    """By the rules that the poses cases state in words."""
    if not expected.numel():
        return Comparison(name, list(actual.shape), list(expected.shape))
    rule = tolerance.get(name.removeprefix("crop_"), 0.0)
    if isinstance(rule, str) and "relative to the largest" in rule:
        rule = float(rule.split()[0]) * expected.abs().max().item()
    elif isinstance(rule, str):
        limit, percent = found(rf"(\S+) for ({NUMBER})% of the values", rule)
        return within_for_most(name, actual, expected, float(limit), float(percent) / 100)
    return Comparison(name, actual, expected, atol=rule)


def within_for_most(name: str, actual: Tensor, expected: Tensor, atol: float, share: float) -> Comparison:
    """Passes when that share of the values is within `atol`."""
    if actual.shape != expected.shape:
        return Comparison(name, actual, expected)
    difference = (actual.double() - expected.double()).abs().flatten()
    worst = difference.kthvalue(int(np.ceil(share * difference.numel()))).values
    return Comparison(name, worst[None], torch.zeros(1), atol=atol)


def config_of(settings: Mapping[str, Any]) -> NlfConfig:
    return NlfConfig(
        proc_side=settings["proc_side"],
        stride=settings["stride"],
        centered_stride=settings["centered_stride"],
        depth=settings["depth"],
        box_size_m=settings["box_size_m"],
        uncertainty_bias=settings["uncert_bias"],
        fix_uncertainty_factor=settings["fix_uncert_factor"],
        weak_perspective=settings["weak"],
        pad_white_pixels=settings.get("pad_white_pixels", True),
    )


def model_of(case: Case) -> Any:
    """The crop model with one convolution for a backbone, as these cases have it."""
    weights = case.weights() | described_weights(case)
    kernel = weights["crop_model.backbone.1.weight"]
    out_channels, in_channels, side, _ = kernel.shape
    convolution = build_on_meta(lambda: nn.Conv2d(in_channels, out_channels, side, stride=side))
    return crop_model(
        weights, config_of(case.config), device=CPU, dtype=torch.float32, source=case.name, features=convolution
    )


def described_weights(case: Case) -> dict[str, Tensor]:
    """Tensors that the case states in words; the poses cases refer to the words of nlf-head."""
    text = case.spec["weights_note"]
    if "r_sqrt_eigva" not in text:
        text = Case("nlf-head", case.directory).spec["weights_note"]
    offset, scale = found(rf"r_sqrt_eigva = ({NUMBER})\+({NUMBER})\*n\(", text)
    name = f"{FIELD}r_sqrt_eigva"
    weights = {name: float(offset) + float(scale) * torch.from_numpy(normals(name, [case.config["field_posenc"]]))}
    for part in ("mini", "maxi", "center"):
        weights[f"{FIELD}gps_net.{part}"] = torch.tensor(json.loads(found(rf"{part}=(\[[^\]]*\])", text)[0]))
    return weights


def formula(text: str) -> Tensor:
    """`a*n("name",[shape])`: normal numbers of that name, scaled."""
    scale, name, shape = found(rf'({NUMBER})\*n\("(.+?)",\[(.+?)\]\)', text)
    return float(scale) * torch.from_numpy(normals(name, [int(size) for size in shape.split(",")]))


def pictures_of(text: str) -> Tensor:
    """`uint8 [n,3,H,W] = clip(round(a+b*n("name")),0,255)` -> frames [n, H, W, 3]."""
    shape, mean, spread, name = found(rf'uint8 \[(.+?)\] = clip\(round\(({NUMBER})\+({NUMBER})\*n\("(.+?)"\)\)', text)
    return picture_bytes(name, [int(size) for size in shape.split(",")], float(mean), float(spread))


def picture_bytes(name: str, shape: Any, mean: float = 127.5, spread: float = 60) -> Tensor:
    levels = np.clip(np.round(mean + spread * normals(name, shape).astype(np.float64)), 0, 255).astype(np.uint8)
    return torch.from_numpy(levels).permute(0, 2, 3, 1)


def found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"nothing like {pattern} in {text!r}")
    return match.groups()


@manifest("nlf_l_multi_0.3.2.eager.safetensors")
def nlf_l(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return checkpoint_problems(shapes)
