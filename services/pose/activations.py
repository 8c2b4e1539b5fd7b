"""What the steps of an extraction take of a GPU besides weights, in bytes.

They are counted, not estimated: each step runs on the meta device, where every tensor has its size and none its contents,
and the most that is alive at once is noted. What cannot be seen there stands in services.pose.plan: the driver's own,
workspaces, and what onnxruntime does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from runtime.alive import Alive
from runtime.weights import build_on_meta
from services.pose.bilinear import bilinear_on_device
from services.pose.clip import Batch
from services.pose.detect import YoloxConfig, letterbox_on_device
from services.pose.nlf.config import NlfSizes
from services.pose.nlf.crops import linear_light
from services.pose.nlf.detector import decode, letterboxed
from services.pose.nlf.model import NlfEstimator
from services.pose.nlf.weights import unloaded_nlf
from services.pose.onnx_file import OnnxSizes
from services.pose.people import MAX_PEOPLE
from services.pose.persons.masks import PersonPrompt, alone
from services.pose.render import most_bytes
from services.pose.skeleton import limbs_of

if TYPE_CHECKING:
    from services.pose.persons.sam import SegmenterConfig
    from services.pose.persons.sam2 import Sam2Config

_META = torch.device("meta")
_DETECTOR_NUMBERS = 85  # of a cell: place, size, objectness, 80 classes
_POINTS, _BINS_PER_PIXEL = 133, 2
_CROPS = 64  # at once, where the batch does not say
_MEMORY_BYTES = 4 * 1024**2
"""Of Segment Anything 2.1, of each person in the frames after the first: six of half a MiB, and pointers."""


@dataclass(frozen=True)
class MaskBytes:
    """Of a back-end: the most while a frame is looked at, and what is kept of a clip until the next."""

    most: int
    kept: int


@dataclass(frozen=True)
class WeightBytes:
    """Of a network: all of them; those of its blocks, which may be streamed; and of the largest block."""

    total: int
    blocks: int = 0
    largest_block: int = 0


@lru_cache(maxsize=64)
def people_bytes(
    detector: OnnxSizes, whole_body: OnnxSizes, together: int, batch: Batch, height: int, width: int
) -> int:
    """Of looking for people in frames [H, W] on the device, with `together` crops at once, outside of the networks."""
    frames_of = batch.frames, height, width, 3
    cells = sum((detector.height // stride) * (detector.width // stride) for stride in YoloxConfig().strides)
    crop = whole_body.height, whole_body.width
    with torch.inference_mode(), _META, Alive() as alive:
        frames = torch.empty(frames_of, dtype=torch.uint8)
        canvas, _ = letterbox_on_device(frames, detector.height, detector.width)
        pictures = canvas.flip(-1).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        found = pictures.new_empty(len(frames), cells, _DETECTOR_NUMBERS)
        del canvas, pictures, found
        rows, columns = (np.zeros((together, side)) for side in crop)
        which = torch.zeros(together, dtype=torch.int64, device="cpu")
        shown = bilinear_on_device(frames, which, rows, columns, outside="black").flip(-1)
        pictures = ((shown - torch.empty(3)) / torch.empty(3)).permute(0, 3, 1, 2).contiguous()
        bins = pictures.new_empty(together, _POINTS, sum(crop) * _BINS_PER_PIXEL)
        del shown, pictures, bins
    return alive.most


def joints_bytes(nlf: NlfSizes, dtype: torch.dtype, detector: OnnxSizes, batch: Batch, height: int, width: int) -> int:
    """Of locating people in frames [H, W]: the detector's pictures, then NLF with its own and its crops."""
    return max(boxes_bytes(detector, batch.frames, height, width), _located(nlf, dtype, batch, height, width))


