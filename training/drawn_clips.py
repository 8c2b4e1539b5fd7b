"""Drawn clips in numbers, for training: stories and overlays on all CPU cores, pictures on the GPU.

A set of clips is that of its seed and its split, whatever the device and the number of cores.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

import torch
from torch import Tensor

from services.pose.overlay import Overlay, overlay
from training.figures import FRAMES, SIDE, picture
from training.figures.clips import STROKES, Stories, halved, people, sample_stories

_CLIPS_AT_ONCE = 128
_CHUNKS_AHEAD = 2  # per core, that wait to be drawn


@dataclass(frozen=True)
class Drawn:
    """Clips on a device, one per row.

    Attributes:
        reference: uint8 [N, side, side, 3].
        target: uint8 [N, frames, side, side, 3].
        figure: bool [N, frames, side, side], where the target shows the figure.
        pose: float16 [N, frames, side / 2, side / 2, 3], levels.
        captions: N sentences.
    """

    reference: Tensor
    target: Tensor
    figure: Tensor
    pose: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.target)


def draw(
    count: int, *, seed: int, held_out: bool, device: torch.device, side: int = SIDE, frames: int = FRAMES
) -> Iterator[Drawn]:
    """Draws clips, so many at a time as fit in memory.

    Args:
        seed: sets of different seeds have nothing in common.
        held_out: the split of characters and motions.
        side: of the pictures, pixels.
    """
    sizes = [min(_CLIPS_AT_ONCE, count - begin) for begin in range(0, count, _CLIPS_AT_ONCE)]
    cores = len(os.sched_getaffinity(0))
    tasks = ((size, seed * 100_000 + number, held_out, side, frames) for number, size in enumerate(sizes))
    # not forked from this process, which may hold a CUDA context, but from one that has only imported this module
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(cores, mp_context=context, initializer=_single_threaded) as pool:
        waiting: list[Future[bytes]] = [pool.submit(_prepared, *task) for task in islice(tasks, cores * _CHUNKS_AHEAD)]
        while waiting:
            stories, painted = pickle.loads(waiting.pop(0).result())
            waiting += [pool.submit(_prepared, *task) for task in islice(tasks, 1)]
            yield _drawn(stories, painted, side, device)


def _single_threaded() -> None:
    torch.set_num_threads(1)


def _prepared(count: int, seed: int, held_out: bool, side: int, frames: int) -> bytes:
    """What is done on the CPU: the stories of some clips, and their faces and hands; pickled, as tensors in shared
    memory would each hold a file open."""
    stories = sample_stories(count, torch.Generator().manual_seed(seed), frames=frames, held_out=held_out)
    return pickle.dumps((stories, _painted(stories, side)))


def _painted(stories: Stories, side: int) -> Overlay:
    clips = people(stories.shown, stories.joints(), side, side, stories.cameras)
    return overlay([person for clip in clips for person in clip], side, side, STROKES)


def _drawn(stories: Stories, painted: Overlay, side: int, device: torch.device) -> Drawn:
    pose = stories.draw_pose(side, side, device=device, overlay=False)
    painted.cover(pose.flatten(0, 1))
    there = stories.to(device)
    target = there.draw_target(side, side)
    return Drawn(
        reference=there.draw_reference(side, side),
        target=target,
        figure=(target != without_figures(there, side)).any(dim=-1),
        pose=halved(pose),
        captions=stories.captions(),
    )


def without_figures(stories: Stories, side: int) -> Tensor:
    """The scenes of the true clips with nobody in them but a shadow: uint8 [N, frames, side, side, 3]."""
    joints, scenes = stories.joints(), stories.scenes
    batch, frames = joints.shape[:2]
    each = torch.arange(batch, device=joints.device).repeat_interleave(frames)
    shadows = picture.shadows(joints.flatten(0, 1), side, stories.cameras[each] * side)
    canvas = picture.background(scenes, side, side)[each]
    canvas = picture.paint(canvas, shadows, shaded=False, strength=0.22)
    canvas = picture.lit(canvas, scenes.night[each], side, side)
    times = torch.arange(frames, device=joints.device).repeat(batch)
    canvas = picture.snowed(canvas, scenes.snow[each], times, side, side)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8).reshape(batch, frames, side, side, 3)
