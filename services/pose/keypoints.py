"""Boxes of people -> their 134 keypoints, by an RTMPose network.

Keypoints are [134, 3]: x, y, score 0 to 1. In OpenPose's order: 18 of the body (0 nose, 1 neck, 2-4 right arm,
5-7 left arm, 8-10 right leg, 11-13 left leg, 14 right eye, 15 left eye, 16 right ear, 17 left ear), 6 of the feet,
68 of the face, 21 of the left hand, 21 of the right hand.

Source: RTMPose, Jiang et al. 2023 (arXiv:2303.07399), trained as DWPose, Yang et al. 2023 (arXiv:2307.15880); fed and
read as zai-org/SCAIL-Pose 830da75 DWPoseProcess/dwpose/{onnxpose,wholebody,__init__}.py does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.pose.bilinear import Frame, bilinear, bilinear_on_device
from services.pose.onnx import OnnxNetwork
from services.pose.onnx_file import WrongNetwork
from services.pose.threads import beside_each_other

Floats = npt.NDArray[np.floating[Any]]

NUM_KEYPOINTS = 134
VISIBLE_SCORE = 0.3
_NUM_PREDICTED = NUM_KEYPOINTS - 1  # the network knows no neck
BODY_AND_FEET, FACE, LEFT_HAND, RIGHT_HAND = slice(0, 24), slice(24, 92), slice(92, 113), slice(113, 134)

_PADDING = 1.25
"""How much larger than the box the part of the frame is that the network sees."""

# of RGB; the released code applies them to BGR, and the keypoints that SCAIL was trained with came from that
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)

_LEFT_SHOULDER, _RIGHT_SHOULDER = 5, 6  # in the network's order
_NECK = 17  # where the neck is put before the body is put into OpenPose's order
# the place in OpenPose's order: the place it is taken from; all others stay
_OPENPOSE_BODY = {
    1: 17,
    2: 6,
    3: 8,
    4: 10,
    6: 7,
    7: 9,
    8: 12,
    9: 14,
    10: 16,
    12: 13,
    13: 15,
    14: 2,
    15: 1,
    16: 4,
    17: 3,
}
_OPENPOSE_ORDER = [_OPENPOSE_BODY.get(place, place) for place in range(NUM_KEYPOINTS)]


@dataclass(frozen=True)
class WholeBodies:
    """Keypoints of n people by part; x and y only.

    Attributes:
        bodies: [n, 24, 2], known even where not visible.
        visible: bool [n, 24], of `bodies`.
        faces: [n, 68, 2], (-1, -1) where not visible.
        hands: [2n, 21, 2], the left hands of everybody, then the right ones; (-1, -1) where not visible.
    """

    bodies: Floats
    visible: npt.NDArray[np.bool_]
    faces: Floats
    hands: Floats


class WholeBodyEstimator:
    """Keypoints of each person."""

    def __init__(self, network: OnnxNetwork, split_ratio: float = 2.0) -> None:
        """Takes a network that tells where along x and where along y each point is, in `split_ratio` bins per pixel.

        Raises:
            WrongNetwork: its outputs are not those.
        """
        self.network, self.split_ratio = network, split_ratio
        # of the outputs, x comes first
        expected = [(_NUM_PREDICTED, int(side * split_ratio)) for side in (network.width, network.height)]
        if list(network.shapes.values()) != expected:
            raise WrongNetwork(
                f"{network.source}: a whole-body network of {network.height}x{network.width} pictures gives simcc_x "
                f"{_shape(expected[0])} and simcc_y {_shape(expected[1])}, this network gives {network.gives}"
            )
        self._x, self._y = network.shapes

    def estimate(self, frames: Sequence[Frame] | Tensor, boxes: Sequence[Floats]) -> list[Floats]:
        """Keypoints of the people in each frame, in its pixels.

        Args:
            frames: uint8 RGB [H, W, 3]; or [n, H, W, 3] on the network's device, where then all is done up to the best
                bins: the same keypoints come out, to the last bit.
            boxes: per frame [n, 4 or more]: left, top, right, bottom in pixels; may be none.

        Returns:
            per frame float64 [n, 134, 3]. A point that the network sees nowhere has a score of 0.
        """
        people = [(index, box[:4]) for index, rows in enumerate(boxes) for box in rows]
        found: list[Floats] = [np.empty((0, NUM_KEYPOINTS, 3))]
        for start in range(0, len(people), self.network.batch):
            which, windows = zip(*people[start : start + self.network.batch], strict=True)
            found.append(self._estimate(frames, which, np.stack(windows)))
        ends = np.cumsum([len(rows) for rows in boxes])
        return np.split(np.concatenate(found), ends[:-1]) if len(boxes) else []

    def _estimate(self, frames: Sequence[Frame] | Tensor, which: Sequence[int], boxes: Floats) -> Floats:
        """People who are looked at together, in boxes [n, 4] of these frames -> [n, 134, 3]."""
        width = self.network.width
        transforms = crop_transforms(*crop_windows(boxes, width / self.network.height), width)
        if isinstance(frames, Tensor):
            places, scores = self._locate_on_device(frames, torch.tensor(which), transforms)
        else:
            places, scores = self._locate([frames[index] for index in which], transforms)
        return openpose(to_frame(places, transforms), scores)

    def _locate(self, frames: Sequence[Frame], transforms: Floats) -> tuple[Floats, Floats]:
        """The network's points in crops of frames, a crop of each: places [n, 133, 2] and scores [n, 133]."""
        height, width = self.network.height, self.network.width
        pictures = np.empty((len(frames), 3, height, width), np.float32)

        def put_in(picture: Floats, frame: Frame, transform: Floats) -> None:
            shown = crop(frame, transform, height, width)
            picture[:] = normalised(shown[..., ::-1]).transpose(2, 0, 1)  # BGR

        beside_each_other(put_in, pictures, frames, transforms)
        outputs = self.network.run(pictures)
        return decode_simcc(outputs[self._x], outputs[self._y], self.split_ratio)

    def _locate_on_device(self, frames: Tensor, which: Tensor, transforms: Floats) -> tuple[Floats, Floats]:
        """As `_locate`, of crops of the frames with these numbers."""
        rows, columns = _crop_places(transforms, self.network.height, self.network.width)
        shown = bilinear_on_device(frames, which, rows, columns, outside="black").flip(-1)  # BGR
        mean, std = (torch.from_numpy(values).to(frames.device) for values in (MEAN, STD))
        pictures = ((shown - mean) / std).permute(0, 3, 1, 2).contiguous()
        outputs = self.network.run_on_device(pictures)
        axes = [_best_bin(outputs[name]) for name in (self._x, self._y)]
        bins = torch.stack([best for best, _ in axes], dim=-1)
        scores = torch.minimum(*(score for _, score in axes))
        return _places(bins.cpu().numpy(), scores.cpu().numpy(), self.split_ratio)


