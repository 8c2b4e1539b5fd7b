"""Works on generations: claims the next one, runs its pipeline, writes its video, and ends it.

A generation that is cancelled, runs out of time, or whose stages fail, ends; nothing waits for it any longer then.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf import json_format

from bunraku.errors import (
    BunrakuError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotThereYet,
    StageBroken,
    status_name,
)
from bunraku.v1 import denoiser_pb2
from bunraku.v1 import gateway_pb2 as pb
from gateway.assets import AssetStore, asset_id
from gateway.media import VideoWriter, fit_image, frame_rate, read_image
from gateway.pipelines.animate import Animation, Motion, animate
from gateway.progress import ProgressReport
from gateway.stages import DEFAULT_RETRY, Driving, Stages, Work
from gateway.store import Job, JobStore
from runtime import telemetry
from runtime.bundles import Bundle
from runtime.client import Budget, Retry, retrying
from runtime.server import as_bunraku_error

T = TypeVar("T")
_log = logging.getLogger(__name__)
_PATIENCE_S = 300.0
_SOLVERS = {
    "unipc": denoiser_pb2.Solver.SOLVER_UNIPC,
    "dpm++": denoiser_pb2.Solver.SOLVER_DPMPP,
    "euler": denoiser_pb2.Solver.SOLVER_EULER,
}


@dataclass(frozen=True)
class WorkerSettings:
    """How generations are worked on.

    Attributes:
        max_running: at the same time; while one is denoised the next is encoded and the one before decoded.
        max_seconds: that a generation may take from its creation.
        retry: when a stage is not ready.
        checkpoint_every_steps: so many steps of the denoiser are lost at most when it dies.
    """

    max_running: int = 3
    max_seconds: float = 6 * 3600
    retry: Retry = DEFAULT_RETRY
    checkpoint_every_steps: int = 5


class Worker:
    """Runs generations until it is cancelled."""

    def __init__(
        self,
        store: JobStore,
        assets: AssetStore,
        stages: Stages,
        bundles: Mapping[str, Bundle],
        settings: WorkerSettings,
    ) -> None:
        self._store, self._assets, self._stages = store, assets, stages
        self._bundles, self._settings = bundles, settings

    async def run(self) -> None:
        """Works on up to `max_running` generations at a time, for ever."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._settings.max_running):
                group.create_task(self._work_on_jobs())

    async def _work_on_jobs(self) -> None:
        while True:
            try:
                await self.work_on(await self._store.next_job())
            except BunrakuError as error:
                # the database is away or the claim is over; jobs stay where they are
                _log.warning("%s", error.message)
                await asyncio.sleep(1)

    async def work_on(self, job: Job) -> None:
        """One generation, to its end."""
        attributes = {telemetry.ATTRIBUTE_GENERATION: job.name}
        with telemetry.span(
            telemetry.SPAN_GENERATION, attributes, parent=telemetry.from_trace_parent(job.trace_parent)
        ):
            try:
                video = await self._run_or_stop(job)
            except BunrakuError as error:
                told = None if isinstance(error, Cancelled) else generation_error(error)
                await stored(lambda: self._store.finish(job, error=told))
            else:
                ended = await stored(lambda: self._store.finish(job, video=video))
                if ended.state != pb.GENERATION_STATE_SUCCEEDED:
                    await self._assets.delete(video.sha256)

    async def _run_or_stop(self, job: Job) -> pb.Asset:
        """The video, unless the generation is to be stopped before. Raises BunrakuError only."""
        making = asyncio.create_task(self._make(job))
        stopping = asyncio.create_task(self._store.wait_for_cancel(job))
        try:
            await asyncio.wait({making, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                raise Cancelled(f"{job.name} was cancelled")
            return making.result()
        except (asyncio.CancelledError, BunrakuError):
            raise
        except BaseException as error:
            known = as_bunraku_error(error)
            if isinstance(known, StageBroken) and not isinstance(error, BunrakuError):
                _log.exception("%s failed", job.name, exc_info=error)
            raise known from error
        finally:
            making.cancel()
            stopping.cancel()
            # the stages stop before the generation is said to have ended
            await asyncio.gather(making, stopping, return_exceptions=True)

    async def _make(self, job: Job) -> pb.Asset:
        """Runs the pipeline and stores its video."""
        request = job.request
        if request.WhichOneof("task") != "animate":
            raise NotThereYet(f"{request.WhichOneof('task')} is not there yet")
        budget = Budget.of(self._seconds_left(job))
        report = ProgressReport(lambda events, progress: stored(lambda: self._store.report(job, events, progress)))
        with tempfile.TemporaryDirectory(prefix="bunraku-") as directory:
            path = Path(directory) / "video.mp4"
            async with report:
                work = Work(job.name, budget, report, self._settings.retry)
                animation = await self._animation(request)
                output = Output(path, request)
                try:
                    await animate(animation, self._stages, work, output.open)
                    with report.stage("write"):
                        await output.close()
                finally:
                    await output.abandon()
            return await self._assets.put_file(path, f"{job.id}.mp4")

    def _seconds_left(self, job: Job) -> float:
        allowed = min(job.request.timeout_seconds or self._settings.max_seconds, self._settings.max_seconds)
        left = allowed - (time.time() - job.create_time_us / 1e6)
        if left <= 0:
            raise DeadlineExceeded(f"{job.name} waited longer than the {allowed:g} seconds that it was given")
        return left

    async def _animation(self, request: pb.CreateGenerationRequest) -> Animation:
        """Reads the assets of an animation and brings the reference to the size of the video."""
        task, output, bundle = request.animate, request.output, self._bundles[request.model]
        path = await self._assets.path(asset_id(task.reference_image, "animate.reference_image"))
        picture = await asyncio.to_thread(read_image, path, "animate.reference_image")
        reference = await asyncio.to_thread(fit_image, picture, output.height, output.width, output.size_mode)
        quirks = bundle.presets[task.preset]
        return Animation(
            reference_image=reference,
            motion=await self._motion(task),
            prompt=task.prompt,
            negative_prompt=task.negative_prompt,
            max_frames=output.num_frames,
            window_frames=bundle.video.window_frames,
            window_overlap_frames=task.window_overlap_frames,
            color_correction_strength=task.color_correction_strength,
            sampling=self._sampling(request, quirks.pose_time_origin),
            image_resize=quirks.image_resize,
            pixel_rounding=quirks.pixel_rounding,
        )

    async def _motion(self, task: pb.AnimateTask) -> Driving | bytes:
        if task.WhichOneof("motion") == "pose_video":
            return await self._read(task.pose_video, "animate.pose_video")
        mask = await self._read(task.mask_video, "animate.mask_video") if task.mask_video else None
        return Driving(await self._read(task.driving_video, "animate.driving_video"), task.people, mask, task.preset)

    async def _read(self, name: str, field: str) -> bytes:
        path = await self._assets.path(asset_id(name, field))
        return await asyncio.to_thread(path.read_bytes)

    def _sampling(self, request: pb.CreateGenerationRequest, pose_time_origin: int) -> denoiser_pb2.DenoiseParameters:
        sampling = request.sampling
        return denoiser_pb2.DenoiseParameters(
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            shift=sampling.shift,
            solver=_SOLVERS[sampling.solver],
            seed=sampling.seed,
            pose_time_origin=pose_time_origin,
            preview_every_steps=1 if request.output.previews else 0,
            checkpoint_every_steps=self._settings.checkpoint_every_steps,
        )


class Output:
    """The MP4 of a generation, written in threads."""

    def __init__(self, path: Path, request: pb.CreateGenerationRequest) -> None:
        self._path, self._request = path, request
        self._writer: VideoWriter | None = None
        self._num_frames = 0

    def open(self, motion: Motion) -> Output:
        """Takes how many frames the pose video turned out to have."""
        self._num_frames = motion.num_frames
        return self

    async def add(self, frames: npt.NDArray[np.uint8]) -> None:
        """Writes frames, uint8 [n, H, W, 3]."""
        await asyncio.to_thread(self._add, frames)

    def _add(self, frames: npt.NDArray[np.uint8]) -> None:
        if self._writer is None:
            height, width = frames.shape[1:3]
            self._writer = VideoWriter(
                self._path,
                height=height,
                width=width,
                frames_per_second=frame_rate(self._request.output.frames_per_second),
                crf=self._request.output.crf,
                title=self._request.animate.prompt,
                settings=self._settings(height, width),
            )
        self._writer.add(frames)

    async def close(self) -> None:
        assert self._writer is not None, "a clip has at least one frame"
        await asyncio.to_thread(self._writer.close)
        self._writer = None

    async def abandon(self) -> None:
        """Removes what was written of a video that was not finished."""
        if self._writer is not None:
            await asyncio.to_thread(self._writer.abort)

    def _settings(self, height: int, width: int) -> dict[str, Any]:
        """What is written into the file: the request with every default, and what was decided on the way."""
        request = json_format.MessageToDict(self._request, preserving_proto_field_name=True)
        return {
            "software": "bunraku",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "request": request,
            "seed": self._request.sampling.seed,
            "height": height,
            "width": width,
            "num_frames": self._num_frames,
            "frames_per_second": self._request.output.frames_per_second,
        }


async def stored(write: Callable[[], Awaitable[T]]) -> T:
    """Writes to the database, again and again while it is locked or full: what was computed is not given up for that."""
    return await retrying(lambda attempt: write(), Budget.of(_PATIENCE_S), Retry(patience_s=_PATIENCE_S))


def generation_error(error: BunrakuError) -> pb.GenerationError:
    """What a failed generation says of itself."""
    field = error.violations[0][0] if isinstance(error, InvalidRequest) else ""
    return pb.GenerationError(
        status=status_name(error), reason=error.reason, message=error.message, stage=error.stage, field=field
    )
