"""Masks of people in the first frame -> alpha mattes in every frame of a clip, one frame at a time.

Source: pq-yang/MatAnyone e5ddc53 matanyone/inference/*, of which this is an own implementation for one purpose: no
long-term memory, no new people after the first frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from services.pose.persons.matanyone.blocks import area_resize
from services.pose.persons.matanyone.config import PropagationConfig
from services.pose.persons.matanyone.network import MULTIPLE, MatAnyone, PictureFeatures


class Memory:
    """What is kept of some frames of a clip, for all its people; the first frame stays, of the others the latest do.

    Args:
        max_frames: that are kept, the first included.
        top_k: cells that are read from for each cell of a picture.
    """

    def __init__(self, max_frames: int, top_k: int) -> None:
        self.max_frames, self.top_k = max_frames, top_k
        self._frames: list[tuple[Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._frames)

    def clear(self) -> None:
        self._frames.clear()

    def add(self, seen: PictureFeatures, values: Tensor) -> None:
        """Keeps a frame: what was seen, and the people's values [P, C, h, w]."""
        self._frames.append((seen.key[0].flatten(1), seen.shrinkage[0].flatten(1), values.flatten(2)))
        del self._frames[1 : 1 + max(0, len(self) - self.max_frames)]

    def read(self, seen: PictureFeatures) -> Tensor:
        """What those cells of memory hold that resemble each cell of a picture: [P, C, h, w].

        Source: the anisotropic L2 similarity of XMem, Cheng and Schwing 2022 (arXiv:2207.07115).
        """
        # [key_dim, N], [1, N], [P, C, N]: N cells in memory
        keys, shrinkage, values = (torch.cat(parts, dim=-1) for parts in zip(*self._frames, strict=True))
        query, selection = seen.key[0].flatten(1), seen.selection[0].flatten(1)  # [key_dim, h*w]
        distance = (keys**2).T @ selection - 2 * keys.T @ (query * selection) + (selection * query**2).sum(dim=0)
        similarity = -shrinkage.T * distance / keys.shape[0] ** 0.5  # [N, h*w]
        best, cells = similarity.topk(min(self.top_k, len(similarity)), dim=0)
        # the reference takes exponentials as they are; softmax gives the same and cannot divide by zero
        weights = torch.zeros_like(similarity).scatter_(0, cells, best.softmax(dim=0))
        return (values @ weights).reshape(*values.shape[:2], *seen.key.shape[-2:])


class Propagation:
    """One clip: carries the masks of its P people from frame to frame. All that it keeps is of a fixed size.

    Args:
        frame: the first, float [3, H, W] in [0, 1], on the network's device.
        masks: of the people in it, float [P, H, W] in [0, 1].

    Attributes:
        mattes: of the latest frame, before they are limited to [0, 1]: [P, H, W].
        seen: the latest frame's features.
        values: what the network keeps of the people in it, [P, value_dim, h, w].
        sensory: recurrent state, [P, sensory_dim, h, w].
        summaries: of the people, summed over the memorised frames, [P, num_queries, embed_dim + 1].
    """

    def __init__(self, network: MatAnyone, config: PropagationConfig, frame: Tensor, masks: Tensor) -> None:
        self._network, self._config = network, config
        self._sensory_turns = sensory_turns(config)
        self._masks = padded(masks[:, None])  # [P, 1, H, W], padded as the frames are
        self.mattes = masks
        self.seen = self._see(frame)
        self.sensory = masks.new_zeros(len(masks), network.config.sensory_dim, *self.seen.key.shape[-2:])
        self.memory = Memory(config.max_memory_frames, config.top_k)
        self.values, self.summaries = self._memorise()

    def predict_first(self) -> Tensor:
        """Replaces the masks of the first frame, and what is remembered of it, by what is predicted from them.

        Returns:
            mattes [P, H, W] in [0, 1].
        """
        mattes = self._predict(self.values, update_sensory=True)
        self.memory.clear()
        self.values, self.summaries = self._memorise()
        return mattes

    def step(self, frame: Tensor) -> Tensor:
        """The next frame, float [3, H, W] in [0, 1] -> mattes [P, H, W] in [0, 1]."""
        last_pixels, self.seen = self.seen.pixels, self._see(frame)
        self._frames_since_memory += 1
        mattes = self._predict(self._read(last_pixels), update_sensory=self._frames_since_memory in self._sensory_turns)
        if self._frames_since_memory >= self._config.memory_every:
            self.values, summaries = self._memorise()
            self.summaries = self.summaries + summaries
        else:
            self.values = self._network.remember(self.seen, self._masks)
        return mattes

    def _see(self, frame: Tensor) -> PictureFeatures:
        return self._network.see(padded(frame[None]))

    def _read(self, last_pixels: Tensor) -> Tensor:
        """What memory says of the latest frame; where nothing has changed, what was known of the last one."""
        readout = self.memory.read(self.seen)
        masks = area_resize(self._masks, readout.shape[-2:])
        change = self._network.temp_sparity(last_pixels, self.seen.pixels, masks, readout - self.values)
        return readout * change + self.values * (1 - change)

    def _predict(self, readout: Tensor, *, update_sensory: bool) -> Tensor:
        mattes, self.sensory = self._network.matte(
            self.seen, readout, self.sensory, self._masks, self.summaries, update_sensory=update_sensory
        )
        self._masks = mattes.clamp(0, 1)
        self.mattes = unpadded(mattes, self.mattes.shape[-2:])[:, 0]
        return self.mattes.clamp(0, 1)

    def _memorise(self) -> tuple[Tensor, Tensor]:
        """Adds the latest frame to memory; its values and summaries."""
        values = self._network.remember(self.seen, self._masks)
        self.sensory = self._network.mask_encoder.sensory_update.update(values, self.sensory)
        self.memory.add(self.seen, values)
        self._frames_since_memory = 0
        return values, self._network.object_summarizer(self._masks, values)


def sensory_turns(config: PropagationConfig) -> frozenset[int]:
    """How many frames after a memorised one the recurrent state is updated: evenly spread, rounded to even."""
    if config.sensory_updates >= config.memory_every:
        return frozenset(range(1, config.memory_every + 1))
    spread = torch.linspace(1, config.memory_every, config.sensory_updates, dtype=torch.float64)
    return frozenset(int(turn) for turn in spread.round())


def padded(x: Tensor) -> Tensor:
    """[B, C, H, W] with zeros around it, to multiples of MULTIPLE; of an odd number one more at the right and bottom."""
    height, width = x.shape[-2:]
    missing_y, missing_x = -height % MULTIPLE, -width % MULTIPLE
    left, top = missing_x // 2, missing_y // 2
    return functional.pad(x, (left, missing_x - left, top, missing_y - top))


def unpadded(x: Tensor, size: Sequence[int]) -> Tensor:
    """Undoes `padded`: [B, C, ...] -> [B, C, *size]."""
    height, width = size
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]
