"""SIM with A = L R^T: what is known in closed form, what is certified given R, and what the model promises."""

import copy
import functools
import io
import itertools
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import oracles
from idl import SIM, data
from idl.sim import lambda_path, low_rank
from idl.sim.moments import accumulate
from idl.sim.problem import RowProblem
from idl.sim.recording import record
from idl.sim.solvers import ADMM, Cardinality, CoordinateDescent, LeastSquares
from problems import random
from sim.row_problems import Rows, minimum

PHIS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
}
every_activation = pytest.mark.parametrize("phi", PHIS)

EQUILIBRIUM = 2e-5
"""Predictions: states to tol = 3e-6 over 1 - kappa for the kappa of these tests (0.9 at most), float32 sums of it."""


def mlp(phi="relu", bias=True, sizes=(6, 8, 5, 3), seed=0, dtype=torch.float32, scale=1.5):
    """An untrained teacher with biases that matter."""
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o, bias) for i, o in itertools.pairwise(sizes)]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= scale
    return nn.Sequential(*(part for layer in layers for part in (layer, PHIS[phi]())))[:-1].to(dtype)


def inputs(samples=300, columns=6, dtype=torch.float32):
    return random(samples, columns, seed=3).to(dtype)


def raw(net, u, phi="relu"):
    """Return U, Z, X and Y in float64, last layer first, from the weights of a Sequential of Linear layers."""
    x, zs = u.double(), []
    for layer in net:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.detach().double().T
            x = x if layer.bias is None else x + layer.bias.detach().double()
        else:
            zs.append(x)
            x = oracles.PHI[phi](x)
    Z = torch.cat(zs[::-1], 1)
    return u.double(), Z, oracles.PHI[phi](Z), x


def centred(t):
    return t - t.mean(0)


def factors(sim):
    """Return L, R and B in float64, without the unit that carries the bias of the outputs."""
    model = sim.model_
    n = model.hidden_dim - (0 if model.bias is None else 1)
    return tuple(part.detach().double()[:n] for part in (model.L, model.R, model.B))


def predicted(model, u, phi="relu"):
    """Return states and predictions of the stored matrices, iterated in float64 by plain torch."""
    p = {name: value.detach().double() for name, value in model.named_parameters()}
    source = u.double().flatten(1) @ p["B"].T + p.get("bias", 0)
    x, before = oracles.PHI[phi](source), torch.zeros_like(source)
    while float((x - before).abs().max()) > 1e-11:  # ends, since row sums are below 1
        x, before = oracles.PHI[phi](x @ p["R"] @ p["L"].T + source), x
    return x, x @ p["C"].T + u.double().flatten(1) @ p["D"].T


def partialled(T, U):
    return T - U @ torch.linalg.lstsq(U, T).solution


def row_moments(samples=200, states=7, columns=3, targets=5):
    """Return X, U, T and their moments: targets that read a few directions of the states, with noise."""
    X, U = random(samples, states, seed=0), random(samples, columns, seed=1)
    X = X + U @ random(columns, states, seed=2)
    T = X @ random(states, 2, seed=4) @ random(2, targets, seed=5) + U @ random(columns, targets, seed=6)
    T = T + 0.3 * random(samples, targets, seed=7)
    return X, U, T, accumulate([(torch.cat((X, U), 1), T)])


def penalised(moments, ball, lam=1e-2, kappa=0.9):
    penalty = torch.full_like(moments.mean_S, lam)
    return RowProblem(moments.gram, moments.cross, moments.energies, penalty, ball, kappa)


# --- reduced-rank regression ----------------------------------------------------------------------------------------


def reduced_rank_regression(S, U, T, rank):
    """Return A of this rank and the least sum of squares, by an SVD of the fitted values: no moment is formed."""
    S, T = partialled(S, U), partialled(T, U)
    A = torch.linalg.lstsq(S, T, driver="gelsd").solution.T
    _, sizes, right = torch.linalg.svd(S @ A.T, full_matrices=False)
    least = (T - S @ A.T).square().sum() + sizes[rank:].square().sum()
    return right[:rank].T @ right[:rank] @ A, float(least)


