"""A video that is made window by window: each window is a finished file, and the whole is joined from them.

What was encoded once is never encoded again: a generation that goes on after its gateway was killed puts the segments
of finished windows where they belong, and the joined video has the frames of an undisturbed one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from gateway.blobs import full_disk_is_not_ready
from gateway.media import VideoWriter

Frames = npt.NDArray[np.uint8]


class SegmentedVideo:
    """Writes segments in threads.

    Args:
        directory: for the segments; the owner removes it.
        frames_per_second: exact.
        crf: quality of H.264, see VideoWriter.
    """

    def __init__(self, directory: Path, *, frames_per_second: Fraction, crf: int) -> None:
        self._directory, self._frames_per_second, self._crf = directory, frames_per_second, crf
        self._segments: list[Path] = []
        self._writer: VideoWriter | None = None

    async def add(self, frames: Frames) -> None:
        """Writes frames, uint8 [n, H, W, 3], after those before."""
        await asyncio.to_thread(self._add, frames)

    async def end_segment(self) -> bytes:
        """Finishes the segment that frames were added to last; gives its content."""
        writer, self._writer = self._writer, None
        assert writer is not None, "a window has at least one frame"
        await asyncio.to_thread(writer.close)
        self._segments.append(self._next)
        return await asyncio.to_thread(self._segments[-1].read_bytes)

    async def restore(self, segment: bytes) -> None:
        """Puts a segment that was finished earlier in its place."""

        def write() -> None:
            with full_disk_is_not_ready():
                self._next.write_bytes(segment)

        await asyncio.to_thread(write)
        self._segments.append(self._next)

    async def join(self, path: Path, title: str, settings: Mapping[str, object]) -> None:
        """Writes the whole video; what `settings` says, and the size of the frames, can be read from it."""
        await asyncio.to_thread(join_segments, self._segments, path, self._frames_per_second, title, settings)

    async def abandon(self) -> None:
        """Closes what is open; to be called at the end, whatever happened."""
        if self._writer is not None:
            await asyncio.to_thread(self._writer.abort)
            self._writer = None

    def _add(self, frames: Frames) -> None:
        if self._writer is None:
            height, width = frames.shape[1:3]
            rate = self._frames_per_second
            self._writer = VideoWriter(self._next, height=height, width=width, frames_per_second=rate, crf=self._crf)
        self._writer.add(frames)

    @property
    def _next(self) -> Path:
        return self._directory / f"{len(self._segments):04d}.mp4"


def join_segments(
    segments: Sequence[Path], path: Path, frames_per_second: Fraction, title: str, settings: Mapping[str, object]
) -> None:
    """Joins videos of the same size, rate and quality without encoding them again.

    Raises:
        NotReady: the disk is full.
    """
    times = [time for time, _ in _packets(segments, frames_per_second)]
    # frames are stored in the order in which they are decoded; each is decoded so long before the first is shown that
    # none is shown before it is decoded
    delay = max(position - time for position, time in enumerate(times))
    with full_disk_is_not_ready(), av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as whole:
        with av.open(segments[0]) as first:
            template = first.streams.video[0]
            stream = whole.add_stream_from_template(template)
            size = {"height": template.height, "width": template.width}
        whole.metadata.update({"title": title, "comment": json.dumps({**settings, **size}, sort_keys=True)})
        for position, (time, packet) in enumerate(_packets(segments, frames_per_second)):
            packet.stream, packet.time_base = stream, 1 / frames_per_second
            packet.pts, packet.dts, packet.duration = time, position - delay, 1
            whole.mux(packet)


def _packets(segments: Sequence[Path], frames_per_second: Fraction) -> Iterator[tuple[int, Any]]:
    """The coded frames of all segments, each with its number in the whole video, in the order of decoding."""
    before = 0
    for segment in segments:
        with av.open(segment) as part:
            count = 0
            for packet in part.demux(part.streams.video[0]):
                if packet.pts is not None:  # the last is empty
                    yield before + round(packet.pts * packet.time_base * frames_per_second), packet
                    count += 1
        before += count
