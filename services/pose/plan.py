"""The pose stage within a number of bytes of a GPU: how much of a clip is worked on at once, and which masks it can make.

A budget is for all that the process takes, by the driver's count. Tensors are counted (services.pose.activations), weights
too, from the sizes that files or presets state. What onnxruntime takes besides weights is derived: its build for GPUs
could not be had where the rest was measured (benchmarks/pose_memory.py).

Where memory is short the stage first works on less of a clip at once, and streams the masks' weights. Back-ends for masks
of several people that have no room at all are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bunraku.errors import OutOfMemory
from runtime.budget import DoesNotFit
from runtime.bundles import Bundle, BundleComponent, configuration
from runtime.streaming import PLACES
from services.pose import activations as counted
from services.pose.activations import MaskBytes, WeightBytes
from services.pose.clip import CLIPS_AT_A_TIME, Batch, frames_together
from services.pose.nlf.config import NlfSizes
from services.pose.nlf.weights import sizes_of
from services.pose.onnx_file import OnnxSizes
from services.pose.people import COMPONENTS

if TYPE_CHECKING:
    from services.pose.persons.sam import SegmenterConfig
    from services.pose.persons.sam2 import Sam2Config

GIB = 1024**3
MASK_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "sam2": ("person_masks",),
    "matanyone": ("person_segmenter", "person_mattes"),
}
"""Components of a bundle that each mask back-end needs."""
RELEASED_DETECTOR, RELEASED_WHOLE_BODY = OnnxSizes(54_174_271, 640, 640), OnnxSizes(33_593_637, 384, 288)
RELEASED_NLF = NlfSizes()
"""yolox_l.onnx, dw-ll_ucoco_384.onnx and nlf_l_multi_0.3.2, for plans without their files."""

# The CUDA context and loaded kernels of PyTorch, cuBLAS, cuDNN and cuSOLVER: 0.77 GiB on an H100 (benchmarks/pose_memory.py)
DEVICE_OVERHEAD_BYTES = 832 * 1024**2
# The allocator's: workspaces of cuBLAS and cuDNN, and gaps between tensors
_WORKSPACE_BYTES, _GAPS = 128 * 1024**2, 1.1
# onnxruntime's: tensors of YOLOX-l while it runs, per pixel of its pictures (RTMPose-l: 172), and gaps in its arena
_ONNX_BYTES_PER_PIXEL, _ONNX_GAPS = 216, 1.25
# Assumed: workspaces of a session, and kernels and handles of both besides PyTorch's
_ONNX_WORKSPACE_BYTES, _ONNX_OVERHEAD_BYTES = 64 * 1024**2, 128 * 1024**2
_MOST_ONNX_BATCH, _BUSY_ONNX_BATCH, _MOST_CROPS, _MOST_TILES = 8, 2, 64, 65536
HANDFUL = 8
"""Frames at a time: with SAM 2 they take 0.1 GiB more than one, which is slow (14 frames/s on an H100)."""
_PEOPLE = 2  # that a back-end must have room for not to be left out


@dataclass(frozen=True)
class Networks:
    """Sizes of a bundle's networks: all that their bytes follow from.

    Attributes:
        sam2, segmenter: None where the bundle has no such back-end; `segmenter` is that of MatAnyone, which has one size.
        preferred: the back-end that the bundle uses unless a request says otherwise.
        dtype: of NLF.
    """

    detector: OnnxSizes = RELEASED_DETECTOR
    whole_body: OnnxSizes = RELEASED_WHOLE_BODY
    nlf: NlfSizes = RELEASED_NLF
    sam2: Sam2Config | None = None
    segmenter: SegmenterConfig | None = None
    preferred: str = "sam2"
    dtype: torch.dtype = torch.float16

    @classmethod
    def of(cls, bundle: Bundle) -> Networks:
        """Of the files where they are there, else of the released ones.

        Raises:
            BundleError: a file is not the network that is needed.
        """
        detector, whole_body, joints = (bundle.component(name).files[0] for name in COMPONENTS)
        is_there = joints.is_file()
        masks = mask_components(bundle)
        if is_there:
            masks = {name: found for name, found in masks.items() if not missing_files(found)}
        return cls(
            OnnxSizes.of(detector) if detector.is_file() else RELEASED_DETECTOR,
            OnnxSizes.of(whole_body) if whole_body.is_file() else RELEASED_WHOLE_BODY,
            sizes_of(joints) if is_there else RELEASED_NLF,
            _sam2(masks["sam2"][0]) if "sam2" in masks else None,
            _segmenter(masks["matanyone"][0]) if "matanyone" in masks else None,
            bundle.pose.mask_backend,
        )

    @property
    def backends(self) -> tuple[str, ...]:
        """Those of the bundle, the preferred one first."""
        names = [name for name, config in (("sam2", self.sam2), ("matanyone", self.segmenter)) if config is not None]
        return tuple(sorted(names, key=lambda name: name != self.preferred))


def mask_components(bundle: Bundle) -> dict[str, Sequence[BundleComponent]]:
    """The components of each mask back-end that a bundle names."""
    return {
        name: [bundle.components[one] for one in needed]
        for name, needed in MASK_COMPONENTS.items()
        if all(one in bundle.components for one in needed)
    }


def missing_files(components: Sequence[BundleComponent]) -> list[str]:
    return [str(file) for component in components for file in component.files if not file.is_file()]


def _sam2(component: BundleComponent) -> Sam2Config:
    # transformers, which both back-ends stand on, takes seconds to import
    from services.pose.persons.sam2 import PRESETS, Sam2Config

    return configuration(component, PRESETS, Sam2Config)


def _segmenter(component: BundleComponent) -> SegmenterConfig:
    from services.pose.persons.sam import PRESETS, SegmenterConfig

    return configuration(component, PRESETS, SegmenterConfig)


@dataclass(frozen=True)
class Masks:
    """How masks of several people are made.

    Attributes:
        backends: that are loaded.
        is_segmenter_on_host: whether the processor computes the first frame's masks for MatAnyone.
        is_sam2_streamed: whether the blocks of SAM 2 wait in host memory and are copied for each frame.
    """

    backends: tuple[str, ...] = ()
    is_segmenter_on_host: bool = False
    is_sam2_streamed: bool = False


@dataclass(frozen=True)
class PosePlan:
    """How a stage keeps within its bytes.

    Attributes:
        batch: how much of a clip is worked on at once, of the size that was planned for.
        onnx_batch: pictures that onnxruntime's networks look at together.
        arenas: bytes of detector and keypoint network, the most that each may take.
        left_out: back-ends that there is no room for.
        device_bytes: the peak, the driver's own included.
        host_bytes: of weights that wait in host memory.
    """

    batch: Batch
    masks: Masks
    onnx_batch: int
    arenas: tuple[int, int]
    left_out: tuple[str, ...]
    device_bytes: int
    host_bytes: int

    def __str__(self) -> str:
        streamed = " streamed" if self.masks.is_sam2_streamed else ""
        on_host = " with its first frame on the CPU" if self.masks.is_segmenter_on_host else ""
        words = {"sam2": f"sam2{streamed}", "matanyone": f"matanyone{on_host}"}
        masks = ", ".join(words[name] for name in self.masks.backends) or "no masks"
        without = f", no room for {' and '.join(self.left_out)}" if self.left_out else ""
        frames = "a frame" if self.batch.frames == 1 else f"{self.batch.frames} frames"
        return f"{frames} at a time, {masks}{without}, {self.device_bytes / GIB:.2f} GiB"


@dataclass(frozen=True)
class PoseMemory:
    """What the stage takes of a GPU.

    Attributes:
        clips: that may be under way at the same time.
        has_onnx: whether onnxruntime computes on the GPU too, with memory of its own.
    """

    networks: Networks
    clips: int = CLIPS_AT_A_TIME
    has_onnx: bool = True

    def arenas(self, together: int) -> tuple[int, int]:
        """Of detector and keypoint network for so many pictures; nothing where they are not onnxruntime's."""
        if not self.has_onnx:
            return 0, 0
        return _arena(self.networks.detector, together), _arena(self.networks.whole_body, together)

    def outside(self, together: int) -> int:
        """What PyTorch's allocator does not see, besides the CUDA context: onnxruntime's."""
        return sum(self.arenas(together)) + (_ONNX_OVERHEAD_BYTES if self.has_onnx else 0)

    def taken(
        self,
        masks: Masks,
        batch: Batch,
        together: int,
        size: tuple[int, int],
        *,
        people: int = _PEOPLE,
        making: Sequence[str] | None = None,
    ) -> int:
        """All of it, at the worst moment of clips of this height and width with so many people.

        Args:
            together: pictures that onnxruntime's networks look at together.
            making: back-ends that are asked for masks; None: all that there are.
        """
        looking = {name: self._looking(name, masks, people, size) for name in masks.backends}
        asked = masks.backends if making is None else making
        working = max(self._working(batch, together, size), *(looking[name].most for name in asked), 0)
        kept = max(3 * batch.frames * size[0] * size[1], *(one.kept for one in looking.values()), 0)
        fixed = DEVICE_OVERHEAD_BYTES + self.outside(together) + _WORKSPACE_BYTES + self._weights(masks)
        return fixed + int(_GAPS * (working + self.clips * kept))

    def on_host(self, masks: Masks) -> int:
        """Bytes of weights that are in host memory instead."""
        return self._weights(Masks(masks.backends)) - self._weights(masks) + self._places(masks)

    def _working(self, batch: Batch, together: int, size: tuple[int, int]) -> int:
        networks = self.networks
        return max(
            counted.people_bytes(networks.detector, networks.whole_body, together, batch, *size),
            counted.joints_bytes(networks.nlf, networks.dtype, networks.detector, batch, *size),
            counted.drawing_bytes(batch, *size),
        )

    def _weights(self, masks: Masks) -> int:
        networks = self.networks
        total = counted.nlf_weights(networks.nlf, networks.dtype).total
        if "sam2" in masks.backends:
            weights = self._sam2_weights()
            total += weights.total - (weights.blocks if masks.is_sam2_streamed else 0) + self._places(masks)
        if "matanyone" in masks.backends:
            total += counted.matanyone_weights().total
            total += 0 if masks.is_segmenter_on_host else counted.segmenter_weights(self._segmenter()).total
        return total

    def _places(self, masks: Masks) -> int:
        """Of blocks that are streamed, on the device."""
        return PLACES * self._sam2_weights().largest_block if masks.is_sam2_streamed else 0

    def _looking(self, backend: str, masks: Masks, people: int, size: tuple[int, int]) -> MaskBytes:
        if backend == "sam2":
            assert self.networks.sam2 is not None
            return counted.sam2_bytes(self.networks.sam2, people, *size)
        found = counted.matanyone_bytes(people, *size)
        first = 0 if masks.is_segmenter_on_host else counted.segmenter_bytes(self._segmenter())
        return MaskBytes(max(found.most, first), found.kept)

    def _sam2_weights(self) -> WeightBytes:
        assert self.networks.sam2 is not None
        return counted.sam2_weights(self.networks.sam2)

    def _segmenter(self) -> SegmenterConfig:
        assert self.networks.segmenter is not None
        return self.networks.segmenter


