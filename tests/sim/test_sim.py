"""SIM from a trained network to an implicit model: its certificate, recomputed from raw samples, and its promises."""

import copy
import functools
import io
import itertools
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import ElasticNet
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import oracles
from idl import SIM, ImplicitModel
from idl.errors import CaptureError
from idl.sim import lambda_path
from idl.sim.problem import RowProblem
from idl.sim.recording import record
from idl.sim.solvers import Hybrid, LeastSquares
from idl.sim.solvers.debias import debias
from problems import random

STORED = 2e-6
"""Relative error of a float32 model's objective against that of the float64 weights it was rounded from, and of the
rows that were shrunk by 1e-6 to stay inside the ball: the square of the residual changes by no more."""

EQUILIBRIUM = 2e-5
"""Predictions: states to tol = 3e-6 over 1 - kappa for the kappa of these tests (0.9 at most), float32 sums of it."""


# --- teachers and what is known of them -----------------------------------------------------------------------------


class Digits:
    """Handwritten digits, 8x8; 1500 to train and 297 to test."""

    def __init__(self):
        pixels, labels = load_digits(return_X_y=True)
        pixels, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long()
        self.u, self.labels = pixels[:1500], labels[:1500]
        self.test = [(pixels[1500:], labels[1500:])]
        self.loader = list(zip(self.u.split(200), self.labels.split(200), strict=True))


@pytest.fixture(scope="module")
def digits():
    return Digits()


def train(net, digits, epochs=12):
    torch.manual_seed(1)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(digits.u)).split(60):
            optimiser.zero_grad()
            F.cross_entropy(net(digits.u[rows]), digits.labels[rows]).backward()
            optimiser.step()
    return net


@pytest.fixture(scope="module")
def teacher(digits):
    torch.manual_seed(0)
    return train(nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 10)), digits)


@pytest.fixture(scope="module")
def fitted(teacher, digits):
    return SIM(lam=1e-2).fit(teacher, digits.loader)


@pytest.fixture(scope="module")
def unbiased_teacher(digits):
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=False) for i, o in ((64, 24), (24, 12), (12, 10))]
    return train(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), digits)


def accuracy(net, samples):
    with torch.no_grad():
        right = [(net(u).argmax(1) == labels).float() for u, labels in samples]
    return float(torch.cat(right).mean())


def small(phi=nn.ReLU, bias=True, sizes=(6, 8, 5, 3), seed=0, scale=1.5):
    """An untrained teacher with biases that matter."""
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o, bias) for i, o in itertools.pairwise(sizes)]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= scale
    return nn.Sequential(*(part for layer in layers for part in (layer, phi())))[:-1]


def inputs(samples=300, columns=6, seed=3):
    return random(samples, columns, seed=seed).float()


def raw(net, u, phi="relu"):
    """Return U, Z, X, Y in numpy float64, last layer first, from the weights of a Sequential of Linear layers."""
    x, zs = u.double(), []
    for layer in net:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.detach().double().T
            x = x if layer.bias is None else x + layer.bias.detach().double()
        else:
            zs.append(x)
            x = oracles.PHI[phi](x)
    Z = torch.cat(zs[::-1], 1)
    return tuple(t.numpy() for t in (u.double(), Z, oracles.PHI[phi](Z), x))


def weights(model):
    """Return A, B, C, D and b in numpy float64, the unit apart that carries the bias of the outputs."""
    n = model.hidden_dim - (0 if model.bias is None else 1)
    A, B, C, D = (p.detach().double().numpy() for p in (model.A, model.B, model.C, model.D))
    b = np.zeros(n) if model.bias is None else model.bias.detach().double().numpy()[:n]
    return A[:n, :n], B[:n], C[:, :n], D, b


def predicted(model, u, phi="relu"):
    """Return states and predictions of the stored matrices, iterated in float64 by plain torch."""
    p = {name: value.detach().double() for name, value in model.named_parameters()}
    source = u.double().flatten(1) @ p["B"].T + p.get("bias", 0)
    x, before = oracles.PHI[phi](source), torch.zeros_like(source)
    while float((x - before).abs().max()) > 1e-11:  # ends, since row sums are below 1
        x, before = oracles.PHI[phi](x @ p["A"].T + source), x
    return x, x @ p["C"].T + u.double().flatten(1) @ p["D"].T


def centred(t):
    return t - t.mean(0)


def least_squares(S, T, W):
    """Half the mean square of the residual of each row about its mean."""
    return 0.5 * np.square(centred(T) - centred(S) @ W.T).mean(0)


def objectives(S, T, W, lam, l1_ratio=1.0):
    return least_squares(S, T, W) + lam * (l1_ratio * np.abs(W).sum(1) + (1 - l1_ratio) / 2 * np.square(W).sum(1))


def lasso(S, T, lam, l1_ratio=1.0):
    """Return scikit-learn's weights without a ball, with an intercept."""
    net = ElasticNet(lam, l1_ratio=l1_ratio, tol=1e-8, max_iter=50000)
    return np.stack([net.fit(centred(S), z).coef_ for z in centred(T).T])


# --- the certificate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kappa", "l1_ratio"), [(0.99, 1.0), (0.3, 1.0), (0.9, 0.5)])
def test_the_certified_objective_is_that_of_the_stored_weights_on_the_raw_samples(kappa, l1_ratio, teacher, digits):
    lam = 3e-3
    sim = SIM(kappa=kappa, lam=lam, l1_ratio=l1_ratio, rescale=False, debias=False).fit(teacher, digits.loader)
    U, Z, X, Y = raw(teacher, digits.u)
    A, B, C, D, b = weights(sim.model_)
    states, outputs = sim.certificate_.states, sim.certificate_.outputs
    S, W = np.concatenate((X, U), 1), np.concatenate((A, B), 1)
    np.testing.assert_allclose(states.objective, objectives(S, Z, W, lam, l1_ratio), rtol=10 * STORED)
    np.testing.assert_allclose(b, (Z - S @ W.T).mean(0), atol=1e-5)  # the intercept that is best
    equilibrium = predicted(sim.model_, digits.u)[0][:, :36].numpy()
    S, W = np.concatenate((equilibrium, U), 1), np.concatenate((C, D), 1)
    np.testing.assert_allclose(outputs.objective, objectives(S, Y, W, lam, l1_ratio), rtol=1e-4)
    for part in (states, outputs):
        assert bool((part.bound > 0).all())
        assert bool((part.objective - part.bound <= sim.certificate_.tol * part.objective).all())
    assert sim.certificate_.uncertified == ([], [])
    assert sim.certificate_.samples == 1500


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
def test_rows_below_the_bound_are_those_of_scikit_learn(l1_ratio, teacher, digits):
    lam = 1e-2
    sim = SIM(lam=lam, l1_ratio=l1_ratio, rescale=False, debias=False, refit=False).fit(teacher, digits.loader)
    U, Z, X, Y = raw(teacher, digits.u)
    S = np.concatenate((X, U), 1)
    free = (sim.certificate_.row_sums[:36] < 0.98).numpy()
    assert free.sum() >= 3
    for part, T, chosen in ((sim.certificate_.states, Z, free), (sim.certificate_.outputs, Y, np.ones(10, bool))):
        truth = objectives(S, T[:, chosen], lasso(S, T[:, chosen], lam, l1_ratio), lam, l1_ratio)
        np.testing.assert_allclose(part.objective[torch.from_numpy(chosen)], truth, rtol=2 * sim.certificate_.tol)
        assert bool((part.bound[torch.from_numpy(chosen)].numpy() <= truth * (1 + 1e-5)).all())  # states in float32


