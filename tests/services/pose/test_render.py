"""Rendered limbs: the stored cases, a plain sphere tracer in float64, and what must not change them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import tests.parity.pose_render  # noqa: F401 (registers the checks)
from runtime.alive import Alive
from services.pose import render as module
from services.pose import skeleton
from services.pose.render import DepthRange, View, most_bytes, render, render_clip
from services.pose.skeleton import Camera, Limbs, limbs_of
from tests.parity.cases import Case
from tests.parity.families import check_for
from tests.services.pose.figures import standing

GOLDENS = Path(__file__).parents[2] / "goldens"
RADIUS = 21.5
Doubles = npt.NDArray[np.float64]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def failures(name: str) -> list[str]:
    check = check_for(name)
    assert check is not None
    return [each.name for each in check(Case(name, GOLDENS)) if not each.verdict()[0]]


def view_of(limbs: Limbs, height: int, width: int, radius: float = RADIUS) -> View:
    depth = DepthRange.of(limbs)
    assert depth is not None
    return View(height, width, Camera.of(height, width), radius, depth)


def some_limbs(*ends: tuple[tuple[float, float, float], tuple[float, float, float]]) -> Limbs:
    """Limbs of one frame, each red, green or blue."""
    points = np.array(ends, np.float32)
    colours = np.eye(3, dtype=np.float32)[np.arange(len(ends)) % 3] * np.float32(0.85) + np.float32(0.15)
    return Limbs(points[None, :, 0], points[None, :, 1], np.ones((1, len(ends)), np.bool_), colours)


def distances(points: Doubles, limbs: Limbs, radius: float) -> tuple[Doubles, Doubles]:
    """From points [n, 3] to the capsules of the first frame [n, C], and the nearest points of their axes [n, C, 3]."""
    starts, ends = limbs.starts[0].astype(np.float64), limbs.ends[0].astype(np.float64)
    axes = ends - starts
    offsets = points[:, None] - starts
    along = np.clip((offsets * axes).sum(-1) / np.maximum((axes**2).sum(-1), 1e-16), 0, 1)[..., None]
    nearest = starts + along * axes
    return np.linalg.norm(points[:, None] - nearest, axis=-1) - radius, nearest


def sphere_traced(limbs: Limbs, view: View) -> tuple[Doubles, npt.NDArray[np.bool_]]:
    """Levels [H, W, 3] (not truncated) and what is hit, step by step along every ray."""
    camera = view.camera
    y, x = np.mgrid[: view.height, : view.width].reshape(2, -1)
    rays = np.stack([(x - camera.cx) / camera.fx, (y - camera.cy) / camera.fy, np.ones(len(x))], axis=-1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    travelled, under_way = np.full(len(x), 0.1), np.arange(len(x))
    far, hit = max(min(view.depth.farthest, 25_000), 10_000), np.zeros(len(x), np.bool_)
    while len(under_way):
        distance = distances(rays[under_way] * travelled[under_way, None], limbs, view.radius)[0].min(-1)
        hit[under_way] = distance < 1e-3
        travelled[under_way] += np.where(hit[under_way], 0, np.maximum(distance, 1e-4))
        under_way = under_way[~hit[under_way] & (travelled[under_way] <= far)]
    points = rays * travelled[:, None]
    apart, nearest = distances(points, limbs, view.radius)
    limb = apart.argmin(-1)
    normals = points - nearest[np.arange(len(points)), limb]
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    halfway = -rays - (0, 0, 1)
    halfway /= np.linalg.norm(halfway, axis=-1, keepdims=True)
    near, far = max(view.depth.nearest, 0.1), min(view.depth.farthest + 6000, 20_000)
    kept = np.clip(1 - (points[:, 2] - near) / (far - 0.1), 0, 1)
    lit = 0.3 + 0.7 * np.maximum(-normals[:, 2], 0)
    shine = 0.5 * np.maximum((normals * halfway).sum(-1), 0) ** 32
    colours = kept[:, None] * (limbs.colours[limb] * lit[:, None] + shine[:, None])
    shape = (view.height, view.width)
    return (np.clip(colours, 0, 1) * hit[:, None] * 255).reshape(*shape, 3), hit.reshape(shape)


@pytest.mark.parametrize("name", ["pose-render-1", "pose-render-2"])
def test_stored_case_passes(name: str) -> None:
    assert failures(name) == []


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("_AMBIENT", 0.4),
        ("_DIFFUSE", 0.6),
        ("_SPECULAR", 0.3),
        ("_SHININESS", 16),
        ("_FADE_MARGIN_MM", 3000.0),
        ("_TILE", 4),
    ],
)
def test_stored_case_fails_when_a_constant_of_the_light_is_off(
    constant: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, constant, value)
    assert bool(failures("pose-render-2")) == (constant != "_TILE")  # how the work is cut must not show


def test_stored_case_fails_when_two_limbs_are_drawn_in_the_other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    limbs = list(skeleton.LIMBS)
    limbs[0] = replace(limbs[0], alone=limbs[3].alone)
    monkeypatch.setattr(skeleton, "LIMBS", tuple(limbs))
    assert failures("pose-render-1")


SCENES: dict[str, Limbs] = {
    "across and along": some_limbs(((-300, -100, 1500), (250, 180, 1400)), ((-100, 250, 1300), (80, -300, 2500))),
    "pointing at the camera": some_limbs(((60, 40, 900), (121, 79, 1800)), ((-90, 20, 2000), (-45, 10, 1000))),
    "close": some_limbs(((-60, 20, 120), (50, -30, 160)), ((10, 60, 200), (-20, -60, 150))),
    "reaching behind the camera": some_limbs(((200, 100, 900), (60, 40, -300)), ((-150, 0, 500), (-30, 20, 1))),
    "without length": some_limbs(((50, 50, 700), (50, 50, 700)), ((-90, 0, 800), (-60, 0, 800))),
    "around the camera": some_limbs(((15, -5, -300), (15, 5, 300))),
    "sharing joints": some_limbs(
        ((0, 0, 600), (90, 60, 700)), ((0, 0, 600), (-90, 60, 700)), ((0, 0, 600), (0, -90, 550))
    ),
    "farther than the farthest that is drawn": some_limbs(
        ((-2000, 500, 24_900), (9000, 0, 25_100)), ((0, 0, 26_000), (90, 0, 26_100))
    ),
}


@pytest.mark.parametrize("scene", SCENES)
def test_frames_are_those_of_sphere_tracing(scene: str) -> None:
    limbs = SCENES[scene]
    # neither a multiple of the tiles nor square pixels
    view = replace(view_of(limbs, 35, 45), camera=Camera(55, 47, 21.3, 18.8))
    if scene.startswith("farther"):
        view = replace(view, radius=400.0)
    frames, drawn = render(limbs, view)
    levels, hit = sphere_traced(limbs, view)
    assert (drawn[0].numpy() != hit).sum() <= 1
    assert hit.sum() > 5
    both = drawn[0].numpy() & hit
    assert np.abs(frames[0].numpy() - levels)[both].max() < 2
    assert not frames[0][~drawn[0]].any()


def test_camera_inside_a_limb_sees_nothing_else() -> None:
    limbs = some_limbs(((0, -5, -300), (0, 5, 300)), ((-100, 0, 400), (100, 0, 400)))
    frames, drawn = render(limbs, view_of(limbs, 20, 30))
    assert drawn.all()
    assert (frames[..., 0] > 2 * frames[..., 1].int()).all()


def test_of_limbs_that_share_a_joint_the_earlier_one_is_seen_there() -> None:
    to_the_right = some_limbs(((0, 0, 500), (150, 100, 500)), ((0, 0, 500), (-150, 100, 500)))
    to_the_left = some_limbs(((0, 0, 500), (-150, 100, 500)), ((150, 100, 500), (0, 0, 500)))
    for limbs in (to_the_right, to_the_left):
        frames, drawn = render(limbs, view_of(limbs, 64, 64, radius=60))
        # above the joint both limbs end in the same sphere, the first is red
        above = slice(26, 31), slice(31, 34)
        assert drawn[0][above].all()
        assert (frames[0][above][..., 0] > frames[0][above][..., 1]).all()


def test_nearer_person_hides_the_farther_one() -> None:
    joints = standing(people=2)
    joints[:, 1, :, :2] = joints[:, 0, :, :2] * 3400 / 3000
    limbs = limbs_of(joints)
    together, _ = render(limbs, view_of(limbs, 128, 96))
    alone, drawn = render(replace(limbs, drawn=limbs.drawn & (np.arange(26) < 13)), view_of(limbs, 128, 96))
    same = (together == alone).all(-1) | ~drawn
    assert same.float().mean() > 0.999


def test_limbs_that_are_not_drawn_are_not_seen_and_do_not_count_in_the_range() -> None:
    limbs = SCENES["across and along"]
    first = replace(limbs, drawn=np.array([[True, False]]))
    assert DepthRange.of(first) == DepthRange(1400, 1500)
    assert DepthRange.of(limbs) == DepthRange(1300, 2500)
    frames, _ = render(first, view_of(limbs, 40, 60))
    assert (frames[..., 1] <= frames[..., 0]).all()


def test_nobody_in_the_clip_is_black_and_has_no_range() -> None:
    limbs = limbs_of(np.zeros((2, 1, 24, 3), np.float32))
    assert DepthRange.of(limbs) is None
    frames, drawn = render(limbs, View(16, 24, Camera.of(16, 24), RADIUS, DepthRange(0, 0)))
    assert frames.shape == (2, 16, 24, 3)
    assert not frames.any()
    assert not drawn.any()


@pytest.mark.parametrize("chunk_frames", [1, 2, 5, 16])
def test_chunks_are_the_frames_of_the_whole_clip(chunk_frames: int) -> None:
    limbs = limbs_of(standing(frames=5))
    view = view_of(limbs, 48, 64)
    whole, _ = render(limbs, view)
    chunks = list(render_clip(limbs, view, chunk_frames=chunk_frames))
    assert [begin for begin, _ in chunks] == list(range(0, 5, chunk_frames))
    assert max(len(frames) for _, frames in chunks) <= chunk_frames
    assert (torch.cat([frames for _, frames in chunks]) == whole).all()


def test_tiles_taken_a_few_at_a_time_give_the_same_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    limbs = limbs_of(standing(frames=2, people=2))
    view = view_of(limbs, 48, 64)
    whole, _ = render(limbs, view)
    monkeypatch.setattr(module, "_TILES_AT_ONCE_CPU", 7)
    assert (render(limbs, view)[0] == whole).all()


@pytest.mark.parametrize("distance_mm", [2600, 60])
def test_no_more_is_taken_than_was_counted_however_much_is_shown(distance_mm: int) -> None:
    joints = standing(frames=3, people=2)
    joints[..., 2] += (distance_mm - joints[..., 2].min()) * joints.any(axis=-1)
    limbs = limbs_of(joints)
    view = view_of(limbs, 48, 64)
    most = most_bytes(3, limbs.starts.shape[1], 48, 64, tiles_at_once=40)
    with Alive() as alive:
        frames, drawn = render(limbs, view, tiles_at_once=40)
    assert torch.equal(frames, render(limbs, view)[0])
    assert alive.most < most
    if drawn.float().mean() > 0.5:
        assert alive.most > 0.6 * most


def test_brightness_follows_the_range_of_the_whole_clip() -> None:
    joints = standing(frames=2)
    joints[1, ..., 2] += 3000
    limbs = limbs_of(joints)
    part = limbs.frames(1, 2)
    in_clip, _ = render(part, view_of(limbs, 64, 64))
    by_itself, _ = render(part, view_of(part, 64, 64))
    assert in_clip.float().mean() < 0.85 * by_itself.float().mean()


def width_of(radius: float) -> int:
    limbs = some_limbs(((0, -500, 1000), (0, 500, 1000)))
    return int(render(limbs, view_of(limbs, 200, 200, radius))[1][0, 100].sum())


def test_thickness_is_the_radius_setting() -> None:
    # 200 pixels see 1041 mm at this distance
    assert abs(width_of(21.5) - 2 * 21.5 * 200 / 1041) <= 1
    assert abs(width_of(80.0) - 2 * 80 * 200 / 1041) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_draws_the_same_frames() -> None:
    limbs = limbs_of(standing(frames=3, people=2))
    view = view_of(limbs, 96, 120)
    (cpu, cpu_drawn), (gpu, gpu_drawn) = render(limbs, view), render(limbs, view, "cuda")
    assert (gpu_drawn.cpu() != cpu_drawn).float().mean() < 1e-3
    assert ((gpu.cpu().int() - cpu.int()).abs() > 1).float().mean() < 1e-3


def test_joints_that_cover_the_picture_cost_no_more_than_a_few_limbs(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = []
    nearest_depth = module._entry_depth

    def counting(u: torch.Tensor, *others: Any) -> torch.Tensor:
        tested.append(u.numel())
        return nearest_depth(u, *others)

    monkeypatch.setattr(module, "_entry_depth", counting)
    generator = np.random.default_rng(0)
    for reach, depth in ((200, 110), (1000, -50)):
        joints = generator.uniform(-reach, reach, (2, 5, 24, 3)).astype(np.float32)
        joints[..., 2] += depth - joints[..., 2].min(axis=(1, 2), keepdims=True)
        limbs, pixels = limbs_of(joints), 64 * 96
        tested.clear()
        _, drawn = render(limbs, view_of(limbs, 64, 96))
        assert sum(tested) <= 2 * 4 * pixels
        assert drawn.any(dim=(1, 2)).all()


def test_of_limbs_that_cover_the_picture_the_nearest_are_drawn() -> None:
    ends = [((-200.0, 0.0, depth), (200.0, 0.0, depth)) for depth in (900.0, 160.0, 170.0, 180.0, 190.0, 200.0)]
    limbs = some_limbs(*ends)
    near = limbs_of_some(limbs, [1, 2, 3, 4])
    view = view_of(limbs, 32, 32, radius=150)
    assert (render(limbs, view)[0] == render(near, view)[0]).all()


def limbs_of_some(limbs: Limbs, chosen: list[int]) -> Limbs:
    return Limbs(limbs.starts[:, chosen], limbs.ends[:, chosen], limbs.drawn[:, chosen], limbs.colours[chosen])
