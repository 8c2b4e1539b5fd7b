"""Weights for a diffusion transformer whose activations have the outliers that trained ones have.

Random weights alone flatter 8-bit arithmetic: every channel is as large as any other. In trained transformers a few
channels are tens of times larger than the rest, always the same ones (Dettmers et al. 2022, arXiv:2208.07339; Sun et al.
2024, arXiv:2402.17762). They are put into the weights here, where trained models have them:

- the residual stream: four channels hold 30 times what the others do, from the biases of the patch embeddings;
- what the linears of a block are given: eight channels are 25 times larger, by norm3's gain and by the modulation's scale;
- the FFN's hidden: 21 channels are 25 times larger, by their rows of the first linear;
- values: eight channels are 10 times larger, and all have a mean that is not zero; keys: every 64th channel is 5 times
  larger, by the norm's gain, which together with that of the queries makes attention look at some tokens, not at all;
- the weights' own columns differ in size (by a factor of 1.5, a standard deviation), so rows have heavy tails.

Every other size is chosen so that a pass neither explodes nor dies out: linears keep the mean square of what they are
given, gates are 0.3, the cross-attention's output is small, as a prompt changes a velocity by some tenths of it.
What came of all this is measured, not believed: `kurtosis` and `peak` of the activations are printed by
`benchmarks.accuracy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from runtime.weights import build_on_meta
from services.denoiser.model import DiffusionTransformer, Linear, TransformerConfig

RESIDUAL_CHANNELS, RESIDUAL_FACTOR = 4, 30.0
INPUT_CHANNELS, INPUT_FACTOR = 8, 25.0
HIDDEN_CHANNELS, HIDDEN_FACTOR = 21, 25.0
VALUE_CHANNELS, VALUE_FACTOR, VALUE_MEAN = 8, 10.0, 0.5
KEY_EVERY, KEY_FACTOR, SHARPNESS = 64, 5.0, 1.5
SPREAD = 0.4  # of the logarithm of a column's size
GATE, MODULATION = 0.3, 0.1
PROMPT = 0.15  # of the cross-attention's output
_GELU_SQUARE, _SILU_SQUARE = 0.43, 0.36  # means of the squares of what normal numbers become


def outlier_model(config: TransformerConfig, device: torch.device, seed: int = 0) -> DiffusionTransformer:
    """The transformer with such weights, as a loaded checkpoint is: linears in bfloat16, everything else float32."""
    model = build_on_meta(lambda: DiffusionTransformer(config))
    draw = _Draw(config, device, seed)
    computing = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        of_linear = name.rpartition(".")[0] in computing
        tensors[name] = draw.tensor(name, tensor.shape).to(torch.bfloat16 if of_linear else torch.float32)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


class _Draw:
    """Draws the tensors of a checkpoint by their names, in the order in which they are asked for."""

    def __init__(self, config: TransformerConfig, device: torch.device, seed: int) -> None:
        self._config, self._device = config, device
        self._generator = torch.Generator(device).manual_seed(seed)
        channels = torch.randperm(config.dim, generator=torch.Generator().manual_seed(seed))
        self._residual = channels[:RESIDUAL_CHANNELS].to(device)
        self._input = channels[RESIDUAL_CHANNELS:][:INPUT_CHANNELS].to(device)
        self._inputs_square = config.dim + INPUT_CHANNELS * (INPUT_FACTOR**2 - 1)
        self._makers: Mapping[str, Callable[[torch.Size], Tensor]] = {
            "modulation": self._modulation,
            "norm3.weight": partial(self._gain, self._input, INPUT_FACTOR),
            "self_attn.v.weight": self._values,
            "norm_q.weight": partial(self._gain, None, SHARPNESS),
            "norm_k.weight": self._keys,
            "norm_k_img.weight": self._keys,
            "self_attn.v.bias": partial(self._normal, VALUE_MEAN),
            "cross_attn.o.weight": lambda shape: PROMPT * self._weight(config.dim, shape),
            "ffn.0.weight": self._hidden,
            "ffn.2.weight": partial(self._weight, self._hidden_square),
            "patch_embedding.bias": self._stream,
            "time_projection.1.weight": lambda shape: MODULATION * self._weight(_SILU_SQUARE * config.dim, shape),
        }

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """float32."""
        for ending, make in self._makers.items():
            # the head has a modulation too, of two rows, and no outliers
            if name.endswith(ending) and not name.startswith("head."):
                return make(shape)
        if len(shape) == 1:
            return self._gain(None, 1.0, shape) if name.endswith("weight") else self._normal(0.02, shape)
        if name.endswith("modulation"):
            return self._normal(MODULATION, shape)
        return self._weight(math.prod(shape[1:]), shape)

    @property
    def _hidden_square(self) -> float:
        few = min(HIDDEN_CHANNELS, self._config.ffn_dim // 8)
        return _GELU_SQUARE * self._config.ffn_dim + few * HIDDEN_FACTOR**2 / 2

    def _normal(self, size: float, shape: torch.Size) -> Tensor:
        return size * torch.randn(shape, generator=self._generator, device=self._device)

    def _weight(self, square: float, shape: torch.Size) -> Tensor:
        """A linear's, for inputs whose squares add up to `square`."""
        columns = self._normal(SPREAD, shape[1:2]).sub_(SPREAD**2).exp_()  # mean square of 1
        return self._normal(square**-0.5, shape).mul_(columns.view(-1, *[1] * (len(shape) - 2)))

    def _gain(self, channels: Tensor | None, factor: float, shape: torch.Size) -> Tensor:
        """About 1, and `factor` in some channels (None: in all)."""
        gain = 1 + self._normal(0.1, shape)
        gain[... if channels is None else channels] *= factor
        return gain

    def _keys(self, shape: torch.Size) -> Tensor:
        gain = self._gain(None, SHARPNESS, shape)
        gain[::KEY_EVERY] *= KEY_FACTOR
        return gain

    def _values(self, shape: torch.Size) -> Tensor:
        weight = self._weight(self._inputs_square, shape)
        weight[self._few(shape[0], VALUE_CHANNELS)] *= VALUE_FACTOR
        return weight

    def _hidden(self, shape: torch.Size) -> Tensor:
        weight = self._weight(self._inputs_square, shape)
        weight[self._few(shape[0], min(HIDDEN_CHANNELS, shape[0] // 8))] *= HIDDEN_FACTOR
        return weight

    def _few(self, of: int, count: int) -> Tensor:
        return torch.randperm(of, generator=self._generator, device=self._device)[:count]

    def _stream(self, shape: torch.Size) -> Tensor:
        bias = self._normal(0.1, shape)
        bias[self._residual] = RESIDUAL_FACTOR * self._normal(1, self._residual.shape).sign()
        return bias

    def _modulation(self, shape: torch.Size) -> Tensor:
        """Rows: shift, scale and gate of self-attention, then of the FFN."""
        table = self._normal(MODULATION, shape)
        table[:, 2::3] += GATE
        for row in (1, 4):
            table[:, row, self._input] += INPUT_FACTOR - 1
        return table


class Moments:
    """Sums of the powers of activations, over any number of tensors."""

    def __init__(self) -> None:
        self._count, self._square, self._fourth, self._largest = 0, 0.0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        values = values.float()
        self._count += values.numel()
        self._square += float(values.square().sum())
        self._fourth += float(values.square().square().sum())
        self._largest = max(self._largest, float(values.abs().max()))

    def row(self) -> Mapping[str, float]:
        """Kurtosis (3 for normal numbers) and the largest number over the root mean square."""
        mean_square = self._square / self._count
        return {"kurtosis": self._fourth / self._count / mean_square**2, "peak": self._largest / mean_square**0.5}