def test_rows_at_the_bound_are_those_of_cvxpy(teacher, digits):
    kappa, lam = 0.3, 1e-2
    sim = SIM(kappa=kappa, lam=lam, rescale=False, debias=False).fit(teacher, digits.loader)
    rows = (sim.certificate_.row_sums > 0.999 * kappa).nonzero()[:, 0].tolist()
    assert len(rows) >= 4
    U, Z, X, _ = raw(teacher, digits.u)
    S = centred(np.concatenate((X, U), 1))
    factor = np.linalg.qr(S / len(S) ** 0.5)[1]  # |S w - z| is |R w - Q^T z| and a constant
    for row in (rows[0], rows[-1]):
        z = centred(Z[:, row]) / len(S) ** 0.5
        reduced = np.linalg.lstsq(factor.T, S.T @ z / len(S) ** 0.5, rcond=None)[0]
        w = cp.Variable(S.shape[1])
        cost = 0.5 * cp.sum_squares(factor @ w - reduced) + lam * cp.norm1(w)
        optimum = cp.Problem(cp.Minimize(cost), [cp.norm1(w[:36]) <= kappa]).solve(solver=cp.CLARABEL)
        optimum += 0.5 * (z @ z - reduced @ reduced)
        assert float(sim.certificate_.states.objective[row]) == pytest.approx(optimum, rel=2e-4)
        assert float(sim.certificate_.states.bound[row]) <= optimum * (1 + 1e-5)


def test_a_solver_that_was_stopped_is_not_called_certified(teacher, digits):
    sim = SIM(Hybrid(tol=1e-14, max_steps=1), debias=False).fit(teacher, digits.loader)
    states, outputs = sim.certificate_.uncertified
    assert len(states) > 0 and len(outputs) > 0
    assert states == [i for i, gap in enumerate(sim.certificate_.states.gap.tolist()) if gap > 1e-14]
    assert f"not certified: {len(states)} rows of [A B]" in str(sim.certificate_)
    assert sim.certificate_.feasible


def test_the_summary_tells_gap_row_sum_weights_and_what_is_explained(teacher, digits):
    certificate = SIM().fit(teacher, digits.loader).certificate_
    text = str(certificate)
    assert "46 rows, relative gap at most" in text and "(asked 0.0001)" in text
    assert f"max row sum of |A| {float(certificate.row_sums.max()):.6f} <= 0.99" in text
    assert f"{certificate.weights_kept.total} of the teacher's 1944" in text
    assert "not certified" not in text
    assert f"{100 * float(certificate.explained.mean()):.2f} % on 1500 samples" in text


# --- what is admitted -----------------------------------------------------------------------------------------------

PHIS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
}

every_activation = pytest.mark.parametrize("phi", PHIS)


@every_activation
@pytest.mark.parametrize("options", [{}, {"kappa": 0.2, "debias": False, "rescale": False}], ids=["0.99", "0.2"])
def test_no_row_sum_is_above_kappa_and_the_model_takes_its_matrix_as_it_is(phi, options):
    sim = SIM(lam=1e-2, **options).fit(small(PHIS[phi], scale=3), [inputs()])
    A, kappa = sim.model_.A.detach(), options.get("kappa", 0.99)
    sums = np.abs(A.numpy().astype(np.float64)).sum(1)
    assert sums.max() <= kappa
    assert sums.max() > 0.9 * kappa  # so that the bound is tried
    torch.testing.assert_close(sim.certificate_.row_sums, torch.from_numpy(sums), rtol=1e-14, atol=0)
    assert sim.certificate_.feasible
    assert sim.certificate_.kappa == kappa
    assert torch.equal(sim.model_.state_matrix(), sim.model_.A)


def test_a_row_sum_above_kappa_is_not_called_feasible(fitted):
    certificate = fitted.certificate_
    sums = certificate.row_sums.clone()
    sums[0] = certificate.kappa * (1 + 1e-15)
    assert float(sums[0]) > certificate.kappa
    assert not type(certificate)(**{**vars(certificate), "row_sums": sums}).feasible


# --- biases ---------------------------------------------------------------------------------------------------------


@every_activation
def test_a_biased_teacher_is_predicted_without_an_offset(phi):
    net, u = small(PHIS[phi]), inputs()
    with torch.no_grad():
        net[-1].bias += torch.tensor([3.0, -2.0, 0.5])
    sim = SIM(kappa=0.9, lam=1e-2).fit(net, [u])
    y = net(u).detach()
    residual = y - sim.predict(u)
    assert float(residual.abs().mean()) > 1e-3  # it is not exact,
    torch.testing.assert_close(residual.mean(0), torch.zeros(3), rtol=0, atol=EQUILIBRIUM)  # but has no bias
    torch.testing.assert_close(sim.predict(u).double(), predicted(sim.model_, u, phi)[1], rtol=0, atol=EQUILIBRIUM)


def test_the_bias_of_the_outputs_is_carried_by_one_more_unit():
    net, u = small(sizes=(6, 8, 3)), inputs()
    sim = SIM(lam=1e-3).fit(net, [u])
    model = sim.model_
    assert (model.hidden_dim, model.input_dim, model.output_dim) == (9, 6, 3)
    assert not bool(model.A[8].any() or model.A[:, 8].any() or model.B[8].any())
    torch.testing.assert_close(model.C[:, 8], net[-1].bias, rtol=0, atol=0.05)


