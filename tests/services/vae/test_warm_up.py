"""Before the VAE is ready it has met every weight and, on a GPU, compiled what requests of any size need."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from services.vae import warm_up as warming
from services.vae.channels_last import best_glue, walk_channels_last
from services.vae.glue import PLAIN
from services.vae.model import PRESETS, CausalConv3d, Downsample, Past, Upsample, Vae
from services.vae.plan import WHOLE, Direction, Tiling
from services.vae.warm_up import warm_up
from tests.services.vae.test_model import CONFIGS

GPU = torch.device("cuda:0")
needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or best_glue(GPU) is PLAIN, reason="needs a GPU and Triton"
)


def vae_of(kind: str) -> Vae:
    torch.manual_seed(0)
    return Vae(CONFIGS[kind]).requires_grad_(False).eval()


def whole(direction: Direction, height: int, width: int) -> Tiling:
    return WHOLE


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_convolution_over_time_is_met_with_a_past(kind: str) -> None:
    vae, met = vae_of(kind), Counter[nn.Module]()
    convolutions = [module for module in vae.modules() if isinstance(module, CausalConv3d)]
    for module in convolutions:
        module.register_forward_pre_hook(lambda module, arguments: met.update([module]))
    warm_up(vae, 64, 64, whole)
    rate_changing = [half.time_conv for half in vae.modules() if isinstance(half, Downsample | Upsample)]
    for module in convolutions:
        # a clip's first frame passes those that change the frame rate by
        assert met[module] >= (1 if module in rate_changing else 2)


def test_a_clip_of_the_usual_size_is_met_on_a_gpu_in_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(warming, "_encode", lambda vae, *given: asked.append(("encode", *given)))
    monkeypatch.setattr(warming, "_decode", lambda vae, *given: asked.append(("decode", *given)))
    monkeypatch.setattr(warming, "_device_of", lambda vae: torch.device("cuda"))
    tilings = {"encode": object(), "decode": object()}
    vae = vae_of(next(iter(CONFIGS)))
    side = vae.config.pixels_per_latent
    warm_up(vae, 512, 896, lambda direction, height, width: tilings[direction])  # type: ignore[arg-type, return-value]
    small = 2 * len(warming._SMALL_SIZES)
    assert asked[small:] == [
        ("encode", 1, 512, 896, tilings["encode"]),
        ("encode", 5, 256, 448, tilings["encode"]),
        ("decode", 512 // side, 896 // side, tilings["decode"]),
    ]


@pytest.mark.gpu
@needs_kernels
@torch.inference_mode()
def test_no_size_compiles_anything_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    torch.manual_seed(0)
    vae = Vae(PRESETS["wan2.1"]).requires_grad_(False).to(GPU, torch.float16)
    walk_channels_last(vae)
    warm_up(vae, 512, 896, whole)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **known: compiled.append(str(known["repr"])))
    for height, width, frames in ((64, 96, 5), (480, 832, 5), (832, 480, 5), (96, 416, 9), (32, 32, 1)):
        latents = vae.encode(torch.zeros(1, 3, frames, height, width, device=GPU))
        torch.cat(list(vae.decode_stream(torch.split(latents, 1, dim=2), Past())), dim=2)
    assert not compiled
