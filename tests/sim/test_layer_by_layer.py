"""SIM with a bound on the number of weights, and SIM that fits one layer after the other.

The oracle is the explicit forward pass through the layers of the sparse model, in numpy: what a layer is fitted to is
what the layers before it really give.
"""

import copy
import functools
import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn

from idl import SIM, ImplicitFunctionTriu
from idl.sim import lambda_path
from idl.sim.solvers import Cardinality, Hybrid, LeastSquares
from problems import random
from sim.teachers import Residual, seeded

PHI = {
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
}
PHIS = {"relu": nn.ReLU, "tanh": nn.Tanh}

SUMS = 1e-10
"""Relative, of float64 sums in another order, through the moments and a few layers."""

SINGLE = 1e-5
"""The same of a model whose matrices and states are float32: a hundred roundings."""

SIZES = (6, 8, 5, 3)


def mlp(phi="relu", bias=True, sizes=SIZES, seed=0, dtype=torch.float64):
    """An untrained teacher with biases that matter."""
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o, bias) for i, o in itertools.pairwise(sizes)]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= 1.5
    return nn.Sequential(*(part for layer in layers for part in (layer, PHIS[phi]())))[:-1].to(dtype)


def inputs(dtype=torch.float64, samples=300):
    return random(samples, 6, seed=3).to(dtype)


TEACHERS = {
    "biased": mlp,
    "unbiased": lambda: mlp(bias=False),
    "tanh": lambda: mlp("tanh"),
    "residual": lambda: seeded(Residual),
    "float32": lambda: mlp(dtype=torch.float32),
}
every_teacher = pytest.mark.parametrize("which", TEACHERS)


def units(net):
    """The units of each layer, in the order of the forward pass."""
    if isinstance(net, Residual):
        return [5, 5]
    return [layer.out_features for layer in net if isinstance(layer, nn.Linear)][:-1]


def blocks(net):
    """The rows of each layer, in the order of the forward pass: the first layer is stored last."""
    stop, found = sum(units(net)), []
    for size in units(net):
        found.append(slice(stop - size, stop))
        stop -= size
    return found


def pre_activations(net, u, phi="relu"):
    """Return Z, last layer first, and Y of a Sequential of Linear layers, in numpy."""
    x, zs = u.double().numpy(), []
    for layer in net:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.detach().double().numpy().T
            x = x if layer.bias is None else x + layer.bias.detach().double().numpy()
        else:
            zs.append(x)
            x = PHI[phi](x)
    return np.concatenate(zs[::-1], 1), x


def matrices(model):
    """Return A, B, C, D and b in numpy float64, with the unit that carries the bias of the outputs, if there is one."""
    A, B, C, D = (p.detach().double().numpy() for p in (model.A, model.B, model.C, model.D))
    return A, B, C, D, np.zeros(len(A)) if model.bias is None else model.bias.detach().double().numpy()


def forward(model, u, rows, phi="relu"):
    """Return states and outputs by one pass through the layers: no equation is solved."""
    A, B, C, D, b = matrices(model)
    u = u.double().flatten(1).numpy()
    x = np.zeros((len(u), len(A)))
    x[:, sum(block.stop - block.start for block in rows) :] = PHI[phi](b[sum(r.stop - r.start for r in rows) :])
    for block in rows:
        x[:, block] = PHI[phi](x @ A[block].T + u @ B[block].T + b[block])
    return x, x @ C.T + u @ D.T


def centred(t):
    return t - t.mean(0)


def optimum(S, z, ball, kappa, lam):
    """The least half mean square plus ``lam |w|_1`` with the first ``ball`` weights in the ball, by cvxpy."""
    w, m = cp.Variable(S.shape[1]), len(S)
    cost = 0.5 * cp.sum_squares((z - S @ w) / m**0.5) + lam * cp.norm1(w)
    program = cp.Problem(cp.Minimize(cost), [cp.norm1(w[:ball]) <= kappa] if ball else [])
    return program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-9, tol_feas=1e-11)


class Counted:
    """A loader of two batches that counts its passes: begun, and gone through to the end."""

    def __init__(self, u):
        self.batches, self.begun, self.ended = [u[:100], u[100:]], 0, 0

    def __iter__(self):
        self.begun += 1
        yield from self.batches
        self.ended += 1


