"""What every solver promises. A new solver adds one line to the table and inherits all of these tests."""

import math
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import partial
from typing import NamedTuple

import pytest
import torch

from idl import (
    Adaptive,
    Anderson,
    BackSubstitution,
    ConvergenceError,
    ConvergenceWarning,
    ImplicitFunction,
    InfNorm,
    Newton,
    Picard,
    equilibrium,
)
from idl.linalg.operators import Dense, StrictlyUpper


class Entry(NamedTuple):
    make: Callable
    most_steps: Callable[[int], int]
    """The steps that ``max_steps`` permits: exactly so many, or one more outer step."""
    triangular: bool = False


SOLVERS = {
    "Picard": Entry(Picard, lambda m: m),
    "damped Picard": Entry(partial(Picard, damping=0.7), lambda m: m),
    # The start, and its image to mix with: two applications are the least.
    "Anderson": Entry(Anderson, lambda m: max(m, 2)),
    # An outer step ends with an evaluation of the map, and a direct solve where the products of the budget stall.
    "Newton": Entry(Newton, lambda m: max(m, 2) + 2),
    "Adaptive": Entry(Adaptive, lambda m: max(m, 2) + 2),
    "BackSubstitution": Entry(BackSubstitution, lambda m: m, triangular=True),
}
ITERATIVE = [name for name, entry in SOLVERS.items() if not entry.triangular]


@pytest.fixture(params=SOLVERS)
def entry(request):
    return SOLVERS[request.param]


@pytest.fixture(params=ITERATIVE)
def iterative(request):
    return SOLVERS[request.param]


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(entry, n=12, batch=7, kappa=0.8, seed=0, dtype=torch.float64):
    """Return ``A`` with row sums of magnitudes ``kappa``, strictly triangular if need be, and inputs; ``B = I``."""
    A, u = drawn(n, n, seed=seed), drawn(batch, n, seed=seed + 1)
    A = (A * kappa / A.abs().sum(1, keepdim=True)).to(dtype)
    return (StrictlyUpper(A.triu(1)) if entry.triangular else Dense(A)), u.to(dtype)


def growing(n=10, batch=4, radius=2.0):
    """Return a positive matrix of spectral radius ``radius`` and positive inputs: no equilibrium exists."""
    A = drawn(n, n, seed=3).abs()
    return A * radius / torch.linalg.eigvals(A).abs().max(), drawn(batch, n, seed=4).abs() + 0.1


def solved(A, u, solver, phi="relu", **options):
    # B = I, so that pre-activations are x A^T + u exactly, without the rounding of a product.
    return equilibrium(A, torch.eye(u.shape[-1], dtype=u.dtype), u, phi=phi, solver=solver, **options)


PHI = {"relu": torch.relu, "tanh": torch.tanh}


def iterated(A, u, phi):
    """Return the equilibrium of a contraction by 0.9 or less, iterated in float64 to the last digit."""
    A, u = A.dense().double(), u.double()
    x = torch.zeros_like(u)
    for _ in range(400):
        x = PHI[phi](x @ A.T + u)
    return x


def true_residual(A, u, x, phi="relu"):
    A, u, x = (A if isinstance(A, torch.Tensor) else A.dense()).double(), u.double(), x.double()
    return (PHI[phi](x @ A.T + u) - x).abs().amax(1)


# --- the answer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", ["relu", "tanh"])
@pytest.mark.parametrize(("n", "batch"), [(1, 1), (1, 5), (2, 3), (12, 1), (40, 7)])
def test_the_solution_is_the_equilibrium(entry, n, batch, phi):
    A, u = problem(entry, n, batch)
    solution = solved(A, u, entry.make(atol=1e-12), phi)
    assert bool(solution.converged.all())
    assert solution.x.shape == (batch, n) and solution.x.dtype == torch.float64
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == (batch,)
    torch.testing.assert_close(solution.x, iterated(A, u, phi), rtol=0, atol=1e-11)


