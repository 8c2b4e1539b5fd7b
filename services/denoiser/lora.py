"""LoRA files: what they add to the weights of a transformer, and the weights with it added.

For a matrix W [out, in] a LoRA holds two thin ones, A [rank, in] and B [out, rank]; what is used is
W + multiplier * alpha / rank * B A (Hu et al. 2021, arXiv:2106.09685). Files made from two checkpoints also hold whole
differences, of norms, biases and modulation. Everything is added in float32, once, when the weights are loaded; int8
weights are quantised again, row by row. Several LoRAs are added up before that.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.bundles import Lora
from runtime.mapped import MappedPages
from runtime.pinned import pinned_memory
from runtime.weights import CheckpointMismatch, read_checkpoint, read_metadata
from services.denoiser.model import TransformerConfig
from services.denoiser.names import is_of_diffusers, released_name
from services.denoiser.quantisation import DATA, SCALE, quantize_weight, smallest_scale

# Spellings of Wan LoRAs: PEFT and diffusers (lora_A, lora_B), ComfyUI, Kijai and LightX2V (diffusion_model., lora_down,
# lora_up, diff, diff_b, diff_m), kohya's musubi-tuner (lora_unet_, dots as underscores), DiffSynth (.default)
_PREFIXES = re.compile(r"^(?:base_model\.model\.|pipe\.dit\.|model\.|diffusion_model\.|transformer\.)+")
_KOHYA = re.compile(r"^(?:lora_unet|lycoris)_+")
_PART = re.compile(
    r"\.(?:(?P<down>lora(?:_A|_down|\.down)(?:\.default)?\.weight)|(?P<up>lora(?:_B|_up|\.up)(?:\.default)?\.weight)"
    r"|(?P<alpha>alpha)|(?P<diff>diff)|(?P<bias>diff_b)|(?P<modulation>diff_m))$"
)
_PEFT_SETTINGS = "lora_adapter_metadata"  # huggingface/diffusers 0.42.1 loaders/lora_base.py, in the file's header
_UNSUPPORTED_SETTINGS = ("alpha_pattern", "use_rslora", "use_dora")

_PATCH_EMBEDDING = "patch_embedding"
_LARGE_BYTES = 2**20  # of a tensor whose pages are worth looking for: that takes milliseconds
_NUMBERS_AT_ONCE = 2**19  # 2 MiB of float32: stays in a processor's cache, and is all that is held besides the weights
_SHOWN_NAMES = 8
_MOST_OFFSET = 0.25  # of the step: a row that a few numbers dominate is coarse as it is
_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Product:
    """scale * up @ down."""

    up: Tensor  # [out, rank], axes of size 1 behind
    down: Tensor  # [rank, in], or [rank, ...] as the weight has more axes
    scale: float


@dataclass(frozen=True)
class Difference:
    """scale * values."""

    values: Tensor  # of the shape of the weight
    scale: float


Term = Product | Difference
Parts = dict[str, tuple[str, Tensor]]  # of one weight: what it is, to its name in the file and the tensor


class Changes:
    """What LoRAs add to the tensors of a transformer.

    Args:
        terms: by the released name of the tensor; of int8 weights by the name that they would have as floats.
    """

    def __init__(self, terms: Mapping[str, Sequence[Term]]) -> None:
        self._terms = terms

    def merged(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensor of this name with its changes, float32; int8 data comes with its scale (and the scale alone not).

        Unchanged tensors are returned as they are. Of large changed ones, pages of the file leave the resident memory.

        Args:
            name: of a tensor.
            tensors: of the checkpoint, under released names.
        """
        weight = float_name(name)
        if weight not in self._terms:
            return {name: tensors[name]}
        if name.endswith(SCALE):
            return {}
        total = _Sum(self._terms[weight])
        if name.endswith(DATA):
            scale = name.removesuffix(DATA) + SCALE
            data, scales = _requantized(tensors[name], tensors[scale], total)
            found = {name: data, scale: scales}
        else:
            found = {name: _added(tensors[name], total)}
        if tensors[name].nbytes >= _LARGE_BYTES:
            MappedPages([tensors[name]]).drop()
        return found


def read_loras(loras: Sequence[Lora], config: TransformerConfig, shapes: Mapping[str, Sequence[int]]) -> Changes:
    """What these files add to a transformer.

    Args:
        loras: safetensors files and their multipliers; one of 0 has to fit too, but changes nothing.
        config: of the transformer. LoRAs of other Wan models are used with SCAIL, whose patch embedding has channels of
            its own: what they hold for that is left out unless it fits.
        shapes: of the checkpoint's tensors, under released names.

    Raises:
        CheckpointMismatch: a file holds something that cannot be added; the message names it.
        FileNotFoundError: a file is not there.
    """
    expected = {float_name(name): tuple(shape) for name, shape in shapes.items() if not name.endswith(SCALE)}
    terms: dict[str, list[Term]] = defaultdict(list)
    for lora in loras:
        found = _read(lora, config, expected)
        _log.info("LoRA %s: adds to %d tensors", lora, len({name for name, _ in found}))
        for name, term in found:
            if lora.multiplier != 0:
                terms[name].append(term)
    return Changes(terms)


