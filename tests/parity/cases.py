"""Numeric cases ("goldens"): read from a directory, weights and inputs made from their names.

A case NAME is `NAME.json` (configuration, list of weights, inputs, tolerance) beside `NAME.safetensors`
(`in.*` stored inputs, `out.*` expected outputs). The format and the recipe are described in `tests/goldens/README.md`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

CPU = torch.device("cpu")


def normals(name: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 numbers that depend on `name` alone."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def recipe_weight(name: str, shape: Sequence[int]) -> Tensor:
    """The weight that every case uses for a tensor of this official name, float32 (int64 for batch counters)."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    values = normals(name, shape)
    if name.endswith("running_var"):
        values = np.float32(1) + np.float32(0.1) * np.abs(values)
    elif name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
        values = np.float32(1) + np.float32(0.1) * values
    elif len(shape) <= 1:
        values = np.float32(0.1) * values
    else:
        values = values * np.float32(float(np.prod(shape[1:], dtype=np.float64)) ** -0.5)
    return torch.from_numpy(np.asarray(values))


@dataclass(frozen=True)
class Case:
    """One case, read lazily; `device` is where its inputs and weights are given."""

    name: str
    directory: Path
    device: torch.device = CPU

    @cached_property
    def spec(self) -> dict[str, Any]:
        with (self.directory / f"{self.name}.json").open(encoding="utf-8") as file:
            return json.load(file)

    @cached_property
    def stored(self) -> Mapping[str, Tensor]:
        path = self.directory / f"{self.name}.safetensors"
        return load_file(path) if path.exists() else {}

    @property
    def config(self) -> dict[str, Any]:
        return self.spec["config"]

    @property
    def call(self) -> dict[str, Any]:
        return self.spec.get("call", {})

    @property
    def tolerance(self) -> Any:
        return self.spec["tolerance"]

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The case's weights under their official names; `prefix` goes into the recipe name only."""
        return {name: recipe_weight(prefix + name, shape).to(self.device) for name, shape in self.spec["weights"]}

    def input(self, name: str) -> Tensor:
        """A stored input, or the one made from its name (raw normals, or the transform that the case states)."""
        return self._made(name).to(self.device)

    def _made(self, name: str) -> Tensor:
        if f"in.{name}" in self.stored:
            return self.stored[f"in.{name}"]
        described = self.spec["inputs"][name]
        if isinstance(described, list):
            return torch.from_numpy(normals(f"input:{name}", described))
        if isinstance(described, dict) and described["transform"].startswith("tanh of"):
            return torch.from_numpy(np.tanh(normals(f"input:{name}", described["shape"])))
        raise ValueError(
            f"{self.name}: input {name} is neither stored nor made by a transform known here: {described!r}"
        )

    def expected(self, name: str) -> Tensor:
        return self.stored[f"out.{name}"]

    def expected_names(self, prefix: str = "") -> list[str]:
        return sorted(name.removeprefix("out.") for name in self.stored if name.startswith(f"out.{prefix}"))


@dataclass(frozen=True)
class Comparison:
    """One output beside its expected value; passes when |actual - expected| <= atol + rtol * |expected| everywhere."""

    name: str
    actual: Any
    expected: Any
    atol: float = 0.0
    rtol: float = 0.0

    @classmethod
    def within(cls, name: str, actual: Tensor, expected: Tensor, tolerance: Mapping[str, float]) -> Comparison:
        return cls(name, actual, expected, tolerance["atol"], tolerance.get("rtol", 0.0))

    def verdict(self) -> tuple[bool, str]:
        """Whether it passes, and a short text: the largest difference, or what is wrong."""
        if not isinstance(self.expected, Tensor):
            return (
                self.actual == self.expected,
                "equal" if self.actual == self.expected else f"{self.actual!r} != {self.expected!r}",
            )
        if tuple(self.actual.shape) != tuple(self.expected.shape):
            return False, f"shape {tuple(self.actual.shape)} != {tuple(self.expected.shape)}"
        actual, expected = self.actual.detach().cpu().double(), self.expected.cpu().double()
        if actual.numel() == 0:
            return False, "nothing to compare"
        difference = (actual - expected).abs()
        limit = self.atol + self.rtol * expected.abs()
        # written so that a NaN fails
        passed = bool((difference <= limit).all())
        return passed, f"{difference.max():.1e} of {limit.max():.1e}"


def cases(directory: Path) -> Iterable[Case]:
    """The cases of a directory, by name. A JSON file without a `checks` entry is not a case."""
    for path in sorted(directory.glob("*.json")):
        case = Case(path.stem, directory)
        if "checks" in case.spec:
            yield case
