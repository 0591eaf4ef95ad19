"""All times together: Newton's method on the whole sequence."""

import torch
from torch import Tensor

from idl.maps.affine import MatrixProblem
from idl.recurrence.scan import scan
from idl.recurrence.steps import Steps
from idl.recurrence.sweep import Swept, sweep, underflow
from idl.recurrence.timeline import Timeline
from idl.solvers.base import AbstractFixedPointSolver
from idl.solvers.iterate import iterate

_MOST = 16  # Newton steps; a sequence that needs more is solved sooner time by time
_ROUNDINGS = 4.0  # units in the last place of its terms by which a sum may be wrong


def solve_together(steps: Steps, solver: AbstractFixedPointSolver, rate: float | None = None) -> Swept:
    r"""Solve the equations of all times together, as :func:`~idl.recurrence.sweep.sweep` does one after another.

    Given a guess of every :math:`h_{t-1}`, the equilibria of all times are one batch, each of which exists and is found
    where the map contracts. What each :math:`h_t` then is differs from its guess by a defect, which Newton's method
    corrects in the whole sequence: with :math:`J_t = \partial h_t/\partial h_{t-1} = C(I - d_tA)^{-1}d_tB + D` the
    corrections are a linear recurrence, solved by a scan. This is DEER (Lim et al., Parallelizing non-linear sequential
    models over the sequence length, ICLR 2024, section 3) for an implicit model. Linear equations take one correction.

    A sequence is done when each of its equilibria is found, and all defects are within the tolerance of the solver or
    down at rounding, as they are after a sweep. Any other is left to a sweep, whatever the reason.

    A Newton step takes time ``O(T (n^3 + h^3))`` and memory ``O(T h^2)`` a sequence, in ``O(log T)`` operations one
    after another.

    Args:
        steps: The equations.
        solver: The method of the equilibria.
        rate: Contraction to expect.
    """
    timeline, like = steps.timeline, steps.B
    if not timeline.batch:
        return sweep(steps, solver, rate)
    steps = steps.eased()
    h = like.new_zeros(len(timeline.sizes), timeline.batch, like.shape[1])
    x: Tensor | None = None
    J: Tensor | None = None
    last_digits = False
    for _ in range(_MOST):
        before = timeline.by_row(torch.cat((steps.carry[None], h[:-1])))
        problem = steps.driven_by(before)
        problem.rate = rate
        result = iterate(solver, problem, x, like.dtype)
        x, rate = result.x, result.rate
        pairs = torch.cat((x, before), 1)
        image = steps.outputs(pairs)
        defect = image - timeline.by_row(h)
        size, tolerance, rounding = problem.norm(defect), *_allowed(steps, problem, solver, pairs, image)
        done = _everywhere(timeline, (size <= torch.maximum(tolerance, rounding)) & result.converged)
        ended = done | ~_everywhere(timeline, x.isfinite().all(1))
        if bool(ended.all()) and (last_digits or bool((size <= rounding).all())):
            break
        # Once all is within the tolerance, the transitions of before give the digits beyond it at little cost.
        last_digits = bool(ended.all())
        if J is None or not (steps.linear or last_digits):
            J = timeline.by_place(steps.transitions(problem.linearise(x)[1]))
        moved = h + scan(J, timeline.by_place(defect))
        # A product of too many transitions overflows; the places before it are right all the same.
        h = torch.hardshrink(torch.where(moved.isfinite(), moved, h), underflow(like.dtype))
    last = timeline.by_place(image)[timeline.lengths - 1, torch.arange(timeline.batch)]
    swept = Swept(pairs, last, result.steps, result.converged, True, rate)
    return swept if bool(done.all()) else _swept_again(swept, ~done, steps, solver)


def _everywhere(timeline: Timeline, rows: Tensor) -> Tensor:
    """Return for which sequences this is true of all rows."""
    return timeline.by_place(~rows).logical_not().all(0)


def _allowed(
    steps: Steps, problem: MatrixProblem, solver: AbstractFixedPointSolver, pairs: Tensor, image: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the defect that each row may have, and what rounding makes of its sums."""
    size = torch.maximum(problem.scale(pairs[:, : len(steps.B)]), problem.norm(image))
    terms = steps.outputs(pairs, torch.abs)
    rounding = _ROUNDINGS * torch.finfo(terms.dtype).eps * terms + underflow(terms.dtype)
    return solver.atol + solver.rtol * size, problem.norm(rounding)


def _swept_again(swept: Swept, failed: Tensor, steps: Steps, solver: AbstractFixedPointSolver) -> Swept:
    """Return the result with these sequences solved time by time."""
    rest, rows = steps.of(failed)
    again = sweep(rest, solver, swept.rate)
    swept.trajectory[rows], swept.last[failed] = again.trajectory, again.last
    swept.steps[rows], swept.converged[rows] = again.steps, again.converged
    return swept._replace(all_converged=again.all_converged)
