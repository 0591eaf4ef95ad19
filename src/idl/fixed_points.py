"""Where map, solver and adjoint meet: the fixed point of any function or module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from idl.differentiation.base import AbstractAdjoint, FailureReport, OnFailure, check_methods
from idl.differentiation.implicit import ImplicitAdjoint
from idl.maps.binding import pinned
from idl.maps.closure import captured_tensors, with_captured
from idl.maps.general import GeneralMap
from idl.maps.layout import StateLayout
from idl.solvers.adaptive import Adaptive
from idl.solvers.base import AbstractFixedPointSolver, Solution
from idl.transforms import eagerly, transforms_are_active

_SOLVER = Adaptive()
_ADJOINT = ImplicitAdjoint()
_GENERAL_ADVICE = (
    "The map may not contract. Raise max_steps, loosen atol, average with Picard(damping=0.5), or try "
    "Anderson() or Newton()."
)


def fixed_point(
    f: Callable[..., Any],
    x0: Any,
    *params: Any,
    solver: AbstractFixedPointSolver = _SOLVER,
    adjoint: AbstractAdjoint = _ADJOINT,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""Solve :math:`x = f(x, \theta)` for any function or module ``f``, with gradients to all that ``f`` reads.

    Gradients flow to tensors in ``params`` and to those that ``f`` holds: parameters of a module, tensors of an
    outer scope. A later derivative reads them as they are now, whatever a loop has bound its variables to by then.
    ``f`` must be deterministic, and the fixed point is found where ``f`` contracts or nearly does.

    Where every tensor of the state has two dimensions or more and the same first size, that dimension counts the
    samples, each with its own residual; otherwise the state is one sample. Samples that are seen to depend on each
    other, as the nodes of a graph do, are solved as one: their residual, steps and convergence are the same numbers.

    Args:
        f: Called as ``f(x, *params)``; returns a state of the structure and shapes of ``x``.
        x0: Start: a floating-point tensor, or any nest of lists, tuples and dicts of such; no gradient.
        params: Further arguments of ``f``, any nests of tensors and other values.
        solver: Method that finds the fixed point.
        adjoint: Rule that gives the gradients.
        on_failure: What to do if some sample has not converged after ``solver.max_steps``.

    Returns:
        The solution; ``x`` has the structure of ``x0``.

    Raises:
        TypeError, ValueError: If ``f`` cannot be called, returns another structure, shape or dtype, or changes what it
            reads, or if ``x0`` holds no floating-point tensors of one dtype and device.
        ConvergenceError: If a sample did not converge and ``on_failure="raise"``.

    Example:
        >>> fixed_point(torch.cos, torch.tensor(1.0)).x
        tensor(0.7391)
    """
    check_methods(solver, adjoint)
    if isinstance(f, type) or not callable(f):
        raise TypeError(f"`f` must be a function or a module, called as f(x, *params); got {f!r}.")
    return eagerly(_fixed_point, f, x0, params, solver, adjoint, on_failure)


def _fixed_point(
    f: Callable[..., Any],
    x0: Any,
    params: tuple[Any, ...],
    solver: AbstractFixedPointSolver,
    adjoint: AbstractAdjoint,
    on_failure: OnFailure,
) -> Solution:
    report = FailureReport(on_failure, lambda: _GENERAL_ADVICE)
    layout = StateLayout(x0)
    leaves, structure = pytree.tree_flatten(params)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    start = pytree.tree_map(Tensor.clone, x0)
    captured, image = captured_tensors(f, (start, *params))
    layout.check(image)
    if any(leaf._version for leaf in pytree.tree_leaves(start) if not leaf.is_inference()):
        raise ValueError("`f` must not change its argument in place; write x * 0.5 instead of x.mul_(0.5).")
    if layout.batched and not transforms_are_active() and _rows_couple(f, x0, params, image):
        layout = layout.as_one_row()
    tensors = [leaves[i] for i in places]
    versions = [_version(tensor) for tensor in captured]
    as_it_is = pinned(f, captured)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        arguments = list(leaves)
        for i, value in zip(places, values, strict=False):
            arguments[i] = value
        pure = with_captured(as_it_is, captured, values[len(places) :])
        return layout.pack(pure(layout.unpack(x), *pytree.tree_unflatten(arguments, structure)))

    parametric, parameters = GeneralMap(function), (*tensors, *captured)
    # The run that found what f reads is the first step.
    first = layout.pack(image).detach()
    x, steps, converged = adjoint.fixed_point(parametric, solver, first, parameters, report)
    if x.requires_grad and versions != [_version(tensor) for tensor in captured]:
        raise ValueError(
            "`f` must not change what it reads, as BatchNorm and spectral_norm change their buffers in training. "
            "Call f.eval(), or .eval() of that part of it."
        )
    residual = parametric.residual(parameters, x)
    residual, steps, converged = (layout.a_number_each(part) for part in (residual, steps, converged))
    return Solution(layout.unpack(x), residual, steps, converged)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _rows_couple(f: Callable[..., Any], x0: Any, params: tuple[Any, ...], image: Any) -> bool:
    """Return whether some row of ``f(x0)`` is seen to depend on another row of ``x0``.

    One evaluation, at a point where a random half of the rows is moved: the others must not notice.
    """
    rows = len(pytree.tree_leaves(x0)[0])
    if rows < 2:
        return False
    generator = torch.Generator().manual_seed(0)
    moved = torch.rand(rows, generator=generator).argsort() < rows // 2

    def push(leaf: Tensor) -> Tensor:
        away = torch.randn(leaf.shape, generator=generator, dtype=torch.float32).to(leaf)
        return torch.where(moved.to(leaf.device).reshape(-1, *[1] * (leaf.dim() - 1)), leaf + away, leaf).detach()

    with torch.no_grad():
        pushed = f(pytree.tree_map(push, x0), *params)
    pairs = zip(pytree.tree_leaves(pushed), pytree.tree_leaves(image), strict=True)
    return any(not torch.allclose(a[~moved], b[~moved], rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs)
