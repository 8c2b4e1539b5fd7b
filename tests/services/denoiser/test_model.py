"""The transformer at tiny sizes: what must not depend on how it is called, and what stops it from outside."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from runtime.weights import build_on_meta
from services.denoiser.conditioning import text_to_video
from services.denoiser.model import PRESETS, DiffusionTransformer, Linear, PatchEmbedding, sinusoid
from tests.services.denoiser.tiny import (
    SCAIL,
    TEXT_TO_VIDEO,
    animation_of,
    normal,
    predict_animation,
    prompt,
    transformer,
)

SIZE = (3, 4, 6)
ROPE = text_to_video(SIZE, TEXT_TO_VIDEO.head_dim).rope
TOKENS = 3 * 2 * 3


def run(model: DiffusionTransformer, latents: Tensor, timestep: Tensor) -> Tensor:
    context = model.embed_context(prompt(model.config).prompt_embeds.expand(len(latents), -1, -1))
    with torch.no_grad():
        velocity: Tensor = model(latents, timestep, context, ROPE)
    return velocity


@pytest.mark.parametrize(
    ("preset", "tensors", "parameters"),
    [
        ("wan2.1-t2v-1.3b", 825, 1_418_996_800),
        ("wan2.1-t2v-14b", 1095, 14_288_491_584),
        ("wan2.1-i2v-14b", 1303, 16_394_878_784),
        ("wan2.2-t2v-a14b", 1095, 14_288_491_584),
        ("wan2.2-i2v-a14b", 1095, 14_288_901_184),
        ("wan2.2-ti2v-5b", 825, 4_999_787_712),
        ("scail-14b", 1305, 16_394_965_824),
    ],
)
def test_presets_have_the_published_number_of_weights(preset: str, tensors: int, parameters: int) -> None:
    state = build_on_meta(lambda: DiffusionTransformer(PRESETS[preset])).state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (tensors, parameters)


def test_timestep_per_token_equals_one_for_all() -> None:
    model, latents = transformer(TEXT_TO_VIDEO), normal(1, 16, *SIZE)
    expected = run(model, latents, torch.tensor([637]))
    assert torch.equal(run(model, latents, torch.full((1, TOKENS), 637.0)), expected)
    assert not torch.allclose(run(model, latents, torch.tensor([638])), expected)
    shared = model.embed_timestep(torch.full((1, TOKENS), 637.0), latents.device)
    assert shared.row.shape == (1, 1)  # broadcast: a row per token would be gigabytes of modulation


def test_tokens_take_the_modulation_of_their_own_timestep() -> None:
    model = transformer(TEXT_TO_VIDEO)
    timestep = torch.tensor([[0.0] * 6 + [637.0] * 12])
    time = model.embed_timestep(timestep, timestep.device)
    assert time.projection.shape == (2, 6, 48)
    for token in (0, 5, 6, 17):
        alone = model.embed_timestep(timestep[:, token], timestep.device)
        torch.testing.assert_close(time.projection[time.row[0, token]], alone.projection[0])
        torch.testing.assert_close(time.embedding[time.row[0, token]], alone.embedding[0])


def test_known_tokens_at_zero_change_the_prediction() -> None:
    model, latents = transformer(TEXT_TO_VIDEO), normal(1, 16, *SIZE)
    mixed = run(model, latents, torch.tensor([[0] * 6 + [637] * 12]))
    assert not torch.allclose(mixed, run(model, latents, torch.tensor([637])))
    swapped = run(model, latents, torch.tensor([[637] * 6 + [0] * 12]))
    assert not torch.allclose(mixed, swapped)


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    model, latents = transformer(TEXT_TO_VIDEO), normal(2, 16, *SIZE)
    together = run(model, latents, torch.tensor([100, 900]))
    for sample, timestep in enumerate((100, 900)):
        alone = run(model, latents[sample : sample + 1], torch.tensor([timestep]))
        torch.testing.assert_close(together[sample : sample + 1], alone, rtol=1e-5, atol=1e-5)


def test_patch_embedding_is_the_convolution_it_is_stored_as() -> None:
    torch.manual_seed(0)
    embedding = PatchEmbedding(5, 8, (1, 2, 2))
    latents = normal(2, 5, 3, 4, 6)
    convolved = nn.functional.conv3d(latents, embedding.weight, embedding.bias, stride=(1, 2, 2))
    torch.testing.assert_close(embedding(latents), convolved.flatten(2).transpose(1, 2))


def test_velocity_is_put_together_from_patches_in_the_order_row_column_channel() -> None:
    model = transformer(replace(TEXT_TO_VIDEO, out_dim=2))
    tokens, size = torch.zeros(1, 6, 48), torch.Size((1, 4, 6))
    with torch.no_grad():
        model.head.head.weight.zero_()
        model.head.head.bias.copy_(torch.arange(8.0))
        velocity = model.predict(tokens, model.embed_timestep(torch.tensor([1]), tokens.device), size)
    assert velocity.shape == (1, 2, 1, 4, 6)
    assert velocity[0, 0, 0, :2, :2].tolist() == [[0, 2], [4, 6]]
    assert velocity[0, 1, 0, 2:, 4:].tolist() == [[1, 3], [5, 7]]


def test_sinusoid_is_cosines_then_sines_of_falling_frequencies() -> None:
    embedding = sinusoid(torch.tensor([0, 1000]), 4)
    assert embedding[0].tolist() == [1, 1, 0, 0]
    angles = torch.tensor([1000.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(embedding[1], torch.cat((angles.cos(), angles.sin())).float(), rtol=0, atol=0)


def test_text_is_padded_before_its_projection() -> None:
    model = transformer(TEXT_TO_VIDEO)
    text = normal(1, 2, 12)
    padded = torch.cat((text, torch.zeros(1, 4, 12)), dim=1)
    assert torch.equal(model.embed_context(text).text, model.embed_context(padded).text)
    assert bool((model.embed_context(text).text[0, -1] != 0).any())  # the biases' image of zeros


def test_context_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_embeds must have at most 6 rows, got 7"):
        transformer(TEXT_TO_VIDEO).embed_context(normal(1, 7, 12))
    with pytest.raises(ValueError, match="image_embeds must be given"):
        transformer(SCAIL).embed_context(normal(1, 4, 12))
    with pytest.raises(ValueError, match="image_embeds must be absent"):
        transformer(TEXT_TO_VIDEO).embed_context(normal(1, 4, 12), normal(1, 5, 10))


def test_pose_and_image_reach_the_video() -> None:
    model = transformer(SCAIL)
    whole = predict_animation(model)
    assert whole.shape == (1, 16, 3, 8, 8)
    for part in ("pose_patch_embedding.weight", "blocks.0.cross_attn.v_img.weight", "img_emb.proj.1.weight"):
        changed = transformer(SCAIL)
        with torch.no_grad():
            changed.get_parameter(part).zero_()
        assert not torch.allclose(predict_animation(changed), whole), part


def test_bfloat16_linears_keep_a_float32_residual_stream() -> None:
    model = transformer(SCAIL)
    exact = predict_animation(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(torch.bfloat16)
    seen = []
    model.blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    rounded = predict_animation(model)
    assert (seen, rounded.dtype) == ([torch.float32], torch.float32)
    error = float((rounded - exact).norm() / exact.norm())
    assert 0 < error < 0.01


class CancelledError(Exception):
    """Somebody outside wants no more."""


def test_hook_between_blocks_stops_within_a_step() -> None:
    model = transformer(replace(TEXT_TO_VIDEO, num_layers=4))
    done: list[int] = []

    def stop(_module: nn.Module, _inputs: object) -> None:
        if len(done) == 2:
            raise CancelledError

    for block in model.blocks:
        block.register_forward_pre_hook(stop)
        block.register_forward_hook(lambda *_: done.append(1))
    with pytest.raises(CancelledError):
        run(model, normal(1, 16, *SIZE), torch.tensor([500]))
    assert len(done) == 2


def test_every_weight_can_be_trained() -> None:
    model, conditioning, embeds = transformer(SCAIL), animation_of(), prompt(SCAIL)
    context = model.embed_context(embeds.prompt_embeds, embeds.image_embeds)
    model_input = conditioning.model_input(normal(1, 16, 3, 8, 8))
    velocity = model(model_input, torch.tensor([500]), context, conditioning.rope, conditioning.pose_latents)
    velocity.square().mean().backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []
