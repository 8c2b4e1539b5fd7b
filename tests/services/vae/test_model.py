"""Streams, causality, memory and dtypes of the VAEs, at tiny sizes with random weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from runtime.weights import build_on_meta
from services.vae.model import (
    PRESETS,
    AverageDown,
    CausalConv3d,
    Downsample,
    DuplicateUp,
    Past,
    RMSNorm,
    Upsample,
    Vae,
    VaeConfig,
    from_uint8,
    patchify,
    regroup,
    to_uint8,
    unpatchify,
)

MEAN, STD = (0.5, -1.0, 0.0, 0.25), (2.0, 0.5, 1.0, 3.0)
CONFIGS = {
    "flat": VaeConfig(
        dim=4,
        z_dim=4,
        dim_mult=(1, 2, 4),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        latents_mean=MEAN,
        latents_std=STD,
    ),
    "residual": VaeConfig(
        dim=4,
        decoder_dim=8,
        z_dim=4,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        patch_size=2,
        residual_stages=True,
        latents_mean=MEAN,
        latents_std=STD,
    ),
}
both = pytest.mark.parametrize("kind", CONFIGS)


@cache
def tiny_vae(kind: str) -> Vae:
    torch.manual_seed(0)
    return Vae(CONFIGS[kind]).requires_grad_(False).eval()


def clip(frames: int, seed: int = 0, side: int = 16) -> Tensor:
    return torch.rand(1, 3, frames, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(latents: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 4, latents, 2, 2, generator=torch.Generator().manual_seed(seed))


@both
@settings(max_examples=6, deadline=None)
@given(portions=st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_frames_in_any_portions_give_exactly_the_same_latents(kind: str, portions: list[int]) -> None:
    vae, frames = tiny_vae(kind), clip(1 + sum(portions))
    streamed = list(vae.encode_stream(torch.split(frames, [1, *portions], dim=2)))
    assert all(latent.shape[2] == 1 for latent in streamed)
    assert torch.equal(torch.cat(streamed, dim=2), vae.encode(frames))


@both
@settings(max_examples=6, deadline=None)
@given(portions=st.lists(st.integers(1, 2), min_size=1, max_size=3))
def test_latents_in_any_portions_give_the_same_frames(kind: str, portions: list[int]) -> None:
    vae, latents = tiny_vae(kind), noise(sum(portions))
    streamed = list(vae.decode_stream(torch.split(latents, portions, dim=2)))
    counts = [4 * portion for portion in portions]
    counts[0] -= 3
    assert [frames.shape[2] for frames in streamed] == counts
    torch.testing.assert_close(torch.cat(streamed, dim=2), vae.decode(latents), atol=1e-5, rtol=1e-5)


@both
def test_latents_one_by_one_give_exactly_the_decoded_frames(kind: str) -> None:
    vae, latents = tiny_vae(kind), noise(4)
    streamed = list(vae.decode_stream(latents[:, :, [i]] for i in range(4)))
    assert torch.equal(torch.cat(streamed, dim=2), vae.decode(latents))


@both
def test_whole_clip_as_one_group_encodes_like_groups_of_four(kind: str) -> None:
    vae, frames = tiny_vae(kind), clip(13)
    torch.testing.assert_close(vae.encode_group(frames, Past()), vae.encode(frames), atol=1e-5, rtol=1e-5)


@both
def test_frames_after_the_last_whole_group_are_dropped(kind: str) -> None:
    vae, frames = tiny_vae(kind), clip(8)
    assert torch.equal(vae.encode(frames), vae.encode(frames[:, :, :5]))
    assert vae.encode(frames[:, :, :4]).shape[2] == 1


@both
def test_beginning_of_a_clip_encodes_to_the_beginning_of_its_latents(kind: str) -> None:
    vae, frames = tiny_vae(kind), clip(9)
    latents = vae.encode(frames)
    assert torch.equal(vae.encode(frames[:, :, :5]), latents[:, :, :2])
    assert torch.equal(vae.encode(frames[:, :, :1]), latents[:, :, :1])


@both
def test_a_latent_changes_only_its_own_and_later_frames(kind: str) -> None:
    vae, latents = tiny_vae(kind), noise(4)
    frames = vae.decode(latents)
    for k in range(1, 4):
        changed = latents.clone()
        changed[:, :, k] += 1
        differs = (vae.decode(changed) != frames).amax(dim=(0, 1, 3, 4))
        assert differs.nonzero().min() == 4 * k - 3


@both
def test_a_frame_changes_later_latents_through_the_past(kind: str) -> None:
    vae, frames = tiny_vae(kind), clip(9)
    changed = frames.clone()
    changed[:, :, 4] *= -1
    differs = (vae.encode(changed) != vae.encode(frames)).amax(dim=(0, 1, 3, 4))
    assert differs.tolist() == [False, True, True]


@both
def test_interleaved_streams_do_not_mix(kind: str) -> None:
    vae = tiny_vae(kind)
    clips, latents = [clip(9, seed) for seed in (1, 2)], [noise(3, seed) for seed in (1, 2)]
    encoders = [vae.encode_stream(frames.split(2, dim=2)) for frames in clips]  # type: ignore[no-untyped-call]
    decoders = [vae.decode_stream(z.split(1, dim=2)) for z in latents]  # type: ignore[no-untyped-call]
    rounds = list(zip(*encoders, *decoders, strict=True))
    results = [torch.cat(pieces, dim=2) for pieces in zip(*rounds, strict=True)]
    expected = [vae.encode(frames) for frames in clips] + [vae.decode(z) for z in latents]
    assert all(torch.equal(result, alone) for result, alone in zip(results, expected, strict=True))


def test_threads_share_one_vae() -> None:
    vae = tiny_vae("flat")
    latents = [noise(4, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(vae.decode, latents))
    assert all(torch.equal(frames, vae.decode(z)) for frames, z in zip(together, latents, strict=True))


@both
def test_past_keeps_at_most_two_frames_per_layer_and_no_view(kind: str) -> None:
    vae, past = tiny_vae(kind), Past()
    convolutions = [m for m in vae.encoder.modules() if isinstance(m, CausalConv3d)]
    sizes = []
    for frames in regroup([clip(21)], first=1, then=4):
        vae.encode_group(frames, past)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in past.frames.values()))
    assert set(past.frames) == set(convolutions)
    assert max(tensor.shape[2] for tensor in past.frames.values()) == 2
    assert sizes[-1] == sum(tensor.nbytes for tensor in past.frames.values())
    assert len(set(sizes)) == 1


def live_bytes() -> int:
    """Bytes of all tensors, save parameters, that something still refers to."""
    tensors = [tensor for tensor in gc.get_objects() if type(tensor) is Tensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@both
def test_streams_hold_the_same_memory_however_long_the_clip(kind: str) -> None:
    vae = tiny_vae(kind)
    pictures = (clip(4, seed) for seed in range(9))
    latents = (noise(1, seed) for seed in range(9))
    for stream in (vae.encode_stream(pictures), vae.decode_stream(latents)):
        held = [live_bytes() for i, _ in enumerate(stream) if i in (2, 8)]
        assert held[0] == held[1]


def test_latents_come_as_soon_as_their_frames_have() -> None:
    taken = 0

    def chunks() -> Iterator[Tensor]:
        nonlocal taken
        for seed in range(3):
            taken += 4
            yield clip(4, seed)

    assert [taken for _ in tiny_vae("flat").encode_stream(chunks())] == [4, 8, 12]


def test_regroup_lets_go_of_a_chunk_whose_last_frames_still_wait() -> None:
    alive: list[bool] = []

    def chunks() -> Iterator[Tensor]:
        first = clip(3)
        storage = weakref.ref(first.untyped_storage())
        yield first
        del first
        yield clip(1)
        alive.append(storage() is not None)

    assert len(list(regroup(chunks(), first=1, then=4))) == 1
    assert alive == [False]


def test_regroup_cuts_any_portions_into_one_frame_and_then_fours() -> None:
    frames = torch.arange(11.0).view(1, 1, 11, 1, 1)
    groups = regroup(torch.split(frames, [2, 0, 6, 3], dim=2), first=1, then=4)
    assert [group.flatten().tolist() for group in groups] == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]


@both
def test_normalised_latents_have_the_statistics_taken_out(kind: str) -> None:
    vae = tiny_vae(kind)
    raw = noise(2)
    normalised = vae.normalise(raw)
    torch.testing.assert_close(normalised[0, 1], (raw[0, 1] + 1.0) / 0.5)
    torch.testing.assert_close(vae.denormalise(normalised), raw)


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_weights_give_float32_latents_and_frames(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    vae = Vae(CONFIGS[kind]).requires_grad_(False).to(dtype)
    latents, frames = vae.encode(clip(5)), vae.decode(noise(2))
    assert latents.dtype == frames.dtype == torch.float32
    torch.testing.assert_close(latents, tiny_vae(kind).encode(clip(5)), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(frames, tiny_vae(kind).decode(noise(2)), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_brings_every_position_to_length_sqrt_of_channels_and_keeps_zeros(dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 3, 2, 2).to(dtype)
    x[:, :, 1] = 0
    norm = RMSNorm(6).to(dtype)
    norm.gamma.data[:] = torch.arange(1, 7).view(6, 1, 1, 1)
    x64 = x.double()
    expected = x64 / x64.pow(2).sum(1, keepdim=True).sqrt().clamp_min(1e-12) * 6**0.5 * norm.gamma.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=0, rtol=2 * torch.finfo(dtype).eps * 6)


def test_norm_of_half_precision_does_not_overflow() -> None:
    x = torch.full((1, 4, 1, 1, 1), 1000.0, dtype=torch.float16)
    assert RMSNorm(4).half()(x).flatten().tolist() == [1.0] * 4


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_causal_convolution_is_a_convolution_behind_zeros(frames: int) -> None:
    torch.manual_seed(1)
    conv = CausalConv3d(3, 5).requires_grad_(False)
    x = torch.randn(1, 3, 7, 6, 4)
    whole = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias)
    past = Past()
    pieces = [conv(piece, past) for piece in torch.split(x, frames, dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-5, rtol=1e-5)


def test_first_frame_passes_the_changes_of_frame_rate_alone() -> None:
    torch.manual_seed(1)
    down, up = Downsample(4, temporal=True).requires_grad_(False), Upsample(4, 2, temporal=True).requires_grad_(False)
    x = torch.randn(1, 4, 5, 8, 8)
    halved, doubled = down(x, Past()), up(x, Past())
    assert halved.shape == (1, 4, 3, 4, 4)
    assert doubled.shape == (1, 2, 9, 16, 16)
    conv = down.resample[1]
    assert isinstance(conv, nn.Conv2d)
    spatial = F.conv2d(F.pad(x[:, :, 0], (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(halved[:, :, 0], spatial)
    # what comes after the first frame does not look back on it when it is doubled
    x[:, :, 0] += 1
    assert torch.equal(up(x, Past())[:, :, 1:], doubled[:, :, 1:])
    assert not torch.equal(down(x, Past())[:, :, 1:], halved[:, :, 1:])


def test_doubled_frames_alternate_between_the_halves_of_the_channels() -> None:
    up = Upsample(2, 2, temporal=True).requires_grad_(False)
    assert up.time_conv is not None
    assert up.time_conv.bias is not None
    up.time_conv.weight.zero_()
    up.time_conv.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    past = Past()
    past.at_start = False
    doubled = up.double_rate(torch.zeros(1, 2, 2, 1, 1), past)
    assert doubled.flatten(2)[0].tolist() == [[1, 3, 1, 3], [2, 4, 2, 4]]


def test_patches_number_the_row_fastest_and_unfold_again() -> None:
    frames = torch.zeros(1, 3, 1, 4, 4)
    frames[0, 1, 0, 1, 0] = 5
    frames[0, 1, 0, 0, 1] = 6
    patches = patchify(frames, 2)
    assert patches.shape == (1, 12, 1, 2, 2)
    assert patches[0, :, 0, 0, 0].nonzero().flatten().tolist() == [5, 6]
    assert patches[0, 5:7, 0, 0, 0].tolist() == [5, 6]
    x = torch.randn(2, 3, 3, 4, 6)
    assert torch.equal(unpatchify(patchify(x, 2), 2), x)


def test_average_shortcut_puts_a_frame_per_channel_and_zeros_before_the_first() -> None:
    x = torch.randn(1, 3, 1, 4, 4)
    averaged = AverageDown(6, frames=2, side=2)(x)
    assert averaged[:, 0::2].abs().max() == 0
    torch.testing.assert_close(averaged[:, 1::2, 0], F.avg_pool2d(x[:, :, 0], 2))
    later = torch.randn(1, 3, 4, 4, 4)
    torch.testing.assert_close(AverageDown(6, frames=2, side=2)(later)[:, 0::2, 1], F.avg_pool2d(later[:, :, 2], 2))
    assert torch.equal(AverageDown(3, frames=1, side=1)(x), x)


def test_duplicate_shortcut_spreads_channels_over_rows_and_doubles_all_but_the_first_frame() -> None:
    x, past = torch.randn(1, 4, 2, 3, 3), Past()
    nearest = x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert torch.equal(DuplicateUp(4, 4, frames=2, side=2)(x, past), nearest[:, :, 1:])
    past.at_start = False
    assert torch.equal(DuplicateUp(4, 4, frames=2, side=2)(x, past), nearest)
    rows = DuplicateUp(4, 2, frames=1, side=2)(x, past)
    assert torch.equal(rows[0, 1, 0, 0::2, 0::2], x[0, 2, 0])
    assert torch.equal(rows[0, 1, 0, 1::2, 1::2], x[0, 3, 0])


@both
def test_every_weight_takes_part_in_training_on_whole_clips(kind: str) -> None:
    torch.manual_seed(0)
    vae = Vae(CONFIGS[kind])
    mean, log_variance = vae.posterior(clip(9), Past())
    frames = vae.generate(mean + log_variance, Past())
    torch.autograd.backward(frames.square().mean())
    without = [name for name, weight in vae.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert frames.shape == (1, 3, 9, 16, 16)
    assert without == []


def test_pixel_levels_survive_the_way_to_floats_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    frames = from_uint8(levels)
    assert frames.shape == (1, 3, 1, 16, 16)
    assert frames.min() == -1
    assert frames.max() == 1
    assert torch.equal(to_uint8(frames), levels)


def test_pixels_are_clamped_and_rounded_or_truncated() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 7.0]).view(1, 3, 2, 1, 1)
    assert to_uint8(values).permute(3, 0, 1, 2).flatten().tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(values, "truncate").permute(3, 0, 1, 2).flatten().tolist() == [0, 0, 127, 254, 255, 255]
    # the known loss of a truncating round trip
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 3)
    lower = (levels != to_uint8(from_uint8(levels), "truncate"))[..., 0].flatten().nonzero().flatten()
    assert lower.tolist() == list(range(1, 64))


@pytest.mark.parametrize("name", PRESETS)
def test_released_vaes_remember_as_many_tensors_as_the_released_code(name: str) -> None:
    vae = build_on_meta(lambda: Vae(PRESETS[name]))
    counts = [sum(isinstance(m, CausalConv3d) for m in half.modules()) for half in (vae.encoder, vae.decoder)]
    assert counts == [24, 32]


def test_presets_state_the_strides_of_the_released_vaes() -> None:
    strides = {name: (config.frames_per_latent, config.pixels_per_latent) for name, config in PRESETS.items()}
    assert strides == {"wan2.1": (4, 8), "wan2.2": (4, 16)}


def test_frames_come_in_twos_where_only_one_stage_halves_the_rate() -> None:
    config = VaeConfig(dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
    vae = Vae(config).requires_grad_(False)
    assert (config.frames_per_latent, config.pixels_per_latent) == (2, 2)
    latents = vae.encode(clip(6))
    assert latents.shape == (1, 16, 3, 8, 8)
    assert vae.decode(latents).shape == (1, 3, 5, 16, 16)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"z_dim": 8}, "latents_mean needs z_dim = 8 entries, got 16"),
        ({"latents_std": (1.0,)}, "latents_std needs z_dim = 16 entries, got 1"),
        ({"dim_mult": (1, 2)}, "temporal_downsample needs 1 entries, got 3"),
    ],
)
def test_config_whose_lengths_do_not_fit_is_refused(entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VaeConfig(**entries)  # type: ignore[arg-type]