@pytest.mark.parametrize("rank", [1, 2, 4, 7])
def test_the_directions_of_regression_are_those_of_an_svd_of_the_fitted_values(rank):
    X, U, T, moments = row_moments()
    R = low_rank.regression_directions(moments, 7, rank)
    torch.testing.assert_close(R.abs().sum(0)[:5], torch.ones(min(rank, 5), dtype=torch.float64))
    S = torch.cat((X @ R[:, :5], U), 1)
    residual = T - S @ torch.linalg.lstsq(S, T).solution
    A, least = reduced_rank_regression(X, U, T, rank)
    assert float(residual.square().sum()) == pytest.approx(least, rel=1e-10)
    found = torch.linalg.lstsq(S, T).solution[: min(rank, 5)].T @ R[:, :5].T
    torch.testing.assert_close(found, A, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_least_squares_of_low_rank_is_reduced_rank_regression(rank, bias):
    net, u = mlp("tanh", bias, dtype=torch.float64), inputs(dtype=torch.float64)
    sim = SIM(LeastSquares(), rank=rank).fit(net, [u])
    U, Z, X, _ = raw(net, u, "tanh")
    if bias:
        U, Z, X = centred(U), centred(Z), centred(X)
    L, R, B = factors(sim)
    A, least = reduced_rank_regression(X, U, Z, rank)
    assert float((Z - X @ R @ L.T - U @ B.T).square().sum()) == pytest.approx(least, rel=1e-7)
    torch.testing.assert_close(L @ R.T, A, rtol=1e-6, atol=1e-7)


# --- the parts of the search ----------------------------------------------------------------------------------------


def test_reduced_moments_are_those_of_the_directions():
    X, U, T, moments = row_moments()
    R = random(7, 3, seed=8)
    found, truth = low_rank.reduced(moments, R), accumulate([(torch.cat((X @ R, U), 1), T)])
    for name in ("gram", "cross", "energies", "mean_S", "mean_T"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=1e-10, atol=1e-12)
    assert torch.equal(found.gram, found.gram.T)


def test_states_are_selected_forward_by_what_they_explain():
    X = random(200, 6, seed=0)
    X = torch.cat((X, X[:, :1] + X[:, 1:2], torch.zeros(200, 1, dtype=torch.float64)), 1)  # one depends, one is dead
    A = random(4, 8, seed=1)
    chosen = []
    for _ in range(3):
        left = []
        for j in range(8):
            S = X[:, [*chosen, j]]
            fit = S @ torch.linalg.lstsq(S, X @ A.T, driver="gelsd").solution
            left.append(float((X @ A.T - fit).square().sum()) if j not in chosen else np.inf)
        chosen.append(int(np.argmin(left)))
    R = low_rank.selected_states(A, X.T @ X / 200, 3)
    assert R.argmax(0).tolist() == chosen
    R = low_rank.selected_states(A, X.T @ X / 200, 8)
    assert torch.equal(R @ R.T, torch.eye(8, dtype=torch.float64))  # each once


def test_directions_given_the_rows_approach_the_optimum_of_cvxpy():
    X, U, T, moments = row_moments()
    L, B = random(5, 2, seed=9), random(5, 3, seed=10)
    target, gram = T - U @ B.T, moments.gram[:7, :7]
    R = cp.Variable((7, 2))
    cost = cp.sum_squares((target.numpy() - X.numpy() @ R @ L.numpy().T) / 200**0.5)
    optimum = minimum(cp.Problem(cp.Minimize(cost), [cp.norm1(R[:, k]) <= 1 for k in range(2)]))
    found = random(7, 2, seed=11) / 100
    largest = torch.linalg.eigvalsh(gram)[-1]
    values = []
    for _ in range(5):
        found = low_rank.improved_directions(found, gram, L, target.T @ X / 200, largest)
        values.append(float((target - X @ found @ L.T).square().sum()) / 200)
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(optimum, rel=1e-7)
    assert float(found.abs().sum(0).max()) <= 1 + 1e-12
    assert float(found.abs().sum(0).max()) > 0.999  # so that the bound is tried


@pytest.mark.parametrize("lam", [1e-8, 1e-3, 3e-2, 0.3])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_objective_never_rises_and_is_that_of_the_rows_found(rank, lam):
    X, U, T, moments = row_moments()
    found = low_rank.search(moments, 7, rank, functools.partial(penalised, lam=lam))
    values = found.objectives
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))
    gains = [1 - after / before for before, after in itertools.pairwise(values)]
    assert len(values) < 40 and gains[-1] <= 1e-3 * (1 + 1e-9) and all(gain > 0.999e-3 for gain in gains[:-1])
    L, B = found.W[:, :rank], found.W[:, rank:]
    residual = T - X @ found.R @ L.T - U @ B.T
    cost = 0.5 * residual.square().mean(0).sum() + lam * found.W.abs().sum()
    assert float(cost) == pytest.approx(values[-1], rel=1e-10)
    sums = found.R.abs().sum(0)
    assert bool(((sums - 1).abs() < 1e-12)[L.any(0)].all())
    assert not bool(found.R[:, ~L.any(0)].any())  # what nothing reads is zero
    assert float(L.abs().sum(1).max()) <= 0.9