SOLVERS = {
    "Hybrid": {"lam": 1e-2},
    "Hybrid, not debiased": {"lam": 1e-2, "debias": False, "rescale": False},
    "Cardinality": {"solver": Cardinality(keep=0.4), "kappa": 0.9},
    "LeastSquares": {"solver": LeastSquares()},
}


@functools.cache
def fitted(which, solver, refit="layers"):
    """Return teacher, inputs and fit, which are not changed."""
    net = TEACHERS[which]()
    u = inputs(next(net.parameters()).dtype)
    return net, u, SIM(**SOLVERS[solver], refit=refit).fit(net, [u])


# --- a bound on the number of weights -------------------------------------------------------------------------------


def biases(sim):
    """Weights that carry the biases of the outputs, which no budget knows."""
    return int(sim.model_.C[:, -1].count_nonzero()) if sim.model_.bias is not None else 0


@pytest.mark.parametrize(("which", "refit"), [("biased", True), *itertools.product(TEACHERS, ["layers"])])
def test_weights_kept_are_within_the_budget_feasible_and_marked_as_relaxed(which, refit):
    net, _, sim = fitted(which, "Cardinality", refit)
    certificate = sim.certificate_
    kept, model = certificate.weights_kept, sim.model_
    budget = round(0.4 * sum(p.numel() for p in net.parameters() if p.dim() > 1))
    assert kept.teacher == sum(p.numel() for p in net.parameters() if p.dim() > 1)
    counts = [int((p.detach().numpy() != 0).sum()) for p in (model.A, model.B, model.C, model.D)]
    assert [kept.A, kept.B, kept.C, kept.D] == counts
    assert kept.total - biases(sim) <= budget
    assert kept.total - biases(sim) >= 0.9 * budget  # and it is spent
    assert certificate.relaxed and certificate.feasible and certificate.uncertified == ([], [])
    assert float(certificate.row_sums.max()) <= 0.9
    assert float(np.abs(matrices(model)[0]).sum(1).max()) <= 0.9
    text = str(certificate)
    assert "on its support" in text and "the supports are not proved to be the best" in text


def test_a_number_of_weights_is_kept_too():
    sim = SIM(Cardinality(keep=25), refit="layers").fit(mlp(bias=False), [inputs()])
    assert 22 <= sim.certificate_.weights_kept.total <= 25


def test_a_biased_teacher_keeps_no_more_than_its_part():
    kept = SIM(Cardinality(keep=0.4)).fit(mlp(), [inputs()]).certificate_.weights_kept
    assert kept.fraction <= 0.4


def test_a_part_is_never_exceeded_by_a_fraction_of_a_weight():
    kept = SIM(Cardinality(keep=0.346)).fit(mlp(bias=False), [inputs()]).certificate_.weights_kept
    assert kept.total <= 0.346 * kept.teacher  # 35.6


def test_a_budget_of_one_weight_is_kept():
    sim = SIM(Cardinality(keep=1), refit="layers").fit(mlp(bias=False), [inputs()])
    assert sim.certificate_.weights_kept.total <= 1


def test_an_output_that_is_constant_takes_no_weight_from_the_others():
    net = mlp(dtype=torch.float32)
    with torch.no_grad():
        net[-1].weight[1], net[-1].bias[1] = 0, 0.1
    model = SIM(Cardinality(keep=0.3)).fit(net, [inputs(torch.float32)]).model_
    assert not bool(model.C[1, :-1].any() or model.D[1].any())


def test_so_many_weights_a_row_or_a_matrix():
    for per, keep, refit in (("row", 2, "layers"), ("matrix", 9, "layers"), ("matrix", 9, True)):
        sim = SIM(Cardinality(keep=keep, per=per), refit=refit).fit(mlp(), [inputs()])
        A, B, C, D, _ = matrices(sim.model_)
        states, outputs = (np.concatenate(pair, 1) != 0 for pair in ((A[:13, :13], B[:13]), (C[:, :13], D)))
        if per == "row":
            assert states.sum(1).max() == 2 and outputs.sum(1).max() == 2
        else:
            parts = [states[block] for block in blocks(mlp())] if refit == "layers" else [states]
            assert all(0 < part.sum() <= 9 for part in parts)
            assert 0 < outputs.sum() <= 9
            assert sum(part.sum() for part in parts) >= 9 * len(parts) - 1


