"""Weight-only int8 in the layout of quanto: a row of a linear's weights is a float scale times int8 numbers.

On disk a linear `m` is `m.weight._data` int8 [out, in], `m.weight._scale` [out, 1], `m.bias`, and the unused scalars
`m.input_scale` and `m.output_scale`; the header's `quantization_map_base64` names the quantised modules. Applied to a
finished model from outside. Read and written as mmgp 3.7.12 with optimum-quanto 0.2.7 does
(the `*_quanto_*_int8.safetensors` files of Wan2GP).
"""

from __future__ import annotations

import base64
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.weights import CheckpointMismatch
from services.denoiser.attention import Attended
from services.denoiser.model import Linear

DATA, SCALE = ".weight._data", ".weight._scale"
UNUSED = (".input_scale", ".output_scale")  # of activations, which are not quantised; always 1
_MAP, _CONFIG, _FORMAT = "quantization_map_base64", "config_base64", "quantization_format"
_HIGHEST = 127
_SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.int64: "I64",
}


class QuantizedWeight(nn.Module):
    """The weights of one linear, under the names they have in a file."""

    _data: Tensor  # int8 [out, in]
    _scale: Tensor  # [out, 1] in the dtype to compute in

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("_data", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("_scale", torch.ones(out_features, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self._scale.dtype

    def forward(self) -> Tensor:
        """scale * data, rounded once to the dtype of the scale."""
        return self._data.to(self._scale.dtype).mul_(self._scale)


class Int8Linear(nn.Module):
    """Stands in for `model.Linear`: dequantises its weights at every call, then computes in the dtype of their scale."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = QuantizedWeight(in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def prepare(self, inputs: Attended, also: Tensor | None = None) -> Tensor:
        tokens = inputs if isinstance(inputs, Tensor) else inputs.float()
        return (tokens if also is None else tokens + also).to(self.compute_dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        weight: Tensor = self.weight()
        return F.linear(self.prepare(inputs), weight, self.bias)


def quantize_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Replaces these linears of a model (usually one on the meta device, before its weights are loaded).

    Raises:
        CheckpointMismatch: a name is no linear of the model.
    """
    modules = dict(model.named_modules())
    for name in sorted(names):
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointMismatch(
                f"{name} is quantised in the checkpoint but is no linear of {type(model).__name__}"
            )
        parent, _, attribute = name.rpartition(".")
        with torch.device(linear.weight.device):
            replacement = Int8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        setattr(modules[parent], attribute, replacement)


def quantized_names(names: Iterable[str]) -> set[str]:
    """The modules that hold int8 data, by the names of their tensors."""
    return {name.removesuffix(DATA) for name in names if name.endswith(DATA)}


def check_quantization(tensors: Mapping[str, Tensor], headers: Iterable[Mapping[str, str]]) -> set[str]:
    """The quantised modules of a checkpoint: what its headers say and what its tensors are, which have to agree.

    Args:
        tensors: of all files of the component, under the names of the files.
        headers: the metadata of each file.

    Raises:
        CheckpointMismatch: they disagree, a header cannot be read, or the numbers are not int8.
    """
    declared = {name for header in headers for name in _declared(header)}
    held = quantized_names(tensors)
    if declared != held:
        raise CheckpointMismatch(
            f"the quantisation map and the tensors disagree: only in the map {sorted(declared - held)[:8]}, "
            f"only as tensors {sorted(held - declared)[:8]}"
        )
    for name in sorted(held):
        if (dtype := tensors[name + DATA].dtype) != torch.int8:
            raise CheckpointMismatch(f"{name}{DATA} must be int8, got {dtype}")
    return held


def _declared(header: Mapping[str, str]) -> list[str]:
    if _MAP not in header:
        return []
    try:
        entries = json.loads(base64.b64decode(header[_MAP], validate=True))
        unsupported = {name: entry["weights"] for name, entry in entries.items() if entry["weights"] != "qint8"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointMismatch(f"the header's {_MAP} cannot be read: {error}") from error
    if unsupported:
        raise CheckpointMismatch(f"the header's {_MAP} asks for other weights than qint8: {unsupported}")
    return list(entries)


def quantize_weight(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> int8 data [out, in] and scale [out, 1], computed and rounded in the weight's own dtype.

    scale: not given, the smallest that there may be. A row of zeros, or one so small that its scale would be 0, becomes
    zeros with scale 1.

    Raises:
        ValueError: a weight is not finite.
    """
    if scale is None:
        scale = smallest_scale(weight)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    data = (weight / scale).round().clamp(-_HIGHEST - 1, _HIGHEST).to(torch.int8)
    return data, scale


def smallest_scale(weight: Tensor) -> Tensor:
    """weight [out, in] -> the scale [out, 1] by which each row just has room in int8. Raises ValueError: not finite."""
    largest = weight.abs().amax(dim=1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("weights to quantise must be finite")
    return largest / _HIGHEST


def block_linears(model: nn.Module) -> list[str]:
    """The linears that are worth quantising: all of the blocks, which are 98 % of the weights."""
    return [name for name, module in model.named_modules() if name.startswith("blocks.") and isinstance(module, Linear)]


def quantize_state_dict(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> dict[str, Tensor]:
    """A checkpoint with the weights of `modules` quantised, in the layout of the file; all else as it was.

    Raises:
        ValueError: a module has no weights here, or weights that are not finite.
    """
    wanted = {f"{module}.weight" for module in modules}
    if missing := sorted(wanted - tensors.keys()):
        raise ValueError(f"to quantise: {len(missing)} weights are missing ({', '.join(missing[:8])})")
    return {name: tensor for key in tensors for name, tensor in _quantized(key, tensors[key], key in wanted)}


def _quantized(key: str, tensor: Tensor, wanted: bool) -> Iterator[tuple[str, Tensor]]:
    if not wanted:
        yield key, tensor
        return
    module = key.removesuffix(".weight")
    data, scale = quantize_weight(tensor)
    yield module + DATA, data
    yield module + SCALE, scale
    for suffix in UNUSED:
        yield module + suffix, torch.ones((), dtype=tensor.dtype)


def write_quanto(path: Path, tensors: Mapping[str, Tensor], modules: Iterable[str], config: Mapping[str, Any]) -> None:
    """Writes a quantised checkpoint; the same input gives the same bytes.

    Args:
        path: of the safetensors file; it appears only when it is complete.
        tensors: from `quantize_state_dict`.
        modules: the quantised modules.
        config: sizes of the model, kept in the header.
    """
    quantization_map = {module: {"weights": "qint8", "activations": "none"} for module in sorted(modules)}
    metadata = {_FORMAT: "quanto", _MAP: _as_base64(quantization_map), _CONFIG: _as_base64(config)}
    # Wide dtypes first, as safetensors itself does, keeps every tensor aligned; its own writer shuffles the metadata.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in names:
        end = offset + tensors[name].nbytes
        dtype, shape = _SAFETENSORS_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    os.replace(partial, path)


def _as_base64(value: Mapping[str, Any]) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()