def test_a_teacher_without_biases_gives_a_model_without():
    net, u = small(bias=False), inputs()
    sim = SIM(kappa=0.9, lam=1e-3).fit(net, [u])
    assert sim.model_.bias is None
    assert sim.model_.hidden_dim == 13
    assert not bool(sim.predict(torch.zeros(2, 6)).any())
    torch.testing.assert_close(sim.predict(u).double(), predicted(sim.model_, u)[1], rtol=0, atol=EQUILIBRIUM)


def test_a_bias_of_the_outputs_alone_is_enough():
    net, u = small(bias=False), inputs()
    net[-1].bias = nn.Parameter(torch.tensor([3.0, -2.0, 0.5]))
    sim = SIM(kappa=0.9, lam=1e-3).fit(net, [u])
    torch.testing.assert_close(sim.predict(u).mean(0), net(u).detach().mean(0), rtol=0, atol=EQUILIBRIUM)


# --- how good it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["teacher", "unbiased_teacher"])
def test_the_model_is_about_as_accurate_as_its_teacher(which, digits, request):
    net = request.getfixturevalue(which)
    sim = SIM(lam=1e-3).fit(net, digits.loader)
    assert accuracy(net, digits.test) > 0.8
    # 297 samples have a standard error of 1.7 points.
    assert sim.score(digits.test) >= accuracy(net, digits.test) - 0.035
    assert float(sim.certificate_.explained.min()) > 0.95


def test_a_larger_penalty_keeps_fewer_weights(teacher, digits):
    kept = [SIM(lam=lam).fit(teacher, digits.loader).certificate_.weights_kept.total for lam in (1e-3, 1e-2, 1e-1)]
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2]


def test_weights_kept_are_the_non_zeros_of_the_model(fitted):
    kept = fitted.certificate_.weights_kept
    counts = [int((getattr(fitted.model_, name).detach().numpy() != 0).sum()) for name in "ABCD"]
    assert [kept.A, kept.B, kept.C, kept.D] == counts
    assert kept.teacher == 64 * 24 + 24 * 12 + 12 * 10
    assert kept.total == sum(counts)
    assert kept.fraction == pytest.approx(sum(counts) / 1944)


def test_a_teacher_without_weights_has_a_summary_too():
    sim = SIM().fit(nn.Sequential(nn.ReLU()), [inputs()])
    assert "of the teacher's 0" in str(sim.certificate_)


@pytest.mark.parametrize(
    ("which", "options"),
    [
        *(("teacher", o) for o in ({}, {"debias": False}, {"refit": False, "rescale": False}, {"l1_ratio": 0.5})),
        *(("unbiased_teacher", o) for o in ({}, {"kappa": 0.3, "l1_ratio": 0.5})),
    ],
    ids=repr,
)
def test_what_is_explained_is_one_less_the_mean_square_of_the_residual_over_the_variance(
    which, options, digits, request
):
    net = request.getfixturevalue(which)
    sim = SIM(**{"lam": 1e-2, "kappa": 0.9, **options}).fit(net, digits.loader)
    y = raw(net, digits.u)[3]
    residual = y - predicted(sim.model_, digits.u)[1].numpy()
    truth = 1 - np.square(residual).mean(0) / y.var(0)
    np.testing.assert_allclose(sim.certificate_.explained, truth, rtol=0, atol=1e-5)
    residual = y - sim.predict(digits.u).double().numpy()
    np.testing.assert_allclose(
        sim.certificate_.explained, 1 - np.square(residual).mean(0) / y.var(0), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3])
def test_an_output_that_is_constant_is_explained(value):
    net, u = small(), inputs()
    with torch.no_grad():
        net[-1].weight[1], net[-1].bias[1] = 0, value
    sim = SIM(lam=1e-2).fit(net, [u])
    assert float(sim.certificate_.explained[1]) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(sim.predict(u)[:, 1], torch.full((300,), value), rtol=1e-6, atol=1e-7)


# --- predict and score ----------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_model_without_gradient(teacher, digits):
    sim = SIM(kappa=0.9, lam=1e-2).fit(teacher, digits.loader)
    u, labels = digits.test[0]
    prediction = sim.predict(u)
    assert not prediction.requires_grad
    torch.testing.assert_close(prediction.double(), predicted(sim.model_, u)[1], rtol=EQUILIBRIUM, atol=EQUILIBRIUM)
    truth = (predicted(sim.model_, u)[1].argmax(1) == labels).double().mean()
    assert sim.score(digits.test) == pytest.approx(float(truth), abs=1.5 / 297)


def test_a_score_is_the_part_of_all_labels_whatever_the_batches(fitted, digits):
    sim, (u, labels) = fitted, digits.test[0]
    whole = sim.score([(u, labels)])
    assert sim.score([[u[:290], labels[:290]], [u[290:], labels[290:]]]) == pytest.approx(whole)
    assert sim.score(DataLoader(TensorDataset(u, labels), batch_size=50)) == pytest.approx(whole)
    guess = sim.predict(u).argmax(1)
    assert sim.score([(u, guess)]) == 1
    assert sim.score([(u, (guess + 1) % 10)]) == 0


def test_labels_with_a_dimension_too_many_are_refused_or_counted_right():
    sim, u = SIM(lam=1e-2).fit(small(), [inputs()]), inputs()
    labels = sim.predict(u).argmax(1)
    try:
        score = sim.score([(u, labels[:, None])])
    except ValueError:
        return
    assert score == 1


def test_scoring_without_labels_or_samples_is_refused(fitted, digits):
    for batch in (digits.u, (digits.u,), [digits.u]):
        with pytest.raises(TypeError, match="pairs"):
            fitted.score([batch])
    for empty in ([], [(digits.u[:0], digits.labels[:0])]):
        with pytest.raises(ValueError, match="at least one sample"):
            fitted.score(empty)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (None, TypeError, "`loader` must yield batches of inputs; got None"),
        (inputs(), TypeError, "rows are single samples"),
        (TensorDataset(inputs(), torch.zeros(300).long()), TypeError, "TensorDataset, which has single samples"),
        ([{"pixels": inputs()}], TypeError, r"pairs \(inputs, labels\) to be scored; got a dict"),
        ([(inputs().long(), torch.zeros(300).long())], TypeError, "`loader` must have a floating-point dtype"),
        ([(inputs(columns=5), torch.zeros(300).long())], ValueError, r"64 numbers a sample, .* got shape \(300, 5\)"),
        ([(inputs()[0], 3)], ValueError, "with one row a sample"),
    ],
    ids=["None", "tensor", "dataset", "dict", "integers", "width", "sample"],
)
def test_what_cannot_be_scored_is_refused_and_named(loader, error, message, fitted, as_users_run_it):
    with pytest.raises(error, match=message):
        fitted.score(loader)


