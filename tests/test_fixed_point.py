"""``fixed_point``: known answers, and gradients to everything that a function reads, wherever it keeps it."""

import inspect
import re

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import grad, vmap

import oracles
from idl import (
    Activation,
    Adaptive,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    ImplicitAdjoint,
    ImplicitFunction,
    ImplicitFunctionTriu,
    ImplicitModel,
    Newton,
    PhantomAdjoint,
    Picard,
    UnrolledAdjoint,
    equilibrium,
    fixed_point,
)
from problems import random
from tolerances import EPS, FINITE_DIFFERENCE, FLOAT32, FLOAT64, SOLVE

TIGHT = {"solver": Adaptive(atol=SOLVE, max_steps=1000), "adjoint": ImplicitAdjoint(Adaptive(0.0, SOLVE, 1000))}
BATCH, N = 3, 4


def small_linear(seed, inputs=N):
    """A layer in float64 with row sums of 0.5, so that it contracts under any activation of slope 1."""
    layer = nn.Linear(inputs, N).double()
    with torch.no_grad():
        weight = random(N, inputs, seed=seed)
        layer.weight.copy_(0.5 * weight / weight.abs().sum(1, keepdim=True))
        layer.bias.copy_(random(N, seed=seed + 1))
    return layer


def zeros():
    return torch.zeros(BATCH, N, dtype=torch.float64)


def assert_gradients_agree(f, plain, tensors):
    """Compare the gradients of ``fixed_point(f)`` with a dense solve on the map ``plain(x, *tensors)``."""
    x = fixed_point(f, zeros(), **TIGHT).x
    cotangent = random(BATCH, N, seed=9)
    truth = oracles.implicit_gradient(plain, oracles.unrolled(plain, zeros(), *tensors, steps=80), tensors, cotangent)
    for gradient, true in zip(torch.autograd.grad(x, tensors, cotangent), truth, strict=True):
        torch.testing.assert_close(gradient, true, rtol=FLOAT64, atol=FLOAT64)
        assert true.abs().max() > 1e-3


def test_the_fixed_point_of_cosine_is_the_number_of_dottie():
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    x = fixed_point(lambda x: torch.cos(theta * x), torch.tensor(0.5, dtype=torch.float64), **TIGHT).x
    assert float(x.detach()) == pytest.approx(0.7390851332151607, abs=1e-12)
    (slope,) = torch.autograd.grad(x, theta)  # x' = -x sin x / (1 + sin x) at theta = 1
    x = x.detach()
    s = torch.sin(x)
    assert float(slope) == pytest.approx(float(-x * s / (1 + s)), abs=1e-12)


@pytest.mark.parametrize("solver", [Picard, Anderson, Newton, Adaptive])
def test_the_square_root_is_the_fixed_point_of_herons_map(solver):
    a = torch.tensor([[2.0], [9.0]], dtype=torch.float64, requires_grad=True)
    x = fixed_point(lambda x: (x + a / x) / 2, torch.ones_like(a), solver=solver(atol=1e-12)).x
    torch.testing.assert_close(x, a.sqrt())
    (slope,) = torch.autograd.grad(x.sum(), a)
    torch.testing.assert_close(slope, 0.5 / a.sqrt())


def test_parameters_of_a_module_called_in_a_lambda_get_gradients():
    state, source = small_linear(0), small_linear(2, 2)
    u = random(BATCH, 2, seed=4).requires_grad_()

    def plain(x, A, a, B, b, u):
        return torch.tanh(x @ A.T + a + u @ B.T + b)

    assert_gradients_agree(
        lambda x: torch.tanh(state(x) + source(u)),
        plain,
        [state.weight, state.bias, source.weight, source.bias, u],
    )


def test_parameters_of_a_module_that_is_the_map_itself_get_gradients():
    layer = nn.Sequential(small_linear(0), nn.Tanh(), small_linear(2), nn.Softplus())

    def plain(x, A, a, B, b):
        return oracles.PHI["softplus"](torch.tanh(x @ A.T + a) @ B.T + b)

    assert_gradients_agree(layer, plain, list(layer.parameters()))


def test_tensors_of_an_outer_scope_get_gradients_also_through_their_history():
    leaf = random(N, N, seed=0).requires_grad_()
    bias = random(N, seed=1).requires_grad_()
    A = 0.5 * leaf / leaf.abs().sum(1, keepdim=True)

    def plain(x, leaf, bias):
        return torch.tanh(x @ (0.5 * leaf / leaf.abs().sum(1, keepdim=True)).T + bias)

    assert_gradients_agree(lambda x: torch.tanh(x @ A.T + bias), plain, [leaf, bias])


