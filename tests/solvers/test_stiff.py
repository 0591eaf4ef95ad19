"""Problems on which Picard does not arrive: who is trusted there, and with what accuracy."""

from dataclasses import dataclass

import pytest
import torch

from idl import Adaptive, Anderson, ImplicitFunctionInf, Newton, Picard, activations, equilibrium
from idl.linalg.operators import Dense, Factored
from idl.maps.affine import SlopedMap
from idl.maps.problems import affine_problem
from idl.solvers.base import AbstractFixedPointSolver, State


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(n, kappa, seed):
    """A non-negative matrix with row sums of ``kappa``: the slowest contraction of its norm."""
    A = drawn(n, n, seed=seed).abs()
    return A * kappa / A.sum(1, keepdim=True)


def blocks(n, kappa, seed, count=5, coupling=1e-4):
    """Positive blocks that hardly know of each other: as many slow directions as there are blocks."""
    A = torch.full((n, n), coupling / n, dtype=torch.float64) * drawn(n, n, seed=seed).abs()
    size = n // count
    for k in range(count):
        units = slice(k * size, (k + 1) * size)
        A[units, units] += drawn(size, size, seed=seed + 1 + k).abs() / size
    return A * kappa / A.sum(1, keepdim=True)


def signs(n, radius, seed):
    """Entries of both signs, as training leaves them, with the spectral radius given."""
    A = drawn(n, n, seed=seed)
    return A * radius / torch.linalg.eigvals(A).abs().max()


PROBLEMS = {
    # name: matrix of n and seed, relative error promised in float32
    "positive .99": (lambda n, seed: positive(n, 0.99, seed), 1e-5),
    "positive .999": (lambda n, seed: positive(n, 0.999, seed), 1e-4),
    "five blocks .99": (lambda n, seed: blocks(n, 0.99, seed), 1e-5),
    "five blocks .999": (lambda n, seed: blocks(n, 0.999, seed), 1e-4),
    "signs of radius .98": (lambda n, seed: signs(n, 0.98, seed), 1e-5),
}


def stiff(name, n=100, batch=24, seed=0, dtype=torch.float32):
    """Return ``A``, inputs, their equilibrium in float64 and the relative error promised in float32."""
    make, promised = PROBLEMS[name]
    A, u = make(n, seed).to(dtype), drawn(batch, n, seed=seed + 100).to(dtype)
    u[: batch // 3] = u[: batch // 3].abs()  # a third has every unit active: the stiffest of all patterns
    return A, u, truth(A.double(), u.double()), promised


def truth(A, u):
    """Return the ReLU equilibrium by dense semismooth Newton in float64, one sample at a time."""
    solutions = []
    for b in u:
        x = torch.relu(b)
        for _ in range(200):
            slope = (A @ x + b > 0).double()
            x = torch.linalg.solve(torch.eye(len(A), dtype=torch.float64) - slope[:, None] * A, slope * b)
            if torch.equal((A @ x + b > 0).double(), slope):
                break
            x = torch.relu(A @ torch.relu(A @ x + b) + b)  # two plain steps keep it from turning in a circle
        assert float((torch.relu(A @ x + b) - x).abs().max()) <= 1e-12 * float(1 + x.abs().max())
        solutions.append(x)
    return torch.stack(solutions)


def solved(A, u, solver, **options):
    return equilibrium(A, torch.eye(u.shape[1], dtype=u.dtype), u, solver=solver, **options)


def relative_error(x, exact):
    return float(((x.double() - exact).abs().amax(1) / exact.abs().amax(1)).max())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n", [40, 100])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_default_is_right_in_float32_within_its_steps(name, n, seed):
    A, u, exact, promised = stiff(name, n, seed=seed)
    solution = solved(A, u, Adaptive(), on_failure="raise")
    assert bool(solution.converged.all())
    assert relative_error(solution.x, exact) <= promised
    assert int(solution.steps.max()) <= 302


@pytest.mark.parametrize("name", PROBLEMS)
def test_newton_is_right_in_float32(name):
    A, u, exact, promised = stiff(name)
    assert relative_error(solved(A, u, Newton(), on_failure="raise").x, exact) <= promised


@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "five blocks .999"])
def test_anderson_is_right_where_slow_directions_are_few(name, n):
    A, u, exact, _ = stiff(name, n)
    assert relative_error(solved(A, u, Anderson(), on_failure="raise").x, exact) <= 1e-4


