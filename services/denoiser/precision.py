"""How exactly the blocks compute: a preset chosen when the stage starts, applied to a loaded model from outside.

`exact`: weights as the file has them, dequantised, in the compute dtype; norms in float32.
`balanced`: int8 matrix products and fused glue; everything else as it was.
`fast`: besides, self-attention in 8-bit floats. Figures: docs/figures.md.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

import torch

from runtime.kernels import can_compile
from services.denoiser.attention import AUTO, SAGE, Attention
from services.denoiser.fp8_attention import Fp8Attention
from services.denoiser.glue import Glue
from services.denoiser.int8 import PLAIN, Arithmetic, use_int8
from services.denoiser.model import AttentionLayer, Block, DiffusionTransformer

EXACT, BALANCED, FAST = "exact", "balanced", "fast"
PRECISIONS = (EXACT, BALANCED, FAST)
_HOPPER = (9, 0)  # the first with the copy engine that the product kernel loads its tiles by
_log = logging.getLogger(__name__)


def set_precision(
    model: DiffusionTransformer,
    precision: str,
    device: torch.device | None = None,
    take: Callable[[Block], None] | None = None,
) -> None:
    """Changes a loaded model, in place.

    device: where it will compute, if its weights are not there; take: is given each block as soon as it has its weights,
    which may be on `device` then.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision}")
    if precision == EXACT:
        if take is not None:
            for block in model.blocks:
                assert isinstance(block, Block)
                take(block)
        return
    device = device or next(model.parameters()).device
    if precision == FAST:
        use_attention(model, fast_attention(device))
    if has_kernels(device):
        from services.denoiser.triton_glue import TRITON
        from services.denoiser.triton_int8 import TritonArithmetic

        use_glue(model, TRITON)
        use_int8(model, TritonArithmetic(), device, take)
    else:
        use_int8(model, PLAIN, device, take)


def default_precision(device: torch.device) -> str:
    """`balanced` where there are kernels that make it faster than `exact`."""
    return BALANCED if has_kernels(device) else EXACT


def has_kernels(device: torch.device) -> bool:
    return can_compile(device, _HOPPER)


def fast_attention(device: torch.device) -> Attention:
    """The most exact of the 8-bit kernels that this machine has; without one, as before, with a warning."""
    if device.type != "cuda":
        return Fp8Attention()
    if SAGE.is_installed:
        return SAGE
    if has_kernels(device) and importlib.util.find_spec("cudnn") is not None:
        from services.denoiser.cudnn_attention import CudnnFp8Attention

        return CudnnFp8Attention()
    _log.warning(
        "no 8-bit attention here (nvidia-cudnn-frontend and a Hopper GPU, or SageAttention 2): fast is balanced"
    )
    return AUTO


def use_attention(model: DiffusionTransformer, attention: Attention) -> None:
    """Gives self-attention of all blocks another kernel, in place; that to text and image stays as it was."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.self_attn.attention = attention


def use_glue(model: DiffusionTransformer, glue: Glue) -> None:
    """Gives all blocks another glue, in place."""
    for module in model.modules():
        if isinstance(module, Block | AttentionLayer):
            module.glue = glue


def attention_of(model: DiffusionTransformer) -> str:
    """What the status says: how the video attends to itself."""
    layer = model.get_submodule("blocks.0.self_attn")
    assert isinstance(layer, AttentionLayer)
    return layer.attention.name


def arithmetic_of(model: DiffusionTransformer) -> str:
    """What the status says: how the matrix products of the blocks are computed."""
    arithmetic = getattr(model.get_submodule("blocks.0.self_attn.q"), "arithmetic", None)
    return f"int8 ({arithmetic.name})" if isinstance(arithmetic, Arithmetic) else "weights dequantised"
