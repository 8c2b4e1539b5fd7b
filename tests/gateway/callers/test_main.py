"""`bunraku keys`: keys made, shown and ended on the gateway's machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.callers.__main__ import app
from gateway.callers.keys import KeyStore, split_key
from gateway.jobs.database import Database


class Terminal:
    """Runs commands on one data directory."""

    def __init__(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("BUNRAKU_DATABASE", "BUNRAKU_DATA"):
            monkeypatch.delenv(name, raising=False)
        self.data = data

    def run(self, *words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--data", str(self.data)], env={"COLUMNS": "200"})

    def done(self, *words: str) -> str:
        result = self.run(*words)
        assert result.exit_code == 0, result.output
        return result.stdout


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(tmp_path / "data", monkeypatch)


async def test_the_key_is_the_only_line_on_stdout_and_opens_the_gateway(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bunraku.cli", "keys", "create", "studio", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: ASYNC221  # nothing else runs
    parts = split_key(done.stdout.strip())
    assert parts is not None
    assert f"this is key {parts[0]} of studio for the gateway in {tmp_path}" in done.stderr
    database = Database(tmp_path / "gateway.sqlite")
    key = await KeyStore(database).with_id(parts[0])
    await database.close()
    assert key is not None
    assert key.has(parts[1])


def test_what_is_asked_for_is_what_the_list_shows(terminal: Terminal) -> None:
    limits = ["--rate", "60", "--active", "3", "--gpu-seconds", "7200.5", "--weight", "2.5", "--expires", "90d"]
    made = json.loads(terminal.done("create", "studio", "--scope", "read", "--scope", "admin", *limits, "--json"))
    (listed,) = json.loads(terminal.done("list", "--json"))
    secret = made.pop("key")
    assert made == listed
    assert (listed["caller"], listed["scopes"], listed["weight"]) == ("studio", ["admin", "read"], 2.5)
    assert listed["limits"] == {"calls a minute": 60, "generations": 3, "GPU seconds a day": 7200.5}
    assert listed["state"] == "valid"
    table = terminal.done("list")
    for shown in (listed["id"], "admin, read", "60 calls a minute", listed["expire_time"][:10]):
        assert shown in table
    assert secret not in table
    assert secret.rpartition("_")[2] not in table


def test_a_revoked_key_is_shown_as_such(terminal: Terminal) -> None:
    made = json.loads(terminal.done("create", "studio", "--json"))
    assert terminal.done("revoke", made["id"]) == f"key {made['id']} of studio is revoked\n"
    (listed,) = json.loads(terminal.done("list", "--json"))
    assert listed["state"] == "revoked"


def test_a_certificate_in_place_of_a_secret(terminal: Terminal) -> None:
    text = terminal.done("create", "studio", "--certificate", "renderer")
    assert "clients with a certificate for renderer are studio" in text
    assert "bunraku_" not in text


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["create", "Studio"], 2, "caller: must be"),
        (["create", "studio", "--rate", "0"], 2, "requests_per_minute: must be above 0"),
        (["create", "studio", "--expires", "0d"], 2, "must be a number of hours or days"),
        (["create", "studio", "--scope", "everything"], 2, "everything"),
        (["revoke", "000000000000"], 1, "there is no key 000000000000"),
    ],
)
def test_what_is_wrong_is_said_on_stderr(terminal: Terminal, words: list[str], status: int, said: str) -> None:
    result = terminal.run(*words)
    assert result.exit_code == status
    assert said in result.stderr
    assert result.stdout == ""
