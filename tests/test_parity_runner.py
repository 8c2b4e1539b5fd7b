"""The parity runner: which device a case computes on, and what happens where a package is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.parity import __main__ as runner
from tests.parity.cases import CPU, Case
from tests.parity.families import fits_any_device

GOLDENS = Path(__file__).parent / "goldens"
META = torch.device("meta")


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module

    def missing(name: str) -> ModuleType:
        if name == "tests.parity.pose_detect":
            raise ModuleNotFoundError("No module named 'onnxruntime'")
        return imported(name)

    monkeypatch.setattr("importlib.import_module", missing)


def test_networks_go_to_the_device_and_the_rest_stays_on_the_host() -> None:
    runner.register(CPU)
    there = {name: fits_any_device(name) for name in ("dit-scail-history", "vae22", "umt5", "sampler-unipc", "nothing")}
    assert there == {
        "dit-scail-history": True, "vae22": True, "umt5": True, "sampler-unipc": False, "nothing": False,
    }  # fmt: skip


def test_inputs_and_weights_are_given_on_the_device_and_expectations_on_the_host() -> None:
    case = Case("vae21", GOLDENS, META)
    assert {weight.device for weight in case.weights().values()} == {META}
    assert case.input(next(iter(case.spec["inputs"]))).device == META
    assert case.expected(case.expected_names()[0]).device == CPU


@pytest.mark.usefixtures("without_onnx")
def test_a_missing_package_is_an_error_on_a_cpu() -> None:
    with pytest.raises(ModuleNotFoundError):
        runner.register(CPU)


@pytest.mark.usefixtures("without_onnx")
def test_a_missing_package_is_named_on_a_gpu_and_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.register(torch.device("cuda")) == ["pose_detect"]
    assert capsys.readouterr().out == "SKIP  the families of pose_detect: No module named 'onnxruntime'\n"