def test_a_batch_may_be_empty(fitted, digits):
    u, labels = digits.test[0]
    assert fitted.score([(u[:0], labels[:0]), (u, labels)]) == fitted.score(digits.test)
    assert fitted.predict(u[:0]).shape == (0, 10)
    assert fitted.predict(u[:0].reshape(0, 8, 8)).shape == (0, 10)


def test_nothing_is_predicted_before_fit(digits):
    with pytest.raises(ValueError, match="call fit"):
        SIM().predict(digits.u)
    with pytest.raises(ValueError, match="call fit"):
        SIM().score(digits.test)


# --- loaders --------------------------------------------------------------------------------------------------------


def test_a_loader_may_yield_tensors_tuples_or_lists_in_batches_of_any_size():
    net, u = small(), inputs(100)
    labels = torch.zeros(100, dtype=torch.long)
    loaders = {
        "tensors": [u[:60], u[60:]],
        "tuples": [(u[:60], labels[:60]), (u[60:], labels[60:])],
        "lists": [[u, labels, "and more"]],
        "single samples": list(u.split(1)),
        "an empty batch first": [u[:0], u],
        "a DataLoader that shuffles": DataLoader(TensorDataset(u), batch_size=7, shuffle=True),
    }
    truth = SIM(lam=1e-2).fit(net, [u])
    for name, loader in loaders.items():
        sim = SIM(lam=1e-2).fit(net, loader)
        assert sim.certificate_.samples == 100
        # A batch of one is rounded otherwise by the teacher, and the support at a small weight may flip.
        torch.testing.assert_close(
            sim.predict(u), truth.predict(u), rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_large_inputs_may_come_in_another_order_the_second_time():
    u = 1e6 * inputs().double()
    u -= u.mean(0)
    u -= u.mean(0)  # the mean is zero to rounding of numbers of this size
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(u), batch_size=7, shuffle=True)
    assert SIM(lam=1e-2).fit(small().double(), loader).certificate_.samples == 300


class Flattening(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, u):
        return self.net(u.flatten(1))


@pytest.mark.parametrize("shape", [(1, 8, 8), (64, 1), (1, 64)])
def test_images_are_flattened(shape, teacher, fitted, digits):
    loader = [(u.reshape(-1, *shape), labels) for u, labels in digits.loader]
    sim = SIM(lam=1e-2).fit(Flattening(teacher), loader)
    assert torch.equal(sim.model_.A, fitted.model_.A)
    assert torch.equal(sim.predict(loader[0][0]), fitted.predict(digits.loader[0][0]))
    assert sim.score(loader[:1]) == fitted.score(digits.loader[:1])


def test_a_convolutional_teacher_becomes_a_model_of_flat_states():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(18, 4)
    )
    u = torch.rand(200, 1, 8, 8)
    sim = SIM(lam=1e-3).fit(net, [u])
    assert (sim.model_.hidden_dim, sim.model_.input_dim, sim.model_.output_dim) == (19, 64, 4)
    y = net.eval()(u).detach()
    assert float((y - sim.predict(u)).std()) < 0.2 * float(y.std())


# --- options --------------------------------------------------------------------------------------------------------


def test_rescaling_is_unit_variance_unless_another_is_named(teacher, digits):
    found = {}
    for rescale in (True, "unit_variance", "layerwise", "closed_form", False):
        sim = SIM(lam=1e-2, rescale=rescale).fit(teacher, digits.loader)
        found[rescale] = sim
        assert float(sim.certificate_.explained.min()) > 0.8
    assert torch.equal(found[True].model_.A, found["unit_variance"].model_.A)
    assert not torch.equal(found[True].model_.A, found["layerwise"].model_.A)
    names = [found[rescale].certificate_.rescaling for rescale in found]
    assert names == ["unit_variance", "unit_variance", "layerwise", "closed_form", "none"]


def test_a_teacher_that_is_not_homogeneous_keeps_its_units():
    net, u = small(nn.Tanh), inputs()
    sims = [SIM(lam=1e-2, rescale=rescale).fit(net, [u]) for rescale in (True, False)]
    assert [sim.certificate_.rescaling for sim in sims] == ["none", "none"]
    assert torch.equal(sims[0].model_.A, sims[1].model_.A)


@pytest.mark.parametrize(
    ("rescale", "refit"), [(True, True), (True, False), ("layerwise", False), ("closed_form", False)]
)
def test_outputs_fit_the_states_in_their_new_units(rescale, refit, teacher, digits):
    # With a row sum that does not bind, a penalty that is next to nothing lets the model be its teacher in any units.
    net = copy.deepcopy(teacher)
    with torch.no_grad():
        net[2].weight *= 0.02
        net[2].bias *= 0.02
    sim = SIM(lam=1e-6, rescale=rescale, refit=refit, debias=False).fit(net, digits.loader)
    assert float(sim.certificate_.explained.min()) > 0.99


def test_rescaling_brings_the_teacher_itself_into_the_ball():
    net, u = small(scale=3), inputs()
    explained = {}
    for rescale in (True, "layerwise", "closed_form", False):
        sim = SIM(kappa=0.3, lam=1e-7, rescale=rescale, debias=False).fit(net, [u])
        explained[rescale] = float(sim.certificate_.explained.min())
    assert explained.pop(False) < 0.98
    assert min(explained.values()) > 0.9999


def test_refitting_on_the_states_of_the_equilibrium_explains_no_less(teacher, digits):
    for options in ({}, {"rescale": False, "debias": False}):
        with_it, without = (
            SIM(**{"lam": 1e-2, **options, "refit": refit}).fit(teacher, digits.loader) for refit in (True, False)
        )
        assert torch.equal(with_it.model_.A, without.model_.A)
        assert float(with_it.certificate_.explained.mean()) >= float(without.certificate_.explained.mean())


