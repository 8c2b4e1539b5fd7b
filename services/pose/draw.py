"""Joints and keypoints -> pose frames: of one clip, a few frames at a time; or of many small clips at once.

`draw_clips` is for training on drawn clips: on a GPU it is given some hundred clips of small pictures per call, which
costs a few kernels in all, and gives them as one tensor on the device. See benchmarks/pose_render.py --clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from services.pose.overlay import overlay
from services.pose.people import Floats, People
from services.pose.quirks import REFERENCE_STROKES, PoseQuirks, Strokes
from services.pose.render import DepthRange, View, render, render_clip
from services.pose.skeleton import Camera, limbs_of
from services.pose.threads import ahead

_PALETTES = 2
_PIXELS_AT_ONCE = 1 << 25
"""Bounds the memory of drawing many clips: 12 bytes per pixel, and 1 per limb and 64 pixels."""


def draw_clip(
    joints: Floats,
    clip: Sequence[People],
    camera: Camera,
    height: int,
    width: int,
    quirks: PoseQuirks,
    strokes: Strokes = REFERENCE_STROKES,
    *,
    depth: DepthRange | None = None,
    device: torch.device | str = "cpu",
    chunk_frames: int = 16,
    tiles_at_once: int | None = None,
) -> Iterator[Tensor]:
    """Draws the pose frames of a clip.

    Args:
        joints: float32 [frames, people, 24, 3] millimetres, the largest person first; zero where one is not found.
        clip: of each frame, the people whose face and hands are painted.
        camera: Camera.of(height, width), or that of align().
        depth: the depths of the whole clip, where `joints` is a part of it.
        device: where to render.
        chunk_frames: how many frames to render at once, which bounds the memory: 12 bytes per pixel of each.
        tiles_at_once: as for render.render.

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
    view = View(height, width, camera, strokes.capsule_radius_mm, depth)
    chunks = (clip[begin : begin + chunk_frames] for begin in range(0, len(limbs), chunk_frames))
    # hands and faces take the processor as long as limbs take a GPU: they are painted beside each other
    with closing(ahead(chunks, 1, lambda chunk: overlay(chunk, height, width, strokes))) as overlays:
        rendered = render_clip(limbs, view, device, chunk_frames, tiles_at_once)
        for (_, frames), over in zip(rendered, overlays, strict=True):
            over.cover(frames)
            yield frames


def halved(frames: Tensor) -> Tensor:
    """uint8 [n, H, W, 3], H and W even -> float16 [n, H / 2, W / 2, 3], as fit.halve, on any device."""
    rows = frames[:, 0::2].to(torch.int16) + frames[:, 1::2]
    sums = rows[:, :, 0::2] + rows[:, :, 1::2]
    return (sums.float() * 0.25).half()


def draw_clips(
    joints: Floats,
    cameras: Sequence[Camera],
    height: int,
    width: int,
    strokes: Strokes = REFERENCE_STROKES,
    *,
    clips: Sequence[Sequence[People]] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draws many clips of one length and size at once, each as draw_clip does: with its own camera and range of depths.

    Limbs are drawn in chunks of bounded memory; hands and faces are painted on the CPU, which takes most of the time.

    Args:
        joints: float32 [clips, frames, people, 24, 3] millimetres; zero where a person is not in a frame.
        cameras: of each clip.
        strokes: how thick; small pictures need a larger capsule radius and smaller dots.
        clips: of each clip and frame, the people whose face and hands are painted; None: nobody's are.

    Returns:
        uint8 [clips, frames, height, width, 3] on the device.
    """
    count, num_frames = joints.shape[:2]
    limbs = limbs_of(joints.reshape(-1, *joints.shape[2:]))
    views = []
    for index, camera in enumerate(cameras):
        depth = DepthRange.of(limbs.frames(index * num_frames, (index + 1) * num_frames)) or DepthRange(0.0, 0.0)
        views += [View(height, width, camera, strokes.capsule_radius_mm, depth)] * num_frames
    drawn = torch.empty((count * num_frames, height, width, 3), dtype=torch.uint8, device=device)
    at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    people = [frame for clip in clips for frame in clip] if clips is not None else None
    for begin in range(0, count * num_frames, at_once):
        chunk = slice(begin, begin + at_once)
        drawn[chunk], _ = render(limbs.frames(begin, begin + at_once), views[chunk], device)
        if people is not None:
            overlay(people[chunk], height, width, strokes).cover(drawn[chunk])
    return drawn.view(count, num_frames, height, width, 3)
