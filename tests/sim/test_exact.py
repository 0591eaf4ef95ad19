"""Exact matching, against equations on the samples themselves, solved by linear programming (HiGHS) or cvxpy."""

import functools
import itertools
import math
import sys
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from idl import SIM
from idl.sim import lambda_path
from idl.sim.solvers import CVX, ExactMatching, Hybrid
from problems import random
from sim.row_problems import Rows, drawn, minimum, penalty

ORACLE = 1e-6
"""Relative error of the optima of HiGHS, whose feasibility is 1e-7, and of CLARABEL on the samples."""

EXACT = 1e-9
"""Part of a target's energy, its square, that may be left."""


# --- problems and what is known of them -----------------------------------------------------------------------------


def planted(samples=20, columns=30, rows=5, k=4, ball=5, kappa=2.0, seed=0, **options):
    """Targets without noise of rows with ``k`` weights inside the ball, which are returned too."""
    made = drawn(samples, columns, rows, ball=ball, kappa=kappa, noise=0.0, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 100)
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    for row in W:
        row[torch.randperm(columns, generator=generator)[k:]] = 0
    sums = W[:, :ball].abs().sum(1, keepdim=True)
    W[:, :ball] *= (0.9 * kappa / sums.clamp_min(1e-9)).clamp_max(1)
    return replace(made, T=made.S @ W.T), W


def dense(**options):
    return planted(k=options.get("columns", 30), **options)[0]


def cheap_ball():
    """States are cheap, so that the ball is what limits them."""
    rows = dense(samples=8, ball=15, kappa=0.5)
    return replace(rows, weights=torch.cat((torch.full((15,), 0.01), torch.full((15,), 5.0))).double())


def duplicated():
    rows = planted()[0]
    return replace(rows, S=torch.cat((rows.S, rows.S[:, :20]), 1))


def duplicated_at_the_bound():
    rows = cheap_ball()
    columns = torch.cat((torch.arange(15), torch.arange(5), torch.arange(15, 30), torch.arange(15, 30)))
    return replace(rows, S=rows.S[:, columns], ball=20, weights=rows.weights[columns])


def duplicated_inside_and_outside():
    """What is in the ball is outside for the same penalty: it is only a question of how much fits."""
    rows = dense(samples=8, ball=10, kappa=0.1)
    return replace(rows, S=torch.cat((rows.S, rows.S[:, :10]), 1))


def with_constants():
    rows, W = planted(seed=3)
    S = rows.S.clone()
    S[:, 3], S[:, 20], S[:, 21] = 0, 1, 1
    return replace(rows, S=S, T=S @ W.T)


def one_target_zero():
    rows = planted()[0]
    return replace(rows, T=rows.T * torch.tensor([1.0, 0, 1, 1, 1]).double())


def free(rows, *columns):
    weights = torch.ones(rows.S.shape[1], dtype=torch.float64) if rows.weights is None else rows.weights.clone()
    weights[list(columns)] = 0
    return replace(rows, weights=weights)


PLAIN = {
    "more samples than columns": lambda: planted(samples=60)[0],
    "fewer samples than columns": lambda: planted()[0],
    "few samples": lambda: dense(samples=8),
    "no ball": lambda: dense(samples=8, ball=0),
    "everything in the ball": lambda: dense(samples=10, ball=30, kappa=40.0),
    "ball at the bound": cheap_ball,
    "tight ball": lambda: dense(kappa=0.02),
    "duplicate columns": duplicated,
    "duplicate columns, ball at the bound": duplicated_at_the_bound,
    "duplicates inside and outside": duplicated_inside_and_outside,
    "constant columns": with_constants,
    "a target that is zero": one_target_zero,
    "condition 1e3": lambda: dense(condition=1e3),
    "condition 1e5, one solution": lambda: planted(samples=60, columns=12, condition=1e5)[0],
    "large units": lambda: replace(dense(samples=8, kappa=2e4), T=1e4 * dense(samples=8).T),
    "weights a column": lambda: replace(dense(samples=8), weights=torch.linspace(0.1, 4, 30, dtype=torch.float64)),
    "free columns": lambda: free(planted()[0], 6, 9, 25),
    "free columns that are constant": lambda: free(with_constants(), 20, 21),
    "free columns, ball at the bound": lambda: free(cheap_ball(), 20, 28),
    "free inside the ball": lambda: free(cheap_ball(), 0, 2, 3),
    "as many free columns as equations": lambda: free(planted()[0], *range(5, 26)),
    "one column": lambda: planted(columns=1, ball=1, k=1)[0],
}


