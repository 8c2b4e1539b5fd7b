"""The one place where a CreateGenerationRequest is checked and its defaults are filled in.

`checked` needs nothing but the request and the models; `planned` adds what only the files tell: size, number of frames
and frame rate. Both give a new request and leave theirs alone.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from bunraku.errors import InvalidRequest, NotThereYet
from bunraku.v1 import gateway_pb2 as pb
from gateway.assets import ASSET_NAME
from gateway.fetch import is_url
from runtime.bundles import SOLVERS, Bundle

MAX_PROMPT_CHARACTERS = 10_000
MAX_PEOPLE = 5
MAX_SEED = 2**63 - 1
DEFAULT_CRF = 8  # Source: the default of Wan2GP, libx264_8
MIN_SOURCE_FRAMES = 5  # two latent frames; SCAIL was not trained on fewer

STEP_CACHES = ("tea", "mag")
STEP_CACHE_SPEEDUP = 1.75  # Source: the default of Wan2GP

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SIZE_MODES = (pb.SIZE_MODE_UNSPECIFIED, pb.SIZE_MODE_BUDGET, pb.SIZE_MODE_FIT, pb.SIZE_MODE_CROP)

# Without these a bundle animates from ready pose videos only
POSE_COMPONENTS = {"person_detector", "whole_body_keypoints", "joints_3d"}

Violation = tuple[str, str]  # field as in the proto, dotted; what is wrong with it


@dataclass(frozen=True)
class ModelSpec:
    """What the gateway knows of a model: its defaults and its limits.

    Attributes:
        task: what it does, as the oneof of CreateGenerationRequest names it.
        revision: of its bundle.
        guidance_scale_low_noise: of the second expert; None where the model has one only.
        default_height, default_width: the default number of pixels, as a product.
        window_frames: frames that are denoised together, 4k + 1.
        window_overlap_frames: frames that two windows share, 4k + 1.
        max_pixels: of a frame; at least size_multiple squared, and the default number of pixels.
        max_frames: of a video.
        size_multiple: height and width are multiples of this.
        frames_per_second: used where neither the request nor a source has one.
        color_correction_strength: 0 to 1.
        preset: the default one of `presets`.
        negative_prompt: used where a request has none.
        extracts_poses: whether its bundle has the models that find poses in a driving video.
    """

    name: str
    task: str
    family: str
    revision: str
    num_inference_steps: int
    guidance_scale: float
    shift: float
    solver: str
    default_height: int
    default_width: int
    window_frames: int
    window_overlap_frames: int
    max_pixels: int
    max_frames: int
    frames_per_second: float
    color_correction_strength: float
    preset: str
    presets: tuple[str, ...]
    negative_prompt: str = ""
    guidance_scale_low_noise: float | None = None
    size_multiple: int = 32
    extracts_poses: bool = False

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """The model that a bundle describes."""
        sampling, video = bundle.sampling, bundle.video
        return cls(
            name=bundle.name,
            task=bundle.task,
            family=bundle.family,
            revision=bundle.revision,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            shift=sampling.shift,
            solver=sampling.solver,
            default_height=video.height,
            default_width=video.width,
            window_frames=video.window_frames,
            window_overlap_frames=video.window_overlap_frames,
            max_pixels=video.max_pixels,
            max_frames=video.max_frames,
            frames_per_second=video.frames_per_second,
            color_correction_strength=video.color_correction_strength,
            preset=bundle.preset,
            presets=tuple(bundle.presets),
            negative_prompt=sampling.negative_prompt,
            size_multiple=video.size_multiple,
            extracts_poses=bundle.components.keys() >= POSE_COMPONENTS,
        )

    def to_proto(self) -> pb.Model:
        """The model as callers see it."""
        return pb.Model(
            name=self.name,
            task=self.task,
            family=self.family,
            revision=self.revision,
            default_sampling=pb.SamplingParameters(
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                guidance_scale_low_noise=self.guidance_scale_low_noise,
                shift=self.shift,
                solver=self.solver,
            ),
            default_height=self.default_height,
            default_width=self.default_width,
            window_frames=self.window_frames,
            window_overlap_frames=self.window_overlap_frames,
            max_pixels=self.max_pixels,
            max_frames=self.max_frames,
            size_multiple=self.size_multiple,
        )


def request_digest(request: pb.CreateGenerationRequest) -> str:
    """SHA-256 of a request as it came, 64 hexadecimal digits: tells whether a repeated request_id repeats its call."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()


