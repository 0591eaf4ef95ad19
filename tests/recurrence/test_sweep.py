"""How a sweep solves the times: what it foresees decides when it looks, never what it finds."""

import math

import pytest
import torch

from idl import Adaptive, Newton, Picard, activations
from idl.linalg.operators import Dense, Factored
from idl.recurrence import sweep as module
from idl.recurrence.parallel import solve_together
from idl.recurrence.plan import Plan
from idl.recurrence.steps import SlopedSteps
from idl.recurrence.sweep import sweep
from idl.recurrence.timeline import Timeline
from problems import random
from recurrence.equations import EVEN, NAMES, TIMELINES, H, N, affine, by_hand, contraction, sloped

SOLVERS = [Adaptive(1e-12), Picard(1e-12), Picard(1e-12, damping=0.8), Newton(1e-12)]


@pytest.mark.parametrize("method", [sweep, solve_together])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("timeline", TIMELINES, ids=NAMES)
def test_every_state_is_the_solution_of_its_equation(timeline, solver, method):
    for steps in (affine(timeline), sloped(timeline), sloped(timeline, offset=None, source=None)):
        swept = method(steps, solver)
        pairs, last = by_hand(steps)
        torch.testing.assert_close(swept.trajectory, pairs, rtol=0, atol=1e-11)
        torch.testing.assert_close(swept.last, last, rtol=0, atol=1e-11)
        assert swept.all_converged
        assert bool(swept.converged.all())


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
@pytest.mark.parametrize("timeline", TIMELINES, ids=NAMES)
def test_linear_equations_of_low_rank_are_solved_directly_up_to_rank_4(timeline, rank):
    A = Factored(0.4 * random(N, rank, seed=7) / rank, 0.5 * random(N, rank, seed=8))
    steps = sloped(timeline, A)
    assert steps.can_solve == (rank <= 4)
    swept = sweep(steps, Adaptive(1e-12))
    pairs, last = by_hand(steps)
    torch.testing.assert_close(swept.trajectory, pairs, rtol=0, atol=1e-11)
    torch.testing.assert_close(swept.last, last, rtol=0, atol=1e-11)
    assert (int(swept.steps.max()) == 1) == (rank <= 4)


def test_a_direct_solve_that_loses_its_digits_is_seen_and_repaired(monkeypatch):
    A = Factored(0.4 * random(N, 2, seed=7), 0.5 * random(N, 2, seed=8))
    steps = sloped(EVEN, A)
    exact = steps._inverses
    wrong = exact.clone()
    wrong[40:60] *= 1.5
    monkeypatch.setattr(SlopedSteps, "_inverses", property(lambda self: wrong))
    swept = sweep(steps, Adaptive(1e-12))
    torch.testing.assert_close(swept.trajectory, by_hand(steps)[0], rtol=0, atol=1e-11)
    assert int(swept.steps.max()) > 2
    assert int(swept.steps[-1]) == 1


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("count", [3, 4, 5, 16])
def test_a_wrong_plan_costs_steps_and_nothing_else(monkeypatch, count, warm):
    class Wrong(Plan):
        """Expects too little, or too much, again and again."""

        def succeeded(self, before, last, error):
            super().succeeded(before, last, error)
            self.count, self.warm = count, warm

        def failed(self, before, last, error):
            super().failed(before, last, error)
            self.count += 20  # else it would never get on

        def solved(self, taken, rate):
            super().solved(taken, rate)
            self.count, self.ahead, self.warm = count, 8, warm

    monkeypatch.setattr(module, "Plan", Wrong)
    for timeline in TIMELINES:
        steps = affine(timeline)
        swept = sweep(steps, Adaptive(1e-12))
        torch.testing.assert_close(swept.trajectory, by_hand(steps)[0], rtol=0, atol=1e-11)
        assert swept.all_converged


def test_tests_become_rare_where_nothing_changes(monkeypatch):
    tests = []
    original = module._Sweep._test

    def counted(self, rows, work, size):
        tests.append(rows)
        return original(self, rows, work, size)

    monkeypatch.setattr(module._Sweep, "_test", counted)
    swept = sweep(affine(Timeline((4,) * 300)), Adaptive(1e-6))
    assert swept.all_converged
    assert len(tests) < 300 / 10


def test_a_time_that_is_harder_than_those_before_is_solved_to_the_same_accuracy():
    timeline = Timeline((4,) * 40)
    source = 1e-3 * random(timeline.rows, N + H, seed=1)
    source[100:104] *= 1e6  # far away, in the middle of a stretch that is not looked at
    steps = affine(timeline, Dense(contraction(0.6)), source=source, activation=activations.leaky_relu)
    for solver in (Adaptive(1e-9), Picard(1e-9)):
        swept = sweep(steps, solver)
        x, z = swept.trajectory[:, :N], source[:, :N] + swept.trajectory[:, N:] @ steps.B.T
        error = torch.nn.functional.leaky_relu(x @ steps.state_matrix.matrix.T + z) - x
        assert float(error.abs().max()) < 1e-9
        assert swept.all_converged


def test_no_time_takes_more_applications_than_allowed():
    for most in (1, 3, 5, 9):
        swept = sweep(affine(EVEN, Dense(contraction(0.9))), Picard(1e-12, 0.0, most))
        assert int(swept.steps.max()) <= max(3, most)
        assert not swept.all_converged
        assert bool(swept.trajectory.isfinite().all())


def test_a_plan_forgets_a_slow_time_little_by_little():
    plan = Plan(max_steps=100, longest=32, rate=None)
    assert plan.slowest is None
    plan.solved(5, 0.99)
    slow = plan.slowest
    assert slow == pytest.approx(0.99)
    plan.succeeded(1.0, 0.1, 0.01)
    assert 0.1 < plan.slowest < slow
    for _ in range(20):
        plan.succeeded(1.0, 0.1, 0.01)
    assert plan.slowest == pytest.approx(0.1)


def test_a_plan_starts_where_the_time_before_ended_only_if_that_is_close():
    plan = Plan(max_steps=100, longest=32, rate=0.1)
    plan.drifted(change=0.05, size=1.0)
    assert plan.warm
    plan.count = 5
    plan.drifted(change=0.5, size=1.0)
    assert not plan.warm
    assert plan.count == 6


def test_a_plan_asks_for_more_as_the_rate_says_and_leaves_a_lost_cause_to_the_solver():
    plan = Plan(max_steps=100, longest=32, rate=None, count=5)
    plan.failed(before=10.0, last=5.0, error=4.0)
    assert plan.count == 5 + 3  # two halvings, and one to be sure
    assert plan.foresees
    for numbers in ((1.0, 2.0, math.inf), (math.nan, math.nan, math.nan), (1.0, 0.999, 1e9), (math.inf, 1e30, 2.0)):
        plan = Plan(max_steps=100, longest=32, rate=None, count=5)
        plan.failed(*numbers)
        assert not plan.foresees