@pytest.mark.parametrize("phi", ["relu", "tanh"])
def test_the_default_tolerance_is_reached_in_float32(entry, phi):
    A, u = problem(entry, 40, 16, kappa=0.9, dtype=torch.float32)
    solution = solved(A, u, entry.make(), phi)
    assert bool(solution.converged.all()) and solution.x.dtype == torch.float32
    # The promise is an error of 3e-6, estimated; it may be wrong by a small factor.
    torch.testing.assert_close(solution.x.double(), iterated(A, u, phi), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_the_solution_does_not_depend_on_the_start(entry, size):
    A, u = problem(entry)
    for seed in (10, 11):
        solution = solved(A, u, entry.make(atol=1e-12, max_steps=1000), x0=size * drawn(*u.shape, seed=seed))
        assert bool(solution.converged.all())
        torch.testing.assert_close(solution.x, iterated(A, u, "relu"), rtol=0, atol=1e-10)


def test_a_start_at_the_solution_takes_fewer_steps(iterative):
    A, u = problem(iterative, kappa=0.9)
    solver = iterative.make(atol=1e-8)
    cold = solved(A, u, solver)
    warm = solved(A, u, solver, x0=cold.x)
    assert bool(warm.converged.all())
    assert bool((warm.steps < cold.steps).all())


def test_the_start_is_not_changed(entry):
    A, u = problem(entry)
    x0 = drawn(*u.shape, seed=5)
    before = x0.clone()
    solved(A, u, entry.make(), x0=x0)
    assert torch.equal(x0, before)


def test_a_larger_tolerance_takes_no_more_steps_and_is_reached(iterative):
    A, u = problem(iterative, kappa=0.9)
    x, last = iterated(A, u, "relu"), 0
    for atol in (1e-2, 1e-5, 1e-8, 1e-11):
        solution = solved(A, u, iterative.make(atol=atol))
        assert bool(solution.converged.all())
        assert float((solution.x - x).abs().max()) <= 3 * atol
        assert int(solution.steps.max()) >= last
        last = int(solution.steps.max())


def test_a_relative_tolerance_refers_to_the_size_of_each_sample(iterative):
    A, u = problem(iterative, kappa=0.9)
    sizes = torch.logspace(-8, 8, len(u), dtype=torch.float64)[:, None]
    solution = solved(A, u * sizes, iterative.make(atol=0.0, rtol=1e-6))
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.x / sizes, iterated(A, u, "relu"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e-6, 1e3, 1e6])
def test_a_tolerance_below_rounding_ends_at_rounding(iterative, size):
    A, u = problem(iterative, 20, 5, dtype=torch.float32)
    solution = solved(A, u * size, iterative.make(atol=1e-30))
    assert bool(solution.converged.all())
    assert int(solution.steps.max()) < 300
    torch.testing.assert_close(solution.x.double() / size, iterated(A, u * size, "relu") / size, rtol=0, atol=1e-5)


# --- what is said about it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_steps", [1, 2, 5, 300])
def test_the_reported_residual_is_that_of_the_returned_state(entry, dtype, max_steps):
    A, u = problem(entry, kappa=0.95, dtype=dtype)
    solution = solved(A, u, entry.make(max_steps=max_steps), on_failure="ignore")
    true = true_residual(A, u, solution.x)
    torch.testing.assert_close(solution.residual.double(), true, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 5, 8])
