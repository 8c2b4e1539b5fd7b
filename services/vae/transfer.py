"""Results of a device, brought to host memory while the next ones are computed."""

from __future__ import annotations

import torch
from torch import Tensor


class OneBehind:
    """Holds the last results that were given to it until the next come; on a CPU it holds none."""

    def __init__(self) -> None:
        self._held: tuple[tuple[Tensor, ...], torch.cuda.Event] | None = None

    def add(self, *results: Tensor) -> list[tuple[Tensor, ...]]:
        """Begins to copy results, and gives those of the call before: none or one of as many tensors, in host memory.

        Call it when the work that makes `results` is queued; the device has then enough to do until it is called again.
        """
        if not results[0].is_cuda:
            return [results]
        copies = tuple(torch.empty_like(result, device="cpu", pin_memory=True) for result in results)
        for copy, result in zip(copies, results, strict=True):
            copy.copy_(result, non_blocking=True)
        finished = torch.cuda.current_stream(results[0].device).record_event()
        before, self._held = self.rest(), (copies, finished)
        return before

    def rest(self) -> list[tuple[Tensor, ...]]:
        """What is still held."""
        held, self._held = self._held, None
        if held is None:
            return []
        copies, finished = held
        finished.synchronize()
        return [copies]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, by way of pinned memory, so that the device need not have finished what it does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
