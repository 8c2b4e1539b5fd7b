"""Optimiser, average and schedule of training, on small tensors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.optimise import Average, Muon, Optimiser, RecordedStep, Schedule, orthogonalised
from training.runs import Log, Progress, State, run_steps

CPU = torch.device("cpu")


def test_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(100, warm_up_steps=10, decay_from=0.5, final=0.02)
    assert schedule.factor(0) == pytest.approx(0.1)
    assert schedule.factor(9) == schedule.factor(50) == 1
    assert schedule.factor(75) == pytest.approx(0.51)
    assert schedule.factor(100) == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices).float())
    assert values.max() < 1.3
    assert values.median() > 0.6
    # the directions stay: with the matrix itself, what comes out is symmetric and not negative
    product = orthogonalised(matrices).float().mT @ matrices
    assert (product - product.mT).abs().max() < 0.15 * product.abs().max()


def test_muon_steps_against_the_gradient_by_a_length_that_the_rate_says() -> None:
    weight = nn.Parameter(torch.zeros(8, 4))
    weight.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * 1e-3
    Muon([weight], rate=0.1).step(torch.tensor(0.5))
    assert float((weight.detach() * weight.grad).sum()) < 0
    # rate * factor * 0.2 * sqrt(longer side), per singular direction
    assert float(weight.detach().norm()) == pytest.approx(0.1 * 0.5 * 0.2 * math.sqrt(8) * 2, rel=0.25)


def quadratic(optimiser: Optimiser, weights: list[nn.Parameter]) -> Tensor:
    loss = torch.stack([(weight - 1).square().mean() for weight in weights]).sum()
    optimiser.step(loss)
    return loss.detach()


def test_optimiser_finds_the_lowest_point() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(5))]
    optimiser = Optimiser(weights[:1], weights[1:], rate=0.3)
    first = float(quadratic(optimiser, weights))
    for number in range(200):
        optimiser.factor.fill_(1 - number / 200)
        loss = float(quadratic(optimiser, weights))
    assert loss < 0.01 * first


def test_weights_without_a_gradient_stay() -> None:
    weights = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(2))]
    optimiser = Optimiser(weights[:2], weights[2:], rate=0.1)
    optimiser.step((weights[0] * 2).sum())
    assert not torch.equal(weights[0], torch.ones(3, 3))
    assert torch.equal(weights[1], torch.ones(3, 3))
    assert torch.equal(weights[2], torch.ones(2))


def test_average_follows_and_can_be_put_in_and_out() -> None:
    weight = nn.Parameter(torch.zeros(2))
    average = Average([weight], decay=0.9)
    with torch.no_grad():
        weight.fill_(1.0)
    for _ in range(100):
        average.update()
    assert torch.allclose(average.weights[0], torch.ones(2), atol=1e-3)
    with torch.no_grad():
        weight.fill_(3.0)
    average.swap()
    assert torch.allclose(weight.detach(), torch.ones(2), atol=1e-3)
    average.swap()
    assert torch.equal(weight.detach(), torch.full((2,), 3.0))


def training(seed: int) -> tuple[State, RecordedStep]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 4)
    weight, bias = model.parameters()
    optimiser = Optimiser([weight], [bias], rate=0.02)
    average = Average(model.parameters(), decay=0.9)

    def one_step() -> Tensor:
        loss: Tensor = (model(torch.randn(8, 4)) - 1).square().mean()
        optimiser.step(loss)
        average.update()
        return loss.detach()

    return State({"model": model}, optimiser, average), RecordedStep(one_step, CPU)


def test_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    schedule = Schedule(12, warm_up_steps=2, decay_from=0.5, final=0.1)
    log = Log(tmp_path / "loss.csv", append=False)

    def run(state: State, step: RecordedStep, progress: Progress, until: int) -> Progress:
        return run_steps(
            step, state.optimiser, schedule, progress, until_step=until, deadline=math.inf, stage="all", log=log
        )

    whole, step = training(0)
    run(whole, step, Progress(), 12)
    first, step = training(0)
    first.save(tmp_path / "state.pt", run(first, step, Progress(), 5))
    second, step = training(1)
    step()  # so that the optimiser has a memory to be restored
    progress = second.restore(tmp_path / "state.pt")
    assert progress.step == 5
    run(second, step, progress, 12)
    for a, b in zip(whole.modules["model"].parameters(), second.modules["model"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for one, other in zip(whole.average.weights, second.average.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_training_stops_at_its_deadline_and_logs_the_loss(tmp_path: Path) -> None:
    state, step = training(0)
    schedule = Schedule(1000, warm_up_steps=1, decay_from=0.5, final=0.1)
    log = Log(tmp_path / "loss.csv", append=False)
    progress = run_steps(
        step, state.optimiser, schedule, Progress(), until_step=1000, deadline=0.0, stage="all", log=log
    )
    assert progress.step < 1000
    lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert lines[0] == "stage,step,seconds,loss"
    assert lines[1].startswith(f"all,{progress.step},")


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    state, _ = training(0)
    step = RecordedStep(lambda: torch.tensor(math.nan), CPU)
    schedule = Schedule(100, warm_up_steps=1, decay_from=0.5, final=0.1)
    log = Log(tmp_path / "loss.csv", append=False)
    with pytest.raises(FloatingPointError, match="not a number"):
        run_steps(step, state.optimiser, schedule, Progress(), until_step=100, deadline=math.inf, stage="all", log=log)


def test_losses_are_drawn_by_stage(tmp_path: Path) -> None:
    log = Log(tmp_path / "loss.csv", append=False)
    for stage, step in (("first", 25), ("first", 50), ("second", 75)):
        log.add(stage, Progress(step, step / 10), 1 / step)
    log.draw("model")
    drawn = (tmp_path / "loss.svg").read_text()
    assert all(text in drawn for text in (">first<", ">second<", ">model: loss<"))
    Log(tmp_path / "loss.csv", append=True).draw("model")
    assert (tmp_path / "loss.svg").read_text() == drawn
