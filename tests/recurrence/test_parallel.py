"""All times together: the same states as one after another, and a sweep where Newton's method does not get there."""

import pytest
import torch

from idl import Adaptive, activations
from idl.linalg.operators import Dense, Factored
from idl.recurrence import parallel as module
from idl.recurrence.parallel import solve_together
from idl.recurrence.scan import scan
from idl.recurrence.sweep import sweep
from idl.recurrence.timeline import Timeline
from problems import random
from recurrence.equations import EVEN, NAMES, TIMELINES, H, N, affine, by_hand, contraction, sloped


@pytest.mark.parametrize("times", [1, 2, 3, 4, 7, 8, 33])
def test_a_scan_is_the_recurrence_place_by_place(times):
    J, b = 0.6 * random(times, 2, H, H, seed=1), random(times, 2, H, seed=2)
    h, expected = torch.zeros(2, H, dtype=torch.float64), []
    for t in range(times):
        h = torch.einsum("bij,bj->bi", J[t], h) + b[t]
        expected.append(h)
    torch.testing.assert_close(scan(J, b), torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [None, 2, 5])
def test_transitions_are_the_derivative_of_each_output(rank):
    left, right = (0.5 * random(N, rank or 1, seed=seed) / (rank or 1) for seed in (7, 8))
    steps = affine(Timeline((3, 3)), Dense(contraction(0.6)) if rank is None else Factored(left, right))

    def found(before):
        problem, x = steps.driven_by(before), torch.zeros(len(before), N, dtype=torch.float64)
        for _ in range(200):
            x = problem(x)
        return problem, x

    def output(before):
        return steps.outputs(torch.cat((found(before)[1], before), 1))

    before, step = random(6, H, seed=9), 1e-6 * torch.eye(H, dtype=torch.float64)
    numeric = torch.stack([(output(before + e) - output(before - e)) / 2e-6 for e in step], -1)
    problem, x = found(before)
    torch.testing.assert_close(steps.transitions(problem.linearise(x)[1]), numeric, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("timeline", TIMELINES, ids=NAMES)
def test_low_rank_and_kinks_give_what_a_sweep_gives(timeline, rank):
    A = Factored(0.4 * random(N, rank, seed=7) / rank, 0.5 * random(N, rank, seed=8))
    for steps in (sloped(timeline, A), affine(timeline, A), affine(timeline, A, scale=5, activation=activations.relu)):
        truth, found = sweep(steps, Adaptive(1e-13)), solve_together(steps, Adaptive(1e-10))
        torch.testing.assert_close(found.trajectory, truth.trajectory, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.last, truth.last, rtol=0, atol=1e-10)
        assert found.all_converged


def swept_again(monkeypatch):
    """Return a list that will hold the timelines that were left to a sweep."""
    left = []

    def noted(steps, *rest):
        left.append(steps.timeline)
        return sweep(steps, *rest)

    monkeypatch.setattr(module, "sweep", noted)
    return left


def test_linear_equations_take_one_correction_and_no_sweep(monkeypatch):
    left, scans = swept_again(monkeypatch), []
    monkeypatch.setattr(module, "scan", lambda *arguments: scans.append(1) or scan(*arguments))
    steps = sloped(EVEN)
    torch.testing.assert_close(solve_together(steps, Adaptive(1e-6)).last, by_hand(steps)[1], rtol=0, atol=1e-6)
    assert (len(scans), left) == (2, [])  # one for the tolerance, one for the digits beyond it


@pytest.mark.parametrize("timeline", TIMELINES, ids=NAMES)
def test_sequences_that_take_too_many_steps_are_swept_and_the_others_are_not(monkeypatch, timeline):
    left = swept_again(monkeypatch)
    carry = random(4, H, seed=2)
    carry[1:3] = 0
    source = random(timeline.rows, N + H, seed=1)
    _, rows = timeline.of(torch.tensor([False, True, True, False]))
    source[rows] = 0  # these two stay at rest, and are done before the first step
    monkeypatch.setattr(module, "_MOST", 1)
    steps = affine(timeline, source=source, carry=carry)
    found = solve_together(steps, Adaptive(1e-12))
    pairs, last = by_hand(steps)
    torch.testing.assert_close(found.trajectory, pairs, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.last, last, rtol=0, atol=1e-11)
    assert found.all_converged
    assert bool(found.converged.all())
    assert [rest.batch for rest in left] == [2]


def test_an_unstable_recurrence_that_overflows_on_the_way_is_swept(monkeypatch):
    """Far from the solution every unit is on and h grows a hundredfold a time; at the solution they saturate."""
    left = swept_again(monkeypatch)
    M = torch.cat((4 * random(H, N, seed=4), torch.zeros(H, H, dtype=torch.float64)), 1)
    timeline = Timeline((2,) * 400)
    source = 1e-3 * random(timeline.rows, N + H, seed=1)
    steps = affine(timeline, Dense(contraction(0.1)), M=M, B=50 * random(N, H, seed=3), source=source)
    found = solve_together(steps, Adaptive(1e-12))
    assert found.all_converged
    assert bool(found.trajectory.isfinite().all())
    before, x = found.trajectory[:, N:], found.trajectory[:, :N]
    torch.testing.assert_close(steps.driven_by(before)(x), x, rtol=0, atol=1e-11)
    handed_over = timeline.after(before, found.last)
    torch.testing.assert_close(steps.outputs(found.trajectory), handed_over, rtol=0, atol=1e-11)
    assert len(left) == 1


def test_a_sequence_that_is_not_finite_is_lost_and_the_others_are_solved_together(monkeypatch):
    left = swept_again(monkeypatch)
    steps = affine(EVEN)
    source = steps.source.clone()
    source[EVEN.starts[7] + 2, 0] = torch.nan
    found = solve_together(affine(EVEN, source=source), Adaptive(1e-12))
    torch.testing.assert_close(found.last[[0, 1, 3]], by_hand(steps)[1][[0, 1, 3]], rtol=0, atol=1e-11)
    assert bool(found.last[2].isnan().all())
    assert [rest.batch for rest in left] == [1]
    assert bool(found.converged[: EVEN.starts[7]].all())
    assert not found.all_converged


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8, 1e12])
def test_a_large_unit_excuses_no_defect_of_a_small_one(scale):
    timeline = Timeline((2,) * 60)
    M, B, source = 0.2 * random(H, N + H, seed=4), 0.3 * random(N, H, seed=3), random(timeline.rows, N + H, seed=1)
    B[:, 0], M[:, N], M[0] = 0, 0, 0  # nobody reads the first output
    source[:, N] = scale
    steps = affine(timeline, M=M, B=B, source=source)
    found, truth = solve_together(steps, Adaptive(1e-12)), sweep(steps, Adaptive(1e-13))
    torch.testing.assert_close(found.trajectory[:, :N], truth.trajectory[:, :N], rtol=0, atol=1e-11)
    assert found.all_converged


@pytest.mark.parametrize("most", [1, 2, 3, 10, 20])
def test_all_newton_steps_together_take_no_more_applications_than_allowed(most):
    found = solve_together(affine(EVEN, Dense(contraction(0.9))), Adaptive(1e-12, 0.0, most))
    assert int(found.steps.max()) <= max(3, most) + 2
    assert bool(found.trajectory.isfinite().all())
    assert not found.all_converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_vanishes_ends_at_zero(dtype):
    A, M, B = (tensor.to(dtype) for tensor in (contraction(0.3), 1e-2 * random(H, N + H, seed=4), random(N, H, seed=3)))
    steps = affine(Timeline((3,) * 500), Dense(A), source=None, M=M, B=B, carry=random(3, H, seed=2).to(dtype))
    found = solve_together(steps, Adaptive(0.0, 1e-5))
    assert found.all_converged
    assert bool((found.trajectory[-300:, N:] == 0).all())


def test_an_empty_batch_has_no_states():
    found = solve_together(affine(Timeline((0, 0))), Adaptive(1e-12))
    assert found.trajectory.shape == (0, N + H)
    assert found.all_converged
