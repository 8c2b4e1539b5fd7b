"""What a loaded VAE computes before its stage says that it is ready, so that no request waits for what is done once.

Kernels are compiled at their first use and kept on disk; cuDNN chooses one for each new size of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from services.vae.model import Vae, to_uint8
from services.vae.plan import WHOLE, Direction, Tiling

# Latents of two sides. Triton compiles a kernel once for numbers that 16 divides, and once for others: here these are
# sides and areas at every resolution, of which all combinations are met that can be
_SMALL_SIZES = ((2, 2), (3, 3), (3, 8), (8, 3))


@torch.inference_mode()
def warm_up(vae: Vae, height: int, width: int, tiling_of: Callable[[Direction, int, int], Tiling]) -> None:
    """Encodes and decodes a few frames: small ones, and on a GPU those of an animation of the given size.

    Args:
        tiling_of: says how frames of a height and a width are computed.
    """
    side, frames = vae.config.pixels_per_latent, 1 + vae.config.frames_per_latent
    on_gpu = _device_of(vae).type == "cuda"
    for rows, columns in _SMALL_SIZES if on_gpu else _SMALL_SIZES[:1]:
        _encode(vae, frames, rows * side, columns * side, WHOLE)
        _decode(vae, rows, columns, WHOLE)
    if on_gpu:
        half = height // 2, width // 2  # of the pose video
        _encode(vae, 1, height, width, tiling_of("encode", height, width))
        _encode(vae, frames, *half, tiling_of("encode", *half))
        _decode(vae, height // side, width // side, tiling_of("decode", height, width))


def _encode(vae: Vae, num_frames: int, height: int, width: int, tiling: Tiling) -> None:
    frames = torch.zeros(1, 3, num_frames, height, width, device=_device_of(vae))
    for latents in vae.encode_stream([frames], tiling.past()):
        latents.cpu()


def _decode(vae: Vae, rows: int, columns: int, tiling: Tiling) -> None:
    """Three latents: the first, the one after it, and one that finds a whole past."""
    latents = torch.zeros(1, vae.config.z_dim, 3, rows, columns, device=_device_of(vae))
    for frames in vae.decode_stream(torch.split(latents, 1, dim=2), tiling.past()):
        to_uint8(frames).cpu()


def _device_of(vae: Vae) -> torch.device:
    return vae.conv1.weight.device