def _arena(sizes: OnnxSizes, together: int) -> int:
    """The most that onnxruntime takes for a network and so many of its pictures."""
    tensors = int(_ONNX_GAPS * _ONNX_BYTES_PER_PIXEL * sizes.height * sizes.width) * together
    return 4 * sizes.parameters + tensors + _ONNX_WORKSPACE_BYTES


def plan_pose(memory: PoseMemory, height: int, width: int, budget: int) -> PosePlan:
    """The plan with the most back-ends, and among those the quickest, that keeps within `budget` bytes.

    The preferred back-end is worth working on a frame at a time; others are worth no less than a handful of frames.

    Raises:
        DoesNotFit: not even a frame at a time and without masks.
    """
    found, handful = None, min(HANDFUL, next(_batches(height, width))[0].frames)
    for backends in _sets_of_masks(memory.networks):
        for batch in _batches(height, width):
            if len(backends) > 1 and batch[0].frames < handful:
                break
            for masks in _ways(backends):
                found = _plan(memory, masks, *batch, height, width)
                if found.device_bytes <= budget:
                    return found
    assert found is not None
    raise DoesNotFit(
        f"poses of {width}x{height} take {found.device_bytes / GIB:.2f} GiB a frame at a time and without masks; "
        f"the budget is {budget / GIB:.2f} GiB"
    )