def default_seed() -> int:
    """A random seed below 2^32: every language's JSON keeps such a number exactly, and people can copy it."""
    return secrets.randbelow(2**32)


def named_assets(request: pb.CreateGenerationRequest) -> dict[str, str]:
    """The files that a request names: field, as in the proto, and `assets/{id}` or a URL."""
    animate = request.animate
    fields = {
        "animate.reference_image": animate.reference_image,
        "animate.driving_video": animate.driving_video,
        "animate.pose_video": animate.pose_video,
        "animate.mask_video": animate.mask_video,
    }
    return {field: name for field, name in fields.items() if name}


def checked(
    request: pb.CreateGenerationRequest, models: Sequence[ModelSpec], *, max_timeout_seconds: int = 24 * 3600
) -> pb.CreateGenerationRequest:
    """The request with the model's defaults filled in; size, frames and frame rate follow in `planned`.

    Args:
        models: those that can be asked for; the first for the task is its default.
        max_timeout_seconds: the gateway's limit for one generation.

    Raises:
        InvalidRequest: fields are wrong; all of them are named.
        NotThereYet: it asks for what this version does not do.
    """
    _refuse_what_is_not_there_yet(request)
    if request.WhichOneof("task") is None:
        raise InvalidRequest(("task", "must be set: animate"))
    model = _model(request, models)
    if model is not None and request.animate.WhichOneof("motion") == "driving_video" and not model.extracts_poses:
        text = f"model {model.name} has no pose models: give a ready pose video as animate.pose_video"
        raise NotThereYet(text, reason="NO_POSE_MODELS")
    violations = [
        *_request_violations(request, models, model, max_timeout_seconds),
        *_animate_violations(request.animate, model),
        *_sampling_violations(request.sampling, model),
        *_output_violations(request.output, model),
    ]
    if violations or model is None:
        raise InvalidRequest(*violations)
    return _with_defaults(request, model, max_timeout_seconds)


def planned(
    request: pb.CreateGenerationRequest,
    model: ModelSpec,
    *,
    reference_height: int,
    reference_width: int,
    source_frames: int,
    source_frames_per_second: Fraction,
) -> pb.CreateGenerationRequest:
    """The checked request with the size, number of frames and frame rate that are used.

    Args:
        reference_height, reference_width: of the reference image, in pixels.
        source_frames, source_frames_per_second: of the pose video or driving video.

    Raises:
        InvalidRequest: the video is too short.
    """
    field = f"animate.{request.animate.WhichOneof('motion') or 'motion'}"
    result = pb.CreateGenerationRequest()
    result.CopyFrom(request)
    output = result.output
    output.num_frames = plan_frames(source_frames, request.output.num_frames, model, field)
    output.height, output.width = plan_size(reference_height, reference_width, request.output, model)
    output.frames_per_second = request.output.frames_per_second or float(source_frames_per_second)
    return result


