"""Limbs -> pictures: shaded capsules seen by a pinhole camera, in plain PyTorch on any device.

Every limb is a capsule (all points within a radius of a segment). The frame is cut into tiles of 8 x 8 pixels; for each
capsule only the tiles that it can touch are looked at, all capsules of all frames of a chunk in the same few kernels:

    tiles that a capsule may touch -> depth where each ray enters it -> nearest capsule per pixel -> shading

The entry depth is solved in closed form where the references march along the ray; they agree to the references' own
noise. Colours fade with depth relative to the nearest and farthest joint of the whole clip, so that range comes first.

One call renders one clip, or frames of any number of clips of one size, each with the camera and depths of its own: a
GPU is busy only with hundreds of small pictures at a time. services.pose.draw.draw_clips does that from joints.

Source of the light model: zai-org/SCAIL-Pose 830da75 render_3d/taichi_cylinder.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.alive import Alive
from services.pose.skeleton import Camera, Limbs

_TILE = 8
_TILES_AT_ONCE, _TILES_AT_ONCE_CPU = 65536, 2048
"""Bounds the memory of one pass: 64 rays per tile and about 20 float32 values per ray. On a CPU it fits the cache."""
_SHADED_PER_TILE = 16
"""Pixels that are shaded at once, for each of the tiles that are looked at at once: they take as much."""
_NEAR_MM, _FADE_FAR_MM, _FADE_MARGIN_MM = 0.1, 20_000.0, 6_000.0
_FAR_MIN_MM, _FAR_MAX_MM = 10_000.0, 25_000.0
_AMBIENT, _DIFFUSE, _SPECULAR, _SHININESS = 0.3, 0.7, 0.5, 32
_TILES_PER_TILE = 4
_MISS = 0x7F800000
"""The bits of the float32 infinity: bits of positive float32 numbers are ordered as the numbers are."""


@dataclass(frozen=True)
class DepthRange:
    """Smallest and largest z of all ends of limbs in a clip, millimetres."""

    nearest: float
    farthest: float

    @classmethod
    def of(cls, limbs: Limbs) -> DepthRange | None:
        """The range over every frame given; None where no limb is drawn in any of them."""
        starts, ends = limbs.starts[limbs.drawn][:, 2], limbs.ends[limbs.drawn][:, 2]
        if not len(starts):
            return None
        return cls(float(min(starts.min(), ends.min())), float(max(starts.max(), ends.max())))


@dataclass(frozen=True)
class Capsules:
    """Limbs on a device: starts, ends [n, C, 3] float32, drawn [n, C] bool, colours [C, 3] float32."""

    starts: Tensor
    ends: Tensor
    drawn: Tensor
    colours: Tensor

    @classmethod
    def of(cls, limbs: Limbs, device: torch.device | str) -> Capsules:
        def float32(values: object) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=device)

        drawn = torch.as_tensor(limbs.drawn, device=device)
        return cls(float32(limbs.starts), float32(limbs.ends), drawn, float32(limbs.colours))


@dataclass(frozen=True)
class View:
    """What all capsules of a picture share: size in pixels, camera, capsule radius and the clip's depths."""

    height: int
    width: int
    camera: Camera
    radius: float
    depth: DepthRange


