"""`bunraku plan`: numbers for the real bundle, without its weights."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bunraku.cli import app

BUNDLE = str(Path(__file__).resolve().parents[2] / "bundles" / "scail-14b")


def test_a_table_shows_what_stays_on_devices_of_many_sizes() -> None:
    shown = CliRunner().invoke(app, ["plan", "--bundle", BUNDLE, "--size", "896x512", "--frames", "81"])
    assert shown.exit_code == 0
    rows = [line.split("  ")[0] for line in shown.output.splitlines() if "of 40" in line]
    assert rows[0] == "4 GiB"
    assert "48832 tokens" in shown.output
    assert "0 of 40" in shown.output
    assert "40 of 40" in shown.output


def test_a_bundle_is_found_by_its_name_too() -> None:
    asked = ["--size", "896x512", "--vram", "4GiB"]
    by_name = CliRunner().invoke(app, ["plan", "--model", "scail-14b", *asked])
    assert by_name.exit_code == 0
    assert by_name.output == CliRunner().invoke(app, ["plan", "--bundle", BUNDLE, *asked]).output
    unknown = CliRunner().invoke(app, ["plan", "--model", "scail-15b", *asked])
    assert unknown.exit_code == 2
    assert "must be one of scail-14b, scail-14b-10-steps" in unknown.output


def test_host_memory_is_told_at_its_most_with_an_offload_folder_and_without() -> None:
    asked = ["plan", "--bundle", BUNDLE, "--size", "896x512", "--frames", "81", "--vram", "12GiB"]
    told = CliRunner().invoke(app, asked).output
    assert "most pinned host memory: 15.9 GiB; streamed in each forward pass: 4.9 GiB" in told
    assert "with an offload folder: 15.1 GiB of it, and 2.5 GiB of pinned host memory" in told


def test_room_for_a_step_cache_is_counted() -> None:
    # without one 4 GiB do: the table's first row
    asked = ["plan", "--bundle", BUNDLE, "--size", "896x512", "--frames", "81", "--vram", "4GiB", "--step-cache"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 2
    assert "need 5.2" in shown.output


def test_a_budget_that_is_too_small_is_refused_with_what_is_needed() -> None:
    shown = CliRunner().invoke(app, ["plan", "--bundle", BUNDLE, "--size", "896x512", "--vram", "2GiB"])
    assert shown.exit_code == 2
    assert "--vram" in shown.output
    assert "need 3." in shown.output


def test_exact_needs_more_than_four_gib_and_balanced_does_not() -> None:
    asked = ["plan", "--bundle", BUNDLE, "--size", "896x512", "--frames", "81", "--vram", "4GiB"]
    assert "0 of 40" in CliRunner().invoke(app, asked).output
    refused = CliRunner().invoke(app, [*asked, "--precision", "exact"])
    assert refused.exit_code == 2
    assert "need 4.12" in refused.output


def test_the_encoder_streams_what_does_not_fit() -> None:
    asked = ["plan", "--bundle", BUNDLE, "--stage", "encoder"]
    assert "2 layers of the text encoder" in CliRunner().invoke(app, [*asked, "--vram", "3GiB"]).output
    assert "all on the device" in CliRunner().invoke(app, asked).output
    refused = CliRunner().invoke(app, [*asked, "--vram", "2GiB"])
    assert refused.exit_code == 2
    assert "need 2.0" in refused.output


@pytest.mark.parametrize(("option", "value"), [("--vram", "lots"), ("--size", "896"), ("--size", "axb")])
def test_values_that_are_none_are_refused_by_their_option(option: str, value: str) -> None:
    shown = CliRunner().invoke(app, ["plan", "--bundle", BUNDLE, option, value])
    assert shown.exit_code == 2
    assert option in shown.output


def test_the_vae_is_planned_in_tiles_where_whole_frames_do_not_fit() -> None:
    asked = ["plan", "--bundle", BUNDLE, "--size", "254x126", "--stage", "vae"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0
    assert "256x128" in shown.output  # whole latents
    rows = [line.split()[:3] for line in shown.output.splitlines() if "GiB  " in line]
    assert rows == [[str(gibibytes), "GiB", "whole"] for gibibytes in (3, 4, 6, 8, 12, 16, 24)]
    little = CliRunner().invoke(app, [*asked, "--vram", "1.6GiB"])
    assert "encode: whole frames, 2 at a time" in little.output
    assert "of host memory" in little.output
    refused = CliRunner().invoke(app, [*asked, "--vram", "1GiB"])
    assert refused.exit_code == 2
    assert "--vram" in refused.output
