"""One small client per stage. Tensors pass through unopened: what one stage gives is sent on to the next.

Every method is one stage's work, tried again on another replica when a stage is not ready, within the time that the
request has; `Work` says how much that is, where progress goes and what was made before. What was made of the same
before, by the same, is not made again (gateway.outputs).
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from bunraku.errors import BunrakuError, InvalidRequest, NotReady
from bunraku.tls import NO_TLS, TlsFiles
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
from gateway.outputs import Checkpoints, JobOutputs, Recipe, StageOutput, content_digest
from gateway.progress import Report
from runtime.client import Budget, Retry, StageCall, StageClient, retrying, within
from runtime.shared_memory import SharedMemory
from runtime.tensors import WireTensor

T = TypeVar("T")
Frames = npt.NDArray[np.uint8]
DEFAULT_RETRY = Retry()
_CHECKPOINT_PREFIX = "checkpoint."
_ANOTHER_RUN = "CHECKPOINT_OF_ANOTHER_RUN"


@dataclass(frozen=True)
class Work:
    """What every call of one generation carries.

    Attributes:
        generation: its name, for the stages' status and traces.
        budget: the time that is left.
        report: takes progress.
        retry: when a stage is not ready.
        turn: the denoiser is called inside it, which may wait for those of higher priority.
        outputs: what was made before, and where to keep what is made; None: nothing is kept.
    """

    generation: str
    budget: Budget
    report: Report
    retry: Retry = DEFAULT_RETRY
    turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    outputs: JobOutputs | None = None

    async def attempt(self, stage: str, attempt: Callable[[int], Awaitable[T]]) -> T:
        """Runs `attempt` until it succeeds, telling of `stage` while it waits."""

        def waiting(error: NotReady) -> None:
            self.report.retrying(stage)

        return await retrying(attempt, self.budget, self.retry, waiting)

    async def output(
        self,
        stage: str,
        recipe: Recipe,
        revisions: Callable[[], Awaitable[Collection[str]]],
        attempt: Callable[[int], Awaitable[StageOutput]],
    ) -> StageOutput:
        """What `attempt` makes, unless it was made before; generations that need the same at once make it once.

        Args:
            stage: what progress calls it.
            recipe: what decides the output.
            revisions: of what would make it now.
            attempt: as of `attempt` above.
        """
        with self.report.stage(stage):
            if self.outputs is None:
                return await self.attempt(stage, attempt)
            async with within(self.budget), self.outputs.alone(recipe):
                found = await self.outputs.find(recipe, await revisions())
                if found is not None:
                    return found
                return await self.outputs.keep(recipe, await self.attempt(stage, attempt))

    async def digests(self, **inputs: WireTensor) -> dict[str, str]:
        """Of contents, by name; empty where nothing is kept anyway."""
        if self.outputs is None:
            return {}
        return {name: await content_digest(tensor) for name, tensor in inputs.items()}


class EncoderStage:
    """Prompts and pictures to embeddings."""

    def __init__(self, client: StageClient[Any]) -> None:
        self.client = client

    async def encode_text(self, work: Work, prompt: str, negative_prompt: str | None) -> StageOutput:
        """`prompt_embeds` and, unless there is no negative prompt, `negative_prompt_embeds`."""
        request = encoder_pb2.EncodeTextRequest(prompt=prompt, negative_prompt=negative_prompt)

        async def attempt(number: int) -> StageOutput:
            async with self.client.call(work.budget, generation=work.generation, attempt=number) as call:
                tensors = await _tensors(call.unary(call.stub.EncodeText, request))
                return StageOutput(tensors, revision=call.revision)

        recipe = Recipe("encoder", "EncodeText", stable_bytes(request))
        return await work.output("text", recipe, self.client.revisions, attempt)

    async def encode_image(self, work: Work, image: Frames, resize: str) -> StageOutput:
        """`image_embeds` of a picture, uint8 [H, W, 3]; `resize` is `lanczos` or `bicubic`."""
        first = encoder_pb2.EncodeImageRequest(
            parameters=encoder_pb2.EncodeImageParameters(
                resize=encoder_pb2.ImageResize.Value(f"IMAGE_RESIZE_{resize.upper()}")
            )
        )

        picture = WireTensor.from_numpy("image", image)

        async def attempt(number: int) -> StageOutput:
            async with self.client.call(work.budget, generation=work.generation, attempt=number) as call:
                tensors = await _tensors(call.stream(call.stub.EncodeImage, first, [picture]))
                return StageOutput(tensors, revision=call.revision)

        recipe = Recipe("encoder", "EncodeImage", stable_bytes(first), await work.digests(image=picture))
        return await work.output("image", recipe, self.client.revisions, attempt)


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


@dataclass(frozen=True)
class PoseFound:
    """What the pose stage says before the frames, and the revision of what says it."""

    info: pose_pb2.PoseInfo
    revision: str


class PoseStage:
    """Videos to pose frames."""

    def __init__(self, client: StageClient[Any]) -> None:
        self.client = client

    async def fit(
        self, work: Work, video: bytes, height: int, width: int, max_frames: int, attempt: int
    ) -> AsyncGenerator[PoseFound | WireTensor]:
        """One attempt at fitting a ready pose video: what was found, then `pose_frames` as they come."""
        first = pose_pb2.FitPoseVideoRequest(
            parameters=pose_pb2.FitPoseVideoParameters(height=height, width=width, max_frames=max_frames)
        )
        async with self.client.call(work.budget, generation=work.generation, attempt=attempt) as call:
            file = [WireTensor.from_bytes("video", video)]
            async for item in call.stream(call.stub.FitPoseVideo, first, file):
                yield item if isinstance(item, WireTensor) else PoseFound(item.info, call.revision)  # type: ignore[attr-defined]

    async def extract(
        self, work: Work, driving: Driving, reference_image: Frames, max_frames: int, attempt: int
    ) -> AsyncGenerator[PoseFound | WireTensor]:
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
                    yield PoseFound(item.info, call.revision)  # type: ignore[attr-defined]
                else:
                    step = item.progress  # type: ignore[attr-defined]
                    work.report.progress(f"pose_{step.step}", step.completed_frames, step.total_frames)


class VaeStage:
    """Frames to latents and back."""

    def __init__(self, client: StageClient[Any]) -> None:
        self.client = client

    async def encode(self, work: Work, stage: str, frames: Frames) -> StageOutput:
        """`latents` of frames at hand, uint8 [n, H, W, 3]; `stage` is what to report them as."""
        given = WireTensor.from_numpy("frames", frames)

        async def attempt(number: int) -> StageOutput:
            return await self.encode_once(work, frames.shape[:3], [given], number)

        recipe = Recipe("vae", "Encode", b"", await work.digests(frames=given))
        return await work.output(stage, recipe, self.client.revisions, attempt)

    async def encode_once(
        self,
        work: Work,
        shape: Sequence[int],
        frames: Iterable[WireTensor] | AsyncIterable[WireTensor],
        attempt: int,
        on_progress: Callable[[int], None] = lambda completed: None,
    ) -> StageOutput:
        """One attempt at encoding a series of `frames` that may come bit by bit; shape is [num_frames, H, W]."""
        num_frames, height, width = shape
        first = vae_pb2.EncodeRequest(
            parameters=vae_pb2.EncodeParameters(height=height, width=width, num_frames=num_frames)
        )
        async with self.client.call(work.budget, generation=work.generation, attempt=attempt) as call:
            answers = call.stream(call.stub.Encode, first, frames)
            tensors = await _tensors(answers, lambda m: on_progress(m.progress.completed_frames))
            return StageOutput({"latents": tensors["latents"]}, revision=call.revision)

    async def decode(
        self, work: Work, latents: WireTensor, decoding: Decoding, sink: Callable[[Frames], Awaitable[None]]
    ) -> str:
        """Decodes latents into `sink`, uint8 [n, H, W, 3] at a time; an attempt goes on where the last one broke.

        Returns:
            revision of what has decoded them.
        """
        delivered = 0

        async def attempt(number: int) -> str:
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
                return call.revision

        return await work.attempt("decode", attempt)


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
class Conditioning:
    """What the denoiser is given beside its parameters.

    Attributes:
        tensors: by name.
        digests: of the outputs that they come from, by what these are; an empty one: not known.
    """

    tensors: Mapping[str, WireTensor]
    digests: Mapping[str, str]

    def joined(self, tensors: Mapping[str, WireTensor], digests: Mapping[str, str]) -> Conditioning:
        """The same and more."""
        return Conditioning({**self.tensors, **tensors}, {**self.digests, **digests})


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint that came whole."""

    message: denoiser_pb2.Checkpoint
    tensors: Mapping[str, WireTensor]

    def to_output(self) -> StageOutput:
        return StageOutput(self.tensors, {"checkpoint": self.message.SerializeToString().hex()})

    @classmethod
    def from_output(cls, output: StageOutput) -> _Checkpoint:
        return cls(denoiser_pb2.Checkpoint.FromString(bytes.fromhex(output.facts["checkpoint"])), output.tensors)