def test_a_tensor_that_is_read_twice_in_and_outside_the_parameters_gets_the_whole_gradient():
    layer = small_linear(0)
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = fixed_point(lambda x, scale: torch.tanh(scale * layer(x) + w), zeros(), w, **TIGHT).x

    def plain(x, w):
        return torch.tanh(w * (x @ layer.weight.T + layer.bias) + w)

    truth = oracles.implicit_gradient(plain, oracles.unrolled(plain, zeros(), w, steps=80), [w], torch.ones_like(x))
    torch.testing.assert_close(torch.autograd.grad(x.sum(), w), truth)


@pytest.mark.parametrize("weights", [1, N])
def test_the_weight_of_a_prelu_activation_gets_its_gradient(weights):
    prelu = nn.PReLU(weights).double()
    A, B, u = 0.1 * random(N, N, seed=0), random(N, 2, seed=1), random(BATCH, 2, seed=2)
    x = equilibrium(A, B, u, phi=prelu, **TIGHT).x

    def plain(x, weight):
        return oracles.PHI["prelu"](x @ A.T + u @ B.T, weight)

    tensors = [prelu.weight]
    truth = oracles.implicit_gradient(plain, oracles.unrolled(plain, zeros(), *tensors), tensors, torch.ones_like(x))
    torch.testing.assert_close(torch.autograd.grad(x.sum(), tensors), truth)


class LearnedTanh(ImplicitFunction):
    def __init__(self, weight, **options):
        self.weight = weight
        super().__init__(**options)

    def phi(self, z):
        return self.weight * torch.tanh(z)


class LearnedTanhWithSlope(LearnedTanh):
    def dphi(self, z):
        return self.weight * (1 - torch.tanh(z).square())


def _learned_activation(weight, **options):
    slope = LearnedTanhWithSlope(weight).dphi
    return ImplicitFunction(activation=Activation(LearnedTanh(weight).phi, slope), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda weight: LearnedTanh(weight, **TIGHT),
        lambda weight: LearnedTanhWithSlope(weight, **TIGHT),
        lambda weight: _learned_activation(weight, **TIGHT),
        lambda weight: ImplicitFunctionTriu(activation=lambda z: weight * torch.tanh(z)),
    ],
    ids=["own phi", "own phi and dphi", "Activation with a derivative", "callable on a triangle"],
)
def test_a_weight_inside_an_activation_gets_its_gradient(make):
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    A, B, u = (0.2 * random(N, N, seed=0)).triu(1), random(N, 2, seed=1), random(BATCH, 2, seed=2)

    def plain(x, weight):
        return weight * torch.tanh(x @ A.T + u @ B.T)

    x = make(weight)(A, B, u)
    truth = oracles.implicit_gradient(plain, oracles.unrolled(plain, zeros(), weight), [weight], torch.ones_like(x))
    torch.testing.assert_close(torch.autograd.grad(x.sum(), weight), truth)


def test_rows_that_depend_on_each_other_get_the_whole_gradient():
    layer = small_linear(0)

    def plain(x, weight, bias):
        z = x @ weight.T + bias + torch.arange(BATCH)[:, None]
        return torch.tanh(0.5 * z + 0.25 * z.flip(0) - 0.1 * z.mean(0))

    parameters = [layer.weight, layer.bias]
    assert_gradients_agree(lambda x: plain(x, *parameters), plain, parameters)


def test_nests_of_parameters_and_states_of_different_shapes_pass_gradcheck():
    def function(a, b):
        def f(state, p):
            x, (y, s) = state["x"], state["rest"]
            coupled = 0.2 * x + 0.1 * y.sum(1, keepdim=True)
            return {
                "x": torch.tanh(coupled + p["a"]),
                "rest": (0.3 * y + 0.1 * x[:, :1] * p["b"][0], 0.5 * torch.cos(s)),
            }

        start = {
            "x": torch.zeros(2, 3, dtype=torch.float64),
            "rest": (torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 1, 2, dtype=torch.float64)),
        }
        x = fixed_point(f, start, {"a": a, "b": [b, "not a tensor"]}, **TIGHT).x
        assert x["rest"][1].shape == (2, 1, 2)
        return x["x"], x["rest"][0]

    tensors = [random(2, 3, seed=0).requires_grad_(), random(2, seed=1).requires_grad_()]
    assert gradcheck(function, tensors, eps=EPS, atol=FINITE_DIFFERENCE, fast_mode=True)


