"""Substitution is exact: the state is an equilibrium to the last bit wherever the arithmetic is."""

import pytest
import torch

from idl import Adaptive, BackSubstitution, ImplicitFunction, ImplicitFunctionTriu, StrictlyTriangular, equilibrium
from idl.linalg.operators import StrictlyLower, StrictlyUpper

SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 40]  # both sides of blocks of 16


def integers(*shape, low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).double()


def upper(n):
    return StrictlyUpper(integers(n, n, low=-1, high=1, seed=n).triu(1))


def lower(n):
    return StrictlyLower(integers(n, n, low=-1, high=1, seed=n).tril(-1))


@pytest.mark.parametrize("phi", ["relu", "identity"])
@pytest.mark.parametrize("triangle", [upper, lower])
@pytest.mark.parametrize("n", SIZES)
def test_the_state_is_the_equilibrium_bit_by_bit(n, triangle, phi):
    # Integers below 2^53 are exact in float64 in whatever order they are added.
    A, u = triangle(n), integers(6, n, low=-5, high=5, seed=100 + n)
    solution = equilibrium(A, torch.eye(n, dtype=torch.float64), u, phi=phi, solver=BackSubstitution())
    z = solution.x @ A.matrix.T + u
    assert float(solution.x.abs().max()) < 2**53
    assert torch.equal(solution.x, torch.relu(z) if phi == "relu" else z)
    assert torch.equal(solution.residual, torch.zeros(6, dtype=torch.float64))
    assert bool(solution.converged.all())


def unit_by_unit(A, z, phi):
    x = torch.zeros_like(z)
    for i in reversed(range(z.shape[1])):
        x[:, i] = phi(z[:, i] + x[:, i + 1 :] @ A[i, i + 1 :])
    return x


@pytest.mark.parametrize("phi", [torch.relu, torch.tanh, torch.sigmoid], ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", SIZES)
def test_the_state_is_what_the_units_give_one_after_the_other(n, phi):
    generator = torch.Generator().manual_seed(n)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64).triu(1) / n**0.5
    u = torch.randn(5, n, generator=generator, dtype=torch.float64)
    solution = equilibrium(
        StrictlyUpper(A), torch.eye(n, dtype=torch.float64), u, phi=phi.__name__, solver=BackSubstitution()
    )
    torch.testing.assert_close(solution.x, unit_by_unit(A, u, phi), rtol=1e-12, atol=1e-12)


def test_a_large_triangle_costs_no_tolerance():
    # Row sums far above 1: no iteration in a norm would be trusted here, and none is needed.
    n = 40
    A = 3 * torch.ones(n, n, dtype=torch.float64).triu(1)
    u = torch.ones(1, n, dtype=torch.float64)
    x = ImplicitFunctionTriu()(A, torch.eye(n, dtype=torch.float64), u)
    torch.testing.assert_close(x[0], 4.0 ** torch.arange(n - 1, -1, -1, dtype=torch.float64), rtol=1e-12, atol=0)


def test_it_takes_the_steps_of_one_application():
    A, u = upper(20), torch.ones(3, 20, dtype=torch.float64)
    solution = equilibrium(A, torch.eye(20, dtype=torch.float64), u, solver=BackSubstitution())
    assert torch.equal(solution.steps, torch.ones(3, dtype=torch.int64))


def test_a_full_matrix_is_refused_with_advice():
    with pytest.raises(TypeError, match=r"needs a strictly triangular state matrix.* use ImplicitFunctionTriu"):
        equilibrium(torch.zeros(3, 3), torch.eye(3), torch.ones(1, 3), solver=BackSubstitution())


def test_an_activation_that_is_known_by_its_values_only_is_substituted_as_well():
    A = StrictlyUpper(torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]))
    x = equilibrium(A, torch.eye(3), torch.ones(1, 3), phi=torch.sin, solver=BackSubstitution()).x
    torch.testing.assert_close(x, torch.sin(x @ A.matrix.T + 1), rtol=0, atol=0)


def test_an_iteration_finds_the_same_state():
    n = 20
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    B, u = torch.eye(n, dtype=torch.float64), torch.ones(2, n, dtype=torch.float64)
    iterated = ImplicitFunction(constraint=StrictlyTriangular(), solver=Adaptive(atol=1e-12, rtol=1e-12))(A, B, u)
    torch.testing.assert_close(iterated, ImplicitFunctionTriu()(A, B, u), rtol=1e-9, atol=1e-9)