def test_more_weights_explain_more():
    explained = [
        float(SIM(Cardinality(keep=keep), refit="layers").fit(mlp(), [inputs()]).certificate_.explained.mean())
        for keep in (0.2, 0.9)
    ]
    assert explained[0] + 0.1 < explained[1]
    assert explained[1] > 0.9


def test_as_many_weights_as_the_penalty_keeps_explain_more_than_with_it():
    # No weight is shrunk, but neither does debiased Hybrid shrink any: what is gained is the support.
    gained = []
    for seed in range(2):
        net = mlp(bias=False, seed=seed)
        penalised = SIM(lam=0.03).fit(net, [inputs()]).certificate_
        bounded = SIM(Cardinality(keep=penalised.weights_kept.total)).fit(net, [inputs()]).certificate_
        assert bounded.weights_kept.total <= penalised.weights_kept.total
        gained.append(float(bounded.explained.mean() - penalised.explained.mean()))
    assert np.mean(gained) > 0


def test_weights_do_not_depend_on_the_penalty():
    truth = fitted("biased", "Cardinality", True)[2].model_
    model = SIM(**SOLVERS["Cardinality"], lam=1.0).fit(mlp(), [inputs()]).model_
    for name, value in truth.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_relaxation_is_that_of_the_penalty_in_use():
    lam = 1e-2
    options = {"lam": lam, "rescale": False, "refit": False}
    bounded = SIM(Cardinality(keep=0.4), **options).fit(mlp(), [inputs()]).certificate_
    penalised = SIM(Hybrid(1e-8), debias=False, **options).fit(mlp(), [inputs()]).certificate_
    for first, second in ((bounded.states, penalised.states), (bounded.outputs, penalised.outputs)):
        # Both bound the same optimum; the one to 1e-8, the other to 1e-4 of itself.
        torch.testing.assert_close(first.bound, second.bound, rtol=1e-4, atol=0)
        assert bool((first.objective >= second.bound).all())
    total = [
        sum(float(getattr(part, name).sum()) for part in (bounded.states, bounded.outputs))
        for name in ("objective", "bound")
    ]
    assert f"{100 * (1 - total[1] / total[0]):.0f} % lower" in str(bounded)


def test_debiasing_leaves_the_ridge():
    net, u = mlp(sizes=(6, 8, 3)), inputs()
    solver = Cardinality(keep=3, per="row")
    sim = SIM(solver, lam=1.0, l1_ratio=0.01, rescale=False, refit="layers", debias=True).fit(net, [u])
    _, B, *_ = matrices(sim.model_)
    Z, U = centred(pre_activations(net, u)[0]), centred(u.numpy())
    for b, z in zip(B[:8], Z.T, strict=True):
        on = np.flatnonzero(b)
        gram = U[:, on].T @ U[:, on] / len(U) + 0.99 * np.eye(len(on))
        np.testing.assert_allclose(b[on], np.linalg.solve(gram, U[:, on].T @ z / len(U)), rtol=1e-9)


def test_a_subset_of_layers_may_be_kept():
    net = mlp()
    sim = SIM(Cardinality(keep=0.5), layers=["1"]).fit(net, [inputs()])
    assert sim.model_.hidden_dim == 8 + 1
    assert sim.certificate_.weights_kept.total - biases(sim) <= round(0.5 * sim.certificate_.weights_kept.teacher)
    assert sim.certificate_.relaxed and sim.certificate_.feasible and sim.certificate_.uncertified == ([], [])
    assert not bool(sim.model_.A.any())  # one layer reads inputs alone
    assert float(sim.certificate_.explained.mean()) > 0.6


def test_a_target_of_sparsity_has_no_meaning_for_a_number_of_weights():
    sim = SIM(Cardinality(keep=0.4))
    with pytest.raises(ValueError, match=r"Cardinality\(keep=0.2\)"):
        sim.fit(mlp(), [inputs()], target_sparsity=0.8)
    assert not hasattr(sim, "model_")