def test_without_refit_the_outputs_are_fitted_to_the_states_of_the_teacher(teacher, digits):
    lam = 1e-2
    sim = SIM(lam=lam, rescale=False, refit=False, debias=False).fit(teacher, digits.loader)
    U, _, X, Y = raw(teacher, digits.u)
    _, _, C, D, _ = weights(sim.model_)
    S = np.concatenate((X, U), 1)
    truth = objectives(S, Y, lasso(S, Y, lam), lam)
    np.testing.assert_allclose(objectives(S, Y, np.concatenate((C, D), 1), lam), truth, rtol=3e-4)


@pytest.mark.parametrize(("kappa", "l1_ratio"), [(0.99, 1.0), (0.3, 1.0), (0.99, 0.9)])
def test_debiasing_keeps_the_support_and_lowers_the_least_squares_error(kappa, l1_ratio, teacher, digits):
    options = {"kappa": kappa, "lam": 1e-2, "l1_ratio": l1_ratio, "rescale": False}
    plain, debiased = (SIM(**options, debias=on).fit(teacher, digits.loader) for on in (False, True))
    U, Z, X, _ = raw(teacher, digits.u)
    S = np.concatenate((X, U), 1)
    before, after = (np.concatenate(weights(sim.model_)[:2], 1) for sim in (plain, debiased))
    assert not ((before == 0) & (after != 0)).any()
    errors = [least_squares(S, Z, W) for W in (before, after)]
    assert (errors[1] <= errors[0] * (1 + STORED) + 1e-12).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()
    assert np.abs(after[:, :36]).sum(1).max() <= kappa


@pytest.mark.parametrize("l1_ratio", [1.0, 0.3])
def test_debiased_rows_below_the_bound_are_least_squares_with_the_ridge_on_their_support(l1_ratio, teacher, digits):
    sim = SIM(lam=3e-2, l1_ratio=l1_ratio, rescale=False).fit(teacher, digits.loader)
    U, Z, X, _ = raw(teacher, digits.u)
    S, W = np.concatenate((X, U), 1), np.concatenate(weights(sim.model_)[:2], 1)
    free = np.flatnonzero(np.abs(W[:, :36]).sum(1) < 0.98)
    assert len(free) >= 3
    for row in free:
        on = np.flatnonzero(W[row])
        columns, target = torch.from_numpy(centred(S[:, on])), torch.from_numpy(centred(Z[:, row]))
        gram = columns.T @ columns / len(columns) + 3e-2 * (1 - l1_ratio) * torch.eye(len(on), dtype=torch.float64)
        truth = torch.linalg.lstsq(gram, columns.T @ target[:, None] / len(columns)).solution[:, 0]
        np.testing.assert_allclose(W[row, on], truth, rtol=1e-4, atol=1e-5)


def test_debiased_rows_at_the_bound_are_those_of_cvxpy():
    S, T = random(80, 7, seed=0), random(80, 4, seed=1)
    T = T + S @ random(7, 4, seed=2)
    ones = torch.ones(7, dtype=torch.float64)
    problem = RowProblem(S.T @ S / 80, T.T @ S / 80, T.square().mean(0), 0.1 * ones, 4, 0.6)
    start = Hybrid().solve(problem).W
    W, objective, gap = debias(problem, start)
    for row, (w, z) in enumerate(zip(W.numpy(), T.T.numpy(), strict=True)):
        on = np.flatnonzero(start[row].numpy())
        v = cp.Variable(len(on))
        cost = cp.sum_squares(z - S.numpy()[:, on] @ v) / 160
        optimum = cp.Problem(cp.Minimize(cost), [cp.norm1(v[: (on < 4).sum()]) <= 0.6]).solve(solver=cp.CLARABEL)
        assert np.square(z - S.numpy() @ w).sum() / 160 == pytest.approx(optimum, rel=2e-6)
        assert float(objective[row]) == pytest.approx(np.square(z - S.numpy() @ w).sum() / 160, rel=1e-12)
        assert float(objective[row]) * (1 - float(gap[row])) <= optimum * (1 + 1e-8)
        assert 0 < float(gap[row]) < 2e-6
        assert np.abs(w[:4]).sum() <= 0.6 * (1 + 1e-12)
        assert np.abs(w[:4]).sum() > 0.599  # so that the bound is tried
        assert set(np.flatnonzero(w)) <= set(on)


def test_no_row_of_an_exact_teacher_is_given_up_while_it_is_debiased(monkeypatch):
    # Rescaling brings rows to kappa, and debiasing such a row ends at the teacher's own weights, at the edge of the
    # ball: nothing is left to explain, so that a gap relative to the objective is a quotient of rounding errors.
    steps, solve = [], Hybrid.solve

    def counted(self, *args):
        solution = solve(self, *args)
        steps.append(solution.steps)
        return solution

    monkeypatch.setattr(Hybrid, "solve", counted)
    sim = SIM(lam=1e-3).fit(small(bias=False), [inputs()])
    assert float(sim.certificate_.row_sums.max()) > 0.98
    assert max(steps) < 1000  # a row that is given up has taken max_steps


def test_a_smaller_l1_ratio_keeps_more_weights(teacher, digits):
    kept = [
        SIM(lam=1e-2, l1_ratio=ratio).fit(teacher, digits.loader).certificate_.weights_kept.total
        for ratio in (1.0, 0.3)
    ]
    assert kept[1] > 1.1 * kept[0]


def test_a_subset_of_layers_gives_a_smaller_state(teacher, digits):
    sim = SIM(lam=1e-3, layers=["1"]).fit(teacher, digits.loader)
    assert sim.model_.hidden_dim == 24 + 1
    assert sim.certificate_.rescaling == "unit_variance"
    assert float(sim.certificate_.explained.mean()) > 0.7
    y = raw(teacher, digits.u)[3]
    residual = y - predicted(sim.model_, digits.u)[1].numpy()
    np.testing.assert_allclose(sim.certificate_.explained, 1 - residual.var(0) / y.var(0), rtol=0, atol=1e-4)
    both = SIM(lam=1e-3, layers=["3", "1"]).fit(teacher, digits.loader)
    assert torch.equal(both.model_.A, SIM(lam=1e-3).fit(teacher, digits.loader).model_.A)
    with pytest.raises(ValueError, match="'1', '3'"):
        SIM(layers=["fc1"]).fit(teacher, digits.loader)