def float_name(name: str) -> str:
    """The name that a tensor of int8 weights would have if they were floats; other names as they are."""
    for suffix in (DATA, SCALE):
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    return name


def _read(lora: Lora, config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, Term]]:
    """The terms of one file, each with the name of the tensor that it is added to."""
    if lora.file.suffix != ".safetensors":
        raise CheckpointMismatch(f"{lora.file.name}: a LoRA ends in .safetensors")
    tensors = read_checkpoint([lora.file])
    stated_alpha = _stated_alpha(lora.file)
    problems: dict[str, list[str]] = defaultdict(list)
    weights = _by_weight(tensors, shapes, problems)
    if config.pose:
        _leave_out_patch_embedding(lora, weights, shapes)
    terms: list[tuple[str, Term]] = []
    for name, parts in weights.items():
        found = _terms(parts, shapes[name], lora.multiplier, stated_alpha, problems)
        terms += [(name, term) for term in found]
    if problems:
        texts = [f"{len(names)} {kind} ({', '.join(sorted(names)[:_SHOWN_NAMES])})" for kind, names in problems.items()]
        raise CheckpointMismatch(f"{lora.file.name} cannot be added to this transformer: " + "; ".join(texts))
    if not terms:
        raise CheckpointMismatch(f"{lora.file.name} holds nothing that could be added to this transformer")
    return terms


def _stated_alpha(file: Path) -> float | None:
    """The alpha of all layers that PEFT's settings in the file's header state; None where there are none."""
    text = read_metadata(file).get(_PEFT_SETTINGS)
    if text is None:
        return None
    try:
        settings = {name.rpartition(".")[2]: value for name, value in json.loads(text).items()}
        unsupported = [name for name in _UNSUPPORTED_SETTINGS if settings.get(name)]
        alpha = None if settings.get("lora_alpha") is None else float(settings["lora_alpha"])
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(f"{file.name}: the header's {_PEFT_SETTINGS} cannot be read: {error}") from error
    if unsupported:
        raise CheckpointMismatch(f"{file.name}: the header asks for {', '.join(unsupported)}, which is not supported")
    return alpha


def _by_weight(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], problems: dict[str, list[str]]
) -> dict[str, Parts]:
    """The tensors of a file by what they are added to."""
    modules = {name.rpartition(".")[0] for name in shapes}
    flat = {module.replace(".", "_"): module for module in modules}
    diffusers = is_of_diffusers(tensors)
    weights: dict[str, Parts] = defaultdict(dict)
    for key, tensor in tensors.items():
        part = _PART.search(key)
        if part is None:
            problems["unknown"].append(key)
            continue
        kind, module = str(part.lastgroup), key[: part.start()]
        if _KOHYA.match(module):
            module = flat.get(_KOHYA.sub("", module), module)
        else:
            module = _PREFIXES.sub("", module)
        target = _target(module, kind, shapes, diffusers=diffusers)
        if target not in shapes:
            problems["unknown"].append(key)
        elif kind in weights[target]:
            problems["under two names"].append(key)
        elif kind == "alpha" and tensor.numel() != 1:
            problems["of another shape"].append(f"{key} {list(tensor.shape)} instead of one number")
        elif not (tensor.is_floating_point() or kind == "alpha") or not bool(torch.isfinite(tensor.float()).all()):
            problems["not finite floats"].append(key)
        else:
            weights[target][kind] = (key, tensor)
    return dict(weights)


def _target(module: str, kind: str, shapes: Mapping[str, tuple[int, ...]], *, diffusers: bool) -> str:
    """The released name of the tensor that a part is added to."""
    if kind == "modulation":
        return f"{module}.modulation"
    if kind == "diff" and module in shapes:  # of a tensor that is no module's: blocks.0.modulation.diff
        return module
    return released_name(f"{module}.{'bias' if kind == 'bias' else 'weight'}", diffusers=diffusers)