@pytest.mark.parametrize("rank", [1, 3])
def test_alternation_gains_on_both_starts(rank):
    moments = record(mlp(), [inputs()]).state_moments.centred()
    found = low_rank.search(moments, 13, rank, penalised)
    full = low_rank._ROWS.solve(penalised(moments, 13)).W[:, :13]
    starts = [
        low_rank.regression_directions(moments, 13, rank),
        low_rank.selected_states(full, moments.gram[:13, :13], rank),
    ]
    values = [
        float(low_rank._ROWS.solve(penalised(low_rank.reduced(moments, R), rank)).objective.sum()) for R in starts
    ]
    assert found.objectives[0] == pytest.approx(min(values), rel=1e-12)
    assert found.objectives[-1] < 0.995 * min(values)


# --- the certificate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phi", "kappa"), [("relu", 0.99), ("tanh", 0.3)])
@pytest.mark.parametrize("rank", [1, 3])
def test_rows_are_certified_for_the_directions_of_the_model_by_cvxpy_too(rank, phi, kappa):
    net, u, lam = mlp(phi, dtype=torch.float64), inputs(dtype=torch.float64), 1e-2
    sim = SIM(kappa=kappa, lam=lam, rescale=False, debias=False, rank=rank).fit(net, [u])
    U, Z, X, _ = raw(net, u, phi)
    L, R, B = factors(sim)
    S, W = centred(torch.cat((X @ R, U), 1)), torch.cat((L, B), 1)
    rows = Rows(S, centred(Z), lam, rank, kappa)
    states = sim.certificate_.states
    torch.testing.assert_close(states.objective, rows.objective(W), rtol=1e-5, atol=0)  # rows at the bound are shrunk
    optimum = rows.optimum()
    assert bool((states.bound <= optimum * (1 + 1e-8)).all())
    assert bool((states.objective <= optimum * (1 + 1.01 * sim.certificate_.tol)).all())
    assert sim.certificate_.uncertified == ([], [])
    assert states.W.shape == (13, rank + 6)


@every_activation
@pytest.mark.parametrize(
    "options", [{}, {"kappa": 0.2, "rescale": False}, {"kappa": 0.2, "rescale": False, "debias": False}], ids=repr
)
def test_no_row_sum_is_above_kappa_and_the_model_takes_its_factors_as_they_are(phi, options):
    sim = SIM(lam=1e-3, rank=2, **options).fit(mlp(phi, scale=3), [inputs()])
    L, R = (sim.model_.get_parameter(name).detach() for name in "LR")
    kappa = options.get("kappa", 0.99)
    sums = np.abs(L.numpy().astype(np.float64)) @ np.abs(R.numpy().astype(np.float64)).sum(0)
    assert 0.9 * kappa < sums.max() <= kappa
    torch.testing.assert_close(sim.certificate_.row_sums, torch.from_numpy(sums), rtol=1e-14, atol=0)
    assert sim.certificate_.feasible
    assert bool((np.abs((L.double() @ R.double().T).numpy()).sum(1) <= sums + 1e-12).all())
    assert torch.equal(sim.model_.state_matrix(), L @ R.T)


