"""Cases of the VAEs: encode and decode, through the whole-clip calls, the streams, and beginnings of clips."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, cat, split

from runtime.weights import build_on_meta, load_weights
from services.vae.model import PRESETS, Vae, VaeConfig
from services.vae.weights import checkpoint_problems
from tests.parity.cases import Case, Comparison
from tests.parity.families import family
from tests.parity.manifests import manifest

PORTIONS = (3, 1, 0, 5, 2, 4, 7)
"""In how many frames at a time a clip is fed to the encoder, over and over; its own groups are of 1, 4, 4, ..."""


def config_of(case: Case) -> VaeConfig:
    """The case's sizes and statistics; the reference's second VAE differs in two more things."""
    is_second = case.name.startswith("vae22")
    return VaeConfig(
        dim=case.config["dim"],
        decoder_dim=case.config.get("dec_dim"),
        z_dim=case.config["z_dim"],
        dim_mult=tuple(case.config["dim_mult"]),
        num_res_blocks=case.config["num_res_blocks"],
        temporal_downsample=tuple(case.config["temperal_downsample"]),
        patch_size=2 if is_second else 1,
        residual_stages=is_second,
        latents_mean=tuple(case.config["latents_mean"]),
        latents_std=tuple(case.config["latents_std"]),
    )


def vae_of(case: Case) -> Vae:
    vae = build_on_meta(lambda: Vae(config_of(case)))
    load_weights(vae, case.weights(), source=case.name)
    return vae.eval()


@family("vae21", "vae22", on_any_device=True)
def vae(case: Case) -> Iterator[Comparison]:
    """Every stored `encodeN` and `decodeN`; N names the input, `videoN` or `latentN`."""
    model = vae_of(case)
    for name in case.expected_names():
        if name.startswith("encode"):
            yield from encoded(case, model, name)
        else:
            yield from decoded(case, model, name)


def encoded(case: Case, model: Vae, name: str) -> Iterator[Comparison]:
    frames = case.input(name.replace("encode", "video"))[None]
    expected = case.expected(name)
    yield Comparison.within(name, model.encode(frames)[0], expected, case.tolerance)
    streamed = cat(list(model.encode_stream(portions(frames))), dim=2)
    yield Comparison.within(f"{name} streamed", streamed[0], expected, case.tolerance)
    if (fewer := expected.shape[1] // 2) > 0:
        beginning = frames[:, :, : 1 + (fewer - 1) * model.config.frames_per_latent]
        yield Comparison.within(f"{name} beginning", model.encode(beginning)[0], expected[:, :fewer], case.tolerance)


def decoded(case: Case, model: Vae, name: str) -> Iterator[Comparison]:
    latents = case.input(name.replace("decode", "latent"))[None]
    expected = case.expected(name)
    yield Comparison.within(name, model.decode(latents)[0], expected, case.tolerance)
    in_twos = cat(list(model.decode_stream(split(latents, 2, dim=2))), dim=2)
    yield Comparison.within(f"{name} streamed", in_twos[0], expected, case.tolerance)
    if (fewer := latents.shape[2] // 2) > 0:
        count = 1 + (fewer - 1) * model.config.frames_per_latent
        beginning = model.decode(latents[:, :, :fewer])[0]
        yield Comparison.within(f"{name} beginning", beginning, expected[:, :count], case.tolerance)


def portions(frames: Tensor) -> Iterator[Tensor]:
    """Cuts a clip [B, C, n, H, W] into pieces of PORTIONS frames, the last of them shorter; one is empty."""
    start, turn = 0, 0
    while start < frames.shape[2]:
        size = PORTIONS[turn % len(PORTIONS)]
        yield frames[:, :, start : start + size]
        start, turn = start + size, turn + 1


@manifest("Wan2.1_VAE.pth")
def wan21(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return checkpoint_problems(shapes, PRESETS["wan2.1"])


@manifest("Wan2.2_VAE.pth")
def wan22(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return checkpoint_problems(shapes, PRESETS["wan2.2"])