@pytest.mark.parametrize("solver", [Adaptive(atol=1e-10), Newton(atol=1e-10)], ids=repr)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_tolerance_is_reached_in_float64(name, solver):
    A, u, exact, _ = stiff(name, dtype=torch.float64)
    solution = solved(A, u, solver, on_failure="raise")
    assert float((solution.x - exact).abs().max()) <= 1e-8


@pytest.mark.parametrize("name", PROBLEMS)
def test_plain_and_accelerated_steps_arrive_where_newton_does(name):
    A, u, exact, _ = stiff(name, n=40, batch=6, dtype=torch.float64)
    for solver in (Picard(atol=1e-7, max_steps=40_000), Anderson(atol=1e-7, max_steps=5000)):
        solution = solved(A, u, solver, on_failure="raise")
        # The estimated error is within the tolerance; estimates from the slowest mode may be off by a factor.
        assert relative_error(solution.x, exact) <= 1e-6


def test_picard_says_that_it_has_not_arrived():
    A, u, exact, _ = stiff("positive .999")
    solution = solved(A, u, Picard(), on_failure="ignore")
    assert relative_error(solution.x, exact) > 1e-2
    assert not bool(solution.converged[: len(u) // 3].any())


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Newton(), Adaptive()], ids=repr)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_sample_called_converged_is_as_right_as_was_asked(name, solver):
    A, u, exact, promised = stiff(name, n=60, seed=4)
    solution = solved(A, u, solver, on_failure="ignore")
    size = exact.abs().amax(1)
    error = (solution.x.double() - exact).abs().amax(1)
    # Anderson promises no digits on such problems; a wrong estimate there must still be within a factor of ten.
    factor = 10 if isinstance(solver, Anderson) else 1
    allowed = torch.maximum(torch.full_like(error, 3e-5), factor * promised * size)
    assert bool((error <= allowed)[solution.converged].all())


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_solution_of_the_default_does_not_depend_on_the_start(name):
    A, u, exact, promised = stiff(name, n=60, seed=5)
    for seed, size in ((6, 1.0), (7, 100.0)):
        x0 = size * drawn(*u.shape, seed=seed).float()
        solution = solved(A, u, Adaptive(), x0=x0, on_failure="raise")
        assert relative_error(solution.x, exact) <= 2 * promised


@pytest.mark.parametrize("name", ["positive .99", "positive .999"])
def test_the_model_function_is_right_too(name):
    A, u, _, promised = stiff(name)
    f = ImplicitFunctionInf(kappa=0.9991, on_failure="raise")
    exact = truth(f.state_matrix(A).dense().double(), u.double())
    solution = f.solution(A, torch.eye(len(A)), u)
    assert relative_error(solution.x, exact) <= promised
    assert bool(((solution.x.double() - exact).abs().amax(1) <= solution.error_bound.double() * (1 + 1e-6)).all())


@pytest.mark.parametrize("name", ["positive .999", "five blocks .999"])
def test_stiff_samples_that_are_not_finite_do_not_spoil_the_others(name):
    A, u, exact, promised = stiff(name)
    u[3], u[20, 5] = torch.nan, torch.inf
    with pytest.warns(match="2 of 24 samples"):
        solution = solved(A, u, Adaptive())
    keep = [i for i in range(24) if i not in (3, 20)]
    assert bool(solution.x[[3, 20]].isnan().all())
    assert relative_error(solution.x[keep], exact[keep]) <= promised


@pytest.mark.parametrize("rank", [1, 4, 32, 33, 40])
def test_a_stiff_low_rank_map_is_solved(rank):
    # Rank 40 is above what the direct solve counts as cheap.
    n = 100
    left, right = drawn(n, rank, seed=1).abs(), drawn(n, rank, seed=2).abs()
    left = left * 0.999 / (left @ right.sum(0))[:, None]
    left, right, u = left.float(), right.float(), drawn(16, n, seed=3).float()
    exact = truth(left.double() @ right.double().T, u.double())
    f = ImplicitFunctionInf(kappa=0.9995, on_failure="raise")
    assert relative_error(f((left, right), torch.eye(n), u), exact) <= 1e-4


@pytest.mark.parametrize("size", [1024, 1025])
def test_a_stiff_map_is_solved_on_both_sides_of_the_size_up_to_which_rows_are_solved_directly(size):
    A = positive(size, 0.999, seed=0).float()
    u = drawn(2, size, seed=1).abs().float()  # every unit is active, so that the truth is one linear solve
    exact = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - A.double(), u.double().T).T
    solution = solved(A, u, Adaptive())
    assert bool(solution.converged.all())
    assert relative_error(solution.x, exact) <= 1e-4


