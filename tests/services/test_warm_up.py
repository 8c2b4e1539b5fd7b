"""A stage computes with its models before it lets work in, and its status says how long that took."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bunraku.v1 import stage_pb2
from runtime.bundles import Bundle
from runtime.stage import StageRuntime
from runtime.torch_stage import warming_up
from services.denoiser.service import DenoiserService
from services.encoder.service import EncoderService
from services.vae.service import VaeService
from tests.runtime.fakes import BUNDLE, FakeVae, stage
from tests.services.serving import serving

STAGES: dict[str, Callable[..., Any]] = {"encoder": EncoderService, "denoiser": DenoiserService, "vae": VaeService}


@pytest.mark.parametrize("name", STAGES)
async def test_a_stage_warms_up_before_it_serves(name: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[tuple[int, str]] = []
    async with serving(name, STAGES[name], bundle, load=False) as served:
        warm_up = served.service.warm_up

        def noting() -> None:
            states.append((served.runtime.state, served.runtime.state_detail))
            warm_up()

        monkeypatch.setattr(served.service, "warm_up", noting)
        await served.server.load()
        status = await served.status()
    assert states == [(stage_pb2.STAGE_STATE_LOADING, f"warming up {bundle.name}")]
    assert status.state == stage_pb2.STAGE_STATE_SERVING
    assert re.fullmatch(r"warmed up in \d+\.\d s", status.state_detail)


async def test_a_stage_that_cannot_compute_does_not_become_ready() -> None:
    class Unable(FakeVae):
        def load(self) -> None:
            with warming_up(self.runtime):
                raise RuntimeError("no compiler")

    async with stage(kind=Unable, load=False) as loading:
        with pytest.raises(RuntimeError, match="no compiler"):
            await loading.server.load()
        assert loading.runtime.warm_up_s is None
        assert loading.runtime.state == stage_pb2.STAGE_STATE_LOADING


async def test_the_seconds_are_those_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = StageRuntime("vae", BUNDLE)
    monkeypatch.setattr("runtime.torch_stage.time", SimpleNamespace(perf_counter=iter([10.0, 12.5]).__next__))
    with warming_up(runtime):
        pass
    assert runtime.warm_up_s == 2.5
    runtime.gpu.shutdown()
