"""Files that were cut off or changed to harm: they are refused by name, soon, and without taking memory."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from bunraku.errors import InvalidRequest
from gateway.media import ImageLimits, read_image
from runtime.video import VideoLimits, probe_video, read_info
from tests.system.media import write_picture, write_pose_video

FIELD = "animate.file"
HUGE = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x10000, 0xFFFF, 0)
KINDS = ("png", "jpg", "webp", "mp4", "webm")
MEBIBYTE = 1024  # in KiB, as the kernel counts memory


def encode_webm(path: Path) -> None:
    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=12)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for shade in range(0, 180, 20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A good file of each kind."""
    directory = tmp_path_factory.mktemp("files")
    picture = Image.open(write_picture(directory / "a.png", 32, 48))
    picture.save(directory / "a.jpg")
    picture.save(directory / "a.webp")
    write_pose_video(directory / "a.mp4", 9, 32, 32)
    encode_webm(directory / "a.webm")
    return {kind: (directory / f"a.{kind}").read_bytes() for kind in KINDS}


def read(path: Path) -> None:
    """As the gateway reads a file that a request names, and then as a stage does."""
    if path.suffix in (".mp4", ".webm"):
        probe_video(path, FIELD)
        read_info(path, FIELD, VideoLimits(max_frames=50))
    else:
        read_image(path, FIELD)


def is_refused(path: Path) -> bool:
    """Whether a file is refused; anything but reading it or refusing it by its field is an error."""
    try:
        read(path)
    except InvalidRequest as error:
        return [field for field, _ in error.violations] == [FIELD]
    return False


def cut_off(content: bytes) -> Iterator[bytes]:
    """The beginnings of a file: every length of its head, then some."""
    yield from (content[:length] for length in [*range(120), *range(120, len(content), max(1, len(content) // 60))])


def changed(content: bytes) -> Iterator[bytes]:
    """A file with a few numbers in it replaced by huge ones, or by anything."""
    chance = random.Random(5)
    for _ in range(250):
        result = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(content) - 8)
            match chance.randrange(3):
                case 0:
                    result[place : place + 4] = chance.choice(HUGE).to_bytes(4, "big")
                case 1:
                    result[place : place + 8] = chance.choice((2**64 - 1, 2**63 - 1, 2**40)).to_bytes(8, "big")
                case _:
                    result[place] = chance.randrange(256)
        yield bytes(result)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", [cut_off, changed])
def test_what_was_cut_off_or_changed_is_read_or_refused_at_once(
    files: dict[str, bytes], tmp_path: Path, kind: str, harm: Callable[[bytes], Iterator[bytes]]
) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(files[kind])
    assert not is_refused(path)
    used_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, slowest_s = 0, 0.0
    for content in harm(files[kind]):
        path.write_bytes(content)
        begun = time.process_time()
        refused += is_refused(path)
        slowest_s = max(slowest_s, time.process_time() - begun)
    assert refused > 20
    assert slowest_s < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used_before < 300 * MEBIBYTE


def be(number: int, size: int) -> bytes:
    return number.to_bytes(size, "big")


@pytest.mark.parametrize("side", [0xFFFF, 0x7FFF])
def test_a_jpeg_that_declares_a_huge_size_is_refused_unread(files: dict[str, bytes], tmp_path: Path, side: int) -> None:
    content = bytearray(files["jpg"])
    start_of_frame = content.index(b"\xff\xc0") + 5
    content[start_of_frame : start_of_frame + 4] = be(side, 2) * 2
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match="pixels"):
        read_image(path, FIELD, ImageLimits())


def test_a_video_that_declares_too_many_frames_is_refused_before_any_is_decoded(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(files["mp4"])
    decoded: list[object] = []
    monkeypatch.setattr("runtime.video._upright", decoded.append)
    for limits, said in (
        (VideoLimits(max_frames=8), "at most 8 frames, has 9"),
        (VideoLimits(max_seconds=0.5), "at most 0.5 seconds"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            probe_video(path, FIELD, limits)
    assert decoded == []


def test_a_video_of_a_codec_that_is_not_known_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(files["mp4"].replace(b"avc1", b"zzz1"))
    with pytest.raises(InvalidRequest, match="kind that cannot be decoded"):
        probe_video(path, FIELD)
