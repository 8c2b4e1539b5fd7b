"""A stage computes with its models before it lets work in, and its status says how long that took."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bunraku.errors import OutOfMemory
from bunraku.v1 import stage_pb2
from runtime.bundles import Bundle
from runtime.stage import StageRuntime
from runtime.torch_stage import warming_up, where_it_fits
from services.denoiser.service import DenoiserService
from services.encoder.service import EncoderService
from services.pose.service import PoseService
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


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
async def test_a_device_gets_back_what_warming_up_leaves_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(f"waited for {device}"))
    monkeypatch.setattr("runtime.torch_stage.release_cached_memory", lambda: done.append("released"))
    runtime = StageRuntime("vae", BUNDLE, device=device)
    with warming_up(runtime):
        done.append("computed")
    runtime.gpu.shutdown()
    assert done == (["computed", "waited for cuda:0", "released"] if device == "cuda:0" else ["computed"])


def fail(error: Exception, made: list[weakref.ref[torch.Tensor]]) -> None:
    tensor = torch.zeros(1)
    made.append(weakref.ref(tensor))
    raise error


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemory("planned too large"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_no_reason_not_to_start(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    released: list[bool] = []
    monkeypatch.setattr("runtime.torch_stage.release_cached_memory", lambda: released.append(made[0]() is None))
    with where_it_fits("frames of 896x512"):
        fail(error, made)
    assert caplog.messages == [f"frames of 896x512: {error}"]
    assert released == [True]  # of tensors that nothing holds any more
    released.clear()
    with where_it_fits("frames of 896x512"):
        pass
    assert not released  # what has been warmed up stays


def test_other_errors_are() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), where_it_fits("frames of 896x512"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


async def test_the_pose_stage_starts_where_the_usual_frames_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Large:
        def warm_up(self, height: int, width: int) -> None:
            raise OutOfMemory(f"{width}x{height}")

    runtime = StageRuntime("pose", BUNDLE)
    service = PoseService(runtime, BUNDLE)
    monkeypatch.setattr(service, "_models", Large(), raising=False)
    service.warm_up()
    size = f"{BUNDLE.video.width}x{BUNDLE.video.height}"
    assert f"frames of {size}: {size}" in caplog.text
    runtime.gpu.shutdown()
