"""Hands, faces and the links between eyes and ears, painted in 2D over the rendered limbs.

Each person is painted on a canvas of their own, the canvases of a frame are added, and where the sum of a channel is not
zero it replaces that channel of the frame: through the missing channels of a coloured line the limb below still shows.

Source: zai-org/SCAIL-Pose 830da75 pose_draw/draw_pose_utils.py, draw_utils.py.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.pose import raster
from services.pose.people import Floats, People
from services.pose.quirks import REFERENCE_STROKES, Strokes
from services.pose.raster import Ints

Colours = npt.NDArray[np.uint8]

_LINKS = ((0, 14), (14, 16), (0, 15), (15, 17))
"""Nose, right eye, right ear; nose, left eye, left ear."""
# painted at full strength and then dimmed to 0.6, together with the rest of the canvas
_LINK_COLOURS: Colours = np.array([(51, 0, 153), (102, 0, 153), (153, 0, 153), (153, 0, 102)], np.uint8)
_HEAD_POINTS = (0, 14, 15, 16, 17)
_HEAD_COLOURS: Colours = np.array([(255, 0, 0), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)], np.uint8)
_FINGERS = tuple(
    (0 if step == 0 else finger + step, finger + step + 1) for finger in range(0, 20, 4) for step in range(4)
)
"""From the wrist along each finger, 20 edges."""
_FINGER_COLOURS: Colours = np.array(
    [[round(255 * level) for level in colorsys.hsv_to_rgb(edge / 20, 1, 1)] for edge in range(20)], np.uint8
)
_HAND_POINT_COLOUR: Colours = np.array([(0, 0, 255)], np.uint8)
_FACE_POINTS = (*range(17, 27), *range(36, 68))
"""Brows, eyes and mouth; neither jaw nor nose."""
_FACE_COLOUR: Colours = np.array([(255, 255, 255)], np.uint8)


@dataclass(frozen=True)
class Overlay:
    """The painted pixels of n frames: numbers of frames, y and x [P], each pixel once, and their colours [P, 3]."""

    frame: Ints
    y: Ints
    x: Ints
    colours: Colours

    def cover(self, frames: Tensor) -> None:
        """Paints over frames uint8 [n, height, width, 3], in place, on any device."""
        at = tuple(torch.from_numpy(index).to(frames.device) for index in (self.frame, self.y, self.x))
        colours = torch.from_numpy(self.colours).to(frames.device)
        frames[at] = torch.where(colours != 0, colours, frames[at])


Painted = Iterator[tuple[raster.Pixels, Colours]]
"""Pixels whose first array is the person, and their colours [P, 3]; later ones cover earlier ones."""


def overlay(clip: Sequence[People], height: int, width: int, strokes: Strokes = REFERENCE_STROKES) -> Overlay:
    """Paints the people of some frames."""
    area = height * width
    painted_parts = list(_painted(clip, height, width, strokes))
    canvas_pixels = np.concatenate([person * area + y * width + x for (person, y, x), _ in painted_parts])
    colours = np.concatenate([colours for _, colours in painted_parts])
    # of all that is painted on one pixel of a canvas, the last is seen
    painted, last = np.unique(canvas_pixels[::-1], return_index=True)
    frame_of = np.repeat(np.arange(len(clip)), [len(people) for people in clip])
    pixels, place = np.unique(frame_of[painted // area] * area + painted % area, return_inverse=True)
    # the sum of several people's canvases wraps around, as bytes do
    summed = np.zeros((len(pixels), 3), np.uint8)
    np.add.at(summed, place, colours[::-1][last])
    return Overlay(pixels // area, pixels // width % height, pixels % width, summed)


def _painted(clip: Sequence[People], height: int, width: int, strokes: Strokes) -> Painted:
    """All shapes of all people, counted through the clip, in the order of painting."""
    bodies, faces, hands = (
        np.concatenate([getattr(people, name) for people in clip]) for name in ("bodies", "faces", "hands")
    )
    visible = np.concatenate([people.visible for people in clip])
    size = np.array([width, height], np.float64)
    radius = strokes.dot_radius(height, width)
    yield _links(bodies[:, :18] * size, visible, strokes.head_radius_px, height, width)
    head = list(_HEAD_POINTS)
    yield _dots(bodies[:, head] * size, visible[:, head], _HEAD_COLOURS, strokes.head_radius_px, height, width)
    for side in (0, 1):
        points = hands[:, side] * size
        yield _edges(points, max(radius, 1), height, width)
        yield _dots(points, _on_picture(points), _HAND_POINT_COLOUR, radius, height, width)
    points = faces[:, list(_FACE_POINTS)] * size
    yield _dots(points, _on_picture(points), _FACE_COLOUR, radius, height, width)


def _on_picture(points: Floats) -> npt.NDArray[np.bool_]:
    """Points [..., 2] in pixels -> [...]: not invisible, and not in the first row or column (as in the references)."""
    return np.asarray((points.astype(np.int64) > 0).all(axis=-1))


def _links(
    points: Floats, visible: npt.NDArray[np.bool_], half_width: int, height: int, width: int
) -> tuple[raster.Pixels, Colours]:
    """Ellipses between two points of the head, in a dimmed colour each."""
    first, second = (np.array(_LINKS)[:, end] for end in (0, 1))
    person, link = (visible[:, first] & visible[:, second]).nonzero()
    a, b = points[person, first[link]], points[person, second[link]]
    delta = a - b
    half = np.hypot(delta[:, 0], delta[:, 1]) / 2
    axes = np.stack([half.astype(np.int64), np.full(len(half), half_width)], axis=-1)
    degrees = np.degrees(np.arctan2(delta[:, 1], delta[:, 0])).astype(np.int64)
    corners = raster.ellipses(((a + b) / 2).astype(np.int64), axes, degrees)
    shape, y, x = raster.polygons(corners, height, width)
    return (person[shape], y, x), _LINK_COLOURS[link[shape]]


def _edges(points: Floats, thickness: int, height: int, width: int) -> tuple[raster.Pixels, Colours]:
    """The edges of one hand of each person [n, 21, 2]."""
    first, second = (np.array(_FINGERS)[:, end] for end in (0, 1))
    visible = _on_picture(points)
    person, edge = (visible[:, first] & visible[:, second]).nonzero()
    whole = points.astype(np.int64)
    draw = raster.lines if thickness == 1 else raster.thick_lines
    shape, y, x = draw(whole[person, first[edge]], whole[person, second[edge]], height, width)
    return (person[shape], y, x), _FINGER_COLOURS[edge[shape]]


def _dots(
    points: Floats, shown: npt.NDArray[np.bool_], colours: Colours, radius: int, height: int, width: int
) -> tuple[raster.Pixels, Colours]:
    """Discs about points [n, k, 2] in pixels, where shown [n, k]; colours [k or 1, 3]."""
    person, point = shown.nonzero()
    shape, y, x = raster.discs(points[person, point].astype(np.int64), radius, height, width)
    return (person[shape], y, x), colours[point[shape] % len(colours)]
