"""The quality benchmark on services that answer with the truth, or with something spoilt: what is missed is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.quality import scoring
from benchmarks.quality.bundles import with_transformer
from benchmarks.quality.scores import Score, share, table
from benchmarks.quality.services import Services
from benchmarks.quality.sheet import write_sheet
from benchmarks.quality.suite import Case, Suite, read_video
from runtime.bundles import load_bundle

SIDE, FRAMES = 64, 5
ROOT = Path(__file__).resolve().parent.parent.parent


class Perfect:
    """Services that know the truth: they animate a case exactly as its own driving clip or pose video asks."""

    def __init__(self, suite: Suite) -> None:
        cases = [*suite.motley, *suite.effects]
        self.truths = {path: case.truth for case in cases for path in (case.driving, case.pose)}

    async def animate(self, cases: Sequence[Case], motions: Sequence[Path], **arguments: object) -> list[Tensor]:
        return [self.truths[motion].clip for motion in motions]

    async def reconstruct(self, frames: Tensor) -> Tensor:
        return frames

    async def extract(self, case: Case) -> Tensor:
        return case.truth.story.driving_joints()[0]


class Mirrored(Perfect):
    """Everything comes out flipped."""

    async def animate(self, cases: Sequence[Case], motions: Sequence[Path], **arguments: object) -> list[Tensor]:
        return [video.flip(-2) for video in await super().animate(cases, motions)]

    async def extract(self, case: Case) -> Tensor:
        return await super().extract(case) * torch.tensor([-1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    torch.set_num_threads(1)
    return Suite.make(tmp_path_factory.mktemp("suite"), SIDE, motley=2, effects=2, frames=FRAMES)


def by_name(scores: Sequence[Score]) -> dict[str, Score]:
    return {score.name: score for score in scores}


async def all_scores(services: Perfect, suite: Suite) -> list[Score]:
    given = cast("Services", services)
    generated = scoring.score_generated(*await scoring.animate(given, suite), suite)
    reader, vae = scoring.score_reader(suite), await scoring.score_vae(given, suite)
    controls = await scoring.score_controls(given, suite)
    return [*reader, *vae, *await scoring.score_extraction(given, suite), *generated, *controls]


async def test_services_that_know_the_truth_miss_nothing(suite: Suite) -> None:
    scores = await all_scores(Perfect(suite), suite)
    assert [score.name for score in scores if score.missed] == []
    assert by_name(scores)["generated: PCK@0.1"].value == pytest.approx(1.0, abs=0.06)


async def test_mirrored_videos_and_poses_miss(suite: Suite) -> None:
    scores = by_name(await all_scores(Mirrored(suite), suite))
    assert scores["generated: PCK@0.1"].missed
    assert scores["pose extraction: mean error at 192 px"].missed
    assert scores["the right character of 64"].missed


def test_files_of_a_case_show_what_its_truth_says(suite: Suite) -> None:
    for case in suite.motley:
        story = case.truth.story
        for path, drawn in (
            (case.driving, story.draw_driving(SIDE, SIDE)[0]),
            (case.pose, story.draw_pose(SIDE, SIDE)[0]),
        ):
            video = read_video(path)
            assert video.shape == (FRAMES, SIDE, SIDE, 3)
            assert (video.float() - drawn.float()).abs().mean() < 8


def test_more_cases_are_those_of_fewer_and_further_ones(suite: Suite, tmp_path: Path) -> None:
    [case] = Suite.make(tmp_path, SIDE, motley=1, effects=0, frames=FRAMES).motley
    assert torch.equal(case.truth.joints, suite.motley[0].truth.joints)
    assert not torch.equal(case.truth.joints, suite.motley[1].truth.joints)


@pytest.mark.parametrize(
    ("value", "sense", "missed"),
    [(0.8, "at least", False), (0.79, "at least", True), (0.8, "at most", False), (0.81, "at most", True)],
)
def test_a_floor_is_missed_on_one_side_only(value: float, sense: Any, missed: bool) -> None:
    assert Score("", value, "", 0.8, sense).missed is missed


def test_a_score_of_nothing_is_a_miss_and_an_unmeasured_one_is_not() -> None:
    assert Score("", share([(0, 0)]), "", 0.8).missed
    assert not Score("", None, "", 0.8).missed


def test_the_table_marks_what_is_missed() -> None:
    lines = table([Score("a", 0.5, "", 0.8), Score("b", 27.96, "dB", 28), Score("c", None)]).splitlines()[2:]
    assert lines == [
        "| a | 0.500 | at least 0.8 |  | MISSED |",
        "| b | 28.0 dB | at least 28 dB |  | MISSED |",
        "| c | not measured |  |  |  |",
    ]


def test_a_bundle_with_another_transformer_keeps_everything_else(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    file.touch()
    original = load_bundle(ROOT / "bundles" / "tiny")
    changed = load_bundle(with_transformer(ROOT / "bundles" / "tiny", file, tmp_path / "bundle"))
    assert changed.component("transformer").files[0].resolve() == file
    assert not changed.component("transformer").quantization
    assert changed.component("transformer").config == original.component("transformer").config
    assert changed.component("vae").files[0].resolve() == original.component("vae").files[0].resolve()
    assert changed.sampling == original.sampling


def test_a_sheet_has_a_row_for_every_case(suite: Suite, tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.png", suite.motley, [case.truth.clip for case in suite.motley])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == 2 * SIDE
        assert sheet.width > 15 * SIDE
