"""`bunraku pose`: what it asks of a pose stage, the file that it writes, what it says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import grpc
import numpy as np
import numpy.typing as npt
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from PIL import Image

from bunraku import cli
from bunraku.cli.extraction import _ranges
from bunraku.tls import TlsFiles
from bunraku.v1 import pose_pb2 as pb
from bunraku.v1 import pose_pb2_grpc, tensor_pb2
from scripts.certificates import write_certificates

HEIGHT, WIDTH, FRAMES = 64, 96, 9
Frames = npt.NDArray[np.uint8]


class FakePose(pose_pb2_grpc.PoseServiceServicer):
    """Gives frames of one colour; remembers what it was asked and given."""

    def __init__(self) -> None:
        self.parameters = pb.ExtractPoseParameters()
        self.given: dict[str, bytes] = {}
        self.shapes: dict[str, list[int]] = {}
        self.refusal: tuple[str, str] | None = None

    def ExtractPose(
        self, requests: Iterator[pb.ExtractPoseRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ExtractPoseResponse]:
        name = ""
        for request in requests:
            match request.WhichOneof("message"):
                case "parameters":
                    self.parameters = request.parameters
                case "tensor":
                    name = request.tensor.name
                    self.given[name], self.shapes[name] = b"", list(request.tensor.shape)
                case "tensor_data":
                    self.given[name] += request.tensor_data
        if self.refusal is not None:
            self._refuse(context)
        yield pb.ExtractPoseResponse(info=pb.PoseInfo(num_frames=FRAMES, frames_per_second=24))
        for done in (4, FRAMES):
            yield pb.ExtractPoseResponse(
                progress=pb.PoseProgress(step="detect", completed_frames=done, total_frames=FRAMES)
            )
        gaps = [pb.PersonGaps(bridged_frames=[2, 3, 4, 7]), pb.PersonGaps(absent_frames=[0])]
        for count in (4, 5):
            yield from _tensor("pose_frames", np.zeros((count, 2, 2, 3), np.uint8))
            yield from _tensor("pose_frames_full", np.full((count, HEIGHT, WIDTH, 3), (200, 30, 90), np.uint8))
        yield pb.ExtractPoseResponse(
            progress=pb.PoseProgress(step="render", completed_frames=FRAMES, total_frames=FRAMES, people=gaps)
        )

    def FitPoseVideo(self, *_: Any) -> Any:
        raise NotImplementedError

    def RenderPose(self, *_: Any) -> Any:
        raise NotImplementedError

    def _refuse(self, context: grpc.ServicerContext) -> None:
        assert self.refusal is not None
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=self.refusal[0], description=self.refusal[1])
        status = status_pb2.Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="refused")
        status.details.add().Pack(bad)
        context.abort_with_status(rpc_status.to_status(status))


def _tensor(name: str, frames: Frames) -> Iterator[pb.ExtractPoseResponse]:
    header = tensor_pb2.TensorHeader(
        name=name, dtype=tensor_pb2.DATA_TYPE_UINT8, shape=frames.shape, size_bytes=frames.nbytes
    )
    yield pb.ExtractPoseResponse(tensor=header)
    data = frames.tobytes()
    for start in range(0, len(data), 50_000):
        yield pb.ExtractPoseResponse(tensor_data=data[start : start + 50_000])


@pytest.fixture
def fake() -> Iterator[FakePose]:
    servicer = FakePose()
    server = grpc.server(ThreadPoolExecutor(1))
    pose_pb2_grpc.add_PoseServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
    server.start()
    yield servicer
    server.stop(0).wait()


@pytest.fixture
def bunraku(fake: FakePose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs `bunraku pose dance.mp4 ...`; gives exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    _write_video(Path("dance.mp4"), 70, 100)

    def run(*arguments: str) -> tuple[int, str, str]:
        address = fake.address  # type: ignore[attr-defined]
        monkeypatch.setattr(sys, "argv", ["bunraku", "pose", "dance.mp4", "--pose", address, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def secure_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePose]:
    """Takes calls over TLS only, from who has a certificate of its authority; the environment has one."""
    directory = tmp_path / "certificates"
    write_certificates(directory)
    files = [directory / name for name in ("ca.crt", "pose.crt", "pose.key")]
    servicer, server = FakePose(), grpc.server(ThreadPoolExecutor(1))
    pose_pb2_grpc.add_PoseServiceServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", TlsFiles(*files).server_credentials())
    servicer.address = f"127.0.0.1:{port}"  # type: ignore[attr-defined]
    for name, file in zip(("CA", "CERTIFICATE", "KEY"), files, strict=True):
        monkeypatch.setenv(f"BUNRAKU_TLS_{name}", str(file))
    server.start()
    yield servicer
    server.stop(0).wait()


def _write_video(path: Path, height: int, width: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _read_video(path: Path) -> tuple[Frames, float]:
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), float(rate)


def test_the_frames_of_the_stage_become_a_video(bunraku: Any, fake: FakePose, tmp_path: Path) -> None:
    status, out, err = bunraku("-o", "new.mp4")
    assert status == 0, err
    frames, rate = _read_video(tmp_path / "new.mp4")
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert rate == 24
    assert np.abs(frames.astype(int) - (200, 30, 90)).max() < 12
    assert out.splitlines() == [
        "new.mp4: 9 frames, 24 frames/s",
        "person 1 not found, bridged from the frames around: frames 2 to 4, 7",
        "person 2 not there: frames 0",
    ]
    assert "detect: running, 4 of 9 frames" in err
    assert "render: done, 9 of 9 frames" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dance.mp4", "new.mp4"]


def test_a_stage_is_called_over_tls_with_the_certificates_of_the_environment(
    secure_fake: FakePose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_video(Path("dance.mp4"), 70, 100)
    address = secure_fake.address  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "argv", ["bunraku", "pose", "dance.mp4", "--pose", address, "-o", "new.mp4"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert len(_read_video(tmp_path / "new.mp4")[0]) == FRAMES
    monkeypatch.delenv("BUNRAKU_TLS_CA")
    monkeypatch.delenv("BUNRAKU_TLS_CERTIFICATE")
    monkeypatch.delenv("BUNRAKU_TLS_KEY")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code != 0


def test_the_stage_is_asked_for_what_was_said(bunraku: Any, fake: FakePose, tmp_path: Path) -> None:
    assert bunraku()[0] == 0
    asked = fake.parameters
    assert (asked.height, asked.width, asked.people, asked.preset) == (64, 96, 1, "")
    assert (asked.full_size, asked.over_source, asked.give_joints) == (True, False, False)
    assert fake.given == {"video": (tmp_path / "dance.mp4").read_bytes()}
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(picture).save("hero.png")
    Path("mask.mp4").write_bytes(b"mask")
    options = ["--overlay", "--people", "2", "--preset", "wan2gp", "--size", "128x32", "--frames", "13"]
    files = ["--image", "hero.png", "--mask-video", "mask.mp4", "--mask-expand", "-3", "--masks", "matanyone"]
    assert bunraku(*options, *files)[0] == 0
    asked = fake.parameters
    assert (asked.height, asked.width, asked.people, asked.preset, asked.max_frames) == (32, 128, 2, "wan2gp", 13)
    assert (asked.over_source, asked.mask_expand, asked.mask_backend) == (True, -3, "matanyone")
    assert fake.given["reference_image"] == picture.tobytes()
    assert fake.shapes["reference_image"] == [5, 7, 3]
    assert fake.given["mask_video"] == b"mask"


def test_a_refusal_names_the_option_and_leaves_no_file(bunraku: Any, fake: FakePose, tmp_path: Path) -> None:
    for field, option in (("people", "--people"), ("video", "VIDEO"), ("max_frames", "--frames")):
        fake.refusal = (field, "is wrong")
        status, _, err = bunraku("-o", "new.mp4")
        assert status == 2
        assert err.splitlines()[-1] == f"error: {option}: is wrong"
    assert [path.name for path in tmp_path.iterdir()] == ["dance.mp4"]


def test_what_cannot_be_written_is_found_out_first(bunraku: Any, fake: FakePose) -> None:
    for output, text in (("nowhere/new.mp4", "there is no directory nowhere"), ("dance.mp4", "would be overwritten")):
        status, _, err = bunraku("-o", output)
        assert status == 2
        assert text in err
    assert fake.given == {}


def test_ranges_of_frames_are_said_shortly() -> None:
    assert _ranges([0, 4, 5, 6, 9]) == "0, 4 to 6, 9"
    assert _ranges([3]) == "3"
