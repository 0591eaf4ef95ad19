"""The gradient of a whole sequence of equilibria: the same recurrence in reverse, and one node of autograd's."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from idl.differentiation.base import FailureReport
from idl.differentiation.implicit import ImplicitAdjoint, without_autocast
from idl.maps.base import front
from idl.recurrence.parallel import solve_together
from idl.recurrence.recurrences import Flat, Parts, Recurrence, moved_parts, parts
from idl.recurrence.sweep import sweep
from idl.recurrence.timeline import Timeline
from idl.solvers.base import AbstractFixedPointSolver
from idl.solvers.iterate import Iterate
from idl.transforms import outer_forward_mode, transforms_are_active


@dataclass
class _Call:
    """All of a sweep that is not a tensor."""

    recurrence: Recurrence
    solver: AbstractFixedPointSolver
    derivative_solver: AbstractFixedPointSolver
    report: FailureReport
    subject: str
    together: bool
    """Whether all times are solved together instead of one after another."""
    rate: float | None = None
    """Contraction to expect; after the solve that which was measured. It plans, and decides nothing."""

    def derivative(self, recurrence: Recurrence, subject: str) -> "_Call":
        solver = self.derivative_solver
        return _Call(recurrence, solver, solver, self.report, subject, self.together, self.rate)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""The trajectory ``[x_t h_{t-1}]`` and the last ``h`` of each sequence; steps and convergence of each row."""


def trajectory(
    recurrence: Recurrence,
    p: Parts,
    solver: AbstractFixedPointSolver,
    adjoint: ImplicitAdjoint,
    report: FailureReport,
    together: bool,
) -> Outputs:
    """Return the trajectory with its implicit gradient to all of ``p``.

    The backward solves one from the last time to the first. Only the trajectory is kept for it, whatever the solver
    did, and it is differentiable again in any order and mode, as :class:`ImplicitAdjoint` is.

    Args:
        recurrence: The recurrence.
        p: Its parameters.
        solver: Method of each time's solve.
        adjoint: Has the method of a derivative's solves.
        report: What to do about states that do not converge; called once a solve.
        together: Whether all times are solved together instead of one after another, here and for derivatives.
    """
    return _applied(_Call(recurrence, solver, adjoint.solver, report, "equilibrium", together), p.flat)


@dataclass(frozen=True)
class _SequenceReport(FailureReport):
    """Counts states and the sequences that they belong to."""

    timeline: Timeline = field(kw_only=True)

    def _counted(self, failed: Tensor) -> str:
        places = torch.cat([torch.arange(size) for size in self.timeline.sizes])
        sequences = len(torch.bincount(places[failed.cpu()]).nonzero())
        return f"{int(failed.sum())} of {len(failed)} states, in {sequences} of {self.timeline.batch} sequences,"


class _Trajectory(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, *flat: Tensor | None) -> Outputs:
        steps = call.recurrence.steps(parts(flat))
        swept = (solve_together if call.together else sweep)(steps, call.solver, call.rate)
        call.rate = swept.rate
        if not swept.all_converged:
            result = Iterate(swept.trajectory[:, : len(steps.B)], swept.steps, swept.converged, False, None)
            report = _SequenceReport(call.report.on_failure, call.report.advice, timeline=call.recurrence.timeline)
            report(result, call.solver, steps.driven_by(swept.trajectory[:, len(steps.B) :]), call.subject)
        return swept[:4]

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Outputs) -> None:
        call, *flat = inputs
        path, _, steps, converged = output
        ctx.call = call
        ctx.mark_non_differentiable(steps, converged)
        kept = call.recurrence.kept(parts(flat)).flat
        ctx.save_for_backward(path, *kept)
        ctx.save_for_forward(path, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_last: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        path, *saved = ctx.saved_tensors
        flat, call = tuple(saved), ctx.call
        if g is None and g_last is None:
            return (None, *(None for _ in flat))
        with without_autocast(path.device):
            p = parts(flat)
            recurrence, adjoint = call.recurrence.adjoint(path, p, g, g_last)
            # An ordinary backward is differentiated no further.
            derivative = call.derivative(recurrence, "adjoint")
            if torch.is_grad_enabled() or transforms_are_active():
                costates, first, _, _ = _applied(derivative, adjoint.flat)
            else:
                costates, first, _, _ = _Trajectory.forward(derivative, *adjoint.flat)
            return (None, *call.recurrence.pullback(path, p, g, costates, first, ctx.needs_input_grad[1:]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        call = ctx.call
        with outer_forward_mode(*ctx.saved_tensors) as (path, *saved), without_autocast(path.device):
            recurrence, values = call.recurrence.tangent(path, parts(tuple(saved)), moved_parts(tangents[1:]))
            moved, last, _, _ = _applied(call.derivative(recurrence, "tangent"), values.flat)
        return moved, last, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: _Call, *flat: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size, dims = info.batch_size, in_dims[1:]
        folded = call.recurrence.fold(size, flat, dims)
        if folded is None:  # matrices for each mapped index: sequences with nothing in common
            fronted = [None if p is None else front(p, d) for p, d in zip(flat, dims, strict=True)]
            outputs = [
                _applied(call, tuple(p if d is None or p is None else p[i] for p, d in zip(fronted, dims, strict=True)))
                for i in range(size)
            ]
            return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0, 0, 0, 0)
        recurrence, values = folded
        whole = _applied(replace(call, recurrence=recurrence), values)
        return tuple(torch.unflatten(part, 0, (-1, size)) for part in whole), (1, 1, 1, 1)


def _applied(call: _Call, flat: Flat) -> Outputs:
    return _Trajectory.apply(call, *flat)  # type: ignore[no-untyped-call]


# Function.apply asks for this at each call.
_Trajectory.forward.__signature__ = inspect.signature(_Trajectory.forward)  # type: ignore[attr-defined]
