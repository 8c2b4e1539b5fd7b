"""Frames and boxes of people -> their joints in front of the camera, millimetres: the NLF estimator.

The canonical points are vertices of the body followed by the 24 SMPL joints; all of them are located, since a person's
distance and plausibility follow from all, and the last 24 are the joints. No body model is fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from services.pose.nlf.config import HeadSizes, NlfConfig, NlfQuirks
from services.pose.nlf.crops import (
    DISPLAY_GAMMA,
    CropCameras,
    default_intrinsics,
    display_tone,
    linear_light,
    look_at,
    pyramid,
    warp,
)
from services.pose.nlf.detector import PersonDetector
from services.pose.nlf.head import PointHead, PointWeights
from services.pose.nlf.poses import Poses, ranked

NUM_JOINTS = 24
_BATCH_SIZE = 64  # the released programs' own, of frames and of crops


class Normalise(nn.Module):
    """(x - mean) / std with the checkpoint's two numbers."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.5))
        self.register_buffer("std", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class CropModel(nn.Module):
    """Crops -> points in front of the crops' cameras; the part of the estimator that has weights.

    The backbone and the head's first layer may be in half precision, the head's weight field is float32.
    """

    def __init__(self, config: NlfConfig, sizes: HeadSizes, features: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(Normalise(), features)
        self.heatmap_head = PointHead(config, sizes)

    @property
    def device(self) -> torch.device:
        return self.heatmap_head.weight_field.r_sqrt_eigva.device

    def forward(self, crops: Tensor, intrinsics: Tensor, weights: PointWeights) -> tuple[Tensor, Tensor]:
        """Locates the points that `weights` are for.

        Args:
            crops: [n, 3, side, side], 0 to 1.
            intrinsics: float32 [n, 3, 3] of the crops.

        Returns:
            millimetres [n, P, 3] and uncertainties [n, P], float32.
        """
        features = self.heatmap_head.layer(self.backbone(crops.to(weights.weight.dtype)))
        return self.heatmap_head.absolute(self.heatmap_head.locate(features, weights), intrinsics)


class NlfEstimator:
    """3D joints of people in frames, with the weights in `model`; whoever moves `model` decides where it computes.

    Nothing of a clip is kept between calls. On a GPU, matrix products of float32 must not be TF32, as they are not by
    default: places in the crops and distances would be off by pixels and by decimetres.

    Args:
        canonical_points: float32 [P, 3], metres; the last 24 are the SMPL joints.
        batch_size: the most frames, and the most crops, that make a batch.
        crops_at_once: of a batch, that are on the device at once; None: all.
    """

    def __init__(
        self,
        config: NlfConfig,
        model: CropModel,
        canonical_points: Tensor,
        *,
        quirks: NlfQuirks | None = None,
        batch_size: int = _BATCH_SIZE,
        crops_at_once: int | None = None,
    ) -> None:
        self.config, self.model, self.canonical_points = config, model, canonical_points
        self.quirks, self.batch_size = quirks or NlfQuirks(), batch_size
        self.crops_at_once = min(crops_at_once or batch_size, batch_size)

    @torch.inference_mode()
    def estimate(self, frames: Tensor, boxes: Sequence[Tensor], intrinsics: Tensor | None = None) -> Tensor:
        """Joints of the people in given boxes; arguments as for `poses`.

        Returns:
            float32 [n, 24, 3]: millimetres in the frame's camera (x right, y down, z forward), a row per box.
        """
        return self.poses(frames, boxes, intrinsics).millimetres[:, -NUM_JOINTS:]

    @torch.inference_mode()
    def find_joints(self, frames: Tensor, detector: PersonDetector, intrinsics: Tensor | None = None) -> Tensor:
        """Joints of the best person that the detector and the plausibility check leave in each frame.

        Returns:
            float32 [num_frames, 24, 3] on the host, as from `estimate`; zeros where nobody was found.
        """
        joints = torch.zeros(len(frames), NUM_JOINTS, 3)
        for start in range(0, len(frames), self.batch_size):
            portion = frames[start : start + self.batch_size].to(self.model.device)
            boxes = detector.detect(linear_light(portion, self._crop_dtype))
            cameras = None if intrinsics is None else intrinsics.expand(len(frames), 3, 3)[start:][: len(portion)]
            poses = self.poses(portion, boxes, cameras)
            # nobody is a duplicate of the best; all frames at once, so that the device is waited for once
            ranks = ranked(poses, torch.cat(boxes).to(self.model.device)).cpu()
            located = poses.millimetres[:, -NUM_JOINTS:].cpu()
            counts = [len(rows) for rows in boxes]
            people = zip(torch.split(ranks, counts), torch.split(located, counts), strict=True)
            for frame, (mine, places) in enumerate(people, start):
                if (mine > -torch.inf).any():
                    joints[frame] = places[mine.argsort(descending=True, stable=True)[0]]
        return joints

    @torch.inference_mode()
    def poses(self, frames: Tensor, boxes: Sequence[Tensor], intrinsics: Tensor | None = None) -> Poses:
        """All points of the people in given boxes.

        Args:
            frames: uint8 [num_frames, H, W, 3].
            boxes: per frame [k, 4 or more]: left, top, width, height in pixels; best on the CPU.
            intrinsics: [3, 3] or [num_frames, 3, 3]; by default those of `default_intrinsics`.

        Returns:
            one row per box, in the order of the frames, on the model's device.
        """
        device, counts = self.model.device, torch.tensor([len(rows) for rows in boxes])
        if not counts.sum():
            return self._nobody()
        if intrinsics is None:
            intrinsics = default_intrinsics(frames.shape[1], frames.shape[2])
        all_boxes = torch.cat([rows[:, :4] for rows in boxes]).float()
        frame_of_box = torch.arange(len(frames)).repeat_interleave(counts)
        of_box = intrinsics.to(all_boxes).expand(len(frames), 3, 3)[frame_of_box.to(all_boxes.device)]
        cameras = look_at(all_boxes, of_box, self.config.proc_side)
        weights = self.model.heatmap_head.point_weights(self.canonical_points.to(device))
        found = [
            self._batch(frames, frame_of_box[chosen], of_box[chosen], cameras[chosen], weights, turn)
            for turn, chosen in self._portions(len(frame_of_box))
        ]
        return Poses(
            torch.cat([batch.millimetres for batch in found]),
            torch.cat([batch.pixels for batch in found]),
            torch.cat([batch.uncertainties for batch in found]),
        )

    def _portions(self, count: int) -> Iterator[tuple[int, slice]]:
        """Which of so many crops are on the device together, and of which batch they are."""
        for turn, start in enumerate(range(0, count, self.batch_size)):
            end = min(start + self.batch_size, count)
            for first in range(start, end, self.crops_at_once):
                yield turn, slice(first, min(first + self.crops_at_once, end))

    def _batch(
        self,
        frames: Tensor,
        frame_of_crop: Tensor,
        intrinsics: Tensor,
        cameras: CropCameras,
        weights: PointWeights,
        turn: int,
    ) -> Poses:
        """Some people of one batch, number `turn` of the call."""
        device = self.model.device
        crops = self.crops(frames, frame_of_crop, intrinsics, cameras, turn)
        in_crop, uncertainties = self.model(crops, cameras.intrinsics.to(device), weights)
        # fp64: metres of distance, turned back
        millimetres = (in_crop.double() @ cameras.rotation.to(device).double()).float()
        projected = millimetres / millimetres[..., 2:] @ intrinsics.to(device).mT
        return Poses(millimetres, projected[..., :2], uncertainties)

    def crops(
        self, frames: Tensor, frame_of_crop: Tensor, intrinsics: Tensor, cameras: CropCameras, turn: int = 0
    ) -> Tensor:
        """What the crops' cameras see of their frames, as the model takes it: [n, 3, side, side], 0 to 1.

        Args:
            frames: uint8 [num_frames, H, W, 3].
            frame_of_crop: int64 [n].
            intrinsics: [n, 3, 3] of the crops' frames.
            turn: number of their batch in the call; it matters for one of the quirks alone.
        """
        used, picture_of_crop = torch.unique(frame_of_crop, return_inverse=True)
        pictures = linear_light(frames[used.to(frames.device)].to(self.model.device), self._crop_dtype)
        if self.quirks.linearise_twice:
            pictures = pictures.pow(DISPLAY_GAMMA)
        pad_white = self.config.pad_white_pixels
        if pad_white and not (self.quirks.negative_odd_batches and turn % 2):
            pictures = 1 - pictures
        crops = warp(pyramid(pictures), picture_of_crop, intrinsics, cameras, self.config.proc_side)
        if pad_white:
            crops = (1 - crops).clamp(0, 1)
        return display_tone(crops)

    def _nobody(self) -> Poses:
        none = torch.zeros(0, len(self.canonical_points), 3, device=self.model.device)
        return Poses(none, none[..., :2], none[..., 0])

    @property
    def _crop_dtype(self) -> torch.dtype:
        return torch.float16 if self.quirks.half_precision_crops else torch.float32
