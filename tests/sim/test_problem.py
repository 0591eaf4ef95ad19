"""The rows' objective, proximal step and dual bound, each against its definition."""

import dataclasses
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idl.sim.solvers import ADMM, CoordinateDescent, Hybrid
from sim.row_problems import KINDS, drawn, minimum


@pytest.fixture(params=KINDS)
def rows(request):
    return KINDS[request.param]()


def points(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows.T.shape[1], rows.S.shape[1], generator=generator, dtype=torch.float64)
    return rows.problem.project(W)


def test_the_objective_from_moments_is_that_of_the_samples(rows):
    W, problem = points(rows), rows.problem
    found = problem.objective(W, problem.residual_correlations(W))
    torch.testing.assert_close(found, rows.objective(W), rtol=1e-9, atol=1e-12)


def test_residual_correlations_are_minus_the_gradient_of_the_smooth_part(rows):
    W = points(rows).requires_grad_()
    smooth = 0.5 * (rows.T - rows.S @ W.T).square().mean(0).sum()
    (gradient,) = torch.autograd.grad(smooth, W)
    torch.testing.assert_close(rows.problem.residual_correlations(W.detach()), -gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("distance", [0.0, 1e-3, 1.0, 100.0])
def test_the_dual_is_a_lower_bound_wherever_it_is_evaluated(rows, distance):
    problem = rows.problem
    W = problem.project(distance * points(rows))
    bound = problem.dual(W, problem.residual_correlations(W))
    optimum = rows.optimum()
    assert bool((bound <= optimum + 1e-9 * (1 + optimum)).all())
    assert bool((bound >= 0).all())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ball=st.integers(0, 8),
    kappa=st.sampled_from([0.01, 0.5, 3.0, 100.0]),
    lam=st.sampled_from([1e-6, 0.1, 2.0]),
    step=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_the_proximal_step_is_the_minimiser_that_defines_it(seed, ball, kappa, lam, step):
    problem = drawn(columns=8, rows=2, lam=lam, ball=ball, kappa=kappa, seed=1).problem
    V = 3 * torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = problem.prox(V, torch.full((2, 1), step, dtype=torch.float64))
    for v, w in zip(V.numpy(), found.numpy(), strict=True):
        variable = cp.Variable(8)
        cost = 0.5 * cp.sum_squares(variable - v) + step * lam * cp.norm1(variable)
        program = cp.Problem(cp.Minimize(cost), [cp.norm1(variable[:ball]) <= kappa] if ball else [])
        minimum(program)
        np.testing.assert_allclose(w, variable.value, rtol=0, atol=1e-5)


def test_projecting_twice_changes_nothing_and_stays_inside():
    problem = drawn(columns=8, ball=6, kappa=0.3).problem
    V = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = problem.project(V)
    torch.testing.assert_close(problem.project(once), once, rtol=0, atol=0)
    assert bool((once[:, :6].abs().sum(1) <= 0.3).all())
    torch.testing.assert_close(once[:, 6:], V[:, 6:], rtol=0, atol=0)


def doubles(*shape):
    return torch.ones(shape, dtype=torch.float64)


@pytest.mark.parametrize("solver", [Hybrid(), ADMM(), CoordinateDescent()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"radius": -1.0}, ValueError, "`radius` must"),
        ({"radius": math.nan}, ValueError, "`radius` must"),
        ({"ball": 13}, ValueError, "`ball` must be at most 12"),
        ({"ball": -1}, ValueError, "`ball` must"),
        ({"ball": 2.0}, TypeError, "`ball` must"),
        ({"knee": 0.0}, ValueError, "`knee` must"),
        ({"knee": math.nan}, ValueError, "`knee` must"),
        ({"gram": doubles(12, 11)}, ValueError, "`gram` must be a square matrix"),
        ({"gram": doubles(12, 12) * math.nan}, ValueError, "`gram` must be finite"),
        ({"gram": doubles(12, 12).float()}, TypeError, r"`gram` must be of torch.float64.*Try gram.double\(\)"),
        ({"gram": doubles(12, 12).numpy()}, TypeError, "`gram` must be a torch.Tensor"),
        ({"correlations": doubles(4, 11)}, ValueError, r"`correlations` must have shape \(4, 12\).*got \(4, 11\)"),
        ({"correlations": doubles(4, 12) / 0}, ValueError, "`correlations` must be finite"),
        ({"correlations": doubles(4, 12).tolist()}, TypeError, "`correlations` must be a torch.Tensor"),
        ({"energies": doubles(5)}, ValueError, r"`energies` must have shape \(4,\)"),
        ({"energies": -doubles(4)}, ValueError, "`energies` must not be negative; got -1"),
        ({"penalty": -doubles(12)}, ValueError, "`penalty` must not be negative"),
        ({"penalty": doubles(4)}, ValueError, r"`penalty` must have shape \(12,\)"),
        ({"penalty": 0.1}, TypeError, "`penalty` must be a torch.Tensor"),
        ({"ridge": -doubles(12)}, ValueError, "`ridge` must not be negative"),
        ({"column_energies": doubles(4)}, ValueError, r"`column_energies` must have shape \(12,\)"),
        ({"target_energies": doubles(12)}, ValueError, r"`target_energies` must have shape \(4,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_problem_that_is_none_is_refused_by_every_solver(solver, change, error, message, as_users_run_it):
    problem = drawn(rows=4, columns=12, ball=6).problem
    with pytest.raises(error, match=message):
        solver.solve(dataclasses.replace(problem, **change))


def test_a_start_of_another_shape_is_refused(as_users_run_it):
    problem = drawn(rows=4, columns=12).problem
    with pytest.raises(ValueError, match=r"`start` must have shape \(4, 12\), as `correlations` has; got \(3, 12\)"):
        ADMM().solve(problem, doubles(3, 12))
    with pytest.raises(TypeError, match="`start` must be a torch"):
        ADMM().solve(problem, [[0.0] * 12] * 4)
    with pytest.raises(TypeError, match=r"RowProblem; got a Tensor\. Try idl"):
        ADMM().solve(problem.gram)
