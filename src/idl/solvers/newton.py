"""Semismooth Newton on each row, with Krylov or direct inner solves."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from idl.linalg.krylov import gcr
from idl.solvers.base import AbstractFixedPointSolver, Problem, largest_ratio, rounding_floor

_INNER_STEPS = 24  # directions that are kept; a row that needs more restarts with the next outer step
_INNER_RTOL = 1e-2  # far from the solution more is wasted, close to it the next outer step refines
_STALLED = 0.5  # of the residual left by the inner steps: its correction is no Newton step
_DIRECT_UP_TO = 512  # units; for a thousand a dozen solves by LU take ten times as long as 300 plain steps
_SLOW = 0.5  # of the residual left by a step: once the signs are settled a hundredth is
_PLAIN_SHARE = 8  # part of what is left: runs of plain steps that fall from 37 to 3, and few systems beside them
_STALE_STEPS = 10  # five nearly decoupled positive blocks settle within eight, at kappa = .999


class NewtonState(NamedTuple):
    """State of :class:`Newton`: ``x`` is the image ``f(point)``."""

    x: Tensor
    residual: Tensor
    error: Tensor
    tolerance: Tensor
    worst: float
    settled: bool
    rate: float | None
    point: Tensor
    slope: Tensor
    best_x: Tensor
    best_residual: Tensor
    stale: Tensor
    """Newton steps since a row had its best residual."""
    slow: Tensor
    """Whether the last step left more than half of the residual, and not because of rounding."""
    direct: Tensor
    """Whether a row is solved directly from now on."""
    error_factor: float
    """That of the problem; finite where the map is proved to contract."""


@dataclass(frozen=True)
class Newton(AbstractFixedPointSolver):
    r"""Solve :math:`x - f(x) = 0` by semismooth Newton steps on each row.

    The residual is evaluated, and the iterate kept, in float64 where the device has it, while the linear systems are
    solved in the precision of the input: iterative refinement, so that a nearly singular ``I - J`` costs steps and
    not accuracy. Systems are solved by generalised conjugate residuals, ``O(n^2)`` a product and matrix-free; rows on
    which these stall by LU, ``O(n^3)``, up to 1024 units; and rows of a contraction on which 24 of them once fell short
    by LU from then on, up to 512 units, as are all rows of a batch of which more than half are. Low-rank maps are
    solved by the Woodbury identity, ``O(n r^2)``.

    Where each unit reads few others, signs settle one after another, and a Newton step gets no further than to the next
    of them, as a plain step does. So, where the map is proved to contract, a row whose last step left more than half of
    its residual takes plain steps before the next: an eighth of the applications that are left, at most one for each
    unit. With a ReLU and ``A >= 0`` neither undoes the other: after the first exact Newton step iterates rise to the
    solution (Brugnano, Casulli: Iterative Solution of Piecewise Linear Systems, SIAM J. Sci. Comput. 30(1), 2008), and
    plain steps rise too.

    Where the map is proved to contract, by ``c``, the error is the proved one, ``c / (1 - c)`` times the residual. Else
    it is the last correction times what was gained, and unknown where half of the residual or more is left.

    Steps may raise the residual, as they do while the active set of a ReLU settles. Safeguard: a row that has not
    improved on its best in ten steps goes back there and takes a Picard step, so that where the map contracts it gets
    closer in any case.

    Its linear model is of one row at a time: on a map that couples samples it is safe but may be slow.

    Args:
        atol, rtol, max_steps: See :class:`AbstractFixedPointSolver`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import equilibrium
        >>> A, B, u = torch.tensor([[0.9999]]), torch.ones(1, 1), torch.ones(1, 1)
        >>> solution = equilibrium(A, B, u, solver=Newton())  # Picard would take a hundred thousand steps
        >>> float(solution.x) > 9990, int(solution.steps) < 10
        (True, True)
    """

    def init(self, problem: Problem, x: Tensor | None) -> tuple[NewtonState, int]:
        """Apply the map twice, to have a point that is an image."""
        x = problem.start(x)
        return self.begin(problem, x, self.tolerance(problem, x)), 2

    def begin(self, problem: Problem, x: Tensor, tolerance: Tensor) -> NewtonState:
        """Return the state of ``problem`` at ``x``, for a ``tolerance`` of each row; one application."""
        value, slope = problem.linearise(x)
        point = x.to(value.dtype)
        residual = problem.distance(value, point)
        unknown = torch.full_like(residual, torch.inf)
        worst = largest_ratio(residual, tolerance)
        seen = (value, residual, unknown, tolerance, worst, worst == 0, None)
        no = torch.zeros_like(residual, dtype=torch.bool)
        return NewtonState(
            *seen, point, slope, value, residual, torch.zeros_like(residual), no, no, problem.error_factor
        )

    def step(self, problem: Problem, state: NewtonState, budget: int) -> tuple[NewtonState, int]:
        """Take plain steps with the rows that need some, and one Newton step, all rows at once."""
        state, plain = _with_plain_steps(problem, state, budget)
        defect = (state.point - state.x).to(state.slope.dtype)
        correction, short, failed, spent = self._solve(problem, state, defect, budget - plain)
        lost = (state.stale >= _STALE_STEPS) & (state.residual > 0) | ~state.residual.isfinite()
        point = torch.where(lost[:, None], state.best_x, state.point - correction)
        value, slope = problem.linearise(point)
        residual = problem.distance(value, point)
        slow = ~(residual <= _SLOW * state.residual)
        slow &= residual > rounding_floor(problem, value, None, value.dtype)
        if state.error_factor < math.inf:
            error = state.error_factor * residual
        else:
            # The correction was the error. What is left of it shrinks as the residual does, but for slow directions,
            # which hardly show in a residual: no more than a tenfold gain is believed. No residual, no error.
            error = problem.norm(correction) * (residual / state.residual).clamp_min(0.1)
            error = torch.maximum(error, residual - error)  # of the image, which lies as far from the point as that
            error = torch.where(state.residual == 0, 0, torch.where(lost | slow | failed, torch.inf, error))
        better = residual < state.best_residual
        return NewtonState(
            value,
            residual,
            error,
            state.tolerance,
            largest_ratio(residual, state.tolerance),
            largest_ratio(error, state.tolerance) <= 1,
            None,
            point,
            slope,
            torch.where(better[:, None], value, state.best_x),
            torch.where(better, residual, state.best_residual),
            torch.where(better | lost, 0, state.stale + 1),
            slow,
            state.direct | short,
            state.error_factor,
        ), plain + spent + 1

    def _solve(
        self, problem: Problem, state: NewtonState, defect: Tensor, budget: int
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return the correction of each row, where Krylov steps fell short, where nothing helped, and the products."""
        slope, none = state.slope, torch.zeros_like(state.direct)
        if problem.solve_is_cheap:
            return problem.solve(slope, defect), none, none, 1
        # Without a contraction there may be nothing to find, and LU at each step finds that out at a high price.
        may_be_direct = state.error_factor < math.inf and problem.can_solve and defect.shape[1] <= _DIRECT_UP_TO
        direct = state.direct if may_be_direct else none
        correction, short, failed, products = torch.zeros_like(defect), none.clone(), none.clone(), 0
        if may_be_direct and 2 * int(direct.sum()) > len(direct):
            direct = short = ~none  # the rest would make all wait, since Krylov steps are counted for every row
        rows = (~direct).nonzero()[:, 0]
        if len(rows):
            slopes = slope[rows]
            correction[rows], reduction, products = gcr(
                lambda v: v - problem.product(slopes, v),
                defect[rows],
                rtol=_INNER_RTOL,
                max_steps=max(1, min(_INNER_STEPS, budget - 2)),
            )
            short[rows], failed[rows] = reduction > _INNER_RTOL, reduction > _STALLED
        if problem.can_solve:
            direct = direct | failed
            if bool(direct.any()):
                correction[direct] = problem.solve(slope[direct], defect[direct])
                products += 1
            failed = none
        return correction, short, failed, products


def _with_plain_steps(problem: Problem, state: NewtonState, budget: int) -> tuple[NewtonState, int]:
    """Return the state after plain steps of the rows that are slow, if these are sure to lead on, and their number."""
    steps = min(state.x.shape[1], budget // _PLAIN_SHARE)
    rows = state.slow.nonzero()[:, 0]
    if steps < 3 or not len(rows) or state.error_factor == math.inf:
        return state, 0
    part = problem.restrict(rows)
    x, _ = part.burst(state.x[rows].to(state.slope.dtype), steps - 1)
    value, slope = part.linearise(x)
    point = x.to(value.dtype)
    return state._replace(
        x=state.x.index_copy(0, rows, value),
        residual=state.residual.index_copy(0, rows, part.distance(value, point)),
        point=state.point.index_copy(0, rows, point),
        slope=state.slope.index_copy(0, rows, slope),
    ), steps