@pytest.mark.parametrize(("sparsity", "lam"), [(0.8, 1e-3), (0.5, 1.0)])
def test_a_target_of_sparsity_is_reached_with_a_penalty_that_is_hardly_larger_than_needed(
    sparsity, lam, teacher, digits
):
    sim = SIM(lam=lam).fit(teacher, digits.loader, target_sparsity=sparsity)
    kept = sim.certificate_.weights_kept
    assert kept.fraction <= 1 - sparsity
    assert kept.fraction >= 0.8 * (1 - sparsity)
    assert sim.certificate_.uncertified == ([], [])
    again = SIM(lam=sim.lam).fit(teacher, digits.loader)  # without a start that is nearly right
    assert sim.lam != lam
    assert again.certificate_.weights_kept.total == pytest.approx(kept.total, rel=0.05)
    torch.testing.assert_close(
        again.certificate_.states.objective, sim.certificate_.states.objective, rtol=2e-4, atol=0
    )
    assert SIM(lam=sim.lam / 1.5).fit(teacher, digits.loader).certificate_.weights_kept.fraction > 1 - sparsity


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -1.0, 80.0])
def test_a_target_of_sparsity_that_cannot_be_is_refused(sparsity):
    with pytest.raises(ValueError, match="`target_sparsity` must"):
        SIM().fit(small(), [inputs()], target_sparsity=sparsity)


# --- an ordinary model ----------------------------------------------------------------------------------------------


@every_activation
def test_a_model_can_be_copied_pickled_and_loaded(phi):
    u = inputs()
    model = SIM(kappa=0.9, lam=1e-2).fit(small(PHIS[phi]), [u]).model_
    truth = model(u)
    blank = ImplicitModel(14, 6, 3, activation=phi, kappa=0.9, bias=True)
    blank.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (blank, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    assert all(type(other) is type(model) for other in copies[1:])
    for other in copies:
        assert torch.equal(other(u), truth)
        assert all(p.requires_grad for p in other.parameters())


def test_a_model_moves_to_float64(fitted, digits):
    u = digits.u[:50]
    model = copy.deepcopy(fitted.model_).to(torch.float64)
    assert torch.equal(model.state_matrix(), fitted.model_.A.double())
    torch.testing.assert_close(model(u.double()), predicted(fitted.model_, u)[1], rtol=0, atol=1e-3)


def test_a_model_trains_further(fitted, digits):
    model = copy.deepcopy(fitted.model_)
    u, labels = digits.u[:200], digits.labels[:200]
    optimiser = torch.optim.SGD(model.parameters(), 0.02)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(u), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    assert float(model.state_matrix().detach().abs().sum(1).max()) <= 0.99 * (1 + 1e-6)
    assert not torch.equal(model.A, fitted.model_.A)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_whole_of_a_fitted_sim_can_be_pickled(fitted, digits):
    other = pickle.loads(pickle.dumps(fitted))
    assert torch.equal(other.predict(digits.u), fitted.predict(digits.u))
    assert str(other.certificate_) == str(fitted.certificate_)


def test_two_fits_are_equal_to_the_last_bit(teacher, digits):
    first, second = (SIM(lam=3e-3).fit(teacher, digits.loader) for _ in range(2))
    for name, value in first.model_.state_dict().items():
        assert torch.equal(value, second.model_.state_dict()[name])
    assert torch.equal(first.certificate_.states.bound, second.certificate_.states.bound)
    assert torch.equal(first.certificate_.explained, second.certificate_.explained)


def test_a_second_fit_forgets_the_first(teacher, fitted, digits):
    sim = SIM(lam=1e-2)
    sim.fit(small(), [inputs()])
    assert sim.fit(teacher, digits.loader) is sim
    assert torch.equal(sim.model_.A, fitted.model_.A)


def test_fitting_leaves_the_teacher_and_its_inputs_as_they_were():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(5, 2))
    net[1].eval()
    net[0].weight.requires_grad_(False)
    u = inputs()
    net(u).sum().backward()
    state = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    grads = [p.grad if p.grad is None else p.grad.clone() for p in net.parameters()]
    SIM(lam=1e-2).fit(net, [u])
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    torch.testing.assert_close([p.grad for p in net.parameters()], grads, rtol=0, atol=0)
    assert torch.equal(u, inputs())


# --- hard data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 6])
def test_fewer_samples_than_states_are_fitted_and_certified(samples):
    net, u = small(sizes=(6, 24, 12, 3)), inputs(samples)
    sim = SIM(lam=1e-2).fit(net, [u])
    assert sim.certificate_.uncertified == ([], [])
    assert sim.certificate_.feasible
    assert all(bool(p.isfinite().all()) for p in sim.model_.parameters())
    assert max(float(p.detach().abs().max()) for p in sim.model_.parameters()) < 100  # nothing blows up
    y = net(u).detach()
    assert float((sim.predict(u) - y).square().mean()) <= 0.05 * float(y.square().mean())


@pytest.mark.parametrize("options", [{}, {"debias": False}, {"rescale": False}], ids=repr)
def test_constant_and_duplicate_features_are_no_obstacle(options):
    u = inputs()
    u = torch.cat((u, u[:, :2], torch.zeros(300, 1), torch.full((300, 1), 0.1), torch.full((300, 1), 100.0)), 1)
    net = small(sizes=(11, 8, 5, 3), scale=0.5)
    sim = SIM(lam=1e-2, kappa=0.9, **options).fit(net, [u])
    assert sim.certificate_.uncertified == ([], [])
    assert not bool(sim.model_.B[:, 8:].any())  # what is constant explains nothing beside a bias
    y = net(u).detach()
    torch.testing.assert_close(sim.predict(u).mean(0), y.mean(0), rtol=1e-5, atol=1e-4)
    assert float((sim.predict(u) - y).var()) < float(y.var())


