"""PoseService: a ready pose video, a driving video or joints in, pose frames out.

Ready pose videos need neither models nor torch; what needs them is imported where it is used, so that a stage whose bundle
has no pose models starts at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from bunraku.errors import InvalidRequest, NotThereYet
from bunraku.v1 import pose_pb2 as pb
from bunraku.v1 import pose_pb2_grpc, stage_pb2
from runtime.bundles import MASK_BACKENDS, POSE_PRESETS, Bundle
from runtime.checks import Checks
from runtime.gpu import raise_if_cancelled
from runtime.stage import StageRuntime
from runtime.tensors import FLOAT32, UINT8, WireTensor, require
from runtime.video import Frame, VideoInfo, VideoLimits, read_frames, read_info
from services.pose.fit import cover, halve, whole_latents
from services.pose.people import COMPONENTS, MAX_PEOPLE
from services.pose.quirks import Strokes
from services.pose.skeleton import MIN_DEPTH_MM, without_near
from services.pose.threads import beside_each_other

if TYPE_CHECKING:
    from torch import Tensor

    from services.pose.clip import Batch, Clip, Fit
    from services.pose.extract import Drawing, PoseExtractor
    from services.pose.networks import NetworkModels
    from services.pose.persons.masks import PersonMasks
    from services.pose.plan import KeptPlan
    from services.pose.progress import Progress

_SIZE_MULTIPLE, _MAX_SIDE, _MAX_FRAMES = 32, 4096, 10_000
# SCAIL was made for two latent frames at least
MIN_FRAMES = 5
_FRAMES_PER_TENSOR = 16
_MAX_REFERENCE_SIDE = 16_384
_MASK_EXPAND = (-10, 50)
# beyond any person who could be seen: 1 km, and 100 pictures away; focal lengths are in pixels
_MAX_JOINT_MM, _MAX_KEYPOINT, _MAX_FOCAL_LENGTH = 1e6, 100.0, 1e6
Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
Floats = npt.NDArray[np.float32]


class PoseService(pose_pb2_grpc.PoseServiceServicer):
    """Pose frames of one or several people."""

    full_name = pb.DESCRIPTOR.services_by_name["PoseService"].full_name

    def __init__(self, runtime: StageRuntime, bundle: Bundle, *, vram_bytes: int | None = None) -> None:
        """vram_bytes: that the process may use of its GPU; None: all that there is."""
        self._runtime, self._bundle = runtime, bundle
        self._vram_bytes = vram_bytes if runtime.device.startswith("cuda") else None
        self._kept: KeptPlan | None = None
        self._extractor: PoseExtractor | None = None
        self._models: NetworkModels
        # one at a time: whoever has gone leaves no count behind that others, GetStatus among them, would wait for
        self._counting = ThreadPoolExecutor(1, "pose-count")

    def add_to(self, server: grpc.aio.Server) -> None:
        pose_pb2_grpc.add_PoseServiceServicer_to_server(self, server)

    def load(self) -> None:
        """Loads the models that find people, if the bundle has them; nothing else here needs any."""
        if not self._bundle.components.keys() & set(COMPONENTS):
            return
        import torch

        from runtime.torch_stage import warming_up
        from services.pose.extract import PoseExtractor
        from services.pose.models import load_models, load_within

        device = torch.device(self._runtime.device)
        if self._vram_bytes is None:
            self._models, loaded = load_models(self._bundle, device)
        else:
            clips = self._runtime.limits.max_concurrent
            self._models, loaded, self._kept = load_within(self._bundle, device, self._vram_bytes, clips)
            is_streamed = self._kept.plan.masks.is_sam2_streamed
            mode = stage_pb2.MEMORY_MODE_HYBRID if is_streamed else stage_pb2.MEMORY_MODE_GPU_ONLY
            self._runtime.memory_mode = mode
        self._extractor = PoseExtractor(self._models, strokes_of(self._bundle))
        self._runtime.components += loaded
        with warming_up(self._runtime):
            self.warm_up()

    def warm_up(self) -> None:
        """Looks for people in frames of the bundle's size."""
        from runtime.torch_stage import where_it_fits

        video = self._bundle.video
        with where_it_fits(f"frames of {video.width}x{video.height}"):
            self._models.warm_up(video.height, video.width)

    async def FitPoseVideo(
        self, requests: AsyncIterator[pb.FitPoseVideoRequest], context: Context
    ) -> AsyncIterator[Any]:
        first, tensors = await self._runtime.receive_call(requests, context, ["video"])
        parameters = first.parameters
        _check_size_and_length(parameters).done()
        video = require(tensors, "video", (None,), (UINT8,)).data.data
        limits = VideoLimits(max_frames=parameters.max_frames or _MAX_FRAMES)
        found = await self._runtime.gpu.run(lambda: read_info(video, "video", limits))
        info = _pose_info(found, parameters.max_frames)
        yield pb.FitPoseVideoResponse(info=info)
        fitted = self._runtime.gpu.stream(lambda: _fitted(video, parameters, info.num_frames))
        async for portion in fitted:
            for message in self._runtime.send(pb.FitPoseVideoResponse, portion, context):
                yield message

    async def ExtractPose(self, requests: AsyncIterator[pb.ExtractPoseRequest], context: Context) -> AsyncIterator[Any]:
        extractor = self._extractor
        if extractor is None:
            text = f"bundle {self._bundle.name} has no pose models: give a ready pose video"
            raise NotThereYet(text, reason="NO_POSE_MODELS")
        names = ["video", "reference_image", "mask_video"]
        first, tensors = await self._runtime.receive_call(requests, context, names)
        parameters = first.parameters
        _check_extraction(parameters)
        video = require(tensors, "video", (None,), (UINT8,)).data.data
        mask = require(tensors, "mask_video", (None,), (UINT8,)).data.data if "mask_video" in tensors else None
        reference = _reference_image(tensors) if "reference_image" in tensors else None
        backend = self._mask_backend(extractor, parameters)
        await self._counted(lambda: self._check_room(parameters))
        limits = VideoLimits(max_frames=parameters.max_frames or _MAX_FRAMES)
        info = _pose_info(await self._runtime.gpu.run(lambda: read_info(video, "video", limits)), parameters.max_frames)
        if mask is not None:
            await self._runtime.gpu.run(lambda: _check_mask(mask, info.num_frames))
        yield pb.ExtractPoseResponse(info=info)
        extraction = _Extraction(extractor, video, mask, reference, backend, parameters, self._preset(parameters), info)
        async for item in self._runtime.gpu.stream(extraction.items):
            if isinstance(item, pb.PoseProgress):
                yield pb.ExtractPoseResponse(progress=item)
                continue
            for message in self._runtime.send(pb.ExtractPoseResponse, item, context):
                yield message

    async def RenderPose(self, requests: AsyncIterator[pb.RenderPoseRequest], context: Context) -> AsyncIterator[Any]:
        first, tensors = await self._runtime.receive_call(requests, context, ["joints", "keypoints", "camera"])
        parameters = first.parameters
        checks = _check_size(parameters)
        _check_preset(checks, parameters.preset)
        checks.done()
        joints = _finite(tensors, "joints", (None, None, 24, 3), _MAX_JOINT_MM)
        keypoints = _finite(tensors, "keypoints", (*joints.shape[:2], 134, 3), _MAX_KEYPOINT)
        camera = _finite(tensors, "camera", (3, 3), _MAX_FOCAL_LENGTH) if "camera" in tensors else None
        focal_lengths = [] if camera is None else [camera[0, 0], camera[1, 1]]
        checks.that(all(length >= 1 for length in focal_lengths), "camera", "must have focal lengths of 1 at least")
        frames, people = joints.shape[:2]
        checks.that(frames % 4 == 1 and MIN_FRAMES <= frames <= _MAX_FRAMES, "joints", _frames_text(frames))
        checks.between("joints", people, 1, MAX_PEOPLE)
        near = without_near(joints).any(axis=(2, 3)) != joints.any(axis=(2, 3))
        text = f"must be at least {MIN_DEPTH_MM:g} mm in front of the camera, those of frame, person {_first(near)} are not"
        checks.that(not near.any(), "joints", text)
        checks.done()
        batch = await self._counted(lambda: self._drawing_batch(parameters.height, parameters.width))
        drawn = self._runtime.gpu.stream(lambda: self._drawn(joints, keypoints, camera, parameters, batch))
        async for portion in drawn:
            for message in self._runtime.send(pb.RenderPoseResponse, portion, context):
                yield message

    async def _counted(self, count: Callable[[], T]) -> T:
        """What comes of counting bytes, which takes seconds where a size is new: neither the loop nor the GPU waits."""
        return await asyncio.get_running_loop().run_in_executor(self._counting, count)

    def _drawing_batch(self, height: int, width: int) -> Batch:
        """How much is drawn at once; raises OutOfMemory where not even a frame has room."""
        from services.pose.clip import whole_batch

        if self._extractor is not None:
            return self._models.batch(height, width)
        return whole_batch(height, width, on_gpu=self._runtime.device != "cpu")

    def _drawn(
        self,
        joints: Floats,
        keypoints: Floats,
        camera: Floats | None,
        parameters: pb.RenderPoseParameters,
        batch: Batch,
    ) -> Iterator[list[WireTensor]]:
        import torch

        from services.pose.extract import Drawing, draw
        from services.pose.habits import HABITS

        height, width = parameters.height, parameters.width
        drawing = Drawing(joints, keypoints, Drawing.plain_camera(height, width) if camera is None else camera)
        quirks = HABITS[self._preset(parameters)].pose
        device = torch.device(self._runtime.device)
        for frames in draw(drawing, height, width, quirks, strokes_of(self._bundle), device, batch):
            yield _drawn_tensors(frames, frames.cpu().numpy() if parameters.full_size else None)

    def _preset(self, parameters: pb.ExtractPoseParameters | pb.RenderPoseParameters) -> str:
        return parameters.preset or self._bundle.pose.preset

    def _mask_backend(self, extractor: PoseExtractor, parameters: pb.ExtractPoseParameters) -> PersonMasks | None:
        """What makes masks of several people.

        Raises:
            NotThereYet: it was asked for by name, and the bundle does not have it.
        """
        backends, asked = extractor.mask_backends, parameters.mask_backend
        left_out = () if self._kept is None else self._kept.plan.left_out
        if asked and asked not in (*backends, *left_out):
            has = ", ".join(backends) or "none"
            raise NotThereYet(f"mask_backend {asked}: bundle {self._bundle.name} has {has}", reason="NO_MASK_BACKEND")
        return backends.get(asked or self._bundle.pose.mask_backend)

    def _check_room(self, parameters: pb.ExtractPoseParameters) -> None:
        """Looks whether a clip has room on the GPU.

        Raises:
            OutOfMemory: it has not, or the masks that it asks for have not.
        """
        size, people = (parameters.height, parameters.width), parameters.people
        self._models.batch(*size)
        backend = parameters.mask_backend or self._bundle.pose.mask_backend
        if self._kept is not None and people > 1 and (parameters.mask_backend or backend in self._models.masks):
            self._kept.check_masks(backend, people, *size)


