"""Steps that take over what the blocks did at an earlier step: TeaCache and MagCache.

What all blocks together add to the tokens (the residual, [B, L, D]) changes little between neighbouring steps. A step
either computes it, or takes the one of the last step that did; patch embedding and head are computed at every step.
Which steps compute is known before the first one: both methods watch the schedule of timesteps, never the content.

The residual itself is 0.5 GB per guidance branch at 48,832 tokens and no part of a checkpoint: the latents of the step
that it was computed at are, and it is computed once more from them.

Source: Liu et al. 2024 (arXiv:2411.19108) and Ma et al. 2025 (arXiv:2506.09045), with the constants and the choice of
the threshold of deepbeepmeep/Wan2GP 8681e9f. The constants were fitted to Wan 2.1 I2V 14B, none to SCAIL.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.denoiser.model import Context, DiffusionTransformer, TimeEmbedding
from services.denoiser.rope import Rope

TEA, MAG = "tea", "mag"
STEP_CACHES = (TEA, MAG)
DEFAULT_SPEEDUP = 1.75
RESIDUAL_DTYPE = torch.bfloat16  # takes 8 bits of what is reused with errors of percents, and half the memory

_LARGE_PIXELS = 1280 * 720  # constants are for frames below, and from this size on
_THRESHOLDS = [hundredths / 100 for hundredths in range(1, 61)]
_MOST_REUSED = 2  # steps in a row, of MagCache

# Relative change of the time embedding -> estimated change of the output; highest power first
_TEA_POLYNOMIALS = (
    (-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289),
    (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
)

# Size of the residual relative to that of the step before, of 40 steps; positive and negative branch in turn
# fmt: off
_MAG_RATIOS = (
    (
        1.0, 1.0,
        0.98783, 0.98993, 0.97559, 0.97593, 0.98311, 0.98319, 0.98202, 0.98225, 0.9888, 0.98878, 0.98762, 0.98759,
        0.98957, 0.98971, 0.99052, 0.99043, 0.99383, 0.99384, 0.98857, 0.9886, 0.99065, 0.99068, 0.98845, 0.98847,
        0.99057, 0.99057, 0.98957, 0.98961, 0.98601, 0.9861, 0.98823, 0.98823, 0.98756, 0.98759, 0.98808, 0.98814,
        0.98721, 0.98724, 0.98571, 0.98572, 0.98543, 0.98544, 0.98157, 0.98165, 0.98411, 0.98413, 0.97952, 0.97953,
        0.98149, 0.9815, 0.9774, 0.97742, 0.97825, 0.97826, 0.97355, 0.97361, 0.97085, 0.97087, 0.97056, 0.97055,
        0.96588, 0.96587, 0.96113, 0.96124, 0.9567, 0.95681, 0.94961, 0.94969, 0.93973, 0.93988, 0.93217, 0.93224,
        0.91878, 0.91896, 0.90955, 0.90954, 0.92617, 0.92616,
    ),
    (
        1.0, 1.0,
        0.99428, 0.99498, 0.98588, 0.98621, 0.98273, 0.98281, 0.99018, 0.99023, 0.98911, 0.98917, 0.98646, 0.98652,
        0.99454, 0.99456, 0.9891, 0.98909, 0.99124, 0.99127, 0.99102, 0.99103, 0.99215, 0.99212, 0.99515, 0.99515,
        0.99576, 0.99572, 0.99068, 0.99072, 0.99097, 0.99097, 0.99166, 0.99169, 0.99041, 0.99042, 0.99201, 0.99198,
        0.99101, 0.99101, 0.98599, 0.98603, 0.98845, 0.98844, 0.98848, 0.98851, 0.98862, 0.98857, 0.98718, 0.98719,
        0.98497, 0.98497, 0.98264, 0.98263, 0.98389, 0.98393, 0.97938, 0.9794, 0.97535, 0.97536, 0.97498, 0.97499,
        0.973, 0.97301, 0.96827, 0.96828, 0.96261, 0.96263, 0.95335, 0.9534, 0.94649, 0.94655, 0.93397, 0.93414,
        0.91636, 0.9165, 0.89088, 0.89109, 0.8679, 0.86768,
    ),
)
# fmt: on


@dataclass(frozen=True)
class StepCache:
    """What is asked of a step cache.

    Attributes:
        method: of `STEP_CACHES`.
        speedup: the number of steps over the number that is to be computed, at least 1.
        start: part of the steps, from the first, that is computed in any case; 0 to 1.
    """

    method: str
    speedup: float = DEFAULT_SPEEDUP
    start: float = 0.0

    def first_steps(self, num_inference_steps: int) -> int:
        """Steps that are computed in any case, from the first; at least that one."""
        return int(self.start * num_inference_steps) + 1


def tea_changes(embeddings: Tensor, pixels: int) -> list[float]:
    """How much TeaCache expects the output to change from the step before to each step; 0 at the first.

    Args:
        embeddings: [num_inference_steps, D], the time embedding of each step.
        pixels: of a frame of the video.
    """
    polynomial = np.poly1d(_TEA_POLYNOMIALS[pixels >= _LARGE_PIXELS])
    change = (embeddings[1:] - embeddings[:-1]).abs().mean(dim=1) / embeddings[:-1].abs().mean(dim=1)
    return [0.0, *np.abs(polynomial(change.double().cpu().numpy())).tolist()]


def mag_ratios(num_inference_steps: int, pixels: int) -> npt.NDArray[np.float64]:
    """MagCache's ratios [num_inference_steps, 2], positive and negative branch: the nearest of the 40 steps' for each."""
    ratios = np.array(_MAG_RATIOS[pixels >= _LARGE_PIXELS]).reshape(-1, 2)
    if num_inference_steps == 1:
        return ratios[-1:]
    nearest = np.arange(num_inference_steps) * ((len(ratios) - 1) / (num_inference_steps - 1))
    return ratios[np.round(nearest).astype(int)]


def tea_steps(changes: Sequence[float], always: Collection[int], threshold: float) -> list[bool]:
    """Whether each step is computed: where the changes since the last one that was add up to `threshold`."""
    computed, changed = [], 0.0
    for step, change in enumerate(changes):
        changed += change
        computed.append(step in always or changed >= threshold)
        if computed[-1]:
            changed = 0.0
    return computed


def mag_steps(ratios: npt.NDArray[np.float64], always: Collection[int], threshold: float) -> list[bool]:
    """Whether each step is computed: where the error of a reused residual would add up to more than `threshold`.

    The error of a step is how far the residual's size is expected to be from that of the one reused. Each branch is
    watched, and both are computed as soon as one has to be: guidance multiplies what they differ by.

    Args:
        ratios: [num_inference_steps, branches].
        always: steps that are computed in any case.
        threshold: of the error.
    """
    computed: list[bool] = []
    size, error, reused = np.ones(ratios.shape[1]), np.zeros(ratios.shape[1]), 0
    for step, ratio in enumerate(ratios):
        size = size * ratio
        error = error + np.abs(1 - size)
        reused += 1
        computed.append(step in always or bool((error > threshold).any()) or reused > _MOST_REUSED)
        if computed[-1]:
            size, error, reused = np.ones(ratios.shape[1]), np.zeros(ratios.shape[1]), 0
    return computed


def nearest_to(target: int, steps_at: Callable[[float], list[bool]]) -> list[bool]:
    """Of what thresholds 0.01, 0.02 to 0.60 give, the steps whose number is nearest to `target`; the lowest of several."""
    return min((steps_at(threshold) for threshold in _THRESHOLDS), key=lambda steps: abs(target - sum(steps)))


def computed_steps(
    cache: StepCache, embeddings: Tensor, pixels: int, *, guided: bool, fresh: Collection[int], silent: int = 0
) -> list[bool]:
    """Whether the blocks run at each step of a run; if not, their residual is that of the last step at which they did.

    Args:
        cache: what is asked for.
        embeddings: [num_inference_steps, D], the time embedding of each step.
        pixels: of a frame of the video.
        guided: whether there are two branches.
        fresh: steps that may find no residual to reuse: guidance begins or ends there, or another expert takes over.
        silent: steps, from the first, at which the model is not asked at all.

    Raises:
        ValueError: there is no such method.
    """
    if cache.method not in STEP_CACHES:
        raise ValueError(f"step_cache must be one of {', '.join(STEP_CACHES)}, got {cache.method}")
    steps = len(embeddings)
    always = {*fresh, *range(silent, silent + cache.first_steps(steps - silent))}
    target = int((steps - silent) / cache.speedup)
    if cache.method == TEA:
        changes, always = tea_changes(embeddings, pixels), {*always, steps - 1}
        found = nearest_to(target, lambda threshold: tea_steps(changes, always, threshold)[silent:])
    else:
        ratios = mag_ratios(steps, pixels)[:, : 1 + guided]
        found = nearest_to(target, lambda threshold: mag_steps(ratios, always, threshold)[silent:])
    return [False] * silent + found


@dataclass(frozen=True)
class ModelInputs:
    """What the model is given at a step, whichever the branch. Shapes: DiffusionTransformer.forward."""

    latents: Tensor
    timesteps: Tensor
    rope: Rope
    pose_latents: Tensor | None


class Residuals:
    """What the blocks have added to the tokens when they ran last, by guidance branch."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._kept)

    def compute(self, branch: str, model: DiffusionTransformer, inputs: ModelInputs, context: Context) -> Tensor:
        """The model's velocity [B, out_dim, T, h, w]; keeps the residual."""
        self._kept.pop(branch, None)  # the blocks may need the room
        tokens, time, rope = _embedded(model, inputs)
        for block in model.blocks:
            tokens = block(tokens, time, context, rope)
        # embedded once more: a copy would take room while the blocks run, and they may write into what they are given
        before, _, _ = _embedded(model, inputs)
        self._kept[branch] = before.neg_().add_(tokens).to(RESIDUAL_DTYPE)
        del before
        return model.predict(tokens, time, inputs.latents.shape[2:])

    def reuse(self, branch: str, model: DiffusionTransformer, inputs: ModelInputs) -> Tensor:
        """The velocity with the residual that was kept in place of the blocks."""
        tokens, time, _ = _embedded(model, inputs)
        return model.predict(tokens.add_(self._kept[branch]), time, inputs.latents.shape[2:])


def _embedded(model: DiffusionTransformer, inputs: ModelInputs) -> tuple[Tensor, TimeEmbedding, Rope]:
    """This process's tokens before the first block, and their tables."""
    time = model.embed_timestep(inputs.timesteps, inputs.latents.device)
    return model.team.own(model.embed_tokens(inputs.latents, inputs.pose_latents), time, inputs.rope)
