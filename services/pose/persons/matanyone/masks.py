"""The `matanyone` back-end: Segment Anything for the first frame, MatAnyone for the rest. Soft masks.

NON-COMMERCIAL USE ONLY: MatAnyone's code and weights are under the NTU S-Lab License 1.0, which permits redistribution
and use for non-commercial purposes only. The default back-end, `sam2`, is under Apache-2.0. See docs/licences.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from services.pose.persons.masks import PersonPrompt
from services.pose.persons.matanyone.config import PropagationConfig
from services.pose.persons.matanyone.network import MatAnyone
from services.pose.persons.matanyone.propagation import Propagation
from services.pose.persons.sam import Segmenter


class MatAnyoneMasks:
    """Alpha mattes of people; implements `PersonMasks`. Whoever moves the modules decides where they compute."""

    def __init__(self, segmenter: Segmenter, network: MatAnyone, config: PropagationConfig | None = None) -> None:
        self.segmenter, self.network, self.config = segmenter, network, config or PropagationConfig()

    @torch.inference_mode()
    def begin(self, first_frame: Tensor, prompts: Sequence[PersonPrompt]) -> MatAnyoneClip:
        masks = self.segmenter.segment(first_frame, prompts).to(self.network.device, torch.float32)
        return MatAnyoneClip(self.network, self.config, first_frame, masks)


class MatAnyoneClip:
    """One clip; implements `ClipMasks`.

    Args:
        masks: of the first frame, float32 [people, H, W].
    """

    def __init__(self, network: MatAnyone, config: PropagationConfig, first_frame: Tensor, masks: Tensor) -> None:
        self._device = network.device
        self._propagation = Propagation(network, config, self._picture(first_frame), masks)
        for _ in range(1 + config.num_warmup):
            self.first = self._propagation.predict_first()

    @torch.inference_mode()
    def follow(self, frame: Tensor) -> Tensor:
        return self._propagation.step(self._picture(frame))

    def _picture(self, frame: Tensor) -> Tensor:
        """uint8 [H, W, 3] -> float32 [3, H, W] in [0, 1], on the network's device."""
        return frame.to(self._device).permute(2, 0, 1) / 255