def strokes_of(bundle: Bundle) -> Strokes:
    """How thick a bundle has things drawn."""
    pose = bundle.pose
    return Strokes(pose.capsule_radius_mm, pose.head_radius_px, pose.dot_radius_px)


@dataclass(frozen=True)
class _Extraction:
    """One request for poses, checked."""

    extractor: PoseExtractor
    video: memoryview
    mask_video: memoryview | None
    reference: Frame | None
    backend: PersonMasks | None
    parameters: pb.ExtractPoseParameters
    preset: str
    info: pb.PoseInfo

    def items(self) -> Iterator[pb.PoseProgress | list[WireTensor]]:
        """Progress and tensors, as they come."""
        from services.pose.extract import Drawing
        from services.pose.habits import HABITS
        from services.pose.progress import Progress

        habits, parameters = HABITS[self.preset], self.parameters
        clip = self._clip(habits.fit)
        source = clip.frames() if parameters.over_source else None
        people = parameters.people or 1
        for item in self.extractor.extract(clip, self.reference, habits, people=people, backend=self.backend):
            if isinstance(item, Progress):
                yield _progress(item)
            elif isinstance(item, Drawing):
                if parameters.give_joints:
                    yield _tensors_of(item)
            else:
                full = item.cpu().numpy() if parameters.full_size else None
                yield _drawn_tensors(item, full if full is None or source is None else _over(full, source))

    def _clip(self, fit: Fit) -> Clip:
        from services.pose.clip import Clip

        mask = self.mask_video
        return Clip(
            lambda: read_frames(self.video, "video"),
            self.info.num_frames,
            self.parameters.height,
            self.parameters.width,
            self.info.frames_per_second,
            fit,
            None if mask is None else lambda: read_frames(mask, "mask_video"),
            self.parameters.mask_expand,
        )