def knee(rows):
    return replace(rows, knee=0.3)


CURVED = {
    "knee": lambda: (knee(planted()[0]), None),
    "knee, few samples": lambda: (knee(dense(samples=8)), None),
    "knee, ball at the bound": lambda: (replace(cheap_ball(), knee=0.05), None),
    "knee, duplicate columns": lambda: (knee(duplicated()), None),
    "knee, one solution": lambda: (knee(planted(samples=60)[0]), None),
    "knee, free columns": lambda: (knee(free(planted()[0], 6, 9)), None),
    "elastic net": lambda: (planted()[0], 0.5),
    "elastic net, few samples": lambda: (dense(samples=8), 0.5),
    "elastic net, ball at the bound": lambda: (cheap_ball(), 0.5),
    "elastic net, duplicate columns": lambda: (duplicated(), 0.5),
    "elastic net, one solution": lambda: (planted(samples=60)[0], 0.5),
    "elastic net, free columns": lambda: (free(dense(samples=8), 6, 9), 0.5),
    "elastic net with a knee": lambda: (knee(dense(samples=8)), 0.5),
    "elastic net with a knee, ball at the bound": lambda: (replace(cheap_ball(), knee=0.05), 2.0),
}
KINDS = {name: lambda make=make: (make(), None) for name, make in PLAIN.items()} | CURVED


def factors(rows):
    return torch.ones(rows.S.shape[1], dtype=torch.float64) if rows.weights is None else rows.weights


def problem_of(rows, ridge):
    """The problem with a ridge of so many times the penalty."""
    return replace(rows.problem, ridge=None if ridge is None else ridge * rows.lam * factors(rows))


def cost(rows, ridge, W):
    """The penalty by hand."""
    sizes = torch.where(W.abs() <= rows.knee, W.abs(), (W.square() + rows.knee**2) / (2 * rows.knee))
    return rows.lam * (sizes + 0.5 * (ridge or 0) * W.square()) @ factors(rows)


def orthonormal(S, z):
    """The equations ``S w = z`` in orthonormal rows, since the feasibility of solvers is absolute."""
    rotation, values, S = np.linalg.svd(S, full_matrices=False)
    kept = values > 1e-10 * values[0]
    return S[kept], (rotation.T @ z)[kept] / values[kept]


def linear_program(rows, z, prices):
    """The smallest ``prices |w|`` at which the equations on the samples hold, by HiGHS; infinite if they do not."""
    (S, z), d = orthonormal(rows.S.numpy(), z), rows.S.shape[1]
    inside = np.tile(np.arange(d) < rows.ball, 2).astype(float)
    ball = {"A_ub": inside[None], "b_ub": [rows.kappa]} if rows.ball else {}
    found = linprog(np.tile(prices, 2), A_eq=np.hstack((S, -S)), b_eq=z, bounds=(0, None), method="highs", **ball)
    assert found.status in (0, 2)
    return found.fun if found.status == 0 else math.inf


def optima(rows, ridge):
    if ridge is None and rows.knee == math.inf:
        prices = (rows.lam * factors(rows)).numpy()
        return torch.tensor([linear_program(rows, z, prices) for z in rows.T.T.numpy()], dtype=torch.float64)
    values, weights = [], factors(rows).numpy()
    for S, z in (orthonormal(rows.S.numpy(), z) for z in rows.T.T.numpy()):
        w = cp.Variable(S.shape[1])
        total = rows.lam * (penalty(w, weights, rows.knee) + (ridge or 0) / 2 * (weights @ cp.square(w)))
        ball = [cp.norm1(w[: rows.ball]) <= rows.kappa] if rows.ball else []
        values.append(minimum(cp.Problem(cp.Minimize(total), [S @ w == z, *ball])))
    return torch.tensor(values, dtype=torch.float64)