def reading(n, *shifts, gains=None):
    """Each unit reads those that lie ``shifts`` behind it on a ring."""
    eye = torch.eye(n, dtype=torch.float64)
    return sum(gain * eye.roll(shift, 0) for shift, gain in zip(shifts, gains or [1.0] * len(shifts), strict=True))


def chain(n, own):
    """Each unit reads the next and, ``own`` times, itself; the last one nothing or itself."""
    return own * torch.eye(n, dtype=torch.float64) + torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)


def chosen(n, count, seed=0):
    """Each unit reads ``count`` others, drawn at random."""
    order = torch.rand(n, n, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return torch.zeros(n, n, dtype=torch.float64).scatter_(1, order[:, :count], 1.0)


def tree(n):
    """Each unit reads its parent in a binary tree; the root reads itself."""
    A, unit = torch.zeros(n, n, dtype=torch.float64), torch.arange(1, n)
    A[unit, (unit - 1) // 2], A[0, 0] = 1.0, 1.0
    return A


FEW_NEIGHBOURS = {
    # Signs settle one after another along these: many Newton steps, while the residual rises.
    "a ring": lambda n: reading(n, 1),
    "a ring with its own state": lambda n: reading(n, 0, 1),
    "a ring of both neighbours": lambda n: reading(n, 1, -1),
    "a ring with a shortcut": lambda n: reading(n, 1, n // 2, gains=[1.0, 0.1]),
    "a ring of both signs": lambda n: reading(n, 1, 2, gains=[1.0, -0.5]),
    "a chain": lambda n: chain(n, 0.0),
    "a chain with its own state": lambda n: chain(n, 1.0),
    "a tree": tree,
    "one other unit": lambda n: chosen(n, 1),
    "three other units": lambda n: chosen(n, 3),
}


def sparse(name, n, kappa, dtype=torch.float32):
    """Return ``A`` with rows of ``kappa`` and inputs of rank 8, as a trained model has them."""
    A = FEW_NEIGHBOURS[name](n)
    A = A * kappa / A.abs().sum(1, keepdim=True).clamp_min(1.0)
    return A.to(dtype), (drawn(16, 8, seed=0) @ drawn(8, n, seed=1) / 2).to(dtype)


@pytest.mark.parametrize("solver", [Adaptive(), Newton()], ids=repr)
@pytest.mark.parametrize("kappa", [0.99, 0.999])
@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("name", FEW_NEIGHBOURS)
def test_units_that_read_few_others_are_solved_within_the_default_steps(name, n, kappa, solver):
    A, u = sparse(name, n, kappa)
    solution = solved(A, u, solver, on_failure="raise")
    x = solution.x.double()
    residual = (torch.relu(x @ A.double().T + u.double()) - x).abs().amax(1)  # error <= residual / (1 - kappa)
    assert bool((residual <= (2 * torch.finfo(torch.float32).eps * x.abs().amax(1)).clamp_min(solver.atol)).all())
    assert int(solution.steps.max()) <= 302


@pytest.mark.parametrize("name", FEW_NEIGHBOURS)
def test_the_gradient_of_units_that_read_few_others_is_that_of_a_dense_solve(name):
    A, u = sparse(name, 100, 0.99)
    u.requires_grad_()
    x = solved(A, u, Adaptive(), on_failure="raise").x
    x.square().sum().backward()
    for row, gradient in zip(x.detach().double(), u.grad.double(), strict=True):
        slope = (row > 0).double()
        expected = slope * torch.linalg.solve(torch.eye(100, dtype=torch.float64) - A.double().T * slope, 2 * row)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def driven(n, units, seed=0):
    """Return inputs that drive some units, from where waves start: the others are active beside active ones only."""
    generator = torch.Generator().manual_seed(seed)
    u = -0.02 * torch.rand(8, n, generator=generator)
    for row in u:
        row[torch.randperm(n, generator=generator)[:units]] = 5 * torch.rand(units, generator=generator)
    return u


@pytest.mark.parametrize("units", [1, 4])
@pytest.mark.parametrize("kappa", [0.99, 0.999])
@pytest.mark.parametrize(("n", "steps"), [(100, 300), (400, 1000)])
@pytest.mark.parametrize("name", FEW_NEIGHBOURS)
def test_waves_through_all_units_are_solved(name, n, steps, kappa, units):
    # A wave moves on by one unit a step, whatever the method: the steps must be as many as the units.
    A, _ = sparse(name, n, kappa)
    u = driven(n, units)
    solution = solved(A, u, Adaptive(max_steps=steps), on_failure="raise")
    x = solution.x.double()
    residual = (torch.relu(x @ A.double().T + u.double()) - x).abs().amax(1)
    assert bool((residual <= (2 * torch.finfo(torch.float32).eps * x.abs().amax(1)).clamp_min(3e-6)).all())


def test_a_wave_is_not_followed_by_a_direct_solve_for_each_unit(monkeypatch):
    calls, solve = [], Dense.solve
    monkeypatch.setattr(Dense, "solve", lambda self, slope, rhs: calls.append(len(rhs)) or solve(self, slope, rhs))
    A, _ = sparse("a ring", 300, 0.999)
    u = torch.full((8, 300), -0.01)
    u[:, 0] = torch.linspace(3, 5, 8)
    solved(A, u, Adaptive(max_steps=1000), on_failure="raise")
    assert 0 < sum(calls) <= 10 * len(u)


@pytest.mark.parametrize("kind", ["dense", "low rank"])
def test_a_wave_is_solved_whatever_form_the_matrix_has(kind):
    n = 32
    A = reading(n, 0, 1, gains=[0.4995, 0.4995]).float()
    u = -0.02 * torch.rand(16, n, generator=torch.Generator().manual_seed(0))
    u[:, 0] = 5.0
    matrix = Dense(A) if kind == "dense" else Factored(A, torch.eye(n))
    solution = solved(matrix, u, Newton(), on_failure="raise")
    assert relative_error(solution.x, truth(A.double(), u.double())) <= 1e-4


def test_small_steps_that_do_not_shrink_are_not_taken_for_the_end():
    # Each step is smaller than the tolerance; all that the wave still brings is eighty tolerances.
    A = reading(8, 1, gains=[0.999])
    u = torch.full((1, 8), -1e-9, dtype=torch.float64)
    u[0, 0] = 2e-6
    solution = solved(A, u, Newton(), on_failure="raise")
    assert float((solution.x - truth(A, u)).abs().max()) <= Newton().atol


def near_the_tolerance(size, decay, gains, n):
    A = reading(n, *([1] if len(gains) == 1 else [1, -1]), gains=gains)
    u = torch.full((1, n), -decay, dtype=torch.float64)
    u[0, 0] = 1.0
    return A, size * u


@pytest.mark.parametrize(
    "case",
    [
        (2e-5, 0.01, [0.9999], 40),
        (2e-5, 0.0005, [0.9999], 40),
        (9e-7, 0.003, [0.69993, 0.29997], 100),
        (9.17e-7, 0.0063, [0.69993, 0.29997], 100),
    ],
)
def test_a_wave_near_the_tolerance_is_not_called_converged_before_it_has_closed_its_ring(case):
    # With row sums of .9999 the last of its signs brings up to ten thousand times the residual that it leaves.
    A, u = near_the_tolerance(*case)
    solution = solved(A, u, Newton(), on_failure="raise")
    assert float((solution.x - truth(A, u)).abs().max()) <= Newton().atol


@dataclass(frozen=True)
class Unsure(AbstractFixedPointSolver):
    """Stays where it is, with a residual within its tolerance; each step costs a hundred applications."""

    error: float = torch.inf

    def init(self, problem, x):
        x = problem.start(x)
        tolerance = self.tolerance(problem, x)
        return State(x, tolerance / 2, torch.full_like(tolerance, self.error), tolerance, 0.5, False), 2

    def step(self, problem, state, budget):
        return state, 100


@pytest.mark.parametrize("error", [torch.inf, 1.0])
def test_a_row_whose_error_is_unknown_is_not_taken_for_one_that_is_stuck_at_rounding(error):
    A, u = sparse("a ring", 10, 0.99)
    assert bool(solved(A, u, Unsure(error=error), on_failure="ignore").converged.all()) == (error < torch.inf)


def test_the_steps_of_newton_are_the_applications_it_makes(monkeypatch):
    problem, state = slow(0.99, n=60)
    counted = []
    kind = type(problem)
    apply_into, linearise = kind.apply_into, kind.linearise
    monkeypatch.setattr(kind, "apply_into", lambda self, x, out: counted.append("f") or apply_into(self, x, out))
    monkeypatch.setattr(kind, "linearise", lambda self, x: counted.append("J") or linearise(self, x))
    _, spent = Newton().step(problem, state, 300)
    assert spent == len(counted) + 1  # one direct solve


def test_once_most_rows_are_solved_directly_all_are(monkeypatch):
    calls, solve = [], Dense.solve
    monkeypatch.setattr(Dense, "solve", lambda self, slope, rhs: calls.append(len(rhs)) or solve(self, slope, rhs))
    problem, state = slow(0.99)
    for direct in ([True, True, True, False], [True, True, False, False]):
        after, _ = Newton().step(problem, state._replace(direct=torch.tensor(direct)), 300)
        assert bool(after.direct.all()) == (sum(direct) > 2)
    assert calls == [4, 2]


@pytest.mark.parametrize("name", [name for name in FEW_NEIGHBOURS if "signs" not in name])
def test_plain_and_newton_steps_on_a_nonnegative_matrix_rise_to_the_solution(name):
    A, u = sparse(name, 60, 0.99, torch.float64)
    problem = affine_problem(Dense(A), u, activations.relu)
    newton, x = Newton(), torch.relu(u)
    state = newton.begin(problem, x, newton.tolerance(problem, x))
    all_rows = torch.ones_like(state.direct)
    state, _ = newton.step(problem, state._replace(direct=all_rows), 300)
    for _ in range(60):  # each step turns on at least one of as many units
        before = state.point
        state, _ = newton.step(problem, state._replace(direct=all_rows), 300)
        assert bool((state.point >= before - 1e-9 * (1 + before.abs())).all())
    assert float(state.residual.max()) <= 1e-10


def slow(row_sum, activation=activations.relu, n=20):
    """Return a positive matrix with these row sums as a problem, and a state of Newton's in which every row is slow."""
    problem = affine_problem(Dense(positive(n, row_sum, seed=0)), drawn(4, n, seed=1), activation)
    newton, x = Newton(), drawn(4, n, seed=2)
    state = newton.begin(problem, x, newton.tolerance(problem, x))
    all_rows = torch.ones_like(state.slow)
    return problem, state._replace(slow=all_rows, direct=all_rows)


STEEP = activations.Activation(lambda z: 2 * z, lambda z: torch.full_like(z, 2.0), lipschitz=2.0, name="steep")
UNKNOWN = activations.Activation(torch.relu, activations.relu.derivative, name="unknown")


@pytest.mark.parametrize(
    ("row_sum", "activation", "contracts"),
    [
        (0.99, activations.relu, True),
        (1.01, activations.relu, False),
        (0.49, STEEP, True),
        (0.99, STEEP, False),
        (0.99, UNKNOWN, False),
    ],
)
def test_slow_rows_take_plain_steps_and_direct_solves_only_where_the_map_is_proved_to_contract(
    row_sum, activation, contracts
):
    # Elsewhere plain steps may lead away, and LU in every step finds out at a high price that there is no fixed point.
    problem, state = slow(row_sum, activation)
    after, spent = Newton().step(problem, state, 300)
    assert (after.error_factor < torch.inf) == contracts
    assert (spent == 20 + 2) == contracts  # a plain step for each unit, one direct solve, one application


def test_plain_steps_are_a_share_of_the_steps_that_are_left():
    problem, state = slow(0.99, n=60)
    for budget in (300, 80, 24):
        _, spent = Newton().step(problem, state, budget)
        assert spent == budget // 8 + 2
    _, spent = Newton().step(problem, state, 23)
    assert spent == 2


def test_a_thousand_units_are_not_solved_directly_in_every_step(monkeypatch):
    calls, solve = [], Dense.solve
    monkeypatch.setattr(Dense, "solve", lambda self, slope, rhs: calls.append(self.dim) or solve(self, slope, rhs))
    for n in (512, 513):
        problem, state = slow(0.99, n=n)
        Newton().step(problem, state, 300)
    assert calls == [512]


@pytest.mark.parametrize("order", [1.0, torch.inf])
@pytest.mark.parametrize("steepest", [0.5, 1.0, 2.0])
def test_a_linear_map_is_said_to_contract_where_its_norm_is_below_one(order, steepest):
    A, slope = drawn(6, 6, seed=0) / 4, steepest * torch.rand(3, 6, dtype=torch.float64)
    slope[:, 0] = steepest
    problem = SlopedMap(Dense, order).at((slope, drawn(3, 6, seed=1), A))
    norm = torch.linalg.matrix_norm(steepest * A, 1 if order == 1 else torch.inf)
    assert problem.contraction == pytest.approx(float(norm), rel=1e-14)


@pytest.mark.parametrize("row_sum", [1e8, 1e12])
def test_newton_does_not_call_a_map_that_runs_away_converged(row_sum):
    A, u = positive(60, row_sum, seed=2).float(), drawn(8, 60, seed=1).float()
    solution = solved(A, u, Newton(), on_failure="ignore")
    assert not bool(solution.converged[solution.residual > 1].any())