def _progress(progress: Progress) -> pb.PoseProgress:
    return pb.PoseProgress(
        step=progress.step,
        completed_frames=progress.completed_frames,
        total_frames=progress.total_frames,
        bridged_frames=progress.bridged_frames,
        people=[
            pb.PersonGaps(bridged_frames=gaps.bridged_frames, absent_frames=gaps.absent_frames)
            for gaps in progress.gaps
        ],
    )


def _over(frames: Frame, source: Iterator[Frame]) -> Frame:
    """Pose frames [n, H, W, 3] with the next frames of the video where nothing is drawn."""
    behind = np.stack(list(islice(source, len(frames))))
    return np.where(frames.any(axis=-1, keepdims=True), frames, behind)


def _frame_tensors(frames: Frame, full: Frame | None) -> list[WireTensor]:
    """Frames [n, H, W, 3] at half size, and others at full size if there are any."""
    return _named(np.stack(beside_each_other(halve, frames)), full)


def _drawn_tensors(frames: Tensor, full: Frame | None) -> list[WireTensor]:
    """The same of frames that are where they were drawn, of which half the size is brought here."""
    from services.pose.draw import halved

    return _named(halved(frames).cpu().numpy(), full)


def _named(halves: npt.NDArray[np.float16], full: Frame | None) -> list[WireTensor]:
    tensors = [WireTensor.from_numpy("pose_frames", halves)]
    return tensors if full is None else [*tensors, WireTensor.from_numpy("pose_frames_full", full)]


