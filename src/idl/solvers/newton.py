"""Semismooth Newton on each row, with Krylov or direct inner solves."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from idl.linalg.krylov import gcr
from idl.solvers.base import AbstractFixedPointSolver, Problem, largest_ratio

_INNER_STEPS = 24  # directions that are kept; a row that needs more restarts with the next outer step
_KRYLOV_SOLVES = 6  # most stiff rows are solved by then; where signs settle one after another, LU is fewer products
_DIRECT_UP_TO = 512  # units; a hundred solves by LU of a thousand units take a hundred times as long as plain steps
_STALE_STEPS = 10  # five nearly decoupled positive blocks settle within eight, at kappa = .999
_ONE_SIGNED = 1e-2  # rounding and inexact solves leave entries of the other sign, this small beside the largest
_INNER_RTOL = 1e-2  # far from the solution more is wasted, close to it the next outer step refines


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
    """Newton steps since a row had its best residual, but for those on which it moved monotonically."""
    krylov_solves: Tensor
    """Krylov solves that a row is still given before it is solved directly; infinitely many where none ever is so."""


@dataclass(frozen=True)
class Newton(AbstractFixedPointSolver):
    r"""Solve :math:`x - f(x) = 0` by semismooth Newton steps on each row.

    The residual is evaluated, and the iterate kept, in float64 where the device has it, while the linear systems are
    solved in the precision of the input: iterative refinement, so that a nearly singular ``I - J`` costs steps and
    not accuracy. Systems are solved by generalised conjugate residuals, ``O(n^2)`` a product and matrix-free; rows on
    which these stall by LU, ``O(n^3)``, up to 1024 units; so are, up to 512 units, rows of a contraction that six have
    not brought to an end. Low-rank maps are solved by the Woodbury identity, ``O(n r^2)``.

    Steps may raise the residual, as they do while the active set of a ReLU settles. With a ReLU and a contracting ``A``
    without negative entries ``I - J`` is an M-matrix: after the first exact step ``f(x) - x`` has one sign, and ``x``
    moves monotonically and arrives after finitely many (Brugnano, Casulli: Iterative Solution of Piecewise Linear
    Systems, SIAM J. Sci. Comput. 30(1), 2008), whatever the residual does meanwhile. Safeguard: a row that has not
    improved on its best in ten steps, those of a contraction on which it moves so not counted, goes back there and
    takes a Picard step, so that where the map contracts it gets closer in any case.

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
        # Without a contraction there may be nothing to find, and LU at each step would find that out at a high price.
        affordable = problem.can_solve and not problem.solve_is_cheap and x.shape[1] <= _DIRECT_UP_TO
        in_the_end_directly = affordable and problem.contracts
        krylov_solves = torch.full_like(residual, _KRYLOV_SOLVES if in_the_end_directly else torch.inf)
        worst = largest_ratio(residual, tolerance)
        seen = (value, residual, unknown, tolerance, worst, worst == 0, None)
        return NewtonState(*seen, point, slope, value, residual, torch.zeros_like(residual), krylov_solves)

    def step(self, problem: Problem, state: NewtonState, budget: int) -> tuple[NewtonState, int]:
        """Take one Newton step, all rows at once."""
        defect = (state.point - state.x).to(state.slope.dtype)
        correction, failed, krylov_solves, spent = self._solve(problem, state, defect, budget)
        lost = (state.stale >= _STALE_STEPS) & (state.residual > 0) | ~state.residual.isfinite()
        point = torch.where(lost[:, None], state.best_x, state.point - correction)
        value, slope = problem.linearise(point)
        residual = problem.distance(value, point)
        # The correction was the error. What is left of it shrinks as the residual does, but for slow directions, which
        # hardly show in a residual: no more than a tenfold gain is believed. A row without residual is solved.
        error = problem.norm(correction) * (residual / state.residual).clamp_min(0.1)
        error = torch.maximum(error, residual - error)  # of the image, which lies as far from the point as that
        error = torch.where(state.residual == 0, 0, torch.where(lost | failed, torch.inf, error))
        better = residual < state.best_residual
        direction = _sign(point - state.point)
        monotone = (direction != 0) & (direction == _sign(value - point)) & krylov_solves.isfinite()
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
            torch.where(better | lost, 0, state.stale + ~monotone),
            krylov_solves,
        ), spent + 1

    def _solve(
        self, problem: Problem, state: NewtonState, defect: Tensor, budget: int
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return the correction of each row, where it solves nothing, the Krylov solves left, and the products."""
        slope, left = state.slope, state.krylov_solves
        failed = torch.zeros_like(left, dtype=torch.bool)
        if problem.solve_is_cheap:
            return problem.solve(slope, defect), failed, left, 1
        correction, products = torch.zeros_like(defect), 0
        rows = (left > 0).nonzero()[:, 0]
        if len(rows):
            slopes = slope[rows]
            correction[rows], reduction, products = gcr(
                lambda v: v - problem.product(slopes, v),
                defect[rows],
                rtol=_INNER_RTOL,
                max_steps=max(1, min(_INNER_STEPS, budget - 2)),
            )
            failed[rows] = reduction > 0.5
        if problem.can_solve:
            direct = failed | (left == 0)
            if bool(direct.any()):
                correction[direct] = problem.solve(slope[direct], defect[direct])
                products += 1
            left = torch.where(direct & left.isfinite(), 0, left - 1)
            failed = torch.zeros_like(failed)
        return correction, failed, left, products


def _sign(x: Tensor) -> Tensor:
    """Return 1 or -1 for the rows whose entries have one sign, but for what inexact solves leave, and 0 for others."""
    above, below = x.clamp_min(0).amax(1), x.clamp_max(0).abs().amax(1)
    return (below <= _ONE_SIGNED * above).int() - (above <= _ONE_SIGNED * below).int()
