"""Solvers: tables, exactness, and continuing from a stored state."""

import math

import pytest
import torch
from torch import Tensor

from services.denoiser.sampling import SOLVERS, Solver, SolverState, make_solver
from tests.services.denoiser.tiny import normal

EVERY_SOLVER = pytest.mark.parametrize("name", SOLVERS)


def velocity_at(latents: Tensor, timestep: Tensor) -> Tensor:
    return torch.sin(latents) + float(timestep) / 1000


def run(solver: Solver, state: SolverState) -> list[SolverState]:
    states = []
    for timestep in solver.timesteps[state.step :]:
        state = solver.step(state, velocity_at(state.latents, timestep))
        states.append(state)
    return states


@EVERY_SOLVER
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_perfect_model_is_recovered_exactly(name: str, steps: int) -> None:
    clean, noise = normal(1, 2, 3), normal(1, 2, 3, seed=1)
    solver = make_solver(name, steps, shift=5.0)
    sigma = float(solver.sigmas[0])
    state = solver.start((1 - sigma) * clean + sigma * noise)
    for _ in range(steps):
        state = solver.step(state, noise - clean)
        expected = torch.lerp(clean, noise, float(solver.sigmas[state.step]))
        torch.testing.assert_close(state.latents, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(state.latents, clean, rtol=0, atol=2e-5)


@EVERY_SOLVER
def test_run_continued_after_any_step_is_bit_identical(name: str) -> None:
    solver = make_solver(name, 6, shift=3.0)
    whole = run(solver, solver.start(normal(1, 4, 2)))
    for stored in whole:
        tensors, counters = stored.to_tensors()
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        state = SolverState.from_tensors(copies, counters)
        solver.check(state)
        rest = run(make_solver(name, 6, shift=3.0), state)
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, whole[stored.step :], strict=True))


@EVERY_SOLVER
def test_step_leaves_the_state_it_was_given(name: str) -> None:
    solver = make_solver(name, 4, shift=2.0)
    state = solver.start(normal(1, 3))
    for timestep in solver.timesteps:
        before = {key: tensor.clone() for key, tensor in state.to_tensors()[0].items()}
        after = solver.step(state, velocity_at(state.latents, timestep))
        assert all(torch.equal(tensor, before[key]) for key, tensor in state.to_tensors()[0].items())
        state = after


def slope(latents: Tensor, sigma: float) -> Tensor:
    return torch.sin(latents) + sigma


def exact_end(latents: Tensor, sigma: float, count: int = 100) -> Tensor:
    """dx/dsigma = slope, from `sigma` down to 0 in classical Runge-Kutta steps, float64."""
    h = -sigma / count
    for i in range(count):
        k1 = slope(latents, sigma + i * h)
        k2 = slope(latents + h / 2 * k1, sigma + (i + 0.5) * h)
        k3 = slope(latents + h / 2 * k2, sigma + (i + 0.5) * h)
        k4 = slope(latents + h * k3, sigma + (i + 1) * h)
        latents = latents + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return latents


@pytest.mark.parametrize(("name", "error"), [("unipc", 0.003), ("dpm++", 0.009), ("euler", 0.07)])
def test_solvers_follow_the_true_path_as_closely_as_their_order(name: str, error: float) -> None:
    solver = make_solver(name, 12, shift=1.0)
    state = solver.start(normal(50))
    for sigma in solver.sigmas[:-1]:
        state = solver.step(state, slope(state.latents, float(sigma)))
    end = exact_end(normal(50).double(), float(solver.sigmas[0]))
    assert float((state.latents - end).abs().max()) < error


def test_worked_timesteps_of_the_reference_sheet() -> None:
    thirty = make_solver("unipc", 30, shift=7.0).timesteps.tolist()
    assert thirty[:6] == [999, 994, 989, 984, 978, 972]
    assert thirty[-4:] == [518, 437, 333, 194]
    assert make_solver("unipc", 4, shift=7.0).timesteps.tolist() == [999, 954, 874, 699]
    assert make_solver("unipc", 40, shift=12.0).timesteps[-3:].tolist() == [492, 386, 235]
    assert int((make_solver("unipc", 40, shift=12.0).timesteps >= 875).sum()) == 26