def _tensors_of(drawing: Drawing) -> list[WireTensor]:
    names = ("keypoints", "joints", "camera")
    return [WireTensor.from_numpy(name, np.ascontiguousarray(getattr(drawing, name))) for name in names]


def _fitted(video: memoryview, parameters: pb.FitPoseVideoParameters, num_frames: int) -> Iterator[list[WireTensor]]:
    """Pose frames, a few at a time: half size and, if asked for, full size."""
    fitted = _covering(islice(read_frames(video, "video"), num_frames), parameters.height, parameters.width)
    while portion := list(islice(fitted, _FRAMES_PER_TENSOR)):
        frames = np.stack(portion)
        yield _frame_tensors(frames, frames if parameters.full_size else None)


def _covering(frames: Iterable[Frame], height: int, width: int) -> Iterator[Frame]:
    for frame in frames:
        raise_if_cancelled()
        yield cover(frame, height, width)


def _check_size(parameters: pb.FitPoseVideoParameters | pb.ExtractPoseParameters | pb.RenderPoseParameters) -> Checks:
    checks = Checks()
    for field in ("height", "width"):
        value = getattr(parameters, field)
        if checks.between(field, value, _SIZE_MULTIPLE, _MAX_SIDE):
            checks.multiple(field, value, _SIZE_MULTIPLE)
    return checks