class DenoiserStage:
    """Conditioning to latents."""

    def __init__(self, client: StageClient[Any]) -> None:
        self.client = client

    async def denoise(
        self,
        work: Work,
        parameters: denoiser_pb2.DenoiseParameters,
        conditioning: Conditioning,
        window: int = 0,
        windows: int = 1,
    ) -> StageOutput:
        """`latents` of one window, unless this generation has made them before it was interrupted."""
        recipe = denoise_recipe(parameters, conditioning)
        kept = work.outputs if all(conditioning.digests.values()) else None
        found = await kept.find_own(recipe, await self.client.revisions()) if kept is not None else None
        if found is not None:
            with work.report.stage("denoise", window=window, windows=windows):
                steps = parameters.num_inference_steps
                work.report.progress("denoise", steps, steps, window=window, windows=windows)
                if "forward_passes" in found.facts:
                    work.report.denoised(window, denoiser_pb2.ForwardPasses(**found.facts["forward_passes"]))
            return found
        run = _Run(self.client, work, parameters, conditioning.tensors, window, windows)
        async with work.turn():
            with work.report.stage("denoise", window=window, windows=windows):
                made = await run.latents(kept.checkpoints(recipe) if kept is not None else None)
        return made if kept is None else await kept.keep_own(recipe, made)


