"""Cases of people in pictures: YOLOX boxes and RTMPose keypoints, everything but the two networks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.pose.detect import YoloxConfig, candidates, letterbox, suppress
from services.pose.keypoints import (
    crop,
    crop_transforms,
    crop_windows,
    decode_simcc,
    normalised,
    openpose,
    split,
    to_frame,
)
from tests.parity.cases import Case, Comparison, normals
from tests.parity.families import family

Floats = npt.NDArray[np.floating[Any]]
_NUMBER = r"[-+]?\d+(?:\.\d+)?"


@family("pose-yolox")
def pose_yolox(case: Case) -> Iterator[Comparison]:
    settings, tolerance = case.config, case.tolerance
    height, width = settings["input"]
    config = YoloxConfig(
        strides=tuple(settings["strides"]),
        person=settings["person_class"],
        candidate_threshold=settings["score_thr"],
        max_iou=settings["nms_thr"],
        threshold=settings["final_score"],
    )
    frame = picture(case)
    assert frame.shape[:2] == tuple(case.call["image_hw"])
    _, ratio = letterbox(frame, height, width)
    winners = suppress(candidates(raw_output(case)[0], height, width, ratio, config), config.max_iou)
    actual = {"person_dets": winners, "boxes": winners[winners[:, 4] > config.threshold, :4]}
    if "ratio" in case.call:
        yield compared("ratio", np.array([ratio]), torch.tensor([case.call["ratio"]], dtype=torch.float64), 1e-12)
    for name in case.expected_names():
        expected = case.expected(name)
        if name.startswith("letterbox"):
            canvas, _ = letterbox(frame, *expected.shape[1:])
            yield compared(name, canvas.transpose(2, 0, 1), expected, tolerance["letterbox"])
        else:
            yield compared(name, actual[name], expected, tolerance["atol"])


@family("pose-rtmpose")
def pose_rtmpose(case: Case) -> Iterator[Comparison]:
    frame = picture(case)
    height, width = frame.shape[:2]
    assert (height, width) == tuple(case.call["image_hw"])
    crop_width, crop_height = case.config["input_size_wh"]
    boxes = case.input("boxes").numpy()
    if not len(boxes):
        boxes = np.array([[0, 0, width, height]], np.float32)
    centres, sizes = crop_windows(boxes, crop_width / crop_height)
    transforms = crop_transforms(centres, sizes, crop_width)
    seen = np.stack([crop(frame, transform, crop_height, crop_width) for transform in transforms])
    simcc_x, simcc_y = (numbers(case, name) for name in ("simcc_x", "simcc_y"))
    places, scores = decode_simcc(simcc_x, simcc_y, case.config["simcc_split_ratio"])
    keypoints = to_frame(places, transforms)
    whole = openpose(keypoints, scores)
    parts = split(whole / [width, height, 1])
    actual = {
        "crop": normalised(seen),
        "center": centres,
        "scale": sizes,
        "warp": transforms,
        "keypoints": keypoints,
        "scores": scores,
        "op_keypoints": whole[..., :2],
        "op_scores": whole[..., 2],
        "body_candidate": parts.bodies,
        "body_subset": np.where(parts.visible, np.arange(parts.visible.shape[1]), -1),
        "faces": parts.faces,
        "hands": parts.hands,
        "boxes_norm": boxes / np.array([width, height, width, height]),
    }
    for name in case.expected_names():
        limit = rtmpose_tolerance(name, case.tolerance, max(height, width))
        yield compared(name, actual[name], case.expected(name), limit)


def rtmpose_tolerance(name: str, tolerance: dict[str, float], side: int) -> float:
    """The case names three limits: pixels have that of keypoints, fractions of the picture the same divided by its side."""
    if name == "body_subset":
        return 0.0
    if name in ("body_candidate", "faces", "hands", "boxes_norm"):
        return tolerance["keypoints"] / side
    return tolerance.get(name.removeprefix("op_"), tolerance["keypoints"])


def compared(name: str, actual: npt.NDArray[Any], expected: Tensor, atol: float) -> Comparison:
    if not expected.numel():
        # nothing found, as expected: all that there is to compare is the shape
        return Comparison(name, actual.shape, tuple(expected.shape))
    return Comparison(name, torch.from_numpy(np.ascontiguousarray(actual)), expected, atol=atol)


def picture(case: Case) -> npt.NDArray[np.uint8]:
    """`uint8 [H,W,3] = clip(round(a+b*n("name")),0,255)`, or `uint8 [H,W,3] by the image formula of CASE with name "x"`."""
    if "in.image" in case.stored:
        return np.asarray(case.stored["in.image"].numpy())
    text = case.spec["inputs"]["image"]
    shape = json.loads(found(r"uint8 (\[.+?\])", text)[0])
    other = re.search(r'by the image formula of (\S+) with name "(.+?)"', text)
    if other:
        text, name = Case(other[1], case.directory).spec["inputs"]["image"], f"input:{other[2]}"
    else:
        (name,) = found(r'n\("(.+?)"\)', text)
    mean, spread = found(rf"round\(({_NUMBER})\+({_NUMBER})\*n\(", text)
    levels = float(mean) + float(spread) * normals(name, shape).astype(np.float64)
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def numbers(case: Case, name: str) -> Floats:
    """`a*n("name",[shape])`: normal numbers of that name, scaled."""
    if f"in.{name}" in case.stored:
        return np.asarray(case.stored[f"in.{name}"].numpy())
    scale, recipe, shape = found(rf'({_NUMBER})\*n\("(.+?)",(\[.+?\])\)', case.spec["inputs"][name])
    return np.float32(scale) * normals(recipe, json.loads(shape))


def raw_output(case: Case) -> npt.NDArray[np.float32]:
    """`[1,cells,85] float32: [...,a:b]=FORMULA; ...`, FORMULA being `x+s*n(name:part,[shape])` or `sigmoid(s*n(...)-x)`."""
    if "in.raw" in case.stored:
        return np.asarray(case.stored["in.raw"].numpy())
    text = case.spec["inputs"]["raw"]
    raw = np.zeros(json.loads(found(r"^(\[.+?\])", text)[0]), np.float32)
    (prefix,) = found(r'the input name "(.+?):\.\.\."', text)
    parts = re.findall(r"\[\.\.\.,(\d*)(:?)(\d*)\]=([^;]+);", text)
    for first, colon, last, formula in parts:
        low = int(first)
        high = int(last) if last else raw.shape[-1] if colon else low + 1
        raw[..., low:high] = evaluated(formula, prefix)
    assert len(parts) == text.count("[...,")
    return raw


def evaluated(formula: str, prefix: str) -> Floats:
    """`[x+]s*n(name:part,[shape])`, or `sigmoid(s*n(name:part,[shape])-x)` in float64, rounded to float32."""
    before, scale, part, shape, after = found(
        rf"(?:({_NUMBER})\+)?({_NUMBER})\*n\(name:(\w+),(\[.+?\])\)({_NUMBER})?", formula
    )
    values = normals(f"{prefix}:{part}", json.loads(shape))
    if "sigmoid" in formula:
        logits = float(scale) * values.astype(np.float64) + float(after or 0)
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    return np.float32(before or 0) + np.float32(scale) * values


def found(pattern: str, text: str) -> tuple[Any, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"nothing like {pattern} in {text!r}")
    return match.groups()