@pytest.mark.parametrize("options", [{}, {"rescale": False}, {"rescale": "closed_form", "refit": False}], ids=repr)
def test_a_layer_that_never_fires_leaves_constant_outputs(options):
    net, u = small(), inputs()
    with torch.no_grad():
        net[2].bias -= 100
    sim = SIM(lam=1e-2, kappa=0.9, **options).fit(net, [u])
    assert sim.certificate_.uncertified == ([], [])
    torch.testing.assert_close(sim.predict(u), net[-1].bias.detach().expand(300, 3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sim.certificate_.explained, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_inputs_that_are_all_zero_give_the_constant_of_the_teacher():
    net, u = small(), torch.zeros(20, 6)
    sim = SIM(lam=1e-2).fit(net, [u])
    torch.testing.assert_close(sim.predict(u), net(u).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_a_teacher_of_any_precision_is_fitted(dtype, stored):
    net, u = small(), inputs()
    truth = SIM(lam=1e-2, kappa=0.9).fit(net, [u])
    sim = SIM(lam=1e-2, kappa=0.9).fit(copy.deepcopy(net).to(dtype), [u.to(dtype)])
    assert {p.dtype for p in sim.model_.parameters()} == {stored}
    assert sim.certificate_.feasible
    assert sim.certificate_.uncertified == ([], [])
    # Eight bits of the teacher's states are 0.004 of them; debiased supports may differ.
    torch.testing.assert_close(sim.predict(u.to(stored)).float(), truth.predict(u), rtol=0, atol=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_inputs_that_were_fitted_can_be_predicted_and_scored(dtype):
    net, u = small().to(dtype), inputs().to(dtype)
    sim = SIM(lam=1e-2, kappa=0.9).fit(net, [u])
    torch.testing.assert_close(sim.predict(u).float(), sim.predict(u.float()), rtol=1e-2, atol=1e-2)
    assert sim.score([(u, net(u).argmax(1))]) > 0.8


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        *(({"lam": value}, ValueError) for value in (0.0, -1e-3, float("nan"), float("inf"))),
        *(({"kappa": value}, ValueError) for value in (0.0, 1.0, -0.5, 2.0, float("nan"))),
        *(({"l1_ratio": value}, ValueError) for value in (0.0, -0.1, 1.1, float("nan"))),
        *(({"rescale": value}, ValueError) for value in ("variance", 1, None)),
        *(({"lam": value}, TypeError) for value in ("0.1", None, True)),
        *(({"kappa": value}, TypeError) for value in ("0.9", None, True)),
        *(({"solver": value}, TypeError) for value in (Hybrid, "hybrid")),
    ],
    ids=repr,
)
def test_an_argument_out_of_range_is_refused_and_named(options, error, as_users_run_it):
    (name,) = options
    with pytest.raises(error, match=f"`{name}` must"):
        SIM(**options)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "at least one batch"),
        ([inputs(0)], ValueError, "at least one sample"),
        (iter([inputs()]), TypeError, "iterable twice"),
        ((u for u in [inputs()]), TypeError, "iterable twice"),
        ([inputs(), inputs(columns=5)], ValueError, "batches of one shape"),
        ([inputs(), inputs()[:, :, None]], ValueError, "batches of one shape"),
        ([inputs(), inputs().double()], ValueError, "came .* and torch.float64"),
        ([inputs(), inputs() * torch.nan], ValueError, "NaN or inf"),
        ([inputs() * torch.nan], ValueError, "NaN or inf"),
        ([inputs(), inputs() / 0], ValueError, "NaN or inf"),
        ([inputs().long()], TypeError, "floating-point dtype; got torch.int64"),
        ([(inputs().bool(), torch.zeros(300))], TypeError, "floating-point dtype; got torch.bool"),
        ([inputs().numpy()], TypeError, "must be a torch.Tensor; got ndarray"),
        ([{"u": inputs()}], TypeError, "must be a torch.Tensor; got dict"),
        ([()], TypeError, "must be a torch.Tensor; got tuple"),
        (inputs(), TypeError, "rows are single samples"),
        (TensorDataset(inputs()), TypeError, r"TensorDataset, which has single samples\. Try DataLoader"),
        (DataLoader, TypeError, "`loader` must yield batches of inputs; got <class"),
        ([inputs()[0]], ValueError, "with one row a sample; got inputs of shape"),
        ([inputs()[0, 0]], ValueError, "with one row a sample; got inputs of shape"),
    ],
    ids=[
        "no batch",
        "no sample",
        "iterator",
        "generator",
        "another size",
        "another dimension",
        "another dtype",
        "NaN",
        "NaN at once",
        "inf",
        "integers",
        "booleans",
        "numpy",
        "dict",
        "empty tuple",
        "a tensor",
        "a dataset",
        "a class",
        "a sample",
        "a number",
    ],
)
def test_a_loader_that_cannot_be_used_is_refused(loader, error, message, as_users_run_it):
    sim = SIM(lam=1e-2)
    with pytest.raises(error, match=message):
        sim.fit(small(), loader)
    assert not hasattr(sim, "model_") and not hasattr(sim, "certificate_")


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (inputs(columns=5), r"`teacher` fails on samples of shape \(5,\) and dtype torch.float32: mat1 and mat2"),
        (inputs().reshape(300, 2, 3), r"`teacher` fails on samples of shape \(2, 3\) and dtype torch.float32: mat1"),
        (inputs().double(), r"(?s)dtype torch.float64: .*convert the inputs: u\.to\(torch\.float32\)"),
    ],
    ids=["width", "images", "dtype"],
)
def test_a_teacher_that_cannot_read_its_inputs_is_named_with_both_sides(u, message):
    with pytest.raises(ValueError, match=message) as raised:
        SIM(lam=1e-2).fit(small(), [u])
    assert len(str(raised.value).splitlines()) <= 2


class Counting:
    """Counts the batches that were asked for."""

    def __init__(self):
        self.batches = 0

    def __iter__(self):
        for batch in inputs().split(50):
            self.batches += 1
            yield batch


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({}, 80, "`target_sparsity` must lie strictly between 0 and 1; got 80. It is a part"),
        ({}, "0.8", "`target_sparsity` must be"),
        ({"column_weights": [1.0] * 18}, None, r"`column_weights` must have .* 19 in all; got 18"),
        ({"column_weights": [1.0] * 12 + [2.0] * 7, "rank": 2}, None, "`column_weights` must have the same factor"),
        ({"rank": 14}, None, "`rank` must be at most 13"),
    ],
    ids=repr,
)
def test_what_does_not_fit_is_refused_before_the_samples_are_run_through(options, target, message, as_users_run_it):
    counting = Counting()
    with pytest.raises((TypeError, ValueError), match=message):
        SIM(lam=1e-2, **options).fit(small(), counting, target_sparsity=target)
    assert counting.batches <= 1
    if target is None:
        with pytest.raises((TypeError, ValueError), match=message):
            next(lambda_path(small(), counting, [1e-2], **options))
        assert counting.batches <= 2


class Changing:
    """Yields other samples each time, or one fewer."""

    def __init__(self, kind):
        self.kind, self.passes = kind, 0

    def __iter__(self):
        self.passes += 1
        noise = random(300, 6, seed=self.passes).float()
        yield noise if self.kind == "noise" else inputs()[: 300 - self.passes]


