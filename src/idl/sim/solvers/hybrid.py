"""The default: ADMM finds the support, Newton steps on it finish."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.active_set import newton
from idl.sim.solvers.admm import Splitting
from idl.sim.solvers.base import AbstractRowSolver, Incumbent, RowSolution

_SUPPORT_GAP = 0.05  # relative gap at which the support is first tried; nearly always it is good enough
_ADMM_STEPS = 300  # most steps of the first round; each round allows twice as many
_NEWTON_STEPS = 30


@dataclass(frozen=True)
class Hybrid(AbstractRowSolver):
    """Iterate all rows by :class:`ADMM` until their supports are roughly known, then take Newton steps on these.

    ADMM is fast far from the solution and slow close to it, Newton on the support the other way round. Rows on which
    Newton does not arrive go back to ADMM, which goes on from where it was, so that in the worst case this is ADMM.

    Args:
        tol, max_steps: See :class:`AbstractRowSolver`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> sim = SIM(Hybrid(tol=1e-3), lam=1e-2).fit(teacher, [torch.randn(200, 8)])
        >>> bool((sim.certificate_.states.gap <= 1e-3).all())
        True
    """

    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        incumbent = Incumbent(problem, self.tol, start)
        steps = newton(incumbent, incumbent.open, _NEWTON_STEPS) if start is not None else 0
        if not len(incumbent.open):
            return incumbent.solution(steps)
        splitting, until, most = Splitting(problem, incumbent.W), _SUPPORT_GAP, _ADMM_STEPS
        while len(incumbent.open) and steps < self.max_steps:
            dtype = torch.float32 if until >= _SUPPORT_GAP else torch.float64
            most_now = min(most, self.max_steps - steps)
            steps += splitting.run(incumbent, incumbent.open, max(until, self.tol), most_now, dtype)
            steps += newton(incumbent, incumbent.open, _NEWTON_STEPS)
            until, most = until / 10, 2 * most
        return incumbent.solution(steps)
