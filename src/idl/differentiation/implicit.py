"""Gradients by the implicit function theorem: memory and cost do not depend on how the fixed point was found."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from idl import checks
from idl.differentiation.base import AbstractAdjoint, FailureReport
from idl.maps.base import Parameters, ParametricMap, front
from idl.solvers.adaptive import Adaptive
from idl.solvers.base import AbstractFixedPointSolver
from idl.solvers.iterate import iterate
from idl.transforms import outer_forward_mode, transforms_are_active


@dataclass(frozen=True)
class ImplicitAdjoint(AbstractAdjoint):
    r"""Differentiate :math:`x = f(x; \theta)` by the implicit function theorem.

    The backward solves :math:`\lambda = J^T \lambda + g`, forward mode :math:`\dot x = J\dot x + \dots`; each is a
    fixed point again, differentiated by the same rule, so that derivatives of any order exist in any mixture of modes
    (:func:`torch.func.vjp`, :func:`~torch.func.jvp`, :func:`~torch.vmap`). Only ``x`` is kept for the backward.

    Args:
        solver: Method of these linear solves. Its tolerance should be relative (``rtol``), so that a gradient's
            direction does not depend on the scale of the loss.

    Raises:
        TypeError: If ``solver`` is not a solver.

    Example:
        >>> from idl import fixed_point
        >>> w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> solution = fixed_point(lambda x: w * x + 1, torch.zeros_like(w), adjoint=ImplicitAdjoint())
        >>> solution.x.backward()  # x = 1 / (1 - w)
        >>> w.grad
        tensor(4.0000, dtype=torch.float64)
    """

    solver: AbstractFixedPointSolver = field(default_factory=lambda: Adaptive(atol=0.0, rtol=3e-6))

    def __post_init__(self) -> None:
        checks.instance("solver", self.solver, AbstractFixedPointSolver, "Try Adaptive(atol=0.0, rtol=3e-6).")

    def fixed_point(
        self,
        parametric: ParametricMap,
        solver: AbstractFixedPointSolver,
        x0: Tensor | None,
        parameters: Parameters,
        report: FailureReport,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fixed point with its implicit gradient; see :class:`AbstractAdjoint`."""
        call = _Call(parametric, solver, self.solver, report, "equilibrium")
        x0 = None if x0 is None else x0.detach()
        return _applied(call, x0, parameters)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without autocast: the precision of a solve is chosen, not cast operation by operation."""
    # Entering the context costs as much as a small product, so only where there is something to switch off.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def solve(
    parametric: ParametricMap,
    solver: AbstractFixedPointSolver,
    x0: Tensor | None,
    parameters: Parameters,
    report: FailureReport,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fixed point, steps and convergence of each row, all without a gradient."""
    call = _Call(parametric, solver, solver, report, "equilibrium")
    x0 = None if x0 is None else x0.detach()
    return _applied(call, x0, tuple(p.detach() for p in parameters))


@dataclass
class _Call:
    """All of a solve that is not a tensor."""

    parametric: ParametricMap
    solver: AbstractFixedPointSolver
    derivative_solver: AbstractFixedPointSolver
    report: FailureReport
    subject: str
    rate: float | None = None
    """Contraction to expect; after the solve that which was measured. It plans, and decides nothing."""
    contraction: float | None = None
    """Factor below 1 by which the map is proved to contract, once known; a derivative's does too, in its own norm."""
    ease: bool = True
    """Whether to look for a better form of the map; after the solve whether one was found."""

    def derivative(self, parametric: ParametricMap, subject: str) -> "_Call":
        """Return the call that solves for a derivative of this one: its map contracts as this one does at the end."""
        solver = self.derivative_solver
        return _Call(parametric, solver, solver, self.report, subject, self.rate, self.contraction, self.ease)


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, x0: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        problem = call.parametric.at(parameters)
        problem.known = problem.known if call.contraction is None else call.contraction
        eased = problem.eased() if call.ease else problem
        eased.rate, call.ease = call.rate, eased is not problem
        dtype = (parameters[0] if x0 is None else x0).dtype
        result = iterate(call.solver, eased, x0, dtype)
        call.rate = result.rate
        if problem.known is not None and problem.known < 1:  # slopes at the solution may prove what a bound did not
            call.contraction = problem.known
        call.report(result, call.solver, problem, call.subject)
        x = result.x
        if any(x is given for given in (x0, *parameters)):  # solved by itself; autograd wants outputs of their own
            x = x.view_as(x)
        return x, result.steps, result.converged

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
        call, _, *parameters = inputs
        x, steps, converged = output
        ctx.call = call
        ctx.mark_non_differentiable(steps, converged)
        ctx.save_for_backward(x, *parameters)
        ctx.save_for_forward(x, *parameters)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        parameters = tuple(rest)
        if g is None:
            return (None, None, *(None for _ in parameters))
        call: _Call = ctx.call
        with without_autocast(x.device):
            parametric, values, pullback = call.parametric.adjoint(x, parameters, g, ctx.needs_input_grad[2:])
            adjoint = call.derivative(parametric, "adjoint")
            # An ordinary backward is differentiated no further, and a node of autograd's costs as much as two products.
            if torch.is_grad_enabled() or transforms_are_active():
                v = _applied(adjoint, None, values)[0]
            else:
                v = _FixedPoint.forward(adjoint, None, *values)[0]
            return (None, None, *pullback(v))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None]:
        call: _Call = ctx.call
        with outer_forward_mode(*ctx.saved_tensors) as (x, *rest), without_autocast(x.device):
            parametric, values = call.parametric.tangent(x, tuple(rest), tangents[2:])
            moved = _applied(call.derivative(parametric, "tangent"), None, values)[0]
        return moved, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], call: _Call, x0: Tensor | None, *parameters: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        size, (_, x0_dim, *dims) = info.batch_size, in_dims
        folded = call.parametric.fold(size, parameters, dims)
        if folded is None:
            # A state matrix for each mapped index: no common product exists, and each contracts in its own way.
            fronted = [front(p, d) for p, d in zip(parameters, dims, strict=True)]
            outputs = [
                _applied(
                    replace(call),
                    x0 if x0 is None or x0_dim is None else x0.select(x0_dim, i),
                    tuple(p if d is None else p[i] for p, d in zip(fronted, dims, strict=True)),
                )
                for i in range(size)
            ]
            return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0, 0, 0)
        parametric, values = folded
        if x0 is not None:
            x0 = (x0.expand(size, *x0.shape) if x0_dim is None else front(x0, x0_dim)).flatten(0, 1)
        whole = _applied(replace(call, parametric=parametric), x0, values)
        return tuple(torch.unflatten(part, 0, (size, -1)) for part in whole), (0, 0, 0)


def _applied(call: _Call, x0: Tensor | None, parameters: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    x, steps, converged = _FixedPoint.apply(call, x0, *parameters)  # type: ignore[no-untyped-call]
    return x, steps, converged


# Function.apply asks for this at each call; worked out once, it costs a tenth of a small solve less.
_FixedPoint.forward.__signature__ = inspect.signature(_FixedPoint.forward)  # type: ignore[attr-defined]
