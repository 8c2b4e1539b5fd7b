"""Checkpoint files -> a module that was built on the meta device.

Files are memory-mapped and their tensors become the module's parameters without a second copy in RAM. A name that is
missing, unknown or of another shape is an error that lists all of them before anything is assigned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
_SHOWN_NAMES = 8


class CheckpointMismatch(Exception):
    """A checkpoint does not fit the module it was meant for; the message lists the names."""


def read_checkpoint(files: Sequence[Path]) -> dict[str, Tensor]:
    """Reads one or more files of a component as one mapping of names to memory-mapped CPU tensors.

    Args:
        files: `.safetensors`, `.safetensors.index.json` (its shards are found beside it) or `.pth` / `.pt`
            (loaded with weights_only: no pickled code is run).

    Raises:
        CheckpointMismatch: a name stands in two files, or a file has an unknown ending.
        FileNotFoundError: a file, or a shard that an index names, is not there.
    """
    tensors: dict[str, Tensor] = {}
    for path in _shards(files):
        for name, tensor in _read_file(path).items():
            if name in tensors:
                raise CheckpointMismatch(f"{path.name}: {name} is already in another file of the same component")
            tensors[name] = tensor
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file's header, empty where there is none."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def build_on_meta(build: Callable[[], Module]) -> Module:
    """Builds a module without memory for its weights; every parameter is on the meta device until it is loaded."""
    with torch.device("meta"):
        return build()


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Makes `tensors` the parameters and buffers of `module`, without copying and without changing their dtype.

    Args:
        module: any module, usually from `build_on_meta`.
        tensors: names of this module (after mapping from those of the checkpoint) to tensors.
        source: what to call the checkpoint in an error.

    Raises:
        CheckpointMismatch: the names or shapes differ from the module's.
    """
    problems = mismatches(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if problems:
        raise CheckpointMismatch(f"{source} does not fit {type(module).__name__}: " + "; ".join(problems))
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    module.requires_grad_(False)


def mismatches(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What a checkpoint of these names and shapes lacks, has too much or has in another shape; empty when it fits."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = sorted(expected.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & shapes.keys() if expected[name] != tuple(shapes[name]))
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unknown:
        problems.append(f"{len(unknown)} unknown ({_some(unknown)})")
    if reshaped:
        texts = [f"{name} {list(shapes[name])} instead of {list(expected[name])}" for name in reshaped]
        problems.append(f"{len(reshaped)} of another shape ({_some(texts)})")
    return problems


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown}, and {len(names) - _SHOWN_NAMES} more"


def _shards(files: Sequence[Path]) -> list[Path]:
    shards: list[Path] = []
    for path in files:
        if path.name.endswith(".safetensors.index.json"):
            index = json.loads(path.read_text(encoding="utf-8"))
            shards += [path.parent / name for name in sorted(set(index["weight_map"].values()))]
        else:
            shards.append(path)
    return shards


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"checkpoint file {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping: keys() is its only listing)
        except SafetensorError as error:  # which does not say of what file
            raise CheckpointMismatch(f"{path.name} is no whole safetensors file: {error}") from error
    if path.suffix in (".pth", ".pt"):
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointMismatch(f"{path.name} is not a plain mapping of names to tensors")
        return loaded
    raise CheckpointMismatch(f"{path.name}: a checkpoint ends in .safetensors, .safetensors.index.json, .pth or .pt")
