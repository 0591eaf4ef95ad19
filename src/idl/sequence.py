"""Where recurrence, solver and adjoint meet: the equilibria of a sequence, each of which reads the one before."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from idl.activations import Activation
from idl.differentiation.base import AbstractAdjoint, FailureReport, OnFailure
from idl.differentiation.implicit import ImplicitAdjoint, without_autocast
from idl.differentiation.recurrent import Outputs, trajectory
from idl.equilibrium import advice, parametric_map
from idl.linalg.operators import StateMatrix, to_precise
from idl.maps.affine import AffineMap
from idl.maps.base import Parameters, ParametricMap
from idl.recurrence.recurrences import AffineRecurrence, Parts
from idl.recurrence.timeline import Timeline
from idl.solvers.base import AbstractFixedPointSolver, Problem
from idl.solvers.iterate import Iterate


class Trajectory(NamedTuple):
    """The equilibria of a sequence, one row for each row of the timeline, with their gradient."""

    pairs: Tensor
    """``[x_t h_{t-1}]`` in the precision of the solve."""
    final: Tensor
    """The last output of each sequence, in that precision."""
    steps: Tensor
    converged: Tensor
    timeline: Timeline
    dtype: torch.dtype
    """What results are rounded to."""
    parametric: ParametricMap
    parameters: Parameters
    """Those of the map after its driven part."""
    inputs: tuple[Tensor, Tensor, Tensor | None]
    """``u``, ``B`` and bias."""

    @property
    def x(self) -> Tensor:
        """The equilibria, ``(rows, n)``."""
        return self.pairs[:, : len(self.inputs[1])].to(self.dtype)

    @property
    def h(self) -> Tensor:
        """The outputs, ``(rows, h)``."""
        return self.timeline.after(self.pairs[:, len(self.inputs[1]) :], self.final).to(self.dtype)

    @property
    def last(self) -> Tensor:
        """The last output of each sequence, ``(batch, h)``."""
        return self.final.to(self.dtype)

    @property
    def exact(self) -> bool:
        """Whether residuals are evaluated in float64 where the device has it."""
        return isinstance(self.parametric, AffineMap)

    def residual(self) -> Tensor:
        """Return ``|f(x_t) - x_t|`` of each row, given the ``h_{t-1}`` that it read, as a Solution has it."""
        u, B, bias = self.inputs
        x = self.x.to(self.pairs.dtype)
        with torch.no_grad(), without_autocast(u.device):
            wide = to_precise if self.exact else (lambda tensor: tensor.to(x.dtype))
            both = torch.cat((wide(u), wide(self.pairs[:, len(B) :])), 1)
            Z = F.linear(both, wide(B), None if bias is None else wide(bias))
        return self.parametric.residual((Z, *self.parameters), x)


def solve_sequence(
    A: StateMatrix,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    u: Tensor,
    h0: Tensor,
    timeline: Timeline,
    bias: Tensor | None,
    phi: Activation,
    solver: AbstractFixedPointSolver,
    adjoint: AbstractAdjoint,
    on_failure: OnFailure,
    parallel_in_time: bool,
) -> Trajectory:
    r"""Solve :math:`x_t = \phi(Ax_t + B[u_t; h_{t-1}] + b)`, :math:`h_t = Cx_t + D[u_t; h_{t-1}]` for all times.

    With a known derivative of ``phi`` and an implicit adjoint the sequence is one node of autograd's, and its backward
    another. Everything else is solved time by time, a node each.

    Args:
        A: State matrix.
        B: Input matrix, ``(n, p + h)``.
        C: Output matrix, ``(h, n)``.
        D: Direct matrix, ``(h, p + h)``; ``None`` for zero.
        u: Inputs, one row a row of ``timeline``.
        h0: What the first times read, one row a sequence.
        timeline: Which rows belong to which time.
        bias: Constant of the pre-activation.
        phi: Activation.
        solver: Method of each time's solve.
        adjoint: Rule of the gradient.
        on_failure: What to do if some state has not converged; at most one warning, of the whole sequence.
        parallel_in_time: Whether all times of such a node are solved together instead of one after another.

    Raises:
        ConvergenceError: If a state did not converge and ``on_failure="raise"``.
    """
    p, n = u.shape[1], len(B)
    D = B.new_zeros(len(C), B.shape[1]) if D is None else D
    driving = torch.cat((B[:, :p], D[:, :p]))
    source = F.linear(u, driving, None if bias is None else F.pad(bias, (0, len(C))))
    dtype = torch.promote_types(source.dtype, A.tensors[0].dtype)
    precision = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    tensors = [tensor.to(precision) for tensor in A.tensors]
    first = source[: timeline.sizes[0], :n]
    parametric, parameters = parametric_map(A, tensors, phi, first.to(u.dtype))
    report = FailureReport(on_failure, lambda: advice(A, parametric, phi, solver))
    with without_autocast(u.device):
        M = torch.cat((C, D[:, p:]), 1).to(precision)
        parts = Parts(None, None, source.to(precision), h0.to(precision), B[:, p:].to(precision), M, tuple(tensors))
        if isinstance(parametric, AffineMap) and isinstance(adjoint, ImplicitAdjoint):
            recurrence = AffineRecurrence(type(A), timeline, phi)
            outputs = trajectory(recurrence, parts, solver, adjoint, report, parallel_in_time)
        else:
            outputs = _time_by_time(parametric, parameters, parts, timeline, solver, adjoint, report)
    return Trajectory(*outputs, timeline, dtype, parametric, parameters, (u, B, bias))


def _time_by_time(
    parametric: ParametricMap,
    parameters: Parameters,
    p: Parts,
    timeline: Timeline,
    solver: AbstractFixedPointSolver,
    adjoint: AbstractAdjoint,
    report: FailureReport,
) -> Outputs:
    """Solve as :func:`~idl.differentiation.recurrent.trajectory` does, with a fixed point and a gradient each time."""
    assert p.source is not None
    n, once = len(p.B), _ReportedOnce(report.on_failure, report.advice)
    sources = torch.split_with_sizes(p.source, timeline.sizes)
    pairs, steps, converged = ([torch.empty(0)] * len(sources) for _ in range(3))
    ended: list[Tensor] = []
    h, x = p.carry[:0], p.source[:0, :n]
    for time in timeline.order:
        source, size = sources[time], timeline.sizes[time]
        if len(h) > size:  # the shortest of the sequences end, and stand last
            ended.append(h[size:])
        new = p.carry[len(h) : size]
        h, x = torch.cat((h[:size], new)), torch.cat((x[:size], x.new_zeros(len(new), n))).detach()
        z = source[:, :n] + h @ p.B.T
        x, steps[time], converged[time] = adjoint.fixed_point(parametric, solver, x, (z, *parameters), once)
        pairs[time] = torch.cat((x, h), 1)
        h = source[:, n:] + pairs[time] @ p.M.T
    return torch.cat(pairs), torch.cat((h, *ended[::-1])), torch.cat(steps), torch.cat(converged)


@dataclass(frozen=True)
class _ReportedOnce(FailureReport):
    """Tells the first failure of each kind only."""

    seen: set[str] = field(default_factory=set)

    def __call__(self, result: Iterate, solver: AbstractFixedPointSolver, problem: Problem, subject: str) -> None:
        """Report ``result`` if it is the first of its kind that failed."""
        if not result.all_converged and subject not in self.seen:
            self.seen.add(subject)
            super().__call__(result, solver, problem, subject)
