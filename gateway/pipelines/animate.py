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
from bunraku.v1 import denoiser_pb2
from gateway.outputs import Recipe, StageOutput
from gateway.stages import Conditioning, Decoding, Driving, Frames, PoseFound, Stages, Work, stable_bytes
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
    digest: str = ""

    @classmethod
    def of(cls, output: StageOutput, animation: Animation) -> Motion:
        """What `pose_latents` has made, now or earlier."""
        num_frames, rate = output.facts["num_frames"], Fraction(output.facts["frames_per_second"])
        windows = plan_windows(num_frames, animation.window_frames, animation.window_overlap_frames)
        latents = [output.tensors[f"pose_latents.{number}"] for number in range(len(windows))]
        return cls(num_frames, rate, windows, latents, output.digest)


class Video(Protocol):
    """Takes finished frames in order; those of a window are a segment of it. See gateway.segments."""

    async def add(self, frames: Frames) -> None: ...

    async def end_segment(self) -> bytes: ...

    async def restore(self, segment: bytes) -> None: ...


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

    conditioning = Conditioning(
        {
            **text.result().tensors,
            **image.result().tensors,
            "reference_latents": reference.result().tensors["latents"].named("reference_latents"),
        },
        {
            "text": text.result().digest,
            "image": image.result().digest,
            "reference": reference.result().digest,
            "motion": motion.result().digest,
        },
    )
    await animate_windows(animation, stages, work, motion.result(), conditioning, open_video(motion.result()))


async def animate_windows(
    animation: Animation,
    stages: Stages,
    work: Work,
    motion: Motion,
    conditioning: Conditioning,
    video: Video,
) -> None:
    """Denoises and decodes window after window; a later one is given the last frames of the one before."""
    windows = motion.windows
    delivery = Delivery(video, motion, animation.window_overlap_frames, work)
    for number, window in enumerate(windows):
        given = conditioning.joined(
            {"pose_latents": motion.pose_latents[number].named("pose_latents")}, {"window": str(number)}
        )
        decoding = Decoding(animation.pixel_rounding, skip_frames=window.overlap_frames)
        if window.overlap_frames:
            overlap = delivery.last(window.overlap_frames)
            history = await stages.vae.encode(work, "overlap", overlap)
            given = given.joined(
                {"history_latents": history.tensors["latents"].named("history_latents")}, {"history": history.digest}
            )
            decoding = replace(
                decoding, color_reference=overlap[0], color_correction_strength=animation.color_correction_strength
            )
        parameters = denoise_parameters(animation, window)
        denoised = await stages.denoiser.denoise(work, parameters, given, number, len(windows))
        with work.report.stage("decode", window=number, windows=len(windows)):
            await deliver_window(stages, work, denoised, decoding, delivery, window)
        delivery.end()


async def deliver_window(
    stages: Stages, work: Work, denoised: StageOutput, decoding: Decoding, delivery: Delivery, window: Window
) -> None:
    """Decodes a window into the video, unless this generation has done so before it was interrupted."""
    # the picture that colours follow is of the history, which decided the latents too
    recipe = Recipe("vae", "Decode", stable_bytes(decoding.parameters(0)), {"latents": denoised.digest})
    kept = work.outputs if denoised.digest else None
    found = await kept.find_own(recipe, await stages.vae.client.revisions()) if kept is not None else None
    if found is not None:
        await delivery.restore(window, found)
        return
    delivery.begin(window)
    revision = await stages.vae.decode(work, denoised.tensors["latents"], decoding, delivery.take)
    delivered = await delivery.end_segment(revision)
    if kept is not None:
        await kept.keep_own(recipe, delivered)


def denoise_parameters(animation: Animation, window: Window) -> denoiser_pb2.DenoiseParameters:
    """Of one window: every window starts from the same seed, as the released code does."""
    parameters = denoiser_pb2.DenoiseParameters()
    parameters.CopyFrom(animation.sampling)
    parameters.height, parameters.width = animation.height, animation.width
    parameters.num_frames, parameters.history_frames = window.num_frames, window.overlap_frames
    return parameters