def test_other_solvers_are_not_marked_as_relaxed():
    for solver in (Hybrid(), LeastSquares()):
        certificate = SIM(solver).fit(mlp(), [inputs()]).certificate_
        assert not certificate.relaxed
        assert "support" not in str(certificate)


def test_two_fits_are_equal_to_the_last_bit():
    first = fitted("biased", "Cardinality")[2]
    second = SIM(**SOLVERS["Cardinality"], refit="layers").fit(mlp(), [inputs()])
    for name, value in first.model_.state_dict().items():
        assert torch.equal(value, second.model_.state_dict()[name])


# --- one layer after the other --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "solver"),
    [
        *itertools.product(TEACHERS, ["Hybrid", "Cardinality", "LeastSquares"]),
        ("biased", "Hybrid, not debiased"),
    ],
)
def test_the_model_is_a_feed_forward_network_in_the_order_of_the_layers(which, solver):
    net, u, sim = fitted(which, solver)
    model, rows = sim.model_, blocks(net)
    A = model.A.detach()
    n = sum(units(net))
    for block in rows:
        assert not bool(A[block, : block.stop].any())  # neither its own layer nor a later one
    assert not bool(A[n:].any() or A[:, n:].any())
    assert bool(A.any())
    assert isinstance(model.f, ImplicitFunctionTriu)
    assert torch.equal(model.state_matrix(), A)
    _, y = forward(model, u, rows, "tanh" if which == "tanh" else "relu")
    close = SINGLE if which == "float32" else SUMS
    np.testing.assert_allclose(sim.predict(u), y, rtol=close, atol=close * np.abs(y).max())


@pytest.mark.parametrize("phi", ["relu", "tanh"])
@pytest.mark.parametrize(("debias", "kappa"), [(False, 0.3), (True, 0.9), (True, 0.3)])
def test_each_layer_is_fitted_to_what_the_sparse_layers_before_it_give(phi, debias, kappa):
    lam, u = 2e-2, inputs(samples=120)
    net = mlp(phi, sizes=(6, 5, 4, 3, 2))
    sim = SIM(lam=lam, kappa=kappa, rescale=False, debias=debias, refit="layers").fit(net, [u])
    certificate, rows = sim.certificate_, blocks(net)
    Z, Y = pre_activations(net, u, phi)
    A, B, C, D, b = matrices(sim.model_)
    x, _ = forward(sim.model_, u, rows, phi)
    for block in (*rows, None):
        first, part = (0, certificate.outputs) if block is None else (block.stop, certificate.states)
        regressors = np.concatenate((x[:, first:12], u.numpy()), 1)
        S, T = centred(regressors), centred(Y if block is None else Z[:, block])
        ball = 0 if block is None else 12 - first
        for i in range(T.shape[1]):
            row = i if block is None else block.start + i
            best = optimum(S, T[:, i], ball, kappa, lam)
            # The certificate is of the penalised problem on these states: bound <= optimum <= objective.
            slack = 1e-9 * (1 + np.square(T[:, i]).mean())  # what cvxpy is exact to
            assert float(part.bound[row]) <= best + slack
            assert best <= float(part.objective[row]) + slack
            assert float(part.objective[row]) <= best * (1 + 1e-4) + slack  # Hybrid's tol
            w = part.W[row].numpy()
            assert not w[:first].any()
            w = w[first:]
            penalised = 0.5 * np.square(T[:, i] - S @ w).mean() + lam * np.abs(w).sum()
            assert penalised == pytest.approx(float(part.objective[row]), rel=1e-8)
            stored = np.concatenate((C[row, :12], D[row]) if block is None else (A[row, first:12], B[row]))
            assert not ((w == 0) & (stored != 0)).any()
            if debias:
                on = np.flatnonzero(w)
                least = optimum(S[:, on], T[:, i], int((on < ball).sum()), kappa, 0.0) if len(on) else T[:, i].var() / 2
                reached = 0.5 * np.square(T[:, i] - S @ stored).mean()
                # Debiasing ends at 1e-6, and rows at the edge are shrunk by as much.
                assert reached <= least * (1 + 1e-5) + slack
            else:
                np.testing.assert_allclose(stored, w, rtol=2e-6, atol=1e-12)  # shrunk by 1e-6 at the edge
            offset = (Y[:, i] if block is None else Z[:, row]) - regressors @ stored
            constant = C[row, 12] * PHI[phi](np.ones(())) if block is None else b[row]
            assert constant == pytest.approx(offset.mean(), abs=1e-5)  # by shrinking times states of size 1


