"""The channels-last walk computes what the modules compute, whatever form its convolutions have."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.vae import channels_last
from services.vae.channels_last import walk_channels_last
from services.vae.convolution import Doubling, Form, arranged, best_form
from services.vae.glue import PLAIN
from services.vae.model import CausalConv3d, Decoder, Downsample, Encoder, Past, Upsample, Vae
from tests.parity.cases import Case
from tests.parity.vae import decoded, encoded, vae_of
from tests.services.vae.test_model import CONFIGS, clip, noise

GOLDENS = Path(__file__).parents[2] / "goldens"
both = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def all_in(form: Form) -> Callable[[CausalConv3d], Form]:
    """Convolutions over time alone have but one form."""
    return lambda layer: form if layer.kernel_size == (3, 3, 3) else Form.VOLUME


def pair(kind: str, form: Form | None = None) -> tuple[Vae, Vae]:
    """The same VAE without and with the walk."""
    vaes = []
    for _ in range(2):
        torch.manual_seed(0)
        vaes.append(Vae(CONFIGS[kind]).requires_grad_(False).eval())
    walk_channels_last(vaes[1], form=all_in(form) if form else None)
    return vaes[0], vaes[1]


@both
@pytest.mark.parametrize("form", Form)
def test_walk_computes_the_numbers_of_the_modules(kind: str, form: Form) -> None:
    plain, walk = pair(kind, form)
    frames, latents = clip(13, side=32), noise(4)
    close(walk.encode(frames), plain.encode(frames))
    close(walk.decode(latents), plain.decode(latents))
    in_twos = torch.cat(list(walk.decode_stream(torch.split(latents, 2, dim=2))), dim=2)
    close(in_twos, plain.decode(latents))
    close(walk.encode_group(frames, Past()), plain.encode(frames))


@both
def test_samples_of_a_batch_are_walked_one_by_one(kind: str) -> None:
    plain, walk = pair(kind)
    frames, latents = torch.cat([clip(9), clip(9, 1)]), torch.cat([noise(3), noise(3, 1)])
    close(walk.encode(frames), plain.encode(frames))
    close(walk.decode(latents), plain.decode(latents))


@pytest.mark.parametrize("name", ["vae21", "vae22"])
def test_stored_case_passes(name: str) -> None:
    case = Case(name, GOLDENS)
    vae = vae_of(case)
    walk_channels_last(vae)
    with torch.inference_mode():
        for output in case.expected_names():
            check = encoded if output.startswith("encode") else decoded
            for comparison in check(case, vae, output):
                assert comparison.verdict()[0], comparison


@both
@pytest.mark.parametrize("form", Form)
def test_arranging_the_weights_changes_none(kind: str, form: Form) -> None:
    plain, walk = pair(kind, form)
    for name, weight in plain.state_dict().items():
        assert torch.equal(walk.state_dict()[name], weight)
    x = torch.randn(1, 3 * plain.config.patch_size**2, 5, 8, 8)
    close(Encoder.forward(walk.encoder, x, Past()), plain.encoder(x, Past()))
    close(Decoder.forward(walk.decoder, noise(1), Past()), plain.decoder(noise(1), Past()))


@both
def test_walk_remembers_as_much_as_the_modules_and_no_view(kind: str) -> None:
    plain, walk = pair(kind)
    pasts = [Past(), Past()]
    for vae, past in zip((plain, walk), pasts, strict=True):
        for group in torch.split(clip(13), [1, 4, 4, 4], dim=2):
            vae.encode_group(group, past)
    kept = [sum(frames.untyped_storage().nbytes() for frames in past.frames.values()) for past in pasts]
    assert kept[0] == kept[1] == sum(frames.nbytes for frames in pasts[1].frames.values())


def test_clips_in_threads_do_not_mix() -> None:
    _, walk = pair("flat")
    latents = [noise(4, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(walk.decode, latents))
    assert all(torch.equal(frames, walk.decode(z)) for frames, z in zip(together, latents, strict=True))


def test_large_pictures_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, walk = pair("flat")
    sizes: list[int] = []
    first = walk.encoder.downsamples[1]
    assert isinstance(first, Downsample)
    first.resample.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    together = walk.encode(clip(5))
    assert max(sizes) == 4
    monkeypatch.setattr(channels_last, "_BYTES_OF_PICTURES", 1)
    sizes.clear()
    close(walk.encode(clip(5)), together)
    assert set(sizes) == {1}
    close(together, plain.encode(clip(5)))


@both
def test_half_precision_stays_close(kind: str) -> None:
    plain, _ = pair(kind)
    torch.manual_seed(0)
    half = Vae(CONFIGS[kind]).requires_grad_(False).half()
    walk_channels_last(half, form=all_in(Form.PICTURES))
    latents, frames = half.encode(clip(5)), half.decode(noise(2))
    assert latents.dtype == frames.dtype == torch.float32
    close(latents, plain.encode(clip(5)), 0.02)
    close(frames, plain.decode(noise(2)), 0.02)


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("channels", [(3, 5), (6, 16)])
@pytest.mark.parametrize("adds_bias", [False, True])
@pytest.mark.parametrize("chunks", [[6], [1, 4, 1], [1, 1, 2, 2], [3, 3]])
def test_every_form_is_the_same_convolution(
    form: Form, channels: tuple[int, int], adds_bias: bool, chunks: list[int]
) -> None:
    torch.manual_seed(0)
    layer, past = CausalConv3d(*channels).requires_grad_(False), Past()
    x = torch.randn(1, channels[0], 6, 5, 4)
    behind_zeros = torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0))
    expected = torch.conv3d(behind_zeros, layer.weight, layer.bias)[0].permute(1, 2, 3, 0)
    convolution = arranged(layer, form, adds_bias=adds_bias)
    for frames, truth in zip(
        *(torch.split(each, chunks) for each in (x[0].permute(1, 2, 3, 0), expected)), strict=True
    ):
        room = convolution.room(frames)
        room[-len(frames) :] = frames
        close(PLAIN.total(convolution(room, past)), truth)


def test_doubling_is_repeating_and_a_convolution() -> None:
    torch.manual_seed(0)
    layer = Upsample(6, 5, temporal=False).requires_grad_(False)
    pictures = torch.randn(2, 6, 3, 4)
    doubling = Doubling(layer)
    phases = doubling(pictures.permute(0, 2, 3, 1).contiguous())
    assert phases.shape == (2, 4, 5, 20)
    out = torch.empty(2, 6, 8, 5)
    PLAIN.doubled(phases, doubling.bias, out)
    close(out, layer.resample(pictures).permute(0, 2, 3, 1))


def test_forms_follow_the_number_of_channels_on_a_gpu_only() -> None:
    gpu = torch.device("cuda")
    by_channels = {n: best_form(CausalConv3d(*n), gpu) for n in ((3, 96), (16, 384), (96, 96), (192, 192))}
    assert list(by_channels.values()) == [Form.GATHERED, Form.GATHERED, Form.PICTURES, Form.PICTURES]
    by_channels = {n: best_form(CausalConv3d(*n), gpu) for n in ((384, 384), (192, 384), (96, 192), (96, 3), (384, 16))}
    assert list(by_channels.values()) == [Form.VOLUME, Form.VOLUME, Form.VOLUME, Form.STACKED, Form.STACKED]
    assert best_form(CausalConv3d(3, 1, (3, 1, 1)), gpu) is Form.VOLUME
    assert best_form(CausalConv3d(3, 1), torch.device("cpu")) is Form.VOLUME
