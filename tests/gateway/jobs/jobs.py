"""Jobs to test with."""

from __future__ import annotations

from collections.abc import Sequence

from bunraku.v1 import gateway_pb2 as pb
from gateway.callers.identity import Caller, Scope
from gateway.jobs.claims import Told
from gateway.jobs.job import Job
from gateway.jobs.store import JobStore

NO_PROGRESS = pb.GenerationProgress()


def animation(
    request_id: str = "", *, priority: int = 0, steps: int = 10, side: int = 64
) -> pb.CreateGenerationRequest:
    """A request with its defaults filled in."""
    request = pb.CreateGenerationRequest(request_id=request_id, model="tiny", priority=priority)
    request.animate.prompt = "a dancer"
    request.sampling.num_inference_steps = steps
    request.output.height, request.output.width, request.output.num_frames = side, side, 9
    return request


async def created(
    store: JobStore,
    request_id: str = "",
    *,
    digest: str = "d",
    priority: int = 0,
    caller: str = "",
    weight: float = 1.0,
    timeout_s: float | None = None,
) -> Job:
    return await store.create(
        animation(request_id, priority=priority),
        request_digest=digest,
        caller=Caller(caller, frozenset(Scope), weight),
        timeout_s=timeout_s,
    )


async def claimed(store: JobStore) -> Job:
    await created(store)
    return await store.claims.next_job()


async def ended(store: JobStore, gpu_seconds: float = 0.0) -> Job:
    """Begins the next job, works on it for so long, and ends it."""
    job = await store.claims.claim_next()
    assert job is not None
    await store.claims.report(job, told([], gpu_seconds=gpu_seconds))
    return await store.claims.finish(job, video=video())


def step(completed: int) -> pb.WatchGenerationResponse:
    return pb.WatchGenerationResponse(progress=pb.StageProgress(stage="denoise", completed=completed))


def told(
    events: Sequence[pb.WatchGenerationResponse],
    progress: pb.GenerationProgress = NO_PROGRESS,
    *,
    gpu_seconds: float = 0.0,
    denoising: bool = False,
) -> Told:
    return Told(events, progress, gpu_seconds, denoising)


def video(sha256: str = "a" * 64) -> pb.Asset:
    return pb.Asset(name=f"assets/{sha256}", sha256=sha256, media_type="video/mp4", size_bytes=7)
