"""Every row solver on every kind of row, against cvxpy: certified, feasible, sparse, and right."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idl.sim.solvers import ADMM, CVX, AcceleratedGradient, ConsensusADMM, CoordinateDescent, Hybrid, LeastSquares
from sim.row_problems import KINDS, drawn

SOLVERS = {
    "Hybrid": Hybrid(),
    "CoordinateDescent": CoordinateDescent(),
    "ADMM": ADMM(),
    "ConsensusADMM": ConsensusADMM(),
    "AcceleratedGradient": AcceleratedGradient(max_steps=200_000),
    "CVX": CVX(),
}


@functools.cache
def rows_and_optimum(kind):
    rows = KINDS[kind]()
    return rows, rows.optimum()


@functools.cache
def solved(solver, kind):
    return solver.solve(rows_and_optimum(kind)[0].problem)


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_every_row_is_certified_and_the_certificate_is_true(solver, kind):
    rows, optimum = rows_and_optimum(kind)
    solution = solved(solver, kind)
    assert float(solution.gap.max()) <= solver.tol
    slack = 1e-9 * (1 + rows.T.square().mean(0))  # what cvxpy's answer is exact to
    # From the samples themselves: the objective is the one reported, and between optimum and optimum plus gap.
    objective = rows.objective(solution.W)
    torch.testing.assert_close(objective, solution.objective, rtol=1e-6, atol=1e-11)
    assert bool((objective >= optimum - slack).all())
    assert bool((objective - optimum <= solution.gap * objective + slack).all())
    assert bool((solution.bound <= optimum + slack).all())


def test_the_ball_is_kept_exactly(solver, kind):
    rows, _ = rows_and_optimum(kind)
    W = solved(solver, kind).W
    assert bool((W[:, : rows.ball].abs().sum(1) <= rows.kappa).all())


def test_zeros_are_exact(solver):
    W = solved(solver, "states of a layer").W
    small = (W != 0) & (W.abs() < 1e-9 * W.abs().max())
    assert 0.1 < float((W == 0).double().mean()) < 1 and not bool(small.any())


def test_a_large_penalty_leaves_nothing(solver):
    solution = solved(solver, "large penalty")
    assert not bool(solution.W.any())
    assert not bool(solution.gap.any())


@pytest.mark.parametrize("name", ["Hybrid", "ADMM"])
def test_a_start_near_the_solution_saves_steps(name):
    rows, _ = rows_and_optimum("states of a layer")
    solver = SOLVERS[name]
    first = solver.solve(rows.problem)
    again = solver.solve(rows.problem, first.W)
    assert again.steps < first.steps
    assert float(again.gap.max()) <= solver.tol


def test_a_solver_that_may_not_finish_names_what_is_open():
    rows, optimum = rows_and_optimum("condition 1e6")
    solution = ADMM(tol=1e-9, max_steps=20).solve(rows.problem)
    assert float(solution.gap.max()) > 1e-9
    assert bool((solution.bound <= optimum + 1e-9).all())
    assert bool((solution.objective >= optimum - 1e-9).all())


def test_no_rows_and_no_columns_are_no_error(solver):
    rows = drawn()
    empty = rows.problem.take(torch.arange(0))
    assert solver.solve(empty).W.shape == (0, 12)


@settings(max_examples=25, deadline=None)
@given(
    columns=st.integers(1, 15),
    ball=st.integers(0, 15),
    samples=st.integers(2, 40),
    lam=st.sampled_from([1e-5, 1e-3, 1e-1]),
    kappa=st.sampled_from([0.1, 0.9, 10.0]),
    condition=st.sampled_from([1.0, 1e3, 1e7]),
    seed=st.integers(0, 10_000),
)
def test_the_default_is_never_below_the_reference_nor_above_it_by_more_than_its_gap(
    columns, ball, samples, lam, kappa, condition, seed
):
    ball = min(ball, columns)
    rows = drawn(
        samples=samples, columns=columns, rows=3, lam=lam, ball=ball, kappa=kappa, condition=condition, seed=seed
    )
    solution, optimum = Hybrid().solve(rows.problem), rows.optimum()
    slack = 1e-8 * (1 + rows.T.square().mean(0))
    objective = rows.objective(solution.W)
    assert float(solution.gap.max()) <= 1e-4
    assert bool((objective >= optimum - slack).all())
    assert bool((objective - optimum <= solution.gap * objective + slack).all())


@pytest.mark.parametrize("kind", ["well conditioned", "fewer samples than columns", "duplicate columns"])
def test_least_squares_is_the_pseudoinverse_and_proves_nothing(kind):
    rows, _ = rows_and_optimum(kind)
    solution = LeastSquares().solve(rows.problem)
    expected = torch.linalg.lstsq(rows.S, rows.T, driver="gelsd").solution.T
    torch.testing.assert_close(solution.W, expected, rtol=1e-6, atol=1e-8)
    assert bool((solution.gap == 1).all())
    assert not LeastSquares.keeps_ball
