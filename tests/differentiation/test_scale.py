"""Gradients in float32 with the default tolerances: their direction does not know the scale of the loss."""

import pytest
import torch

import oracles
from idl import Adaptive, Anderson, ImplicitAdjoint, Newton, Picard, UnrolledAdjoint, equilibrium, fixed_point
from problems import random
from tolerances import DIRECTION, FLOAT32

SCALES = [1e-8, 1.0, 1e8]
ADJOINTS = [
    *(ImplicitAdjoint(solver(atol=0.0, rtol=3e-6)) for solver in (Picard, Anderson, Newton, Adaptive)),
    ImplicitAdjoint(Picard(atol=0.0, rtol=3e-6, damping=0.7)),
    ImplicitAdjoint(),
    UnrolledAdjoint(100),
]


def affine(A, B, u, adjoint):
    return equilibrium(A, B, u, phi="tanh", adjoint=adjoint).x


def callable_activation(A, B, u, adjoint):
    return equilibrium(A, B, u, phi=torch.tanh, adjoint=adjoint).x


def general(A, B, u, adjoint):
    return fixed_point(lambda x: torch.tanh(x @ A.T + u @ B.T), torch.zeros(len(u), len(A)), adjoint=adjoint).x


def plain(phi):
    return lambda x, A, B, u: oracles.PHI[phi](x @ A.T + u @ B.T)


def directions(gradients):
    return torch.cat([g.double().flatten() / g.double().norm() for g in gradients])


def assert_same_direction(function, tensors, truth, cotangent, scale):
    leaves = [t.float().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad((scale * cotangent.float() * function(*leaves)).sum(), leaves)
    assert (directions(gradients) - directions(truth)).norm() < DIRECTION
    sizes = [float(g.double().norm() / (scale * t.norm())) for g, t in zip(gradients, truth, strict=True)]
    assert sizes == pytest.approx([1.0] * len(sizes), rel=FLOAT32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("function", [affine, callable_activation, general])
def test_direction_does_not_depend_on_the_scale_of_the_loss(function, adjoint, scale):
    A = random(12, 12, seed=0)
    A = (0.8 * A / A.abs().sum(1, keepdim=True)).float().double()
    B, u, cotangent = (random(*shape, seed=s).float().double() for s, shape in enumerate([(12, 5), (6, 5), (6, 12)]))
    f = plain("tanh")
    x = oracles.unrolled(f, torch.zeros(6, 12, dtype=torch.float64), A, B, u, steps=200)
    truth = oracles.implicit_gradient(f, x, (A, B, u), cotangent)
    assert_same_direction(lambda *t: function(*t, adjoint), (A, B, u), truth, cotangent, scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), ImplicitAdjoint(Newton(atol=0.0, rtol=3e-6))], ids=repr)
@pytest.mark.parametrize("row_sum", [0.99, 0.999])
def test_direction_is_right_on_a_nearly_singular_positive_matrix(row_sum, adjoint, scale):
    A = random(30, 30, seed=0).abs()
    A = (row_sum * A / A.sum(1, keepdim=True)).float().double()
    B, u, cotangent = (random(*shape, seed=s).float().double() for s, shape in enumerate([(30, 5), (8, 5), (8, 30)], 1))
    z0 = u @ B.T
    x = oracles.stiff_equilibrium(A, z0)
    assert (x @ A.T + z0).abs().min() > 1e-3  # away from the kinks
    truth = oracles.implicit_gradient(plain("relu"), x, (A, B, u), cotangent)
    assert_same_direction(lambda *t: equilibrium(*t, adjoint=adjoint).x, (A, B, u), truth, cotangent, scale)
