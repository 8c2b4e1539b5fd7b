"""Joints and keypoints of a clip -> pose frames, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from services.pose.overlay import overlay
from services.pose.people import Floats, People
from services.pose.quirks import PoseQuirks
from services.pose.render import DepthRange, View, render_clip
from services.pose.skeleton import Camera, limbs_of

_PALETTES = 2


def draw_clip(
    joints: Floats,
    clip: Sequence[People],
    camera: Camera,
    height: int,
    width: int,
    quirks: PoseQuirks,
    *,
    depth: DepthRange | None = None,
    device: torch.device | str = "cpu",
    chunk_frames: int = 16,
) -> Iterator[Tensor]:
    """Draws the pose frames of a clip.

    Args:
        joints: float32 [frames, people, 24, 3] millimetres, the largest person first; zero where one is not found.
        clip: of each frame, the people whose face and hands are painted.
        camera: Camera.of(height, width), or that of align().
        depth: the depths of the whole clip, where `joints` is a part of it.
        device: where to render.
        chunk_frames: how many frames to render at once, which bounds the memory: 12 bytes per pixel of each.

    Yields:
        uint8 [up to chunk_frames, height, width, 3] on the device; the model takes levels / 127.5 - 1.
    """
    if quirks.further_people == "omitted" and joints.shape[1] > _PALETTES:
        joints = joints[:, :_PALETTES]
        clip = [people.pick(range(min(len(people), _PALETTES))) for people in clip]
    if not quirks.draw_undetected:
        clip = [people if people.detected else people.pick([]) for people in clip]
    limbs = limbs_of(joints)
    # without a limb in the clip nothing is shaded, whatever the range
    depth = depth or DepthRange.of(limbs) or DepthRange(0.0, 0.0)
    view = View(height, width, camera, quirks.capsule_radius_mm, depth)
    for begin, frames in render_clip(limbs, view, device, chunk_frames):
        overlay(clip[begin : begin + len(frames)], height, width).cover(frames)
        yield frames