def test_the_outputs_of_a_teacher_without_biases_are_fitted_to_moments_about_zero():
    lam, u, net = 2e-2, inputs(samples=120), mlp(bias=False)
    sim = SIM(lam=lam, rescale=False, refit="layers").fit(net, [u])
    x, y = forward(sim.model_, u, blocks(net))
    S = np.concatenate((x, u.numpy()), 1)
    _, Y = pre_activations(net, u)
    assert sim.model_.bias is None
    for i in range(3):
        best = optimum(S, Y[:, i], 0, 1.0, lam)
        assert float(sim.certificate_.outputs.objective[i]) == pytest.approx(best, rel=2e-4)
    spread = 1 - np.square(Y - y).mean(0) / Y.var(0)
    np.testing.assert_allclose(sim.certificate_.explained, spread, rtol=0, atol=1e-8)


@every_teacher
@pytest.mark.parametrize("solver", ["Hybrid", "Cardinality", "LeastSquares"])
def test_what_is_explained_is_what_the_explicit_forward_pass_explains(which, solver):
    net, u, sim = fitted(which, solver)
    _, y = forward(sim.model_, u, blocks(net), "tanh" if which == "tanh" else "relu")
    with torch.no_grad():
        truth = net(u).double().numpy()
    explained = 1 - np.square(truth - y).mean(0) / truth.var(0)
    np.testing.assert_allclose(sim.certificate_.explained, explained, rtol=0, atol=1e-5)  # float32 states and biases


def test_rescaling_does_not_change_what_an_exact_model_predicts():
    # With no penalty to speak of the model is its teacher, in any units.
    for rescale in ("unit_variance", "layerwise", "closed_form"):
        sim = SIM(lam=1e-6, rescale=rescale, refit="layers").fit(mlp(), [inputs()])
        assert sim.certificate_.rescaling == rescale
        assert float(sim.certificate_.explained.min()) > 1 - 1e-9


@pytest.mark.parametrize(
    ("dtype", "close", "bias"),
    [(torch.float64, 1e-6, True), (torch.float64, 1e-6, False), (torch.float32, SINGLE, True)],
)
def test_with_hardly_a_penalty_the_teacher_is_reproduced(dtype, close, bias):
    # In float64 what is left is by how much rows at the edge of the ball are shrunk, 1e-6.
    net, u = mlp(bias=bias, dtype=dtype), inputs(dtype)
    sim = SIM(lam=1e-6, refit="layers").fit(net, [u])
    y = net(u).detach()
    torch.testing.assert_close(sim.predict(u), y, rtol=0, atol=close * float(y.abs().max()))
    assert {p.dtype for p in sim.model_.parameters()} == {dtype}
    assert sim.certificate_.feasible


def test_all_weights_that_the_teacher_has_reproduce_it():
    # Budget and support are those of the teacher: nothing is lost, and nothing but its own weights is kept.
    net, u = mlp(bias=False), inputs()
    sim = SIM(Cardinality(keep=103), refit="layers").fit(net, [u])
    assert float(sim.certificate_.explained.min()) > 0.98
    assert sim.certificate_.weights_kept.total <= 103


def test_a_layer_corrects_the_errors_of_those_before_it():
    gained = []
    for seed in range(2):
        net = mlp(sizes=(6, 8, 8, 8, 3), seed=seed)
        whole, layered = (
            float(SIM(Cardinality(keep=4, per="row"), refit=refit).fit(net, [inputs()]).certificate_.explained.mean())
            for refit in (True, "layers")
        )
        gained.append(layered - whole)
    assert np.mean(gained) > 0


