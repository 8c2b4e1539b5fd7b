"""Parameters of B things at once: tensors, or further parameters, with one row of each for every thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batched:
    """Base of frozen dataclasses whose fields are tensors [B, ...] or of this kind themselves."""

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def pick(self, indices: Sequence[int] | Tensor) -> Self:
        """These of the things, in this order."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{n: part.pick(indices) if isinstance(part, Batched) else part[indices] for n, part in parts.items()}
        )