def least_plan(
    memory: PoseMemory, height: int, width: int, backends: Sequence[str] = (), frames: int | None = 1
) -> PosePlan:
    """The plan that takes least with these back-ends and so many frames at a time; None: as many as suit a GPU."""
    *_, masks = _ways(tuple(backends))
    most = next(_batches(height, width))[0].frames
    fewest = most if frames is None else min(frames, most)
    *_, batch = (found for found in _batches(height, width) if found[0].frames >= fewest)
    return _plan(memory, masks, *batch, height, width)


def whole_plan(memory: PoseMemory, height: int, width: int) -> PosePlan:
    """The quickest plan, but for Segment Anything, which looks at one frame of a clip: that is left to the processor."""
    backends = memory.networks.backends
    masks = Masks(backends, is_segmenter_on_host="matanyone" in backends)
    return _plan(memory, masks, *next(_batches(height, width)), height, width)


class KeptPlan:
    """A plan that a stage has loaded its networks by, and what of it depends on the size of a clip.

    Args:
        plan: that `plan_pose` found for this budget.
    """

    def __init__(self, memory: PoseMemory, plan: PosePlan, budget: int) -> None:
        self.memory, self.plan, self.budget = memory, plan, budget

    def batch(self, height: int, width: int) -> Batch:
        """How much of a clip of this size is worked on at once: what leaves room for masks too, if anything does.

        Raises:
            OutOfMemory: not even a frame has room.
        """
        plan, taken = self.plan, 0
        for making in (plan.masks.backends, ()):
            for batch, _ in _batches(height, width):
                taken = self.memory.taken(plan.masks, batch, plan.onnx_batch, (height, width), making=making)
                if taken <= self.budget:
                    return batch
        raise self._too_large(f"poses of {width}x{height} a frame at a time", taken)

    def check_masks(self, backend: str, people: int, height: int, width: int) -> None:
        """Raises OutOfMemory: this back-end has no room for so many people in a clip of this size."""
        what = f"masks of {people} people of {width}x{height} by {backend}"
        if backend in self.plan.left_out:
            raise self._too_large(what, least_plan(self.memory, height, width, [backend]).device_bytes)
        batch, plan = self.batch(height, width), self.plan
        taken = self.memory.taken(plan.masks, batch, plan.onnx_batch, (height, width), people=people, making=[backend])
        if taken > self.budget:
            raise self._too_large(what, taken)

    def _too_large(self, what: str, taken: int) -> OutOfMemory:
        return OutOfMemory(f"{what} take {taken / GIB:.2f} GiB; the budget is {self.budget / GIB:.2f} GiB")


