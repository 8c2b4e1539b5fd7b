"""The `sam2` back-end, the default: Segment Anything 2.1 follows people through a clip. Binary masks.

The network is transformers' Sam2VideoModel. Pictures are squashed to a square. For each person it remembers the first
frame, the last six frames, and pointers from the last fifteen; whatever is older is dropped here, which transformers'
session by itself does not do.
Source: Ravi et al. 2024 (arXiv:2408.00714), facebookresearch/sam2 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Sam2HieraDetConfig,
    Sam2VideoConfig,
    Sam2VideoInferenceSession,
    Sam2VideoModel,
    Sam2VisionConfig,
)

from services.pose.persons.masks import PersonPrompt

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_BOX_LABELS = (2, 3)  # of a box's corners; 1 is a point on the person
_PATCH = 16  # pixels of the square per cell of the smallest features
_NEEDED_AT_ONCE_ONLY = ("pred_masks", "high_res_masks")
_MEMORY = ("maskmem_features", "maskmem_pos_enc")


@dataclass(frozen=True)
class Sam2Config:
    """Sizes of a Segment Anything 2.1 network.

    Attributes:
        dim, num_heads: of the first of the image encoder's four stages; each later one has twice as many.
        blocks_per_stage, window_sizes: of the four stages.
        global_blocks: blocks, counted through all stages, whose attention sees the whole picture.
        background_size: of the coarse position table.
        image_size: side of the square, pixels.
        hidden_dim: channels of features, prompts and the decoder; a multiple of 64 above 64.
        decoder_mlp_dim, iou_dim: inside the mask decoder.
        memory_mlp_dim, fuser_dim: inside the memory attention and the memory encoder.
        memory_layers: of the memory attention.
    """

    dim: int
    num_heads: int
    blocks_per_stage: tuple[int, int, int, int]
    global_blocks: tuple[int, ...]
    window_sizes: tuple[int, int, int, int] = (8, 4, 14, 7)
    background_size: int = 7
    image_size: int = 1024
    hidden_dim: int = 256
    decoder_mlp_dim: int = 2048
    iou_dim: int = 256
    memory_mlp_dim: int = 2048
    fuser_dim: int = 1024
    memory_layers: int = 4


PRESETS: Mapping[str, Sam2Config] = {
    "sam2.1-hiera-tiny": Sam2Config(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "sam2.1-hiera-small": Sam2Config(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "sam2.1-hiera-base-plus": Sam2Config(112, 2, (2, 3, 16, 3), (12, 16, 20), background_size=14),
    "sam2.1-hiera-large": Sam2Config(144, 2, (2, 6, 36, 4), (23, 33, 43), window_sizes=(8, 4, 16, 8)),
}


class Sam2Network(nn.Module):
    """The network; the part of the back-end that has weights."""

    def __init__(self, config: Sam2Config) -> None:
        super().__init__()
        self.config = config
        self.sam = Sam2VideoModel(_transformers_config(config))

    @property
    def device(self) -> torch.device:
        return self.sam.no_memory_embedding.device  # of what is always where it computes, other than its blocks

    @property
    def blocks(self) -> nn.ModuleList:
        """Those of the image encoder, one after the other: nearly all of the weights."""
        blocks: nn.ModuleList = self.sam.vision_encoder.backbone.blocks
        return blocks


class Sam2Masks:
    """Masks of people; implements `PersonMasks`. Whoever moves `network` decides where it computes."""

    def __init__(self, network: Sam2Network) -> None:
        self.network = network

    def begin(self, first_frame: Tensor, prompts: Sequence[PersonPrompt]) -> Sam2Clip:
        return Sam2Clip(self.network, first_frame, prompts)


class Sam2Clip:
    """One clip; implements `ClipMasks`.

    Attributes:
        session: what is remembered, the same amount however long the clip.
        logits: of the latest frame, above 0 on a person: float32 [people, H, W].
    """

    def __init__(self, network: Sam2Network, first_frame: Tensor, prompts: Sequence[PersonPrompt]) -> None:
        self._network = network
        height, width = first_frame.shape[:2]
        device = network.device
        self.session = Sam2VideoInferenceSession(
            video_height=height,
            video_width=width,
            inference_device=device,
            inference_state_device=device,
            video_storage_device=device,
            dtype=torch.float32,
        )
        scale = torch.tensor([network.config.image_size / width, network.config.image_size / height])
        for person, prompt in enumerate(prompts):
            place = self.session.obj_id_to_idx(person)
            self.session.add_point_inputs(place, 0, _point_inputs(prompt, scale))
        self.session.obj_with_new_inputs = list(range(len(prompts)))
        self._next_frame = 0
        self.first = self.follow(first_frame)

    @torch.inference_mode()
    def follow(self, frame: Tensor) -> Tensor:
        pixels = preprocess(frame, self._network.config.image_size).to(self._network.device)
        output = self._network.sam(inference_session=self.session, frame=pixels, frame_idx=self._next_frame)
        self._next_frame += 1
        self._forget()
        size = (frame.shape[0], frame.shape[1])
        self.logits = functional.interpolate(output.pred_masks, size, mode="bilinear", align_corners=False)[:, 0]
        return (self.logits > 0).float()

    def _forget(self) -> None:
        """Drops from the session what the next frame will not look at."""
        settings = self._network.sam.config
        oldest_memory = self._next_frame - (settings.num_maskmem - 1)
        oldest_pointer = self._next_frame - (settings.max_object_pointers_in_encoder - 1)
        self.session.processed_frames = {}
        for person in range(self.session.get_obj_num()):
            self.session.frames_tracked_per_obj[person].clear()
            outputs = self.session.output_dict_per_obj[person]
            followed = outputs["non_cond_frame_outputs"]
            for index in [index for index in followed if index < oldest_pointer]:
                del followed[index]
            for output in (*outputs["cond_frame_outputs"].values(), *followed.values()):
                _drop(output, _NEEDED_AT_ONCE_ONLY)
            for index, output in followed.items():
                if index < oldest_memory:
                    _drop(output, _MEMORY)


def preprocess(frame: Tensor, image_size: int) -> Tensor:
    """A picture uint8 [H, W, 3] as the network takes it: float32 [1, 3, image_size, image_size], on the CPU."""
    square = (image_size, image_size)
    levels = np.array(Image.fromarray(frame.cpu().numpy()).resize(square, Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(levels).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return ((pixels - mean) / std)[None]


def _point_inputs(prompt: PersonPrompt, scale: Tensor) -> dict[str, Tensor]:
    """The box's corners and the points, in pixels of the square: [1, 1, n, 2], and what each is: int [1, 1, n]."""
    points = torch.cat([torch.tensor(prompt.box).view(2, 2), torch.tensor(prompt.points)]) * scale
    labels = torch.tensor([*_BOX_LABELS, *(1 for _ in prompt.points)], dtype=torch.int32)
    return {"point_coords": points[None, None], "point_labels": labels[None, None]}


