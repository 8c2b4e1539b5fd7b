"""Real classes of the denoiser at tiny sizes with random weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from services.denoiser.conditioning import Conditioning, animation, seeded_noise
from services.denoiser.denoise import Prompt
from services.denoiser.model import DiffusionTransformer, TransformerConfig

TEXT_TO_VIDEO = TransformerConfig(
    in_dim=16,
    out_dim=16,
    dim=48,
    ffn_dim=64,
    num_heads=2,
    num_layers=2,
    freq_dim=16,
    text_dim=12,
    text_len=6,
)
SCAIL = replace(TEXT_TO_VIDEO, in_dim=20, image_dim=10, pose=True)


def transformer(config: TransformerConfig, seed: int = 0) -> DiffusionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DiffusionTransformer(config).eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return seeded_noise(shape, seed)


def prompt(config: TransformerConfig) -> Prompt:
    return Prompt(
        normal(1, 4, config.text_dim, seed=1),
        normal(1, 3, config.text_dim, seed=2),
        None if config.image_dim is None else normal(1, 5, config.image_dim, seed=3),
    )


def animation_of(frames: int = 2, pose_time_origin: int = 1, head_dim: int = SCAIL.head_dim) -> Conditioning:
    """SCAIL conditioning of a clip of 8x8 latents."""
    return animation(
        normal(1, 16, 1, 8, 8, seed=4),
        normal(1, 16, frames, 4, 4, seed=5),
        head_dim,
        pose_time_origin=pose_time_origin,
    )


def predict_animation(model: DiffusionTransformer) -> Tensor:
    """Velocity of a SCAIL model for the same inputs every time."""
    conditioning, embeds = animation_of(head_dim=model.config.head_dim), prompt(SCAIL)
    with torch.no_grad():
        context = model.embed_context(embeds.prompt_embeds, embeds.image_embeds)
        velocity: Tensor = model(
            conditioning.model_input(normal(1, 16, 3, 8, 8)),
            torch.tensor([500]),
            context,
            conditioning.rope,
            conditioning.pose_latents,
        )
    return velocity
