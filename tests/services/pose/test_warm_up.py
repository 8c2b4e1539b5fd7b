"""Before the pose stage is ready each of its networks has run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.bundles import load_bundle
from services.pose.models import load_models
from services.pose.nlf.model import CropModel
from services.pose.onnx import OnnxNetwork

TINY = Path(__file__).parents[3] / "bundles" / "tiny"


def test_every_network_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    ran: set[str] = set()
    forward, runs = CropModel.forward, {name: getattr(OnnxNetwork, name) for name in ("run", "run_on_device")}

    def located(model: CropModel, crops: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        ran.add("joints")
        return forward(model, crops, *others)  # type: ignore[arg-type]  # as it was called

    def run(name: str) -> object:
        def noting(network: OnnxNetwork, pictures: object) -> object:
            ran.add(Path(network.source).name)
            return runs[name](network, pictures)

        return noting

    monkeypatch.setattr(CropModel, "forward", located)
    for name in runs:
        monkeypatch.setattr(OnnxNetwork, name, run(name))
    models, _ = load_models(load_bundle(TINY), torch.device("cpu"))
    models.warm_up(96, 64)
    assert ran == {"joints", "detector.onnx", "whole_body.onnx"}
