"""One GPU for all stages: every share is one that its stage can keep to, and together they are no more than there is."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bunraku.cli import app, plan_device
from bunraku.cli.plan_device import GIB, Clip, Share, device_shares
from bunraku.cli.serve import _within
from runtime.budget import DoesNotFit
from runtime.bundles import Bundle, load_bundle

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SCAIL, TINY = BUNDLES / "scail-14b", BUNDLES / "tiny"
SMALL = Clip(256, 128, 17)  # quick to count


@cache
def shares(gibibytes: float) -> dict[str, Share]:
    """Of SCAIL."""
    found = device_shares(load_bundle(SCAIL), SMALL, int(gibibytes * GIB))
    assert [share.stage for share in found] == ["encoder", "pose", "denoiser", "vae"]
    return {share.stage: share for share in found}


@pytest.mark.parametrize("gibibytes", [9, 12, 40, 80])
def test_shares_are_no_more_than_the_device(gibibytes: int) -> None:
    assert sum(share.vram_bytes for share in shares(gibibytes).values()) <= gibibytes * GIB


def test_what_remains_goes_to_the_denoiser_until_it_has_enough_and_then_to_the_encoder() -> None:
    little, more, most = shares(9), shares(12), shares(80)
    assert little["encoder"].vram_bytes == more["encoder"].vram_bytes < most["encoder"].vram_bytes
    for_denoiser, for_pose = (more[stage].vram_bytes - little[stage].vram_bytes for stage in ("denoiser", "pose"))
    assert for_denoiser > 2 * GIB
    assert for_denoiser + for_pose == 3 * GIB
    assert little["vae"].vram_bytes == more["vae"].vram_bytes < most["vae"].vram_bytes
    assert "0 layers of the text encoder" in little["encoder"].words
    assert "all on the device" in most["encoder"].words
    assert "40 of 40 blocks" in most["denoiser"].words


def test_a_denoiser_that_ends_up_on_the_device_needs_room_in_host_memory_first() -> None:
    assert shares(80)["denoiser"].words.startswith("40 of 40 blocks")
    assert 15 * GIB < shares(80)["denoiser"].host_bytes < 17 * GIB


def test_pose_has_masks_of_several_people_where_that_leaves_the_vae_its_least() -> None:
    assert "a frame at a time, no masks, no room for sam2 and matanyone" in shares(7.5)["pose"].words
    assert re.match(r"(8|16) frames at a time, sam2 streamed", shares(9)["pose"].words)
    assert "32 frames at a time, sam2, matanyone with its first frame on the CPU" in shares(80)["pose"].words
    assert shares(9)["pose"].host_bytes > GIB // 2
    assert shares(80)["pose"].vram_bytes < 6 * GIB  # it does no better with more


def test_pose_takes_nothing_where_the_bundle_finds_nobody() -> None:
    bundle = load_bundle(SCAIL)
    kept = {name: component for name, component in bundle.components.items() if name != "joints_3d"}
    found = device_shares(replace(bundle, components=kept), SMALL, 7 * GIB)
    assert [(share.vram_bytes, share.environment) for share in found if share.stage == "pose"] == [(0, {})]


def test_stages_that_can_hold_nothing_back_are_refused_with_the_numbers_of_all() -> None:
    with pytest.raises(
        DoesNotFit, match=r"of 6\.00 GiB the encoder needs 2\.06, pose 1\.\d\d and the denoiser \d\.\d\d, .* VAE"
    ):
        shares(6)


def test_a_stage_keeps_to_its_share_by_its_settings() -> None:
    found = shares(9)
    vram = {stage: share.environment.get("BUNRAKU_VRAM") for stage, share in found.items()}
    assert vram == {stage: str(found[stage].vram_bytes) for stage in ("encoder", "pose", "denoiser", "vae")}
    assert found["denoiser"].environment["BUNRAKU_MEMORY_MODE"] == "hybrid"
    assert found["vae"].environment["BUNRAKU_MAX_CONCURRENT"] == "1"
    assert found["vae"].environment["BUNRAKU_PRECISION"] == "balanced"  # float16, which the count is of


def test_serve_gives_every_stage_its_share() -> None:
    environments = _within("12GiB", TINY, None)
    assert set(environments) == {"encoder", "pose", "denoiser", "vae"}
    assert int(environments["vae"]["BUNRAKU_VRAM"]) > GIB // 2


def test_serve_refuses_what_does_not_fit_and_what_is_not_one_gpu() -> None:
    for options in (["--vram", "3GiB"], ["--vram", "16GiB", "--devices", "vae=cuda:1"], ["--vram", "lots"]):
        refused = CliRunner().invoke(app, ["serve", "--bundle", str(TINY), *options])
        assert refused.exit_code == 2
        assert "--vram" in refused.output


def test_plan_shows_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_device, "device_shares", lambda bundle, clip, budget: list(shares(12).values()))
    asked = ["plan", "--bundle", str(SCAIL), "--stage", "all"]
    one = CliRunner().invoke(app, [*asked, "--vram", "12GiB"])
    assert one.exit_code == 0
    assert all(stage in one.output for stage in ("encoder", "pose", "denoiser", "vae"))
    assert f"{shares(12)['denoiser'].vram_bytes / GIB:.2f} GiB" in one.output
    table = CliRunner().invoke(app, asked)
    assert [line.split()[0] for line in table.output.splitlines() if " GiB  " in line] == [
        "12",
        "16",
        "24",
        "32",
        "48",
        "80",
    ]


def test_a_step_cache_that_stages_inherit_has_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Clip] = []

    def shares(bundle: Bundle, clip: Clip, budget: int) -> list[Share]:
        asked.append(clip)
        return []

    monkeypatch.setattr(plan_device, "device_shares", shares)
    for setting in ("false", "true"):
        monkeypatch.setenv("BUNRAKU_STEP_CACHE", setting)
        _within("12GiB", TINY, None)
    assert [clip.cached_branches for clip in asked] == [0, 2]
