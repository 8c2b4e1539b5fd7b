"""Works on generations: claims the next one, runs its pipeline, writes its video, and ends it.

A generation that is cancelled, runs out of time, or whose stages fail, ends; nothing waits for it any longer then. One
that is set aside for a more urgent one goes back into the queue, and so does everything when the gateway stops.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format

from bunraku.errors import (
    BunrakuError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    NotThereYet,
    StageBroken,
    status_name,
)
from bunraku.v1 import denoiser_pb2
from bunraku.v1 import gateway_pb2 as pb
from gateway.assets import AssetStore, asset_id
from gateway.jobs.claims import Claims, Stop
from gateway.jobs.job import Job
from gateway.jobs.store import JobStore
from gateway.media import ImageLimits, fit_image, frame_rate, read_image
from gateway.outputs import JobOutputs, OutputStore
from gateway.pipelines.animate import Animation, Motion, animate
from gateway.progress import ProgressReport
from gateway.segments import SegmentedVideo
from gateway.stages import DEFAULT_RETRY, Driving, Stages, Work
from gateway.turns import Turn, Turns
from runtime import telemetry
from runtime.bundles import Bundle
from runtime.client import Budget, Retry, retrying
from runtime.server import as_bunraku_error

T = TypeVar("T")
_log = logging.getLogger(__name__)
_PATIENCE_S = 300.0
_URGE_S = 1.0
_HANDED_BACK_WITHIN_S = 3.0
_SOLVERS = {
    "unipc": denoiser_pb2.Solver.SOLVER_UNIPC,
    "dpm++": denoiser_pb2.Solver.SOLVER_DPMPP,
    "euler": denoiser_pb2.Solver.SOLVER_EULER,
}
_STEP_CACHES = {
    "": denoiser_pb2.StepCache.STEP_CACHE_UNSPECIFIED,
    "tea": denoiser_pb2.StepCache.STEP_CACHE_TEA,
    "mag": denoiser_pb2.StepCache.STEP_CACHE_MAG,
}


@dataclass(frozen=True)
class WorkerSettings:
    """How generations are worked on.

    Attributes:
        max_running: at the same time; while one is denoised the next is encoded and the one before decoded.
        max_seconds: that a generation may take from its creation, where it has no deadline.
        retry: when a stage is not ready.
        checkpoint_every_steps: so many steps of the denoiser are lost at most when it dies.
        image_limits: what is still read of a reference image.
    """

    max_running: int = 3
    max_seconds: float = 6 * 3600
    retry: Retry = DEFAULT_RETRY
    checkpoint_every_steps: int = 5
    image_limits: ImageLimits = ImageLimits()  # noqa: RUF009  # frozen


class StoppedWork(Exception):
    """Work on a generation is to stop, though it has not ended."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.value)
        self.stop = stop


@dataclass(frozen=True, eq=False)
class Running:
    """A generation that is worked on."""

    job: Job
    turn: Turn
    report: ProgressReport


