"""The skeleton that SCAIL is shown: SMPL joints -> 13 limbs with colours, and the camera that sees them.

Joints are float32 [..., 24, 3] in millimetres, camera space (x right, y down, z forward), in SMPL's order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

FIELD_OF_VIEW_DEGREES = 55.0
NUM_SLOTS = 18
SLOT_JOINTS = (15, 12, 17, 19, 21, 16, 18, 20, 2, 5, 8, 1, 4, 7)
"""SMPL joint of the OpenPose slots 0 to 13; the slots 14 to 17 (eyes, ears) have none and stay zero."""
MIN_DEPTH_MM = 100.0
HEAD_JOINT, LEFT_WRIST_JOINT, RIGHT_WRIST_JOINT = 15, 20, 21

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Limb:
    """Two slots and what joins them is painted with: alone, as the first of several people, as a later one."""

    start: int
    end: int
    alone: Colour
    first: Colour
    later: Colour


# Source: zai-org/SCAIL-Pose 830da75 NLFPoseExtract/nlf_draw.py, nlf_render.py. In the order of drawing: at a joint that
# several limbs share, the earlier one is seen.
LIMBS = (
    Limb(1, 2, (255, 0, 0), (255, 150, 150), (255, 20, 20)),  # neck, right shoulder
    Limb(2, 3, (255, 85, 0), (255, 180, 140), (255, 60, 0)),
    Limb(3, 4, (255, 170, 0), (255, 215, 150), (255, 110, 0)),
    Limb(1, 5, (0, 255, 255), (180, 230, 240), (0, 230, 255)),  # neck, left shoulder
    Limb(5, 6, (0, 170, 255), (160, 200, 255), (0, 130, 255)),
    Limb(6, 7, (0, 85, 255), (100, 120, 255), (0, 70, 255)),
    Limb(1, 8, (180, 255, 0), (200, 255, 100), (160, 255, 40)),  # neck, right hip
    Limb(8, 9, (0, 255, 0), (100, 255, 100), (0, 255, 50)),
    Limb(9, 10, (0, 255, 85), (140, 255, 180), (0, 255, 100)),
    Limb(1, 11, (0, 0, 255), (120, 140, 255), (0, 0, 255)),  # neck, left hip
    Limb(11, 12, (85, 0, 255), (180, 90, 255), (80, 0, 255)),
    Limb(12, 13, (170, 0, 255), (190, 120, 255), (160, 0, 255)),
    Limb(1, 0, (150, 150, 150), (210, 210, 210), (130, 130, 130)),  # neck, head
)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera at the origin that looks along z; pixels, (0, 0) is the centre of the first one."""

    fx: float
    fy: float
    cx: float
    cy: float

    @classmethod
    def of(cls, height: int, width: int, field_of_view_degrees: float = FIELD_OF_VIEW_DEGREES) -> Camera:
        """The camera that the 3D estimator assumes, its principal point half a pixel further right and down.

        The field of view is that of the longer side.
        """
        focal = max(height, width) / (2 * math.tan(math.radians(field_of_view_degrees / 2)))
        return cls(focal, focal, width / 2, height / 2)

    @classmethod
    def from_matrix(cls, matrix: Floats) -> Camera:
        """Intrinsics [3, 3]."""
        return cls(float(matrix[0, 0]), float(matrix[1, 1]), float(matrix[0, 2]), float(matrix[1, 2]))

    def matrix(self) -> npt.NDArray[np.float64]:
        """Intrinsics [3, 3]."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]])

    def project(self, points: Floats) -> npt.NDArray[np.float64]:
        """Points [..., 3] before the camera -> pixels [..., 2], x first."""
        x, y, z = np.moveaxis(points.astype(np.float64), -1, 0)
        return np.stack([self.fx * x / z + self.cx, self.fy * y / z + self.cy], axis=-1)


@dataclass(frozen=True)
class Limbs:
    """What is to be rendered: C capsules per frame, 13 for each person, in the order of drawing.

    starts, ends [frames, C, 3] millimetres; drawn [frames, C]; colours [C, 3], 0 to 1.
    """

    starts: Floats
    ends: Floats
    drawn: Mask
    colours: Floats

    def __len__(self) -> int:
        return len(self.starts)

    def frames(self, begin: int, end: int) -> Limbs:
        """A part of the clip."""
        return Limbs(self.starts[begin:end], self.ends[begin:end], self.drawn[begin:end], self.colours)


def slots(joints: Floats) -> Floats:
    """SMPL joints [..., 24, 3] -> OpenPose slots [..., 18, 3]; slots without a joint are zero."""
    placed = np.zeros((*joints.shape[:-2], NUM_SLOTS, 3), joints.dtype)
    placed[..., : len(SLOT_JOINTS), :] = joints[..., SLOT_JOINTS, :]
    return placed


def known(points: Floats) -> Mask:
    """Points [..., 3] -> [...]: whether a point was found. The references mark a missing one by coordinates of sum 0."""
    return np.asarray(points.sum(axis=-1) != 0)


def without_near(joints: Floats) -> Floats:
    """Joints [..., 24, 3] with those of a person zeroed of whom a known one is nearer than MIN_DEPTH_MM: no person is
    there, whatever an estimator says, and such limbs cover the whole picture."""
    near = np.asarray((known(joints) & (joints[..., 2] < MIN_DEPTH_MM)).any(axis=-1))
    return np.where(near[..., None, None], joints.dtype.type(0), joints)


def limbs_of(joints: Floats) -> Limbs:
    """The limbs of a clip.

    Args:
        joints: [frames, people, 24, 3]; a person who is missing in a frame is zero there. Several people are painted in
            the palettes of several even if all but one are missing.
    """
    points = slots(joints)
    starts = points[:, :, [limb.start for limb in LIMBS]]
    ends = points[:, :, [limb.end for limb in LIMBS]]
    frames, people = joints.shape[:2]
    per_frame = (frames, people * len(LIMBS))
    return Limbs(
        starts=starts.reshape(*per_frame, 3),
        ends=ends.reshape(*per_frame, 3),
        drawn=(known(starts) & known(ends)).reshape(per_frame),
        colours=palette(people),
    )


def palette(people: int) -> Floats:
    """Colours of the limbs of that many people, [13 * people, 3], 0 to 1: from 0.15, so that no channel is black."""
    if people == 1:
        levels = [limb.alone for limb in LIMBS]
    else:
        levels = [limb.later if person else limb.first for person in range(people) for limb in LIMBS]
    return np.asarray(levels, np.float32).reshape(-1, 3) / np.float32(300) + np.float32(0.15)