def _drop(output: dict[str, Tensor], names: Sequence[str]) -> None:
    for name in names:
        output.pop(name, None)


def _transformers_config(config: Sam2Config) -> Sam2VideoConfig:
    dims, heads = ([first * 2**stage for stage in range(4)] for first in (config.dim, config.num_heads))
    cells = config.image_size // _PATCH
    hidden = config.hidden_dim
    backbone = Sam2HieraDetConfig(
        hidden_size=config.dim,
        num_attention_heads=config.num_heads,
        image_size=[config.image_size, config.image_size],
        blocks_per_stage=list(config.blocks_per_stage),
        embed_dim_per_stage=dims,
        num_attention_heads_per_stage=heads,
        window_size_per_stage=list(config.window_sizes),
        global_attention_blocks=list(config.global_blocks),
        window_positional_embedding_background_size=[config.background_size, config.background_size],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=dims[::-1],
        backbone_feature_sizes=[[cells * times, cells * times] for times in (4, 2, 1)],
        fpn_hidden_size=hidden,
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": hidden, "image_size": config.image_size, "patch_size": _PATCH},
        mask_decoder_config={
            "hidden_size": hidden,
            "mlp_dim": config.decoder_mlp_dim,
            "iou_head_hidden_dim": config.iou_dim,
        },
        image_size=config.image_size,
        memory_attention_hidden_size=hidden,
        memory_attention_num_layers=config.memory_layers,
        memory_attention_feed_forward_hidden_size=config.memory_mlp_dim,
        memory_attention_rope_feat_sizes=[cells, cells],
        memory_encoder_hidden_size=hidden,
        mask_downsampler_embed_dim=hidden,
        memory_fuser_embed_dim=hidden,
        memory_fuser_intermediate_dim=config.fuser_dim,
    )
