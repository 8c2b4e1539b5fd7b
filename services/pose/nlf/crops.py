"""Frames and boxes -> crops seen by virtual cameras that look straight at each box.

A crop's camera stands where the frame's does, is turned towards the middle of the box, and zoomed until the box fills
[side, side] pixels; so a person at the border of the picture is seen as undistorted as one in its middle.
Pictures are in linear light while they are scaled and sampled; crops leave with a display's tone again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor
from torch.nn import functional

DISPLAY_GAMMA = 2.2
# the network's tone, as a share of the display's gamma: the middle of the range 0.6 to 1 that was used in training
CROP_GAMMA = 0.8
DEFAULT_FOV_DEGREES = 55.0
_PYRAMID_LEVELS = 3
_UP = (0.0, -1.0, 0.0)  # y points down
# of a box: its middle, then the middles of its top, right, bottom and left side
_BOX_POINTS = ((0.5, 0.5), (0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5))


@dataclass(frozen=True)
class CropCameras:
    """Cameras of n crops, float32: intrinsics [n, 3, 3], rotations [n, 3, 3] (rows are the axes), zooms [n]."""

    intrinsics: Tensor
    rotation: Tensor
    zoom: Tensor

    def __getitem__(self, chosen: slice) -> CropCameras:
        return CropCameras(self.intrinsics[chosen], self.rotation[chosen], self.zoom[chosen])


def default_intrinsics(height: int, width: int, fov_degrees: float = DEFAULT_FOV_DEGREES) -> Tensor:
    """[3, 3] float32 of a camera whose larger side spans `fov_degrees`; its axis meets the middle pixel centre."""
    half_angle = torch.tensor(fov_degrees, dtype=torch.float32) * (pi / 180) / 2
    intrinsics = torch.eye(3)
    intrinsics[0, 0] = intrinsics[1, 1] = max(height, width) / (half_angle.tan() * 2)
    intrinsics[0, 2], intrinsics[1, 2] = (width - 1) / 2, (height - 1) / 2
    return intrinsics


def look_at(boxes: Tensor, intrinsics: Tensor, side: int) -> CropCameras:
    """Cameras for boxes.

    Args:
        boxes: [n, 4 or more]: left, top, width, height in pixels of the frame.
        intrinsics: [n, 3, 3] of the frames that the boxes are in.
        side: pixels of a crop.
    """
    fractions = boxes.new_tensor(_BOX_POINTS)
    pixels = boxes[:, None, :2] + fractions * boxes[:, None, 2:4]  # [n, 5, 2]
    rays = functional.pad(pixels, (0, 1), value=1) @ torch.linalg.inv(intrinsics).mT
    rotation = facing(rays[:, 0])
    turned = rays[:, 1:] @ (intrinsics @ rotation).mT
    top, right, bottom, left = (turned[..., :2] / turned[..., 2:]).unbind(dim=1)
    size = torch.maximum((top - bottom).norm(dim=-1), (right - left).norm(dim=-1))
    zoom = side / size
    zoomed = intrinsics.clone()
    zoomed[:, :2, :2] *= zoom[:, None, None]
    zoomed[:, :2, 2] = side / 2
    return CropCameras(zoomed, rotation, zoom)


def facing(directions: Tensor) -> Tensor:
    """Rotations [n, 3, 3] whose z axis is the direction [n, 3], in front of the camera, and whose x axis is level."""
    z = functional.normalize(directions, dim=-1)
    x = functional.normalize(torch.linalg.cross(z, z.new_tensor(_UP).expand_as(z)), dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=1)


def linear_light(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [n, H, W, 3] -> pictures [n, 3, H, W] in linear light, 0 to 1, in `dtype`."""
    return (frames.permute(0, 3, 1, 2).to(dtype) * (1 / 255)).pow(DISPLAY_GAMMA)


def pyramid(pictures: Tensor) -> list[Tensor]:
    """Pictures at full, half and quarter size; each pixel the mean of 2x2 of the level before."""
    levels = [pictures]
    while len(levels) < _PYRAMID_LEVELS:
        levels.append(functional.avg_pool2d(levels[-1], 2))
    return levels


def warp(
    levels: Sequence[Tensor], frame_of_crop: Tensor, intrinsics: Tensor, cameras: CropCameras, side: int
) -> Tensor:
    """What the cameras see.

    Args:
        levels: from `pyramid`, on the device that computes.
        frame_of_crop: int64 [n], which picture each crop is cut from. This and the cameras are best on the CPU: the
            level is chosen per crop, and the device need not be waited for.
        intrinsics: [n, 3, 3] of those pictures.

    Returns:
        [n, 3, side, side] in the pictures' dtype, zero outside the picture.
    """
    pictures = levels[0]
    crops = pictures.new_empty(len(frame_of_crop), pictures.shape[1], side, side)
    to_rays = torch.linalg.inv(cameras.intrinsics @ cameras.rotation)
    level_of_crop = (-cameras.zoom.log2()).floor().clamp(0, _PYRAMID_LEVELS - 1).long()
    for level, scaled in enumerate(levels):
        (chosen,) = torch.nonzero(level_of_crop == level, as_tuple=True)
        if len(chosen):
            to_pixels = scale_matrix(2.0**-level).to(intrinsics) @ intrinsics[chosen]
            homographies = (to_rays[chosen].to(pictures.device), to_pixels.to(pictures.device))
            chosen = chosen.to(pictures.device)
            crops[chosen] = sample(scaled[frame_of_crop.to(pictures.device)[chosen]], *homographies, side)
    return crops


def scale_matrix(scale: float) -> Tensor:
    """[3, 3]: pixels of a picture -> pixels of the same picture scaled; pixel i's centre stays where it is, at i + 1/2."""
    shift = (scale - 1) / 2
    return torch.tensor([[scale, 0, shift], [0, scale, shift], [0, 0, 1]])


def sample(pictures: Tensor, to_rays: Tensor, to_pixels: Tensor, side: int) -> Tensor:
    """Bilinear samples of pictures.

    Args:
        pictures: [n, 3, H, W].
        to_rays: [n, 3, 3], homographies from the crops' pixels to directions.
        to_pixels: [n, 3, 3], from directions on the plane z = 1 to the pictures' pixels.

    Returns:
        [n, 3, side, side], in the pictures' dtype.
    """
    steps = torch.arange(side, dtype=torch.float32, device=pictures.device)
    pixels = functional.pad(torch.cartesian_prod(steps, steps).flip(-1), (0, 1), value=1)  # x, y, 1; x fastest
    rays = pixels @ to_rays.mT  # [n, side * side, 3]
    places = functional.pad(rays[..., :2] / rays[..., 2:], (0, 1), value=1) @ to_pixels.mT
    # grid_sample's -1 and 1 are the centres of the first and the last pixel
    last = steps.new_tensor([pictures.shape[3] - 1, pictures.shape[2] - 1])
    grid = torch.unflatten(places[..., :2] * (2 / last) - 1, 1, (side, side))
    # half precision rounds the places and what is sampled, the arithmetic between is float32
    grid = grid.to(pictures.dtype).float()
    return functional.grid_sample(pictures.float(), grid, align_corners=True).to(pictures.dtype)


def display_tone(crops: Tensor) -> Tensor:
    """Linear light -> the tone that the network is given."""
    return crops.pow(CROP_GAMMA / DISPLAY_GAMMA)
