"""The benchmark of all stages on one GPU, on a machine without one: small models, and a stand-in for nvidia-smi."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import one_gpu
from benchmarks.one_gpu import DeviceWatch, Request, Row, measured, write_models
from runtime.bundles import configuration, load_bundle
from services.encoder.text import PRESETS as TEXT_ENCODERS
from services.encoder.text import TextEncoderConfig
from services.encoder.weights import load_text_encoder
from services.vae.model import PRESETS as VAES
from services.vae.model import VaeConfig
from services.vae.weights import load_vae

CPU = torch.device("cpu")
_SMI = """#!/bin/sh
case "$*" in
*compute-apps*) printf '7, 300\\n7, 200\\n8, [N/A]\\n' ;;
*loop-ms*) printf '1400\\n2400\\n1400\\n' ;;
*) echo 400 ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "nvidia-smi").write_text(_SMI)
    (directory / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_gpu, "BUNDLE", one_gpu.BUNDLES / "tiny")
    monkeypatch.setattr(one_gpu, "HEIGHT", 128)
    monkeypatch.setattr(one_gpu, "WIDTH", 128)


@pytest.mark.usefixtures("smi")
def test_the_most_that_was_taken_is_noted_of_each_process_and_of_all() -> None:
    with DeviceWatch() as device:
        deadline = time.monotonic() + 10
        while device.peaks != {"process 7": 300, "all": 2000} and time.monotonic() < deadline:
            time.sleep(0.01)
    assert device.peaks == {"process 7": 300, "all": 2000}


@pytest.mark.usefixtures("tiny")
def test_what_is_written_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_gpu, "write_joints", lambda file: None)  # the released size, which takes seconds
    bundle = load_bundle(one_gpu.BUNDLE, tmp_path / "models")
    write_models(bundle, CPU)
    text, vae = bundle.component("text_encoder"), bundle.component("vae")
    config = configuration(text, TEXT_ENCODERS, TextEncoderConfig)
    assert text.tokenizer is not None
    encoder = load_text_encoder(text.files, config, text.tokenizer, device=CPU, dtype=torch.float32)
    assert bool(encoder.encode(["a person dances"]).prompt_embeds.isfinite().all())
    load_vae(vae.files, configuration(vae, VAES, VaeConfig), device=CPU, dtype=torch.float32)


def request(level: int, denoise_s: float) -> Request:
    return Request(9.0, {"denoise": denoise_s}, np.full((2, 4, 4, 3), level, np.uint8))


def test_a_row_is_compared_with_the_first_one() -> None:
    first = Row(0, [], 30, request(7, 9), request(7, 8), 2, {"denoiser": 2048, "all": 4096})
    same = replace(first, budget=16.0)
    other = replace(first, budget=12.0, second=request(7, 10))
    other.second.frames[0] = 5  # half of the levels, which are unsigned
    assert one_gpu._line([first]).startswith(
        "| none | 0.00 | 0.00 | 2.00 | 0.00 | 4.00 | 30 | 9.00 | 9.00 | 4.000 | 1.000"
    )
    assert one_gpu._line([first, same]).endswith("| the same |")
    assert one_gpu._line([first, other]).endswith("| 5.000 | 1.250 | 1.00, 2 |")


@pytest.mark.slow
@pytest.mark.usefixtures("smi", "tiny")
def test_a_system_within_a_budget_animates_twice(tmp_path: Path) -> None:
    options = argparse.Namespace(steps=2, frames=9, precision="exact")
    row = measured(24.0, one_gpu.BUNDLE, tmp_path, options)
    assert [line.split(":")[0] for line in row.shares] == ["encoder", "pose", "denoiser", "vae"]
    assert row.second.frames.shape == (9, 128, 128, 3)
    assert np.array_equal(row.first.frames, row.second.frames)
    assert row.step_s > 0
