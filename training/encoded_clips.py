"""Drawn clips -> what the transformer learns from: latents of the bundle's VAE, pictures for CLIP, tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.bundles import Bundle, configuration
from services.encoder.image import PRESETS as IMAGE_ENCODERS
from services.encoder.image import ImageEncoderConfig
from services.encoder.text import PromptTokenizer
from services.vae.model import PRESETS as VAES
from services.vae.model import VaeConfig
from services.vae.weights import load_vae
from training.clip_vae import ClipVae
from training.conditions import Samples, preprocess_pictures, token_rows
from training.drawn_clips import Drawn, draw
from training.figures.motion import CLASS_NAMES

_CLIPS_AT_ONCE = 32
_SOMEBODY = ("a person", "a figure", "somebody", "a dancer", "a man", "a woman", "a character", "")
_VAGUE = 0.3
"""How often a caption leaves out who it is, and how often what is done."""


class ClipEncoder:
    """Encodes clips as the services do, many at a time."""

    def __init__(self, bundle: Bundle, tokenizer: PromptTokenizer, device: torch.device) -> None:
        component = bundle.component("vae")
        config = configuration(component, VAES, VaeConfig)
        self._vae = load_vae(component.files, config, device=device, dtype=torch.float32)
        self._clip_vae = ClipVae(self._vae, compiled=device.type == "cuda")
        self._image = configuration(bundle.component("image_encoder"), IMAGE_ENCODERS, ImageEncoderConfig)
        self._text_len = int(bundle.component("transformer").config["text_len"])
        self._tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, drawn: Drawn) -> Samples:
        """Latents in float16: a thousandth of their deviation is lost."""
        video = self.latents(drawn.target)
        return Samples(
            video=video,
            reference=self.latents(drawn.reference[:, None]),
            pose=self.latents(drawn.pose),
            picture=preprocess_pictures(drawn.reference, self._image).half(),
            tokens=token_rows(reworded(drawn.captions), self._tokenizer, self._text_len).to(video.device),
            figure=figure_share(drawn.figure, video.shape[2:]),
        )

    def latents(self, levels: Tensor) -> Tensor:
        """Levels [N, n, H, W, 3] -> normalised latents float16 [N, C, T, h, w]."""
        parts = []
        for part in torch.split(levels, _CLIPS_AT_ONCE):
            frames = part.movedim(-1, 1).float() / 127.5 - 1
            mean, _ = self._clip_vae.posterior(frames)
            parts.append(self._vae.normalise(mean).half())
        return torch.cat(parts)


def reworded(captions: Sequence[str]) -> list[str]:
    """Captions of which some do not say what somebody wears, or not what somebody does: prompts are as short as that.

    What they say of the effects stays. The choice depends on the caption and its place, so a set of clips has one.
    """
    said = []
    for place, caption in enumerate(captions):
        chance = random.Random(f"{place} {caption}")
        verb = next(name for name in CLASS_NAMES if f" {name}" in caption)
        who, effects = caption.split(f" {verb}", 1)
        who = chance.choice(_SOMEBODY) if chance.random() < _VAGUE else who
        verb = chance.choice(("moves", "dances", "")) if chance.random() < _VAGUE else verb
        said.append(" ".join(f"{who} {verb}{effects}".split()))
    return said


def figure_share(figure: Tensor, size: tuple[int, ...]) -> Tensor:
    """bool [N, n, H, W] -> float16 [N, T, h, w]: how much of what a latent stands for shows the figure, at most 1.

    The share is of the frame that shows most of it; a quarter of the pixels counts as all.
    """
    _, height, width = size
    share = F.adaptive_avg_pool2d(figure.float(), (height, width))  # [N, n, h, w]
    later = torch.unflatten(share[:, 1:], 1, (-1, 4)).amax(dim=2)
    return (torch.cat([share[:, :1], later], dim=1) * 4).clamp(max=1).half()


def encode_clips(
    bundle: Bundle, tokenizer: PromptTokenizer, count: int, *, seed: int, held_out: bool, device: torch.device
) -> Samples:
    """Draws and encodes `count` clips of the bundle's size."""
    encoder = ClipEncoder(bundle, tokenizer, device)

    def parts() -> Iterator[Samples]:
        for drawn in draw(
            count,
            seed=seed,
            held_out=held_out,
            device=device,
            side=bundle.video.height,
            frames=bundle.video.window_frames,
        ):
            yield encoder.encode(drawn)

    return concatenated(list(parts()))


def concatenated(parts: list[Samples]) -> Samples:
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Samples(*(torch.cat(tensors) for tensors in fields))
