"""Errors whose slow part hides below the steps of faster ones: what is called converged there."""

from dataclasses import dataclass

import pytest
import torch

from idl import Adaptive, Anderson, ConvergenceError, ImplicitAdjoint, ImplicitFunctionInf, Newton, Picard, equilibrium
from idl.activations import Activation
from idl.linalg.operators import Dense
from idl.maps.affine import AffineMap, SlopedMap
from idl.recurrence.parallel import solve_together
from idl.recurrence.steps import AffineSteps, SlopedSteps
from idl.recurrence.sweep import sweep
from idl.recurrence.timeline import Timeline
from idl.solvers.base import AbstractFixedPointSolver, State


@dataclass(frozen=True)
class Plain(AbstractFixedPointSolver):
    """A solver of a user's, which takes its last step for its error."""

    def init(self, problem, x):
        return self._seen(problem, problem.start(x)), 1

    def step(self, problem, state, budget):
        return self._seen(problem, state.x), 1

    def _seen(self, problem, x):
        image, tolerance = problem(x), self.tolerance(problem, x)
        residual = problem.distance(image, x)
        worst = float((residual / tolerance).max())
        return State(image, residual, residual, tolerance, worst, settled=worst <= 1)


SOLVERS = [Picard(), Anderson(), Newton(), Adaptive(), Plain()]
STIFF = 0.9999


