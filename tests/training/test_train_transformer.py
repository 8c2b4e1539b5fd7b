"""What the transformer's loss counts, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.bundles import load_bundle
from training.conditions import Samples
from training.train_transformer import Omissions, Recipe, Training, build_learners, make_optimiser

TINY = Path(__file__).resolve().parent.parent.parent / "bundles" / "tiny"
RECIPE = Recipe(batch=4)
SIGMAS = torch.tensor([0.3, 0.9])


NOISE = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1000))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    directory = tmp_path_factory.mktemp("bundle")
    text = (TINY / "bundle.toml").read_text(encoding="utf-8")
    for old, new in {
        "num_layers = 8": "num_layers = 1",
        "ffn_dim = 704": "ffn_dim = 48",
        "dim = 256\n": "dim = 48\n",
    }.items():
        text = text.replace(old, new)
    (directory / "bundle.toml").write_text(text, encoding="utf-8")
    learners = build_learners(load_bundle(directory), seed=0)
    torch.nn.init.normal_(learners.transformer.head.head.weight, std=0.1)
    samples = Samples(
        video=normal(2, 16, 2, 4, 4),
        reference=normal(2, 16, 1, 4, 4),
        pose=normal(2, 16, 2, 2, 2),
        picture=normal(2, 3, 64, 64),
        tokens=torch.tensor([[5, 6, 1] + [0] * 61, [7, 1] + [0] * 62]),
        figure=(normal(2, 2, 4, 4) > 0).float(),
    )
    return Training(learners, samples, RECIPE, torch.tensor([[1] + [0] * 63, [9, 1] + [0] * 62]), 1)


def omissions(*, text: bool = False, reference: bool = False, known_first: bool = False) -> Omissions:
    return Omissions(*(torch.tensor([False, chosen]) for chosen in (text, reference, known_first)))


@torch.no_grad()
def test_a_given_first_frame_is_not_predicted(training: Training) -> None:
    noise = NOISE
    other = torch.cat([noise[:, :, :1] + 1, noise[:, :, 1:]], dim=2)
    errors = [training.error(training.samples, SIGMAS, n, omissions(known_first=True)) for n in (noise, other)]
    assert errors[0][0] != errors[1][0]
    assert errors[0][1] == errors[1][1]


@torch.no_grad()
def test_left_out_captions_are_replaced_by_those_that_say_nothing(training: Training) -> None:
    noise, samples = NOISE, training.samples
    left_out = training.predicted(samples, SIGMAS, noise, omissions(text=True))
    said = training.predicted(samples, SIGMAS, noise, omissions())
    silent = replace(samples, tokens=torch.stack([samples.tokens[0], torch.tensor([9, 1] + [0] * 62)]))
    torch.testing.assert_close(left_out, training.predicted(silent, SIGMAS, noise, omissions()))
    assert not torch.allclose(left_out[1], said[1])
    torch.testing.assert_close(left_out[0], said[0])


@torch.no_grad()
def test_without_a_reference_neither_of_its_forms_is_seen(training: Training) -> None:
    noise, samples = NOISE, training.samples
    others = replace(samples, reference=samples.reference + 1, picture=samples.picture + 1)
    for given, same in ((omissions(), False), (omissions(reference=True), True)):
        one, other = (training.predicted(batch, SIGMAS, noise, given)[1] for batch in (samples, others))
        assert torch.equal(one, other) == same


@torch.no_grad()
def test_error_is_that_of_the_velocity_weighted_where_the_figure_is(training: Training) -> None:
    noise, samples = NOISE, training.samples
    off = training.predicted(samples, SIGMAS, noise, omissions()) - (noise - samples.video)
    weight = (1 + 2 * samples.figure)[:, None].expand_as(off)
    expected = (off.square() * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4))
    torch.testing.assert_close(training.error(samples, SIGMAS, noise, omissions()), expected)


def test_loss_falls(training: Training) -> None:
    torch.manual_seed(0)
    optimiser = make_optimiser(training.learners, rate=3e-3)
    losses = []
    for _ in range(25):
        loss = training.loss()
        optimiser.step(loss)
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