def _shape(of_one: tuple[int, int]) -> str:
    return f"[n, {of_one[0]}, {of_one[1]}]"


def crop_windows(boxes: Floats, aspect: float) -> tuple[Floats, Floats]:
    """The part of the frame that the network sees for each box: larger, and of the network's proportions.

    Args:
        boxes: [n, 4]: left, top, right, bottom.
        aspect: width over height.

    Returns:
        middle [n, 2] and width and height [n, 2], float64, in pixels of the frame.
    """
    low, high = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    width, height = ((high - low) * _PADDING).T
    width, height = np.maximum(width, height * aspect), np.maximum(height, width / aspect)
    return (low + high) / 2, np.stack([width, height], axis=1)


def crop_transforms(middles: Floats, sizes: Floats, width: int) -> Floats:
    """Places in the frame -> places in the crop, per window: zoomed and shifted.

    Args:
        middles, sizes: [n, 2], as crop_windows gives them.
        width: of the crop.

    Returns:
        [n, 2, 3]; the middle of a window becomes the crop's (width / 2, height / 2).
    """
    zooms = width / sizes[:, 0]
    transforms = np.zeros((len(middles), 2, 3))
    transforms[:, 0, 0] = transforms[:, 1, 1] = zooms
    transforms[:, :, 2] = zooms[:, None] * (sizes / 2 - middles)
    return transforms


