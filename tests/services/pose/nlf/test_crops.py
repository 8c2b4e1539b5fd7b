"""Virtual cameras and what they see: geometry against plain projections, pixels against a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from services.pose.nlf.crops import (
    CropCameras,
    default_intrinsics,
    display_tone,
    facing,
    linear_light,
    look_at,
    pyramid,
    warp,
)

SIDE = 64
BOXES = torch.tensor([[10.0, 5, 40, 60], [70, 30, 20, 25], [-15, 40, 120, 35]])
INTRINSICS = default_intrinsics(90, 120).expand(3, 3, 3)


@pytest.fixture
def cameras() -> CropCameras:
    return look_at(BOXES, INTRINSICS, SIDE)


def seen(cameras: CropCameras, pixels: Tensor) -> Tensor:
    """Pixels [n, k, 2] of the frames -> pixels of the crops."""
    rays = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1) @ torch.linalg.inv(INTRINSICS).mT
    projected = rays @ cameras.rotation.mT @ cameras.intrinsics.mT
    return projected[..., :2] / projected[..., 2:]


def test_default_camera_spans_55_degrees_over_the_larger_side() -> None:
    for height, width in ((90, 120), (120, 90)):
        focal = 120 / 2 / math.tan(math.radians(27.5))
        expected = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
        torch.testing.assert_close(default_intrinsics(height, width), expected)
    assert default_intrinsics(90, 120, 90.0)[0, 0].item() == pytest.approx(60)


def test_middle_of_the_box_is_the_middle_of_the_crop(cameras: CropCameras) -> None:
    middles = BOXES[:, None, :2] + BOXES[:, None, 2:] / 2
    torch.testing.assert_close(seen(cameras, middles), torch.full((3, 1, 2), SIDE / 2), atol=1e-3, rtol=0)


def test_larger_extent_of_the_box_fills_the_crop(cameras: CropCameras) -> None:
    low, size = BOXES[:, None, :2], BOXES[:, None, 2:]
    ends = torch.tensor([[0.5, 0], [0.5, 1], [0, 0.5], [1, 0.5]])
    top, bottom, left, right = seen(cameras, low + ends * size).unbind(dim=1)
    extents = torch.stack([(bottom - top).norm(dim=-1), (right - left).norm(dim=-1)])
    torch.testing.assert_close(extents.amax(dim=0), torch.full((3,), float(SIDE)), atol=1e-3, rtol=0)
    assert (extents.amin(dim=0) < SIDE - 5).all()


def test_camera_is_turned_but_not_mirrored_and_stays_level(cameras: CropCameras) -> None:
    torch.testing.assert_close(cameras.rotation @ cameras.rotation.mT, torch.eye(3).expand(3, 3, 3))
    torch.testing.assert_close(torch.linalg.det(cameras.rotation), torch.ones(3))
    # the crop's x axis has no vertical part, its y axis points down
    torch.testing.assert_close(cameras.rotation[:, 0, 1], torch.zeros(3))
    assert (cameras.rotation[:, 1, 1] > 0.9).all()


def test_camera_looking_straight_ahead_is_not_turned() -> None:
    assert torch.equal(facing(torch.tensor([[0.0, 0, 2]])), torch.eye(3)[None])


def slow_warp(picture: Tensor, camera: CropCameras, index: int, level: int) -> Tensor:
    """Each output pixel by itself: its place in the scaled picture, bilinear between pixel centres, zero outside."""
    scale = 2**level
    shrunk = picture.reshape(3, picture.shape[1] // scale, scale, picture.shape[2] // scale, scale).mean(dim=(2, 4))
    turned = (camera.intrinsics[index] @ camera.rotation[index]).double()
    back = INTRINSICS[index].double() @ torch.linalg.inv(turned)
    out = torch.zeros(3, SIDE, SIDE)
    for row in range(0, SIDE, 7):
        for column in range(0, SIDE, 7):
            x, y, z = (back @ torch.tensor([column, row, 1.0], dtype=torch.float64)).tolist()
            place_x, place_y = (x / z + 0.5) / scale - 0.5, (y / z + 0.5) / scale - 0.5
            left, top = math.floor(place_x), math.floor(place_y)
            for j, i in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= j < shrunk.shape[1] and 0 <= i < shrunk.shape[2]:
                    out[:, row, column] += shrunk[:, j, i] * (1 - abs(place_x - i)) * (1 - abs(place_y - j))
    return out[:, ::7, ::7]


def test_crops_are_what_the_cameras_see(cameras: CropCameras) -> None:
    pictures = torch.rand(2, 3, 88, 120, generator=torch.Generator().manual_seed(0))
    # the same boxes at three zooms, so that each level of the pyramid is used
    boxes = torch.cat([BOXES[:1], torch.tensor([[0.0, 0, 100, 140], [-90, -95, 300, 280]])])
    wide = look_at(boxes, INTRINSICS, SIDE)
    levels = (-wide.zoom.log2()).floor().clamp(0, 2).int().tolist()
    assert levels == [0, 1, 2]
    frame_of_crop = torch.tensor([1, 0, 1])
    crops = warp(pyramid(pictures), frame_of_crop, INTRINSICS, wide, SIDE)
    for index, level in enumerate(levels):
        expected = slow_warp(pictures[frame_of_crop[index]], wide, index, level)
        torch.testing.assert_close(crops[index, :, ::7, ::7], expected, atol=1e-4, rtol=0)


def test_zoomed_in_and_far_away_crops_use_the_first_and_last_level() -> None:
    levels = [torch.full((1, 3, 40 // 2**level, 40 // 2**level), float(level + 1)) for level in range(3)]
    boxes = torch.tensor([[15.0, 15, 10, 10], [-1000, -1000, 2040, 2040]])
    intrinsics = default_intrinsics(40, 40).expand(2, 3, 3)
    crops = warp(levels, torch.zeros(2, dtype=torch.int64), intrinsics, look_at(boxes, intrinsics, SIDE), SIDE)
    assert crops[0].amax() == pytest.approx(1)
    assert crops[1].amax() > 2


def test_linear_light_is_the_display_gamma() -> None:
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 1, 2, 3)
    expected = torch.tensor([0, 0.2**2.2, 1]).reshape(1, 3, 1, 1).expand(1, 3, 1, 2)
    torch.testing.assert_close(linear_light(frames, torch.float32), expected)


def test_crop_tone_is_brighter_than_the_display() -> None:
    linear = torch.tensor([0.0, 0.2**2.2, 1])
    torch.testing.assert_close(display_tone(linear), torch.tensor([0.0, 0.2**0.8, 1]))
