"""What the transformer is given in training, in batches: the same tensors that the services give it.

`services/denoiser` conditions one request at a time and leaves the device for decisions; here a batch is conditioned in
plain tensor arithmetic, which can be recorded as a CUDA graph. tests/training/test_conditions.py holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.denoiser.conditioning import MASK_CHANNELS, Conditioning, animation
from services.denoiser.model import Context, DiffusionTransformer, TimeEmbedding, sinusoid
from services.denoiser.rope import Rope
from services.encoder.image import CLIP_MEAN, CLIP_STD, ImageEncoderConfig, ImageModel
from services.encoder.text import PromptTokenizer, TextModel, clean_prompt

TIMESTEPS = 1000  # the scale of the timesteps that the transformer is given
_PADDING_TOKEN = 0


@dataclass(frozen=True)
class Samples:
    """Encoded clips, one per row: what the transformer learns from.

    Attributes:
        video: normalised latents [N, C, T, h, w].
        reference: of the reference picture [N, C, 1, h, w].
        pose: of the pose frames, at half size [N, C, T, h/2, w/2].
        picture: the reference as the image encoder takes it, [N, 3, size, size].
        tokens: of the captions, int64 [N, text_len], padded with zeros.
        figure: where the figure is, float [N, T, h, w], 0 to 1.
    """

    video: Tensor
    reference: Tensor
    pose: Tensor
    picture: Tensor
    tokens: Tensor
    figure: Tensor

    def __len__(self) -> int:
        return len(self.video)

    def pick(self, rows: Tensor | slice) -> Samples:
        return Samples(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Learners:
    """The models that learn together."""

    transformer: DiffusionTransformer
    text: TextModel
    image: ImageModel

    def modules(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer, "text": self.text, "image": self.image}


def token_rows(prompts: Sequence[str], tokenizer: PromptTokenizer, text_len: int) -> Tensor:
    """Cleaned prompts as ids int64 [B, text_len]; what follows the end-of-text token is padding."""
    rows = torch.full((len(prompts), text_len), _PADDING_TOKEN)
    for row, prompt in zip(rows, prompts, strict=True):
        ids, _ = tokenizer.tokenize(clean_prompt(prompt))
        row[: len(ids)] = torch.tensor(ids)
    return rows


def encode_tokens(text: TextModel, tokens: Tensor) -> Tensor:
    """Ids [B, text_len] -> prompt_embeds [B, text_len, dim] as `TextEncoder.encode` gives them."""
    used = tokens != _PADDING_TOKEN
    # a mask of four axes is taken as it is; one of two would be looked at on the host
    mask = torch.zeros(used.shape, device=tokens.device).masked_fill(~used, torch.finfo(torch.float32).min)
    hidden: Tensor = text.stack(input_ids=tokens, attention_mask=mask[:, None, None]).last_hidden_state
    return hidden * used[..., None]


def preprocess_pictures(pictures: Tensor, config: ImageEncoderConfig) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, size, size], as `services.encoder.image.preprocess` with "official"."""
    size = (config.image_size, config.image_size)
    levels = pictures.permute(0, 3, 1, 2) / 127.5 - 1
    resized = F.interpolate(levels, size=size, mode="bicubic", align_corners=False)
    mean, std = (resized.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (resized * 0.5 + 0.5 - mean) / std


@dataclass(frozen=True)
class Geometry:
    """What all clips of one size share: rotary tables, and masks without and with a given first frame.

    Attributes:
        rope: of all tokens.
        masks: [2, MASK_CHANNELS, 1 + T, h, w]; row 1 is that of a later window, whose first frame is known.
    """

    rope: Rope
    masks: Tensor

    @classmethod
    def of(cls, samples: Samples, head_dim: int, *, pose_time_origin: int) -> Geometry:
        reference, pose, video = (x[:1].float() for x in (samples.reference, samples.pose, samples.video))

        def conditioning(**history: Tensor | int) -> Conditioning:
            return animation(reference, pose, head_dim, pose_time_origin=pose_time_origin, **history)  # type: ignore[arg-type]

        first, later = conditioning(), conditioning(history_latents=video[:, :, :1], frames_given=1)
        assert first.channels is not None
        assert later.channels is not None
        return cls(first.rope, torch.cat([first.channels, later.channels]))


def model_input(noisy: Tensor, samples: Samples, known_first: Tensor, geometry: Geometry) -> Tensor:
    """Reference frame and video with their masks: [B, C + MASK_CHANNELS, 1 + T, h, w].

    Args:
        noisy: latents of the video [B, C, T, h, w].
        known_first: bool [B], where the first frame is that of the window before and not noise.
    """
    first = torch.where(known_first[:, None, None, None, None], samples.video[:, :, :1], noisy[:, :, :1])
    state = torch.cat([samples.reference, first, noisy[:, :, 1:]], dim=2)
    masks = geometry.masks[known_first.long()].to(state.dtype)
    return torch.cat([state, masks], dim=1)


def pose_input(samples: Samples) -> Tensor:
    """Pose latents with their masks, all known: [B, C + MASK_CHANNELS, T, h/2, w/2]."""
    pose = samples.pose
    return torch.cat([pose, pose.new_ones(len(pose), MASK_CHANNELS, *pose.shape[2:])], dim=1)


def predict_velocity(
    transformer: DiffusionTransformer, latents: Tensor, timesteps: Tensor, context: Context, rope: Rope, pose: Tensor
) -> Tensor:
    """`DiffusionTransformer.forward` for a timestep per sample [B], all of them embedded: nothing asks the host."""
    embedding = transformer.time_embedding(sinusoid(timesteps, transformer.config.freq_dim))
    projection = transformer.time_projection(embedding).unflatten(-1, (6, -1))
    time = TimeEmbedding(embedding, projection, torch.arange(len(timesteps), device=latents.device)[:, None])
    tokens = transformer.embed_tokens(latents, pose)
    for block in transformer.blocks:
        tokens = block(tokens, time, context, rope)
    return transformer.predict(tokens, time, latents.shape[2:])
