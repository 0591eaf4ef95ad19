"""How Picard plans its bursts: what it is told or has seen decides when it looks, never what it finds."""

import torch

from idl import activations
from idl.linalg.operators import Dense
from idl.maps.affine import AffineMap, SlopedMap
from idl.solvers import Picard
from idl.solvers.iterate import iterate


def contraction(rate, n=8):
    """Return a matrix whose eigenvalues all have this modulus, so that every error shrinks by it."""
    generator = torch.Generator().manual_seed(0)
    orthogonal, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return rate * orthogonal


def derivative_problem(rate):
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    return SlopedMap(Dense, order=torch.inf).at((torch.ones_like(source), source, contraction(rate)))


class Watched(Picard):
    """Notes the steps of each burst."""

    def step(self, problem, state, budget):
        state, spent = super().step(problem, state, budget)
        self.__dict__.setdefault("bursts", []).append(spent)
        return state, spent


def test_a_known_rate_saves_the_first_test():
    unknown, known = Watched(0.0, 1e-6), Watched(0.0, 1e-6)
    expected = iterate(unknown, derivative_problem(0.1), None, torch.float64)
    problem = derivative_problem(0.1)
    problem.rate = 0.1
    result = iterate(known, problem, None, torch.float64)
    assert unknown.bursts[0] == 2
    assert len(unknown.bursts) > len(known.bursts)
    assert result.all_converged
    torch.testing.assert_close(result.x, expected.x, rtol=0, atol=1e-6 * float(expected.x.abs().max()))


def test_a_wrong_rate_costs_steps_and_nothing_else():
    exact = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - contraction(0.6), derivative_problem(0.6).source.T).T
    for rate in (1e-300, 1e-3, 0.3, 0.999, 1.0, 7.0):
        problem = derivative_problem(0.6)
        problem.rate = rate
        result = iterate(Picard(0.0, 1e-6), problem, None, torch.float64)
        assert result.all_converged
        error = (result.x - exact).abs().amax(1) / problem.source.abs().amax(1)
        assert float(error.max()) <= 3e-6


def test_a_slow_rate_is_not_trusted_with_a_long_first_burst():
    solver, problem = Watched(0.0, 1e-6), derivative_problem(0.9)
    problem.rate = 0.9
    iterate(solver, problem, None, torch.float64)
    assert solver.bursts[0] == 2


def test_the_rate_at_the_end_is_that_of_the_map():
    Z = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    problem = AffineMap(Dense, activations.identity).at((Z, contraction(0.5)))
    result = iterate(Picard(1e-9), problem, None, torch.float64)
    # In the largest entry a rotation shrinks less evenly than in the 2-norm.
    assert 0.3 < result.rate < 0.75


def test_while_steps_do_not_shrink_some_of_the_budget_is_left_for_another_method():
    # At rounding just above the tolerance a long burst would spend all of it before that is tried.
    A = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)  # turns: every step is as long as the last
    problem = AffineMap(Dense, activations.identity).at((torch.ones(1, 2, dtype=torch.float64), A))
    solver, spent = Picard(atol=1.0), 0
    state, _ = solver.init(problem, None)
    while spent < 250:
        left = 300 - spent
        state, cost = solver.step(problem, state, left)
        spent += cost
        assert cost <= max(left // 4, 2)
    assert state.remaining == float("inf")
