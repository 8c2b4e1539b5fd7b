"""Pictures between the memory of the host and that of a GPU, through pinned memory: copies are many times as fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.pose.bilinear import Frame


class Upload:
    """Brings frames to a device. Its pinned memory is kept for the next ones: the system takes long to give it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def of(self, frames: Sequence[Frame]) -> Tensor:
        """Frames [H, W, 3] of one size -> uint8 [n, H, W, 3] on the device; what is queued there next sees them whole."""
        if self._device.type == "cpu":
            return torch.from_numpy(np.stack(frames))
        if self._copied is not None:
            self._copied.synchronize()
        shape = (len(frames), *frames[0].shape)
        size = int(np.prod(shape))
        if len(self._pinned) < size:
            self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        pinned = self._pinned[:size].view(shape)
        np.stack(frames, out=pinned.numpy())
        uploaded = pinned.to(self._device, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(self._device))
        return uploaded


class HostCopy:
    """Pictures of a GPU in pinned memory; overwritten by the next."""

    def __init__(self) -> None:
        self._pinned: Tensor | None = None

    def of(self, pictures: Tensor) -> Tensor:
        """The pictures in the memory of the host."""
        if pictures.device.type == "cpu":
            return pictures
        if self._pinned is None or self._pinned.shape != pictures.shape:
            self._pinned = torch.empty(pictures.shape, dtype=pictures.dtype, pin_memory=True)
        return self._pinned.copy_(pictures)
