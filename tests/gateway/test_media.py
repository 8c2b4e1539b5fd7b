"""Pictures and videos: what is read and how, what is refused before it is decoded, what is written."""

from __future__ import annotations

import io
import struct
import uuid
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from bunraku.errors import InvalidRequest, NotReady
from bunraku.v1 import gateway_pb2 as pb
from gateway.media import (
    ImageLimits,
    VideoWriter,
    fit_image,
    frame_rate,
    jpeg,
    read_image,
    read_metadata,
)
from runtime.video import VideoInfo, VideoLimits, probe_video

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FIELD = "animate.reference_image"
Frames = npt.NDArray[np.uint8]


def plain(colour: tuple[int, int, int], height: int = 48, width: int = 64, count: int = 1) -> Frames:
    return np.full((count, height, width, 3), colour, np.uint8)


def left_right(height: int, width: int) -> Frames:
    """Red on the left, blue on the right."""
    image: Frames = plain(RED, height, width)[0]
    image[:, width // 2 :] = BLUE
    return image


def encode(
    path: Path,
    frames: Frames,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction = Fraction(25),
    container: str | None = None,
    turned: int = 0,
    index: bool = True,
) -> Path:
    options = {} if index else {"movflags": "frag_keyframe+empty_moov"}
    with av.open(path, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if turned:
            stream.set_display_rotation(turned)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def only_sound(path: Path) -> Path:
    with av.open(path, "w") as output:
        stream = output.add_stream("aac", rate=16000)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def png_header(height: int, width: int) -> bytes:
    """A PNG that declares a size and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]  # options differ by format
    return path


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(InvalidRequest) as refused:
        read()
    (field, text), *others = refused.value.violations
    assert (field, others) == (FIELD, [])
    return text


# Pictures


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_is_read_as_rgb(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(left_right(40, 80)))
    image = read_image(path, FIELD)
    assert image.shape == (40, 80, 3)
    assert image.dtype == np.uint8
    assert np.abs(image[20, 10].astype(int) - RED).max() < 4
    assert np.abs(image[20, 70].astype(int) - BLUE).max() < 4


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    path = saved(tmp_path / "a.png", Image.fromarray(left_right(40, 80)), exif=exif)
    image = read_image(path, FIELD)
    assert image.shape == (80, 40, 3)
    assert tuple(image[10, 20]) == RED
    assert tuple(image[70, 20]) == BLUE


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (255, 0, 0, 255)
    pixels[0, 0] = (0, 0, 0, 128)
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(pixels)), FIELD)
    assert tuple(image[4, 1]) == WHITE
    assert tuple(image[4, 6]) == RED
    assert 125 <= image[0, 0, 0] <= 129


def test_a_palette_with_a_transparent_colour_becomes_white_there(tmp_path: Path) -> None:
    picture = Image.fromarray(left_right(8, 8)).quantize(2)
    transparent = picture.getpixel((0, 0))
    image = read_image(saved(tmp_path / "a.png", picture, transparency=transparent), FIELD)
    assert tuple(image[4, 1]) == WHITE
    assert tuple(image[4, 6]) == BLUE


def test_grey_pictures_of_8_and_16_bits_keep_their_brightness(tmp_path: Path) -> None:
    for name, grey in (("8.png", np.full((8, 8), 100, np.uint8)), ("16.png", np.full((8, 8), 25700, np.uint16))):
        assert tuple(read_image(saved(tmp_path / name, Image.fromarray(grey)), FIELD)[4, 4]) == (100, 100, 100)


def test_an_animated_picture_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = (Image.fromarray(plain(colour)[0]) for colour in (GREEN, RED))
    path = saved(tmp_path / "a.webp", first, save_all=True, append_images=[second], lossless=True)
    assert tuple(read_image(path, FIELD)[4, 4]) == GREEN


def test_damaged_pictures_are_refused(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for suffix in ("png", "jpg", "webp"):
        whole = saved(tmp_path / f"whole.{suffix}", noise).read_bytes()
        path = tmp_path / f"half.{suffix}"
        path.write_bytes(whole[: len(whole) // 2])
        assert "damaged" in refusal(lambda path=path: read_image(path, FIELD))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "text"), [(b"", "empty"), (b"hello", "not a PNG"), (b"GIF89a" + bytes(50), "not a PNG")]
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert text in refusal(lambda: read_image(path, FIELD))


@pytest.mark.parametrize("side", [8_000, 12_000, 30_000])  # Pillow is silent, warns, refuses
def test_a_picture_that_declares_too_many_pixels_is_refused_unread(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    assert "50000000 pixels" in refusal(lambda: read_image(path, FIELD))


def test_limits_of_pictures_are_exact(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(left_right(40, 80)))
    size = path.stat().st_size
    read_image(path, FIELD, ImageLimits(max_pixels=3200, max_bytes=size))
    assert "3199 pixels" in refusal(lambda: read_image(path, FIELD, ImageLimits(max_pixels=3199)))
    assert "bytes" in refusal(lambda: read_image(path, FIELD, ImageLimits(max_bytes=size - 1)))


def test_fitting_takes_all_of_the_picture_but_crop_keeps_its_proportions() -> None:
    image = left_right(40, 160)  # wide: CROP keeps columns 60 to 100
    image[:, :40] = GREEN
    for mode in (pb.SIZE_MODE_BUDGET, pb.SIZE_MODE_FIT):
        fitted = fit_image(image, 32, 64, mode)
        assert fitted.shape == (32, 64, 3)
        assert tuple(fitted[16, 4]) == GREEN
    cropped = fit_image(image, 32, 32, pb.SIZE_MODE_CROP)
    assert cropped.shape == (32, 32, 3)
    assert tuple(cropped[16, 4]) == RED
    assert tuple(cropped[16, 28]) == BLUE


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 255, (32, 64, 3), np.uint8)
    for mode in (pb.SIZE_MODE_BUDGET, pb.SIZE_MODE_CROP):
        assert np.array_equal(fit_image(image, 32, 64, mode), image)


def test_a_jpeg_shows_the_frame() -> None:
    with Image.open(io.BytesIO(jpeg(left_right(40, 80)))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (80, 40))
        pixel = picture.getpixel((70, 20))
    assert isinstance(pixel, tuple)
    assert np.abs(np.array(pixel) - BLUE).max() < 6


# Videos that are read


def test_a_video_is_probed(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", plain(RED, count=7), rate=Fraction(30000, 1001))
    info = probe_video(path, FIELD)
    assert info == VideoInfo(num_frames=7, frames_per_second=Fraction(30000, 1001), height=48, width=64)
    assert info.duration_s == pytest.approx(7 * 1001 / 30000)


@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize(
    ("name", "codec", "index"),
    [("a.mkv", "libx264", True), ("a.webm", "libvpx-vp9", True), ("a.mp4", "libx264", False)],
)
def test_frames_are_counted_where_the_container_does_not_tell(
    tmp_path: Path, name: str, codec: str, index: bool, count: int
) -> None:
    path = encode(tmp_path / name, plain(RED, count=count), codec=codec, index=index)
    assert probe_video(path, FIELD).num_frames == count


def test_a_video_of_odd_size_is_read(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", plain(GREEN, 47, 63, count=3), pix_fmt="yuv444p")
    info = probe_video(path, FIELD)
    assert (info.height, info.width) == (47, 63)


@pytest.mark.parametrize(("turned", "size"), [(0, (48, 64)), (90, (64, 48)), (180, (48, 64)), (270, (64, 48))])
def test_a_turned_video_has_the_size_that_is_shown(tmp_path: Path, turned: int, size: tuple[int, int]) -> None:
    info = probe_video(encode(tmp_path / "a.mp4", plain(RED, 48, 64, count=2), turned=turned), FIELD)
    assert (info.height, info.width) == size


def test_damaged_and_wrong_videos_are_refused(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", plain(RED, count=5)).read_bytes()
    cases = {
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"just some text " * 20, "not an MP4"),
        "playlist.mp4": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n", "not an MP4"),
        "picture.mp4": (png_header(10, 10), "but image/png"),
        "no-index.mp4": (whole[: whole.index(b"moov") - 4], "damaged"),
        "only-magic.mp4": (whole[:40], "damaged"),
    }
    for name, (content, text) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        for read in (probe_video, read_metadata):
            assert text in refusal(lambda read=read, path=path: read(path, FIELD))  # type: ignore[misc]


def test_a_file_without_video_stream_is_refused(tmp_path: Path) -> None:
    assert "no video stream" in refusal(lambda: probe_video(only_sound(tmp_path / "a.mp4"), FIELD))


def test_a_video_whose_frames_are_garbage_is_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3), np.uint8))
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : content.index(b"moov") - 4] = bytes(content.index(b"moov") - 4 - start)
    path.write_bytes(content)
    refusal(lambda: probe_video(path, FIELD))


def test_limits_of_videos_are_exact(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", plain(RED, 48, 64, count=10))
    size = path.stat().st_size
    probe_video(
        path,
        FIELD,
        VideoLimits(
            max_bytes=size,
            max_pixels=48 * 64,
            max_frames=10,
            max_seconds=0.4,
            max_frames_per_second=25,
        ),
    )
    over = {
        "bytes": VideoLimits(max_bytes=size - 1),
        "pixels": VideoLimits(max_pixels=48 * 64 - 1),
        "at most 9 frames": VideoLimits(max_frames=9),
        "seconds": VideoLimits(max_seconds=0.39),
        "frames per second": VideoLimits(max_frames_per_second=24),
    }
    for text, limits in over.items():
        assert text in refusal(lambda limits=limits: probe_video(path, FIELD, limits))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("number", "exact"), [(16.0, Fraction(16)), (30000 / 1001, Fraction(30000, 1001)), (12.5, Fraction(25, 2))]
)
def test_frame_rates_are_exact(number: float, exact: Fraction) -> None:
    assert frame_rate(number) == exact


# Videos that are written


def write(path: Path, frames: Frames, rate: Fraction = Fraction(16), **options: Any) -> Path:
    height, width = frames.shape[1:3]
    with VideoWriter(path, height=height, width=width, frames_per_second=rate, **options) as video:
        for part in np.array_split(frames, 3):
            video.add(part)
    return path


def test_frames_come_back_in_order_with_their_colours(tmp_path: Path) -> None:
    colours = [RED, GREEN, BLUE, (10, 200, 120), WHITE, (0, 0, 0), (128, 128, 128)]
    path = write(tmp_path / "a.mp4", np.concatenate([plain(colour) for colour in colours]), Fraction(30000, 1001))
    assert probe_video(path, FIELD) == VideoInfo(7, Fraction(30000, 1001), 48, 64)
    with av.open(path) as container:
        for frame, colour in zip(container.decode(video=0), colours, strict=True):
            assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - colour).max() <= 3
            assert (frame.format.name, frame.colorspace, frame.color_range) == ("yuv420p", 1, 1)


def test_a_video_of_one_frame_lasts_one_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", plain(RED), Fraction(16))
    assert probe_video(path, FIELD).num_frames == 1
    with av.open(path) as container:
        assert container.duration == 62_500  # microseconds


def test_the_index_comes_first_so_that_players_begin_at_once(tmp_path: Path) -> None:
    content = write(tmp_path / "a.mp4", plain(RED, count=3)).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_settings_and_title_survive_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    settings = {"seed": 2**63 - 1, "prompt": "ein Bär\n🐻", "sampling": {"shift": 7.0}}
    with VideoWriter(
        path, height=48, width=64, frames_per_second=Fraction(16), title="A bear", settings=settings
    ) as video:
        video.add(plain(RED))
    assert read_metadata(path, FIELD) == settings
    with av.open(path) as container:
        assert container.metadata["title"] == "A bear"


def test_a_video_without_settings_has_none(tmp_path: Path) -> None:
    assert read_metadata(write(tmp_path / "ours.mp4", plain(RED)), FIELD) == {}
    for number, comment in enumerate(["not JSON", "[1, 2]", "[" * 100_000]):
        path = tmp_path / f"{number}.mp4"
        with av.open(path, "w") as output:
            output.metadata["comment"] = comment
            stream = output.add_stream("libx264", rate=25)
            stream.height = stream.width = 64
            output.mux(stream.encode(av.VideoFrame.from_ndarray(plain(RED, 64, 64)[0])))
            output.mux(stream.encode(None))
        assert read_metadata(path, FIELD) == {}


def test_crf_decides_on_the_quality(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (3, 48, 64, 3), np.uint8)
    sizes = [write(tmp_path / f"{crf}.mp4", noise, crf=crf).stat().st_size for crf in (0, 20, 51)]
    assert sizes[0] > 1.5 * sizes[1] > 3 * sizes[2]


def test_the_same_frames_give_the_same_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3), np.uint8)
    assert write(tmp_path / "a.mp4", noise).read_bytes() == write(tmp_path / "b.mp4", noise, crf=8).read_bytes()


def test_videos_are_written_without_what_makes_equal_frames_differ(tmp_path: Path) -> None:
    """It shows in some pictures, on some processors, some of the time: so what x264 says of itself is looked at."""
    with VideoWriter(tmp_path / "a.mp4", height=48, width=64, frames_per_second=Fraction(25)) as writer:
        writer.add(plain(RED))
    content = (tmp_path / "a.mp4").read_bytes()
    assert b"x264 - core" in content
    assert b" mbtree=0 " in content


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, height=48, width=64, frames_per_second=Fraction(16)) as video:
        video.add(plain(RED, count=3))
        assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_an_aborted_video_leaves_nothing_and_spares_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"before")

    def fail_after(count: int) -> None:
        with VideoWriter(path, height=48, width=64, frames_per_second=Fraction(16)) as video:
            video.add(plain(RED, count=count))
            raise RuntimeError("a stage failed")

    for count in (0, 3):
        with pytest.raises(RuntimeError, match="stage"):
            fail_after(count)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"before"


def test_a_video_without_frames_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    video = VideoWriter(tmp_path / "a.mp4", height=48, width=64, frames_per_second=Fraction(16))
    with pytest.raises(ValueError, match="at least one frame"):
        video.close()
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_and_other_frames_are_errors(tmp_path: Path) -> None:
    for height, width in ((47, 64), (48, 63), (0, 64)):
        with pytest.raises(ValueError, match="even"):
            VideoWriter(tmp_path / "a.mp4", height=height, width=width, frames_per_second=Fraction(16))
    video = VideoWriter(tmp_path / "a.mp4", height=48, width=64, frames_per_second=Fraction(16))
    for frames in (plain(RED, 64, 48), plain(RED)[0], plain(RED).astype(np.float32)):
        with pytest.raises(ValueError, match="frames must be"):
            video.add(frames)  # type: ignore[arg-type]  # one of them is float
    video.abort()


@pytest.mark.parametrize("count", [3, 60])  # found out when closing, when adding
def test_a_full_disk_is_not_ready_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(uuid, "uuid4", lambda: SimpleNamespace(hex="full"))
    (tmp_path / ".full.part").symlink_to("/dev/full")
    noise = np.random.default_rng(0).integers(0, 255, (count, 48, 64, 3), np.uint8)
    with pytest.raises(NotReady) as refused:
        write(tmp_path / "a.mp4", noise)
    assert refused.value.reason == "DISK_FULL"
    assert list(tmp_path.iterdir()) == []
