"""Pictures -> image_embeds [B, 1 + patches, dim]: the vision tower of CLIP ViT-H/14, as image-to-video models use it.

The features are those of the last block but one, without a final norm, class token first. Pictures are squashed to a
square; their aspect ratio is not kept. Source: CLIP, Radford et al. 2021 (arXiv:2103.00020), and Wan-Video/Wan2.1
`wan/modules/clip.py`, with which the outputs agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

Preprocessing = Literal["official", "wan2gp"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of a CLIP vision tower; `num_layers` counts the last block too, which is never run.

    `preprocessing` says how a picture is brought to size: `official` as in training (`resize_bicubic`), `wan2gp` as
    that program does (`resize_lanczos`).
    """

    image_size: int
    patch_size: int
    dim: int
    num_heads: int
    num_layers: int
    mlp_ratio: float = 4
    activation: str = "gelu"
    norm_eps: float = 1e-5
    preprocessing: Preprocessing = "official"


PRESETS: Mapping[str, ImageEncoderConfig] = {
    "clip-vit-h-14": ImageEncoderConfig(image_size=224, patch_size=14, dim=1280, num_heads=16, num_layers=32),
}


def resize_bicubic(picture: Tensor, size: int) -> Tensor:
    """[3, H, W] in [-1, 1] -> [3, size, size], not antialiased; may overshoot the range.

    Source: Wan-Video/Wan2.1 `wan/modules/clip.py`.
    """
    resized = functional.interpolate(picture[None], size=(size, size), mode="bicubic", align_corners=False)
    return resized[0]


def resize_lanczos(picture: Tensor, size: int) -> Tensor:
    """[3, H, W] in [-1, 1] -> [3, size, size], by way of 8-bit grey levels.

    Source: deepbeepmeep/Wan2GP `shared/utils/utils.py` (8681e9f). Levels are truncated there, not rounded, so a picture
    that came from bytes loses one step where it is dark (1 to 63).
    """
    levels = ((picture + 1) * 127.5).to(torch.uint8).permute(1, 2, 0)  # [H, W, 3]
    resized = Image.fromarray(levels.cpu().numpy()).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(picture) / 127.5 - 1


_RESIZE = {"official": resize_bicubic, "wan2gp": resize_lanczos}


def preprocess(picture: Tensor, config: ImageEncoderConfig) -> Tensor:
    """One picture as the vision tower takes it.

    Args:
        picture: uint8 [H, W, 3], or float [3, H, W] in [-1, 1].

    Returns:
        float32 [3, image_size, image_size], normalised by CLIP's mean and deviation per channel, on the picture's device.
    """
    if picture.dtype == torch.uint8:
        picture = picture.permute(2, 0, 1) / 127.5 - 1
    resized = _RESIZE[config.preprocessing](picture.float(), config.image_size)
    mean, std = (resized.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (resized * 0.5 + 0.5 - mean) / std


class ImageModel(nn.Module):
    """Preprocessed pictures -> features; the part of the image encoder that has weights."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.clip = CLIPVisionModel(
            CLIPVisionConfig(
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_size=config.dim,
                intermediate_size=int(config.dim * config.mlp_ratio),
                num_attention_heads=config.num_heads,
                # the features are the input of the last block, so it is not built
                num_hidden_layers=config.num_layers - 1,
                hidden_act=config.activation,
                layer_norm_eps=config.norm_eps,
            )
        )
        # serves only the pooled output, which is not used
        self.clip.add_module("post_layernorm", nn.Identity())

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, image_size, image_size] -> [B, 1 + patches, dim], class token first."""
        features: Tensor = self.clip(pixel_values=pixels).last_hidden_state
        return features


class ImageEncoder:
    """Pictures -> image_embeds, with the weights in `model`; whoever moves `model` decides where it computes."""

    def __init__(self, config: ImageEncoderConfig, model: ImageModel) -> None:
        self.config, self.model = config, model

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Tensor]) -> Tensor:
        """Encodes pictures, which may differ in size; `preprocess` says what they look like.

        Returns:
            image_embeds [B, 1 + patches, dim], in the dtype of the weights.
        """
        patches = self.model.clip.embeddings.patch_embedding.weight
        pixels = torch.stack([preprocess(picture, self.config) for picture in pictures])
        image_embeds: Tensor = self.model(pixels.to(patches))
        return image_embeds
