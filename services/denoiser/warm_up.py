"""What a loaded transformer computes before its stage says that it is ready, so that no request waits for what is done once.

Kernels are compiled at their first use (seconds each, kept on disk), libraries choose theirs for each new size of their
inputs (tenths of a second), and either may fail: better now than in the first request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.torch_stage import where_it_fits
from services.denoiser.conditioning import animation
from services.denoiser.model import DiffusionTransformer

# Height, width and frames of clips of 56, 112, 504 and 512 tokens. Triton compiles a kernel once for numbers that 16
# divides, and once for others: here these are the length and its 32nd part, for which 8-bit attention adds up values
_SMALL_CLIPS = ((64, 64, 5), (64, 128, 5), (224, 256, 1), (64, 128, 45))
_TIMESTEP = torch.tensor([500])
_IMAGE_ROWS = 257  # of CLIP ViT-H/14


@torch.inference_mode()
def warm_up(model: DiffusionTransformer, device: torch.device, height: int, width: int, num_frames: int) -> None:
    """Computes small clips as a whole, which meets every kernel and every weight; then, on a GPU, one block of a clip of
    the given size, for the plans that cuDNN and cuBLAS make of sizes. The first request of another size makes its own.
    """
    for clip in _SMALL_CLIPS if device.type == "cuda" else _SMALL_CLIPS[:1]:
        _compute(model, device, *clip, blocks=len(model.blocks))
    if device.type != "cuda":
        return
    with where_it_fits(f"{num_frames} frames of {width}x{height}"):
        _compute(model, device, height, width, num_frames, blocks=1)


def _compute(
    model: DiffusionTransformer, device: torch.device, height: int, width: int, num_frames: int, *, blocks: int
) -> Tensor:
    """The velocity [1, 16, T, h, w] of a clip of zeros behind the first of the blocks."""
    config = model.config
    h, w, frames = height // 8, width // 8, (num_frames - 1) // 4 + 1
    reference = torch.zeros(1, 16, 1, h, w, device=device)
    pose = torch.zeros(1, 16, frames, h // 2, w // 2, device=device)
    clip = animation(reference, pose, config.head_dim, pose_time_origin=1)
    latents = clip.model_input(torch.zeros(1, 16, 1 + frames, h, w, device=device))
    prompt = torch.zeros(1, 1, config.text_dim, device=device)
    image = None if config.image_dim is None else torch.zeros(1, _IMAGE_ROWS, config.image_dim, device=device)
    context = model.embed_context(prompt, image)
    time = model.embed_timestep(_TIMESTEP, device)
    tokens = model.embed_tokens(latents, clip.pose_latents)
    for block in list(model.blocks)[:blocks]:
        tokens = block(tokens, time, context, clip.rope)
    return model.predict(tokens, time, latents.shape[2:])
