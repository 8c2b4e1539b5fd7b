"""Draws what the pose models learn from: frames of clips and portraits of figures, near and far, and some of nobody."""

from __future__ import annotations

import torch
from torch import Tensor

from services.pose.skeleton import Camera
from training.figures import FRAMES, SIDE
from training.figures.characters import sample_characters
from training.figures.keypoints import boxes, whole_body
from training.figures.motion import joints, sample_motions, sample_stances
from training.figures.picture import render
from training.figures.scenes import sample_scenes
from training.pose_models.pictures import Pictures

_FRAMES_OF_CLIP = (0, 6, 11, FRAMES - 1)
_PORTRAITS, _NOBODY, _AS_DRAWN = 0.2, 0.04, 0.4
# how large figures appear, of how large the generator makes them
_SIZES = (0.45, 1.1)
_MOTLEY = 0.4
_TOGETHER = 512
_OUT_OF_SIGHT_MM = 1e6


def draw(count: int, seed: int, device: torch.device, *, held_out: bool) -> Pictures:
    """`count` pictures on the device; the same ones for the same seed.

    Args:
        held_out: of which split of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[Pictures] = []
    left = count
    while left > 0:
        portraits = torch.rand((), generator=generator).item() < _PORTRAITS
        parts.append(_some(min(_TOGETHER, left), portraits, generator, device, held_out))
        left -= len(parts[-1])
    return Pictures.joined(parts)[:count]


def _some(count: int, portraits: bool, generator: torch.Generator, device: torch.device, held_out: bool) -> Pictures:
    """At least `count` pictures: of portraits one of each figure, else several of each clip."""
    figures = count if portraits else -(-count // len(_FRAMES_OF_CLIP))
    characters = sample_characters(figures, generator, held_out=held_out, motley=_MOTLEY)
    scenes = sample_scenes(figures, generator).to(device)
    if portraits:
        posed = joints(characters, sample_stances(figures, generator))
    else:
        posed = joints(characters, sample_motions(figures, FRAMES, generator, held_out=held_out))
        posed = posed[:, list(_FRAMES_OF_CLIP)]
    placed, shown = elsewhere(posed, SIDE, generator)
    characters, placed = characters.to(device), placed.to(device)
    frames = render(characters, placed, scenes, height=SIDE, width=SIDE)
    points, visible = whole_body(characters, placed, SIDE, SIDE)
    found = boxes(characters, placed, SIDE, SIDE)
    shown = shown.to(device)[:, None].expand(found.shape[:2])
    each = (frames, found, shown, points, visible, placed)
    return Pictures(*(values.flatten(0, 1) for values in each))


def elsewhere(posed: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Figures moved away from the camera or towards it, and aside as far as they then have room; some out of sight.

    Args:
        posed: [B, T, 24, 3], millimetres.

    Returns:
        the same after that, and bool [B]: who is still in sight.
    """
    count = len(posed)
    low, high = _SIZES
    size = low + (high - low) * torch.rand(count, 1, 1, generator=generator)
    size = torch.where(torch.rand(count, 1, 1, generator=generator) < _AS_DRAWN, 1.0, size)
    middle = posed.mean(dim=(1, 2), keepdim=True)[:, 0]  # [B, 1, 3]
    aside = (torch.rand(count, 1, 2, generator=generator) * 2 - 1) * 0.4 * (1 - size).clamp(min=0) * side
    moved = middle * (1 / size - 1)
    moved[..., :2] += aside * (middle[..., 2:] / size) / Camera.of(side, side).fx
    shown = torch.rand(count, generator=generator) >= _NOBODY
    moved[..., 0] = torch.where(shown[:, None], moved[..., 0], _OUT_OF_SIGHT_MM)
    return posed + moved[:, None], shown