@dataclass(frozen=True)
class _Run:
    """One window that is denoised, in as many attempts as it takes; each goes on from the last checkpoint."""

    client: StageClient[Any]
    work: Work
    parameters: denoiser_pb2.DenoiseParameters
    tensors: Mapping[str, WireTensor]
    window: int
    windows: int

    async def latents(self, checkpoints: Checkpoints | None) -> StageOutput:
        """Args: checkpoints: where they are kept, those of an interrupted attempt included; None: nowhere."""
        kept = await checkpoints.last() if checkpoints is not None else None
        checkpoint = _Checkpoint.from_output(kept) if kept is not None else None

        def arrived(latest: _Checkpoint) -> None:
            nonlocal checkpoint
            checkpoint = latest
            if checkpoints is not None:
                checkpoints.keep(latest.message.completed_steps, latest.to_output())

        async def attempt(number: int) -> StageOutput:
            nonlocal checkpoint
            try:
                return await self._attempt(number, checkpoint, arrived)
            except BunrakuError as error:
                if checkpoint is None or not _refuses_checkpoint(error):
                    raise
                # weights were exchanged meanwhile, or it was made of inputs that had to be made again
                checkpoint = None
                raise NotReady("begins anew", reason=_ANOTHER_RUN, stage="denoiser", retry_after_s=0.0) from error

        return await self.work.attempt("denoise", attempt)

    async def _attempt(
        self, number: int, checkpoint: _Checkpoint | None, arrived: Callable[[_Checkpoint], None]
    ) -> StageOutput:
        first = denoiser_pb2.DenoiseRequest(parameters=self.parameters)
        tensors = list(self.tensors.values())
        if checkpoint is not None:
            first.parameters.start_from.CopyFrom(checkpoint.message)
            tensors += checkpoint.tensors.values()
        reader = _DenoiseReader(self.work.report, self.window, self.windows, arrived)
        async with self.client.call(self.work.budget, generation=self.work.generation, attempt=number) as call:
            latents = await reader.read(call, first, tensors)
            return StageOutput({"latents": latents}, reader.facts, call.revision)


def denoise_recipe(parameters: denoiser_pb2.DenoiseParameters, conditioning: Conditioning) -> Recipe:
    """What decides the latents: not how often something is told of them on the way."""
    decisive = denoiser_pb2.DenoiseParameters()
    decisive.CopyFrom(parameters)
    for field in ("preview_every_steps", "checkpoint_every_steps", "start_from"):
        decisive.ClearField(field)
    return Recipe("denoiser", "Denoise", stable_bytes(decisive), conditioning.digests)


def _refuses_checkpoint(error: BunrakuError) -> bool:
    if isinstance(error, InvalidRequest):
        return any(field.startswith(("start_from", _CHECKPOINT_PREFIX)) for field, _ in error.violations)
    return error.reason == _ANOTHER_RUN


class _DenoiseReader:
    """Reads the answers of one attempt: reports steps, passes checkpoints on, gives the latents."""

    def __init__(self, report: Report, window: int, windows: int, on_checkpoint: Callable[[_Checkpoint], None]) -> None:
        self._report, self._window, self._windows = report, window, windows
        self._on_checkpoint = on_checkpoint
        self.facts: dict[str, Any] = {}  # what the denoiser said of the latents
        self._total_steps = self._completed_steps = 0
        self._pending: denoiser_pb2.Checkpoint | None = None
        self._pending_tensors: dict[str, WireTensor] = {}

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
            if message.plan.HasField("forward_passes"):
                passes = message.plan.forward_passes
                self._report.denoised(self._window, passes)
                self.facts = {"forward_passes": {f.name: getattr(passes, f.name) for f in passes.DESCRIPTOR.fields}}
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
            self._on_checkpoint(_Checkpoint(self._pending, self._pending_tensors))


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


def connect(
    addresses: Mapping[str, Sequence[str]], shared_memory: SharedMemory | None, tls: TlsFiles = NO_TLS
) -> Stages:
    """Clients of the stages at these addresses, by the stages' names."""

    def client(stage: str, stub: Callable[..., Any]) -> StageClient[Any]:
        return StageClient(stage, stub, addresses[stage], shared_memory=shared_memory, tls=tls)

    return Stages(
        EncoderStage(client("encoder", encoder_pb2_grpc.EncoderServiceStub)),
        PoseStage(client("pose", pose_pb2_grpc.PoseServiceStub)),
        DenoiserStage(client("denoiser", denoiser_pb2_grpc.DenoiserServiceStub)),
        VaeStage(client("vae", vae_pb2_grpc.VaeServiceStub)),
    )


def stable_bytes(message: Message) -> bytes:
    """The same bytes for the same message, whatever the process."""
    return message.SerializeToString(deterministic=True)


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
