"""What is missing of people in some frames, filled in from their neighbours; and what is too long to be filled in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.pose.progress import Gaps
from services.pose.skeleton import known
from services.pose.whole_body import Person, bridge

Float32s = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


def bridge_joints(joints: Float32s) -> tuple[Float32s, list[int]]:
    """Joints [num_frames, 24, 3] with the frames that have none filled in, and the indices of those.

    As whole_body.bridge: in a straight line between neighbours, standing still before the first and after the last. At
    least one frame has joints.
    """
    found = known(joints).any(axis=1)
    at, missing = np.flatnonzero(found), np.flatnonzero(~found)
    filled = joints.copy()
    flat = filled.reshape(len(joints), -1)
    for column in flat.T:
        column[missing] = np.interp(missing, at, column[at])
    return filled, missing.tolist()


def bridge_person(
    persons: Sequence[Person | None], joints: Float32s, longest: int
) -> tuple[list[Person | None], Float32s, Gaps]:
    """One of several people through a clip, with what is missing for no more than `longest` frames filled in.

    Who is missing for longer has left the picture, and is left out until they come back. Hands and face of somebody
    whose joints are not known are left out too.

    Args:
        persons: the detections of the person, None where there is none.
        joints: [num_frames, 24, 3], zero where not located; also where there is no detection some may be.

    Returns:
        both of them, and the gaps.
    """
    seen: Flags = np.array([person is not None for person in persons])
    located: Flags = np.asarray(known(joints).any(axis=1))
    drawn = located | short_gaps(located, longest) if located.any() else located
    shown = (seen | short_gaps(seen, longest)) & drawn if seen.any() else seen
    filled = bridge(persons)[0] if seen.any() else []
    joints = np.where(drawn[:, None, None], bridge_joints(joints)[0], np.float32(0)) if located.any() else joints
    bridged = (drawn & ~located) | (shown & ~seen)
    gaps = Gaps(tuple(np.flatnonzero(bridged).tolist()), tuple(np.flatnonzero(~drawn).tolist()))
    return [filled[index] if shown[index] else None for index in range(len(persons))], joints, gaps


def short_gaps(found: Flags, longest: int) -> Flags:
    """The frames of gaps, runs of False, that are no longer than that."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], found, [True]]).astype(np.int8)))
    short = np.zeros(len(found), np.bool_)
    for begin, end in edges.reshape(-1, 2):
        short[begin:end] = end - begin <= longest
    return short
