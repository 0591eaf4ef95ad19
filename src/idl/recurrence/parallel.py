"""All times together: Newton's method on the whole sequence."""

from dataclasses import replace

import torch
from torch import Tensor

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
    models over the sequence length, ICLR 2024, section 3) for an implicit model. For linear equations one correction is
    exact up to rounding.

    A sequence is done when each of its equilibria is found, and all defects are within the tolerance of the solver or
    down at rounding, as they are after a sweep. Any other is left to a sweep, whatever the reason; ``max_steps`` are
    what a time may take in all Newton steps together.

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
    taken, spent = torch.zeros(timeline.rows, dtype=torch.int64, device=like.device), 0
    last_digits = False
    for _ in range(_MOST):
        before = timeline.by_row(torch.cat((steps.carry[None], h[:-1])))
        problem = steps.driven_by(before)
        problem.rate = rate
        result = iterate(replace(solver, max_steps=solver.max_steps - spent), problem, x, like.dtype)
        x, rate = result.x, result.rate
        taken += result.steps
        spent = int(taken.max())
        pairs = torch.cat((x, before), 1)
        image = steps.outputs(pairs)
        defect = image - timeline.by_row(h)
        more = torch.where(defect.abs() <= _rounding(steps, pairs), 0, defect)  # than what rounding makes of each sum
        tolerance = solver.atol + solver.rtol * torch.maximum(problem.scale(x), problem.norm(image))
        done = _everywhere(timeline, (problem.norm(more) <= tolerance) & result.converged)
        settled = bool((done | ~_everywhere(timeline, x.isfinite().all(1))).all())  # a lost sequence stays lost
        if (settled and (last_digits or not bool(more.any()))) or spent >= solver.max_steps:
            break
        # Once all is within the tolerance, the transitions of before give the digits beyond it at little cost.
        last_digits = settled
        if J is None or not (steps.linear or last_digits):
            J = timeline.by_place(steps.transitions(problem.linearise(x)[1]))
        moved = h + scan(J, timeline.by_place(defect))
        # A product of too many transitions overflows; the places before it are right all the same.
        h = torch.hardshrink(torch.where(moved.isfinite(), moved, h), underflow(like.dtype))
    last = timeline.by_place(image)[timeline.lengths - 1, torch.arange(timeline.batch)]
    swept = Swept(pairs, last, taken, result.converged, True, rate)
    return swept if bool(done.all()) else _swept_again(swept, ~done, steps, solver)


def _everywhere(timeline: Timeline, rows: Tensor) -> Tensor:
    """Return for which sequences this is true of all rows."""
    return timeline.by_place(~rows).logical_not().all(0)  # beyond its end a sequence has zeros, which stand for true


def _rounding(steps: Steps, pairs: Tensor) -> Tensor:
    """Return what rounding makes of each sum of the outputs; 0 where that is not finite, so that it excuses nothing."""
    terms = steps.outputs(pairs, torch.abs)
    rounding = _ROUNDINGS * torch.finfo(terms.dtype).eps * terms + underflow(terms.dtype)
    return torch.where(rounding.isfinite(), rounding, 0)


def _swept_again(swept: Swept, failed: Tensor, steps: Steps, solver: AbstractFixedPointSolver) -> Swept:
    """Return the result with these sequences solved time by time."""
    rest, rows = steps.of(failed)
    again = sweep(rest, solver, swept.rate)
    swept.trajectory[rows], swept.last[failed] = again.trajectory, again.last
    swept.steps[rows], swept.converged[rows] = again.steps, again.converged
    return swept._replace(all_converged=again.all_converged)
