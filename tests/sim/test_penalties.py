"""What SIM's penalties mean: each row against the program that its docstring states, solved by cvxpy on the samples."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn

from idl import SIM
from idl.sim.solvers import Cardinality
from problems import random
from sim.row_problems import minimum

LAM, KAPPA = 0.05, 0.6


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    layers = [
        nn.Linear(5, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, 3, bias=False),
        nn.ReLU(),
        nn.Linear(3, 2, bias=False),
    ]
    return nn.Sequential(*layers).double()


U = random(60, 5, seed=1)


def states(teacher):
    """Return Z and S = [X U], the last layer first, and Y."""
    with torch.no_grad():
        first = teacher[0](U)
        second = teacher[2](first.relu())
        Z = torch.cat((second, first), 1)
        return Z.numpy(), torch.cat((Z.relu(), U), 1).numpy(), teacher(U).numpy()


def optimum(S, z, ball, weights, l1_ratio, knee):
    """The smallest value of the stated program."""
    w = cp.Variable(S.shape[1])
    size, excess = cp.abs(w), cp.pos(cp.abs(w) - knee) if np.isfinite(knee) else 0
    bent = size + cp.square(excess) / (2 * knee) if np.isfinite(knee) else size
    penalty = LAM * weights @ (l1_ratio * bent + (1 - l1_ratio) / 2 * cp.square(w))
    cost = cp.sum_squares(z - S @ w) / (2 * len(z)) + penalty
    return minimum(cp.Problem(cp.Minimize(cost), [cp.norm1(w[:ball]) <= KAPPA] if ball else []))


WEIGHTS = {
    "none": None,
    "different": [0.1, 3.0, 1.0, 1.0, 2.0, 0.5, 1.0, 1.0, 4.0, 0.2, 1.0, 1.0],
    "free inputs": [1.0] * 7 + [0.0] * 5,
    "a free state": [0.0, *[1.0] * 11],
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("l1_ratio", [1.0, 0.4])
@pytest.mark.parametrize("knee", [float("inf"), 0.1])
def test_rows_minimise_the_program_that_is_stated(weights, l1_ratio, knee, teacher):
    options = {"kappa": KAPPA, "l1_ratio": l1_ratio, "rescale": False, "debias": False, "refit": False}
    sim = SIM(lam=LAM, column_weights=WEIGHTS[weights], knee=knee, **options).fit(teacher, [U])
    Z, S, Y = states(teacher)
    factors = np.ones(12) if WEIGHTS[weights] is None else np.array(WEIGHTS[weights])
    assert sim.certificate_.uncertified == ([], [])
    for rows, targets, ball in ((sim.certificate_.states, Z, 7), (sim.certificate_.outputs, Y, 0)):
        for objective, z in zip(rows.objective.tolist(), targets.T, strict=True):
            truth = optimum(S, z, ball, factors, l1_ratio, knee)
            assert truth * (1 - 1e-7) - 1e-9 <= objective <= truth * (1 + 1.01e-4) + 1e-9


@pytest.mark.parametrize("refit", [True, "layers"])
def test_weights_that_cost_nothing_are_kept(refit, teacher):
    weights = [1.0] * 7 + [0.0] * 5
    sim = SIM(lam=10.0, column_weights=torch.tensor(weights), rescale=False, refit=refit).fit(teacher, [U])
    assert not bool(sim.model_.A.any()) and bool(sim.model_.B.all())


def test_a_knee_keeps_large_weights_from_being_shrunk_alike(teacher):
    options = {"lam": 0.02, "rescale": False, "debias": False, "refit": False, "kappa": 0.9}
    plain, bent = (
        SIM(knee=knee, **options).fit(teacher, [U]).model_.requires_grad_(False) for knee in (float("inf"), 0.05)
    )
    assert int(bent.B.count_nonzero()) >= int(plain.B.count_nonzero())
    assert float(bent.B.abs().max()) < float(plain.B.abs().max())


def test_weights_that_cost_nothing_are_in_nobodys_budget(teacher):
    weights = [1.0] * 7 + [0.0] * 5
    sim = SIM(Cardinality(keep=6), column_weights=weights, rescale=False).fit(teacher, [U])
    model = sim.model_
    assert bool(model.B.all()) and bool(model.D.all())
    assert int(model.A.count_nonzero() + model.C.count_nonzero()) == 6


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"column_weights": [-1.0]}, ValueError, "column_weights"),
        ({"column_weights": [float("nan")]}, ValueError, "column_weights"),
        ({"column_weights": ["a"]}, TypeError, "column_weights"),
        ({"column_weights": torch.ones(2, 2)}, TypeError, "column_weights"),
        ({"knee": 0.0}, ValueError, "knee"),
        ({"knee": float("nan")}, ValueError, "knee"),
        ({"knee": "a"}, TypeError, "knee"),
    ],
    ids=repr,
)
def test_an_argument_out_of_range_is_refused_and_named(options, error, name, as_users_run_it):
    with pytest.raises(error, match=f"`{name}` must"):
        SIM(**options)


def test_a_wrong_number_of_weights_is_refused_with_the_right_one(teacher):
    with pytest.raises(ValueError, match=r"7 states and 5 inputs, 12 in all; got 3"):
        SIM(column_weights=[1.0, 1.0, 1.0]).fit(teacher, [U])
