"""Clips to train on and to measure with: a reference picture, a driving clip, pose frames, a caption, and the true clip.

The true clip shows the character of the reference picture, in the same scene, moving as the driving figure does. Some
are as a ready pose video asks for them: own proportions, plain camera. The others are as the pose service asks for them
from a driving clip: the driving figure's proportions, seen by a camera that fits its first pose to the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.pose.draw import draw_clips
from services.pose.keypoints import openpose, split
from services.pose.people import People, pair_hands
from services.pose.quirks import Strokes
from training.figures.batched import Batched
from training.figures.cameras import as_camera, fitted_cameras, plain_cameras
from training.figures.captions import captions
from training.figures.characters import Characters, sample_characters
from training.figures.keypoints import boxes, whole_body
from training.figures.motion import Motions, joints, sample_motions, sample_stances
from training.figures.picture import render
from training.figures.scenes import Scenes, sample_scenes

STROKES = Strokes(capsule_radius_mm=38.0, head_radius_px=1, dot_radius_px=0)
"""Of the pose frames; what bundles/tiny says in its [pose] section."""
MOTLEY = 0.4


@dataclass(frozen=True)
class Stories(Batched):
    """What B clips show, before anything is drawn.

    Attributes:
        characters: of the reference pictures.
        shown: the same on the bodies that they have in the true clips.
        cameras: float32 [B, 4], that the true clips are seen with, see cameras.py; all others have the plain one.
        drivers: the figures of the driving clips.
        scenes, driver_scenes: of the true and the driving clips; the reference picture has no effects.
        motions: of T frames, of both clips; stances: of one frame, of the reference picture.
    """

    characters: Characters
    shown: Characters
    cameras: Tensor
    drivers: Characters
    scenes: Scenes
    driver_scenes: Scenes
    motions: Motions
    stances: Motions

    def __len__(self) -> int:
        return len(self.characters)

    def captions(self) -> list[str]:
        return captions(self.characters, self.motions, self.scenes)

    def joints(self) -> Tensor:
        """Of the true clips: float32 [B, T, 24, 3], millimetres."""
        return joints(self.shown, self.motions)

    def driving_joints(self) -> Tensor:
        """Of the driving clips: float32 [B, T, 24, 3]."""
        return joints(self.drivers, self.motions)

    def reference_joints(self) -> Tensor:
        """Of the reference pictures: float32 [B, 1, 24, 3]."""
        return joints(self.characters, self.stances)

    def draw_reference(self, height: int, width: int) -> Tensor:
        """uint8 [B, height, width, 3]."""
        plain = self.scenes.plain()
        return render(self.characters, self.reference_joints(), plain, height=height, width=width)[:, 0]

    def draw_target(self, height: int, width: int) -> Tensor:
        """uint8 [B, T, height, width, 3]."""
        return render(self.shown, self.joints(), self.scenes, height=height, width=width, cameras=self.cameras)

    def draw_pose(self, height: int, width: int, *, device: torch.device | str = "cpu", overlay: bool = True) -> Tensor:
        """uint8 [B, T, height, width, 3] on a device; the stories are on the CPU. See pose_frames."""
        drawn = self.shown, self.joints(), height, width
        return pose_frames(*drawn, cameras=self.cameras, device=device, overlay=overlay)

    def draw_driving(self, height: int, width: int) -> Tensor:
        """uint8 [B, T, height, width, 3]."""
        return render(self.drivers, self.driving_joints(), self.driver_scenes, height=height, width=width)


@dataclass(frozen=True)
class Batch:
    """Drawn clips; pixels uint8 on one device.

    Attributes:
        reference: [B, H, W, 3].
        target: [B, T, H, W, 3].
        driving: [B, T, H, W, 3], or no frames where they were not asked for.
        pose: float16 [B, T, H / 2, W / 2, 3], levels 0 to 255, as the pose service gives them.
        captions: B sentences.
        joints: float32 [B, T, 24, 3], of the target.
        stories: what is shown, on the CPU.
    """

    reference: Tensor
    target: Tensor
    driving: Tensor
    pose: Tensor
    captions: list[str]
    joints: Tensor
    stories: Stories


def sample_stories(
    count: int,
    generator: torch.Generator,
    *,
    frames: int,
    held_out: bool,
    motley: float = MOTLEY,
    effects: float = 0.3,
    fitted: float = 0.6,
) -> Stories:
    """Draws what clips show.

    Args:
        generator: of the CPU; the same seed gives the same stories.
        held_out: the split.
        motley, effects, fitted: shares of motley characters, of each effect, and of true clips that are as the pose
            service fits driving clips.
    """
    characters = sample_characters(count, generator, held_out=held_out, motley=motley)
    drivers = sample_characters(count, generator, held_out=held_out, motley=0.25)
    scenes = sample_scenes(count, generator, effects=effects)
    chosen = torch.rand(count, generator=generator) < fitted
    motions = sample_motions(count, frames, generator, held_out=held_out)
    stances = sample_stances(count, generator)
    first, standing = joints(drivers, motions.first())[:, 0], joints(characters, stances)[:, 0]
    cameras = torch.where(chosen[:, None], fitted_cameras(first, standing), plain_cameras(count))
    return Stories(
        characters=characters,
        shown=characters.with_bodies_of(drivers, chosen),
        cameras=cameras,
        drivers=drivers,
        scenes=scenes,
        driver_scenes=sample_scenes(count, generator, effects=0.0),
        motions=motions,
        stances=stances,
    )


def sample_batch(
    count: int,
    generator: torch.Generator,
    *,
    frames: int,
    height: int,
    width: int,
    held_out: bool,
    device: torch.device | str = "cpu",
    driving: bool = True,
    overlay: bool = True,
) -> Batch:
    """Draws clips on a device.

    Args:
        driving: whether driving clips are drawn, which takes as long as the true ones.
        overlay: whether face and hands are painted into the pose frames, which is done on the CPU.
    """
    stories = sample_stories(count, generator, frames=frames, held_out=held_out)
    there = stories.to(device)
    target = there.draw_target(height, width)
    return Batch(
        reference=there.draw_reference(height, width),
        target=target,
        driving=there.draw_driving(height, width) if driving else target[:, :0],
        pose=halved(stories.draw_pose(height, width, device=device, overlay=overlay)),
        captions=stories.captions(),
        joints=there.joints(),
        stories=stories,
    )


def pose_frames(
    characters: Characters,
    joints: Tensor,
    height: int,
    width: int,
    *,
    cameras: Tensor | None = None,
    strokes: Strokes = STROKES,
    device: torch.device | str = "cpu",
    overlay: bool = True,
) -> Tensor:
    """What the pose service draws of figures whose joints and keypoints it found exactly.

    Args:
        joints: float32 [B, T, 24, 3], on the CPU.
        cameras: float32 [B, 4]; None: the plain one.

    Returns:
        uint8 [B, T, height, width, 3] on the device.
    """
    seen_by = plain_cameras(len(joints)) if cameras is None else cameras
    clips = people(characters, joints, height, width, seen_by) if overlay else None
    each = [as_camera(row, height) for row in seen_by]
    return draw_clips(joints[:, :, None].numpy(), each, height, width, strokes, clips=clips, device=device)


def people(
    characters: Characters, joints: Tensor, height: int, width: int, cameras: Tensor | None = None
) -> list[list[People]]:
    """The figure of each clip and frame as the pose service keeps a person: [B][T]."""
    points, visible = whole_body(characters, joints, height, width, cameras)
    keypoints = openpose(points.flatten(0, 1).numpy(), visible.flatten(0, 1).numpy().astype(np.float64))
    parts = split((keypoints / [width, height, 1]).astype(np.float32))
    hands = pair_hands(parts.hands, "own")
    corners = boxes(characters, joints, height, width, cameras).flatten(0, 1).numpy() / [width, height, width, height]
    count, frames = joints.shape[:2]
    # slices of arrays of all frames: one person at a time would take longer than painting them
    each = [slice(index, index + 1) for index in range(count * frames)]
    found = [People(corners[i], parts.bodies[i], parts.visible[i], parts.faces[i], hands[i]) for i in each]
    return [found[begin : begin + frames] for begin in range(0, len(found), frames)]


def halved(frames: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] -> float16 [..., H / 2, W / 2, 3]: the mean of each 2 x 2 block, as services/pose/fit.halve."""
    *batch, height, width, channels = frames.shape
    blocks = frames.float().reshape(*batch, height // 2, 2, width // 2, 2, channels)
    return blocks.mean((-4, -2)).half()
