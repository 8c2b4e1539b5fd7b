"""Clips in numbers, and what the transformer and the VAE make of them in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.vae.model import Vae, VaeConfig
from training import drawn_clips
from training.clip_vae import ClipVae, initialise
from training.conditions import Samples
from training.drawn_clips import Drawn, draw
from training.encoded_clips import concatenated, figure_share, reworded
from training.figures.clips import sample_batch, sample_stories
from training.train_vae import Pool, Scores, Stage, Training, latent_statistics

CPU = torch.device("cpu")
SIDE, FRAMES = 32, 5
CAPTION = "a person in a red shirt and blue trousers walks at night with a yellow hat, snow is falling"


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    stories = sample_stories(2, torch.Generator().manual_seed(500_000), frames=FRAMES, held_out=False)
    return drawn_clips._drawn(stories, drawn_clips._painted(stories, SIDE), SIDE, CPU)


@pytest.fixture(scope="module")
def pool(drawn: Drawn) -> Pool:
    return Pool.of(iter([drawn]))


def test_clips_are_those_of_the_generator(drawn: Drawn) -> None:
    whole = sample_batch(
        2,
        torch.Generator().manual_seed(500_000),
        frames=FRAMES,
        height=SIDE,
        width=SIDE,
        held_out=False,
        driving=False,
    )
    assert torch.equal(drawn.target, whole.target)
    assert torch.equal(drawn.reference, whole.reference)
    assert torch.equal(drawn.pose, whole.pose)
    assert drawn.captions == whole.captions


def test_figure_is_where_somebody_is(drawn: Drawn) -> None:
    stories = sample_stories(2, torch.Generator().manual_seed(500_000), frames=FRAMES, held_out=False)
    thin = replace(stories, shown=replace(stories.shown, radii=torch.zeros_like(stories.shown.radii)))
    nobody = thin.draw_target(SIDE, SIDE)
    assert torch.equal(drawn.target[~drawn.figure], nobody[~drawn.figure])
    assert (drawn.target[drawn.figure] != nobody[drawn.figure]).any(dim=-1).all()
    assert 0.05 < drawn.figure.float().mean() < 0.5


@pytest.mark.slow
def test_workers_draw_what_one_process_does(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_clips, "_CLIPS_AT_ONCE", 2)
    parts = list(draw(3, seed=5, held_out=False, device=CPU, side=SIDE, frames=FRAMES))
    assert [len(part) for part in parts] == [2, 1]
    assert torch.equal(parts[0].target, drawn.target)
    assert torch.equal(parts[0].pose, drawn.pose)


def test_vague_captions_keep_the_effects() -> None:
    said = reworded([CAPTION] * 60)
    assert all(caption.endswith("at night with a yellow hat, snow is falling") for caption in said)
    assert 20 < said.count(CAPTION) < 50
    assert any("red shirt" not in caption for caption in said)
    assert any("walks" not in caption for caption in said)
    assert reworded([CAPTION] * 60) == said


def test_figure_share_is_of_the_frame_that_shows_most() -> None:
    figure = torch.zeros(1, 5, 16, 16, dtype=torch.bool)
    figure[0, 3, :8, :8] = True
    figure[0, 0, 8:, 8:12] = True
    share = figure_share(figure, (2, 2, 2))
    assert share[0, 1].tolist() == [[1, 0], [0, 0]]
    assert share[0, 0].tolist() == [[0, 0], [0, 1]]


def test_encoded_parts_are_put_together_in_order() -> None:
    one, two = (Samples(*(torch.full((2, 1), float(number)) for _ in range(6))) for number in (1, 2))
    assert concatenated([one, two]).tokens.flatten().tolist() == [1, 1, 2, 2]


def test_crops_have_the_weight_of_their_own_pixels(pool: Pool) -> None:
    torch.manual_seed(0)
    stage = Stage("any", share=1, side=16, frames=3, clips=6, poses=2)
    frames, weight = pool.crops(stage)
    assert frames.shape == (6, 3, 3, 16, 16)
    assert weight.shape == (6, 1, 3, 16, 16)
    assert pool.pose_crops(stage).shape == (2, 3, 3, 16, 16)
    assert set(weight.flatten().tolist()) == {1.0, 4.0}
    coded = Pool(pool.figure[..., None].expand(-1, -1, -1, -1, 3).to(torch.uint8) * 255, pool.figure, pool.pose)
    frames, weight = coded.crops(stage)
    assert torch.equal(frames[:, :1] > 0, weight > 1)


def test_vae_learns_from_the_first_steps(pool: Pool) -> None:
    vae = Vae(VaeConfig(dim=8))
    initialise(vae, torch.Generator().manual_seed(0))
    clip_vae = ClipVae(vae, compiled=False)
    training = Training(clip_vae, pool)
    stage = Stage("any", share=1, side=16, frames=5, clips=2, poses=1)
    optimiser = torch.optim.Adam(vae.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(12):
        loss = training.loss(stage)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_scores_are_signal_to_noise_ratios(pool: Pool) -> None:
    class Halving:
        """Decodes half of what was encoded."""

        def posterior(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return frames, frames

        def generate(self, latents: torch.Tensor) -> torch.Tensor:
            return latents / 2

    scores = Scores.of(Halving(), pool)  # type: ignore[arg-type]  # stands in for a VAE
    frames = pool.target.float() / 127.5 - 1
    expected = 10 * torch.log10(4 / (frames / 2).square().mean())
    assert scores.clips == pytest.approx(float(expected), abs=1e-3)
    figure = frames[pool.figure] / 2
    assert scores.figures == pytest.approx(float(10 * torch.log10(4 / figure.square().mean())), abs=1e-3)
    mean, std = latent_statistics(Halving(), pool, 2)  # type: ignore[arg-type]  # stands in for a VAE
    assert torch.allclose(mean, frames.flatten(0, 3).mean(0), atol=1e-4)
    assert torch.allclose(std, frames.flatten(0, 3).std(0), atol=1e-4)
