"""SCAIL: a reference image and a driving or pose video -> a video of the character moving like it.

The order of the stages is the order of the lines of `animate`. Branches that do not need each other run at the same
time; long videos go window by window, and the frames of a window are delivered while the next one runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bunraku.errors import StageBroken
from bunraku.v1 import denoiser_pb2, pose_pb2
from gateway.stages import Decoding, Driving, Frames, Stages, Work
from gateway.windows import Window, plan_windows
from runtime.tensors import FLOAT16, WireTensor


@dataclass(frozen=True)
class Animation:
    """What is to be made, with every default filled in.

    Attributes:
        reference_image: the character, uint8 [height, width, 3] at the size of the video.
        motion: a raw driving video, or a file that holds a rendered skeleton.
        max_frames: the most frames, 4k + 1.
        sampling: of the denoiser; sizes and frames are filled in per window.
    """

    reference_image: Frames
    motion: Driving | bytes
    prompt: str
    negative_prompt: str
    max_frames: int
    window_frames: int
    window_overlap_frames: int
    color_correction_strength: float
    sampling: denoiser_pb2.DenoiseParameters
    image_resize: str
    pixel_rounding: str

    @property
    def height(self) -> int:
        return int(self.reference_image.shape[0])

    @property
    def width(self) -> int:
        return int(self.reference_image.shape[1])


@dataclass(frozen=True)
class Motion:
    """The pose video as latents, window by window."""

    num_frames: int
    frames_per_second: Fraction
    windows: list[Window]
    pose_latents: list[WireTensor]


class Video(Protocol):
    """Takes finished frames in order."""

    async def add(self, frames: Frames) -> None: ...


OpenVideo = Callable[[Motion], Video]


async def animate(animation: Animation, stages: Stages, work: Work, open_video: OpenVideo) -> None:
    """Makes the video; `open_video` is called once the number of frames and their rate are known."""
    guided = animation.sampling.guidance_scale != 1
    async with asyncio.TaskGroup() as group:
        text = group.create_task(
            stages.encoder.encode_text(work, animation.prompt, animation.negative_prompt if guided else None)
        )
        image = group.create_task(stages.encoder.encode_image(work, animation.reference_image, animation.image_resize))
        reference = group.create_task(stages.vae.encode(work, "reference", animation.reference_image[None]))
        motion = group.create_task(pose_latents(animation, stages, work))

    conditioning = {
        **text.result(),
        **image.result(),
        "reference_latents": reference.result().named("reference_latents"),
    }
    await animate_windows(animation, stages, work, motion.result(), conditioning, open_video(motion.result()))


async def animate_windows(
    animation: Animation,
    stages: Stages,
    work: Work,
    motion: Motion,
    conditioning: dict[str, WireTensor],
    video: Video,
) -> None:
    """Denoises and decodes window after window; a later one is given the last frames of the one before."""
    windows = motion.windows
    delivery = Delivery(video, motion, animation.window_overlap_frames, work)
    for number, window in enumerate(windows):
        given = {"pose_latents": motion.pose_latents[number].named("pose_latents")}
        decoding = Decoding(animation.pixel_rounding, skip_frames=window.overlap_frames)
        if window.overlap_frames:
            overlap = delivery.last(window.overlap_frames)
            given["history_latents"] = (await stages.vae.encode(work, "overlap", overlap)).named("history_latents")
            decoding = replace(
                decoding, color_reference=overlap[0], color_correction_strength=animation.color_correction_strength
            )
        parameters = denoise_parameters(animation, window)
        with work.report.stage("denoise", window=number, windows=len(windows)):
            latents = await stages.denoiser.denoise(work, parameters, {**conditioning, **given}, number, len(windows))
        with work.report.stage("decode", window=number, windows=len(windows)):
            delivery.begin(window)
            await stages.vae.decode(work, latents, decoding, delivery.take)
        delivery.end()


def denoise_parameters(animation: Animation, window: Window) -> denoiser_pb2.DenoiseParameters:
    """Of one window: every window starts from the same seed, as the released code does."""
    parameters = denoiser_pb2.DenoiseParameters()
    parameters.CopyFrom(animation.sampling)
    parameters.height, parameters.width = animation.height, animation.width
    parameters.num_frames, parameters.history_frames = window.num_frames, window.overlap_frames
    return parameters


async def pose_latents(animation: Animation, stages: Stages, work: Work) -> Motion:
    """Pose frames go from the pose stage to the VAE as they come; only latents are kept."""

    async def attempt(number: int) -> Motion:
        async with aclosing(pose_items(animation, stages, work, number)) as fitted:
            info = await anext(fitted)
            if not isinstance(info, pose_pb2.PoseInfo):
                raise StageBroken("the pose stage did not say first what it found", stage="pose")
            windows = plan_windows(info.num_frames, animation.window_frames, animation.window_overlap_frames)
            frames = PoseFrames(fitted, info.num_frames, work)
            latents = [await encode_window(frames, window, number) for window in windows]
        rate = Fraction(info.frames_per_second).limit_denominator(1001)
        return Motion(info.num_frames, rate, windows, latents)

    async def encode_window(frames: PoseFrames, window: Window, number: int) -> WireTensor:
        shape = (window.num_frames, animation.height // 2, animation.width // 2)
        return await stages.vae.encode_once(
            work,
            shape,
            frames.of(window),
            number,
            lambda completed: work.report.progress("pose_latents", window.start_frame + completed, frames.num_frames),
        )

    with work.report.stage("pose"), work.report.stage("pose_latents"):
        return await work.attempt("pose", attempt)


def pose_items(
    animation: Animation, stages: Stages, work: Work, attempt: int
) -> AsyncGenerator[pose_pb2.PoseInfo | WireTensor]:
    """What the pose stage gives: poses found in a driving video, or a ready pose video fitted to size."""
    if isinstance(animation.motion, Driving):
        return stages.pose.extract(work, animation.motion, animation.reference_image, animation.max_frames, attempt)
    return stages.pose.fit(work, animation.motion, animation.height, animation.width, animation.max_frames, attempt)


class PoseFrames:
    """Cuts the stream of pose frames into windows; holds the frames of one window at most, and a portion more."""

    def __init__(self, items: AsyncIterator[pose_pb2.PoseInfo | WireTensor], num_frames: int, work: Work) -> None:
        self.num_frames = num_frames
        self._items, self._work = items, work
        self._at_hand: list[npt.NDArray[np.float16]] = []  # the frames from `_first` on that have arrived
        self._first = 0

    async def of(self, window: Window) -> AsyncIterator[WireTensor]:
        """The frames of a window in portions; past the end of the clip its last frame is repeated."""
        del self._at_hand[: window.start_frame - self._first]
        self._first = window.start_frame
        given = 0
        while given < window.num_frames:
            if given >= len(self._at_hand) and self._first + len(self._at_hand) < self.num_frames:
                await self._arrive()
            portion = self._at_hand[given : window.num_frames] or self._at_hand[-1:]
            given += len(portion)
            yield WireTensor.from_numpy("frames", np.stack(portion))

    async def _arrive(self) -> None:
        item = await anext(self._items, None)
        if not isinstance(item, WireTensor) or item.name != "pose_frames" or item.dtype != FLOAT16:
            raise StageBroken("the pose stage gave fewer pose frames than it said", stage="pose")
        self._at_hand += list(item.numpy())
        self._work.report.progress("pose", self._first + len(self._at_hand), self.num_frames)


class Delivery:
    """Passes the new frames of each window on to the video, and keeps the last ones for the next window."""

    def __init__(self, video: Video, motion: Motion, keep_frames: int, work: Work) -> None:
        self._video, self._work = video, work
        self._num_frames, self._keep_frames = motion.num_frames, keep_frames
        self._delivered = self._wanted = 0
        self._tail: list[Frames] = []

    def begin(self, window: Window) -> None:
        """Says which frames come next; those of the window past the end of the clip are dropped."""
        self._wanted = self._delivered + window.kept_frames

    async def take(self, frames: Frames) -> None:
        """Frames [n, H, W, 3] as they are decoded."""
        wanted = frames[: self._wanted - self._delivered]
        if len(wanted) == 0:
            return
        await self._video.add(wanted)
        self._delivered += len(wanted)
        # copies: decoded frames may lie in the VAE stage's shared memory
        self._tail = [*self._tail, *(frame.copy() for frame in wanted)][-self._keep_frames :]
        self._work.report.progress("decode", self._delivered, self._num_frames)

    def end(self) -> None:
        """A window is finished."""
        self._work.report.partial(self._delivered, self._num_frames)

    def last(self, count: int) -> Frames:
        """The last frames that were delivered, uint8 [count, H, W, 3]."""
        return np.stack(self._tail[-count:])
