"""Before the denoiser is ready it has met every weight and, on a GPU, compiled what requests of any length need."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from services.denoiser import warm_up as warming
from services.denoiser.conditioning import animation, seeded_noise
from services.denoiser.model import DiffusionTransformer
from services.denoiser.plan import animation_tokens
from services.denoiser.precision import BALANCED, FAST, has_kernels, set_precision
from services.denoiser.streaming import stream_weights
from services.denoiser.warm_up import warm_up
from tests.services.denoiser.tiny import SCAIL, predict_animation, transformer

CPU = torch.device("cpu")
GPU = torch.device("cuda:0")
needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_kernels(GPU), reason="needs a Hopper GPU and Triton"
)


def owners(model: nn.Module) -> set[nn.Module]:
    """The modules that have weights of their own and are called; norms are read from by the glue."""
    return {
        module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and "norm" not in name and not hasattr(module, "blocks")
    }


def test_every_module_with_weights_is_met() -> None:
    model, met = transformer(SCAIL), set[nn.Module]()
    for module in owners(model):
        module.register_forward_pre_hook(lambda module, arguments: met.add(module))
    warm_up(model, CPU, 64, 64, 5)
    assert met == owners(model)


def test_it_leaves_the_model_as_it_was() -> None:
    model = transformer(SCAIL)
    before = predict_animation(model)
    warm_up(model, CPU, 64, 64, 5)
    assert torch.equal(predict_animation(model), before)


def test_streamed_weights_are_met_and_left_in_order() -> None:
    model = transformer(SCAIL)
    before = predict_animation(model)
    stream_weights(model, CPU, resident=0)
    warm_up(model, CPU, 64, 64, 5)
    torch.testing.assert_close(predict_animation(model), before)


def test_16_divides_lengths_of_small_clips_and_their_parts_or_does_not_in_all_ways() -> None:
    lengths = [animation_tokens(*clip) for clip in warming._SMALL_CLIPS]
    divides = {(length % 16 == 0, -(-length // 32) % 16 == 0) for length in lengths}
    assert divides == {(False, False), (True, False), (False, True), (True, True)}


def test_a_clip_of_the_usual_size_is_met_by_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def compute(model: DiffusionTransformer, device: torch.device, *clip: int, blocks: int) -> None:
        asked.append((*clip, blocks))
        if clip == (512, 896, 81):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(warming, "_compute", compute)
    warm_up(transformer(SCAIL), torch.device("cuda"), 512, 896, 81)  # one that does not fit is no reason to fail
    assert asked == [*((*clip, SCAIL.num_layers) for clip in warming._SMALL_CLIPS), (512, 896, 81, 1)]


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("precision", [BALANCED, FAST])
def test_no_length_compiles_anything_later(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    model = large_enough().to(GPU)
    set_precision(model, precision)
    warm_up(model, GPU, 128, 96, 9)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **known: compiled.append(str(known["repr"])))
    for height, width, frames in ((64, 64, 5), (96, 160, 13), (160, 96, 9), (224, 192, 13), (288, 256, 5)):
        predict(model, height, width, frames)
    assert not compiled


def large_enough() -> DiffusionTransformer:
    """With heads as wide as the kernels take, so that nothing goes the plain way; bfloat16 as on a GPU."""
    from dataclasses import replace

    from services.denoiser.model import Linear

    model = transformer(replace(SCAIL, dim=384, ffn_dim=768, num_heads=3))
    for module in model.modules():
        if isinstance(module, Linear):
            module.bfloat16()
    return model


@torch.inference_mode()
def predict(model: DiffusionTransformer, height: int, width: int, num_frames: int) -> None:
    h, w, frames = height // 8, width // 8, (num_frames - 1) // 4 + 1
    clip = animation(
        seeded_noise((1, 16, 1, h, w), 1).to(GPU),
        seeded_noise((1, 16, frames, h // 2, w // 2), 2).to(GPU),
        model.config.head_dim,
        pose_time_origin=1,
    )
    latents = clip.model_input(seeded_noise((1, 16, 1 + frames, h, w), 3).to(GPU))
    texts = seeded_noise((1, 4, model.config.text_dim), 4).to(GPU)
    images = seeded_noise((1, 5, model.config.image_dim or 0), 5).to(GPU)
    model(latents, torch.tensor([700]), model.embed_context(texts, images), clip.rope, clip.pose_latents)
