"""The only loop: step, test each sample, leave finished ones out, keep the best iterate, count."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idl.solvers.base import AbstractFixedPointSolver, Problem, has_run_away, rounding_floor, rounding_is_an_end

_STUCK = 8  # applications without a smaller step, after which a small one is as small as rounding lets it be
_UNWATCHED = 16  # steps in which a solve that goes well keeps no record of its best iterate


class Iterate(NamedTuple):
    """What the loop ends with."""

    x: Tensor
    """One row a row, as in what follows."""
    steps: Tensor
    converged: Tensor
    all_converged: bool
    rate: float | None
    """Contraction from step to step at the end, where it was measured."""


def iterate(solver: AbstractFixedPointSolver, problem: Problem, x: Tensor | None, dtype: torch.dtype) -> Iterate:
    """Run ``solver`` from ``x`` until each row has converged or ``max_steps`` are spent.

    A row has converged when its estimated error is within the tolerance, and the proved one too where estimates are not
    believed (:attr:`~idl.solvers.base.Problem.amplification`), or its last step is down at rounding: a few
    units in the last place of ``x``, or within the tolerance and no smaller for a while, with ``x`` staying within the
    tolerance too and no larger error to be expected (a function may be rounded coarser than its values are, as
    attention with large scores is). A row whose first images are not finite becomes NaN and costs no further step; a
    row that does not converge gets the best iterate that it had.

    Args:
        solver: The method.
        problem: The map.
        x: Start, ``(rows, n)``; ``None`` for zeros.
        dtype: Precision of the result, that of the map; a solver may compute in a higher one.
    """
    state, spent = solver.init(problem, x)
    cost = spent
    rows = len(state.x)
    best: _Best | None = None
    ended_rows: _EndedRows | None = None
    before = math.inf
    first = state.x
    while True:
        settled = state.settled and (not problem.amplification or bool(_within(problem, state).all()))
        if settled and (spent <= _UNWATCHED or not bool(has_run_away(problem, state.x, first).any())):
            if ended_rows is None:
                settled = torch.ones(rows, dtype=torch.bool, device=state.x.device)
                return Iterate(state.x.to(dtype), _filled(settled, spent), settled, True, state.rate)
            done = torch.ones_like(state.residual, dtype=torch.bool)
            best = _Best(state.x, state.residual, done, torch.zeros_like(state.residual))
            break
        # While every row is finite and the worst of them improves, the newest iterate is the best: nothing to note.
        improves = state.worst < before or state.worst == before == math.inf
        if best is not None or not improves or spent > _UNWATCHED or spent >= solver.max_steps:
            floor = rounding_floor(problem, state.x, first, dtype)
            floor *= rounding_is_an_end(solver, problem, state.x)
            done = _done(problem, first, state, dtype, floor)
            now = first, state, done
            best = _Best.begin(*now) if best is None else best.updated(problem, *now, cost, floor)
            ended = best.settled | best.residual.isnan()
            if spent >= solver.max_steps or bool(ended.all()):
                break
            if problem.separable and 4 * int(ended.sum()) >= len(ended):  # from here on copying the rest out pays
                ended_rows = ended_rows or _EndedRows(rows, best.x)
                rest = ended_rows.take(ended, best, spent)
                known = problem.known
                problem, first = problem.restrict(rest), first[rest]
                problem.known = known
                best, state = _rows_of(best, rest), _rows_of(state, rest)
        before = state.worst
        state, cost = solver.step(problem, state, solver.max_steps - spent)
        spent += cost
    if not bool((best.settled | best.residual.isnan()).all()):
        x = x if x is None or ended_rows is None else x[ended_rows.running]
        best = best.not_worse_than(problem.start(x), problem, dtype)
    if ended_rows is None:
        return Iterate(
            best.x.to(dtype), _filled(best.settled, spent), best.settled, bool(best.settled.all()), state.rate
        )
    ended_rows.take(torch.ones_like(best.settled), best, spent)
    converged = ended_rows.converged
    return Iterate(ended_rows.x.to(dtype), ended_rows.steps, converged, bool(converged.all()), state.rate)


class _Best(NamedTuple):
    """The best iterate of each running row, and whether it has been seen to converge."""

    x: Tensor
    residual: Tensor
    settled: Tensor
    since: Tensor
    """Applications since the residual was last improved."""

    @staticmethod
    def begin(first: Tensor, state: Any, done: Tensor) -> "_Best":
        """Return the present iterates; a row whose first image was not finite is lost, and is NaN."""
        lost, finite = ~first.isfinite().all(1), state.x.isfinite().all(1)
        x = torch.where(finite[:, None], state.x, first)
        residual = torch.where(finite, state.residual, torch.inf)
        return _Best(
            torch.where(lost[:, None], torch.nan, x),
            torch.where(lost, torch.nan, residual),
            done,
            torch.zeros_like(residual),
        )

    def updated(self, problem: Problem, first: Tensor, state: Any, done: Tensor, cost: int, floor: Tensor) -> "_Best":
        """Return the better of these and the present iterates, row by row; the last step cost ``cost``."""
        since = torch.where(state.residual < self.residual, 0, self.since + cost)
        near = (self.residual <= state.tolerance) & (problem.distance(state.x, self.x) <= state.tolerance)
        stuck = near & (since >= _STUCK) & state.error.isfinite()
        stuck &= _within(problem, state) | (state.residual <= 4 * floor)  # else it may be the step of a slow part
        stuck &= ~has_run_away(problem, state.x, first)  # its best stays its best
        better = state.residual.isfinite() & (state.residual <= self.residual) | (done & ~self.settled)
        return _Best(
            torch.where(better[:, None], state.x, self.x),
            torch.where(better, state.residual, self.residual),
            self.settled | done | stuck,
            since,
        )

    def not_worse_than(self, first: Tensor, problem: Problem, dtype: torch.dtype) -> "_Best":
        """Return for each row that did not converge the better of its iterate and its first image.

        A map that grows may have left that behind before anybody looked. Only now, since something has failed, is it
        worth two applications to know.
        """
        failed = ~self.settled & ~self.residual.isnan()
        x = self.x.to(dtype)
        worse = ~(problem.distance(problem(x), x) <= problem.distance(problem(first), first))
        return self._replace(x=torch.where((failed & worse)[:, None], first, x))


def _filled(like: Tensor, steps: int) -> Tensor:
    return torch.full_like(like, steps, dtype=torch.int64)


def _done(problem: Problem, first: Tensor, state: Any, dtype: torch.dtype, floor: Tensor) -> Tensor:
    """Return which rows are within their tolerance or down at rounding."""
    # A state held in higher precision is worth going on with: its error, not its step, must reach the floor.
    at_floor = (state.residual if state.x.dtype == dtype else state.error) <= floor
    done = ((state.error <= state.tolerance) & _within(problem, state) | at_floor) & state.residual.isfinite()
    return done & ~has_run_away(problem, state.x, first)


def _within(problem: Problem, state: Any) -> Tensor:
    """Return which rows may be within their tolerance for all that is proved, where an estimate is not believed."""
    within: Tensor = problem.amplification * state.residual <= state.tolerance
    return within


def _rows_of(values: Any, rows: Tensor) -> Any:
    return type(values)(*(value[rows] if isinstance(value, Tensor) else value for value in values))


class _EndedRows:
    """Results of the rows that were left out, at their places in the whole batch."""

    def __init__(self, rows: int, x: Tensor) -> None:
        self.running = torch.arange(rows, device=x.device)
        self.x = torch.empty_like(x)
        self.steps = torch.empty(rows, dtype=torch.int64, device=x.device)
        self.converged = torch.empty(rows, dtype=torch.bool, device=x.device)

    def take(self, ended: Tensor, best: _Best, spent: int) -> Tensor:
        """Write down the running rows marked in ``ended``; return the indices of the others among the running."""
        where = self.running[ended]
        if best.x.dtype != self.x.dtype:  # a solver may go on in higher precision
            self.x = self.x.to(best.x.dtype)
        self.x[where] = best.x[ended]
        self.steps[where] = spent
        self.converged[where] = best.settled[ended]
        rest = (~ended).nonzero()[:, 0]
        self.running = self.running[rest]
        return rest
