"""What the backward keeps: the equilibrium, and nothing of the way to it."""

import weakref

import pytest
import torch

from idl import Adaptive, Anderson, ImplicitAdjoint, Newton, Picard, UnrolledAdjoint, equilibrium, fixed_point
from problems import random

ROWS, N = 16, 32
SOLVERS = [Picard, lambda **options: Picard(damping=0.9, **options), Anderson, Newton, Adaptive]


def affine(A, u, **options):
    return equilibrium(A, torch.eye(N), u, phi="tanh", **options)


def callable_activation(A, u, **options):
    return equilibrium(A, torch.eye(N), u, phi=torch.tanh, **options)


def general(A, u, **options):
    return fixed_point(lambda x: torch.tanh(x @ A.T + u), torch.zeros(ROWS, N), **options)


def kept(function, row_sum, max_steps, **options):
    """Return the bytes of all storages that autograd saves in a forward, and the steps that were taken."""
    A = random(N, N, seed=0).float()
    A = (row_sum * A.abs() / A.abs().sum(1, keepdim=True)).requires_grad_()
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        u = random(ROWS, N, seed=1).float()
        solution = function(
            A, u, solver=options.pop("solver")(atol=0.0, max_steps=max_steps), on_failure="ignore", **options
        )
    torch.autograd.grad(solution.x.sum(), A)  # the graph is alive until here
    return sum(storage.nbytes() for storage in storages.values()), int(solution.steps.max())


@pytest.mark.parametrize("function", [affine, callable_activation, general])
@pytest.mark.parametrize("solver", SOLVERS, ids=["Picard", "damped Picard", "Anderson", "Newton", "Adaptive"])
def test_memory_does_not_grow_with_the_number_of_iterations(function, solver):
    few, few_steps = kept(function, 0.9, 5, solver=solver)
    many, many_steps = kept(function, 0.9, 40, solver=solver)
    assert many_steps > few_steps + 4  # the comparison means something
    assert many == few
    assert few <= 4 * (5 * ROWS * N + 3 * N * N)  # a few states and matrices, not a history


def test_memory_of_the_unrolled_gradient_does_grow():
    few, _ = kept(affine, 0.9, 5, solver=Picard, adjoint=UnrolledAdjoint(5))
    many, _ = kept(affine, 0.9, 5, solver=Picard, adjoint=UnrolledAdjoint(40))
    assert many > few + 30 * 4 * ROWS * N


def test_a_second_order_graph_does_not_grow_with_the_iterations_of_the_adjoint():
    # Only of affine maps: torch's own vjp, on which the others rest, does not support the hooks that count here.
    def size(max_steps):
        A = (0.9 * random(N, N, seed=0).abs() / N).float().requires_grad_()
        u = random(ROWS, N, seed=1).float()
        adjoint = ImplicitAdjoint(Picard(atol=0.0, max_steps=max_steps))
        x = affine(A, u, adjoint=adjoint, on_failure="ignore").x
        count = [0]

        def note(tensor):
            count[0] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            torch.autograd.grad(x.square().sum(), A, create_graph=True)
        return count[0]

    assert size(4) == size(60)


def test_a_solution_frees_its_graph_when_it_is_dropped():
    A = (0.5 * torch.eye(N)).requires_grad_()
    solution = affine(A, torch.ones(ROWS, N))
    node = weakref.ref(solution.x)
    del solution
    assert node() is None