def _leave_out_patch_embedding(lora: Lora, weights: dict[str, Parts], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Drops what is for a patch embedding of other channels; the bias with it, as both were trained together."""
    weight, bias = f"{_PATCH_EMBEDDING}.weight", f"{_PATCH_EMBEDDING}.bias"
    problems: dict[str, list[str]] = defaultdict(list)
    fits = bool(_terms(weights.get(weight, {}), shapes[weight], 1, None, problems))
    if fits and not problems:
        return
    left_out = [key for name in (weight, bias) for key, _ in weights.pop(name, {}).values()]
    if left_out:
        _log.info("LoRA %s: left out as it is for other inputs: %s", lora, ", ".join(left_out))


def _terms(
    parts: Parts,
    shape: tuple[int, ...],
    multiplier: float,
    stated_alpha: float | None,
    problems: dict[str, list[str]],
) -> list[Term]:
    """What the parts for one weight add to it; what is wrong with them goes to the problems."""
    terms: list[Term] = []
    for kind in ("diff", "bias", "modulation"):
        if kind in parts:
            key, values = parts[kind]
            terms.append(Difference(values, multiplier))
            if values.shape != shape:
                problems["of another shape"].append(f"{key} {list(values.shape)} instead of {list(shape)}")
    factors = [parts[kind][0] for kind in ("down", "up", "alpha") if kind in parts]
    if "down" in parts and "up" in parts:
        (_, down), (key, up) = parts["down"], parts["up"]
        if _product_shape(up, down) != shape:
            text = f"{key} {list(up.shape)} times {list(down.shape)} instead of {list(shape)}"
            problems["of another shape"].append(text)
        else:
            rank = len(down)
            alpha = float(parts["alpha"][1]) if "alpha" in parts else stated_alpha
            terms.append(Product(up, down, multiplier * (1 if alpha is None else alpha / rank)))
    elif factors:
        problems["without their other half"] += factors
    return terms


def _product_shape(up: Tensor, down: Tensor) -> tuple[int, ...] | None:
    """Of up @ down; None where they cannot be multiplied."""
    if up.dim() < 2 or down.dim() < 2 or not up.shape[1] == up.shape[1:].numel() == len(down) > 0:
        return None
    return (len(up), *down.shape[1:])


class _Sum:
    """All terms of one weight, to be added to some of its rows at a time."""

    def __init__(self, terms: Sequence[Term]) -> None:
        products = [term for term in terms if isinstance(term, Product)]
        self._differences = [term for term in terms if isinstance(term, Difference)]
        self._factors: tuple[Tensor, Tensor] | None = None
        if products:
            up = torch.cat([term.up.flatten(1).float() * term.scale for term in products], dim=1)  # [out, ranks]
            down = torch.cat([term.down.flatten(1).float() for term in products])  # [ranks, in]
            self._factors = up, down

    def add_to(self, values: Tensor, rows: slice) -> None:
        """values: float32, these rows of the weight as a matrix; changed in place."""
        if self._factors is not None:
            up, down = self._factors
            values.addmm_(up[rows], down)
        for term in self._differences:
            values.add_(_matrix(term.values)[rows].float(), alpha=term.scale)


def _requantized(data: Tensor, scale: Tensor, total: _Sum) -> tuple[Tensor, Tensor]:
    """int8 weights [out, in] with their scale [out, 1], changed: the same dtypes, a scale of its own for each row."""
    # not from malloc: what a block leaves when it goes to the device is to be the system's again
    new_data = pinned_memory(data.nbytes, _CPU).view(torch.int8).view(data.shape)
    new_scale = torch.empty_like(scale)
    for rows in _pieces(data):
        values = data[rows].float().mul_(scale[rows].float())
        total.add_to(values, rows)
        new_data[rows], new_scale[rows] = quantize_weight(values, _offset_scale(values).to(scale.dtype))
    return new_data, new_scale


def _offset_scale(values: Tensor) -> Tensor:
    """Scales [out, 1] of rows [out, in] whose numbers lie on or near an older grid.

    With the old scale a change of less than half a step would be rounded away wherever it is, and a small LoRA with it.
    A scale that is larger by a step per deviation of the row puts the new numbers anywhere between the old ones: what
    is rounded no longer depends on the change. It costs 3 % of the step for rows of normal numbers.
    """
    smallest = smallest_scale(values)
    deviation = torch.linalg.vector_norm(values, dim=1, keepdim=True) / values.shape[1] ** 0.5
    smallest_deviation = torch.finfo(values.dtype).tiny  # of a row of zeros
    return smallest * (1 + (smallest / deviation.clamp_min(smallest_deviation)).clamp_max(_MOST_OFFSET))


def _added(weight: Tensor, total: _Sum) -> Tensor:
    """Float weights of any shape, changed: float32."""
    changed = torch.empty(weight.shape)
    for rows in _pieces(weight):
        values = _matrix(changed)[rows].copy_(_matrix(weight)[rows])
        total.add_to(values, rows)
    return changed


def _matrix(tensor: Tensor) -> Tensor:
    """[n, ...] -> [n, the rest]."""
    return tensor.reshape(len(tensor), -1)


def _pieces(tensor: Tensor) -> Iterator[slice]:
    """The rows of a tensor, some at a time."""
    at_once = max(1, _NUMBERS_AT_ONCE * len(tensor) // tensor.numel())
    for start in range(0, len(tensor), at_once):
        yield slice(start, start + at_once)