class Worker:
    """Runs generations until it is cancelled."""

    def __init__(
        self,
        store: JobStore,
        assets: AssetStore,
        stages: Stages,
        bundles: Mapping[str, Bundle],
        settings: WorkerSettings,
        outputs: OutputStore | None = None,
    ) -> None:
        self._outputs = outputs
        self._claims: Claims = store.claims
        self._assets, self._stages = assets, stages
        self._bundles, self._settings = bundles, settings
        self._turns = Turns(self._denoisers)
        self._running: set[Running] = set()

    async def run(self) -> None:
        """Works on up to `max_running` generations at a time, for ever; then hands back what it has.

        As many again are begun beyond that while all that run are less urgent.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._claims.keep())
                while True:
                    running = self._begun(await self._next_job())
                    group.create_task(self._work_on_job(running))
        finally:
            with suppress(NotReady, TimeoutError):  # others take it over when the leases have run out
                async with asyncio.timeout(_HANDED_BACK_WITHIN_S):
                    await self._claims.hand_back()

    async def _next_job(self) -> Job:
        while True:
            try:
                return await self._claims.next_job(self._above_priority)
            except BunrakuError as error:
                _log.warning("%s", error.message)  # the database is away
                await asyncio.sleep(1)

    def _above_priority(self) -> int | None:
        """What is begun next has a higher priority than this; None: nothing is."""
        if len(self._running) < self._settings.max_running:
            return -1
        if len(self._running) < 2 * self._settings.max_running:
            return min(running.job.priority for running in self._running)
        return None

    async def _work_on_job(self, running: Running) -> None:
        try:
            await self.work_on(running)
        except BunrakuError as error:
            # the database is away or the claim is over; the job stays where it is
            _log.warning("%s", error.message)

    async def _denoisers(self) -> int:
        """Generations that all replicas together denoise at the same time."""
        endpoints = await self._stages.denoiser.client.endpoints()
        return sum(endpoint.load.slots if endpoint.load is not None else 1 for endpoint in endpoints)

    def _begun(self, job: Job) -> Running:
        report = ProgressReport(lambda told: stored(lambda: self._claims.report(job, told)))
        running = Running(job, Turn(job.priority, job.number), report)
        self._running.add(running)
        return running

    async def work_on(self, running: Running) -> None:
        """One generation, to its end or to where it is stopped."""
        job = running.job
        attributes = {telemetry.ATTRIBUTE_GENERATION: job.name}
        try:
            with telemetry.span(
                telemetry.SPAN_GENERATION, attributes, parent=telemetry.from_trace_parent(job.trace_parent)
            ):
                tell_waited(job)
                await self._work_on(running)
        finally:
            self._running.discard(running)
            self._claims.look_again()

    async def _work_on(self, running: Running) -> None:
        job, report = running.job, running.report
        try:
            video = await self._run_or_stop(running)
        except StoppedWork as stopped:
            _log.info("%s: %s", job.name, stopped.stop.value)
            if stopped.stop is Stop.SET_ASIDE:
                told = report.told()
                await stored(lambda: self._claims.give_back(job, told))
            elif stopped.stop is Stop.CANCELLED:
                await self._end(running)
        except BunrakuError as error:
            await self._end(running, error=None if isinstance(error, Cancelled) else generation_error(error))
        else:
            with telemetry.span(telemetry.SPAN_FINISH):
                ended = await self._end(running, video=video)
            if ended.state != pb.GENERATION_STATE_SUCCEEDED:
                await self._assets.delete(video.sha256)

    async def _end(
        self, running: Running, video: pb.Asset | None = None, error: pb.GenerationError | None = None
    ) -> Job:
        """Ends a generation with what its stages have told last."""
        job, told = running.job, running.report.told()
        cost = running.report.cost() if video is not None else None
        ended = await stored(lambda: self._claims.finish(job, video=video, error=error, told=told, cost=cost))
        tell_ended(ended)
        await self._forget(job)
        return ended

    def _outputs_of(self, job: Job) -> JobOutputs | None:
        if self._outputs is None:
            return None
        return self._outputs.of_job(job.id, caller=job.caller, claim=job.claim_token)

    async def _forget(self, job: Job) -> None:
        """Removes what was kept in case that work on it had to go on somewhere else."""
        if self._outputs is not None:
            await self._outputs.forget(job.id)

    async def _run_or_stop(self, running: Running) -> pb.Asset:
        """The video, unless the generation is to be stopped before. Raises BunrakuError and StoppedWork only."""
        making = asyncio.create_task(self._make(running))
        stopping = asyncio.create_task(self._claims.wait_for_stop(running.job))
        giving_up = asyncio.create_task(running.turn.set_aside.wait())
        try:
            await asyncio.wait({making, stopping, giving_up}, return_when=asyncio.FIRST_COMPLETED)
            if making.done():
                return making.result()
            raise StoppedWork(stopping.result() if stopping.done() else Stop.SET_ASIDE)
        except (asyncio.CancelledError, BunrakuError, StoppedWork):
            raise
        except BaseException as error:
            known = as_bunraku_error(error)
            if isinstance(known, StageBroken) and not isinstance(error, BunrakuError):
                _log.exception("%s failed", running.job.name, exc_info=error)
            raise known from error
        finally:
            for task in (making, stopping, giving_up):
                task.cancel()
            # the stages stop before the generation is said to have ended
            await asyncio.gather(making, stopping, giving_up, return_exceptions=True)

    @asynccontextmanager
    async def _denoiser_turn(self, running: Running) -> AsyncIterator[None]:
        """Around a call to the denoiser: waits for its turn, and has less urgent work of other gateways set aside."""
        async with self._turns.taken(running.turn):
            urging = asyncio.create_task(self._urge(running))
            try:
                yield
            finally:
                urging.cancel()
                await asyncio.gather(urging, return_exceptions=True)

    async def _urge(self, running: Running) -> None:
        """Until the first step has ended the denoiser may be busy with what another gateway has sent it."""
        while self._claims.shared and running.job.priority > 0 and not running.report.denoising:
            with suppress(NotReady):
                await self._claims.ask_to_set_aside(running.job.priority)
            await asyncio.sleep(_URGE_S)

    async def _make(self, running: Running) -> pb.Asset:
        """Runs the pipeline and stores its video."""
        job, request, report = running.job, running.job.request, running.report
        if request.WhichOneof("task") != "animate":
            raise NotThereYet(f"{request.WhichOneof('task')} is not there yet")
        budget = Budget.of(self._seconds_left(job))
        with tempfile.TemporaryDirectory(prefix="bunraku-") as directory:
            path = Path(directory) / "video.mp4"
            async with report:
                work = Work(
                    job.name,
                    budget,
                    report,
                    self._settings.retry,
                    lambda: self._denoiser_turn(running),
                    self._outputs_of(job),
                )
                with telemetry.span(telemetry.SPAN_READ):
                    animation = await self._animation(request)
                output = Output(path, request)
                try:
                    await animate(animation, self._stages, work, output.open)
                    with report.stage("write"):
                        await output.close(report.forward_passes)
                finally:
                    await output.abandon()
            with telemetry.span(telemetry.SPAN_KEEP):
                return await self._assets.put_file(path, f"{job.id}.mp4")

    def _seconds_left(self, job: Job) -> float:
        deadline = (job.deadline_us or job.create_time_us + self._settings.max_seconds * 1e6) / 1e6
        left = deadline - time.time()
        if left <= 0:
            raise DeadlineExceeded(f"{job.name} waited past its deadline")
        return left

    async def _animation(self, request: pb.CreateGenerationRequest) -> Animation:
        """Reads the assets of an animation and brings the reference to the size of the video."""
        task, output, bundle = request.animate, request.output, self._bundles[request.model]
        path = await self._assets.path(asset_id(task.reference_image, "animate.reference_image"))
        picture = await asyncio.to_thread(read_image, path, "animate.reference_image", self._settings.image_limits)
        reference = await asyncio.to_thread(fit_image, picture, output.height, output.width, output.size_mode)
        quirks = bundle.presets[task.preset]
        return Animation(
            reference_image=reference,
            motion=await self._motion(task, bundle),
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

    async def _motion(self, task: pb.AnimateTask, bundle: Bundle) -> Driving | bytes:
        if task.WhichOneof("motion") == "pose_video":
            return await self._read(task.pose_video, "animate.pose_video")
        mask = await self._read(task.mask_video, "animate.mask_video") if task.mask_video else None
        # The bundle's own preset is not asked for by name: what the pose stage then takes may differ in its own part
        preset = "" if task.preset == bundle.preset else task.preset
        return Driving(await self._read(task.driving_video, "animate.driving_video"), task.people, mask, preset)

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
            step_cache=_STEP_CACHES[sampling.step_cache],
            step_cache_speedup=sampling.step_cache_speedup if sampling.step_cache else None,
            step_cache_start=sampling.step_cache_start,
            guidance_start=sampling.guidance_start,
            guidance_end=sampling.guidance_end if sampling.HasField("guidance_end") else None,
            cfg_zero_star=sampling.cfg_zero_star,
            zero_init_steps=sampling.zero_init_steps,
            pose_time_origin=pose_time_origin,
            preview_every_steps=1 if request.output.previews else 0,
            checkpoint_every_steps=self._settings.checkpoint_every_steps,
        )


class Output:
    """The MP4 of a generation, window by window."""

    def __init__(self, path: Path, request: pb.CreateGenerationRequest) -> None:
        self._path, self._request = path, request
        rate, crf = frame_rate(request.output.frames_per_second), request.output.crf
        self._video = SegmentedVideo(path.parent, frames_per_second=rate, crf=crf)
        self._num_frames = 0

    def open(self, motion: Motion) -> SegmentedVideo:
        """Takes how many frames the pose video turned out to have; gives what takes the frames."""
        self._num_frames = motion.num_frames
        return self._video

    async def close(self, forward_passes: denoiser_pb2.ForwardPasses | None) -> None:
        """Writes the file; forward_passes: what the denoiser has computed for it, where that is known."""
        await self._video.join(self._path, self._request.animate.prompt, self._settings(forward_passes))

    async def abandon(self) -> None:
        """Closes what is open of a video that was not finished."""
        await self._video.abandon()

    def _settings(self, forward_passes: denoiser_pb2.ForwardPasses | None) -> dict[str, Any]:
        """What is written into the file, beside its size: the request with every default, and what was decided."""
        request = json_format.MessageToDict(self._request, preserving_proto_field_name=True)
        settings = {
            "software": "bunraku",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "request": request,
            "seed": self._request.sampling.seed,
            "num_frames": self._num_frames,
            "frames_per_second": self._request.output.frames_per_second,
        }
        if forward_passes is not None:
            passes = {field.name: getattr(forward_passes, field.name) for field in forward_passes.DESCRIPTOR.fields}
            settings["forward_passes"] = passes
        return settings


async def stored(write: Callable[[], Awaitable[T]]) -> T:
    """Writes to the database, again and again while it is locked or full: what was computed is not given up for that."""
    return await retrying(lambda attempt: write(), Budget.of(_PATIENCE_S), Retry(patience_s=_PATIENCE_S))


def tell_waited(job: Job) -> None:
    """What a generation waited for until it was begun first, to the trace and the metrics."""
    if job.attempts == 1:
        created_s = job.create_time_us / 1e6
        telemetry.past_span(telemetry.SPAN_QUEUE, created_s)
        telemetry.QUEUE_SECONDS.record(max(0.0, time.time() - created_s))


def tell_ended(job: Job) -> None:
    """How a generation ended and how long after its creation, to the metrics."""
    state = pb.GenerationState.Name(job.state).removeprefix("GENERATION_STATE_").lower()
    telemetry.GENERATIONS_ENDED.add(state=state)
    telemetry.GENERATION_SECONDS.record(max(0.0, time.time() - job.create_time_us / 1e6))


def generation_error(error: BunrakuError) -> pb.GenerationError:
    """What a failed generation says of itself."""
    field = error.violations[0][0] if isinstance(error, InvalidRequest) else ""
    return pb.GenerationError(
        status=status_name(error), reason=error.reason, message=error.message, stage=error.stage, field=field
    )
