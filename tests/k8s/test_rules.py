"""Prometheus' own tool says that the rules are right and that each alert fires when it should."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.rendered import K8S

TESTS = Path(__file__).with_name("alerts.yaml")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The rules as Prometheus takes them, and their tests beside them."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian's package `prometheus`) is not installed")
    manifest = yaml.safe_load((K8S / "components/prometheus/rules.yaml").read_text())
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": manifest["spec"]["groups"]}))
    shutil.copy(TESTS, tmp_path)
    return tmp_path


def promtool(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=directory, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_alerts_fire_when_they_should_and_rules_give_the_right_seconds(directory: Path) -> None:
    done = promtool(directory, "test", "rules", TESTS.name)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.slow
def test_a_threshold_that_is_off_is_found(directory: Path) -> None:
    rules = (directory / "rules.yaml").read_text()
    assert rules.count("> 0.05") == 1
    (directory / "rules.yaml").write_text(rules.replace("> 0.05", "> 0.5"))
    assert promtool(directory, "test", "rules", TESTS.name).returncode != 0


def test_every_alert_has_a_case() -> None:
    manifest = yaml.safe_load((K8S / "components/prometheus/rules.yaml").read_text())
    alerts = {rule["alert"] for group in manifest["spec"]["groups"] for rule in group["rules"] if "alert" in rule}
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test.get("alert_rule_test", [])]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
