"""The benchmark of a whole request adds up what it measured, and says what it only calculated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.request import SMALL, Clip, Report, Row, Stages, first_beside_second, pose_seconds
from services.denoiser.precision import BALANCED
from services.denoiser.step_cache import MAG, StepCache

CPU = torch.device("cpu")
PUBLISHED = Clip(512, 896, 65, 30, None)


@pytest.fixture(scope="module", autouse=True)
def inference() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages(SMALL, CPU, BALANCED)


def report(clip: Clip = PUBLISHED, step_s: list[float] | None = None) -> Report:
    steps = step_s or [5.0] * clip.steps
    rows = [Row("poses", 1.0), Row("denoise", sum(steps), 30.0)]
    return Report("a GPU", BALANCED, clip, rows, 50.0, steps)


def test_a_request_passes_all_stages_and_takes_all_steps(stages: Stages) -> None:
    clip = Clip(64, 96, 5, 3, None)
    rows = stages.request(clip, clip.steps)
    assert [row.stage for row in rows] == [
        "encode text, twice", "encode image", "VAE: encode reference", "VAE: encode poses", "denoise, 3 steps", "VAE: decode",
    ]  # fmt: skip
    assert all(row.seconds > 0 for row in rows)
    assert len(stages.step_s) == 3
    assert sum(stages.step_s) <= rows[4].seconds


def test_steps_that_reuse_count_no_arithmetic(stages: Stages) -> None:
    full, cached = Clip(64, 96, 5, 6, None), Clip(64, 96, 5, 6, StepCache(MAG, 2.0))
    forwards = stages.forwards(cached)
    assert (stages.forwards(full).computed, forwards.computed + forwards.reused) == (12, 12)
    assert forwards.reused > 0
    *_, of_full, decode = stages.floors(full)
    *_, of_cached, _ = stages.floors(cached)
    assert of_cached / of_full == pytest.approx(forwards.computed / 12)
    assert decode > 0


def test_the_total_is_the_sum_of_what_was_measured() -> None:
    whole = report()
    assert whole.total_s == 151
    assert "CALCULATED" not in str(whole)
    assert "| all | **151.0** | | |" in str(whole)
    assert "| SCAIL's own code, as published | 720, 4.8 times as long | | |" in str(whole)
    assert "50.0, ratio 3.02" in str(whole)


def test_steps_that_were_left_out_take_as_long_as_the_later_ones_and_that_is_said() -> None:
    some = report(step_s=[9.0, 4.0, 5.0, 5.0])
    assert some.denoise_s == 23 + 26 * 5
    assert some.total_s == 1 + 23 + 26 * 5
    assert "| denoise, the other 26 steps, CALCULATED | 130.00 |" in str(some)
    assert "**154.0** (calculated from some steps)" in str(some)
    assert some.document()["steps_calculated"] == 26


def test_only_the_published_case_stands_beside_the_official_time() -> None:
    assert "SCAIL" not in str(report(Clip(512, 896, 81, 30, None)))


def test_first_and_second_request_stand_beside_each_other(stages: Stages) -> None:
    table = first_beside_second(stages, Clip(64, 64, 5, 1, None), is_warm=True)
    assert "denoise: warmed up in" in table
    assert table.count("\n| ") == 9
    assert "not warmed up" in first_beside_second(stages, Clip(64, 64, 5, 1, None), is_warm=False)


def test_seconds_of_poses_come_from_a_rate_or_from_their_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pose_seconds(65, 50.0) == 1.3

    def run(command: list[str], **options: object) -> object:
        assert command[1:] == ["-m", "benchmarks.pose_chain", "--frames", "65"]
        return type("Done", (), {"stdout": "NVIDIA H100: 65 frames of 512x896 in 1.00 s, 65.0 frames/s\nsteps"})

    monkeypatch.setattr("subprocess.run", run)
    assert pose_seconds(65, None) == 1.0
