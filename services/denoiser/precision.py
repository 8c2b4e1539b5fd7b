"""How exactly the blocks compute: a preset chosen when the stage starts, applied to a loaded model from outside.

`exact`: weights as the file has them, dequantised, in the compute dtype; norms in float32.
`balanced`: int8 matrix products and fused glue; everything else as it was. Figures: docs/figures.md.
"""

from __future__ import annotations

import importlib.util

import torch

from services.denoiser.glue import Glue
from services.denoiser.int8 import PLAIN, Arithmetic, use_int8
from services.denoiser.model import AttentionLayer, Block, DiffusionTransformer

EXACT, BALANCED = "exact", "balanced"
PRECISIONS = (EXACT, BALANCED)
_HOPPER = (9, 0)  # the first with the copy engine that the product kernel loads its tiles by


def set_precision(model: DiffusionTransformer, precision: str, device: torch.device | None = None) -> None:
    """Changes a loaded model, in place. device: where it will compute, if its weights are not there.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision}")
    if precision == EXACT:
        return
    device = device or next(model.parameters()).device
    if has_kernels(device):
        from services.denoiser.triton_glue import TRITON
        from services.denoiser.triton_int8 import TritonArithmetic

        use_glue(model, TRITON)
        use_int8(model, TritonArithmetic(), device)
    else:
        use_int8(model, PLAIN, device)


def default_precision(device: torch.device) -> str:
    """`balanced` where there are kernels that make it faster than `exact`."""
    return BALANCED if has_kernels(device) else EXACT


def has_kernels(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _HOPPER
        and importlib.util.find_spec("triton") is not None
    )


def use_glue(model: DiffusionTransformer, glue: Glue) -> None:
    """Gives all blocks another glue, in place."""
    for module in model.modules():
        if isinstance(module, Block | AttentionLayer):
            module.glue = glue


def arithmetic_of(model: DiffusionTransformer) -> str:
    """What the status says: how the matrix products of the blocks are computed."""
    arithmetic = getattr(model.get_submodule("blocks.0.self_attn.q"), "arithmetic", None)
    return f"int8 ({arithmetic.name})" if isinstance(arithmetic, Arithmetic) else "weights dequantised"