def test_too_few_steps_are_never_taken_for_convergence(iterative, max_steps):
    A, u = problem(iterative, kappa=0.95)
    solution = solved(A, u, iterative.make(atol=1e-10, max_steps=max_steps), on_failure="ignore")
    error = (solution.x - iterated(A, u, "relu")).abs().amax(1)
    assert bool((error[solution.converged] <= 1e-9).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_steps", [1, 3, 10, 300])
def test_the_error_bound_bounds_the_error(iterative, dtype, max_steps):
    A, u = problem(iterative, 20, 9, kappa=5.0, dtype=dtype)
    solver = iterative.make(max_steps=max_steps, atol=1e-7)
    f = ImplicitFunction(constraint=InfNorm(0.9), solver=solver, on_failure="ignore")
    solution = f.solution(A.matrix, torch.eye(20, dtype=dtype), u)
    error = (solution.x.double() - iterated(f.state_matrix(A.matrix), u, "relu")).abs().amax(1)
    assert bool((error <= solution.error_bound.double() * (1 + 1e-6) + 1e-15).all())


def test_where_nothing_is_proved_no_bound_is_given(entry):
    A, u = problem(entry)
    assert solved(A, u, entry.make()).error_bound is None


def test_diagnostics_carry_no_gradient_and_have_one_number_a_sample(entry):
    A, u = problem(entry)
    solution = solved(A, u[:6].reshape(2, 3, -1).requires_grad_(), entry.make())
    assert solution.x.requires_grad
    for numbers in (solution.residual, solution.steps, solution.converged):
        assert numbers.shape == (2, 3) and not numbers.requires_grad
    assert solution.steps.dtype == torch.int64 and solution.converged.dtype == torch.bool
    assert bool((solution.steps >= 1).all())


# --- how long it may take -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 5, 17, 40])
def test_no_more_steps_are_spent_than_are_allowed(entry, max_steps):
    A, u = problem(entry, 30, 6, kappa=0.99)
    solution = solved(A, u.abs(), entry.make(atol=0.0, max_steps=max_steps), on_failure="ignore")
    assert int(solution.steps.max()) <= entry.most_steps(max_steps)
    assert bool(solution.x.isfinite().all())


@pytest.mark.parametrize("max_steps", [1, 2, 5, 10, 40])
def test_on_a_map_that_grows_no_more_steps_are_spent_than_are_allowed(iterative, max_steps):
    A, u = growing()
    solution = solved(A, u, iterative.make(max_steps=max_steps), on_failure="ignore")
    assert int(solution.steps.max()) <= iterative.most_steps(max_steps)


@pytest.mark.parametrize("kappa", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("atol", [1e-4, 1e-9])
def test_picard_steps_grow_like_the_logarithm_of_the_tolerance_over_that_of_kappa(kappa, atol):
    A, u = kappa * torch.eye(3, dtype=torch.float64).roll(1, 0), torch.ones(2, 3, dtype=torch.float64)
    steps = int(solved(A, u, Picard(atol=atol, max_steps=10_000)).steps.max())
    # After k steps the error is kappa^k / (1 - kappa). Tests are up to 64 steps apart, closer where few are needed.
    needed = math.log(atol * (1 - kappa)) / math.log(kappa)
    assert needed - 3 <= steps <= 1.25 * needed + 6


def test_damping_slows_a_contraction_by_its_formula():
    kappa, damping, atol = 0.5, 0.25, 1e-9
    A, u = kappa * torch.eye(3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    steps = int(solved(A, u, Picard(atol=atol, max_steps=10_000, damping=damping)).steps.max())
    needed = math.log(atol) / math.log(1 - damping + damping * kappa)
    assert needed - 10 <= steps <= 1.25 * needed + 10


def test_damping_finds_an_equilibrium_that_plain_steps_do_not():
    A, u = torch.tensor([[-1.5]], dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    solution = solved(A, u, Picard(damping=0.5, atol=1e-10), "identity")
    torch.testing.assert_close(solution.x, u / 2.5, rtol=0, atol=1e-9)
    assert not bool(solved(A, u, Picard(), "identity", on_failure="ignore").converged.any())


def test_on_an_easy_problem_the_default_does_what_picard_does():
    A, u = problem(SOLVERS["Picard"], 40, 16, kappa=0.5, dtype=torch.float32)
    picard, default = solved(A, u, Picard()), solved(A, u, Adaptive())
    assert torch.equal(picard.x, default.x) and torch.equal(picard.steps, default.steps)


# --- batches --------------------------------------------------------------------------------------------------------


def mixture(entry):
    """Return a problem whose samples need between a few and hundreds of Picard steps."""
    slow, fast = 0.98, 0.1
    A = torch.block_diag(*(torch.full((4, 4), k / 4, dtype=torch.float64) for k in (slow, 0.7, fast)))
    u = torch.zeros(32, 12, dtype=torch.float64)
    u[:, 8:] = drawn(32, 4, seed=1).abs()
    u[::3, 4:8] = drawn(11, 4, seed=2).abs()
    u[::7, :4] = drawn(5, 4, seed=3).abs()
    return (StrictlyUpper(A.triu(1)) if entry.triangular else Dense(A)), u


def test_a_batch_gives_what_each_sample_gives_alone(entry):
    A, u = mixture(entry)
    solver = entry.make(atol=1e-12, max_steps=5000)
    together = solved(A, u, solver)
    assert bool(together.converged.all())
    for row, x, steps in zip(u, together.x, together.steps, strict=True):
        alone = solved(A, row[None], solver)
        assert bool(alone.converged.all())
        torch.testing.assert_close(alone.x[0], x, rtol=0, atol=1e-10)
        assert int(steps) <= 5000


def test_samples_that_are_done_do_not_wait_for_the_slowest(iterative):
    A, u = mixture(iterative)
    u = u[torch.arange(32) % 8 < 7]
    u[:-1, :8] = 0  # all but the last sample see the fast block only
    u[-1, :4] = 1.0
    steps = solved(A, u, iterative.make(atol=1e-10, max_steps=5000)).steps
    assert bool((steps[:-1] <= steps[-1]).all())
    if iterative.make().__class__ is Picard:
        assert int(steps[:-1].max()) < int(steps[-1]) / 4


def test_an_empty_batch_gives_an_empty_solution(entry):
    A, u = problem(entry)
    solution = solved(A, u[:0], entry.make())
    assert solution.x.shape == (0, 12)
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == (0,)


def test_a_single_vector_is_a_batch_without_dimensions(entry):
    A, u = problem(entry)
    solution = solved(A, u[0], entry.make(atol=1e-12))
    assert solution.x.shape == (12,) and solution.steps.shape == ()
    torch.testing.assert_close(solution.x, iterated(A, u, "relu")[0], rtol=0, atol=1e-11)


def test_a_zero_input_has_the_zero_solution(entry):
    A, u = problem(entry)
    solution = solved(A, torch.zeros_like(u), entry.make())
    assert bool(solution.converged.all())
    assert torch.equal(solution.x, torch.zeros_like(u))
    assert torch.equal(solution.residual, torch.zeros(len(u), dtype=torch.float64))


def test_a_zero_matrix_is_solved_by_its_first_image(entry):
    A, u = problem(entry, kappa=0.0)
    solution = solved(A, u, entry.make())
    assert torch.equal(solution.x, torch.relu(u))
    assert int(solution.steps.max()) <= 4


# --- faults ---------------------------------------------------------------------------------------------------------


def warned(run):
    """Return what ``run`` returns and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return run(), caught


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("phi", ["relu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_that_are_not_finite_become_nan_and_the_others_are_right(entry, value, phi, dtype):
    A, u = problem(entry, 15, 9, dtype=dtype)
    spoilt = u.clone()
    spoilt[2, 3], spoilt[7] = value, value
    solution, caught = warned(lambda: solved(A, spoilt, entry.make(), phi))
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[2, 7]] = True
    assert bool(solution.x[bad].isnan().all())
    assert not bool(solution.converged[bad].any())
    assert bool(solution.converged[~bad].all())
    torch.testing.assert_close(solution.x[~bad].double(), iterated(A, u, phi)[~bad], rtol=0, atol=1e-5)
    assert int(solution.steps.max()) <= entry.most_steps(300)
    assert [w.category for w in caught] == [ConvergenceWarning]
    assert "2 of 9 samples" in str(caught[0].message) and "NaN" in str(caught[0].message)


def test_samples_that_are_not_finite_cost_no_steps_until_the_limit(entry):
    A, u = problem(entry, 15, 9)
    u[4] = math.nan
    solution, _ = warned(lambda: solved(A, u, entry.make()))
    assert int(solution.steps[4]) <= int(solution.steps.max()) < 300


def test_a_batch_without_a_finite_sample_ends_at_once(entry):
    A, u = problem(entry)
    solution, caught = warned(lambda: solved(A, torch.full_like(u, math.nan), entry.make()))
    assert bool(solution.x.isnan().all()) and not bool(solution.converged.any())
    assert int(solution.steps.max()) <= 10
    assert len(caught) == 1


def test_a_start_that_is_not_finite_spoils_its_own_sample_only(iterative):
    A, u = problem(iterative)
    x0 = torch.zeros_like(u)
    x0[1] = math.nan
    solution, caught = warned(lambda: solved(A, u, iterative.make(), x0=x0))
    keep = [0, *range(2, len(u))]
    torch.testing.assert_close(solution.x[keep], iterated(A, u, "relu")[keep], rtol=0, atol=1e-5)
    assert bool(solution.converged[keep].all())
    assert len(caught) == (0 if bool(solution.converged.all()) else 1)


@pytest.mark.parametrize("max_steps", [5, 9, 40, 600])
def test_a_map_that_grows_ends_with_a_finite_best_iterate(iterative, max_steps):
    A, u = growing()
    if max_steps == 600:
        A, u = A.float(), u.float()  # 2^600 is beyond float32: iterates overflow on the way
    solution = solved(A, u, iterative.make(max_steps=max_steps), on_failure="ignore")
    assert not bool(solution.converged.any())
    assert bool(solution.x.isfinite().all())
    assert int(solution.steps.max()) <= iterative.most_steps(max_steps)
    first = true_residual(A, u, torch.relu(u))
    assert bool((true_residual(A, u, solution.x) <= first * (1 + 1e-5)).all())


def test_a_map_that_turns_in_a_circle_is_reported(iterative):
    A = torch.tensor([[0.0, -3.0], [3.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=torch.float64)
    solution = solved(A, u, iterative.make(max_steps=200), "tanh", on_failure="ignore")
    assert bool(solution.x.isfinite().all())
    true = true_residual(A, u, solution.x, "tanh")
    torch.testing.assert_close(solution.residual, true, rtol=1e-6, atol=1e-14)
    assert bool((true[solution.converged] <= 3e-6).all())


def test_a_failure_is_raised_if_asked(iterative):
    A, u = growing()
    with pytest.raises(ConvergenceError, match="4 of 4 samples"):
        solved(A, u, iterative.make(), on_failure="raise")


def test_a_failure_is_one_warning_unless_asked_otherwise(iterative):
    A, u = growing()
    solver = iterative.make()
    _, caught = warned(lambda: solved(A, u, solver))
    assert [w.category for w in caught] == [ConvergenceWarning]
    message = str(caught[0].message)
    for words in (type(solver).__name__, "4 of 4 samples", "residual up to", "atol=3e-06", "max row sum of |A| is"):
        assert words in message
    assert "ImplicitFunctionInf" in message, "the message says what to try"


def test_a_failure_is_silent_if_asked(iterative):
    A, u = growing()
    _, caught = warned(lambda: solved(A, u, iterative.make(), on_failure="ignore"))
    assert caught == []


def test_success_is_silent(entry):
    A, u = problem(entry)
    _, caught = warned(lambda: solved(A, u, entry.make(), on_failure="raise"))
    assert caught == []


# --- values ---------------------------------------------------------------------------------------------------------


def test_solvers_are_values(entry):
    one, same, other = entry.make(atol=1e-5), entry.make(atol=1e-5), entry.make(atol=1e-6)
    assert one == same and hash(one) == hash(same) and one != other
    assert len({one, same, other}) == 2
    with pytest.raises(FrozenInstanceError):
        one.atol = 1.0


def test_using_a_solver_changes_neither_its_equality_nor_its_representation(entry):
    used, fresh = entry.make(), entry.make()
    solved(*problem(entry), used)
    assert used == fresh and hash(used) == hash(fresh) and repr(used) == repr(fresh)


def test_the_representation_rebuilds_the_solver(entry):
    solver = entry.make(atol=1e-5, rtol=0.5, max_steps=7)
    names = {kind.__name__: kind for kind in (Adaptive, Anderson, BackSubstitution, Newton, Picard)}
    assert eval(repr(solver), names) == solver
    assert "atol=1e-05" in repr(solver) and "max_steps=7" in repr(solver)


def test_solvers_of_different_kinds_are_different():
    solvers = [entry.make() for entry in SOLVERS.values()]
    assert len(set(solvers)) == len(solvers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atol": -1e-6}, r"`atol` must be finite and >= 0; got -1e-06\."),
        ({"atol": math.nan}, r"`atol` must be finite and >= 0; got nan\."),
        ({"rtol": -1.0}, r"`rtol` must be finite and >= 0; got -1\.0\."),
        ({"max_steps": 0}, r"`max_steps` must be an integer >= 1; got 0\."),
        ({"max_steps": -5}, r"`max_steps` must be an integer >= 1; got -5\."),
    ],
)
def test_settings_out_of_range_are_refused(entry, options, message):
    with pytest.raises(ValueError, match=message):
        entry.make(**options)


def test_a_misspelt_setting_is_refused(entry):
    with pytest.raises(TypeError, match="max_iter"):
        entry.make(max_iter=5)


@pytest.mark.parametrize("damping", [0.0, -0.1, 1.5, math.nan])
def test_a_damping_out_of_range_is_refused(damping):
    with pytest.raises(ValueError, match=r"`damping` must lie in \(0, 1\]; got"):
        Picard(damping=damping)


@pytest.mark.parametrize(("option", "value"), [("memory", 0), ("ridge", -1.0), ("ridge", math.inf), ("mixing", 0.0)])
def test_settings_of_anderson_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must (be|lie)"):
        Anderson(**{option: value})