def test_the_summary_says_what_is_given_and_what_is_bounded():
    certificate = SIM(rank=2).fit(mlp(), [inputs()]).certificate_
    assert certificate.rank == 2
    text = str(certificate)
    assert "given R of rank 2, which is not proved to be the best" in text
    assert f"max row sum of |L| |R|^T {float(certificate.row_sums.max()):.6f} <= 0.99" in text
    full = SIM().fit(mlp(), [inputs()]).certificate_
    assert full.rank is None and "given R" not in str(full)


def test_weights_kept_are_the_non_zeros_of_the_model_with_both_factors():
    sim = SIM(lam=1e-2, rank=3).fit(mlp(), [inputs()])
    kept = sim.certificate_.weights_kept
    L, R, B, C, D = (int((sim.model_.get_parameter(name).detach().numpy() != 0).sum()) for name in "LRBCD")
    assert [kept.A, kept.B, kept.C, kept.D] == [L + R, B, C, D]
    assert 0 < R < 13 * 3  # the ball of the columns makes zeros
    assert not bool(sim.model_.R[:, ~sim.model_.L.any(0)].any())


def test_a_direction_that_nothing_reads_costs_nothing():
    sim = SIM(lam=1.0, rank=4, debias=False).fit(mlp(), [inputs()])
    assert not bool(sim.model_.L.any() or sim.model_.R.any())
    assert sim.certificate_.weights_kept.A == 0
    assert sim.certificate_.uncertified == ([], [])


def test_a_direction_that_the_last_rows_do_not_read_costs_nothing_either():
    sim = SIM(Cardinality(keep=2, per="matrix"), lam=1e-3, rank=5).fit(mlp(), [inputs()])
    L, R = sim.model_.L.detach(), sim.model_.R.detach()
    assert int(L.count_nonzero()) <= 2
    assert torch.equal(R.any(0), L.any(0))


# --- how good it is -------------------------------------------------------------------------------------------------