def test_least_squares_layer_by_layer_is_the_teacher_itself():
    net, u = mlp(), inputs()
    sim = SIM(LeastSquares(), refit="layers").fit(net, [u])
    torch.testing.assert_close(sim.predict(u), net(u).detach(), rtol=1e-9, atol=1e-9)  # nothing is left to explain
    assert len(sim.certificate_.uncertified[0]) > 0 and not sim.certificate_.relaxed


def test_one_layer_is_fitted_as_without_refit_to_layers():
    net, u = mlp(sizes=(6, 8, 3)), inputs()
    whole, layered = (SIM(lam=1e-2, refit=refit).fit(net, [u]) for refit in (True, "layers"))
    for name in ("B", "D"):
        torch.testing.assert_close(getattr(layered.model_, name), getattr(whole.model_, name), rtol=1e-6, atol=1e-6)
    assert not bool(layered.model_.A.any())


def test_a_subset_of_layers_is_fitted_one_after_the_other():
    net, u = mlp(sizes=(6, 5, 4, 3, 2)), inputs()
    sim = SIM(lam=1e-3, refit="layers", layers=["1", "5"]).fit(net, [u])
    rows = [slice(3, 8), slice(0, 3)]
    assert not bool(sim.model_.A[:3, :3].any() or sim.model_.A[3:].any())
    assert bool(sim.model_.A[:3, 3:8].any())
    _, y = forward(sim.model_, u, rows)
    np.testing.assert_allclose(sim.predict(u), y, rtol=SUMS, atol=SUMS)


# --- passes over the loader -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "layers"), [((6, 8, 3), 1), ((6, 5, 4, 5, 3), 3)])
def test_the_loader_is_passed_over_once_for_each_layer_and_once_more(sizes, layers):
    for refit, passes in ((True, 2), (False, 2), ("layers", 1 + layers)):
        loader = Counted(inputs())
        SIM(lam=1e-2, refit=refit).fit(mlp(sizes=sizes), loader)
        assert loader.ended == passes
        assert loader.begun == passes  # none for a look at the first batch


def test_a_path_passes_once_over_the_loader_to_record_and_then_once_for_each_layer():
    loader = Counted(inputs())
    assert len(list(lambda_path(mlp(), loader, [1e-1, 1e-2, 1e-3], refit="layers"))) == 3
    assert loader.begun == loader.ended == 1 + 3 * 2


class Changing:
    """Yields other samples from one pass on, which are counted as they begin."""

    def __init__(self, since, kind):
        self.since, self.kind, self.begun = since, kind, 0

    def __iter__(self):
        self.begun += 1
        u = inputs()
        if self.begun >= self.since:
            u = u[:299] if self.kind == "fewer" else u + 1e-3
        yield u


@pytest.mark.parametrize("kind", ["fewer", "moved"])
@pytest.mark.parametrize("since", [2, 3, 4])
def test_a_loader_that_changes_in_a_later_pass_is_refused(since, kind):
    # The passes: record and first layer, second layer, third layer, outputs.
    sim, loader = SIM(lam=1e-2, refit="layers"), Changing(since, kind)
    with pytest.raises(ValueError, match="the same samples each time"):
        sim.fit(mlp(sizes=(6, 5, 4, 5, 3)), loader)
    assert loader.begun == since
    assert not hasattr(sim, "model_")


def test_samples_may_come_in_another_order_and_in_other_batches_each_time():
    class Shuffled:
        begun = 0

        def __iter__(self):
            self.begun += 1
            order = torch.randperm(300, generator=torch.Generator().manual_seed(self.begun))
            yield from inputs()[order].split(40 + 10 * self.begun)

    truth = SIM(lam=1e-2, refit="layers").fit(mlp(), [inputs()])
    sim = SIM(lam=1e-2, refit="layers").fit(mlp(), Shuffled())
    torch.testing.assert_close(sim.predict(inputs()), truth.predict(inputs()), rtol=0, atol=1e-6)  # debiasing's tol


# --- options and the rest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refit", ["layer", "", "all", 1, None])
def test_another_word_for_layers_is_refused(refit, as_users_run_it):
    with pytest.raises(ValueError, match="`refit` must be True, False or one of 'layers'"):
        SIM(refit=refit)


