"""Anderson acceleration on what breaks its small linear systems: it never raises and never loses a sample."""

import math

import pytest
import torch

from idl import Adaptive, Anderson, equilibrium, fixed_point


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("memory", [1, 2, 6, 20])
@pytest.mark.parametrize("ridge", [0.0, 1e-8, 1.0])
def test_every_memory_and_ridge_arrives(memory, ridge):
    A = drawn(8, 8, seed=0)
    A = A * 0.9 / A.abs().sum(1, keepdim=True)
    u = drawn(5, 8, seed=1)
    solver = Anderson(memory=memory, ridge=ridge, atol=1e-9)
    solution = equilibrium(A, torch.eye(8, dtype=torch.float64), u, solver=solver)
    assert bool(solution.converged.all())
    assert float(solution.residual.max()) <= 1e-9


def test_a_linear_map_is_solved_in_about_as_many_steps_as_it_has_dimensions():
    A, u = torch.diag(torch.tensor([0.99, 0.9, 0.5], dtype=torch.float64)), drawn(4, 3, seed=0)
    solver = Anderson(atol=1e-9, memory=4, ridge=0.0)
    solution = equilibrium(A, torch.eye(3, dtype=torch.float64), u, phi="identity", solver=solver)
    torch.testing.assert_close(solution.x, u / (1 - A.diagonal()), rtol=0, atol=1e-7)
    assert int(solution.steps.max()) <= 15, "plain steps need about 2300"


@pytest.mark.parametrize("ridge", [0.0, 1e-8])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_constant_map_is_solved(rows, ridge):
    c = drawn(rows, 4, seed=0)
    solution = fixed_point(lambda x: c + 0 * x, torch.zeros_like(c), solver=Anderson(ridge=ridge, atol=0.0))
    assert torch.equal(solution.x, c)
    assert bool(solution.converged.all())


@pytest.mark.parametrize("ridge", [0.0, 1e-8])
def test_a_history_of_parallel_defects_is_no_error(ridge):
    # Every defect is a multiple of one vector, so that the history has rank one.
    one = torch.ones(3, 5, dtype=torch.float64)
    solution = fixed_point(lambda x: 0.9 * x + one, torch.zeros_like(one), solver=Anderson(ridge=ridge, atol=1e-8))
    torch.testing.assert_close(solution.x, 10 * one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-8])
def test_repeated_columns_and_samples_are_no_error(ridge):
    A = torch.full((6, 6), 0.15, dtype=torch.float64)
    u = drawn(1, 1, seed=0).expand(4, 6)
    solution = equilibrium(A, torch.eye(6, dtype=torch.float64), u.abs(), solver=Anderson(ridge=ridge, atol=1e-10))
    torch.testing.assert_close(solution.x, u.abs() / (1 - 0.9), rtol=0, atol=1e-8)


def test_the_identity_map_is_at_rest_everywhere():
    x0 = drawn(3, 4, seed=0)
    solution = fixed_point(lambda x: x + 0.0, x0, solver=Anderson())
    assert torch.equal(solution.x, x0)
    assert bool(solution.converged.all())


def test_a_translation_has_no_fixed_point_and_is_reported():
    solution = fixed_point(lambda x: x + 1.0, torch.zeros(2, 3), solver=Anderson(), on_failure="ignore")
    assert not bool(solution.converged.any())
    assert bool(solution.x.isfinite().all())
    assert float(solution.residual.max()) == pytest.approx(1.0)


@pytest.mark.parametrize("when", [1, 2, 3, 5])
def test_a_map_that_turns_nan_on_the_way_ends_with_the_last_finite_iterate(when):
    def f(x):
        return torch.where(x < when, x + 0.5, torch.nan)

    solution = fixed_point(f, torch.zeros(2, 3), solver=Anderson(max_steps=40), on_failure="ignore")
    assert not bool(solution.converged.any())
    assert int(solution.steps.max()) <= 40


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_map_that_is_never_finite_ends_with_nan(value):
    solution = fixed_point(lambda x: x + value, torch.zeros(2, 3), solver=Anderson(), on_failure="ignore")
    assert bool(solution.x.isnan().all()) and not bool(solution.converged.any())
    assert int(solution.steps.max()) <= 10


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_the_scale_of_a_problem_does_not_matter(size):
    A = drawn(8, 8, seed=0)
    A = (A * 0.95 / A.abs().sum(1, keepdim=True)).float()
    u = drawn(5, 8, seed=1).float()
    solver = Anderson(atol=0.0, rtol=1e-5)
    unit = equilibrium(A, torch.eye(8), u, solver=solver)
    scaled = equilibrium(A, torch.eye(8), u * size, solver=solver)
    assert bool(scaled.converged.all())
    assert abs(int(scaled.steps.max()) - int(unit.steps.max())) <= 2
    torch.testing.assert_close(scaled.x.double() / size, unit.x.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", [Anderson(max_steps=60), Adaptive(max_steps=60)])
def test_a_map_that_overshoots_is_solved(solver):
    # Its slopes lie in [-4, 0]: plain steps run away, and so does Anderson that forgets when a residual doubles.
    shape = drawn(200, 200, seed=0)
    shape = (shape + shape.T) / torch.linalg.matrix_norm(shape + shape.T, 2)
    A, u = (-4 * shape @ shape).float(), drawn(64, 200, seed=1).float()
    solution = fixed_point(lambda x: x @ A.T + u, torch.zeros_like(u), solver=solver, on_failure="raise")
    exact = torch.linalg.solve(torch.eye(200).double() - A.double(), u.double().T).T
    torch.testing.assert_close(solution.x.double(), exact, rtol=0, atol=1e-5)


def test_a_converged_row_of_a_map_that_expands_has_the_residual_that_was_asked_for():
    A = torch.tensor([[0.0, -3.0], [3.0, 0.0]], dtype=torch.float64)
    u = drawn(50, 2, seed=0)
    solution = fixed_point(lambda x: torch.tanh(x @ A.T + u), torch.zeros_like(u), solver=Anderson())
    assert bool(solution.converged.any())
    assert float(solution.residual[solution.converged].max()) <= 3e-6