# Not one direction and no bias: all units are then multiples of one number, which they tell of each other as well.
@pytest.mark.parametrize(("rank", "bias"), [(1, True), (2, True), (2, False)])
def test_a_teacher_of_this_rank_is_recovered_as_far_as_the_penalty_lets(rank, bias):
    net, u, lam = mlp(bias=bias, dtype=torch.float64), inputs(1000, dtype=torch.float64), 1e-6
    L, R = random(5, rank, seed=1), random(8, rank, seed=2)
    with torch.no_grad():
        net[2].weight.copy_(0.6 * (L / L.abs().sum(1).max()) @ (R / R.abs().sum(0)).T)
        if bias:
            net[2].bias.fill_(-0.1)
    sim = SIM(lam=lam, rank=rank, rescale=False, debias=False).fit(net, [u])
    truth = torch.zeros(13, 13, dtype=torch.float64)
    truth[:5, 5:] = net[2].weight.detach()
    L, R, _ = factors(sim)
    torch.testing.assert_close(L @ R.T, truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lam", [1e-2, 1e-3])
def test_with_as_many_directions_as_states_nothing_is_lost(lam):
    net, u = mlp(), inputs()
    full, low = (SIM(lam=lam, rank=rank).fit(net, [u]).certificate_ for rank in (None, 13))
    assert float(low.states.objective.sum()) <= float(full.states.objective.sum()) * (1 + 2e-4)


def test_more_directions_lower_the_objective():
    values = [
        float(SIM(lam=3e-3, rank=rank).fit(mlp(), [inputs()]).certificate_.states.objective.sum()) for rank in (1, 3, 8)
    ]
    assert values == sorted(values, reverse=True)
    assert values[2] < 0.95 * values[0]


class Digits:
    """The handwritten digits of scikit-learn, with their split."""

    def __init__(self):
        digits = data.load("digits", progress=False)
        self.u, self.labels = digits.train_images.flatten(1), digits.train_labels
        self.test = [(digits.test_images.flatten(1), digits.test_labels)]
        self.loader = list(zip(self.u.split(200), self.labels.split(200), strict=True))


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def teacher(digits):
    net = mlp(sizes=(64, 24, 12, 10), scale=1.0)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(12):
        for rows in torch.randperm(len(digits.u)).split(60):
            optimiser.zero_grad()
            F.cross_entropy(net(digits.u[rows]), digits.labels[rows]).backward()
            optimiser.step()
    return net


@pytest.mark.parametrize("rank", [2, 8])
def test_digits_are_told_apart_about_as_well_as_with_a_full_matrix(rank, teacher, digits):
    full, low = (SIM(rank=r).fit(teacher, digits.loader) for r in (None, rank))
    assert full.score(digits.test) > 0.88
    # 360 samples have a standard error of 1.3 points.
    assert low.score(digits.test) >= full.score(digits.test) - 0.025
    assert float(low.certificate_.explained.min()) > 0.95
    assert low.certificate_.uncertified == ([], [])


# --- an ordinary model ----------------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("bias", [True, False])
def test_predictions_are_those_of_the_equations_iterated_by_hand(phi, bias):
    net, u = mlp(phi, bias), inputs()
    sim = SIM(kappa=0.9, lam=1e-2, rank=2).fit(net, [u])
    truth = predicted(sim.model_, u, phi)[1]
    torch.testing.assert_close(sim.predict(u).double(), truth, rtol=0, atol=EQUILIBRIUM)
    torch.testing.assert_close(sim.model_(u).detach().double(), truth, rtol=0, atol=EQUILIBRIUM)
    y = net(u).detach().double()
    residual = y - truth
    # What is explained comes from moments of states that are off by the tolerance of the equilibrium.
    known = 1 - residual.square().mean(0) / y.var(0, unbiased=False)
    torch.testing.assert_close(sim.certificate_.explained, known, rtol=0, atol=1e-4)
    if bias:
        torch.testing.assert_close(residual.mean(0), torch.zeros(3).double(), rtol=0, atol=EQUILIBRIUM)


def test_a_model_keeps_its_zeros_while_it_trains_and_can_be_copied():
    u = inputs()
    model = SIM(lam=1e-2, kappa=0.9, rank=3).fit(mlp(), [u]).model_
    assert (model.rank, model.hidden_dim) == (3, 14)
    zeros = {name: model.get_parameter(name).detach() == 0 for name in "LRBCD"}
    assert all(bool(on.any()) and not bool(on.all()) for on in zeros.values())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(u), model(u))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    dense = model.to_dense()
    dense.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(dense(u), model(u), rtol=0, atol=0)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    before = {name: model.get_parameter(name).detach().clone() for name in "LRBCD"}
    for _ in range(3):
        optimiser.zero_grad()
        (model(u) - 1).square().mean().backward()
        optimiser.step()
    for name, on in zeros.items():
        assert torch.equal(model.get_parameter(name) == 0, on)
        assert not torch.equal(model.get_parameter(name), before[name])


def test_two_fits_are_equal_to_the_last_bit():
    first, second = (SIM(rank=2).fit(mlp(), [inputs()]) for _ in range(2))
    for name, value in first.model_.state_dict().items():
        assert torch.equal(value, second.model_.state_dict()[name])


class Counted:
    """A loader that counts its passes."""

    def __init__(self, u):
        self.u, self.passes = u, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.u.split(100))


def test_the_data_are_passed_over_no_more_often_than_with_a_full_matrix():
    for rank in (None, 2):
        loader = Counted(inputs())
        SIM(rank=rank).fit(mlp(), loader)
        assert loader.passes == 2


