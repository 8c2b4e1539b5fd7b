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


def test_a_budget_that_is_too_small_is_refused_with_what_is_needed() -> None:
    shown = CliRunner().invoke(app, ["plan", "--bundle", BUNDLE, "--size", "896x512", "--vram", "2GiB"])
    assert shown.exit_code == 2
    assert "--vram" in shown.output
    assert "need 3." in shown.output


@pytest.mark.parametrize(("option", "value"), [("--vram", "lots"), ("--size", "896"), ("--size", "axb")])
def test_values_that_are_none_are_refused_by_their_option(option: str, value: str) -> None:
    shown = CliRunner().invoke(app, ["plan", "--bundle", BUNDLE, option, value])
    assert shown.exit_code == 2
    assert option in shown.output
