"""One small client per stage. Tensors pass through unopened: what one stage gives is sent on to the next.

Every method is one stage's work, tried again on another replica when a stage is not ready, within the time that the
request has; `Work` says how much that is and where progress goes.
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bunraku.errors import NotReady
from bunraku.v1 import (
    denoiser_pb2,
    denoiser_pb2_grpc,
    encoder_pb2,
    encoder_pb2_grpc,
    pose_pb2,
    pose_pb2_grpc,
    vae_pb2,
    vae_pb2_grpc,
)
from gateway.progress import Report
from runtime.client import Budget, Retry, StageCall, StageClient, retrying
from runtime.shared_memory import SharedMemory
from runtime.tensors import WireTensor

T = TypeVar("T")
Frames = npt.NDArray[np.uint8]
DEFAULT_RETRY = Retry()
_CHECKPOINT_PREFIX = "checkpoint."


@dataclass(frozen=True)
class Work:
    """What every call of one generation carries.

    Attributes:
        generation: its name, for the stages' status and traces.
        budget: the time that is left.
        report: takes progress.
        retry: when a stage is not ready.
    """

    generation: str
    budget: Budget
    report: Report
    retry: Retry = DEFAULT_RETRY

    async def attempt(self, stage: str, attempt: Callable[[int], Awaitable[T]]) -> T:
        """Runs `attempt` until it succeeds, telling of `stage` while it waits."""

        def waiting(error: NotReady) -> None:
            self.report.retrying(stage)

        return await retrying(attempt, self.budget, self.retry, waiting)


class EncoderStage:
    """Prompts and pictures to embeddings."""

    def __init__(self, client: StageClient[Any]) -> None:
        self.client = client

    async def encode_text(self, work: Work, prompt: str, negative_prompt: str | None) -> dict[str, WireTensor]:
        """`prompt_embeds` and, unless there is no negative prompt, `negative_prompt_embeds`."""
        request = encoder_pb2.EncodeTextRequest(prompt=prompt, negative_prompt=negative_prompt)

        async def attempt(number: int) -> dict[str, WireTensor]:
            async with self.client.call(work.budget, generation=work.generation, attempt=number) as call:
                return await _tensors(call.unary(call.stub.EncodeText, request))

        with work.report.stage("text"):
            return await work.attempt("text", attempt)

    async def encode_image(self, work: Work, image: Frames, resize: str) -> dict[str, WireTensor]:
        """`image_embeds` of a picture, uint8 [H, W, 3]; `resize` is `lanczos` or `bicubic`."""
        first = encoder_pb2.EncodeImageRequest(
            parameters=encoder_pb2.EncodeImageParameters(
                resize=encoder_pb2.ImageResize.Value(f"IMAGE_RESIZE_{resize.upper()}")
            )
        )

        async def attempt(number: int) -> dict[str, WireTensor]:
            async with self.client.call(work.budget, generation=work.generation, attempt=number) as call:
                picture = [WireTensor.from_numpy("image", image)]
                return await _tensors(call.stream(call.stub.EncodeImage, first, picture))

        with work.report.stage("image"):
            return await work.attempt("image", attempt)


@dataclass(frozen=True)
class Driving:
    """A raw driving video.

    Attributes:
        video: the file.
        people: to follow, 1 to 5.
        mask_video: file that is bright where people are to be looked for; None: everywhere.
        preset: `wan2gp` or `official`.
    """

    video: bytes
    people: int
    mask_video: bytes | None
    preset: str


class PoseStage:
    """Videos to pose frames."""

    def __init__(self, client: StageClient[Any]) -> None:
        self.client = client

    async def fit(
        self, work: Work, video: bytes, height: int, width: int, max_frames: int, attempt: int
    ) -> AsyncGenerator[pose_pb2.PoseInfo | WireTensor]:
        """One attempt at fitting a ready pose video: what was found, then `pose_frames` as they come."""
        first = pose_pb2.FitPoseVideoRequest(
            parameters=pose_pb2.FitPoseVideoParameters(height=height, width=width, max_frames=max_frames)
        )
        async with self.client.call(work.budget, generation=work.generation, attempt=attempt) as call:
            file = [WireTensor.from_bytes("video", video)]
            async for item in call.stream(call.stub.FitPoseVideo, first, file):
                yield item if isinstance(item, WireTensor) else item.info  # type: ignore[attr-defined]

    async def extract(
        self, work: Work, driving: Driving, reference_image: Frames, max_frames: int, attempt: int
    ) -> AsyncGenerator[pose_pb2.PoseInfo | WireTensor]:
        """One attempt at finding the poses of a raw video: what was found, then `pose_frames` as they come."""
        height, width, _ = reference_image.shape
        first = pose_pb2.ExtractPoseRequest(
            parameters=pose_pb2.ExtractPoseParameters(
                height=height, width=width, max_frames=max_frames, people=driving.people, preset=driving.preset
            )
        )
        tensors = [
            WireTensor.from_bytes("video", driving.video),
            WireTensor.from_numpy("reference_image", reference_image),
        ]
        if driving.mask_video is not None:
            tensors.append(WireTensor.from_bytes("mask_video", driving.mask_video))
        async with self.client.call(work.budget, generation=work.generation, attempt=attempt) as call:
            async for item in call.stream(call.stub.ExtractPose, first, tensors):
                if isinstance(item, WireTensor):
                    yield item
                elif item.WhichOneof("message") == "info":
                    yield item.info  # type: ignore[attr-defined]
                else:
                    step = item.progress  # type: ignore[attr-defined]
                    work.report.progress(f"pose_{step.step}", step.completed_frames, step.total_frames)


class VaeStage:
    """Frames to latents and back."""

    def __init__(self, client: StageClient[Any]) -> None:
        self.client = client

    async def encode(self, work: Work, stage: str, frames: Frames) -> WireTensor:
        """`latents` of frames at hand, uint8 [n, H, W, 3]; `stage` is what to report them as."""

        async def attempt(number: int) -> WireTensor:
            return await self.encode_once(work, frames.shape[:3], [WireTensor.from_numpy("frames", frames)], number)

        with work.report.stage(stage):
            return await work.attempt(stage, attempt)

    async def encode_once(
        self,
        work: Work,
        shape: Sequence[int],
        frames: Iterable[WireTensor] | AsyncIterable[WireTensor],
        attempt: int,
        on_progress: Callable[[int], None] = lambda completed: None,
    ) -> WireTensor:
        """One attempt at encoding a series of `frames` that may come bit by bit; shape is [num_frames, H, W]."""
        num_frames, height, width = shape
        first = vae_pb2.EncodeRequest(
            parameters=vae_pb2.EncodeParameters(height=height, width=width, num_frames=num_frames)
        )
        async with self.client.call(work.budget, generation=work.generation, attempt=attempt) as call:
            answers = call.stream(call.stub.Encode, first, frames)
            return (await _tensors(answers, lambda m: on_progress(m.progress.completed_frames)))["latents"]

    async def decode(
        self, work: Work, latents: WireTensor, decoding: Decoding, sink: Callable[[Frames], Awaitable[None]]
    ) -> None:
        """Decodes latents into `sink`, uint8 [n, H, W, 3] at a time; an attempt goes on where the last one broke."""
        delivered = 0

        async def attempt(number: int) -> None:
            nonlocal delivered
            first = vae_pb2.DecodeRequest(parameters=decoding.parameters(delivered))
            tensors = [latents]
            if decoding.color_reference is not None and decoding.color_correction_strength > 0:
                tensors.append(WireTensor.from_numpy("color_reference", decoding.color_reference))
            async with self.client.call(work.budget, generation=work.generation, attempt=number) as call:
                async for item in call.stream(call.stub.Decode, first, tensors):
                    assert isinstance(item, WireTensor)
                    await sink(item.numpy())
                    delivered += item.shape[0]

        await work.attempt("decode", attempt)


@dataclass(frozen=True)
class Decoding:
    """How latents are decoded.

    Attributes:
        rounding: `nearest` or `truncate`.
        skip_frames: not given, from the start.
        color_reference: uint8 [H, W, 3], the picture that colours are moved to; None: they stay.
        color_correction_strength: 0 to 1.
    """

    rounding: str
    skip_frames: int = 0
    color_reference: Frames | None = None
    color_correction_strength: float = 0.0

    def parameters(self, delivered: int) -> vae_pb2.DecodeParameters:
        """The message, for an attempt after `delivered` frames have arrived."""
        return vae_pb2.DecodeParameters(
            rounding=vae_pb2.PixelRounding.Value(f"PIXEL_ROUNDING_{self.rounding.upper()}"),
            skip_frames=self.skip_frames + delivered,
            color_correction_strength=self.color_correction_strength,
        )


@dataclass(frozen=True)
class _Checkpoint:
    """The last checkpoint that came whole."""

    message: denoiser_pb2.Checkpoint
    tensors: Mapping[str, WireTensor]


class DenoiserStage:
    """Conditioning to latents."""

    def __init__(self, client: StageClient[Any]) -> None:
        self.client = client

    async def denoise(
        self,
        work: Work,
        parameters: denoiser_pb2.DenoiseParameters,
        conditioning: Mapping[str, WireTensor],
        window: int = 0,
        windows: int = 1,
    ) -> WireTensor:
        """`latents` of one window; an attempt goes on from the last checkpoint of the one before."""
        checkpoint: _Checkpoint | None = None

        async def attempt(number: int) -> WireTensor:
            nonlocal checkpoint
            first = denoiser_pb2.DenoiseRequest(parameters=parameters)
            tensors = list(conditioning.values())
            if checkpoint is not None:
                first.parameters.start_from.CopyFrom(checkpoint.message)
                tensors += checkpoint.tensors.values()
            reader = _DenoiseReader(work.report, window, windows)
            async with self.client.call(work.budget, generation=work.generation, attempt=number) as call:
                try:
                    return await reader.read(call, first, tensors)
                finally:
                    checkpoint = reader.checkpoint or checkpoint

        return await work.attempt("denoise", attempt)


class _DenoiseReader:
    """Reads the answers of one attempt: reports steps, keeps the last checkpoint, gives the latents."""

    def __init__(self, report: Report, window: int, windows: int) -> None:
        self._report, self._window, self._windows = report, window, windows
        self._total_steps = self._completed_steps = 0
        self._pending: denoiser_pb2.Checkpoint | None = None
        self._pending_tensors: dict[str, WireTensor] = {}
        self.checkpoint: _Checkpoint | None = None

    async def read(
        self, call: StageCall[Any], first: denoiser_pb2.DenoiseRequest, tensors: Iterable[WireTensor]
    ) -> WireTensor:
        latents: WireTensor | None = None
        async for item in call.stream(call.stub.Denoise, first, tensors):
            if not isinstance(item, WireTensor):
                self._take_event(item)
            elif item.name == "latents":
                latents = item
            elif item.name == "preview":
                self._report.preview(item.numpy(), self._completed_steps)
            else:
                self._take_checkpoint_tensor(item)
        if latents is None:
            raise NotReady("the denoiser ended without latents", stage="denoiser", reason="NO_LATENTS")
        return latents

    def _take_event(self, message: Any) -> None:
        kind = message.WhichOneof("message")
        if kind == "plan":
            self._total_steps, self._completed_steps = message.plan.num_inference_steps, message.plan.completed_steps
        elif kind == "step":
            self._completed_steps = message.step.completed_steps
        elif kind == "checkpoint":
            self._pending, self._pending_tensors = message.checkpoint, {}
        self._report.progress(
            "denoise", self._completed_steps, self._total_steps, window=self._window, windows=self._windows
        )

    def _take_checkpoint_tensor(self, tensor: WireTensor) -> None:
        # a copy: a checkpoint is kept long, and must not hold the sender's shared memory
        self._pending_tensors[tensor.name] = replace(tensor, data=tensor.data.copy())
        wanted = {_CHECKPOINT_PREFIX + name for name in self._pending.tensors} if self._pending else set()
        if self._pending is not None and self._pending_tensors.keys() == wanted:
            self.checkpoint = _Checkpoint(self._pending, self._pending_tensors)


@dataclass(frozen=True)
class Stages:
    """Every stage that pipelines call."""

    encoder: EncoderStage
    pose: PoseStage
    denoiser: DenoiserStage
    vae: VaeStage

    @property
    def clients(self) -> dict[str, StageClient[Any]]:
        """The client of each stage by its name."""
        return {
            "encoder": self.encoder.client,
            "pose": self.pose.client,
            "denoiser": self.denoiser.client,
            "vae": self.vae.client,
        }

    async def close(self) -> None:
        for client in self.clients.values():
            await client.close()


def connect(addresses: Mapping[str, Sequence[str]], shared_memory: SharedMemory | None) -> Stages:
    """Clients of the stages at these addresses, by the stages' names."""

    def client(stage: str, stub: Callable[..., Any]) -> StageClient[Any]:
        return StageClient(stage, stub, addresses[stage], shared_memory=shared_memory)

    return Stages(
        EncoderStage(client("encoder", encoder_pb2_grpc.EncoderServiceStub)),
        PoseStage(client("pose", pose_pb2_grpc.PoseServiceStub)),
        DenoiserStage(client("denoiser", denoiser_pb2_grpc.DenoiserServiceStub)),
        VaeStage(client("vae", vae_pb2_grpc.VaeServiceStub)),
    )


async def _tensors(
    answers: AsyncIterator[Any], on_message: Callable[[Any], None] = lambda message: None
) -> dict[str, WireTensor]:
    """The tensors of a call by name; its other messages go to `on_message`."""
    tensors: dict[str, WireTensor] = {}
    async for item in answers:
        if isinstance(item, WireTensor):
            tensors[item.name] = item
        else:
            on_message(item)
    return tensors