# --- with the other options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"l1_ratio": 0.5},
        {"knee": 0.1},
        {"refit": False},
        {"rescale": "layerwise"},
        {"rescale": "closed_form", "debias": False},
        {"solver": CoordinateDescent()},
        {"solver": ADMM()},
        {"layers": ["1"]},
        {"column_weights": [0.5] * 13 + [1.0, 2.0, 0.0, 1.0, 3.0, 1.0]},
        {"column_weights": [0.0] * 13 + [1.0] * 6},
    ],
    ids=repr,
)
def test_other_options_give_models_that_are_certified_too(options):
    net, u = mlp(), inputs()
    sim = SIM(lam=3e-3, rank=2, **options).fit(net, [u])
    assert sim.certificate_.uncertified == ([], [])
    assert sim.certificate_.feasible
    assert float(sim.certificate_.explained.mean()) > 0.8


@pytest.mark.parametrize("options", [{"l1_ratio": 0.5}, {"knee": 0.05}, {"column_weights": [2.0] * 13 + [1.0] * 6}])
def test_the_penalty_of_a_direction_is_that_of_a_state(options):
    net, u, lam = mlp(dtype=torch.float64), inputs(dtype=torch.float64), 1e-2
    sim = SIM(lam=lam, rank=2, rescale=False, debias=False, **options).fit(net, [u])
    U, Z, X, _ = raw(net, u)
    L, R, B = factors(sim)
    ratio, knee = options.get("l1_ratio", 1.0), options.get("knee", np.inf)
    factor = 2.0 if "column_weights" in options else 1.0
    cost = 0.5 * (centred(Z) - centred(X @ R) @ L.T - centred(U) @ B.T).square().mean(0)
    for part, weight in ((L, factor), (B, 1.0)):
        sizes = torch.where(part.abs() <= knee, part.abs(), (part.square() + knee**2) / (2 * knee))
        cost = cost + lam * weight * (ratio * sizes + (1 - ratio) / 2 * part.square()).sum(1)
    torch.testing.assert_close(sim.certificate_.states.objective, cost, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_number_of_weights_counts_both_factors(bias):
    net = mlp(bias=bias)
    sim = SIM(Cardinality(keep=0.5), kappa=0.9, rank=2).fit(net, [inputs()])
    kept = sim.certificate_.weights_kept
    assert 0.45 <= kept.fraction <= 0.5
    assert kept.A == int(sim.model_.L.count_nonzero() + sim.model_.R.count_nonzero()) > 2
    assert sim.certificate_.relaxed and sim.certificate_.feasible and sim.certificate_.uncertified == ([], [])
    assert "given R" in str(sim.certificate_) and "on its support" in str(sim.certificate_)


def test_a_target_of_sparsity_is_reached():
    sim = SIM(rank=2, debias=False).fit(mlp(), [inputs()], target_sparsity=0.4)
    assert 0.45 <= sim.certificate_.weights_kept.fraction <= 0.6
    again = SIM(lam=sim.lam, rank=2, debias=False).fit(
        mlp(), [inputs()]
    )  # the directions do not depend on the trials before
    assert torch.equal(again.model_.L, sim.model_.L) and torch.equal(again.model_.R, sim.model_.R)


@pytest.mark.parametrize(
    "options", [{}, {"solver": Cardinality(keep=0.5)}, {"refit": False, "debias": False}], ids=repr
)
def test_a_path_resumes_to_the_same_numbers(options, tmp_path):
    net, u, lams = mlp(), inputs(), (1e-1, 1e-2, 1e-3)
    whole = list(lambda_path(net, [u], lams, rank=2, **options))
    path = lambda_path(net, [u], lams, folder=tmp_path, rank=2, **options)
    next(path), next(path)
    path.close()
    for one, other in zip(lambda_path(net, [u], lams, folder=tmp_path, rank=2, **options), whole, strict=True):
        for name, value in other.model_.state_dict().items():
            assert torch.equal(one.model_.state_dict()[name], value)
        assert torch.equal(one.certificate_.states.W, other.certificate_.states.W)
        assert str(one.certificate_) == str(other.certificate_)
        assert torch.equal(one.predict(u), other.predict(u))
    with pytest.raises(ValueError, match="is of other settings"):
        list(lambda_path(net, [u], lams, folder=tmp_path, rank=3, **options))


# --- hard data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"solver": LeastSquares()}], ids=repr)
@pytest.mark.parametrize("samples", [1, 2, 6])
def test_fewer_samples_than_states_are_fitted(samples, options):
    net, u = mlp(sizes=(6, 24, 12, 3)), inputs(samples)
    sim = SIM(lam=1e-2, rank=4, **options).fit(net, [u])
    assert all(bool(p.isfinite().all()) for p in sim.model_.parameters())
    if not options:
        assert sim.certificate_.uncertified == ([], [])
        assert sim.certificate_.feasible
    y = net(u).detach()
    assert float((sim.predict(u) - y).square().mean()) <= 0.05 * float(y.square().mean())


@pytest.mark.parametrize("rank", [1, 5, 13])
@pytest.mark.parametrize("kind", ["constant and duplicate inputs", "a dead layer", "zero inputs"])
def test_dependent_and_dead_columns_are_no_obstacle(kind, rank):
    net, u = mlp(sizes=(10, 8, 5, 3), scale=0.5), inputs()
    u = torch.cat((u, u[:, :2], torch.zeros(300, 1), torch.full((300, 1), 0.1)), 1)
    if kind == "a dead layer":
        with torch.no_grad():
            net[2].bias -= 100
    elif kind == "zero inputs":
        u = torch.zeros_like(u)
    sim = SIM(lam=1e-2, kappa=0.9, rank=rank).fit(net, [u])
    assert sim.certificate_.uncertified == ([], [])
    assert all(bool(p.isfinite().all()) for p in sim.model_.parameters())
    torch.testing.assert_close(sim.predict(u).mean(0), net(u).detach().mean(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_of_any_precision_is_fitted(dtype):
    sim = SIM(lam=1e-2, kappa=0.9, rank=2).fit(mlp(dtype=dtype), [inputs(dtype=dtype)])
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in sim.model_.parameters()} == {stored}
    assert sim.certificate_.feasible and sim.certificate_.uncertified == ([], [])


def test_the_rows_are_optimal_for_the_directions_as_they_are_stored():
    # In float32 the directions are rounded, and it is for these that the rows are certified.
    net, u, lam = mlp(), inputs(), 1e-2
    sim = SIM(kappa=0.3, lam=lam, rescale=False, debias=False, rank=2).fit(net, [u])
    recorded = record(net, [u])
    moments = low_rank.reduced(recorded.state_moments, factors(sim)[1]).centred()
    problem = penalised(moments, 2, lam, 0.3)
    W = sim.certificate_.states.W
    objective = problem.objective(W, problem.residual_correlations(W))
    torch.testing.assert_close(sim.certificate_.states.objective, objective, rtol=1e-12, atol=0)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "`rank` must be an integer >= 1; got 0"),
        ({"rank": -1}, ValueError, "`rank` must be an integer >= 1; got -1"),
        ({"rank": 2.0}, TypeError, "`rank` must be an integer.*got 2.0"),
        ({"rank": True}, TypeError, "`rank` must be an integer.*got True"),
        ({"rank": "2"}, TypeError, "`rank` must be an integer.*got '2'"),
        ({"rank": 2, "refit": "layers"}, ValueError, "`rank` must be None with refit='layers'.*got 2. Try refit=True"),
        ({"rank": 2, "exact": True}, ValueError, "`rank` must be None where the teacher is matched exactly.*got 2"),
    ],
    ids=repr,
)
def test_a_rank_that_cannot_be_is_refused(options, error, message, as_users_run_it):
    with pytest.raises(error, match=message):
        SIM(**options)


def test_a_rank_above_the_number_of_states_is_refused():
    with pytest.raises(ValueError, match="`rank` must be at most 13, the number of states; got 14"):
        SIM(rank=14).fit(mlp(), [inputs()])


def test_factors_that_tell_states_apart_are_refused():
    weights = [1.0] * 12 + [2.0] + [1.0] * 6
    with pytest.raises(ValueError, match=r"`column_weights` must have the same factor for all 13 states.*from 1 to 2"):
        SIM(rank=2, column_weights=weights).fit(mlp(), [inputs()])