def reading(n, count, row_sum, seed):
    """Each unit reads ``count`` units, itself perhaps, with non-negative weights."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, n, generator=generator).argsort(1)[:, :count]
    weights = torch.rand(n, count, generator=generator, dtype=torch.float64)
    A = torch.zeros(n, n, dtype=torch.float64).scatter_(1, order, weights)
    return A * row_sum / A.sum(1, keepdim=True)


def ring(n, row_sum):
    """Each unit reads the one behind it."""
    return row_sum * torch.eye(n, dtype=torch.float64).roll(1, 0)


def driven(n, size, unit=0):
    u = torch.zeros(1, n, dtype=torch.float64)
    u[0, unit] = size
    return u


def exact(A, u):
    """Return the equilibrium of non-negative ``A`` and ``u``, in which every unit is active."""
    return torch.linalg.solve(torch.eye(len(A), dtype=A.dtype) - A, u.T).T


def nearly_cancelling(A, seed):
    """Return a cotangent whose part along the slowest direction, in which all units are alike, is hardly there."""
    g = torch.randn(1, len(A), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g - (1 - 1e-4) * g.mean()


def solved(A, u, solver, **options):
    return equilibrium(A, torch.eye(len(A), dtype=A.dtype), u, solver=solver, **options)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("count", [2, 3, 10, 100])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
def test_a_sample_called_converged_is_within_its_tolerance(size, count, solver):
    # What one unit brings spreads over all of them: steps shrink below the tolerance, and there they hardly shrink.
    for seed in range(4):
        A, u = reading(100, count, STIFF, seed), driven(100, size, unit=seed)
        solution = solved(A, u, solver, on_failure="ignore")
        error = float((solution.x - exact(A, u)).abs().max())
        assert error <= solver.atol or not bool(solution.converged)


@pytest.mark.parametrize("solver", [Newton(), Adaptive()], ids=repr)
@pytest.mark.parametrize("count", [2, 3, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_finds_it_to_the_last_digits(dtype, count, solver):
    for seed in range(4):
        A, u = reading(100, count, STIFF, seed).to(dtype), driven(100, 1e-2, unit=seed).to(dtype)
        solution = solved(A, u, solver, on_failure="raise")
        truth = exact(A.double(), u.double())
        error = float((solution.x - truth).abs().max())
        assert error <= solver.atol + torch.finfo(dtype).eps * float(truth.max())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("size", [1e-7, 1e-6])
def test_a_wave_below_the_tolerance_is_not_taken_for_rounding(size, solver):
    # Around a ring steps stay as they are: within the tolerance, no smaller, and a hundred of them to come.
    A, u = ring(50, STIFF), driven(50, size)
    solution = solved(A, u, solver, on_failure="ignore")
    error = float((solution.x - exact(A, u)).abs().max())
    assert error <= solver.atol or not bool(solution.converged)
    assert bool(solution.converged) == isinstance(solver, Newton | Adaptive)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_gradient_called_converged_is_within_its_tolerance(solver):
    adjoint = ImplicitAdjoint(type(solver)(atol=0.0, rtol=1e-4))
    for seed in range(4):
        A, u = reading(100, 3, STIFF, seed), driven(100, 1.0).requires_grad_()
        g = nearly_cancelling(A, seed)
        solution = solved(A, u, Newton(atol=1e-10), phi="identity", adjoint=adjoint, on_failure="raise")
        try:
            solution.x.backward(g)
        except ConvergenceError:
            assert not isinstance(solver, Newton | Adaptive)
            continue
        error = float((u.grad - exact(A.T, g)).abs().sum())
        assert error <= 1e-4 * float(g.abs().sum())


@pytest.mark.parametrize("kappa", [0.9, 0.99])
def test_an_ordinary_contraction_is_not_asked_for_a_proof(kappa):
    A, u = reading(30, 30, kappa, seed=0), driven(30, 1.0)
    assert AffineMap(Dense, function(kappa).activation).at((u, A)).amplification == 0
    assert bool(solved(A, u, Picard(max_steps=5000)).converged)


def function(kappa):
    return ImplicitFunctionInf(kappa=kappa)


@pytest.mark.parametrize(
    ("row_sum", "amplification"), [(0.5, 0), (0.99, 0), (0.999, 1e3), (0.9999, 1e4), (1.0, 0), (1.5, 0)]
)
def test_errors_are_amplified_where_a_map_is_proved_to_contract_slowly(row_sum, amplification):
    A = reading(20, 20, row_sum, seed=0)
    problem = AffineMap(Dense, function(0.9).activation).at((driven(20, 1.0), A))
    assert problem.amplification == pytest.approx(amplification, rel=1e-6)
    assert problem.known == pytest.approx(row_sum, rel=1e-12)
    linear = SlopedMap(Dense, order=1.0).at((torch.ones(1, 20).double(), driven(20, 1.0), A.T))
    assert linear.amplification == pytest.approx(amplification, rel=1e-6)


def test_what_is_known_of_a_function_is_not_worked_out_again(monkeypatch):
    asked = []
    for bound in ("row_sum_bound", "column_sum_bound"):
        monkeypatch.setattr(Dense, bound, property(lambda self: asked.append(self) or 0.0))
    A = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    function(0.99)(A, torch.eye(9), torch.ones(2, 9)).sum().backward()
    assert asked == []
    function(0.995)(A, torch.eye(9), torch.ones(2, 9))
    assert len(asked) == 1


@pytest.mark.parametrize("row_sum", [0.5, 0.99])
def test_a_wide_constraint_raises_no_doubts_about_a_matrix_that_is_well_inside(row_sum):
    A, u = reading(20, 20, row_sum, seed=0), driven(20, 1.0)
    problem = AffineMap(Dense, function(0.9).activation, contraction=STIFF).at((u, A))
    assert problem.amplification == 0
    assert problem.contraction == pytest.approx(row_sum)


def test_what_a_solve_worked_out_its_backward_knows(monkeypatch):
    asked = []
    bound = Dense.row_sum_bound.func
    monkeypatch.setattr(Dense, "row_sum_bound", property(lambda self: asked.append(self) or bound(self)))
    A = reading(9, 9, 0.5, seed=0).requires_grad_()
    solved(A, driven(9, 1.0), Adaptive()).x.sum().backward()
    assert len(asked) == 1


def test_matrices_mapped_over_contract_each_in_its_own_way():
    matrices = torch.stack([reading(100, 3, row_sum, seed=1) for row_sum in (0.5, STIFF)])
    u = driven(100, 1e-4, unit=1)
    found = torch.vmap(lambda A: solved(A, u, Adaptive()).x)(matrices)
    torch.testing.assert_close(found, torch.stack([exact(A, u) for A in matrices]), rtol=0, atol=Adaptive().atol)


@pytest.mark.parametrize("lipschitz", [None, 1.001])
def test_slopes_at_the_solution_may_prove_what_nothing_proved_before(lipschitz):
    phi = Activation(lambda z: z, torch.ones_like, lipschitz=lipschitz, name="unproved")
    for seed in range(4):
        A, u = reading(100, 3, STIFF, seed), driven(100, 1.0).requires_grad_()
        g = nearly_cancelling(A, seed)
        adjoint = ImplicitAdjoint(Adaptive(atol=0.0, rtol=1e-4))
        solved(A, u, Newton(atol=1e-10), phi=phi, adjoint=adjoint, on_failure="raise").x.backward(g)
        assert float((u.grad - exact(A.T, g)).abs().sum()) <= 1e-4 * float(g.abs().sum())


@pytest.mark.parametrize("row_sum", [0.999, STIFF, 0.99999])
@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("solver", [Newton(), Adaptive()], ids=repr)
def test_a_slow_part_below_what_float32_can_tell_is_found(solver, size, row_sum):
    # One large unit makes steps ten million times smaller look like rounding, in units where they are not.
    A = torch.block_diag(torch.tensor([[0.5]], dtype=torch.float64), reading(99, 3, row_sum, seed=0)).float()
    u = torch.full((1, 100), 1e-7 * size)
    u[0, 0] = size
    solution = solved(A, u, solver, on_failure="raise")
    rounding = 4 * torch.finfo(torch.float32).eps * float(solution.x.max())
    assert float((solution.x - exact(A.double(), u.double())).abs().max()) <= max(solver.atol, rounding)


@pytest.mark.parametrize("method", [sweep, solve_together])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", ["nothing", "one unit", "each its part", "nothing, and one sample is lost"])
def test_the_backward_through_a_sequence_is_within_its_tolerance(own, dtype, method):
    n, times, rtol = 60, 12, 1e-4
    part = torch.zeros(n, dtype=torch.float64)
    if own == "one unit":
        part[0] = 0.9
    elif own == "each its part":
        part = 0.9 * torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    others = reading(n, 3, 1.0, seed=3).fill_diagonal_(0)
    A = STIFF * (torch.diag(part) + (1 - part)[:, None] * others / others.sum(1, keepdim=True))
    sources = torch.zeros(times, n + 1, dtype=torch.float64)
    sources[:, :n] = torch.cat([nearly_cancelling(A, seed) for seed in range(times)])
    slope = torch.ones(times, n, dtype=dtype)
    lost = int("lost" in own)
    slope[times - lost :, 0] = torch.nan
    nothing = torch.zeros(1, 1, dtype=dtype), torch.zeros(n, 1, dtype=dtype), torch.zeros(1, n + 1, dtype=dtype)
    transposed = Dense(A.T.contiguous().to(dtype))
    steps = SlopedSteps(Timeline((1,) * times), transposed, sources.to(dtype), *nothing, slope, None, 1.0)
    swept = method(steps, Adaptive(atol=0.0, rtol=rtol))
    assert swept.converged.tolist() == [True] * (times - lost) + [False] * lost
    g, found = (rows[: times - lost, :n] for rows in (sources.to(dtype).double(), swept.trajectory))
    errors = (found - exact(transposed.matrix.double(), g)).abs().sum(1)
    rounding = 4 * torch.finfo(dtype).eps * found.abs().sum(1)
    assert bool((errors <= rtol * g.abs().sum(1) + rounding).all())


@pytest.mark.parametrize("method", [sweep, solve_together])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_of_a_sequence_called_converged_are_within_their_tolerance(dtype, method):
    n, times = 100, 12
    timeline = Timeline((1,) * times)
    for seed in range(4):
        A = reading(n, 3, STIFF, seed).to(dtype)
        source = torch.zeros(times, n + 1, dtype=dtype)
        source[torch.arange(times), torch.arange(times)] = 1e-4
        nothing = torch.zeros(1, 1, dtype=dtype), torch.zeros(n, 1, dtype=dtype), torch.zeros(1, n + 1, dtype=dtype)
        steps = AffineSteps(timeline, Dense(A), source, *nothing, function(0.9).activation)
        swept = method(steps, Adaptive())
        assert swept.all_converged
        errors = (swept.trajectory[:, :n] - exact(A.double(), source[:, :n].double())).abs().amax(1)
        assert float(errors.max()) <= Adaptive().atol


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solving_units_for_their_own_part_loses_no_digits(dtype):
    # Its coefficients are rounded, and rounding is amplified as errors are: ten thousand times here.
    for seed in range(4):
        A = reading(100, 2, STIFF, seed)
        A = (0.6 * torch.eye(100, dtype=torch.float64) + 0.4 * A).mul_(STIFF).to(dtype)
        u = torch.randn(6, 100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).abs()
        truth = exact(A.double(), u.double())
        solution = solved(A, u, Adaptive(), on_failure="raise")
        assert relative(solution.x, truth) <= 2 * torch.finfo(dtype).eps * (
            1 if dtype == torch.float32 else 1 / (1 - STIFF)
        )
        inputs = u.clone().requires_grad_()
        solved(A, inputs, Adaptive(), on_failure="raise").x.backward(u)
        gradient = exact(A.T.double(), u.double())
        assert relative(inputs.grad, gradient) <= 1e-6


def relative(x, truth):
    return float(((x.double() - truth).abs().amax(1) / truth.abs().amax(1)).max())
