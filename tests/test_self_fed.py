"""Units that feed themselves: solved for their own part first, with the same equilibrium and the same gradients."""

import pytest
import torch

from idl import Adaptive, Anderson, ImplicitAdjoint, ImplicitFunction, Newton, Picard, activations
from idl.linalg.operators import Dense
from idl.maps.affine import AffineMap, SlopedMap

SOLVERS = [Picard, Anderson, Newton, Adaptive]


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def self_fed(own, n=6, seed=0):
    """Return ``A`` with the largest diagonal entry ``own``, others of both signs, and row sums of at most .99."""
    A = drawn(n, n, seed=seed)
    A.fill_diagonal_(0)
    A *= (0.99 - own) / A.abs().sum(1, keepdim=True)
    return A + torch.diag(own * torch.linspace(-0.5, 1, n, dtype=torch.float64))


def function(solver, activation="relu"):
    adjoint = ImplicitAdjoint(solver(0.0, 1e-13, 5000))
    return ImplicitFunction(activation=activation, solver=solver(1e-13, 0.0, 5000), adjoint=adjoint)


def unrolled(A, B, u, phi, steps=4000):
    x = torch.zeros(len(u), len(A), dtype=A.dtype)
    for _ in range(steps):
        x = phi(x @ A.T + u @ B.T)
    return x


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("own", [0.49, 0.51, 0.95])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_equilibrium_and_its_gradients_are_those_of_the_unrolled_loop(solver, own, activation):
    tensors = [t.requires_grad_() for t in (self_fed(own), drawn(6, 3, seed=1), drawn(5, 3, seed=2))]
    weights = drawn(5, 6, seed=3)
    x = function(solver, activation)(*tensors)
    expected = unrolled(*tensors, getattr(torch, activation, torch.nn.functional.leaky_relu))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)
    found = torch.autograd.grad((x * weights).sum(), tensors)
    for actual, wanted in zip(found, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("own", [0.49, 0.51, 0.95])
def test_second_derivatives_and_forward_mode_agree_with_finite_differences(own):
    A, B, u = self_fed(own), drawn(6, 3, seed=1), drawn(2, 3, seed=4)
    f = function(Adaptive)
    tensors = [t.requires_grad_() for t in (A, B, u)]
    assert torch.autograd.gradgradcheck(f, tensors, atol=1e-4)
    _, moved = torch.func.jvp(lambda A: f(A, B.detach(), u.detach()), (A.detach(),), (torch.ones_like(A),))
    step = 1e-6
    ahead, behind = (f(A.detach() + s * step, B.detach(), u.detach()) for s in (1, -1))
    torch.testing.assert_close(moved, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)


def test_a_stiff_self_fed_equilibrium_costs_the_steps_of_what_is_not_self_fed():
    A, u = torch.tensor([[0.98, 0.005], [0.005, 0.98]], dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    eased = ImplicitFunction(solver=Picard(1e-9, 0.0, 5000)).solution(A, eye, u)
    swapped = ImplicitFunction(solver=Picard(1e-9, 0.0, 5000)).solution(A.roll(1, 0), eye, u)
    torch.testing.assert_close(eased.x, swapped.x, rtol=0, atol=1e-7)  # 1 / (1 - .985) in every unit
    # Errors shrink by .25 a step instead of .985.
    assert 20 * int(eased.steps.max()) < int(swapped.steps.max())


def test_the_residual_is_that_of_the_map_as_given():
    A, B, u = self_fed(0.95), drawn(6, 3, seed=1), drawn(5, 3, seed=2)
    solution = ImplicitFunction(solver=Picard(1e-2, 0.0, 5000)).solution(A, B, u)
    residual = (torch.relu(solution.x @ A.T + u @ B.T) - solution.x).abs().amax(1)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("own", [1.0, 1.5])
def test_a_unit_that_feeds_itself_without_bound_is_reported(own):
    A = torch.eye(3, dtype=torch.float64) * own
    u = torch.ones(2, 3, dtype=torch.float64)
    solution = ImplicitFunction(on_failure="ignore").solution(A, torch.eye(3, dtype=torch.float64), u)
    assert not bool(solution.converged.any())


def test_a_sample_that_is_not_finite_leaves_the_others_right():
    A, B, u = self_fed(0.95), drawn(6, 3, seed=1), drawn(5, 3, seed=2)
    exact = unrolled(A, B, u, torch.relu)
    u[2, 0] = -torch.inf
    f = function(Adaptive)
    f.on_failure = "ignore"
    x = f(A, B, u)
    assert bool(x[2].isnan().all())
    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(x[others], exact[others], rtol=0, atol=1e-10)


@pytest.mark.parametrize("own", [0.51, 0.95])
@pytest.mark.parametrize("order", ["relu", "max norm", "1-norm"])
def test_an_error_is_within_its_factor_times_the_last_step(order, own):
    ratios = []
    for seed in range(10):
        A, source = self_fed(own, seed=seed), drawn(4, 6, seed=seed + 1)
        if seed % 2:  # every unit alike
            A = own * torch.eye(6, dtype=torch.float64) + (0.99 - own) * (1 - torch.eye(6, dtype=torch.float64)) / 5
        slope = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slope[:2] = 1
        if order == "relu":
            problem = AffineMap(Dense, activations.relu).at((source, A))
        else:
            matrix, norm = (A, torch.inf) if order == "max norm" else (A.T, 1.0)
            problem = SlopedMap(Dense, order=norm).at((slope, source, matrix))
        eased = problem.eased()
        assert eased is not problem
        truth = point = eased.start(None)
        step = drawn(4, 6, seed=seed + 2)
        step = -step.abs() if seed % 2 else step
        for _ in range(2000):
            truth, point = eased(truth), eased(point) - step
        ratio = eased.distance(eased(point), truth) / eased.distance(eased(point), point)
        assert float(ratio.max()) <= eased.error_factor * (1 + 1e-9)
        ratios.append(float(ratio.max()) / eased.error_factor)
    assert max(ratios) > 0.5  # the bound is one that errors come near


@pytest.mark.parametrize("solver", [Newton, Adaptive])
@pytest.mark.parametrize(("row_sum", "own", "size", "atol"), [(0.9999, 0.99, 100.0, 3e-6), (0.999, 0.999, 1.0, 1e-9)])
def test_large_states_converge_in_float64_where_some_units_feed_themselves(row_sum, own, size, atol, solver):
    n, generator = 60, torch.Generator().manual_seed(2)
    part = own * torch.rand(n, generator=generator, dtype=torch.float64)
    part[0], part[1] = 0, own
    others = torch.rand(n, n, generator=generator, dtype=torch.float64).fill_diagonal_(0)
    A = row_sum * (torch.diag(part) + (1 - part)[:, None] * others / others.sum(1, keepdim=True))
    eye, u = torch.eye(n, dtype=torch.float64), size * torch.rand(4, n, generator=generator, dtype=torch.float64)
    found = ImplicitFunction(solver=solver(atol), on_failure="raise").solution(A, eye, u)
    torch.testing.assert_close(found.x, torch.linalg.solve(eye - A, u.T).T, rtol=0, atol=atol)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_tolerance_of_a_gradient_is_relative_to_the_gradient_that_arrives(solver):
    n = 20
    part = torch.zeros(n, dtype=torch.float64)
    part[0] = 0.99
    others = torch.rand(n, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    A = 0.99 * (torch.diag(part) + (1 - part)[:, None] * others / others.sum(1, keepdim=True))
    u, g = torch.ones(1, n, dtype=torch.float64).requires_grad_(), torch.eye(n, dtype=torch.float64)[:1]
    eye, adjoint = torch.eye(n, dtype=torch.float64), ImplicitAdjoint(solver(0.0, 1e-4, 5000))
    ImplicitFunction(solver=Newton(1e-10), adjoint=adjoint)(A, eye, u).backward(g)
    expected = torch.linalg.solve((eye - A).T, g.T).T
    assert float((u.grad - expected).abs().sum()) <= 1e-4 * float(g.abs().sum())


def test_no_samples_have_a_gradient_of_nothing():
    A, u = 0.6 * torch.eye(3), torch.zeros(0, 3, requires_grad=True)
    ImplicitFunction()(A, torch.eye(3), u).sum().backward()
    assert u.grad.shape == (0, 3)