def _plan(memory: PoseMemory, masks: Masks, batch: Batch, together: int, height: int, width: int) -> PosePlan:
    return PosePlan(
        batch,
        masks,
        together,
        memory.arenas(together),
        tuple(name for name in memory.networks.backends if name not in masks.backends),
        memory.taken(masks, batch, together, (height, width)),
        memory.on_host(masks),
    )


def _sets_of_masks(networks: Networks) -> Iterator[tuple[str, ...]]:
    """All back-ends, then the preferred one, then none."""
    backends = networks.backends
    for count in range(len(backends), -1, -1):
        yield backends[:count]


def _ways(backends: tuple[str, ...]) -> Iterator[Masks]:
    """Of having these back-ends, the quickest first."""
    yield Masks(backends)
    if "matanyone" in backends:
        yield Masks(backends, is_segmenter_on_host=True)
    if "sam2" in backends:
        yield Masks(backends, is_segmenter_on_host="matanyone" in backends, is_sam2_streamed=True)


def _batches(height: int, width: int) -> Iterator[tuple[Batch, int]]:
    """How much may be worked on at once, and how many pictures onnxruntime's networks look at together; from what suits a
    GPU downwards.

    The networks' pictures come first: a GPU has enough to do with two of them.
    """
    most, together = frames_together(height, width, on_gpu=True), _MOST_ONNX_BATCH
    while together > _BUSY_ONNX_BATCH:
        yield Batch(most, _MOST_CROPS, _MOST_TILES), min(most, together)
        together //= 2
    for halvings in range(_MOST_CROPS.bit_length()):
        frames = max(1, most >> halvings)
        yield Batch(frames, _MOST_CROPS >> halvings, _MOST_TILES >> halvings), min(frames, together)