def test_where_the_tables_start_and_end() -> None:
    first = {name: float(make_solver(name, 10, shift=5.0).sigmas[0]) for name in SOLVERS}
    assert first["dpm++"] == first["euler"] == 1.0
    assert 0.9997 < first["unipc"] < 0.9999
    assert all(float(make_solver(name, 10, shift=5.0).sigmas[-1]) == 0 for name in SOLVERS)
    dtypes = {name: make_solver(name, 10, shift=5.0).timesteps.dtype for name in SOLVERS}
    assert dtypes == {"unipc": torch.int64, "dpm++": torch.int64, "euler": torch.float32}


@EVERY_SOLVER
def test_shift_spends_more_steps_at_high_noise(name: str) -> None:
    even, moved = (make_solver(name, 10, shift=shift).sigmas for shift in (1.0, 5.0))
    assert bool((moved[1:-1] > even[1:-1]).all())
    assert even.dtype == torch.float32


def test_multistep_solvers_open_and_close_at_first_order() -> None:
    for name in ("unipc", "dpm++"):
        solver = make_solver(name, 4, shift=2.0)
        assert [state.last_order for state in run(solver, solver.start(normal(2)))] == [1, 2, 2, 1]


@EVERY_SOLVER
@pytest.mark.parametrize(
    ("steps", "shift", "message"),
    [
        (0, 5.0, "num_inference_steps must be at least 1, got 0"),
        (4, 0.0, "shift must be finite and above 0, got 0.0"),
        (4, -1.0, "shift must be finite and above 0, got -1.0"),
        (4, math.inf, "shift must be finite and above 0, got inf"),
        (4, math.nan, "shift must be finite and above 0, got nan"),
        (4, 1e12, "shift .* leaves no 4 distinct noise levels"),
    ],
)
def test_senseless_settings_are_refused(name: str, steps: int, shift: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_solver(name, steps, shift)


def test_unknown_solver_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"solver must be one of unipc, dpm\+\+, euler, got heun"):
        make_solver("heun", 4, 1.0)


def stored_state() -> tuple[dict[str, Tensor], dict[str, int]]:
    solver = make_solver("unipc", 4, shift=2.0)
    return run(solver, solver.start(normal(2)))[1].to_tensors()


def test_damaged_checkpoints_are_refused_by_name() -> None:
    tensors, counters = stored_state()
    without_latents = {name: tensor for name, tensor in tensors.items() if name != "latents"}
    with pytest.raises(ValueError, match=r"missing \['latents'\]"):
        SolverState.from_tensors(without_latents, counters)
    with pytest.raises(ValueError, match=r"unknown \['velocity'\]"):
        SolverState.from_tensors(tensors | {"velocity": tensors["latents"]}, counters)
    with pytest.raises(ValueError, match=r"missing \['last_order'\]"):
        SolverState.from_tensors(tensors, {"step": 2})
    with pytest.raises(ValueError, match="previous_latents must be float32"):
        SolverState.from_tensors(tensors | {"previous_latents": tensors["latents"].half()}, counters)
    with pytest.raises(ValueError, match=r"previous_x0\.1 must be float32"):
        SolverState.from_tensors(tensors | {"previous_x0.1": normal(3)}, counters)


def test_checkpoint_of_another_solver_or_longer_run_is_refused() -> None:
    state = SolverState.from_tensors(*stored_state())
    make_solver("unipc", 4, shift=2.0).check(state)
    for name in ("dpm++", "euler"):
        with pytest.raises(ValueError, match="history is not that of"):
            make_solver(name, 4, shift=2.0).check(state)
    with pytest.raises(ValueError, match="checkpoint step must be 0 to 1, got 2"):
        make_solver("unipc", 1, shift=2.0).check(state)
