"""Training feeds the transformer what serving feeds it: the same inputs give the same tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.denoiser.conditioning import animation
from services.denoiser.model import DiffusionTransformer, TransformerConfig
from services.encoder.image import ImageEncoderConfig, preprocess
from services.encoder.text import PromptTokenizer, TextEncoder, TextEncoderConfig, TextModel
from training.conditions import (
    Geometry,
    Samples,
    encode_tokens,
    model_input,
    pose_input,
    predict_velocity,
    preprocess_pictures,
    token_rows,
)
from training.tiny_tokenizer import write_tokenizer

TEXT = TextEncoderConfig(vocab=512, dim=16, dim_attn=16, dim_ffn=24, num_heads=2, num_layers=2, text_len=12)
TRANSFORMER = TransformerConfig(
    in_dim=20,
    out_dim=16,
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    freq_dim=16,
    text_dim=16,
    text_len=12,
    image_dim=8,
    pose=True,
)
PROMPTS = ["a person waves", "", "a person in a red shirt walks at night in the snow and on and on"]
ORIGIN = 1


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def samples() -> Samples:
    return Samples(
        video=normal(2, 16, 3, 8, 8),
        reference=normal(2, 16, 1, 8, 8),
        pose=normal(2, 16, 3, 4, 4),
        picture=normal(2, 3, 8, 8),
        tokens=torch.ones(2, 12, dtype=torch.long),
        figure=torch.ones(2, 3, 8, 8),
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, TEXT.vocab)
    return PromptTokenizer(directory, TEXT)


def test_first_window_is_conditioned_as_the_denoiser_does(samples: Samples) -> None:
    geometry = Geometry.of(samples, TRANSFORMER.head_dim, pose_time_origin=ORIGIN)
    noisy = normal(2, 16, 3, 8, 8) * 2
    served = animation(samples.reference, samples.pose, TRANSFORMER.head_dim, pose_time_origin=ORIGIN)
    state = served.with_known(torch.cat([torch.zeros(2, 16, 1, 8, 8), noisy], dim=2))
    given = model_input(noisy, samples, torch.tensor([False, False]), geometry)
    torch.testing.assert_close(given, served.model_input(state), rtol=0, atol=0)
    assert served.pose_latents is not None
    torch.testing.assert_close(pose_input(samples), served.pose_latents, rtol=0, atol=0)
    torch.testing.assert_close(geometry.rope.cos, served.rope.cos, rtol=0, atol=0)
    torch.testing.assert_close(geometry.rope.sin, served.rope.sin, rtol=0, atol=0)


def test_later_window_is_conditioned_as_the_denoiser_does(samples: Samples) -> None:
    geometry = Geometry.of(samples, TRANSFORMER.head_dim, pose_time_origin=ORIGIN)
    noisy = normal(2, 16, 3, 8, 8) * 2
    served = animation(
        samples.reference,
        samples.pose,
        TRANSFORMER.head_dim,
        pose_time_origin=ORIGIN,
        history_latents=samples.video[:, :, :1],
        frames_given=1,
    )
    state = served.with_known(torch.cat([torch.zeros(2, 16, 1, 8, 8), noisy], dim=2))
    mixed = model_input(noisy, samples, torch.tensor([False, True]), geometry)
    torch.testing.assert_close(mixed[1], served.model_input(state)[1], rtol=0, atol=0)
    assert not torch.equal(mixed[0], served.model_input(state)[0])


def test_velocity_is_that_of_the_served_forward_pass(samples: Samples) -> None:
    torch.manual_seed(0)
    model = DiffusionTransformer(TRANSFORMER)
    geometry = Geometry.of(samples, TRANSFORMER.head_dim, pose_time_origin=ORIGIN)
    latents = model_input(normal(2, 16, 3, 8, 8) * 2, samples, torch.tensor([False, True]), geometry)
    pose, timesteps = pose_input(samples), torch.tensor([875.0, 31.0])
    with torch.no_grad():
        context = model.embed_context(normal(2, 5, 16), normal(2, 3, 8))
        served = model(latents, timesteps, context, geometry.rope, pose)
        trained = predict_velocity(model, latents, timesteps, context, geometry.rope, pose)
    torch.testing.assert_close(trained, served, rtol=1e-5, atol=1e-5)


def test_a_batch_of_captions_is_encoded_as_each_prompt_alone(tokenizer: PromptTokenizer) -> None:
    torch.manual_seed(0)
    model = TextModel(TEXT).eval()
    with torch.no_grad():
        trained = encode_tokens(model, token_rows(PROMPTS, tokenizer, TEXT.text_len))
    served = TextEncoder(TEXT, model, tokenizer).encode(PROMPTS)
    assert served.truncated == (False, False, True)
    torch.testing.assert_close(trained, served.prompt_embeds, rtol=1e-5, atol=1e-5)


def test_pictures_are_preprocessed_as_the_image_encoder_does() -> None:
    config = ImageEncoderConfig(image_size=16, patch_size=8, dim=8, num_heads=1, num_layers=2)
    pictures = (normal(2, 40, 40, 3) * 60 + 128).clamp(0, 255).to(torch.uint8)
    served = torch.stack([preprocess(picture, config) for picture in pictures])
    torch.testing.assert_close(preprocess_pictures(pictures, config), served, rtol=1e-5, atol=1e-5)