def left(rows, W):
    """The part of each target's energy that weights leave on the samples."""
    energies = rows.T.square().sum(0)
    return torch.where(energies > 0, (rows.T - rows.S @ W.T).square().sum(0) / energies, W.abs().sum(1))


@functools.cache
def solved(kind):
    rows, ridge = KINDS[kind]()
    return rows, ridge, ExactMatching().solve(problem_of(rows, ridge))


every_kind = pytest.mark.parametrize("kind", KINDS)


# --- the solution ---------------------------------------------------------------------------------------------------


@every_kind
def test_targets_are_reproduced_inside_the_ball(kind):
    rows, _, solution = solved(kind)
    assert float(left(rows, solution.W).max()) <= EXACT
    assert float(solution.unexplained.max()) <= EXACT
    assert bool((solution.W[:, : rows.ball].abs().sum(1) <= rows.kappa).all())


@every_kind
def test_no_other_weights_that_do_so_cost_less(kind):
    rows, ridge, solution = solved(kind)
    truth = optima(rows, ridge)
    torch.testing.assert_close(cost(rows, ridge, solution.W), solution.objective, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(solution.objective, truth, rtol=ORACLE, atol=1e-9)
    assert float(solution.gap.max()) <= 1e-5  # by the moments: at condition 1e5 they lose as many digits
    assert bool((solution.bound <= truth * (1 + ORACLE) + 1e-9).all())
    assert bool((solution.bound > 0.99 * truth - 1e-9).all())


@every_kind
def test_weights_are_zero_or_matter(kind):
    rows, ridge, solution = solved(kind)
    sizes = solution.W[:, ~problem_of(rows, ridge).free].abs()
    assert not bool(((sizes > 0) & (sizes < 1e-8 * sizes.amax(1, keepdim=True))).any())


@pytest.mark.parametrize("kind", PLAIN)
def test_a_penalty_without_curvature_keeps_no_more_weights_than_there_are_equations(kind):
    rows, _, solution = solved(kind)
    unpaid = factors(rows) == 0
    unpaid[: rows.ball] = False
    equations = int(torch.linalg.matrix_rank(rows.S)) - int(torch.linalg.matrix_rank(rows.S[:, unpaid]))
    kept = (solution.W[:, ~unpaid] != 0).sum(1)
    at_the_bound = solution.W[:, : rows.ball].abs().sum(1) > rows.kappa * (1 - 1e-9)
    assert bool((kept <= equations + at_the_bound.long()).all())


@pytest.mark.parametrize("samples", [20, 60])
def test_sparse_weights_are_found_where_there_are_fewer_samples_than_columns_and_where_not(samples):
    rows, W = planted(samples=samples)
    torch.testing.assert_close(ExactMatching().solve(rows.problem).W, W, rtol=1e-9, atol=0)


def test_samples_that_were_rounded_give_the_weights_that_they_were_made_with():
    rows, W = planted(samples=400, columns=30)
    rounded = Rows(rows.S.float().double(), rows.T.float().double(), rows.lam, rows.ball, rows.kappa)
    solution = ExactMatching().solve(rounded.problem)
    assert torch.equal(solution.W != 0, W != 0)
    torch.testing.assert_close(solution.W, W, rtol=1e-6, atol=0)
    assert float(left(rounded, solution.W).max()) <= 1e-13


@pytest.mark.parametrize("unpaid", [[], [5, 6]], ids=["paid", "free"])
def test_a_direction_that_is_rounding_is_no_equation(unpaid):
    # The last column is a sum of two and rounding: to match that, too, weights would be arbitrary.
    rows, W = planted(samples=400, columns=12)
    S = torch.cat((rows.S, rows.S[:, 5:6] + rows.S[:, 6:7] + 3e-7 * random(400, 1, seed=9)), 1)
    noisy = replace(rows, S=S, T=rows.T + 3e-7 * random(400, 5, seed=8))
    solution = ExactMatching().solve(free(noisy, *unpaid).problem)
    assert float(left(noisy, solution.W).max()) <= 1e-12
    assert float(solution.W.abs().max()) <= 1.001 * float(W.abs().max())
    paid = [i for i in range(13) if i not in unpaid]
    assert bool((solution.W[:, paid].abs().sum(1) <= W[:, paid[:-1]].abs().sum(1) * 1.001).all())
    assert not unpaid or not bool(solution.W[:, 12].any())


@pytest.mark.parametrize("kind", ["few samples", "ball at the bound", "elastic net, few samples", "knee, few samples"])
@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_the_scale_of_the_penalty_does_not_matter(kind, factor):
    rows, ridge, solution = solved(kind)
    again = ExactMatching().solve(problem_of(replace(rows, lam=factor * rows.lam), ridge))
    torch.testing.assert_close(again.W, solution.W, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(again.objective, factor * solution.objective, rtol=1e-7, atol=0)


def test_units_of_a_target_are_those_of_its_weights():
    rows, _, solution = solved("no ball")
    units = torch.tensor([1e-8, 1e-3, 1, 1e3, 1e8], dtype=torch.float64)
    again = ExactMatching().solve(replace(rows, T=rows.T * units).problem)
    torch.testing.assert_close(again.W / units[:, None], solution.W, rtol=1e-6, atol=1e-8)


def test_there_may_be_no_rows_and_no_columns_that_vary():
    problem = planted()[0].problem
    assert ExactMatching().solve(problem.take(torch.arange(0))).W.shape == (0, 30)
    rows = planted()[0]
    solution = ExactMatching().solve(replace(rows, S=0 * rows.S, T=0 * rows.T).problem)
    assert not bool(solution.W.any() or solution.unexplained.any() or solution.gap.any())


def test_a_problem_is_left_as_it_was():
    problem = problem_of(cheap_ball(), 0.5)
    names = ("gram", "correlations", "energies", "penalty", "ridge")
    before = {name: getattr(problem, name).clone() for name in names}
    ExactMatching().solve(problem)
    assert all(torch.equal(getattr(problem, name), before[name]) for name in names)


@settings(max_examples=30, deadline=None)
@given(
    samples=st.integers(1, 25),
    columns=st.integers(1, 25),
    ball=st.integers(0, 25),
    k=st.integers(1, 25),
    kappa=st.sampled_from([0.1, 0.9, 10.0]),
    condition=st.sampled_from([1.0, 1e3]),
    seed=st.integers(0, 10_000),
)
def test_random_rows_agree_with_linear_programming(samples, columns, ball, k, kappa, condition, seed):
    ball = min(ball, columns)
    rows, W = planted(samples, columns, 3, min(k, columns), ball, kappa, seed, condition=condition)
    values = torch.linalg.svdvals(rows.S)
    lost = 1e-14 * float(values[0] / values[values > 1e-9 * values[0]][-1]) ** 2  # moments square the condition
    assume(lost < 1e-2)
    # What float32 would lose matters here: no weight is cut that the equations of float64 still see.
    solution, truth = ExactMatching(tol=1e-6, rounding=1e-18).solve(rows.problem), optima(rows, None)
    assert float(left(rows, solution.W).max()) <= EXACT
    assert bool((solution.W[:, :ball].abs().sum(1) <= kappa).all())
    torch.testing.assert_close(solution.objective, truth, rtol=10 * ORACLE + lost, atol=1e-9)
    assert bool((solution.objective <= rows.lam * W.abs().sum(1) * (1 + 1e-6 + lost)).all())
    assert float(solution.gap.max()) <= 1e-4


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_target_that_is_no_combination_of_the_columns_is_refused_with_what_is_left():
    rows = planted(samples=60)[0]
    T = rows.T.clone()
    T[:, 3] += 1e-3 * random(60, seed=1)
    best = torch.linalg.lstsq(rows.S, T, driver="gelsd").solution.T
    part = float(left(replace(rows, T=T), best)[3])
    with pytest.raises(ValueError, match=rf"row 3 is no combination .*: {part:.1e} of its energy.*1 of 5 rows"):
        ExactMatching().solve(replace(rows, T=T).problem)
    solution = ExactMatching(unexplained=1e-3).solve(replace(rows, T=T).problem)
    assert float(solution.unexplained[3]) == pytest.approx(part, rel=1e-6)
    torch.testing.assert_close(solution.W[3], best[3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["more samples than columns", "few samples", "weights a column", "free columns"])
def test_a_ball_that_is_too_small_is_refused_with_the_sum_it_would_take(kind):
    rows = KINDS[kind]()[0]
    inside = (np.arange(rows.S.shape[1]) < rows.ball).astype(float)
    needed = [linear_program(replace(rows, ball=0), z, inside) for z in rows.T.T.numpy()]
    if max(needed) < 1e-6:  # nothing inside the ball is needed
        rows = replace(rows, ball=rows.S.shape[1] - 2)
        inside = (np.arange(rows.S.shape[1]) < rows.ball).astype(float)
        needed = [linear_program(replace(rows, ball=0), z, inside) for z in rows.T.T.numpy()]
    row = int(np.argmax(needed))
    alone = replace(rows, T=rows.T[:, [row]])
    ExactMatching().solve(replace(alone, kappa=1.001 * needed[row]).problem)
    with pytest.raises(ValueError, match=r"row 0 would need a row sum of \|A\| of ") as caught:
        ExactMatching().solve(replace(alone, kappa=0.99 * needed[row]).problem)
    assert float(str(caught.value).split(" of ")[2].split(",")[0]) == pytest.approx(needed[row], rel=1e-5)


def test_too_few_steps_are_called_that():
    rows = cheap_ball()
    solution, truth = ExactMatching(max_steps=4).solve(rows.problem), optima(rows, None)
    assert float(solution.gap.max()) > 1e-4 and float(left(rows, solution.W).max()) <= EXACT
    assert bool((solution.objective >= truth - 1e-9).all() and (solution.bound <= truth + 1e-9).all())


@pytest.mark.parametrize("solver", [ExactMatching(), CVX()], ids=repr)
def test_without_cvxpy_it_is_said_how_to_get_it(solver, monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ImportError, match=rf"{type(solver).__name__} needs cvxpy; pip install"):
        solver.solve(planted()[0].problem)


@pytest.mark.parametrize("name", ["rounding", "unexplained"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_an_argument_out_of_range_is_refused_and_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        ExactMatching(**{name: value})


def test_other_solvers_take_the_ridge_into_their_least_squares():
    rows = drawn()
    ridge = torch.linspace(0, 1, 12, dtype=torch.float64)
    problem = replace(rows.problem, ridge=ridge)
    added = replace(rows.problem, gram=rows.problem.gram + ridge.diag())
    assert torch.equal(Hybrid().solve(problem).W, Hybrid().solve(added).W)


# --- SIM ------------------------------------------------------------------------------------------------------------


def small(sizes=(6, 8, 5, 3), bias=True, phi=nn.ReLU, dtype=torch.float32, seed=0, scale=1.5):
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o, bias) for i, o in itertools.pairwise(sizes)]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= scale
    return nn.Sequential(*(part for layer in layers for part in (layer, phi())))[:-1].to(dtype)


def apart(sim, net, u):
    """The largest difference from the teacher's outputs, in units of these."""
    with torch.no_grad():
        y = net(u)
    return float((sim.predict(u) - y).abs().max() / y.abs().max())


OPTIONS = {
    "as it comes": {},
    "layerwise": {"rescale": "layerwise"},
    "closed form": {"rescale": "closed_form"},
    "small kappa": {"kappa": 0.3},
    "layers": {"refit": "layers"},
    "without refit": {"refit": False, "debias": False},
    "elastic net": {"l1_ratio": 0.5},
    "knee": {"knee": 0.1},
    "free inputs": {"column_weights": [1.0] * 13 + [0.0] * 6},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_is_the_teacher_where_there_are_enough_samples(options, bias, dtype):
    net, u, new = small(bias=bias, dtype=dtype), random(300, 6, seed=1).to(dtype), random(100, 6, seed=2).to(dtype)
    sim = SIM(exact=True, **OPTIONS[options]).fit(net, [u[:200], u[200:]])
    assert apart(sim, net, u) <= 1e-5 and apart(sim, net, new) <= 1e-5
    certificate = sim.certificate_
    assert certificate.feasible and certificate.uncertified == ([], [])
    assert float(torch.cat((certificate.states.unexplained, certificate.outputs.unexplained)).max()) <= 1e-12
    assert "matched exactly: rounding leaves" in str(certificate)
    kept = certificate.weights_kept
    # The teacher's weights and no more, but for what carries the outputs' biases: its zeros come out as zeros.
    assert options == "free inputs" or (kept.A, kept.B, kept.C, kept.D) == (40, 48, 15 + 3 * bias, 0)


@pytest.mark.parametrize("phi", [nn.Tanh, nn.Softplus, nn.LeakyReLU])
def test_other_activations_are_matched_where_the_teacher_is_admissible(phi):
    net, u = small(phi=phi, scale=0.5), random(300, 6, seed=1).float()
    sim = SIM(exact=True, kappa=0.95).fit(net, [u])
    assert apart(sim, net, u) <= 1e-5


@pytest.mark.parametrize("refit", [True, "layers"])
@pytest.mark.parametrize("bias", [True, False])
def test_few_samples_are_reproduced_with_fewer_weights_for_a_smaller_penalty(refit, bias):
    net, u = small((30, 20, 10, 3), bias), random(15, 30, seed=1).float()
    sim = SIM(exact=True, kappa=0.9, lam=1.0, refit=refit, rescale=False).fit(small((30, 20, 10, 3), bias), [u])
    assert apart(sim, net, u) <= 2e-5
    kept, states = sim.certificate_.weights_kept, sim.certificate_.states
    assert kept.total < 0.8 * kept.teacher
    # 15 equations a row, 14 about the mean; one more at the bound of the ball.
    assert int((states.W != 0).sum(1).max()) <= 16 - bias
    weights = net[0].weight.detach()
    first = states.objective[10:]
    assert bool((first <= weights.abs().sum(1).double() * (1 + 1e-6)).all())  # the teacher's own weights do it, too
    assert float(first.sum()) < 0.9 * float(weights.abs().sum())


def test_a_unit_that_is_always_active_does_no_harm():
    # Its activation is a combination of the inputs, and what float32 makes of that.
    net, u = small(), random(500, 6, seed=1).float()
    with torch.no_grad():
        net[0].bias[0] += 100
        net[2].bias[1] += 100
    sim = SIM(exact=True).fit(net, [u])
    assert apart(sim, net, u) <= 1e-5 and sim.certificate_.feasible


def test_inputs_that_are_constant_get_no_weight():
    net, u = small(), random(300, 6, seed=1).float()
    u[:, 2], u[:, 4] = 0.1, 3.3
    sim = SIM(exact=True).fit(net, [u])
    assert not bool(sim.model_.B[:, [2, 4]].any()) and apart(sim, net, u) <= 1e-5


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
def test_lam_and_debiasing_change_nothing(l1_ratio):
    net, u = small((30, 20, 10, 3)), random(15, 30, seed=1).float()
    settings = ({"lam": 1e-3, "debias": True}, {"lam": 10.0, "debias": False})
    one, two = (SIM(exact=True, l1_ratio=l1_ratio, **options).fit(net, [u]).model_ for options in settings)
    for name in "ABC":
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-6)


def test_rows_at_the_bound_are_stored_as_they_were_matched():
    net, u = small((30, 20, 10, 3), bias=False, dtype=torch.float64), random(15, 30, seed=1)
    sim = SIM(exact=True, kappa=0.5, rescale=False).fit(net, [u])
    assert float(sim.certificate_.row_sums.max()) > 0.5 * (1 - 2e-6)
    with torch.no_grad():
        first = net[0](u)
        second = net[2](first.relu())
        Z = torch.cat((second, first), 1)
        matched = Z.relu() @ sim.model_.A.T + u @ sim.model_.B.T
    assert float(((matched - Z).square().sum(0) / Z.square().sum(0)).max()) <= 1e-13


def test_a_teacher_that_is_not_admissible_is_refused_by_the_name_of_its_unit():
    net, u = small(), random(300, 6, seed=1).float()
    needed = float(net[2].weight[0].detach().abs().sum())
    with pytest.raises(ValueError, match="state 0, unit 0 of layer '3', would need a row sum") as caught:
        SIM(exact=True, rescale=False).fit(net, [u])
    assert f"of {needed:.4f}"[:7] in str(caught.value)


def test_states_that_are_left_out_are_missed_by_name():
    net, u = small(), random(300, 6, seed=1).float()
    with pytest.raises(ValueError, match=r"state [0-4], unit [0-4] of layer '3', is no combination .*5 of 5 rows"):
        SIM(exact=True, layers=["3"]).fit(net, [u])
    with pytest.raises(ValueError, match=r"output [0-2] is no combination .*3 of 3 rows"):
        SIM(exact=True, layers=["1"]).fit(net, [u])


def test_layers_that_are_fitted_one_after_the_other_are_named_as_well():
    net, u = small(scale=3.0), random(300, 6, seed=1).float()
    with pytest.raises(ValueError, match="state 0, unit 0 of layer '3', would need a row sum"):
        SIM(exact=True, rescale=False, refit="layers").fit(net, [u])


def test_another_solver_is_refused():
    with pytest.raises(ValueError, match=r"`exact` needs a solver that matches exactly; got Hybrid"):
        SIM(Hybrid(), exact=True)
    assert SIM(exact=True).solver == ExactMatching()
    assert SIM(ExactMatching(tol=1e-3)).exact and SIM(ExactMatching(tol=1e-3), exact=True).solver.tol == 1e-3
    assert not SIM().exact


def test_what_searches_or_varies_lam_is_refused():
    net, u = small(), random(300, 6, seed=1).float()
    with pytest.raises(ValueError, match="`target_sparsity` searches lam"):
        SIM(exact=True).fit(net, [u], target_sparsity=0.5)
    with pytest.raises(ValueError, match="`lams` must be a single one"):
        next(lambda_path(net, [u], [1e-3, 1e-2], exact=True))
    assert apart(next(lambda_path(net, [u], [1e-3], exact=True)), net, u) <= 1e-5


def test_a_fit_that_was_written_keeps_what_was_left(tmp_path):
    net, u = small(), random(300, 6, seed=1).float()
    one, two = (next(lambda_path(net, [u], [1e-3], exact=True, folder=tmp_path)) for _ in range(2))
    assert torch.equal(one.certificate_.states.unexplained, two.certificate_.states.unexplained)
    assert str(one.certificate_) == str(two.certificate_)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_rows_on_a_gpu_are_solved_on_the_cpu_and_come_back():
    rows = planted()[0]
    problem = rows.problem
    moved = replace(problem, **{k: getattr(problem, k).cuda() for k in ("gram", "correlations", "energies", "penalty")})
    solution = ExactMatching().solve(moved)
    assert solution.W.is_cuda and solution.unexplained.is_cuda
    torch.testing.assert_close(solution.W.cpu(), ExactMatching().solve(problem).W, rtol=1e-9, atol=1e-12)
