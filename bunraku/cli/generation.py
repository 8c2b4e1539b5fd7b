"""A generation on the command line: made, followed, summed up."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from rich.console import Console

from bunraku.cli.display import Display, Row, seconds, size
from bunraku.cli.options import OPTION_OF_FIELD
from bunraku.client import DEFAULT_ADDRESS, ENDED, AnimateArguments, AsyncClient, succeeded
from bunraku.errors import BunrakuError, Cancelled
from bunraku.tls import TlsFiles
from bunraku.v1 import gateway_pb2 as pb

_CANCEL_TIMEOUT_S = 10.0
# The gateway's estimate is asked for this often while events come
_ESTIMATE_INTERVAL_S = 1.0
_STATES = {
    pb.STAGE_PROGRESS_STATE_RUNNING: "running",
    pb.STAGE_PROGRESS_STATE_DONE: "done",
    pb.STAGE_PROGRESS_STATE_RETRYING: "retrying",
}


@asynccontextmanager
async def connected(address: str | None) -> AsyncIterator[AsyncClient]:
    """A client whose gateway answers. Raises NotReady at once where none does.

    The key and the certificates come from the environment, as keys on a command line can be read by everybody.
    """
    key = os.environ.get("BUNRAKU_API_KEY", "")
    async with AsyncClient(address or DEFAULT_ADDRESS, api_key=key, tls=TlsFiles.of_environment()) as client:
        await client.connect()
        yield client


def state_name(state: pb.GenerationState.ValueType) -> str:
    """The state in small letters, such as `running`."""
    return pb.GenerationState.Name(state).removeprefix("GENERATION_STATE_").lower()


class GenerationDisplay(Display):
    """One row per file that is uploaded and per stage that works."""

    def __init__(self, console: Console, *, interval_s: float = 5.0) -> None:
        super().__init__(console, interval_s=interval_s)
        self._state = self._place = ""
        self._fraction = 0.0
        self._ends_at: float | None = None
        self._uploads: dict[str, float] = {}

    def uploaded(self, field: str, done_bytes: int, total_bytes: int) -> None:
        """Shows how far a file has come."""
        begun = self._uploads.setdefault(field, time.monotonic())
        done = done_bytes >= total_bytes
        row = Row(
            label=f"upload of {OPTION_OF_FIELD[f'animate.{field}']}",
            state="done" if done else "running",
            amount=f"{size(done_bytes)} of {size(total_bytes)}",
            fraction=done_bytes / total_bytes,
            seconds=time.monotonic() - begun,
            ticking=not done,
        )
        self.show(f"upload {field}", row)

    def happened(self, event: pb.WatchGenerationResponse) -> None:
        """Shows an event."""
        match event.WhichOneof("event"):
            case "generation":
                self.estimated(event.generation)
            case "queue":
                self._queued(event.queue)
            case "progress":
                self._advanced(event.progress)
            case "partial":
                partial = event.partial
                amount = f"{partial.completed_frames} of {partial.total_frames} frames"
                finished = partial.completed_frames >= partial.total_frames
                fraction = partial.completed_frames / max(1, partial.total_frames)
                self.show("finished", Row("finished", "done" if finished else "running", amount, fraction))

    def estimated(self, generation: pb.Generation) -> None:
        """Takes over the state of a generation and the time that it will still take.

        Its stages are shown as events tell of them: here they may be a moment behind.
        """
        self._fraction, self._ends_at = generation.progress.fraction, None
        if generation.progress.HasField("remaining") and generation.state not in ENDED:
            self._ends_at = time.monotonic() + generation.progress.remaining.ToTimedelta().total_seconds()
        state, self._place = state_name(generation.state), ""
        if state != self._state:
            self._state = state
            if generation.state not in ENDED:
                self.note(f"{generation.name}: {state}")

    def footer(self) -> str:
        if not self._state:
            return ""
        left = f", {seconds(max(0.0, self._ends_at - time.monotonic()))} left" if self._ends_at is not None else ""
        return f"{self._state}, {self._place or f'{self._fraction:.0%}'}{left}"

    def _queued(self, queue: pb.QueuePlace) -> None:
        self._place = f"number {queue.position} in the queue"
        if queue.HasField("remaining"):
            self._ends_at = time.monotonic() + queue.remaining.ToTimedelta().total_seconds()

    def _advanced(self, progress: pb.StageProgress) -> None:
        window = f" (window {progress.window + 1} of {progress.windows})" if progress.windows > 1 else ""
        amount = f"{progress.completed} of {progress.total}" if progress.total else ""
        running = progress.state != pb.STAGE_PROGRESS_STATE_DONE
        row = Row(
            label=progress.stage + window,
            state=_STATES.get(progress.state, "waiting"),
            amount=amount,
            fraction=progress.completed / progress.total if progress.total else None,
            seconds=progress.seconds,
            ticking=running,
        )
        self.show(progress.stage, row)


async def follow(client: AsyncClient, name: str, display: GenerationDisplay) -> pb.Generation:
    """Shows a generation until it has ended; gives it then, however it ended."""
    estimated_at = 0.0
    async with aclosing(client.watch(name)) as events:
        async for event in events:
            display.happened(event)
            if event.generation.state in ENDED:
                return event.generation
            if time.monotonic() - estimated_at >= _ESTIMATE_INTERVAL_S:
                display.estimated(await client.get(name))
                estimated_at = time.monotonic()
    return await client.get(name)


async def animate(
    client: AsyncClient, arguments: AnimateArguments, display: GenerationDisplay, *, detach: bool
) -> pb.Generation:
    """Makes an animation; being cancelled cancels it on the gateway too.

    Args:
        client: of the gateway.
        arguments: see AnimateArguments.
        display: where progress is shown.
        detach: only queue it.

    Raises:
        Cancelled: this task was cancelled; says what has become of the generation.
        BunrakuError: it failed.
    """
    request = await client.prepare(on_upload=display.uploaded, **arguments)
    name = ""
    try:
        generation = await client.create(request)
        name = generation.name
        return generation if detach else succeeded(await follow(client, name, display))
    except asyncio.CancelledError:
        raise await _cancelled(client, request, name) from None


async def _cancelled(client: AsyncClient, request: pb.CreateGenerationRequest, name: str) -> Cancelled:
    try:
        async with asyncio.timeout(_CANCEL_TIMEOUT_S):
            # A create that was interrupted may have been heard: the same request_id gives the generation that it made
            name = name or (await client.create(request)).name
            generation = await client.cancel(name)
    except (BunrakuError, TimeoutError) as error:
        return Cancelled(f"interrupted, but {name or 'a generation'} may go on: it could not be cancelled ({error})")
    if generation.state in ENDED and generation.state != pb.GENERATION_STATE_CANCELLED:
        return Cancelled(f"interrupted; {name} had already {state_name(generation.state)}")
    return Cancelled(f"cancelled {name}")


def summary(generation: pb.Generation, path: Path | None = None) -> str:
    """One line on the video of a generation that succeeded."""
    output, sampling = generation.request.output, generation.request.sampling
    took_s = (generation.end_time.ToDatetime() - generation.start_time.ToDatetime()).total_seconds()
    return (
        f"{path or generation.name}: {output.width}x{output.height}, {output.num_frames} frames at "
        f"{output.frames_per_second:g} fps, {size(generation.video.size_bytes)}, seed {sampling.seed}, {seconds(took_s)}"
    )
