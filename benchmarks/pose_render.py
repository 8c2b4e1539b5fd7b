"""How fast pose frames are drawn: `python -m benchmarks.pose_render [--device cuda] [--peer]`.

Beside each rate stands its floor, the time to write the bytes of the frames once on the same device, and with --peer
the rate of marching along every ray as the reference renderers do, in PyTorch on the same device (a frame only).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from services.pose.draw import draw_clips
from services.pose.overlay import overlay
from services.pose.people import Floats, People
from services.pose.quirks import Strokes
from services.pose.render import DepthRange, View, render_clip
from services.pose.skeleton import SLOT_JOINTS, Camera, Limbs, limbs_of

SIZES = ((896, 512), (512, 896), (1280, 720))
PEOPLE = (1, 2, 5)
STANDING = (
    (0, -560), (0, -450), (-170, -400), (-260, -150), (-280, 90), (170, -400), (260, -150), (280, 90),
    (-100, 60), (-120, 470), (-130, 880), (100, 60), (120, 470), (130, 880),
)  # fmt: skip
"""x and y of the 14 joints that are drawn, millimetres."""
DISTANCE_MM, SWAY_MM = 2600, 120
MARCH_STEPS = 300


def dancing(frames: int, people: int) -> Floats:
    """Joints [frames, people, 24, 3] of people who sway, side by side, the later ones further away."""
    joints = np.zeros((frames, people, 24, 3), np.float32)
    joints[..., SLOT_JOINTS, :2] = np.array(STANDING, np.float32)
    phase = np.arange(frames)[:, None, None] / 8 + np.arange(24)
    joints[..., :2] += SWAY_MM * np.stack([np.sin(phase), np.cos(phase)], axis=-1) / 2
    joints[..., 2] = DISTANCE_MM + SWAY_MM * np.sin(phase * 1.3)
    joints[..., 0] += 350 * (np.arange(people) - (people - 1) / 2)[:, None]
    joints[..., 2] += 300 * np.arange(people)[:, None]
    return joints


def keypoints(people: int) -> People:
    """Faces and hands at random places: as many strokes as real ones."""
    generator = np.random.default_rng(0)
    centres = generator.uniform(0.3, 0.7, (people, 1, 2))

    def about(*shape: int) -> Floats:
        spread = centres if len(shape) == 1 else centres[:, None]
        return spread + generator.normal(0, 0.02, (people, *shape, 2))

    return People(np.zeros((people, 4)), about(24), np.ones((people, 24), np.bool_), about(68), about(2, 21))


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The best time of some runs after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def march(limbs: Limbs, view: View, device: torch.device) -> torch.Tensor:
    """Depths of the first frame by stepping along each ray by the distance to the nearest limb."""
    drawn = limbs.drawn[0]
    starts, ends = (torch.as_tensor(points[0][drawn], device=device) for points in (limbs.starts, limbs.ends))
    axes = ends - starts
    y, x = torch.meshgrid(
        torch.arange(view.height, device=device), torch.arange(view.width, device=device), indexing="ij"
    )
    camera = view.camera
    u, v = (x.flatten() - camera.cx) / camera.fx, (y.flatten() - camera.cy) / camera.fy
    rays = torch.nn.functional.normalize(torch.stack([u, v, torch.ones_like(u)], dim=-1), dim=-1)
    depth = torch.full_like(u, 0.1)
    for _ in range(MARCH_STEPS):
        distance = torch.full_like(depth, torch.inf)
        for start, axis in zip(starts, axes, strict=True):
            offset = rays * depth[:, None] - start
            along = ((offset @ axis) / (axis @ axis)).clamp(0, 1)
            distance = distance.minimum((offset - along[:, None] * axis).norm(dim=-1) - view.radius)
        depth = torch.where(distance < 1e-3, depth, depth + distance.clamp(min=1e-4))
    return depth


def measure(size: tuple[int, int], people: int, options: argparse.Namespace) -> None:
    height, width = size
    device = torch.device(options.device)
    limbs = limbs_of(dancing(options.frames, people))
    depth = DepthRange.of(limbs)
    assert depth is not None
    view = View(height, width, Camera.of(height, width), Strokes().capsule_radius_mm, depth)
    clip = [keypoints(people)] * options.chunk
    written = torch.empty((options.chunk, height, width, 3), dtype=torch.uint8, device=device)

    def limbs_only() -> None:
        for _ in render_clip(limbs, view, device, options.chunk):
            pass

    def with_overlay() -> None:
        for _, frames in render_clip(limbs, view, device, options.chunk):
            overlay(clip[: len(frames)], height, width).cover(frames)

    floor = seconds(lambda: written.fill_(7), device) / options.chunk
    rates = [options.frames / seconds(work, device) for work in (limbs_only, with_overlay)]
    line = f"{width:>5}x{height:<5} {people:>6} {rates[0]:>12.1f} {rates[1]:>15.1f} {1 / floor:>12.0f}"
    if options.peer:
        line += f" {1 / seconds(lambda: march(limbs, view, device), device, repeats=1):>10.2f}"
    print(line, flush=True)


def measure_clips(options: argparse.Namespace) -> None:
    """Many short clips of small pictures at once, as training on drawn clips needs them."""
    device, side, num_frames = torch.device(options.device), 128, 17
    strokes = Strokes(capsule_radius_mm=60, head_radius_px=2, dot_radius_px=0)
    joints = np.stack([dancing(num_frames, 1)] * options.clips)
    cameras = [Camera.of(side, side)] * options.clips
    painted = [[keypoints(1)] * num_frames] * options.clips

    def draw(clips: list[list[People]] | None) -> object:
        return draw_clips(joints, cameras, side, side, strokes, clips=clips, device=device)

    print(f"{options.clips} clips of {num_frames} frames of {side}x{side} at once; clips a minute")
    for name, clips in (("limbs", None), ("with overlay", painted)):
        taken = seconds(partial(draw, clips), device)
        print(f"{name:>12} {60 * options.clips / taken:12,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pose_render", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=0, help="frames of a clip; 0: 256 on a GPU, 32 on a CPU")
    parser.add_argument("--chunk", type=int, default=16, help="frames at once")
    parser.add_argument("--peer", action="store_true", help="also march along the rays (slow on a CPU)")
    parser.add_argument("--clips", type=int, default=0, help="measure so many small clips at once instead")
    options = parser.parse_args()
    on_gpu = torch.device(options.device).type == "cuda"
    options.frames = options.frames or (256 if on_gpu else 32)
    place = torch.cuda.get_device_name(options.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{place}, chunks of {options.chunk} frames; frames per second")
    if options.clips:
        measure_clips(options)
        return
    print(f"{'size':>11} {'people':>6} {'limbs':>12} {'with overlay':>15} {'floor':>12}{'  marching' * options.peer}")
    for size in SIZES:
        for people in PEOPLE:
            measure(size, people, options)


if __name__ == "__main__":
    main()
