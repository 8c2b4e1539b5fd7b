"""Segment Anything: a picture and prompts -> masks of people in it. Needed for the first frame of a clip only.

The network is transformers' SamModel, which agrees with the released code. Pictures are RGB, their longer side is scaled
to the network's size, and the rest is filled with zeros at the right and bottom.
Source: Kirillov et al. 2023 (arXiv:2304.02643), segment-anything 1.0 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import SamConfig, SamModel

from services.pose.persons.masks import PersonPrompt

_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)
# the two-way transformer of the mask decoder keeps PyTorch's own, all other norms have 1e-6
_DECODER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class SegmenterConfig:
    """Sizes of a Segment Anything network.

    Attributes:
        image_size, patch_size: pixels, of the square that a picture is put into.
        dim, num_layers, num_heads, mlp_dim: of the image encoder.
        window_size: patches that attention sees at a time.
        global_layers: layers whose attention sees all patches.
        prompt_dim: channels of embeddings, prompts and the mask decoder.
        decoder_mlp_dim, iou_dim: inside the mask decoder.
    """

    image_size: int
    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    window_size: int
    global_layers: tuple[int, ...]
    patch_size: int = 16
    prompt_dim: int = 256
    decoder_mlp_dim: int = 2048
    iou_dim: int = 256


PRESETS: Mapping[str, SegmenterConfig] = {
    "sam-vit-h": SegmenterConfig(
        image_size=1024,
        dim=1280,
        num_layers=32,
        num_heads=16,
        mlp_dim=5120,
        window_size=14,
        global_layers=(7, 15, 23, 31),
    ),
}


def input_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Height and width of a picture whose longer side is scaled to `image_size`, rounded half up."""
    scale = image_size / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


class SegmenterModel(nn.Module):
    """The network; the part of the segmenter that has weights. Runs in float32: half precision costs the masks' edges."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config = config
        grid = {"image_size": config.image_size, "patch_size": config.patch_size}
        vision = {
            "hidden_size": config.dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "mlp_dim": config.mlp_dim,
            "window_size": config.window_size,
            "global_attn_indexes": list(config.global_layers),
            "output_channels": config.prompt_dim,
            "num_pos_feats": config.prompt_dim // 2,
            **grid,
        }
        decoder = {
            "hidden_size": config.prompt_dim,
            "mlp_dim": config.decoder_mlp_dim,
            "iou_head_hidden_dim": config.iou_dim,
            "layer_norm_eps": _DECODER_NORM_EPS,
        }
        prompts = {"hidden_size": config.prompt_dim, **grid}
        self.sam = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))

    @property
    def device(self) -> torch.device:
        return self.sam.device

    def embed(self, pixels: Tensor) -> Tensor:
        """A preprocessed picture [1, 3, image_size, image_size] -> [1, prompt_dim, h, w], a cell per patch."""
        embedding: Tensor = self.sam.get_image_embeddings(pixels)
        return embedding

    def embed_prompt(self, points: Tensor, labels: Tensor, box: Tensor | None) -> Tensor:
        """One person's prompt -> [number of tokens, prompt_dim]; arguments as for `masks`."""
        sparse, _ = self.sam.prompt_encoder(
            input_points=points[None, None],
            input_labels=labels[None, None],
            input_boxes=None if box is None else box[None, None],
            input_masks=None,
        )
        tokens: Tensor = sparse[0, 0]
        return tokens

    def masks(self, embedding: Tensor, points: Tensor, labels: Tensor, box: Tensor | None) -> tuple[Tensor, Tensor]:
        """Three masks that a prompt may mean, and how good each is thought to be.

        Args:
            embedding: of `embed`.
            points: [n, 2], x and y in pixels of the scaled picture.
            labels: int [n], 1 on the person, 0 beside it.
            box: [4] left, top, right, bottom in the same pixels.

        Returns:
            logits [3, 4h, 4w], above 0 on the person, and scores [3].
        """
        output = self.sam(
            image_embeddings=embedding,
            input_points=points[None, None],
            input_labels=labels[None, None],
            input_boxes=None if box is None else box[None, None],
            multimask_output=True,
        )
        return output.pred_masks[0, 0], output.iou_scores[0, 0]

    def full_size(self, logits: Tensor, scaled: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Logits [n, h, w] -> [n, *size], where `scaled` is the part of the network's square that the picture fills."""
        side = (self.config.image_size, self.config.image_size)
        square = functional.interpolate(logits[None], side, mode="bilinear", align_corners=False)
        inside = square[..., : scaled[0], : scaled[1]]
        return functional.interpolate(inside, size, mode="bilinear", align_corners=False)[0]


class Segmenter:
    """People in a picture -> their masks, with the weights in `model`; whoever moves `model` decides where it computes."""

    def __init__(self, model: SegmenterModel) -> None:
        self.model = model

    @torch.inference_mode()
    def segment(self, picture: Tensor, prompts: Sequence[PersonPrompt]) -> Tensor:
        """Of the masks that each prompt may mean, the one thought best.

        Args:
            picture: uint8 [H, W, 3], RGB.

        Returns:
            bool [people, H, W], on the model's device.
        """
        height, width = picture.shape[:2]
        scaled = input_size(height, width, self.model.config.image_size)
        scale = torch.tensor([scaled[1] / width, scaled[0] / height])
        embedding = self.model.embed(preprocess(picture, self.model.config.image_size).to(self.model.device))
        found = []
        for prompt in prompts:
            points = (torch.tensor(prompt.points) * scale).to(embedding)
            box = (torch.tensor(prompt.box).view(2, 2) * scale).flatten().to(embedding)
            labels = torch.ones(len(points), dtype=torch.int64, device=embedding.device)
            logits, scores = self.model.masks(embedding, points, labels, box)
            best = scores.argmax()
            found.append(self.model.full_size(logits[best][None], scaled, (height, width))[0] > 0)
        return torch.stack(found)


def preprocess(picture: Tensor, image_size: int) -> Tensor:
    """A picture uint8 [H, W, 3] as the network takes it: float32 [1, 3, image_size, image_size], on the CPU."""
    height, width = input_size(picture.shape[0], picture.shape[1], image_size)
    image = Image.fromarray(picture.cpu().numpy()).resize((width, height), Image.Resampling.BILINEAR)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return functional.pad((levels - mean) / std, (0, image_size - width, 0, image_size - height))[None]