def test_a_path_gives_what_a_fit_from_nothing_gives():
    # Solved to 1e-9, so that supports do not depend on the start.
    lams, net, u = [1e-1, 1e-2, 1e-3], mlp(), inputs()
    path = list(lambda_path(net, [u], lams, solver=Hybrid(1e-9), refit="layers"))
    assert [sim.lam for sim in path] == lams
    for sim in path:
        cold = SIM(Hybrid(1e-9), lam=sim.lam, refit="layers").fit(net, [u])
        assert sim.certificate_.weights_kept == cold.certificate_.weights_kept
        for warm, part in (
            (sim.certificate_.states, cold.certificate_.states),
            (sim.certificate_.outputs, cold.certificate_.outputs),
        ):
            torch.testing.assert_close(warm.objective, part.objective, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(sim.predict(u), cold.predict(u), rtol=0, atol=1e-5)


def test_a_start_is_the_block_of_the_rows_it_is_for():
    net, u = mlp(), inputs()
    first, again = lambda_path(net, [u], [1e-2, 1e-2], refit="layers")
    cold = first.certificate_.states.steps
    assert cold > 0
    assert again.certificate_.states.steps == again.certificate_.outputs.steps == 0  # it is the solution already
    assert again.certificate_.weights_kept == first.certificate_.weights_kept


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_a_target_of_sparsity_is_reached_layer_by_layer(sparsity):
    net, u = mlp(bias=False, sizes=(6, 16, 12, 3)), inputs()
    sim = SIM(refit="layers").fit(net, [u], target_sparsity=sparsity)
    kept = sim.certificate_.weights_kept
    assert 0.8 * (1 - sparsity) <= kept.fraction <= 1 - sparsity
    assert sim.certificate_.uncertified == ([], [])
    again = SIM(lam=sim.lam, refit="layers").fit(net, [u])
    assert again.certificate_.weights_kept.total == pytest.approx(kept.total, rel=0.05)  # from another start


@pytest.mark.parametrize("solver", ["Hybrid", "LeastSquares"])
def test_precision_of_the_teacher_hardly_shows(solver):
    predictions = []
    for dtype in (torch.float32, torch.float64):
        net = mlp(dtype=torch.float32).to(dtype)
        sim = SIM(**SOLVERS[solver], refit="layers").fit(net, [inputs(torch.float32).to(dtype)])
        assert {p.dtype for p in sim.model_.parameters()} == {dtype}
        predictions.append(sim.predict(inputs(torch.float32)).double())
    # Hybrid's rows end within a relative gap of 1e-4, whose root is by how much weights may differ.
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-2)


@pytest.mark.parametrize("solver", ["Hybrid", "Cardinality"])
def test_the_teacher_and_its_inputs_are_left_as_they_were(solver):
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(5, 4), nn.ReLU())
    net = nn.Sequential(*net, nn.Linear(4, 2)).double()
    net[0].weight.requires_grad_(False)
    u = inputs()
    net(u).sum().backward()
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    grads = [p.grad if p.grad is None else p.grad.clone() for p in net.parameters()]
    generator = torch.get_rng_state()
    SIM(**SOLVERS[solver], refit="layers").fit(net, [u])
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in net.parameters()], grads, rtol=0, atol=0)
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == [False] + 5 * [True]
    assert torch.equal(u, inputs())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_dead_layer_is_no_obstacle():
    net, u = mlp(), inputs()
    with torch.no_grad():
        net[2].bias -= 100
    for options in (SOLVERS["Hybrid"], SOLVERS["Cardinality"]):
        sim = SIM(**options, refit="layers").fit(net, [u])
        torch.testing.assert_close(sim.predict(u), net[-1].bias.detach().expand(300, 3), rtol=1e-9, atol=1e-9)
        assert sim.certificate_.feasible


def test_a_model_of_layers_trains_further_and_is_copied():
    net, u, sim = fitted("biased", "Cardinality")
    model = copy.deepcopy(sim.model_)
    y, losses = net(u).detach(), []
    optimiser = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(5):
        loss = (model(u) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(model.state_matrix(), model.state_matrix().triu(1))