def crop(frame: Frame, transform: Floats, height: int, width: int) -> Frame:
    """What the network sees of a frame: uint8 [height, width, 3], black where the frame ends."""
    ((rows, columns),) = zip(*_crop_places(transform[None], height, width), strict=True)
    return bilinear(frame, rows, columns, outside="black")


def _crop_places(transforms: Floats, height: int, width: int) -> tuple[Floats, Floats]:
    """Where in the frame the rows [n, height] and columns [n, width] of crops are."""
    zooms, shifts = transforms[:, [0, 1], [0, 1], None], transforms[:, :, 2, None]
    return (np.arange(height) - shifts[:, 1]) / zooms[:, 1], (np.arange(width) - shifts[:, 0]) / zooms[:, 0]


def normalised(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Levels [..., 3] -> the network's numbers, channel by channel in the order given."""
    return (pixels - MEAN) / STD


def decode_simcc(simcc_x: Floats, simcc_y: Floats, split_ratio: float) -> tuple[Floats, Floats]:
    """Where each point is in the crop: the best bin of either axis.

    Args:
        simcc_x, simcc_y: [n, points, bins], how well each place along x and y fits.
        split_ratio: bins per pixel.

    Returns:
        places [n, points, 2] in pixels of the crop, half a bin outside it where no bin fits at all (no score above 0);
        scores [n, points], the lower of the two.
    """
    bins = np.stack([simcc_x.argmax(axis=-1), simcc_y.argmax(axis=-1)], axis=-1)
    return _places(bins, np.minimum(simcc_x.max(axis=-1), simcc_y.max(axis=-1)), split_ratio)


def _best_bin(simcc: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the best bins of each point [n, points, bins], and its score; argmax is free to take any of them."""
    scores, count = simcc.amax(dim=-1), simcc.shape[-1]
    bins = torch.arange(count, device=simcc.device)
    return torch.where(simcc == scores[..., None], bins, count).amin(dim=-1), scores


def _places(bins: npt.NDArray[np.int64], scores: Floats, split_ratio: float) -> tuple[Floats, Floats]:
    """Places of the best bins [n, points, 2], and their scores."""
    bins[scores <= 0] = -1
    return bins / split_ratio, scores


def to_frame(places: Floats, transforms: Floats) -> Floats:
    """Places [n, points, 2] in crops -> in the frames that they were cut from."""
    zooms = np.stack([transforms[:, 0, 0], transforms[:, 1, 1]], axis=-1)
    return (places - transforms[:, None, :, 2]) / zooms[:, None]


def openpose(places: Floats, scores: Floats) -> Floats:
    """The network's 133 points of COCO-WholeBody -> the 134 of OpenPose.

    Args:
        places: [n, 133, 2].
        scores: [n, 133], cut off at 0 and 1 here.

    Returns:
        [n, 134, 3]; the neck is halfway between the shoulders, its score 1 where both are visible, else 0.
    """
    scores = np.clip(scores, 0, 1)
    points = np.concatenate([places, scores[..., None]], axis=-1)
    shoulders = points[:, [_LEFT_SHOULDER, _RIGHT_SHOULDER]]
    neck = shoulders.mean(axis=1)
    neck[:, 2] = (shoulders[..., 2] > VISIBLE_SCORE).all(axis=1)
    return np.insert(points, _NECK, neck, axis=1)[:, _OPENPOSE_ORDER]


def split(keypoints: Floats) -> WholeBodies:
    """Keypoints [n, 134, 3] by part, with what is not visible taken out of faces and hands.

    A score of exactly 0.3 is visible in a face or hand and not in a body, as in the released code.
    """
    scores = keypoints[..., 2]
    places = keypoints[..., :2]
    cleared = np.where((scores < VISIBLE_SCORE)[..., None], -1, places)
    return WholeBodies(
        bodies=places[:, BODY_AND_FEET],
        visible=scores[:, BODY_AND_FEET] > VISIBLE_SCORE,
        faces=cleared[:, FACE],
        hands=np.concatenate([cleared[:, LEFT_HAND], cleared[:, RIGHT_HAND]]),
    )
