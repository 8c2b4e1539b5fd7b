"""Videos that are made in segments: joined they have every frame once, at its time, as it was encoded."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from gateway.media import read_metadata
from gateway.segments import SegmentedVideo
from runtime.video import probe_video
from tests.system.media import read_video

Frames = npt.NDArray[np.uint8]
HEIGHT, WIDTH = 48, 64


def clip(num_frames: int, seed: int = 0) -> Frames:
    """A picture that brightens evenly: frames between others are then coded after them (B-frames)."""
    picture = np.random.default_rng(seed).integers(0, 100, (HEIGHT // 8, WIDTH // 8, 3)).repeat(8, 0).repeat(8, 1)
    return np.stack([picture + 2 * number for number in range(num_frames)]).astype(np.uint8)


def times(path: Path, rate: Fraction) -> list[Fraction]:
    """When frames are shown, in frames."""
    found = []
    with av.open(path) as video:
        for frame in video.decode(video=0):
            assert frame.pts is not None
            assert frame.time_base is not None
            found.append(frame.pts * frame.time_base * rate)
    return found


def coded(path: Path) -> tuple[list[int], list[int]]:
    """When frames are to be decoded and shown, in the order of the file."""
    with av.open(path) as video:
        packets = [packet for packet in video.demux(video.streams.video[0]) if packet.pts is not None]
        return [int(packet.dts or 0) for packet in packets], [int(packet.pts or 0) for packet in packets]


async def made(directory: Path, sizes: list[int], rate: Fraction, restored: int = 0) -> list[bytes]:
    """A video of segments of these sizes at `out.mp4`; the first so many come from another gateway."""
    os.mkdir(directory)
    video = SegmentedVideo(directory, frames_per_second=rate, crf=8)
    segments = []
    for number, size in enumerate(sizes):
        if number < restored:
            other = SegmentedVideo(directory.parent / "other", frames_per_second=rate, crf=8)
            os.makedirs(directory.parent / "other", exist_ok=True)
            await other.add(clip(size, number))
            segments.append(await other.end_segment())
            await video.restore(segments[-1])
            continue
        frames = clip(size, number)
        for start in range(0, size, 4):
            await video.add(frames[start : start + 4])
        segments.append(await video.end_segment())
    await video.join(directory / "out.mp4", "a dance", {"seed": 7})
    await video.abandon()
    return segments


@pytest.mark.parametrize("rate", [Fraction(16), Fraction(30000, 1001)])
@pytest.mark.parametrize("sizes", [[9], [17, 12, 12], [5, 1, 1, 4], [1]])
async def test_joined_segments_have_every_frame_at_its_time(tmp_path: Path, sizes: list[int], rate: Fraction) -> None:
    segments = await made(tmp_path / "a", sizes, rate)
    alone: list[Frames] = []
    for segment in segments:
        (tmp_path / "segment.mp4").write_bytes(segment)
        alone += list(read_video(tmp_path / "segment.mp4"))
    out = tmp_path / "a" / "out.mp4"
    assert np.array_equal(read_video(out), np.stack(alone))
    assert times(out, rate) == list(range(sum(sizes)))
    decoded, shown = coded(out)
    assert all(decoding <= showing for decoding, showing in zip(decoded, shown, strict=True))
    assert decoded == sorted(set(decoded))
    assert (shown == sorted(shown)) == (max(sizes) == 1)  # or this shows nothing
    info = probe_video(out, "out")
    assert (info.num_frames, info.height, info.width) == (sum(sizes), HEIGHT, WIDTH)
    assert info.frames_per_second == rate
    assert read_metadata(out, "out") == {"seed": 7, "height": HEIGHT, "width": WIDTH}


@pytest.mark.parametrize("restored", [1, 2, 3])
async def test_a_video_that_another_gateway_began_is_the_same_file(tmp_path: Path, restored: int) -> None:
    await made(tmp_path / "a", [17, 12, 12], Fraction(16))
    await made(tmp_path / "b", [17, 12, 12], Fraction(16), restored=restored)
    assert (tmp_path / "a" / "out.mp4").read_bytes() == (tmp_path / "b" / "out.mp4").read_bytes()


async def test_what_is_given_up_leaves_only_finished_segments(tmp_path: Path) -> None:
    video = SegmentedVideo(tmp_path, frames_per_second=Fraction(16), crf=8)
    await video.add(clip(5))
    await video.end_segment()
    await video.add(clip(5))
    await video.abandon()
    await video.abandon()
    assert os.listdir(tmp_path) == ["0000.mp4"]
