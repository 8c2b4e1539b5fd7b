"""Cases of what follows detection: choosing people, alignment to the reference picture, limbs, overlay, pose frames."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.pose.align import Correction, Landmarks, align, face_scale, landmarks, scale_face, shift, solve_camera
from services.pose.draw import draw_clip
from services.pose.overlay import overlay
from services.pose.people import Floats, People, grown_rectangle, largest, only_inside, pair_hands
from services.pose.quirks import PRESETS
from services.pose.render import DepthRange, View, render
from services.pose.skeleton import Camera, limbs_of, slots
from tests.parity.cases import Case, Comparison, normals
from tests.parity.families import family

QUIRKS = PRESETS["wan2gp"]
CLOSE_LEVELS, CLOSE_SHARE = 2, 0.85
FAIR_LEVELS, FAIR_SHARE = 16, 0.98
MASK_OVERLAP = 0.98
MEAN_LEVELS = 2.0
COST_EXCESS, ZOOM_LIMIT, PIXEL_LIMIT = 0.01, 0.01, 1.0
SAME_COST = 1 + 1e-6
MOVED_LIMIT = 1e-6


def array(case: Case, name: str) -> npt.NDArray[Any]:
    """A stored input."""
    return case.input(name).numpy()


def share(name: str, value: Tensor, least: float) -> Comparison:
    """A share that is right at 1 and good enough at `least`."""
    return Comparison(f"{name} {float(value):.4f}", value.double(), torch.ones((), dtype=torch.float64), 1 - least)


def people_at(case: Case, frame: int, boxes: Floats, prefix: str = "") -> People:
    """The stored 2D poses of a frame (or, with a prefix, of a picture); further rows than boxes are not people."""
    stored = [array(case, prefix + name) for name in ("candidate", "subset", "faces", "hands")]
    bodies, subset, faces, hands = (values if prefix else values[frame] for values in stored)
    count = max(len(boxes), 1)
    hands = pair_hands(hands, QUIRKS.hands)
    return People(boxes, bodies[:count], subset[:count] != -1, faces[:count], hands[:count])


def pictures(
    name: str, actual: Tensor, expected: Tensor, actual_mask: Tensor, expected_mask: Tensor
) -> Iterator[Comparison]:
    """The rule of rendered pictures uint8 [n, H, W, 3]: shares of the drawn pixels within two limits, overlap of masks."""
    levels = (actual.int() - expected.int()).abs()
    drawn = actual_mask | expected_mask
    worst = levels.amax(dim=-1)[drawn]
    yield share(f"{name} close", (worst <= CLOSE_LEVELS).double().mean(), CLOSE_SHARE)
    yield share(f"{name} fair", (worst <= FAIR_LEVELS).double().mean(), FAIR_SHARE)
    yield share(f"{name} masks", (actual_mask & expected_mask).sum() / drawn.sum(), MASK_OVERLAP)
    yield Comparison(f"{name} mean", levels.double().mean(), torch.zeros((), dtype=torch.float64), MEAN_LEVELS)


def coloured(frames: Tensor) -> Tensor:
    """Pixels that are not black."""
    return (frames != 0).any(dim=-1)


@family("pose-render")
def pose_render(case: Case) -> Iterator[Comparison]:
    """Joints to frames; the overlay also alone, over the stored frames, where it must be exact."""
    joints, expected = array(case, "joints"), case.expected("frames")
    height, width = case.config["H"], case.config["W"]
    camera = Camera.of(height, width, case.config["fov_degrees"])
    yield Comparison("coco", torch.from_numpy(slots(joints)), case.expected("coco"))
    intrinsics = torch.from_numpy(camera.matrix())
    yield Comparison("intrinsics", intrinsics, case.expected("intrinsics"), rtol=1e-6)
    limbs = limbs_of(joints)
    depth = DepthRange.of(limbs) or DepthRange(0.0, 0.0)
    frames, drawn = render(limbs, View(height, width, camera, case.config["radius"], depth))
    yield from pictures("frames", frames, expected[..., :3], drawn, expected[..., 3] > 0)
    if "frames_overlay" not in case.expected_names():
        return
    boxes = np.zeros((joints.shape[1], 4))
    painted = overlay([people_at(case, frame, boxes) for frame in range(len(joints))], height, width)
    goal = case.expected("frames_overlay")[..., :3]
    alone = expected[..., :3].clone()
    painted.cover(alone)
    yield Comparison("overlay", alone, goal)
    painted.cover(frames)
    yield from pictures("with overlay", frames, goal, coloured(frames), coloured(goal))


@family("pose-align")
def pose_align(case: Case) -> Iterator[Comparison]:
    """The camera solve, and scaling and shifting by the stored camera."""
    height, width = case.config["H"], case.config["W"]
    marks = Landmarks(array(case, "points3d"), array(case, "points2d"), np.array(case.config["weights"]))
    correction = solve_camera(marks, height, width)
    yield from solved(case, marks, correction, height, width)
    before, after = Camera.of(height, width), Camera.from_matrix(case.expected("K_new").numpy())
    faces, joints = array(case, "faces"), array(case, "joints")
    scale = face_scale(faces[0, 0], array(case, "ref_faces")[0], QUIRKS)
    found: dict[str, list[Floats]] = {
        name: [] for name in case.expected_names() if name.endswith(("_scaled", "_shifted"))
    }
    for frame, pose in enumerate(joints[:, 0]):
        bodies = array(case, "candidate")[frame]
        hands = pair_hands(array(case, "hands")[frame], QUIRKS.hands)
        people = People(np.zeros((1, 4)), bodies, np.ones(bodies.shape[:2], np.bool_), faces[frame], hands)
        scaled = scale_face(people, scale)
        shifted = shift(scaled, pose, before, after, height, width)
        for suffix, result in (("scaled", scaled), ("shifted", shifted)):
            values = {"candidate": result.bodies, "faces": result.faces, "hands": result.hands.reshape(-1, 21, 2)}
            for name, value in values.items():
                if f"{name}_{suffix}" in found:
                    found[f"{name}_{suffix}"].append(value)
    yield Comparison("face_scale", torch.tensor([scale]), case.expected("face_scale"), MOVED_LIMIT)
    for name, moved in found.items():
        yield Comparison(name, torch.from_numpy(np.stack(moved)), case.expected(name), MOVED_LIMIT)


def solved(case: Case, marks: Landmarks, correction: Correction, height: int, width: int) -> Iterator[Comparison]:
    """The rule of a camera solve: the cost, and the parameters where the stored ones are those of the least cost."""
    plain, stored = Camera.of(height, width), Camera.from_matrix(case.expected("K_new").numpy())
    reference = [stored.fx / plain.fx, stored.fy / stored.fx, stored.cx - plain.cx, stored.cy - plain.cy]
    own = [correction.m, correction.s, correction.p, correction.q]
    cross_check: Mapping[str, Any] = case.spec["cross_check"]
    cost = marks.cost(correction.apply(plain))
    goal = cross_check.get("reference_objective", marks.cost(stored))
    yield Comparison("cost", torch.tensor(max(cost - goal, 0.0)), torch.zeros(()), COST_EXCESS * goal)
    limits = torch.tensor([ZOOM_LIMIT, ZOOM_LIMIT, PIXEL_LIMIT, PIXEL_LIMIT])
    if goal <= cross_check.get("least_squares_objective", cost) * SAME_COST:
        yield Comparison("camera", torch.tensor(own) / limits, torch.tensor(reference) / limits, 1.0)


@family("pose-pipeline")
def pose_pipeline(case: Case) -> Iterator[Comparison]:
    """Detections and joints to pose frames, rendered with the stored camera where there is one."""
    height, width, inputs = case.config["H"], case.config["W"], case.spec["inputs"]
    boxes = [np.array(found, np.float64).reshape(-1, 4) for found in inputs["boxes"]]
    reference_boxes = np.array(inputs["ref_boxes"], np.float64).reshape(-1, 4)
    yield nlf_inputs(case, [*boxes, reference_boxes])
    joints = first_joints(array(case, "joints"), boxes)
    clip = [people_at(case, frame, found) for frame, found in enumerate(boxes)]
    # a reference that shows nobody stands for a request not to align
    reference = people_at(case, 0, reference_boxes if case.config["align_pose"] else reference_boxes[:0], "ref_")
    aligned = align(joints, clip, reference, height, width, QUIRKS)
    camera, drawn = aligned.camera, aligned.clip
    if aligned.start is not None:
        marks = landmarks(joints[aligned.start], reference, height, width)
        yield from same_landmarks(case, marks, joints[aligned.start], reference)
        correction = solve_camera(marks, height, width)
        yield from solved(case, marks, correction, height, width)
        camera = Camera.from_matrix(case.expected("K_new").numpy())
        drawn = with_camera(joints, clip, reference, camera, height, width)
    frames = torch.cat(list(draw_clip(joints[:, None], drawn, camera, height, width, QUIRKS, chunk_frames=1)))
    goal = case.expected("pose_video").permute(1, 2, 3, 0)
    yield from pictures("pose_video", frames, goal, coloured(frames), coloured(goal))


def same_landmarks(case: Case, marks: Landmarks, joints: Floats, reference: People) -> Iterator[Comparison]:
    """The points of the camera solve are those of the branch that the case names."""
    placed = slots(joints).astype(np.float64)
    upper = [slot for slot in (0, 2, 3, 5, 6) if reference.visible[0, slot] and placed[slot].sum() != 0]
    down = case.call["branch"].endswith("down")
    chosen = [1, 9, 10, 12, 13] if down else [1, *upper]
    weights = [1.0, *[4.0] * 4] if down else [8.0, *[1.0] * len(upper)]
    pixels = reference.bodies[0, chosen] * (case.config["W"], case.config["H"])
    yield Comparison("points", len(marks.points), case.call["points"])
    expected = {"points3d": placed[chosen], "points2d": pixels, "weights": np.array(weights)}
    for name, actual in (("points3d", marks.points), ("points2d", marks.pixels), ("weights", marks.weights)):
        yield Comparison(name, torch.from_numpy(actual), torch.from_numpy(expected[name]))


def with_camera(
    joints: Floats, clip: list[People], reference: People, camera: Camera, height: int, width: int
) -> list[People]:
    """What `align` moves, with a given camera instead of a solved one."""
    scale = face_scale(clip[0].faces[0], reference.faces[0], QUIRKS)
    scaled = [scale_face(people.pick([0]), scale) for people in clip]  # a whole frame where there is no box
    plain = Camera.of(height, width)
    return [shift(people, pose, plain, camera, height, width) for people, pose in zip(scaled, joints, strict=True)]


def first_joints(stored: Floats, boxes: Sequence[Floats]) -> Floats:
    """The joints of the first box of each frame [frames, 24, 3]; stored flat in the order of boxes, or per frame."""
    if len(stored) == len(boxes):
        return stored.reshape(len(boxes), -1, 24, 3)[:, 0]
    flat, first = stored.reshape(-1, 24, 3), np.cumsum([0, *(len(found) for found in boxes)])[:-1]
    return np.stack(
        [flat[at] if len(found) else np.zeros_like(flat[0]) for at, found in zip(first, boxes, strict=True)]
    )


def nlf_inputs(case: Case, boxes: list[Floats]) -> Comparison:
    """Sums of the pictures that the 3D estimator is given for every box of the video, then of the reference."""
    video = torch.from_numpy(np.tanh(described_normals(case, "video")))
    frames = ((video + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
    levels = np.round(127.5 + 50 * described_normals(case, "reference_image"))
    shown = [*frames, np.clip(levels, 0, 255).astype(np.uint8)]
    sums = [
        only_inside(picture, box).sum(dtype=np.float64)
        for picture, found in zip(shown, boxes, strict=True)
        for box in found
    ]
    return Comparison("nlf_input_sums", torch.tensor(sums), case.expected("nlf_input_sums"))


def described_normals(case: Case, name: str) -> Floats:
    """The normals of an input that is described in words around n("name",[shape])."""
    found = re.search(r'n\("([^"]+)",\s*\[([\d,\s]+)\]\)', case.spec["inputs"][name])
    if not found:
        raise ValueError(f"{case.name}: input {name} has no n(...): {case.spec['inputs'][name]!r}")
    return normals(found[1], [int(length) for length in found[2].split(",")])


@family("pose-pick")
def pose_pick(case: Case) -> Iterator[Comparison]:
    """The largest people of each frame, and the rectangles of their pictures."""
    first = np.array(case.config["boxes"], np.float64)
    count, names = case.config["num"], next(iter(case.spec["inputs"].values()))
    prefix = re.search(r'"(input:[^"]*?)c0"', names)
    if not prefix:
        raise ValueError(f"{case.name}: no names of inputs in {names!r}")
    picked: list[People] = []
    for frame in range(case.config["frames"]):
        boxes = first * np.array([1, 1, 1 + 0.1 * frame, 1])
        shapes = {"c": (24, 2), "s": (24,), "f": (68, 2)}
        bodies, subset, faces = (
            normals(f"{prefix[1]}{name}{frame}", (len(boxes), *shape)) for name, shape in shapes.items()
        )
        hands = pair_hands(normals(f"{prefix[1]}h{frame}", (2 * len(boxes), 21, 2)), QUIRKS.hands)
        people = People(boxes, bodies, subset != -1, faces, hands)
        picked.append(people.pick(largest(boxes, count)))
    yield Comparison("indices", largest(first, count), case.call["indices_first_frame"])
    results = {
        "candidate": [people.bodies for people in picked],
        "faces": [people.faces for people in picked],
        "hands": [people.hands.reshape(-1, 21, 2) for people in picked],
        "boxes": [people.boxes.astype(np.float32) for people in picked],
    }
    for name, values in results.items():
        yield Comparison(name, torch.from_numpy(np.stack(values)), case.expected(name))
    rectangles = case.expected("crop_rects")
    rows = [
        (*size, *grown_rectangle(box, *size))
        for size in dict.fromkeys((int(row[0]), int(row[1])) for row in rectangles)
        for box in first
    ]
    yield Comparison("crop_rects", torch.tensor(rows), rectangles)
