"""One pass over the times: each is solved given what the one before has left, several between two tests."""

from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from idl.recurrence.plan import Plan
from idl.recurrence.steps import Steps
from idl.solvers.adaptive import Adaptive
from idl.solvers.base import AbstractFixedPointSolver, rounding_floor
from idl.solvers.iterate import iterate
from idl.solvers.picard import Picard, at_least_as_slow

_LONGEST = 32  # times between two tests
_NUMBERS = 2**17  # of states between two tests, so that they stay in the cache


class Swept(NamedTuple):
    """What a sweep ends with."""

    trajectory: Tensor
    """``[x_t h_{t-1}]``, one row a row."""
    last: Tensor
    """Output at the last time of each sequence."""
    steps: Tensor
    converged: Tensor
    all_converged: bool
    rate: float | None
    """Contraction from application to application, where it was measured."""


def sweep(steps: Steps, solver: AbstractFixedPointSolver, rate: float | None = None) -> Swept:
    """Solve the equations of all times, one after another in reading order.

    Where Picard would do, the number of applications that a time takes is known from those before. They are spent
    without looking, at several times in a row, and one test looks at the last two differences of all of these, as
    Picard's own test does. From the first time on that is not done they are solved again, that one by ``solver``, as
    is every time that is not easy. Linear equations of very low rank are solved directly, and tested by what a second
    solve would still change.

    Args:
        steps: The equations.
        solver: The method.
        rate: Contraction to expect.
    """
    return _Sweep(steps.eased(), solver, rate).run()


def underflow(dtype: torch.dtype) -> float:
    """Return the size below which an output is set to zero: what vanishes must not linger as slow denormal numbers."""
    return 2.0**20 * torch.finfo(dtype).tiny


