"""Text and image encoder within a number of bytes on a GPU: layers that do not fit stay in host memory and are streamed.

UMT5-XXL is 11 GB in bfloat16 and computes a prompt in milliseconds: streamed, the copy is what takes time, 0.2 s on a
link of 50 GB/s. The table of tokens (2 GB, of which a prompt needs 512 rows) is read in host memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.budget import DoesNotFit
from runtime.streaming import PLACES, into_host_memory, stream_blocks, with_hooks
from runtime.vram import cap_memory
from services.encoder.image import ImageModel
from services.encoder.text import TextEncoderConfig, TextModel

GIB = 1024**3
# The driver's own: the CUDA context and loaded kernels
DEVICE_OVERHEAD_BYTES = 800 * 1024**2
# The allocator's besides what is counted: the workspace of cuBLAS (32 MiB) and gaps between tensors
_GAPS_BYTES = 128 * 1024**2


@dataclass(frozen=True)
class Weights:
    """Bytes of loaded encoders, as the device would hold them."""

    text_layer: int
    text_layers: int  # how many
    table: int  # of tokens
    image_layer: int  # 0 without an image encoder
    image_layers: int
    rest: int  # always on the device


@dataclass(frozen=True)
class EncoderPlan:
    """Which layers stay on the device, and what that takes in bytes."""

    text_resident: int  # layers
    is_whole: bool  # everything stays
    device_bytes: int  # the peak, the driver's own included
    host_bytes: int  # pinned, and the table
    streamed_bytes: int  # host to device for each prompt

    def __str__(self) -> str:
        if self.is_whole:
            return f"all on the device, {self.device_bytes / GIB:.2f} GiB"
        return (
            f"{self.text_resident} layers of the text encoder on the device, "
            f"{self.streamed_bytes / GIB:.1f} GiB streamed for each prompt, {self.device_bytes / GIB:.2f} GiB"
        )


def plan_encoders(weights: Weights, config: TextEncoderConfig, budget: int) -> EncoderPlan:
    """The plan with the most on the device that keeps within `budget` bytes, by the driver's count.

    Raises:
        DoesNotFit: even with all layers streamed.
    """
    whole, needed = whole_bytes(weights, config), least_bytes(weights, config)
    if whole <= budget:
        return EncoderPlan(weights.text_layers, True, whole, 0, 0)
    if needed > budget:
        raise DoesNotFit(
            f"the encoders need {needed / GIB:.2f} GiB with every layer streamed; the budget is {budget / GIB:.2f} GiB"
        )
    resident = min((budget - needed) // weights.text_layer, max(0, weights.text_layers - PLACES))
    streamed = (weights.text_layers - resident) * weights.text_layer
    host = streamed + weights.image_layers * weights.image_layer + weights.table
    return EncoderPlan(resident, False, needed + resident * weights.text_layer, host, streamed)


def whole_bytes(weights: Weights, config: TextEncoderConfig) -> int:
    """With everything on the device."""
    text, image = weights.text_layers * weights.text_layer, weights.image_layers * weights.image_layer
    return _beside_layers(weights, config) + text + weights.table + image


def least_bytes(weights: Weights, config: TextEncoderConfig) -> int:
    """The smallest budget that there is a plan for: every layer streamed."""
    places = PLACES * weights.image_layer + min(PLACES, weights.text_layers) * weights.text_layer
    return _beside_layers(weights, config) + places


def _beside_layers(weights: Weights, config: TextEncoderConfig) -> int:
    return weights.rest + activations(config) + DEVICE_OVERHEAD_BYTES + _GAPS_BYTES


def activations(config: TextEncoderConfig) -> int:
    """Bytes of the longest prompt on its way through a layer: scores of all heads in bfloat16 and, for their softmax,
    float32; the table of positions; the hidden twice and a few rows of the width, at most in float32.
    """
    scores = config.num_heads * config.text_len**2 * (2 * 2 + 2 * 4 + 2)
    return scores + config.text_len * 4 * (8 * config.dim + 4 * config.dim_ffn)


def weights_of(text: TextModel, image: ImageModel | None) -> Weights:
    """Bytes of the encoders' parts, wherever they are; on the meta device too."""
    text_layers, image_layers = list(text.stack.block), [] if image is None else _layers(image)
    table = _size([text.stack.embed_tokens])
    everything = _size([text]) + (0 if image is None else _size([image]))
    return Weights(
        text_layer=max(_size([layer]) for layer in text_layers),
        text_layers=len(text_layers),
        table=table,
        image_layer=max((_size([layer]) for layer in image_layers), default=0),
        image_layers=len(image_layers),
        rest=everything - table - _size(text_layers) - _size(image_layers),
    )


def place_encoders(
    text: TextModel,
    image: ImageModel | None,
    config: TextEncoderConfig,
    device: torch.device,
    budget: int,
    folder: Path | None = None,
) -> EncoderPlan:
    """Puts encoders whose weights are in host memory where they compute, and holds the allocator to the budget.

    folder: for the files that streamed layers wait in; None: in host memory.

    Raises:
        DoesNotFit: no plan is within the budget; the encoders are as they were then.
    """
    plan = plan_encoders(weights_of(text, image), config, budget)
    cap_memory(device, budget, DEVICE_OVERHEAD_BYTES)
    if plan.is_whole:
        for model in (text, image) if image is not None else (text,):
            model.to(device)
        return plan
    layers = list(text.stack.block)
    staying = {index * len(layers) // plan.text_resident for index in range(plan.text_resident)}
    for index in staying:
        layers[index].to(device)
    _stream([layer for index, layer in enumerate(layers) if index not in staying], device, folder)
    _look_up_in_host_memory(text.stack.embed_tokens, device)
    text.stack.final_layer_norm.to(device)
    if image is not None:
        _stream(_layers(image), device, folder)
        for part in _outside_of_layers(image):
            part.to(device)
    return plan


def _stream(layers: Sequence[nn.Module], device: torch.device, folder: Path | None) -> None:
    stream_blocks([(layer, into_host_memory(layer, device, folder)) for layer in layers], device)


def _look_up_in_host_memory(table: nn.Module, device: torch.device) -> None:
    """The table stays where it is, and its rows come to the device."""

    def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(argument.to("cpu") for argument in arguments)

    def after(module: nn.Module, arguments: Any, rows: Tensor) -> Tensor:
        return rows.to(device)

    with_hooks(table, before, after)


def _layers(image: ImageModel) -> list[nn.Module]:
    return list(image.clip.encoder.layers)


def _outside_of_layers(image: ImageModel) -> list[nn.Module]:
    return [part for part in image.clip.children() if part is not image.clip.encoder]


def _size(modules: Iterable[nn.Module]) -> int:
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    return sum(tensor.nbytes for tensor in tensors)
