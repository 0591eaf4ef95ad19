"""A derivative runs a function again, long after the solve: it must be the function of the solve.

Between the two a loop binds its variables anew, a module gets another input, functional_call takes its parameters back.
The oracle is a backward at once, or finite differences.
"""

import functools
import types

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from idl import ImplicitAdjoint, ImplicitModel, ImplicitRNN, PhantomAdjoint, Picard, UnrolledAdjoint, fixed_point

TIGHT = {
    "solver": Picard(atol=1e-13, max_steps=2000),
    "adjoint": ImplicitAdjoint(Picard(atol=0.0, rtol=1e-13, max_steps=2000)),
}
ADJOINTS = pytest.mark.parametrize("adjoint", [TIGHT["adjoint"], UnrolledAdjoint(200), PhantomAdjoint(200)], ids=repr)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(4, 4).double()


def gradients(module, losses):
    """Return the gradients of a backward of the sum of all losses, and of one backward after each."""
    module.zero_grad()
    sum(losses()).backward()
    together = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    for loss in losses():
        loss.backward()
    return together, [p.grad for p in module.parameters()]


def agree(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@ADJOINTS
def test_a_loop_may_bind_the_variables_of_a_closure_anew(layer, adjoint):
    def losses():
        for scale in (0.1, 0.3):
            u = drawn(3, 4) * scale

            def f(x):
                return torch.tanh(scale * layer(x) + u)  # noqa: B023 - which is what is tested

            yield fixed_point(f, torch.zeros_like(u), **TIGHT | {"adjoint": adjoint}).x.square().sum()

    agree(*gradients(layer, losses))


def test_a_loop_may_bind_global_names_anew(layer):
    namespace = {"torch": torch, "layer": layer, "v": None}
    exec("def f(x):\n    return (lambda: torch.tanh(.3 * layer(x) + v))()", namespace)  # a script's names are global

    def losses():
        for namespace["v"] in (drawn(3, 4), 2 * drawn(3, 4)):
            yield fixed_point(namespace["f"], torch.zeros(3, 4).double(), **TIGHT).x.square().sum()

    agree(*gradients(layer, losses))


def test_a_variable_may_be_deleted(layer):
    namespace = {"torch": torch, "layer": layer, "v": drawn(3, 4)}
    exec("def f(x):\n    return torch.tanh(.3 * layer(x) + v)", namespace)

    def losses():
        x = fixed_point(namespace["f"], torch.zeros(3, 4).double(), **TIGHT).x
        yield x.square().sum()

    (kept,) = losses()
    kept.backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    (loss,) = losses()
    del namespace["v"]
    loss.backward()
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=0)
    assert "v" not in namespace


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_module_may_get_another_input_before_the_backward(wrapped):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.held = nn.Linear(4, 4), {}

        def f(self, x, scale):
            return torch.tanh(scale * self.layer(x) + self.u + self.held["u"] + self.inner.u)

        def forward(self, u):
            self.u, self.held["u"], self.inner = 0.5 * u, 0.3 * u, types.SimpleNamespace(u=0.2 * u)
            f = functools.partial(self.f, scale=0.3) if wrapped else lambda x: self.f(x, 0.3)
            return fixed_point(f, torch.zeros_like(u), **TIGHT).x

    torch.manual_seed(0)
    net = Stateful().double()
    found, expected = [drawn(3, 4, seed=s).requires_grad_() for s in (1, 2)], []
    sum(net(u).sum() for u in found).backward()
    for u in found:
        alone = u.detach().clone().requires_grad_()
        net(alone).sum().backward()
        expected.append(alone.grad)
    last = net.u
    agree([u.grad for u in found], expected)
    assert net.u is last and net.held["u"] is not last


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, u):
        return fixed_point(lambda x: torch.tanh(0.3 * self.layer(x) + u), torch.zeros_like(u), **TIGHT).x


def model():
    return ImplicitModel(6, 4, 3, activation=nn.PReLU(), tol=1e-13, grad_tol=1e-13, mitr=2000, grad_mitr=2000)


def recurrent():
    return ImplicitRNN(4, 2, 5, 6, activation=nn.PReLU(), tol=1e-13, grad_tol=1e-13, mitr=2000, grad_mitr=2000)


@pytest.mark.parametrize("make", [Net, model, recurrent])
def test_parameters_that_functional_call_puts_in_get_their_gradient(make):
    torch.manual_seed(0)
    net, u = make().double(), drawn(3, 7, 4) if make is recurrent else drawn(3, 4)
    names = [name for name, _ in net.named_parameters()]
    others = {name: (0.9 * p).detach().clone() for name, p in net.named_parameters()}  # not the module's own

    def loss(parameters, u):
        return functional_call(net, parameters, (u,)).square().sum()

    found = grad(loss)(others, u)
    leaves = {name: value.clone().requires_grad_() for name, value in others.items()}
    loss(leaves, u).backward()
    assert all(p.grad is None for p in net.parameters())
    twin = make().double()
    twin.load_state_dict(others)
    twin(u).square().sum().backward()
    expected = [dict(twin.named_parameters())[name].grad for name in names]
    agree([found[name] for name in names], expected)
    agree([leaves[name].grad for name in names], expected)
    if make is Net:
        each = vmap(grad(loss), (None, 0))(others, u)
        agree([each[name].sum(0) for name in names], expected)


def test_second_derivatives_are_those_of_the_function_of_the_solve(layer):
    def curvature(v):
        x = fixed_point(lambda x: torch.tanh(0.3 * layer(x) + v), torch.zeros_like(v), **TIGHT).x
        (slope,) = torch.autograd.grad(x.square().sum(), layer.weight, create_graph=True)
        return slope.square().sum()

    agree(*gradients(layer, lambda: [curvature(v) for v in (drawn(3, 4), 2 * drawn(3, 4))]))


def test_a_function_may_count_its_calls(layer):
    calls = 0

    def f(x):
        nonlocal calls
        calls += 1
        return torch.tanh(0.3 * layer(x))

    x = fixed_point(f, torch.ones(3, 4).double(), solver=Picard(atol=0.0, max_steps=7), on_failure="ignore").x
    before = calls
    assert before >= 7
    x.sum().backward()
    assert calls > before


@pytest.mark.parametrize("kind", ["BatchNorm", "spectral_norm"])
def test_buffers_that_change_are_refused_and_fixed_ones_are_right(kind):
    torch.manual_seed(0)
    part = nn.Linear(4, 4).double()
    part = (
        nn.utils.parametrizations.spectral_norm(part)
        if kind == "spectral_norm"
        else nn.Sequential(part, nn.BatchNorm1d(4))
    )
    part, u = part.double(), drawn(3, 4)

    def solved():
        return fixed_point(lambda x: torch.tanh(0.3 * part(x) + u), torch.zeros_like(u), **TIGHT).x.sum()

    with pytest.raises(ValueError, match=r"must not change what it reads, as BatchNorm .* Call f\.eval\(\)"):
        solved()
    part.eval()
    solved().backward()
    weight = next(p for p in part.parameters() if p.dim() == 2)
    step = torch.zeros_like(weight)
    step[0, 0] = 1e-6
    with torch.no_grad():
        weight += step
        above = solved()
        weight -= 2 * step
        torch.testing.assert_close(weight.grad[0, 0], (above - solved()) / 2e-6, rtol=1e-5, atol=1e-8)
