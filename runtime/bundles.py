"""Bundles: which files make up a model, how they are built and how they are sampled. Needs no torch.

A bundle is a directory with `bundle.toml`. File names in it are relative to the directory itself, or to a models
directory that an operator names (a volume with the released files, used as it is). See docs/bundles.md.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TASKS = ("animate", "text_to_video", "image_to_video", "speech_to_video")
SOLVERS = ("unipc", "dpm++", "euler")
PRESETS = ("wan2gp", "official")
POSE_PRESETS = ("recommended", *PRESETS)
MASK_BACKENDS = ("sam2", "matanyone")


class BundleError(Exception):
    """bundle.toml is wrong, or a file that it names is not there; the message names the entry."""


@dataclass(frozen=True)
class Lora:
    """A file that is added to the weights of a transformer.

    Attributes:
        file: of the LoRA.
        multiplier: how much of it is added; 1 as it was trained, 0 nothing.
        licence: SPDX identifier or name.
    """

    file: Path
    multiplier: float = 1.0
    licence: str = ""

    def __str__(self) -> str:
        return f"{self.file.name} x {self.multiplier:g}"


@dataclass(frozen=True)
class BundleComponent:
    """One model of a bundle.

    Attributes:
        name: `transformer`, `vae`, `text_encoder`, `image_encoder`, ...
        files: checkpoint files; several are read as one.
        architecture: named preset of the service's model, empty when `config` says everything.
        config: sizes of the model, by the names of its configuration class.
        tokenizer: directory of the tokenizer, where the model has one.
        dtype: of the weights in the files.
        quantization: `quanto-int8`, or empty.
        licence: SPDX identifier or name.
        sha256: of the files in order, empty if not stated.
        loras: of the transformer.
    """

    name: str
    files: tuple[Path, ...]
    architecture: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    dtype: str = ""
    quantization: str = ""
    licence: str = ""
    sha256: tuple[str, ...] = ()
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How a bundle is sampled unless a request says otherwise."""

    num_inference_steps: int
    guidance_scale: float
    shift: float
    solver: str
    negative_prompt: str = ""


@dataclass(frozen=True)
class Video:
    """Sizes of the videos that a bundle makes.

    Attributes:
        height, width: their product is the default number of pixels of a frame.
        window_frames: frames that are denoised together, 4k + 1.
        window_overlap_frames: frames that a later window takes over from the one before, 4k + 1.
        max_pixels: of a frame.
        max_frames: of a video.
        size_multiple: height and width are multiples of it.
        frames_per_second: where there is no driving video to take it from.
        color_correction_strength: of later windows, 0 to 1.
    """

    height: int
    width: int
    window_frames: int
    window_overlap_frames: int
    max_pixels: int
    max_frames: int
    size_multiple: int
    frames_per_second: float
    color_correction_strength: float = 0.0


@dataclass(frozen=True)
class Quirks:
    """Choices where released code contradicts itself (docs/quirks.md).

    Attributes:
        pose_time_origin: first time position of the pose tokens: 0 (wan2gp) or 1 (official, as trained).
        image_resize: of the picture for the image encoder: `lanczos` (wan2gp) or `bicubic` (official).
        pixel_rounding: of decoded values: `nearest` (wan2gp) or `truncate` (official).
    """

    pose_time_origin: int = 1
    image_resize: str = "bicubic"
    pixel_rounding: str = "nearest"


@dataclass(frozen=True)
class Pose:
    """How pose frames are made unless a request says otherwise; what is not stated is as the released model was trained.

    Attributes:
        preset: `recommended`, `wan2gp` or `official` (docs/quirks.md).
        mask_backend: what makes masks of several people: `sam2` or `matanyone` (non-commercial: docs/licences.md).
        capsule_radius_mm: half the thickness of a limb, above 0; a model of small pictures needs thicker limbs.
        head_radius_px: of the discs on nose, eyes and ears, and half the thickness of what links them; 0 to 64.
        dot_radius_px: of the points of hands and faces, 0 to 2, and the thickness of fingers, 1 at least; None: 1, and 2
            where the shorter side of the video has 600 pixels or more.
    """

    preset: str = "recommended"
    mask_backend: str = "sam2"
    capsule_radius_mm: float = 21.5
    head_radius_px: int = 4
    dot_radius_px: int | None = None


@dataclass(frozen=True)
class Bundle:
    """What bundle.toml says."""

    name: str
    task: str
    family: str
    description: str
    revision: str
    components: Mapping[str, BundleComponent]
    sampling: Sampling
    video: Video
    preset: str
    presets: Mapping[str, Quirks]
    pose: Pose = Pose()

    @property
    def quirks(self) -> Quirks:
        """Those of the default preset."""
        return self.presets[self.preset]

    def component(self, name: str) -> BundleComponent:
        """Raises BundleError if the bundle has none of this name."""
        if name not in self.components:
            raise BundleError(f"bundle {self.name} has no component {name} (it has {', '.join(self.components)})")
        return self.components[name]