@lru_cache(maxsize=64)
def boxes_bytes(detector: OnnxSizes, count: int, height: int, width: int) -> int:
    """Of NLF's looking for people in so many frames [H, W], outside of the network."""
    cells = sum((detector.height // stride) ** 2 for stride in YoloxConfig().strides)
    with torch.inference_mode(), Alive() as alive:
        frames = torch.empty(count, height, width, 3, dtype=torch.uint8, device=_META)
        pictures = linear_light(frames, torch.float32)
        boxed = letterboxed(pictures, detector.height)
        given = boxed.float() * 255
        found = given.new_empty(count, cells, _DETECTOR_NUMBERS)
        del given
        decode(found, detector.height)
        del pictures, boxed, found
    return alive.most


@lru_cache(maxsize=64)
def _located(nlf: NlfSizes, dtype: torch.dtype, batch: Batch, height: int, width: int) -> int:
    crops = batch.crops or _CROPS
    unloaded = _nlf(nlf, dtype)
    estimator = NlfEstimator(unloaded.config, unloaded.model, unloaded.canonical_points, crops_at_once=crops)
    with torch.inference_mode(), _NormsInOneKernel(), Alive() as alive:
        frames = torch.empty(batch.frames, height, width, 3, dtype=torch.uint8, device=_META)
        each = -(-crops // batch.frames)
        box = torch.tensor([[0.0, 0.0, width, height]], device="cpu").expand(each, 4)
        estimator.poses(frames, [box] * batch.frames)
    return alive.most


def drawing_bytes(batch: Batch, height: int, width: int) -> int:
    """Of drawing as many people as there may be, with the frames that were drawn last."""
    limbs = limbs_of(np.zeros((1, MAX_PEOPLE, 24, 3), np.float32)).starts.shape[1]
    return _drawn(batch, limbs, height, width) + batch.frames * height * width * 3


@lru_cache(maxsize=64)
def _drawn(batch: Batch, limbs: int, height: int, width: int) -> int:
    return most_bytes(batch.frames, limbs, height, width, batch.tiles)


@lru_cache(maxsize=8)
def nlf_weights(nlf: NlfSizes, dtype: torch.dtype) -> WeightBytes:
    return WeightBytes(_size(_nlf(nlf, dtype).model))


@lru_cache(maxsize=8)
def _nlf(nlf: NlfSizes, dtype: torch.dtype) -> NlfEstimator:
    return unloaded_nlf(nlf, dtype)


@lru_cache(maxsize=8)
def sam2_weights(config: Sam2Config) -> WeightBytes:
    from services.pose.persons.sam2 import Sam2Network

    network = build_on_meta(lambda: Sam2Network(config))
    blocks = [_size(block) for block in network.blocks]
    return WeightBytes(_size(network), sum(blocks), max(blocks))


@lru_cache(maxsize=16)
def sam2_bytes(config: Sam2Config, people: int, height: int, width: int) -> MaskBytes:
    """Of Segment Anything 2.1; what one frame leaves is there while the next is looked at."""
    from services.pose.persons.sam2 import Sam2Masks, Sam2Network

    network = build_on_meta(lambda: Sam2Network(config)).eval()
    frame = torch.zeros(height, width, 3, dtype=torch.uint8)
    with torch.inference_mode(), Alive() as alive:
        clip = Sam2Masks(network).begin(frame, [_prompt(height, width)] * people)
        kept = alive.now + people * _MEMORY_BYTES
        alone(frame, clip.first, (0, 0, 0))
    return MaskBytes(alive.most, kept)


@lru_cache(maxsize=8)
def segmenter_weights(config: SegmenterConfig) -> WeightBytes:
    from services.pose.persons.sam import SegmenterModel

    return WeightBytes(_size(build_on_meta(lambda: SegmenterModel(config))))


@lru_cache(maxsize=8)
def segmenter_bytes(config: SegmenterConfig) -> int:
    """Of Segment Anything looking at a picture; asking it for people takes far less."""
    from services.pose.persons.sam import SegmenterModel

    model = build_on_meta(lambda: SegmenterModel(config)).eval()
    side = config.image_size
    with torch.inference_mode(), Alive() as alive:
        model.embed(torch.empty(1, 3, side, side, device=_META))
    return alive.most


@lru_cache(maxsize=1)
def matanyone_weights() -> WeightBytes:
    from services.pose.persons.matanyone.config import MatAnyoneConfig
    from services.pose.persons.matanyone.network import MatAnyone

    return WeightBytes(_size(build_on_meta(lambda: MatAnyone(MatAnyoneConfig()))))


@lru_cache(maxsize=16)
def matanyone_bytes(people: int, height: int, width: int) -> MaskBytes:
    """Of MatAnyone with a full memory."""
    from services.pose.persons.matanyone.config import MatAnyoneConfig, PropagationConfig
    from services.pose.persons.matanyone.network import MatAnyone
    from services.pose.persons.matanyone.propagation import Propagation

    network, config = build_on_meta(lambda: MatAnyone(MatAnyoneConfig())).eval(), PropagationConfig()
    with torch.inference_mode(), _META, _NormsInOneKernel(), Alive() as alive:
        clip = Propagation(network, config, torch.empty(3, height, width), torch.empty(people, height, width))
        for _ in range(config.max_memory_frames):
            clip.memory.add(clip.seen, clip.values.clone())
        clip.step(torch.empty(3, height, width))
        kept = alive.now
        alone(torch.empty(height, width, 3, dtype=torch.uint8), clip.mattes, (0, 0, 0))
    return MaskBytes(alive.most, kept)


class _NormsInOneKernel(TorchFunctionMode):
    """Batch norms as GPUs compute them; on the meta device they come apart into ten tensors."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return torch.empty_like(args[0]) if function is functional.batch_norm else function(*args, **(kwargs or {}))


def _prompt(height: int, width: int) -> PersonPrompt:
    return PersonPrompt((0.0, 0.0, float(width), float(height)), ((width / 2, height / 2),) * 4)


def _size(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
