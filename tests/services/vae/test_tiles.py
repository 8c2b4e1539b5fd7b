"""Tiles give what whole frames give: in random weights to the last digits, and in pictures of the trained VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.vae_seams import differences, drawn_frames, encoded_in_tiles, near_seams, trained_vae
from runtime.weights import build_on_meta
from services.vae import channels_last
from services.vae.channels_last import walk_channels_last
from services.vae.model import PRESETS, AttentionBlock, Grid, Past, ResidualBlock, Vae
from services.vae.tiles import Cut, cut_of, reach_of
from tests.services.vae.test_model import CONFIGS

BUNDLE = Path(__file__).parents[3] / "bundles" / "tiny"
both = pytest.mark.parametrize("kind", CONFIGS)
GRID = Grid(2, 3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def precise(kind: str) -> Vae:
    """In float64, where rounding hides nothing."""
    torch.manual_seed(0)
    vae = Vae(CONFIGS[kind]).requires_grad_(False).double().eval()
    walk_channels_last(vae)
    return vae


def some_frames(vae: Vae, count: int = 5) -> Tensor:
    """So large that a tile in the middle of a row does not reach the sides."""
    side = 10 * vae.config.pixels_per_latent
    return torch.rand(1, 3, count, side, 2 * side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def both_ways(vae: Vae, frames: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """Latents and frames without normalising, which rounds to float32."""
    halves = vae.posterior(frames, past)[0], Past(past.grid, is_hosted=past.is_hosted)
    return halves[0], vae.generate(halves[0], halves[1])


@both
@pytest.mark.parametrize("grid", [Grid(1, 2), Grid(2, 1), GRID])
def test_tiles_compute_what_whole_frames_do(kind: str, grid: Grid) -> None:
    vae = precise(kind)
    frames = some_frames(vae)
    for tiled, whole in zip(both_ways(vae, frames, Past(grid)), both_ways(vae, frames, Past()), strict=True):
        assert (tiled - whole).abs().max() < 1e-12


@both
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_position_less_around_a_tile_shows(kind: str, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = precise(kind)
    frames = some_frames(vae)
    whole = both_ways(vae, frames, Past())
    shorter = [vae.get_submodule(half)]
    monkeypatch.setattr(
        channels_last, "cut_of", lambda of: replace(cut_of(of), reach=cut_of(of).reach - (of in shorter))
    )
    tiled = vae.posterior(frames, Past(GRID))[0] if half == "encoder" else vae.generate(whole[0], Past(GRID))
    assert (tiled - whole[half == "decoder"]).abs().max() > 1e-11


@both
def test_streams_in_tiles_give_the_same_pieces(kind: str) -> None:
    vae = precise(kind).float()
    frames = some_frames(vae, 9).float()
    latents = vae.encode(frames)
    pieces = list(vae.decode_stream(torch.split(latents, 1, dim=2), Past(GRID)))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4]
    torch.testing.assert_close(torch.cat(pieces, dim=2), vae.decode(latents), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoded_in_tiles(vae, frames, GRID), latents, atol=1e-5, rtol=1e-5)


@both
def test_samples_of_a_batch_have_tiles_of_their_own(kind: str) -> None:
    vae = precise(kind).float()
    frames = torch.cat([some_frames(vae), 1 - some_frames(vae)]).float()
    torch.testing.assert_close(encoded_in_tiles(vae, frames, GRID), vae.encode(frames), atol=1e-5, rtol=1e-5)


def test_what_waits_in_host_memory_comes_back_unchanged_and_nothing_else_stays() -> None:
    vae = precise("flat")
    frames = some_frames(vae, 9)
    for group in (Past(GRID, is_hosted=True), Past(GRID)):
        latents = [vae.encode_group(part, group) for part in torch.split(frames, [1, 4, 4], dim=2)]
        torch.testing.assert_close(torch.cat(latents, dim=2), vae.encode(frames))
        tiles = [group.part(key) for key in list(group._parts)]
        hosted = sum(tensor.nbytes for tensor in group.hosted())
        kept = sum(tensor.nbytes for tile in tiles for tensor in tile.frames.values())
        assert len(tiles) == 6
        assert (hosted > 0, kept > 0) == (group.is_hosted, not group.is_hosted)


@given(size=st.integers(1, 300), count=st.integers(1, 20), reach=st.integers(0, 12))
def test_windows_cover_every_position_once_and_see_what_is_around(size: int, count: int, reach: int) -> None:
    windows = Cut((), (), reach, 2).windows(size, min(count, size))
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
        cuts[name] = [(cut.reach, cut.scale) for cut in (cut_of(vae.encoder), cut_of(vae.decoder))]
    # encoder: 16 pixels at a quarter; decoder: 7 pixels and the larger frame's, halved, and 6 more
    assert cuts == {"wan2.1": [(4, 4), (10, 2)], "wan2.2": [(4, 4), (10, 2)]}


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
