"""Tiles give what whole frames give: in random weights to the last digits, and in pictures of the trained VAE."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.vae_seams import differences, drawn_frames, encoded_in_tiles, near_seams, trained_vae
from runtime.weights import build_on_meta
from services.vae import channels_last
from services.vae.channels_last import walk_channels_last
from services.vae.convolution import Form
from services.vae.hosting import HostedPast, Shuttle
from services.vae.model import PRESETS, AttentionBlock, Grid, Past, ResidualBlock, Vae, VaeConfig
from services.vae.tiles import Cut, cut_of, reach_of
from tests.services.vae.test_channels_last import all_in
from tests.services.vae.test_model import CONFIGS

BUNDLE = Path(__file__).parents[3] / "bundles" / "tiny"
both = pytest.mark.parametrize("kind", CONFIGS)
GRID = Grid(2, 3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


KINDS = CONFIGS | {"released": VaeConfig(4, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)}


def precise(kind: str, form: Form | None = None, dtype: torch.dtype = torch.float64) -> Vae:
    """In float64, where rounding hides nothing."""
    torch.manual_seed(0)
    vae = Vae(KINDS[kind]).requires_grad_(False).to(dtype).eval()
    walk_channels_last(vae, form=None if form is None else all_in(form))
    return vae


def some_frames(vae: Vae, count: int = 5) -> Tensor:
    """So large that a tile in the middle of a row does not reach the sides."""
    side = 10 * vae.config.pixels_per_latent
    return torch.rand(1, 3, count, side, 2 * side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def both_ways(vae: Vae, frames: Tensor, past: Callable[[], Past] = Past) -> tuple[Tensor, Tensor]:
    """Latents and frames without normalising, which rounds to float32; in groups as the service has them."""
    encoding, decoding = past(), past()
    groups = [vae.posterior(part, encoding)[0] for part in torch.split(frames, groups_of(frames), dim=2)]
    return torch.cat(groups, dim=2), torch.cat([vae.generate(group, decoding) for group in groups], dim=2)


def groups_of(frames: Tensor) -> list[int]:
    return [1] + [4] * ((frames.shape[2] - 1) // 4)


@both
@pytest.mark.parametrize(
    "past",
    [
        lambda: Past(Grid(1, 2)),
        lambda: Past(Grid(2, 1)),
        lambda: Past(GRID),
        lambda: HostedPast(Grid(1, 1)),
        lambda: HostedPast(GRID),
    ],
)
@pytest.mark.parametrize("form", [None, Form.PICTURES])
def test_tiles_compute_what_whole_frames_do(kind: str, past: Callable[[], Past], form: Form | None) -> None:
    vae = precise(kind, form)
    frames = some_frames(vae, 9)
    for tiled, whole in zip(both_ways(vae, frames, past), both_ways(vae, frames), strict=True):
        assert (tiled - whole).abs().max() < 1e-12


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("grid", [Grid(1, 1), GRID])
@pytest.mark.parametrize("form", [None, Form.PICTURES])
def test_fewer_frames_at_a_time_change_nothing(at_once: int, grid: Grid, form: Form | None) -> None:
    vae = precise("released", form)
    latents, whole = both_ways(vae, some_frames(vae, 9))
    lengths: list[int] = []
    last = vae.decoder.upsamples[-1]
    assert isinstance(last, ResidualBlock)
    with patch.object(channels_last.Walk, "_residual", noting(channels_last.Walk._residual, last, lengths)):
        past = Past(grid, at_once)
        frames = [vae.generate(group, past) for group in torch.split(latents, 1, dim=2)]
    assert (torch.cat(frames, dim=2) - whole).abs().max() < 1e-12
    assert sorted(lengths) == sorted(([1] + [at_once] * (8 // at_once)) * grid.rows * grid.columns)
    if at_once == cut_of(vae.encoder).frames:
        tiled, _ = both_ways(vae, some_frames(vae, 9), lambda: Past(grid, at_once))
        assert (tiled - latents).abs().max() < 1e-12
        all_at_the_start, _ = vae.posterior(some_frames(vae, 9), Past(grid, at_once))
        assert (all_at_the_start - latents).abs().max() < 1e-12


def noting(method: Callable[..., Tensor], block: ResidualBlock, lengths: list[int]) -> Callable[..., Tensor]:
    """A method of the walk that notes how many frames a block gets."""

    def noted(walk: channels_last.Walk, layer: ResidualBlock, x: Tensor, past: Past) -> Tensor:
        if layer is block:
            lengths.append(len(x))
        return method(walk, layer, x, past)

    return noted


@both
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_position_less_around_a_tile_shows(kind: str, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = precise(kind)
    frames = some_frames(vae)
    whole = both_ways(vae, frames)
    shorter = [vae.get_submodule(half)]
    monkeypatch.setattr(
        channels_last, "cut_of", lambda of: replace(cut_of(of), reach=cut_of(of).reach - (of in shorter))
    )
    tiled = vae.posterior(frames, Past(GRID))[0] if half == "encoder" else vae.generate(whole[0], Past(GRID))
    assert (tiled - whole[half == "decoder"]).abs().max() > 1e-11


@both
def test_streams_in_tiles_give_the_same_pieces(kind: str) -> None:
    vae = precise(kind, dtype=torch.float32)
    frames = some_frames(vae, 9).float()
    latents = vae.encode(frames)
    pieces = list(vae.decode_stream(torch.split(latents, 1, dim=2), Past(GRID)))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4]
    torch.testing.assert_close(torch.cat(pieces, dim=2), vae.decode(latents), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoded_in_tiles(vae, frames, GRID), latents, atol=1e-5, rtol=1e-5)


@both
def test_samples_of_a_batch_have_tiles_of_their_own(kind: str) -> None:
    vae = precise(kind, dtype=torch.float32)
    frames = torch.cat([some_frames(vae), 1 - some_frames(vae)]).float()
    torch.testing.assert_close(encoded_in_tiles(vae, frames, GRID), vae.encode(frames), atol=1e-5, rtol=1e-5)


def test_what_waits_in_host_memory_is_not_on_the_device() -> None:
    vae = precise("flat", Form.PICTURES)
    frames = some_frames(vae, 9)
    alone, hosted = Past(GRID), HostedPast(GRID)
    for past in (alone, hosted):
        for part in torch.split(frames, groups_of(frames), dim=2):
            vae.encode_group(part, past)
    tiles = list(alone._parts.values())
    assert len(tiles) == len(hosted._parts) == 6
    waiting = sum(tensor.nbytes for tensor in hosted.hosted())
    assert waiting == sum(tensor.nbytes for tile in tiles for tensor in tile.frames.values())
    assert not any(tile.frames for tile in hosted._parts.values())
    here = [entry for entry in hosted._shuttle._order if entry.here is not None]
    assert len(here) == 3  # that of the last layer, and two for the next group


def test_shuttle_brings_each_its_own_and_the_next_ones_ahead() -> None:
    shuttle, layers = Shuttle(), [nn.Identity() for _ in range(5)]
    keys = [(tile, layer) for tile in ("left", "right") for layer in layers]
    assert shuttle.recall(keys[0]) is None
    for number, key in enumerate(keys):
        tensor = torch.empty(2)
        shuttle.keep(key, tensor)
        tensor.fill_(number)  # after it was kept
    for turn in (10, 20):
        for number, key in enumerate(keys):
            tensor = shuttle.recall(key)  # type: ignore[assignment]
            assert tensor is shuttle.recall(key)
            assert tensor.tolist() == [turn - 10 + number] * 2
            tensor += 10
            ahead = {number, (number + 1) % 10, (number + 2) % 10}
            assert {place for place, entry in enumerate(shuttle._order) if entry.here is not None} == ahead
    assert len(shuttle.hosted("left")) == 5
    assert len(shuttle.hosted()) == 10


def test_two_tensors_are_brought_in_turn() -> None:
    shuttle, layer = Shuttle(), nn.Identity()
    for tile in range(2):
        shuttle.keep((tile, layer), torch.full((1,), float(tile)))
    for _ in range(3):
        for tile in range(2):
            tensor = shuttle.recall((tile, layer))
            assert tensor is not None
            assert tensor.item() == tile


def test_a_clip_in_host_memory_is_gone_with_its_past() -> None:
    vae, past = precise("flat"), HostedPast(GRID)
    vae.encode_group(some_frames(vae, 1), past)
    shuttle = weakref.ref(past._shuttle)
    del past
    assert shuttle() is None


@given(size=st.integers(1, 300), count=st.integers(1, 20), reach=st.integers(0, 12))
def test_windows_cover_every_position_once_and_see_what_is_around(size: int, count: int, reach: int) -> None:
    windows = Cut((), (), reach, 2, 1).windows(size, min(count, size))
    covered = [position for window in windows for position in range(size)[window.place(1)]]
    assert covered == list(range(size))
    for window in windows:
        seen = range(size)[window.computed(1)]
        assert seen[window.kept(1)] == range(size)[window.place(1)]
        assert (seen.start, seen.stop) == (max(0, window.start - reach), min(size, window.stop + reach))
    assert max(w.stop - w.start for w in windows) - min(w.stop - w.start for w in windows) <= 1


def test_cuts_of_the_released_vaes() -> None:
    cuts = {}
    for name, config in PRESETS.items():
        vae = build_on_meta(lambda: Vae(config))  # noqa: B023 (is called at once)
        cuts[name] = [(cut.reach, cut.scale, cut.frames) for cut in (cut_of(vae.encoder), cut_of(vae.decoder))]
    # encoder: 16 pixels at a quarter; decoder: 7 pixels and the larger frame's, halved, and 6 more
    assert cuts == {"wan2.1": [(4, 4, 2), (10, 2, 1)], "wan2.2": [(4, 4, 2), (10, 2, 1)]}


def test_attention_is_never_in_a_tile() -> None:
    with pytest.raises(AssertionError, match="AttentionBlock sees more than squares"):
        reach_of([ResidualBlock(4, 4), AttentionBlock(4)])


def test_no_seam_can_be_seen_in_pictures_of_the_trained_vae() -> None:
    vae, frames = trained_vae(BUNDLE), drawn_frames(96, 144, 5)
    with torch.inference_mode():
        found = differences(vae, frames, GRID, ("ours", "bare"))
    for what in ("encode", "decode"):
        ours, bare = (found[kind, what] for kind in ("ours", "bare"))
        # levels of 255: rounding to a level hides twenty times as much
        assert max(ours.largest_at_seams, ours.largest_elsewhere) < 0.02
        assert bare.largest_at_seams > 20
    assert found["bare", "decode"].mean_at_seams > 20 * found["bare", "decode"].mean_elsewhere


def test_seams_are_looked_for_where_tiles_meet() -> None:
    near = near_seams(64, 96, GRID)
    assert near[24:40].all()
    assert near[:, 24:40].all()
    assert near[:, 56:72].all()
    assert not near[:24, :24].any()
    assert near.sum() == 64 * 96 - 48 * 64