def _check_size_and_length(parameters: pb.FitPoseVideoParameters | pb.ExtractPoseParameters) -> Checks:
    checks, limit = _check_size(parameters), parameters.max_frames
    if limit and checks.between("max_frames", limit, 1, _MAX_FRAMES):
        checks.that(limit % 4 == 1, "max_frames", f"must be 4k + 1, got {limit}")
    return checks


def _check_preset(checks: Checks, preset: str) -> None:
    text = f"must be {', '.join(POSE_PRESETS)} or empty, got {preset}"
    checks.that(preset in ("", *POSE_PRESETS), "preset", text)


def _check_extraction(parameters: pb.ExtractPoseParameters) -> None:
    checks = _check_size_and_length(parameters)
    checks.between("people", parameters.people, 0, MAX_PEOPLE)
    _check_preset(checks, parameters.preset)
    checks.between("mask_expand", parameters.mask_expand, *_MASK_EXPAND)
    text = f"must be sam2 or matanyone or empty, got {parameters.mask_backend}"
    checks.that(parameters.mask_backend in ("", *MASK_BACKENDS), "mask_backend", text)
    checks.that(parameters.full_size or not parameters.over_source, "over_source", "goes with full_size only")
    checks.done()


def _check_mask(mask: memoryview, num_frames: int) -> None:
    found = read_info(mask, "mask_video", VideoLimits(max_frames=num_frames))
    if found.num_frames < num_frames:
        text = f"must have as many frames as are used of video, {num_frames}, got {found.num_frames}"
        raise InvalidRequest(("mask_video", text))


def _reference_image(tensors: dict[str, WireTensor]) -> Frame:
    image = require(tensors, "reference_image", (None, None, 3), (UINT8,))
    height, width = image.shape[:2]
    if not (1 <= height <= _MAX_REFERENCE_SIDE and 1 <= width <= _MAX_REFERENCE_SIDE):
        text = f"must be 1x1 to {_MAX_REFERENCE_SIDE}x{_MAX_REFERENCE_SIDE}, got {height}x{width}"
        raise InvalidRequest(("reference_image", text))
    return image.numpy()


def _finite(tensors: dict[str, WireTensor], name: str, shape: tuple[int | None, ...], most: float) -> Floats:
    """Values of a tensor, none of them beyond `most` either way."""
    values: Floats = require(tensors, name, shape, (FLOAT32,)).numpy()
    if not bool((np.abs(values) <= most).all()):
        raise InvalidRequest((name, f"must be finite and within -{most:g} to {most:g}"))
    return values


def _first(places: npt.NDArray[np.bool_]) -> str:
    """The first place that is true, in words."""
    return ", ".join(str(index) for index in np.argwhere(places)[:1].flatten())


def _frames_text(frames: int) -> str:
    return f"must have 4k + 1 frames, {MIN_FRAMES} to {_MAX_FRAMES}, got {frames}"


def _pose_info(found: VideoInfo, max_frames: int) -> pb.PoseInfo:
    if found.num_frames < MIN_FRAMES:
        raise InvalidRequest(("video", f"must have at least {MIN_FRAMES} frames, got {found.num_frames}"))
    return pb.PoseInfo(
        num_frames=whole_latents(found.num_frames, max_frames),
        frames_per_second=float(found.frames_per_second),
        source_height=found.height,
        source_width=found.width,
        source_frames=found.num_frames,
    )