@pytest.mark.parametrize("kind", ["noise", "fewer"])
def test_a_loader_that_yields_other_samples_in_the_second_pass_is_refused(kind):
    with pytest.raises(ValueError, match="the same samples each time"):
        SIM(lam=1e-2).fit(small(), Changing(kind))


def test_a_fit_that_fails_leaves_no_half_made_model():
    sim = SIM(lam=1e-2)
    with pytest.raises(ValueError, match="the same samples each time"):
        sim.fit(small(), Changing("noise"))
    with pytest.raises(ValueError, match="call fit"):
        sim.predict(inputs())
    sim.fit(small(), [inputs()])
    before = sim.predict(inputs())
    with pytest.raises(ValueError, match="the same samples each time"):
        sim.fit(small(seed=1), Changing("noise"))
    assert torch.equal(sim.predict(inputs()), before)


def test_what_is_recorded_can_be_used_alone():
    net, u = small(), inputs()
    recorded = record(net, [u])
    U, Z, X, Y = (torch.from_numpy(t) for t in raw(net, u))
    assert (recorded.states, recorded.inputs, recorded.biased) == (13, 6, True)
    for moments, T in ((recorded.state_moments, Z), (recorded.output_moments, Y)):
        torch.testing.assert_close(moments.cross, T.T @ torch.cat((X, U), 1) / 300, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.energies, T.square().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.mean_T, T.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"recorded": None}, TypeError, r"`recorded` must be .*Try idl.sim.recording.record\(teacher, loader\)"),
        ({"loader": inputs()}, TypeError, "rows are single samples"),
        ({"near": 1e-2}, TypeError, "`near` must be"),
        ({"near": SIM()}, ValueError, r"`near` must be fitted; call its fit\(teacher, loader\) first"),
        ({"near": SIM(lam=1e-1).fit(small(sizes=(6, 4, 3)), [inputs()])}, ValueError, "`near` must be fitted to the s"),
        ({"near": SIM(lam=1e-1, rank=2).fit(small(), [inputs()])}, ValueError, "rank=None; got .* rank=2"),
    ],
    ids=["recorded", "loader", "number", "unfitted", "sizes", "rank"],
)
def test_what_was_recorded_and_where_to_start_are_checked(change, error, message, as_users_run_it):
    arguments = {"recorded": record(small(), [inputs()]), "loader": [inputs()], "near": None} | change
    with pytest.raises(error, match=message):
        SIM(lam=1e-2).fit_recorded(**arguments)


# --- what a newcomer tried --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"l1_ratio": 0.1}, {"knee": 0.2, "lam": 1e-4}, {"l1_ratio": 0.1, "rank": 3}], ids=repr
)
def test_a_large_support_does_not_let_weights_explode(options, teacher, digits):
    weights_of = [SIM(**options, debias=on).fit(teacher, digits.loader).model_ for on in (False, True)]
    largest = [max(float(p.detach().abs().max()) for p in model.parameters()) for model in weights_of]
    assert largest[1] <= 5 * max(largest[0], 1)


class Divided(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x))) / x.norm(dim=1, keepdim=True)


class Gated(Divided):
    def __init__(self, j):
        super().__init__()
        self.j = j

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * (x[:, self.j : self.j + 1] > 0))


@pytest.mark.parametrize("make", [Divided, *(functools.partial(Gated, j) for j in range(8))])
def test_a_quotient_or_a_gate_is_not_affine(make):
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match="not affine"):
        SIM().fit(make(), [torch.randn(50, 8)])


def test_a_model_that_iterates_is_no_feed_forward_teacher(teacher, digits):
    torch.manual_seed(0)
    for model in (ImplicitModel(6, 8, 3), ImplicitModel(6, 8, 3, bias=True)):
        with pytest.raises(CaptureError):
            SIM().fit(model, [torch.randn(50, 8)])


def test_a_sparsity_that_no_penalty_reaches_is_refused_with_its_reason(teacher, digits):
    with pytest.raises(ValueError, match=r"cannot be reached: \d+ weights of C carry the constants"):
        SIM().fit(teacher, digits.loader, target_sparsity=0.9999)
    with pytest.raises(ValueError, match=r"LeastSquares.* do not depend"):
        SIM(LeastSquares()).fit(teacher, digits.loader, target_sparsity=0.5)


def test_a_batch_may_have_more_dimensions_where_they_are_predicted(fitted, digits):
    u = digits.u[:20]
    assert torch.equal(fitted.predict(u.reshape(4, 5, -1)), fitted.predict(u).reshape(4, 5, -1))


def test_a_model_that_was_fitted_in_inference_mode_trains(teacher, digits):
    with torch.inference_mode():
        model = SIM(lam=1e-2).fit(teacher, digits.loader).model_
    model(digits.u[:5].clone()).sum().backward()
    assert model.A.grad is not None


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda net, u: SIM().fit(None, [u]), "teacher"),
        (lambda net, u: SIM().fit(lambda x: x, [u]), "teacher"),
        (lambda net, u: SIM().fit(net, None), "loader"),
        (lambda net, u: SIM().fit(net, 5), "loader"),
        (lambda net, u: SIM().fit(net, [u], target_sparsity="80%"), "target_sparsity"),
        (lambda net, u: lambda_path(None, [u], [1e-3]), "teacher"),
        (lambda net, u: lambda_path(net, iter([u]), [1e-3]), "loader"),
        (lambda net, u: lambda_path(net, [u], 1e-3), "lams"),
        (lambda net, u: lambda_path(net, [u], "1e-3"), "lams"),
        (lambda net, u: lambda_path(net, [u], torch.tensor(1e-3)), "lams"),
        (lambda net, u: lambda_path(net, [u], [1e-3], folder=3), "folder"),
        (lambda net, u: SIM().fit(net, [u]).predict(u.long()), "u"),
        (lambda net, u: SIM(column_weights=5.0), "column_weights"),
        (lambda net, u: SIM(layers=3), "layers"),
        (lambda net, u: SIM(exact="yes"), "exact"),
        (lambda net, u: SIM(debias=1), "debias"),
    ],
)
def test_an_argument_of_another_type_is_refused_and_named(call, name, teacher, digits, as_users_run_it):
    with pytest.raises(TypeError, match=f"`{name}` must"):
        call(teacher, digits.u)


def test_weights_of_a_penalty_may_be_a_tensor(teacher, digits, as_users_run_it):
    path = lambda_path(teacher, digits.loader, torch.tensor([1e-2, 1e-1], dtype=torch.float64))
    assert [sim.lam for sim in path] == [1e-1, 1e-2]
