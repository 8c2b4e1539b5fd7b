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
_HEAD_DIM = 128  # of all Wan transformers
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
    reasons = []
    for make in (_sage, _cudnn_fp8):
        try:
            attention = make(device)
            _try_out(attention, device)
        except Exception as error:  # whatever the libraries of others raise
            reasons.append(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        else:
            return attention
    _log.warning("no 8-bit attention here (%s): fast is balanced", "; ".join(reasons))
    return AUTO


def _sage(device: torch.device) -> Attention:
    if not SAGE.is_installed:
        raise ImportError("SageAttention 2 is not installed")
    return SAGE


def _cudnn_fp8(device: torch.device) -> Attention:
    if not has_kernels(device):
        raise ImportError("cuDNN's needs Triton and a Hopper GPU or newer")
    if importlib.util.find_spec("cudnn") is None:
        raise ImportError("nvidia-cudnn-frontend is not installed")
    from services.denoiser.cudnn_attention import CudnnFp8Attention

    return CudnnFp8Attention()


def _try_out(attention: Attention, device: torch.device) -> None:
    """Raises what a kernel raises that cannot run here."""
    tokens = torch.ones(1, 256, 1, _HEAD_DIM, device=device, dtype=torch.bfloat16)
    attention(tokens, tokens, tokens)


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