def plan_size(
    reference_height: int, reference_width: int, output: pb.OutputParameters, model: ModelSpec
) -> tuple[int, int]:
    """Height and width of the video for a reference image, multiples of the model's 32, never 0, within its limit.

    BUDGET keeps the image's aspect ratio and has about height x width pixels, by default the model's. FIT is the
    largest size with that ratio within height x width or, where that gives more, within the box turned on its side.
    CROP is height x width.

    Args:
        reference_height, reference_width: of the reference image, in pixels, at least 1.
        output: checked.

    Source: the three ways of fit_canvas in Wan2GP; Python's rounding of halves to even is part of it. Its lists of
    sizes are rounded down to multiples of 32, as the box of FIT is here.
    """
    if output.size_mode == pb.SIZE_MODE_CROP:
        return output.height, output.width
    multiple = model.size_multiple
    if output.size_mode == pb.SIZE_MODE_FIT:
        height, width = (side // multiple * multiple for side in (output.height, output.width))
        upright = min(height / reference_height, width / reference_width)
        on_its_side = min(width / reference_height, height / reference_width)
        scale = max(upright, on_its_side)
    else:
        area = output.height * output.width or model.default_height * model.default_width
        scale = math.sqrt(area / (reference_height * reference_width))
    height, width = (max(1, round(side * scale / multiple)) * multiple for side in (reference_height, reference_width))
    if height * width <= model.max_pixels:
        return height, width
    shorter = min(height, width)
    longer = model.max_pixels // shorter // multiple * multiple
    return (longer, shorter) if height > width else (shorter, longer)


def plan_frames(source_frames: int, requested: int, model: ModelSpec, field: str = "animate.pose_video") -> int:
    """Frames of the video, 4k + 1: as many as the source has, at most those requested and those of the model.

    Args:
        source_frames: of the pose video or driving video.
        requested: the most frames wanted; 0: as many as there are.
        field: the field of the request that names the source.

    Raises:
        InvalidRequest: the source has fewer than 5 frames.
    """
    if source_frames < MIN_SOURCE_FRAMES:
        raise InvalidRequest((field, f"must have at least {MIN_SOURCE_FRAMES} frames, has {source_frames}"))
    num_frames = min(source_frames, requested or source_frames, model.max_frames)
    return (num_frames - 1) // 4 * 4 + 1


def _refuse_what_is_not_there_yet(request: pb.CreateGenerationRequest) -> None:
    task = request.WhichOneof("task")
    if task not in (None, "animate"):
        raise NotThereYet(f"{task} is not there yet; animate is")


def _model(request: pb.CreateGenerationRequest, models: Sequence[ModelSpec]) -> ModelSpec | None:
    fitting = (model for model in models if model.task == request.WhichOneof("task"))
    return next((model for model in fitting if request.model in ("", model.name)), None)


def _request_violations(
    request: pb.CreateGenerationRequest,
    models: Sequence[ModelSpec],
    model: ModelSpec | None,
    max_timeout_seconds: int,
) -> Iterator[Violation]:
    if request.request_id and not _REQUEST_ID.fullmatch(request.request_id):
        yield "request_id", "must be 1 to 64 characters of a-z, A-Z, 0-9, - and _"
    if model is None:
        task = request.WhichOneof("task")
        there_are = ", ".join(model.name for model in models if model.task == task) or "none"
        yield "model", f"there is no {request.model[:100]!r} for {task}; there are: {there_are}"
    if request.timeout_seconds > max_timeout_seconds:
        yield "timeout_seconds", f"must be 0 to {max_timeout_seconds}, got {request.timeout_seconds}"
    if request.priority > 9:
        yield "priority", f"must be 0 to 9, got {request.priority}"


def _animate_violations(animate: pb.AnimateTask, model: ModelSpec | None) -> Iterator[Violation]:
    for field, prompt in (("prompt", animate.prompt), ("negative_prompt", animate.negative_prompt)):
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            yield f"animate.{field}", f"must have at most {MAX_PROMPT_CHARACTERS} characters, has {len(prompt)}"
    if not animate.reference_image:
        yield "animate.reference_image", "must name an asset, assets/{id}, or be a URL"
    if animate.WhichOneof("motion") is None:
        yield "animate.motion", "must be set: pose_video"
    elif not (animate.pose_video or animate.driving_video):
        yield f"animate.{animate.WhichOneof('motion')}", "must name an asset, assets/{id}, or be a URL"
    for field, name in named_assets(pb.CreateGenerationRequest(animate=animate)).items():
        if not is_url(name) and not ASSET_NAME.fullmatch(name):
            yield field, f"must be a URL or assets/ and 64 hexadecimal digits, got {name[:100]!r}"
    if animate.mask_video and not animate.driving_video:
        yield "animate.mask_video", "goes with driving_video only"
    if animate.people > MAX_PEOPLE:
        yield "animate.people", f"must be 0 to {MAX_PEOPLE}, got {animate.people}"
    overlap = animate.window_overlap_frames
    if overlap and (overlap % 4 != 1 or (model is not None and overlap >= model.window_frames)):
        limit = f" and less than {model.window_frames}" if model is not None else ""
        yield "animate.window_overlap_frames", f"must be 0 or 4k + 1{limit}, got {overlap}"
    if not 0 <= animate.color_correction_strength <= 1:
        yield "animate.color_correction_strength", f"must be 0 to 1, got {animate.color_correction_strength:g}"
    if model is not None and animate.preset not in ("", *model.presets):
        yield "animate.preset", f"must be one of {', '.join(model.presets)}, got {animate.preset[:100]!r}"


def _sampling_violations(sampling: pb.SamplingParameters, model: ModelSpec | None) -> Iterator[Violation]:
    if sampling.seed > MAX_SEED:
        yield "sampling.seed", f"must be 0 to 2^63 - 1, got {sampling.seed}"
    if sampling.HasField("num_inference_steps") and not 1 <= sampling.num_inference_steps <= 100:
        yield "sampling.num_inference_steps", f"must be 1 to 100, got {sampling.num_inference_steps}"
    # comparisons with NaN are false, so it is outside every range
    if not 0 <= sampling.guidance_scale <= 30:
        yield "sampling.guidance_scale", f"must be 0 to 30, got {sampling.guidance_scale:g}"
    if not 0 <= sampling.guidance_scale_low_noise <= 30:
        yield "sampling.guidance_scale_low_noise", f"must be 0 to 30, got {sampling.guidance_scale_low_noise:g}"
    elif sampling.HasField("guidance_scale_low_noise") and model and model.guidance_scale_low_noise is None:
        yield "sampling.guidance_scale_low_noise", f"must not be set: {model.name} has one expert"
    if sampling.HasField("shift") and not 0.1 <= sampling.shift <= 100:
        yield "sampling.shift", f"must be 0.1 to 100, got {sampling.shift:g}"
    if sampling.solver not in ("", *SOLVERS):
        yield "sampling.solver", f"must be one of {', '.join(SOLVERS)}, got {sampling.solver[:100]!r}"
    yield from _step_violations(sampling, model)


def _step_violations(sampling: pb.SamplingParameters, model: ModelSpec | None) -> Iterator[Violation]:
    """Of what is computed otherwise than at every step in full."""
    speedup, start, end = sampling.step_cache_speedup, sampling.guidance_start, sampling.guidance_end
    if sampling.step_cache not in ("", *STEP_CACHES):
        yield "sampling.step_cache", f"must be one of {', '.join(STEP_CACHES)}, got {sampling.step_cache[:100]!r}"
    if not sampling.step_cache and sampling.HasField("step_cache_speedup"):
        yield "sampling.step_cache_speedup", "goes with step_cache only"
    elif sampling.HasField("step_cache_speedup") and not 1 <= speedup <= 3:
        yield "sampling.step_cache_speedup", f"must be 1 to 3, got {speedup:g}"
    if not sampling.step_cache and sampling.step_cache_start:
        yield "sampling.step_cache_start", "goes with step_cache only"
    elif not 0 <= sampling.step_cache_start <= 1:
        yield "sampling.step_cache_start", f"must be 0 to 1, got {sampling.step_cache_start:g}"
    if not 0 <= start < 1:
        yield "sampling.guidance_start", f"must be 0 to less than 1, got {start:g}"
    elif sampling.HasField("guidance_end") and not start < end <= 1:
        yield "sampling.guidance_end", f"must be above guidance_start, {start:g}, up to 1, got {end:g}"
    steps = sampling.num_inference_steps or (model.num_inference_steps if model is not None else 0)
    if steps and sampling.zero_init_steps >= steps:
        yield "sampling.zero_init_steps", f"must be less than the {steps} steps, got {sampling.zero_init_steps}"


def _output_violations(output: pb.OutputParameters, model: ModelSpec | None) -> Iterator[Violation]:
    if output.size_mode not in _SIZE_MODES:
        yield "output.size_mode", f"must be BUDGET, FIT or CROP, got {output.size_mode}"
    if output.height and output.width:
        yield from _size_violations(output, model)
    elif output.height or output.width:
        unset, other = ("width", "height") if output.height else ("height", "width")
        yield f"output.{unset}", f"must be set as {other} is: both or neither"
    elif output.size_mode in (pb.SIZE_MODE_FIT, pb.SIZE_MODE_CROP):
        yield "output.size_mode", "FIT and CROP need height and width"
    if model is not None and output.num_frames > model.max_frames:
        yield "output.num_frames", f"must be 0 to {model.max_frames}, got {output.num_frames}"
    if output.frames_per_second != 0 and not 1 <= output.frames_per_second <= 60:
        yield "output.frames_per_second", f"must be 0 or 1 to 60, got {output.frames_per_second:g}"
    if output.crf > 51:
        yield "output.crf", f"must be 0 to 51, got {output.crf}"


def _size_violations(output: pb.OutputParameters, model: ModelSpec | None) -> Iterator[Violation]:
    if model is None:
        return
    for field, side in (("output.height", output.height), ("output.width", output.width)):
        if output.size_mode == pb.SIZE_MODE_CROP and side % model.size_multiple:
            yield field, f"must be a multiple of {model.size_multiple} with CROP, got {side}"
        if output.size_mode == pb.SIZE_MODE_FIT and side < model.size_multiple:
            yield field, f"must be at least {model.size_multiple} with FIT, got {side}"
    if output.height * output.width > model.max_pixels:
        pixels = output.height * output.width
        yield "output.height", f"times width must be at most {model.max_pixels} pixels, is {pixels}"


def _with_defaults(
    request: pb.CreateGenerationRequest, model: ModelSpec, max_timeout_seconds: int
) -> pb.CreateGenerationRequest:
    result = pb.CreateGenerationRequest()
    result.CopyFrom(request)
    result.model = model.name
    result.timeout_seconds = request.timeout_seconds or max_timeout_seconds
    animate, sampling, output = result.animate, result.sampling, result.output
    animate.negative_prompt = animate.negative_prompt or model.negative_prompt
    animate.people = animate.people or 1
    animate.window_overlap_frames = animate.window_overlap_frames or model.window_overlap_frames
    if not animate.HasField("color_correction_strength"):
        animate.color_correction_strength = model.color_correction_strength
    animate.preset = animate.preset or model.preset
    if not sampling.HasField("seed"):
        sampling.seed = default_seed()
    if not sampling.HasField("num_inference_steps"):
        sampling.num_inference_steps = model.num_inference_steps
    if not sampling.HasField("guidance_scale"):
        sampling.guidance_scale = model.guidance_scale
    if not sampling.HasField("guidance_scale_low_noise") and model.guidance_scale_low_noise is not None:
        sampling.guidance_scale_low_noise = model.guidance_scale_low_noise
    if not sampling.HasField("shift"):
        sampling.shift = model.shift
    sampling.solver = sampling.solver or model.solver
    if sampling.step_cache and not sampling.HasField("step_cache_speedup"):
        sampling.step_cache_speedup = STEP_CACHE_SPEEDUP
    output.size_mode = output.size_mode or pb.SIZE_MODE_BUDGET
    if not output.HasField("crf"):
        output.crf = DEFAULT_CRF
    return result
