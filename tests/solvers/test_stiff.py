"""Problems on which Picard does not arrive: who is trusted there, and with what accuracy."""

import pytest
import torch

from idl import Adaptive, Anderson, ImplicitFunctionInf, Newton, Picard, equilibrium


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
