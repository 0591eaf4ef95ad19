"""Forward mode nested in forward mode, and torch's native dual numbers, on every system."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp

from idl import Adaptive, IDLHead, ImplicitAdjoint, ImplicitModel, ImplicitRNN, fixed_point

TIGHT = {"tol": 1e-13, "grad_tol": 1e-13}


A = 0.2 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def general(u):
    adjoint = ImplicitAdjoint(Adaptive(0.0, 1e-13))
    solver = Adaptive(1e-13)
    return fixed_point(lambda x, u: torch.tanh(x @ A + u), torch.zeros_like(u), u, solver=solver, adjoint=adjoint).x


SYSTEMS = {
    "model": lambda: ImplicitModel(5, 6, 2, activation="tanh", **TIGHT),
    "low rank": lambda: ImplicitModel(5, 6, 2, activation="tanh", low_rank=True, rank=2, **TIGHT),
    "sequence": lambda: ImplicitRNN(6, 2, 3, 4, activation="tanh", **TIGHT),
    "sequence, together": lambda: ImplicitRNN(6, 2, 3, 4, activation="tanh", parallel_in_time=True, **TIGHT),
    "softmax": lambda: IDLHead(3, 6, 6, 200, "softmax", **TIGHT),
    "lipschitz": lambda: IDLHead(3, 6, 6, 200, "lipschitz", **TIGHT),
    "general": lambda: general,
}


@pytest.fixture(params=SYSTEMS.values(), ids=SYSTEMS.keys())
def system(request):
    torch.manual_seed(0)
    system = request.param()
    return system.double() if isinstance(system, torch.nn.Module) else system


def inputs(system):
    shape = (2, 6) if isinstance(system, ImplicitModel) else (1, 3, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_every_nesting_of_modes_gives_the_hessian(system):
    u = inputs(system)

    def loss(u):
        return system(u).square().sum()

    expected = jacrev(jacrev(loss))(u)
    for nested in (jacfwd(jacfwd(loss)), hessian(loss), jacrev(jacfwd(loss))):
        torch.testing.assert_close(nested(u), expected, rtol=1e-8, atol=1e-10)


def test_a_third_derivative_by_forward_mode_is_that_of_finite_differences(system):
    u = inputs(system)
    v = torch.ones_like(u)

    def first(u):
        return jvp(lambda u: system(u).square().sum(), (u,), (v,))[1]

    def second(u):
        return jvp(first, (u,), (v,))[1]

    step = 1e-4  # error of the difference: 1e-8 times the fifth derivative
    difference = (second(u + step * v) - second(u - step * v)) / (2 * step)
    torch.testing.assert_close(jvp(second, (u,), (v,))[1], difference, rtol=1e-4, atol=1e-6)


def test_native_dual_numbers_have_the_tangent_of_jvp(system):
    u = inputs(system)
    v = torch.ones_like(u)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(system(forward_ad.make_dual(u, v))).tangent
    torch.testing.assert_close(tangent, jvp(system, (u,), (v,))[1], rtol=0, atol=1e-11)