def load_bundle(directory: Path, models: Path | None = None) -> Bundle:
    """Reads `directory/bundle.toml`.

    Args:
        directory: of the bundle.
        models: directory that file names are relative to; None: the bundle's own.

    Raises:
        BundleError: it is not there, is not TOML, lacks an entry or has an unknown one.
    """
    path = directory / "bundle.toml"
    try:
        content = path.read_bytes()
        entries = tomllib.loads(content.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BundleError(f"{path}: {error}") from error
    root = models or directory
    try:
        return _bundle(entries, root, hashlib.sha256(content).hexdigest()[:12])
    except (TypeError, KeyError, ValueError) as error:
        raise BundleError(f"{path}: {_entry(error)}") from error


def require_files(component: BundleComponent) -> None:
    """Raises BundleError naming every file of a component that is not there."""
    files = [*component.files, *(lora.file for lora in component.loras)]
    missing = [str(file) for file in files if not file.is_file()]
    if component.tokenizer is not None and not component.tokenizer.is_dir():
        missing.append(str(component.tokenizer))
    if missing:
        raise BundleError(f"{component.name}: not there: {', '.join(missing)}")


Configuration = TypeVar("Configuration", bound="DataclassInstance")


def configuration(
    component: BundleComponent, presets: Mapping[str, Configuration], make: type[Configuration]
) -> Configuration:
    """The configuration of a component's model: its named architecture, changed by what its `config` states.

    Args:
        component: of a bundle.
        presets: the architectures that the service knows.
        make: the configuration class, which takes the entries of `config` where no architecture is named.

    Raises:
        BundleError: the architecture is unknown, or an entry is.
    """
    entries = {name: tuple(v) if isinstance(v, list) else v for name, v in component.config.items()}
    try:
        if not component.architecture:
            return make(**entries)
        return replace(presets[component.architecture], **entries)
    except KeyError as error:
        known = ", ".join(presets)
        raise BundleError(f"{component.name}: architecture {error} is unknown (known: {known})") from error
    except (TypeError, ValueError) as error:
        raise BundleError(f"{component.name}: {error}") from error


def _bundle(entries: dict[str, Any], root: Path, revision: str) -> Bundle:
    presets = {name: Quirks(**values) for name, values in entries.pop("presets").items()}
    bundle = Bundle(
        components=MappingProxyType({n: _component(n, e, root) for n, e in entries.pop("components").items()}),
        sampling=Sampling(**entries.pop("sampling")),
        video=Video(**entries.pop("video")),
        pose=Pose(**entries.pop("pose", {})),
        presets=MappingProxyType(presets),
        revision=revision,
        **entries,
    )
    _check(bundle)
    return bundle


def _component(name: str, entry: dict[str, Any], root: Path) -> BundleComponent:
    files = tuple(root / file for file in entry.pop("files"))
    tokenizer = entry.pop("tokenizer", None)
    loras = tuple(
        Lora(root / lora.pop("file"), **lora) for lora in _tables(f"components.{name}.loras", entry.pop("loras", []))
    )
    return BundleComponent(
        name,
        files,
        tokenizer=root / tokenizer if tokenizer else None,
        sha256=tuple(entry.pop("sha256", ())),
        config=MappingProxyType(entry.pop("config", {})),
        loras=loras,
        **entry,
    )


def _tables(name: str, entry: Any) -> list[dict[str, Any]]:
    if not isinstance(entry, list) or not all(isinstance(each, dict) for each in entry):
        raise ValueError(f"{name} must be tables, each under [[{name}]], got {entry!r}")
    return entry


def _check(bundle: Bundle) -> None:
    video, sampling, pose = bundle.video, bundle.sampling, bundle.pose
    loras = [(component.name, lora) for component in bundle.components.values() for lora in component.loras]
    checks = {
        "loras are of the transformer alone": all(name == "transformer" for name, _ in loras),
        "multiplier of a LoRA must be a finite number": all(_is_number(lora.multiplier) for _, lora in loras),
        f"task must be one of {', '.join(TASKS)}": bundle.task in TASKS,
        f"sampling.solver must be one of {', '.join(SOLVERS)}": sampling.solver in SOLVERS,
        f"preset must be one of {', '.join(bundle.presets)}": bundle.preset in bundle.presets,
        f"presets must be among {', '.join(PRESETS)}": set(bundle.presets) <= set(PRESETS),
        "video.window_frames must be 4k + 1": video.window_frames % 4 == 1,
        "video.window_overlap_frames must be 4k + 1 and less than a window": video.window_overlap_frames % 4 == 1
        and video.window_overlap_frames < video.window_frames,
        "video.height and video.width must be multiples of video.size_multiple": video.height % video.size_multiple
        == video.width % video.size_multiple
        == 0,
        "video.max_pixels must be at least height times width": video.max_pixels >= video.height * video.width,
        f"pose.preset must be one of {', '.join(POSE_PRESETS)}": pose.preset in POSE_PRESETS,
        f"pose.mask_backend must be one of {', '.join(MASK_BACKENDS)}": pose.mask_backend in MASK_BACKENDS,
        "pose.capsule_radius_mm must be above 0 and at most 1000": 0 < pose.capsule_radius_mm <= 1000,
        "pose.head_radius_px must be 0 to 64": pose.head_radius_px in range(65),
        "pose.dot_radius_px must be 0 to 2": pose.dot_radius_px in (None, 0, 1, 2),
    }
    for text, holds in checks.items():
        if not holds:
            raise ValueError(text)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _entry(error: Exception) -> str:
    return f"entry {error} is missing" if isinstance(error, KeyError) else str(error)
