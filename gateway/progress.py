"""Progress of one generation: what the stages report becomes events and an estimate of the time left.

Reports come from the pipeline at any rate and never wait; events go to the store on a task of their own, of each stage
at most one in `interval_s` besides those that begin or end something.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bunraku.v1 import denoiser_pb2
from bunraku.v1 import gateway_pb2 as pb
from gateway.jobs.claims import Told
from gateway.jobs.costs import Cost
from gateway.media import jpeg
from runtime import telemetry

RUNNING = pb.StageProgressState.STAGE_PROGRESS_STATE_RUNNING
DONE = pb.StageProgressState.STAGE_PROGRESS_STATE_DONE
RETRYING = pb.StageProgressState.STAGE_PROGRESS_STATE_RETRYING

# Share of a generation's time; measured on real models the denoiser takes almost all of it
_WEIGHTS = {
    "text": 1.0,
    "image": 1.0,
    "reference": 1.0,
    "pose": 2.0,
    "pose_latents": 3.0,
    "denoise": 80.0,
    "decode": 12.0,
}

# Work of the gateway itself, which takes no GPU
_OWN_WORK = ("write",)

# Events of so short a time are written together
_COLLECTING_S = 0.05


class Report(Protocol):
    """What a pipeline tells of itself."""

    def progress(self, stage: str, completed: int, total: int, *, window: int = 0, windows: int = 1) -> None: ...

    def retrying(self, stage: str) -> None: ...

    def preview(self, frames: npt.NDArray[np.uint8], completed_steps: int) -> None: ...

    def partial(self, completed_frames: int, total_frames: int) -> None: ...

    def denoised(self, window: int, forward_passes: denoiser_pb2.ForwardPasses) -> None: ...

    def stage(self, stage: str, *, window: int = 0, windows: int = 1) -> AbstractContextManager[None]: ...


@dataclass
class _StageState:
    """What is known of one stage."""

    message: pb.StageProgress
    begun: float
    sent: float = 0.0
    seconds_before: float = 0.0
    told_window: int = -1

    def seconds(self) -> float:
        """Spent in it so far."""
        if self.message.state == DONE:
            return self.seconds_before
        return self.seconds_before + time.monotonic() - self.begun


class ProgressReport:
    """Collects reports and passes them on; use `async with`.

    Args:
        write: stores what has come since it was called last.
        interval_s: of events of one stage.
    """

    def __init__(
        self,
        write: Callable[[Told], Awaitable[object]],
        *,
        interval_s: float = 0.25,
    ) -> None:
        self._write_reports, self._interval_s = write, interval_s
        self._stages: dict[str, _StageState] = {}
        self._begun = time.monotonic()
        self._steps_run = 0
        self._forward_passes: dict[int, denoiser_pb2.ForwardPasses] = {}
        self._events: asyncio.Queue[pb.WatchGenerationResponse] = asyncio.Queue()
        self._news, self._ending = asyncio.Event(), asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ProgressReport:
        self._writer = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Ends the writing; `told` gives what is left, to be stored with how the generation ended."""
        assert self._writer is not None
        self._ending.set()
        self._news.set()
        await self._writer

    @contextmanager
    def stage(self, stage: str, *, window: int = 0, windows: int = 1) -> Iterator[None]:
        """Marks a stage as running, and as done when its block ends well."""
        state = self._state(stage, window, windows)
        state.begun = time.monotonic()
        state.message.state = RUNNING
        self._send(state)
        attributes = {telemetry.ATTRIBUTE_WINDOW: window, telemetry.ATTRIBUTE_WINDOWS: windows}
        with telemetry.span(telemetry.SPAN_PIPELINE_PREFIX + stage, attributes):
            yield
        state.message.state = DONE
        if window + 1 == windows:
            state.message.completed = state.message.total = max(state.message.completed, state.message.total, 1)
        self._send(state)
        state.seconds_before = state.message.seconds

    def progress(self, stage: str, completed: int, total: int, *, window: int = 0, windows: int = 1) -> None:
        """`completed` of `total` units (steps or frames) of a stage are done."""
        state = self._state(stage, window, windows)
        if stage == "denoise" and state.told_window == window and completed > state.message.completed:
            self._steps_run += completed - state.message.completed
        state.told_window = window
        state.message.completed, state.message.total, state.message.state = completed, total, RUNNING
        if completed == total or time.monotonic() - state.sent >= self._interval_s or stage == "denoise":
            self._send(state)

    def retrying(self, stage: str) -> None:
        """A stage waits before it is tried again."""
        state = self._state(stage, 0, 1)
        state.message.state = RETRYING
        self._send(state)

    def preview(self, frames: npt.NDArray[np.uint8], completed_steps: int) -> None:
        """A look at the video: its middle frame goes out as JPEG."""
        picture = pb.Preview(jpeg=jpeg(frames[len(frames) // 2]), completed_steps=completed_steps)
        self._tell(pb.WatchGenerationResponse(preview=picture))

    def partial(self, completed_frames: int, total_frames: int) -> None:
        """The first frames of the video are finished."""
        partial = pb.PartialVideo(completed_frames=completed_frames, total_frames=total_frames)
        self._tell(pb.WatchGenerationResponse(partial=partial))

    def denoised(self, window: int, forward_passes: denoiser_pb2.ForwardPasses) -> None:
        """What the denoiser computes for a window; the last word on it counts."""
        self._forward_passes[window] = forward_passes

    @property
    def forward_passes(self) -> denoiser_pb2.ForwardPasses | None:
        """Of all windows so far; None where the denoiser has not said."""
        if not self._forward_passes:
            return None
        windows = self._forward_passes.values()
        return denoiser_pb2.ForwardPasses(
            computed=sum(window.computed for window in windows),
            reused=sum(window.reused for window in windows),
            omitted=sum(window.omitted for window in windows),
        )

    def message(self) -> pb.GenerationProgress:
        """How far the generation has come, and an estimate of what is left."""
        stages = [state.message for state in self._stages.values()]
        progress = pb.GenerationProgress(stages=stages, forward_passes=self.forward_passes)
        progress.fraction = min(1.0, self._done() / sum(_WEIGHTS.values()))
        elapsed = time.monotonic() - self._begun
        if progress.fraction > 0.02:
            progress.remaining.FromMilliseconds(int(1000 * elapsed * (1 - progress.fraction) / progress.fraction))
        return progress

    def told(self) -> Told:
        """What has come since it was asked for last."""
        events = [self._events.get_nowait() for _ in range(self._events.qsize())]
        return Told(events, self.message(), self.gpu_seconds, self.denoising)

    @property
    def denoising(self) -> bool:
        """A step of the denoiser has ended, and more are to come."""
        state = self._stages.get("denoise")
        return state is not None and state.message.state == RUNNING and self._steps_run > 0

    @property
    def gpu_seconds(self) -> float:
        """Spent in the stages so far, all of them together."""
        return sum(state.seconds() for stage, state in self._stages.items() if stage not in _OWN_WORK)

    def cost(self) -> Cost | None:
        """What the generation took, once it has ended; None where the denoiser did too little to tell."""
        state = self._stages.get("denoise")
        if state is None or not self._steps_run:
            return None
        per_step = state.seconds() / self._steps_run
        return Cost(per_step * max(1, state.message.windows), self.gpu_seconds - state.seconds())

    def _done(self) -> float:
        done = 0.0
        for stage, weight in _WEIGHTS.items():
            if stage in self._stages:
                message = self._stages[stage].message
                within = message.completed / message.total if message.total else 0.0
                windows = max(1, message.windows)
                # `decode` counts the frames of the whole video, `denoise` the steps of one window
                done += weight * (within if stage != "denoise" else (message.window + within) / windows)
        return done

    def _state(self, stage: str, window: int, windows: int) -> _StageState:
        if stage not in self._stages:
            self._stages[stage] = _StageState(pb.StageProgress(stage=stage), time.monotonic())
        state = self._stages[stage]
        state.message.window, state.message.windows = window, windows
        return state

    def _send(self, state: _StageState) -> None:
        now = time.monotonic()
        state.sent = now
        state.message.seconds = state.seconds_before + now - state.begun
        event = pb.WatchGenerationResponse()
        event.progress.CopyFrom(state.message)
        self._tell(event)

    async def _write(self) -> None:
        """Writes events in order, those of a moment together: each write waits for the disk."""
        while not self._ending.is_set():
            await self._news.wait()
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), _COLLECTING_S)
            if not self._ending.is_set():
                await self._write_reports(self.told())

    def _tell(self, event: pb.WatchGenerationResponse) -> None:
        self._events.put_nowait(event)
        self._news.set()
