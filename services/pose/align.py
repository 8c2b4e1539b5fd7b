"""Fits a driving person to the reference picture: one camera for the whole clip, and the face and hands moved with it.

The driving joints stay as they are; the camera is changed so that the first driving pose is seen where the reference
person stands. 2D points follow by the shift of the joint they hang on. One person only.

Source: zai-org/SCAIL-Pose 830da75 NLFPoseExtract/process_pose.py, align3d.py; Wan2GP 8681e9f models/wan/scail.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from services.pose.people import Floats, People
from services.pose.quirks import PoseQuirks
from services.pose.skeleton import (
    HEAD_JOINT,
    LEFT_WRIST_JOINT,
    RIGHT_WRIST_JOINT,
    SLOT_JOINTS,
    Camera,
    known,
    slots,
)

Doubles = npt.NDArray[np.float64]

_NECK = 1
_UPPER, _LOWER = (0, 2, 3, 5, 6), (9, 10, 12, 13)
_M_BOUNDS, _S_BOUNDS = (0.7, 1.4), (0.8, 1.15)
_FACE_SCALE_BOUNDS = (0.8, 1.5)
_NOSE_TIP, _NOSE = 30, 0
_MIN_DEPTH_MM = 0.01


@dataclass(frozen=True)
class Correction:
    """How the driving camera is changed: focal length times m, its vertical part also times s, centre moved by p, q."""

    m: float
    s: float
    p: float
    q: float

    def apply(self, camera: Camera) -> Camera:
        return Camera(camera.fx * self.m, camera.fy * self.m * self.s, camera.cx + self.p, camera.cy + self.q)


@dataclass(frozen=True)
class Landmarks:
    """What a camera is solved for: points [k, 3] millimetres, where they should be seen [k, 2] pixels, weights [k]."""

    points: Doubles
    pixels: Doubles
    weights: Doubles

    def cost(self, camera: Camera) -> float:
        """Weighted sum of squared distances, pixels."""
        distances = ((camera.project(self.points) - self.pixels) ** 2).sum(axis=-1)
        return float((self.weights * distances).sum())


@dataclass(frozen=True)
class Aligned:
    """What is to be drawn, and from where it is seen. `start` is the driving frame the camera was solved for, None where
    nothing was aligned."""

    camera: Camera
    clip: list[People]
    start: int | None


def align(
    joints: Floats, clip: Sequence[People], reference: People, height: int, width: int, quirks: PoseQuirks
) -> Aligned:
    """Aligns a clip of one person.

    Args:
        joints: float32 [frames, 24, 3] of the best detection of each frame, zero where there is none.
        clip: the people of each frame, the one to be drawn first; there may be none.
        reference: the people of the reference picture, of the size of the clip.

    Returns:
        The camera, and the people to paint. Where the reference or the driving clip shows nobody the camera is the
        plain one and nothing is moved.
    """
    plain = Camera.of(height, width)
    found = np.flatnonzero(known(joints).any(axis=1))
    if not reference.detected or not len(found):
        drawn = list(clip) if quirks.unaligned_overlay == "everyone" else [_first(people) for people in clip]
        return Aligned(plain, drawn, None)
    start = int(found[0])
    marks = landmarks(joints[start], reference, height, width)
    correction = solve_camera(marks, height, width)
    camera = correction.apply(plain)
    compared = clip[start if quirks.face_scale_frame == "aligned" else 0]
    scale = face_scale(compared.faces[0], reference.faces[0], quirks) if len(compared) else 1.0
    moved = []
    for pose, people in zip(joints, clip, strict=True):
        person = scale_face(_first(people), scale)
        if quirks.scale_hands:
            person = scale_hands(person, correction)
        moved.append(shift(person, pose, plain, camera, height, width))
    return Aligned(camera, moved, start)


def _first(people: People) -> People:
    return people.pick(range(min(len(people), 1)))


def landmarks(joints: Floats, reference: People, height: int, width: int) -> Landmarks:
    """Pairs a driving pose [24, 3] with the 2D pose of the reference's first person.

    The neck, and knees and ankles where all four are known; else the neck, and what is known of nose, shoulders and
    elbows. Legs weigh more than the neck, which weighs more than arms.
    """
    points = slots(joints)[: len(SLOT_JOINTS)].astype(np.float64)
    usable = reference.visible[0, : len(points)] & known(points)
    if all(usable[index] for index in _LOWER):
        chosen, neck_weight, weight = [_NECK, *_LOWER], 1.0, 4.0
    else:
        chosen, neck_weight, weight = [_NECK, *(index for index in _UPPER if usable[index])], 8.0, 1.0
    pixels = reference.bodies[0, chosen].astype(np.float64) * (width, height)
    weights = np.array([neck_weight] + [weight] * (len(chosen) - 1))
    seen = points[chosen, 2] > _MIN_DEPTH_MM
    return Landmarks(points[chosen][seen], pixels[seen], weights[seen])


def solve_camera(marks: Landmarks, height: int, width: int) -> Correction:
    """The camera correction of the least cost: m in [0.7, 1.4], s in [0.8, 1.15], p and q within a picture's size.

    In (m, m s, p, q) the cost is a sum of squares and every bound is linear, so the least cost within the bounds is the
    least of the unbounded solutions on all combinations of bounds that are met with equality: 81 small linear systems,
    no start and no steps. The references search for the same minimum from (1, 1, 0, 0).
    """
    rays = Camera.of(height, width).project(marks.points) - np.array([width / 2, height / 2])
    goals = marks.pixels - np.array([width / 2, height / 2])
    roots = np.sqrt(marks.weights)
    zeros = np.zeros_like(roots)
    # rows: horizontal, then vertical distances; columns: m, m s, p, q
    across = np.stack([rays[:, 0] * roots, zeros, roots, zeros], axis=-1)
    down = np.stack([zeros, rays[:, 1] * roots, zeros, roots], axis=-1)
    matrix = np.concatenate([across, down])
    target = np.concatenate([goals[:, 0] * roots, goals[:, 1] * roots])
    best: tuple[float, Correction] | None = None
    for origin, directions in _faces_of_bounds(height, width):
        step = np.linalg.lstsq(matrix @ directions, target - matrix @ origin, rcond=None)[0] if directions.size else 0
        m, n, p, q = origin + (directions @ step if directions.size else 0)
        correction = Correction(float(m), float(n / m) if m else 0.0, float(p), float(q))
        cost = float(((matrix @ (m, n, p, q) - target) ** 2).sum())
        if _within(correction, height, width) and (best is None or cost < best[0]):
            best = cost, correction
    assert best is not None  # the corners of the bounds are within them
    return best[1]


def _faces_of_bounds(height: int, width: int) -> list[tuple[Doubles, Doubles]]:
    """All combinations of bounds met with equality: a point (m, m s, p, q) and the directions [4, free] from it."""
    faces = []
    for m, s, p, q in itertools.product(
        (None, *_M_BOUNDS), (None, *_S_BOUNDS), (None, -width, width), (None, -height, height)
    ):
        origin = np.array([m or 1.0, (m or 1.0) * (s or 1.0), p or 0.0, q or 0.0])
        directions = []
        if m is None:
            directions.append([1.0, s or 0.0, 0.0, 0.0])
        if s is None:
            directions.append([0.0, 1.0, 0.0, 0.0])
        if p is None:
            directions.append([0.0, 0.0, 1.0, 0.0])
        if q is None:
            directions.append([0.0, 0.0, 0.0, 1.0])
        faces.append((origin, np.array(directions).reshape(-1, 4).T))
    return faces


def _within(correction: Correction, height: int, width: int) -> bool:
    """Whether a correction meets the bounds, but for rounding."""
    values = (correction.m, correction.s, correction.p, correction.q)
    bounds = (_M_BOUNDS, _S_BOUNDS, (-width, width), (-height, height))
    return all(low - 1e-9 <= value <= high + 1e-9 for value, (low, high) in zip(values, bounds, strict=True))


def face_scale(driving: Floats, reference: Floats, quirks: PoseQuirks) -> float:
    """How much larger the reference's face [68, 2] is than the driving one: the ratio of mean distances to the nose tip,
    0.8 to 1.5; 1 where it cannot be told."""
    others = np.arange(len(driving)) != _NOSE_TIP
    if quirks.face_scale_points == "visible":
        visible = np.asarray((driving >= 0).all(axis=-1) & (reference >= 0).all(axis=-1))
        others &= visible
        if not visible[_NOSE_TIP] or not others.any():
            return 1.0
    sizes = [np.linalg.norm(face[others] - face[_NOSE_TIP], axis=-1).mean() for face in (reference, driving)]
    if sizes[1] < 1e-6:
        return 1.0
    return float(np.clip(sizes[0] / sizes[1], *_FACE_SCALE_BOUNDS))


def scale_face(people: People, scale: float) -> People:
    """Scales faces about the tip of the nose, and eyes and ears (with the rest of the body) about the nose."""
    tips, noses = people.faces[:, _NOSE_TIP, None], people.bodies[:, _NOSE, None]
    return replace(people, faces=tips + (people.faces - tips) * scale, bodies=noses + (people.bodies - noses) * scale)


def scale_hands(people: People, correction: Correction) -> People:
    """Scales every hand about its wrist as the camera scales the body; hands without a visible wrist stay."""
    wrists = people.hands[:, :, :1]
    scaled = wrists + (people.hands - wrists) * np.array([correction.m, correction.m * correction.s])
    seen = (wrists >= 0).all(axis=-1, keepdims=True)
    return replace(people, hands=np.where(seen, scaled, people.hands))


def shift(people: People, joints: Floats, before: Camera, after: Camera, height: int, width: int) -> People:
    """Moves the face and the head with the head joint, and the hands with the wrists, of one pose [24, 3]."""
    hung = joints[[HEAD_JOINT, LEFT_WRIST_JOINT, RIGHT_WRIST_JOINT]]
    in_front = hung[:, 2:] > _MIN_DEPTH_MM
    hung = np.where(in_front, hung, np.float32(1))
    moved = np.where(in_front, after.project(hung) - before.project(hung), 0) / np.array([width, height])
    return replace(
        people, bodies=people.bodies + moved[0], faces=people.faces + moved[0], hands=people.hands + moved[1:, None]
    )