@pytest.mark.parametrize("adjoint", [TIGHT["adjoint"], UnrolledAdjoint(60), PhantomAdjoint(60)], ids=repr)
def test_the_start_changes_neither_the_solution_nor_the_gradient_and_gets_none(adjoint):
    layer = small_linear(0)
    start = random(BATCH, N, seed=3).requires_grad_()
    results = []
    for x0 in (zeros(), start):
        x = fixed_point(lambda x: torch.tanh(layer(x)), x0, solver=TIGHT["solver"], adjoint=adjoint).x
        results.append([x, *torch.autograd.grad(x.square().sum(), list(layer.parameters()), retain_graph=True)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=FLOAT64, atol=FLOAT64)
    assert torch.autograd.grad(x.sum(), start, allow_unused=True) == (None,)


def test_a_start_for_each_mapped_index_is_allowed():
    layer = small_linear(0)
    starts = random(2, BATCH, N, seed=3)
    u = random(2, N, seed=4)

    def gradient(x0, u):
        return grad(lambda u: fixed_point(lambda x: torch.tanh(layer(x) + u), x0, **TIGHT).x.sum())(u)

    together = vmap(gradient)(starts, u)
    torch.testing.assert_close(together, torch.stack([gradient(s, w) for s, w in zip(starts, u, strict=True)]))


def test_a_step_of_an_optimiser_lowers_the_loss_of_a_module():
    torch.manual_seed(0)
    layer, target = small_linear(0).float(), torch.zeros(BATCH, N)
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    losses = []
    for _ in range(10):
        x = fixed_point(lambda x: torch.tanh(layer(x)), torch.zeros(BATCH, N)).x
        loss = (x - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_dropout_off_gives_the_gradient_of_the_plain_layer():
    layer = small_linear(0)
    dropped = nn.Sequential(layer, nn.Dropout(0.5)).eval()
    gradients = [
        torch.autograd.grad(fixed_point(f, zeros(), **TIGHT).x.sum(), list(layer.parameters()))
        for f in (layer, dropped)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_map_without_a_fixed_point_ends_and_is_reported():
    def f(x):
        return x + 1

    with pytest.warns(ConvergenceWarning, match="have not converged") as caught:
        solution = fixed_point(f, torch.zeros(2, 1), solver=Picard(max_steps=20))
    assert len(caught) == 1
    assert not solution.converged.any()
    with pytest.raises(ConvergenceError):
        fixed_point(f, torch.zeros(2, 1), solver=Picard(max_steps=20), on_failure="raise")


def test_autocast_reaches_the_products_of_the_map_and_gradients_stay_near():
    layer = small_linear(0).float()

    def gradients():
        x = fixed_point(lambda x: torch.tanh(layer(x)).to(x.dtype), torch.zeros(BATCH, N), solver=Picard(atol=1e-2)).x
        return [x, *torch.autograd.grad(x.sum(), list(layer.parameters()))]

    truth = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        values = gradients()
    for value, true in zip(values, truth, strict=True):
        torch.testing.assert_close(value, true, rtol=0.05, atol=0.05)


def test_float32_agrees_with_float64():
    layer = small_linear(0)
    results = []
    for dtype in (torch.float64, torch.float32):
        moved = nn.Linear(N, N, dtype=dtype)
        moved.load_state_dict(layer.state_dict())
        x = fixed_point(lambda x, f=moved: torch.tanh(f(x)), zeros().to(dtype)).x
        results.append([x, *torch.autograd.grad(x.square().sum(), list(moved.parameters()))])
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded.double(), exact, rtol=FLOAT32, atol=FLOAT32)


def graph(nodes=40, features=6, rate=0.95):
    generator = torch.Generator().manual_seed(0)
    G = (torch.rand(nodes, nodes, generator=generator) < 0.1).double()
    G = ((G + G.T) > 0).double()
    G /= torch.linalg.matrix_norm(G, 2)
    W = rate * torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]
    return G, W, torch.randn(nodes, features, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rate", [0.5, 0.95, 0.99])
def test_rows_that_depend_on_each_other_are_solved_as_one(rate):
    G, W, U = graph(rate=rate)
    system = torch.eye(G.shape[0] * W.shape[0], dtype=torch.float64) - torch.kron(G, W.T.contiguous())
    exact = torch.linalg.solve(system, U.flatten()).reshape(U.shape)
    W.requires_grad_()
    solution = fixed_point(lambda x: G @ x @ W + U, torch.zeros_like(U))
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == (40,)
    assert bool(solution.converged.all())
    assert len(solution.residual.unique()) == 1
    torch.testing.assert_close(solution.x.detach(), exact, rtol=0, atol=2e-5)
    (found,) = torch.autograd.grad(solution.x.square().sum(), W)
    adjoint = torch.linalg.solve(system.T, 2 * exact.flatten()).reshape(U.shape)
    torch.testing.assert_close(found, (G @ exact).T @ adjoint, rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_depend_on_each_other_have_numbers_of_their_own():
    U = torch.tensor([[0.1], [100.0]], dtype=torch.float64)
    solution = fixed_point(lambda x: 0.5 * torch.sin(x) + U, torch.zeros_like(U), solver=Picard(1e-6))
    assert len(solution.residual.unique()) == 2


def test_a_function_that_changes_its_argument_is_refused_and_the_start_is_as_it_was():
    x0 = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="in place"):
        fixed_point(lambda x: x.mul_(0.5).add_(1), x0)
    assert not bool(x0.any())


@pytest.mark.parametrize("solver", [Adaptive(), Newton(), Anderson()], ids=repr)
def test_a_function_without_a_fixed_point_is_not_called_solved(solver):
    solution = fixed_point(lambda x: x + 1, torch.ones(2, 3), solver=solver, on_failure="ignore")
    assert not bool(solution.converged.any())


@pytest.mark.parametrize("solver", [Adaptive(5e-4), Picard(5e-4)], ids=repr)
def test_rounding_inside_the_function_above_that_of_its_values_is_the_end_of_a_solve(solver):
    # Values below 10, computed beside 3000: steps of rounding are 2.4e-4, and the ratio of two of them says nothing.
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    A, u = (0.5 * Q).float(), torch.randn(8, 64, generator=generator)
    solution = fixed_point(lambda x: ((x @ A.T + u) + 3000) - 3000, torch.zeros_like(u), solver=solver)
    assert bool(solution.converged.all()) and int(solution.steps.max()) <= 60
    exact = torch.linalg.solve(torch.eye(64).double() - A.double(), u.double().T).T
    assert float((solution.x - exact).abs().max()) <= 5e-4


def test_a_slow_drift_below_the_tolerance_is_no_rounding():
    solution = fixed_point(lambda x: x + 1e-6, torch.zeros(2, 3).double(), solver=Picard(3e-6), on_failure="ignore")
    assert not bool(solution.converged.any())


@pytest.mark.parametrize(
    ("f", "kind", "words"),
    [
        (torch.nn.Tanh, TypeError, "`f` must be a function or a module"),
        ("cos", TypeError, "`f` must be a function or a module, called as f(x, *params); got 'cos'"),
        (lambda x: (x / 2).double(), TypeError, "`f` must return the dtype of x0, torch.float32; got torch.float64"),
        (lambda x: x.long(), TypeError, "`f` must return the dtype of x0, torch.float32; got torch.int64"),
    ],
)
def test_what_is_no_map_of_the_state_is_named(f, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        inspect.unwrap(fixed_point)(f, torch.ones(3, 2))


def test_an_adjoint_asks_for_a_solver_when_it_is_made():
    with pytest.raises(TypeError):
        ImplicitAdjoint(Newton)


def test_a_fixed_point_is_found_in_inference_mode():
    with torch.inference_mode():
        solution = fixed_point(torch.cos, torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(solution.x, torch.full_like(solution.x, 0.7390851332), rtol=0, atol=1e-5)


def test_a_warning_names_the_line_that_asked_for_the_solve():
    model = torch.nn.Sequential(ImplicitModel(20, 5, 2, mitr=2), torch.nn.Linear(2, 2))
    with pytest.warns(ConvergenceWarning) as caught:
        model(torch.ones(3, 5))
    assert [warning.filename for warning in caught] == [__file__]
    loss = ImplicitModel(20, 5, 2, grad_mitr=1, grad_tol=1e-12)(torch.ones(3, 5)).sum()
    with pytest.warns(ConvergenceWarning, match="adjoint") as caught:
        loss.backward()
    assert [warning.filename for warning in caught] == [__file__]