@dataclass(frozen=True)
class _Views:
    """How each of n frames is seen; those of one call differ in camera and depths only.

    cameras: float32 [n, 4]: fx, fy, cx, cy. near, fade: where the light begins to fade, and over which length it does,
    far: how far along a ray is looked; float32 [n], millimetres.
    """

    height: int
    width: int
    radius: float
    cameras: Tensor
    near: Tensor
    fade: Tensor
    far: Tensor

    @classmethod
    def of(cls, views: Sequence[View], device: torch.device | str) -> _Views:
        first, depths = views[0], [view.depth for view in views]

        def float32(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).to(device)

        return cls(
            first.height,
            first.width,
            first.radius,
            cameras=float32([(c.fx, c.fy, c.cx, c.cy) for c in (view.camera for view in views)]),
            near=float32([max(depth.nearest, _NEAR_MM) for depth in depths]),
            fade=float32([min(depth.farthest + _FADE_MARGIN_MM, _FADE_FAR_MM) - _NEAR_MM for depth in depths]),
            far=float32([min(max(depth.farthest, _FAR_MIN_MM), _FAR_MAX_MM) for depth in depths]),
        )

    def rays(self, frame: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes u, v of the rays (u, v, 1) through pixels x, y [..., K] of frames [K]."""
        fx, fy, cx, cy = self.cameras[frame].unbind(-1)
        return (x - cx) / fx, (y - cy) / fy


def render(
    limbs: Limbs,
    view: View | Sequence[View],
    device: torch.device | str = "cpu",
    tiles_at_once: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Renders frames that are few enough to be in memory together: 12 bytes per pixel of each, 24 per pixel that shows a
    limb, and a byte per limb and 64 pixels; `most_bytes` counts it all.

    Args:
        limbs: of n frames.
        view: of all of them; or one per frame, of equal sizes and radii, where they are frames of several clips.
        tiles_at_once: that are looked at together; None: what suits the device.

    Returns:
        frames uint8 [n, height, width, 3] on the device, black where there is no limb; and where there is one, bool
        [n, height, width].
    """
    capsules = Capsules.of(limbs, device)
    on_cpu = capsules.starts.device.type == "cpu"
    at_once = tiles_at_once or (_TILES_AT_ONCE_CPU if on_cpu else _TILES_AT_ONCE)
    return _render(capsules, _Views.of([view] * len(limbs) if isinstance(view, View) else view, device), at_once)


def most_bytes(count: int, capsules: int, height: int, width: int, tiles_at_once: int | None = None) -> int:
    """The most that `render` takes on a GPU for so many frames of so many limbs, whatever they show; counted on the meta
    device.
    """
    rows, columns, at_once = -(-height // _TILE), -(-width // _TILE), tiles_at_once or _TILES_AT_ONCE
    with torch.inference_mode(), torch.device("meta"), Alive() as alive:
        ends = torch.empty(2, count, capsules, 3)
        is_drawn, colours = torch.empty(count, capsules, dtype=torch.bool), torch.empty(capsules, 3)
        limbs = Capsules(ends[0], ends[1], is_drawn, colours)
        view = _Views(height, width, 1.0, torch.empty(count, 4), *torch.empty(3, count))
        keys = torch.empty(count, height, width, dtype=torch.int64)
        touched = _touched_tiles(limbs, view)
        tiles = torch.empty(min(touched.numel(), count * _TILES_PER_TILE * rows * columns), 4, dtype=torch.int64)
        del touched
        _enter(keys, tiles[:at_once], _Forms.of(limbs, view.radius), view)
        del tiles
        drawn, frames = keys < _MISS << 16, torch.empty(count, height, width, 3, dtype=torch.uint8)
        pixels = torch.empty(keys.numel(), 3, dtype=torch.int64)
        _paint(frames, pixels[: at_once * _SHADED_PER_TILE], keys, limbs, view, at_once)
        del drawn
    return alive.most


def _render(capsules: Capsules, view: _Views, tiles_at_once: int) -> tuple[Tensor, Tensor]:
    keys = _nearest(capsules, view, tiles_at_once)
    drawn = keys < _MISS << 16
    frames = torch.zeros((*keys.shape, 3), dtype=torch.uint8, device=keys.device)
    _paint(frames, drawn.nonzero(), keys, capsules, view, tiles_at_once)
    return frames, drawn


def _paint(frames: Tensor, pixels: Tensor, keys: Tensor, capsules: Capsules, view: _Views, tiles_at_once: int) -> None:
    """Colours the pixels int64 [M, 3] (frame, y, x) of frames by what is nearest there."""
    for part in torch.split(pixels, tiles_at_once * _SHADED_PER_TILE):
        frame, y, x = part.unbind(1)
        frames[frame, y, x] = _shade(frame, y, x, keys[frame, y, x], capsules, view)


def render_clip(
    limbs: Limbs,
    view: View,
    device: torch.device | str = "cpu",
    chunk_frames: int = 16,
    tiles_at_once: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Renders a clip of any length, so many frames at a time; yields the number of the first frame of each chunk and
    uint8 [up to chunk_frames, height, width, 3] on the device."""
    for begin in range(0, len(limbs), chunk_frames):
        yield begin, render(limbs.frames(begin, begin + chunk_frames), view, device, tiles_at_once)[0]


def _nearest(capsules: Capsules, view: _Views, tiles_at_once: int) -> Tensor:
    """The nearest capsule of every pixel.

    Returns:
        keys int64 [n, height, width]: bits of its depth, then 16 bits of its number, so that of equal depths the one
        drawn earlier is taken; at least _MISS << 16 where there is none.
    """
    device = capsules.starts.device
    shape = (len(capsules.starts), view.height, view.width)
    keys = torch.full(shape, _MISS << 16, dtype=torch.int64, device=device)
    tiles = _touched_tiles(capsules, view).nonzero()
    forms = _Forms.of(capsules, view.radius)
    for part in torch.split(tiles, tiles_at_once):
        _enter(keys, part, forms, view)
    return keys


def _enter(keys: Tensor, tiles: Tensor, forms: _Forms, view: _Views) -> None:
    """Takes into keys where the rays of tiles int64 [K, 4] (frame, capsule, row, column) enter their capsule."""
    inside = torch.arange(_TILE, device=keys.device)[:, None]
    frame, capsule, row, column = tiles.unbind(1)
    # pixels of a tile that stick out of the picture repeat its last row or column
    y = (row * _TILE + inside).clamp(max=view.height - 1)[:, None]  # [8, 1, K]
    x = (column * _TILE + inside).clamp(max=view.width - 1)  # [8, K]
    rays = view.rays(frame, x, y)
    depth = _entry_depth(*rays, forms.take(frame, capsule), view.radius, view.far[frame])  # [8, 8, K]
    key = (depth.view(torch.int32).to(torch.int64) << 16) + capsule
    at = (frame * view.height + y) * view.width + x
    keys.view(-1).scatter_reduce_(0, at.flatten(), key.flatten(), "amin")


def _touched_tiles(capsules: Capsules, view: _Views) -> Tensor:
    """Which tiles a capsule may be seen in, bool [n, C, rows, columns]; never too few.

    On the plane z = 1 a sphere at (X, Y, Z) is seen within a disc about (X / Z, Y / Z), and a capsule within the discs
    of its ends and what lies between them. One that reaches behind the camera may be seen anywhere.
    """
    device = capsules.starts.device
    ends = torch.stack([capsules.starts, capsules.ends])  # [2, n, C, 3]
    x, y, z = ends.unbind(-1)
    squared = z * z - view.radius**2
    behind = (z <= view.radius * 1.01).any(0)
    across = torch.hypot(x, y)
    # tangent of the angle to the far side of the sphere, less that to its centre
    far_side = (across * z + view.radius * (across**2 + squared).clamp(min=0).sqrt()) / squared
    reach = (far_side - across / z).amax(0)[..., None, None]
    (u, toward_u), (v, toward_v) = ((p[0], p[1] - p[0]) for p in (x / z, y / z))
    u, toward_u, v, toward_v = (value[..., None, None] for value in (u, toward_u, v, toward_v))

    def centres(length: int) -> Tensor:
        return torch.arange(0, length, _TILE, dtype=torch.float32, device=device) + (_TILE - 1) / 2

    fx, fy, cx, cy = view.cameras[..., None, None, None].unbind(1)  # [n, 1, 1, 1]
    tile_u, tile_v = (centres(view.width) - cx) / fx, (centres(view.height)[:, None] - cy) / fy
    half_diagonal = (_TILE - 1) / 2 * torch.hypot(1 / fx, 1 / fy)
    off_u, off_v = tile_u - u, tile_v - v
    along = (off_u * toward_u + off_v * toward_v) / (toward_u**2 + toward_v**2).clamp(min=1e-12)
    along = along.clamp(0, 1)
    distance = torch.hypot(off_u - along * toward_u, off_v - along * toward_v)
    touched = distance <= reach + half_diagonal * 1.001
    touched = (touched | behind[..., None, None]) & capsules.drawn[..., None, None]
    return touched & _affordable(touched, z.amin(0))[..., None, None]


def _affordable(touched: Tensor, nearest: Tensor) -> Tensor:
    """Which capsules are drawn, bool [n, C]: the nearest, up to a bound on the work of a frame.

    People do not get near that bound. Joints an arm's length away, or behind the camera, may cover every tile; whatever
    joints are given, a frame takes no more than _TILES_PER_TILE times what one limb over the whole picture takes.

    Args:
        touched: bool [n, C, rows, columns].
        nearest: [n, C], the smallest z of each capsule.
    """
    tiles = touched.sum(dim=(2, 3))
    order = nearest.argsort(dim=1, stable=True)
    spent = tiles.gather(1, order).cumsum(dim=1)
    affordable = spent <= _TILES_PER_TILE * touched.shape[2] * touched.shape[3]
    return torch.zeros_like(affordable).scatter_(1, order, affordable)


@dataclass(frozen=True)
class _Forms:
    """What a ray is tested with, per capsule.

    start, end; axis: unit vector between them (zero for a sphere), `length` long; foot: the point of the axis' line that
    is nearest to the camera, `start_along` before the start; moment: foot x axis; holds_camera: whether the camera is
    within the capsule.
    """

    start: Tensor
    end: Tensor
    axis: Tensor
    foot: Tensor
    moment: Tensor
    length: Tensor
    start_along: Tensor
    holds_camera: Tensor

    @classmethod
    def of(cls, capsules: Capsules, radius: float) -> _Forms:
        start, end = capsules.starts, capsules.ends
        length = (end - start).norm(dim=-1, keepdim=True)
        axis = torch.where(length > 1e-8, (end - start) / length.clamp(min=1e-8), torch.zeros_like(start))
        start_along = (start * axis).sum(-1, keepdim=True)
        nearest = start + (-start_along).clamp(min=0).minimum(length) * axis
        return cls(
            start=start,
            end=end,
            axis=axis,
            foot=start - start_along * axis,
            moment=torch.linalg.cross(start, axis),
            length=length[..., 0],
            start_along=start_along[..., 0],
            holds_camera=nearest.norm(dim=-1) < radius,
        )

    def take(self, frame: Tensor, capsule: Tensor) -> _Forms:
        """Those of one capsule per tile; numbers [K], vectors [3, K]: tiles last, so that all arithmetic is on long rows."""
        numbers = (self.length, self.start_along, self.holds_camera)
        vectors = (self.start, self.end, self.axis, self.foot, self.moment)
        taken = [value[frame, capsule].T.contiguous() for value in vectors]
        return _Forms(*taken, *(value[frame, capsule] for value in numbers))


def _dot(u: Tensor, v: Tensor, vector: Tensor) -> Tensor:
    """(u, v, 1) times a vector."""
    return u * vector[0] + (v * vector[1] + vector[2])


def _entry_depth(u: Tensor, v: Tensor, form: _Forms, radius: float, far: Tensor) -> Tensor:
    """z at which the ray (u, v, 1) z enters a capsule, infinite where it misses it or does so too far away.

    With d = (u, v, 1) and its part across the axis, |d_|^2 = |d|^2 - (d axis)^2, the ray meets the infinite cylinder at
    (d foot - sqrt(|d_|^2 r^2 - (d moment)^2)) / |d_|^2. Written so, float32 keeps a capsule's outline to 0.001 pixels
    metres away, where the textbook discriminant cancels. Before the start or past the end it is the end's sphere.
    """
    squared = u * u + (v * v + 1)
    along = _dot(u, v, form.axis)
    across = (squared - along * along).clamp(min=1e-12)
    moment = _dot(u, v, form.moment)
    discriminant = across * radius**2 - moment * moment
    depth = (_dot(u, v, form.foot) - discriminant.clamp(min=0).sqrt()) / across
    place = depth * along - form.start_along
    at_start, on_body = place <= 0, (place > 0) & (place < form.length)
    centre_x, centre_y, centre_z = (torch.where(at_start, s, e) for s, e in zip(form.start, form.end, strict=True))
    # of two limbs that share this joint the depths come out equal to the last bit
    offset = torch.stack([v * centre_z - centre_y, centre_x - u * centre_z, u * centre_y - v * centre_x])
    sphere = squared * radius**2 - (offset * offset).sum(0)
    sphere_depth = (u * centre_x + (v * centre_y + centre_z) - sphere.clamp(min=0).sqrt()) / squared
    depth = torch.where(on_body, depth, sphere_depth)
    hit = (discriminant >= 0) & (on_body | (sphere >= 0))
    length = squared.sqrt()
    nearest = _NEAR_MM / length
    depth = torch.where(form.holds_camera, nearest, depth)
    seen = (hit & (depth > nearest) | form.holds_camera) & (depth * length <= far)
    return torch.where(seen, depth, torch.inf)


def _shade(frame: Tensor, y: Tensor, x: Tensor, keys: Tensor, capsules: Capsules, view: _Views) -> Tensor:
    """Colours uint8 [M, 3] of M pixels, whose nearest capsules and depths are in keys."""
    capsule = keys & 0xFFFF
    z = (keys >> 16).to(torch.int32).view(torch.float32)[:, None]
    u, v = view.rays(frame, x, y)
    ray = torch.stack([u, v, torch.ones_like(u)], dim=-1)
    point = ray * z
    normal = torch.nn.functional.normalize(point - _on_axis(point, capsules, frame, capsule), dim=-1)
    # the light stands at the camera and shines along z: L = (0, 0, 1)
    halfway = -torch.nn.functional.normalize(ray, dim=-1)
    halfway[:, 2] -= 1
    halfway = torch.nn.functional.normalize(halfway, dim=-1)
    lit = _AMBIENT + _DIFFUSE * (-normal[:, 2:]).clamp(min=0)
    highlight = _SPECULAR * (normal * halfway).sum(-1, keepdim=True).clamp(min=0) ** _SHININESS
    # all of the light is kept at the clip's nearest joint, less behind it
    kept = (1 - (z - view.near[frame, None]) / view.fade[frame, None]).clamp(0, 1)
    colour = kept * (capsules.colours[capsule] * lit + highlight)
    # truncated, as the references do
    return (colour.clamp(0, 1) * 255).to(torch.uint8)


def _on_axis(point: Tensor, capsules: Capsules, frame: Tensor, capsule: Tensor) -> Tensor:
    """The point of a capsule's segment that is nearest to a point [M, 3]."""
    start = capsules.starts[frame, capsule]
    segment = capsules.ends[frame, capsule] - start
    share = ((point - start) * segment).sum(-1, keepdim=True) / (segment**2).sum(-1, keepdim=True).clamp(min=1e-16)
    return start + share.clamp(0, 1) * segment