class _Sweep:
    def __init__(self, steps: Steps, solver: AbstractFixedPointSolver, rate: float | None) -> None:
        self.steps, self.solver = steps, solver
        timeline, (n, h), like = steps.timeline, steps.B.shape, steps.B
        sizes = list(timeline.sizes)
        self.order, self.sizes, self.starts = timeline.order, timeline.sizes, timeline.starts
        self.rows = [slice(start, start + size) for start, size in zip(timeline.starts, sizes, strict=False)]
        # Views of each time, made at once: one by one they would cost as much as the products.
        self.trajectory = like.new_empty(timeline.rows, n + h)
        self.pairs = torch.split_with_sizes(self.trajectory, sizes)
        self.xs, self.befores = _split(self.trajectory, n, sizes)
        self.sources = None if steps.source is None else _split(steps.source, n, sizes)
        driven = like.new_empty(timeline.batch, n)
        self.driven = {size: driven[:size] for size in set(sizes)}
        self.Bt, self.Mt = steps.B.T.contiguous(), steps.M.T.contiguous()
        self.last = like.new_empty(timeline.batch, h)
        self.taken = torch.empty(timeline.rows, dtype=torch.int64, device=like.device)
        self.converged = torch.ones(timeline.rows, dtype=torch.bool, device=like.device)
        self.all_converged = True
        plain = isinstance(solver, Adaptive) or (isinstance(solver, Picard) and solver.damping == 1)
        self.regular = plain and timeline.batch > 0 and steps.finite
        self.direct = self.regular and steps.can_solve
        longest = max(4, min(_LONGEST, _NUMBERS // max(1, timeline.batch * n)))
        self.doubts = self.regular and not self.direct and bool(steps.amplification)
        self.plan = Plan(solver.max_steps, longest, rate)
        self.work = like.new_empty(3, min(timeline.rows, longest * timeline.batch), n)
        self.underflow = underflow(like.dtype)

    def run(self) -> Swept:
        first = self.order[0]
        self.befores[first].copy_(self.steps.carry[: self.sizes[first]])
        place = 0
        while place < len(self.order):
            if self.direct or (self.regular and self.plan.foresees):
                place = self._run_ahead(place)
            else:
                self._solve(place)
                place += 1
        return Swept(self.trajectory, self.last, self.taken, self.converged, self.all_converged, self.plan.rate)

    def _driven(self, time: int) -> Tensor:
        """Return ``z`` of a time."""
        z = self.driven[self.sizes[time]]
        if self.sources is None:
            return torch.mm(self.befores[time], self.Bt, out=z)
        return torch.addmm(self.sources[0][time], self.befores[time], self.Bt, out=z)

    def _hand_over(self, place: int) -> None:
        """Write the output of the time at this place where the time after it, or the result, is read from."""
        time, after = self.order[place], self.order[place + 1] if place + 1 < len(self.order) else None
        size = self.sizes[time]
        room = self.last[:0] if after is None else self.befores[after]
        out = room if len(room) == size else self.last.new_empty(size, self.last.shape[1])
        if self.sources is None:
            torch.mm(self.pairs[time], self.Mt, out=out)
        else:
            torch.addmm(self.sources[1][time], self.pairs[time], self.Mt, out=out)
        if out is not room:
            shared = min(size, len(room))
            self.last[shared:size] = out[shared:]  # sequences end
            room[:shared] = out[:shared]
            room[shared:] = self.steps.carry[shared : len(room)]  # sequences begin

    def _before(self, place: int) -> Tensor:
        """Return the state of the time before, with zeros for sequences that begin."""
        size = self.sizes[self.order[place]]
        x = self.xs[self.order[place - 1]] if place else self.work[0, :0]
        return x[:size] if len(x) >= size else torch.cat((x, x.new_zeros(size - len(x), x.shape[1])))

    def _solve(self, place: int) -> None:
        """Solve the time at this place by the solver."""
        time = self.order[place]
        rows, z = self.rows[time], self._driven(time)
        problem = self.steps.problem(self.steps.state_matrix, rows, z, torch.empty_like(z))
        start = self._before(place) if place else None
        if start is not None and not self.all_converged:  # what was not found is no place to start from
            found = self.converged[self.rows[self.order[place - 1]]][: len(z)]
            start = start.clone()
            start[: len(found)][~found] = 0
        if start is None:
            problem.rate = self.plan.rate
        else:
            problem.slowest = self.plan.slowest
        result = iterate(self.solver, problem, start, z.dtype)
        self.xs[time].copy_(result.x)
        self.taken[rows], self.converged[rows] = result.steps, result.converged
        self.all_converged &= result.all_converged
        self.plan.solved(int(result.steps.max()) if len(z) else 0, result.rate)
        self._hand_over(place)

    def _run_ahead(self, place: int) -> int:
        """Solve several times without looking, then test; return the place to go on from."""
        places = range(place, min(place + self.plan.ahead, len(self.order)))
        ends = self.order[places[0]], self.order[places[-1]]
        low, high = min(ends), max(ends)
        rows = slice(self.starts[low], self.starts[high + 1])
        work = self.work[:, : rows.stop - rows.start]
        older, before, rooms = (torch.split_with_sizes(part, self.sizes[low : high + 1]) for part in work)
        count = self.plan.count
        for p in places:
            time = self.order[p]
            at = time - low
            problem = self.steps.problem(self.steps.quick, self.rows[time], self._driven(time), rooms[at])
            slots = (older[at], before[at], self.xs[time])
            if self.direct:
                self.steps.solve(self.rows[time], rooms[at], out=self.xs[time])
            elif self.plan.warm:
                problem.run_into(self._before(p), count, slots)
            else:
                problem.run_into(problem.start_into(slots[-count % 3]), count - 1, slots)
            self._hand_over(p)
        self.taken[rows] = 1 if self.direct else count
        failed = self._test_direct(rows, work) if self.direct else self._test(rows, work, self.sizes[low])
        if places.stop < len(self.order):
            after = self.befores[self.order[places.stop]]
            torch.hardshrink(after, self.underflow, out=after)
        done = places.stop if failed is None else self._place(rows.start + failed)
        doubted = self._doubted(rows) if self.doubts else None
        if doubted is not None and (place := self._place(rows.start + doubted)) <= done:
            done = place
        elif failed is None or not self.direct:  # what failed gets more applications
            return done
        self._solve(done)
        return done + 1

    def _place(self, row: int) -> int:
        """Return the place, in reading order, of the time that a row belongs to."""
        return self.order.index(bisect_right(self.starts, row) - 1)

    def _doubted(self, rows: slice) -> int | None:
        """Return the first row whose solution is not that of the solver, where only that knows what to believe.

        All rows are solved at once from where they are, given the outputs before them.
        """
        n = self.work.shape[2]
        x, z = self.trajectory[rows, :n], self.trajectory[rows, n:] @ self.Bt
        if self.steps.source is not None:
            z += self.steps.source[rows, :n]
        problem = self.steps.problem(self.steps.state_matrix, rows, z, torch.empty_like(z))
        result = iterate(self.solver, problem, x, x.dtype)
        self.taken[rows] += result.steps
        allowed = torch.maximum(self.solver.tolerance(problem, x), rounding_floor(problem, x, None, x.dtype))
        error = problem.distance(result.x, x) / allowed
        return self._first(error.where(result.converged, torch.inf))

    def _test(self, rows: slice, work: Tensor, size: int) -> int | None:
        """Test the last two differences; return the first row, in reading order, that is not done."""
        x = self.trajectory[rows, : work.shape[2]]
        older, before, room = work
        judge = self.steps.judge(rows, room)
        torch.sub(before, older, out=older)
        torch.sub(x, before, out=before)
        sizes = judge.reduced(work[:2].abs_())
        ratios = sizes / self.solver.tolerance(judge, x)
        slowest = self.plan.slowest if self.plan.warm else None
        q, r = ratios if slowest is None else at_least_as_slow(ratios, slowest)
        error = r * (r / (q - r).clamp_min_(torch.finfo(r.dtype).tiny))
        numbers = [*ratios.amax(1), error.amax()]
        drifts = size < len(x) and len(x) % size == 0
        if drifts:
            numbers += [(x[-size:] - x[-2 * size : -size]).abs_().amax(), x[-size:].abs().amax()]
        largest, last, worst, *drift = torch.stack(numbers).tolist()
        if not worst <= 1:
            error = error.where(sizes[1] > rounding_floor(judge, x, None, x.dtype), 0)
            failed, worst = self._first(error), float(error.amax())
            if failed is not None:
                self.plan.failed(largest, last, worst)
                return failed
        self.plan.succeeded(largest, last, worst)
        if drifts:
            self.plan.drifted(*drift)
        return None

    def _test_direct(self, rows: slice, work: Tensor) -> int | None:
        """Test by the correction that remains; return the first row, in reading order, that is not done."""
        x = self.trajectory[rows, : work.shape[2]]
        _, before, room = work
        judge = self.steps.judge(rows, room)
        torch.sub(judge.apply_into(x, before), x, out=before)
        correction = self.steps.solve(rows, before)
        error = judge.norm(correction) / self.solver.tolerance(judge, x)
        failed = None
        if not float(error.amax()) <= 1:
            failed = self._first(error.where(judge.norm(before) > rounding_floor(judge, x, None, x.dtype), 0))
        self.plan.ahead = min(4 * self.plan.ahead, self.plan.longest) if failed is None else 1
        return failed

    def _first(self, error: Tensor) -> int | None:
        """Return the first row in reading order whose error is not within its tolerance."""
        failed = (~(error <= 1)).nonzero()[:, 0]
        if not len(failed):
            return None
        return int(failed[-1 if self.steps.timeline.backwards else 0])


def _split(rows: Tensor, n: int, sizes: list[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the first ``n`` columns of each time, and the others."""
    return torch.split_with_sizes(rows[:, :n], sizes), torch.split_with_sizes(rows[:, n:], sizes)