async def pose_latents(animation: Animation, stages: Stages, work: Work) -> Motion:
    """Pose frames go from the pose stage to the VAE as they come; only latents are kept."""

    async def attempt(number: int) -> StageOutput:
        async with aclosing(pose_items(animation, stages, work, number)) as fitted:
            found = await anext(fitted)
            if not isinstance(found, PoseFound):
                raise StageBroken("the pose stage did not say first what it found", stage="pose")
            windows = plan_windows(found.info.num_frames, animation.window_frames, animation.window_overlap_frames)
            frames = PoseFrames(fitted, found.info.num_frames, work)
            encoded = [await encode_window(frames, window, number) for window in windows]
        rate = Fraction(found.info.frames_per_second).limit_denominator(1001)
        return StageOutput(
            {f"pose_latents.{number}": output.tensors["latents"] for number, output in enumerate(encoded)},
            {"num_frames": found.info.num_frames, "frames_per_second": str(rate)},
            combined_revision(found.revision, *(output.revision for output in encoded)),
        )

    async def encode_window(frames: PoseFrames, window: Window, number: int) -> StageOutput:
        # a call that had nothing to send would keep the VAE from others for as long as poses are looked for
        await frames.begin(window)
        shape = (window.num_frames, animation.height // 2, animation.width // 2)
        return await stages.vae.encode_once(
            work,
            shape,
            frames.of(window),
            number,
            lambda completed: work.report.progress("pose_latents", window.start_frame + completed, frames.num_frames),
        )

    async def revisions() -> set[str]:
        of_pose, of_vae = await stages.pose.client.revisions(), await stages.vae.client.revisions()
        return {combined_revision(pose, vae) for pose in of_pose for vae in of_vae}

    with work.report.stage("pose_latents"):
        output = await work.output("pose", await pose_recipe(animation, work), revisions, attempt)
    return Motion.of(output, animation)


async def pose_recipe(animation: Animation, work: Work) -> Recipe:
    """What decides the pose latents."""
    motion = animation.motion
    decisive = [animation.height, animation.width, animation.max_frames]
    decisive += [animation.window_frames, animation.window_overlap_frames]
    if isinstance(motion, bytes):
        inputs = await work.digests(pose_video=WireTensor.from_bytes("video", motion))
        return Recipe("pose", "FitPoseVideo, Encode", repr(decisive).encode(), inputs)
    inputs = await work.digests(
        driving_video=WireTensor.from_bytes("video", motion.video),
        mask_video=WireTensor.from_bytes("mask_video", motion.mask_video or b""),
        reference_image=WireTensor.from_numpy("reference_image", animation.reference_image),
    )
    return Recipe("pose", "ExtractPose, Encode", repr([*decisive, motion.people, motion.preset]).encode(), inputs)


def combined_revision(*revisions: str) -> str:
    """Of what several stages make together; empty if one of them does not say."""
    return "+".join(sorted(set(revisions))) if all(revisions) else ""


def pose_items(
    animation: Animation, stages: Stages, work: Work, attempt: int
) -> AsyncGenerator[PoseFound | WireTensor]:
    """What the pose stage gives: poses found in a driving video, or a ready pose video fitted to size."""
    if isinstance(animation.motion, Driving):
        return stages.pose.extract(work, animation.motion, animation.reference_image, animation.max_frames, attempt)
    return stages.pose.fit(work, animation.motion, animation.height, animation.width, animation.max_frames, attempt)


class PoseFrames:
    """Cuts the stream of pose frames into windows; holds the frames of one window at most, and a portion more."""

    def __init__(self, items: AsyncIterator[PoseFound | WireTensor], num_frames: int, work: Work) -> None:
        self.num_frames = num_frames
        self._items, self._work = items, work
        self._at_hand: list[npt.NDArray[np.float16]] = []  # the frames from `_first` on that have arrived
        self._first = 0

    async def begin(self, window: Window) -> None:
        """Waits for the first frame of a window, and lets go of those before it."""
        del self._at_hand[: window.start_frame - self._first]
        self._first = window.start_frame
        if not self._at_hand:
            await self._arrive()

    async def of(self, window: Window) -> AsyncIterator[WireTensor]:
        """The frames of a window that has begun, in portions; past the end of the clip its last frame is repeated."""
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

    async def end_segment(self, revision: str) -> StageOutput:
        """Finishes the window's part of the video; what `restore` needs to have it again."""
        segment = WireTensor.from_bytes("segment", await self._video.end_segment())
        tail = WireTensor.from_numpy("tail", np.stack(self._tail))
        return StageOutput({"segment": segment, "tail": tail}, revision=revision)

    async def restore(self, window: Window, finished: StageOutput) -> None:
        """As if the frames of a window had been taken, of which this is left."""
        await self._video.restore(finished.tensors["segment"].data.tobytes())
        self._tail = list(finished.tensors["tail"].numpy())
        self._delivered += window.kept_frames
        self._work.report.progress("decode", self._delivered, self._num_frames)

    def end(self) -> None:
        """A window is finished."""
        self._work.report.partial(self._delivered, self._num_frames)

    def last(self, count: int) -> Frames:
        """The last frames that were delivered, uint8 [count, H, W, 3]."""
        return np.stack(self._tail[-count:])
