"""Inventories of the real checkpoint files: every name and shape must map onto our modules at full size.

A manifest `FILE.json.gz` holds `tensors`: a list of [name, shape, dtype]. Nothing is allocated: modules stand on the
meta device and only names and shapes are compared.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# names and shapes of a checkpoint -> what does not fit, empty when everything maps
Mapper = Callable[[dict[str, tuple[int, ...]]], list[str]]
_MAPPERS: dict[str, Mapper] = {}


def manifest(*names: str) -> Callable[[Mapper], Mapper]:
    """Registers how the inventories of these names (file name without `.json.gz`) are mapped."""

    def register(mapper: Mapper) -> Mapper:
        _MAPPERS.update(dict.fromkeys(names, mapper))
        return mapper

    return register


@dataclass(frozen=True)
class Manifest:
    name: str
    path: Path

    @cached_property
    def content(self) -> dict[str, Any]:
        with gzip.open(self.path, "rt", encoding="utf-8") as file:
            return json.load(file)

    @property
    def count(self) -> int:
        return len(self.content["tensors"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows: Sequence[tuple[str, list[int], str]] = self.content["tensors"]
        return {name: tuple(shape) for name, shape, _ in rows}

    def problems(self) -> list[str]:
        """What is missing, unknown or of another shape; one entry if this file is not known at all."""
        mapper = _MAPPERS.get(self.name)
        if mapper is None:
            return ["no module here takes this file"]
        return mapper(self.shapes)


def manifests(directory: Path) -> Iterator[Manifest]:
    """The inventories of a directory, by name."""
    for path in sorted(directory.glob("*.json.gz")):
        yield Manifest(path.name.removesuffix(".json.gz"), path)
