"""Drawn pictures with what is true of them, and the ways in which a video spoils pictures.

Pictures are drawn once and then shown many times, cut, moved and spoilt differently each time: drawing costs more than
a training step of these small networks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

# luma and chroma of BT.601, rows of Y, Cb, Cr
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@dataclass(frozen=True)
class Pictures:
    """n pictures of at most one person each.

    Attributes:
        frames: uint8 [n, H, W, 3], RGB.
        boxes: float32 [n, 4]: left, top, right, bottom in pixels, inside the frame.
        shown: bool [n]: whether the person is in the picture at all.
        points: float32 [n, 133, 2], pixels, in the order of COCO-WholeBody.
        visible: bool [n, 133].
        joints: float32 [n, 24, 3], millimetres in the frame's camera, SMPL's order.
    """

    frames: Tensor
    boxes: Tensor
    shown: Tensor
    points: Tensor
    visible: Tensor
    joints: Tensor

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows: Tensor | slice) -> Pictures:
        return Pictures(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def joined(cls, parts: list[Pictures]) -> Pictures:
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def batch(self, size: int, generator: torch.Generator) -> Pictures:
        """`size` of them drawn at random; the generator is on the pictures' device."""
        device = self.frames.device
        return self[torch.randint(len(self), (size,), generator=generator, device=device)]


def chance(count: int, share: float, generator: torch.Generator) -> Tensor:
    """bool [count], true for `share` of them."""
    return torch.rand(count, generator=generator, device=generator.device) < share


def between(low: float, high: float, *shape: int, generator: torch.Generator) -> Tensor:
    """float32 of that shape, uniform."""
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)


def spoilt(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Levels [n, 3, H, W], RGB, 0 to 255, as after a camera and a video encoder: other brightness and contrast, colour at
    half the resolution, softened, noisy, in whole levels; each for some of the pictures only."""
    count = len(levels)
    levels = torch.where(chance(count, 0.5, generator)[:, None, None, None], half_resolution_colour(levels), levels)
    levels = torch.where(chance(count, 0.25, generator)[:, None, None, None], softened(levels), levels)
    gain = between(0.75, 1.2, count, 1, 1, 1, generator=generator)
    shift = between(-20, 20, count, 1, 1, 1, generator=generator)
    amount = between(0, 6, count, 1, 1, 1, generator=generator) * chance(count, 0.5, generator)[:, None, None, None]
    noise = torch.randn(levels.shape, generator=generator, device=levels.device) * amount
    return (levels * gain + shift + noise).round().clamp(0, 255)


def half_resolution_colour(levels: Tensor) -> Tensor:
    """Levels [n, 3, H, W] with the chroma of each 2x2 block spread smoothly, as 4:2:0 video does."""
    matrix = levels.new_tensor(_YCBCR)
    planes = torch.einsum("kc,nchw->nkhw", matrix, levels)
    chroma = functional.interpolate(functional.avg_pool2d(planes[:, 1:], 2), levels.shape[-2:], mode="bilinear")
    return torch.einsum("ck,nkhw->nchw", torch.linalg.inv(matrix), torch.cat([planes[:, :1], chroma], dim=1))


def softened(levels: Tensor) -> Tensor:
    """Levels [n, 3, H, W], each the mean of its neighbourhood with weights 1, 2, 1 along either axis."""
    kernel = levels.new_tensor([1.0, 2.0, 1.0]) / 4
    weights = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return functional.conv2d(functional.pad(levels, (1, 1, 1, 1), mode="replicate"), weights, groups=3)


def boxes_near(boxes: Tensor, generator: torch.Generator, *, shift: float = 0.06, grow: float = 0.12) -> Tensor:
    """Boxes [n, 4] as an imperfect detector finds them: moved and scaled by up to these shares of their size."""
    count = len(boxes)
    low, high = boxes[:, :2], boxes[:, 2:]
    size = high - low
    middle = (low + high) / 2 + size * between(-shift, shift, count, 2, generator=generator)
    half = size / 2 * (1 + between(-grow / 2, grow, count, 2, generator=generator))
    return torch.cat([middle - half, middle + half], dim=1)


def only_inside(levels: Tensor, boxes: Tensor) -> Tensor:
    """Levels [n, 3, H, W], black but for the person's rectangle [n, 4] with the margin of services.pose.people."""
    height, width = levels.shape[-2:]
    margin = boxes.new_tensor([0.025 * width, 0.05 * height])
    low, high = (boxes[:, :2] - margin).floor(), (boxes[:, 2:] + margin).ceil()
    x, y = (torch.arange(side, device=levels.device) for side in (width, height))
    across = (x >= low[:, :1]) & (x < high[:, :1])
    along = (y >= low[:, 1:]) & (y < high[:, 1:])
    return levels * (along[:, None, :, None] & across[:, None, None, :])


def window(levels: Tensor, transforms: Tensor, height: int, width: int, *, outside: float | Tensor = 0.0) -> Tensor:
    """Cuts [n, 3, height, width] of levels [n, 3, H, W], bilinear.

    Args:
        transforms: [n, 2, 3], places in the frame -> places in the cut, zoomed and shifted, whole numbers being the
            middles of pixels (as services.pose.keypoints.crop_transforms).
        outside: what lies beyond the frame, broadcast to the pictures.
    """
    steps = [torch.arange(side, device=levels.device, dtype=torch.float32) for side in (height, width)]
    rows, columns = (
        (step[None] - transforms[:, axis, 2:]) / transforms[:, axis, axis, None]
        for step, axis in zip(steps, (1, 0), strict=True)
    )
    y, x = rows * (2 / (levels.shape[2] - 1)) - 1, columns * (2 / (levels.shape[3] - 1)) - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return functional.grid_sample(levels - outside, grid, align_corners=True) + outside
