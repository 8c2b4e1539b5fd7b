"""A small version of benchmarks/quality: the trained tiny bundle animates drawn characters as it should, and a fault in the
chain shows as a score that is missed.

Every stage is its real service behind a real server in this process, led by the real pipeline, so that a fault can be
put into the middle of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import torch
from PIL import Image
from torch import Tensor

from benchmarks.quality.scoring import extraction_error, known_again
from benchmarks.quality.services import Services
from benchmarks.quality.suite import Case, Suite
from bunraku.v1 import denoiser_pb2
from gateway.pipelines.animate import Animation, Motion, animate
from gateway.stages import DenoiserStage, Driving, EncoderStage, PoseStage, Stages, VaeStage, Work
from runtime.bundles import Bundle, load_bundle
from runtime.client import Budget
from services.denoiser import model
from services.denoiser.service import DenoiserService
from services.encoder.service import EncoderService
from services.pose.draw import halved
from services.pose.service import PoseService
from services.vae.service import VaeService
from tests.services.serving import serving
from training.figures.measures import effects_asked, effects_shown, pose_hits, psnr

ROOT = Path(__file__).resolve().parent.parent.parent
SERVICES: dict[str, Any] = {
    "encoder": EncoderService,
    "pose": PoseService,
    "denoiser": DenoiserService,
    "vae": VaeService,
}
FLOOR = 0.65
"""Of PCK@0.1 of one clip; that of many is benchmarks/quality's to tell."""
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Silence:
    """A report that nobody reads."""

    def progress(self, stage: str, completed: int, total: int, *, window: int = 0, windows: int = 1) -> None: ...

    def retrying(self, stage: str) -> None: ...

    def preview(self, frames: npt.NDArray[np.uint8], completed_steps: int) -> None: ...

    def partial(self, completed_frames: int, total_frames: int) -> None: ...

    def denoised(self, window: int, forward_passes: denoiser_pb2.ForwardPasses) -> None: ...

    def stage(self, stage: str, *, window: int = 0, windows: int = 1) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass
class Tape:
    """A video that keeps its frames."""

    frames: list[npt.NDArray[np.uint8]] = field(default_factory=list)

    def open(self, motion: Motion) -> Tape:
        return self

    async def add(self, frames: npt.NDArray[np.uint8]) -> None:
        self.frames += [frame.copy() for frame in frames]

    async def end_segment(self) -> bytes:
        return b""

    async def restore(self, segment: bytes) -> None:
        raise AssertionError("nothing was kept")


@dataclass(frozen=True)
class Chain:
    """The stages with the tiny bundle."""

    bundle: Bundle
    stages: Stages

    async def animate(self, case: Case, *, reference: npt.NDArray[np.uint8] | None = None) -> Tensor:
        """The video of a case from its raw driving clip: uint8 [T, side, side, 3]."""
        tape, bundle = Tape(), self.bundle
        sampling, quirks = bundle.sampling, bundle.quirks
        with Image.open(case.reference) as picture:
            shown = np.asarray(picture.convert("RGB"))
        animation = Animation(
            reference_image=shown if reference is None else reference,
            motion=Driving(case.driving.read_bytes(), 1, None, ""),
            prompt=case.caption,
            negative_prompt=sampling.negative_prompt,
            max_frames=bundle.video.window_frames,
            window_frames=bundle.video.window_frames,
            window_overlap_frames=bundle.video.window_overlap_frames,
            color_correction_strength=bundle.video.color_correction_strength,
            sampling=denoiser_pb2.DenoiseParameters(
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                shift=sampling.shift,
                solver=denoiser_pb2.Solver.Value(f"SOLVER_{sampling.solver.upper().replace('++', 'PP')}"),
                seed=7,
                pose_time_origin=quirks.pose_time_origin,
            ),
            image_resize=quirks.image_resize,
            pixel_rounding=quirks.pixel_rounding,
        )
        await animate(animation, self.stages, Work("generations/quality", Budget.of(300), Silence()), tape.open)
        return torch.from_numpy(np.stack(tape.frames))

    def services(self, directory: Path) -> Services:
        """As the benchmark calls single stages."""
        client: Any = None  # no gateway here
        return Services(client, self.stages.vae.client, self.stages.pose.client, directory)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chain() -> AsyncIterator[Chain]:
    bundle = load_bundle(ROOT / "bundles" / "tiny")
    async with AsyncExitStack() as stack:
        clients = {
            stage: (await stack.enter_async_context(serving(stage, service, bundle))).client
            for stage, service in SERVICES.items()
        }
        stages = Stages(
            EncoderStage(clients["encoder"]),
            PoseStage(clients["pose"]),
            DenoiserStage(clients["denoiser"]),
            VaeStage(clients["vae"]),
        )
        yield Chain(bundle, stages)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    side = load_bundle(ROOT / "bundles" / "tiny").video.height
    return Suite.make(tmp_path_factory.mktemp("quality"), side, motley=2, effects=2)


def pck(video: Tensor, case: Case) -> float:
    hits, counted = pose_hits(video, case.truth)
    return hits / counted


async def test_the_character_does_the_driving_motion(chain: Chain, suite: Suite) -> None:
    for case in suite.motley:
        video = await chain.animate(case)
        assert pck(video, case) >= FLOOR
        assert known_again(video, case, suite)


@pytest.mark.slow
async def test_captions_make_effects(chain: Chain, suite: Suite) -> None:
    right = []
    for case in suite.effects:
        asked, shown = effects_asked(case.truth), effects_shown(await chain.animate(case), case.truth)
        right += [asked[name] == shown[name] for name in asked]
    assert sum(right) >= len(right) - 1


async def test_the_vae_keeps_figures(chain: Chain, suite: Suite, tmp_path: Path) -> None:
    case = suite.motley[0]
    decoded = await chain.services(tmp_path).reconstruct(case.truth.clip)
    assert psnr(decoded, case.truth.clip) >= 26
    assert psnr(decoded, case.truth.clip, case.truth.figure) >= 20
    assert pck(decoded, case) >= 0.9


async def test_joints_of_a_driving_clip_are_found(chain: Chain, suite: Suite, tmp_path: Path) -> None:
    case = suite.effects[0]
    assert extraction_error(await chain.services(tmp_path).extract(case), case.truth) <= 6


async def test_a_mirrored_pose_misses(chain: Chain, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.pose.draw.halved", lambda frames: halved(frames).flip(2))
    case = suite.motley[0]
    assert pck(await chain.animate(case), case) < FLOOR


async def test_a_dropped_reference_misses(chain: Chain, suite: Suite) -> None:
    case = suite.motley[0]
    grey = np.full((case.truth.side, case.truth.side, 3), 128, np.uint8)
    video = await chain.animate(case, reference=grey)
    assert pck(video, case) < FLOOR
    assert not known_again(video, case, suite)


async def test_zeroed_timesteps_miss(chain: Chain, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    sinusoid = model.sinusoid
    monkeypatch.setattr(model, "sinusoid", lambda timesteps, dim: sinusoid(timesteps * 0, dim))
    case = suite.motley[0]
    assert pck(await chain.animate(case), case) < FLOOR
