"""Factors that bring a teacher below kappa, and that no prediction sees."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import oracles
from idl.activations import BY_NAME
from idl.sim import rescaling
from idl.sim.capture import Teacher
from problems import random
from sim.teachers import MLP, Nested, Residual, seeded

ROUNDING = 1e-12
"""Relative error of float64 sums of some ten terms."""

KAPPA = (0.3, 0.99)


def _scaled(net, by):
    """Enlarge the weights, so that row sums are far above kappa."""
    with torch.no_grad():
        for p in net.parameters():
            p *= by
    return net


def _with_dead_units():
    """Units that never fire, units whose pre-activation is always zero, and a unit that reads only such."""
    net = MLP(nn.ReLU())
    with torch.no_grad():
        net.first.bias[0] = -1e3
        net.first.weight[1:3] = net.first.bias[1:3] = 0
        net.second.weight[0] = net.second.weight[0] * torch.tensor([0.0, 1, 1, 0, 0])
        net.second.bias[0] = 0
    return net


TEACHERS = {
    "relu": lambda: MLP(nn.ReLU()),
    "leaky relu": lambda: MLP(nn.LeakyReLU()),
    "without biases": lambda: MLP(nn.ReLU(), bias=False),
    "large weights": lambda: _scaled(MLP(F.relu), 30),
    "small weights": lambda: _scaled(MLP(F.relu), 1e-3),
    "residual": Residual,
    "large residual": lambda: _scaled(Residual(), 30),
    "nested": Nested,
    "dead units": _with_dead_units,
}


class Rescaled:
    """A teacher's matrices, its states on some inputs, and the factors of one rule."""

    def __init__(self, name, rule, kappa):
        self.net, self.u, self.kappa = seeded(TEACHERS[name]), random(200, 6, seed=7), kappa
        self.teacher = Teacher(self.net, self.u)
        self.m = self.teacher.matrices()
        self.sizes = [layer.units for layer in self.teacher.layers[::-1]]
        self.energies = self.teacher.record(self.u).Z.square().mean(0)
        self.s = {
            "unit_variance": lambda: rescaling.unit_variance(self.m.A, self.sizes, self.energies, kappa),
            "layerwise": lambda: rescaling.layerwise(self.m.A, self.sizes, kappa),
            "closed_form": lambda: rescaling.closed_form(self.m.A, kappa),
        }[rule]()
        self.A = self.s[:, None] * self.m.A / self.s
        self.row_sums = self.A.abs().sum(1)

    def predictions(self):
        """What the rescaled implicit model predicts, by iterating its equation."""
        m, s, u = self.m, self.s, self.u
        phi = oracles.PHI[self.teacher.activation.name]
        x = oracles.unrolled(lambda x: phi(x @ self.A.T + (u @ m.B.T + m.b) * s), torch.zeros(200, len(s)).double())
        return x @ (m.C / s).T + u @ m.D.T + m.d


every_rule = pytest.mark.parametrize("rule", ["unit_variance", "layerwise", "closed_form"])
every_teacher = pytest.mark.parametrize("name", TEACHERS)


@every_rule
@every_teacher
@pytest.mark.parametrize("kappa", KAPPA)
def test_factors_are_positive_and_bring_every_row_sum_below_kappa(rule, name, kappa):
    case = Rescaled(name, rule, kappa)
    assert bool(torch.isfinite(case.s).all()) and bool((case.s > 0).all())
    assert float(case.row_sums.max()) <= kappa * (1 + ROUNDING)


@every_rule
@every_teacher
def test_the_rescaled_implicit_model_predicts_what_the_teacher_does(rule, name):
    case = Rescaled(name, rule, 0.5)
    with torch.no_grad():
        truth = case.net(case.u)
    torch.testing.assert_close(case.predictions(), truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()))
    if name == "large weights":
        assert float(case.m.A.abs().sum(1).max()) > 10  # where there was something to do
        assert float(case.s.min()) < 0.1


@every_teacher
@pytest.mark.parametrize("kappa", KAPPA)
def test_closed_form_leaves_row_sums_of_kappa_times_one_less_one_over_t(name, kappa):
    case = Rescaled(name, "closed_form", kappa)
    ones, t = torch.ones(len(case.s), dtype=torch.float64), 0.0
    for power in range(len(case.sizes)):  # (I - |A| / kappa)^-1 is a finite series
        t = t + torch.linalg.matrix_power(case.m.A.abs() / kappa, power) @ ones
    torch.testing.assert_close(case.s, 1 / t, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(case.row_sums, kappa * (1 - 1 / t), rtol=ROUNDING, atol=ROUNDING)


@every_teacher
@pytest.mark.parametrize("kappa", KAPPA)
def test_unit_variance_brings_every_pre_activation_to_mean_square_one_or_its_row_to_kappa(name, kappa):
    case = Rescaled(name, "unit_variance", kappa)
    size = case.s * case.energies.sqrt()
    at_the_bound = case.row_sums > kappa * (1 - 1e-9)
    always_zero = case.energies == 0
    assert bool((size <= 1 + 1e-9).all())
    assert bool(((size > 1 - 1e-9) | at_the_bound | always_zero).all())
    first = slice(len(case.s) - case.sizes[-1], None)  # the first layer has no row sum to care for
    assert bool(((size[first] > 1 - 1e-9) | always_zero[first]).all())
    assert int(always_zero.sum()) == (3 if name == "dead units" else 0)


@every_teacher
@pytest.mark.parametrize("kappa", KAPPA)
def test_layerwise_takes_one_factor_a_layer_and_no_more_than_is_needed(name, kappa):
    case = Rescaled(name, "layerwise", kappa)
    for s, sums in zip(case.s.split(case.sizes), case.row_sums.split(case.sizes), strict=True):
        assert len(s.unique()) == 1
        assert float(s[0]) <= 1
        assert float(s[0]) == 1 or float(sums.max()) == pytest.approx(kappa, rel=1e-9)


@every_rule
def test_a_teacher_without_anything_between_its_states_needs_no_row_sum(rule):
    zeros, energies = torch.zeros(3, 3, dtype=torch.float64), torch.tensor([4.0, 0.25, 0.0], dtype=torch.float64)
    s = {
        "unit_variance": lambda: rescaling.unit_variance(zeros, [2, 1], energies, 0.9),
        "layerwise": lambda: rescaling.layerwise(zeros, [2, 1], 0.9),
        "closed_form": lambda: rescaling.closed_form(zeros, 0.9),
    }[rule]()
    truth = [0.5, 2, 1] if rule == "unit_variance" else [1, 1, 1]
    torch.testing.assert_close(s, torch.tensor(truth, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "identity"])
def test_the_homogeneous_activations_are_those_that_may_be_rescaled(name):
    z = random(100, seed=0)
    homogeneous = torch.allclose(BY_NAME[name](3 * z), 3 * BY_NAME[name](z))
    assert homogeneous == (name in rescaling.HOMOGENEOUS)
