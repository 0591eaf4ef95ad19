"""Accelerated proximal gradient steps, for all rows at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.base import AbstractRowSolver, Incumbent, RowSolution

_INTERVAL = 10  # steps between two tests; a test costs about as much as a step


@dataclass(frozen=True)
class AcceleratedGradient(AbstractRowSolver):
    r"""FISTA (Beck and Teboulle 2009) with the restart of O'Donoghue and Candes (2015), row by row.

    .. math:: w_{k+1} = \mathrm{prox}_{1/L}\bigl(y_k + (h - G y_k)/L\bigr), \qquad L = \lambda_{\max}(G)

    One product with ``G`` a step and no factorisation, ``O(d^2)`` a row; the steps grow with the square root of the
    condition of ``G``. The simplest of the methods here, and where ``G`` is large and well conditioned a good one.

    Args:
        tol, max_steps: See :class:`AbstractRowSolver`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> sim = SIM(AcceleratedGradient(tol=1e-3), lam=1e-2).fit(teacher, [torch.randn(200, 8)])
        >>> bool((sim.certificate_.states.gap <= 1e-3).all())
        True
    """

    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        incumbent = Incumbent(problem, self.tol, start)
        rows = incumbent.open
        step = (1 / _largest_eigenvalue(problem.gram)).reshape(1, 1)
        W = incumbent.W[rows]
        part, y, q = problem.take(rows), W, problem.take(rows).residual_correlations(W)
        momentum = torch.ones_like(step).expand(len(rows), 1)
        q_y = q
        spent = 0
        while len(rows) and spent < self.max_steps:
            before, q_before = W, q
            W = part.prox(y + step * q_y, step)
            q = part.residual_correlations(W)
            uphill = ((y - W) * (W - before)).sum(1, keepdim=True) > 0
            momentum = torch.where(uphill, 1, momentum)
            following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            weight = (momentum - 1) / following
            y, q_y, momentum = W + weight * (W - before), q + weight * (q - q_before), following
            spent += 1
            if spent % _INTERVAL == 0 or spent == self.max_steps:
                going = incumbent.offer(rows, W, q) > self.tol
                if not bool(going.all()):
                    rows, W, q, y, q_y, momentum = (v[going] for v in (rows, W, q, y, q_y, momentum))
                    part = problem.take(rows)
        return incumbent.solution(spent)


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """Return a bound of the largest eigenvalue that is close to it; 1 for a matrix of zeros."""
    if not len(gram):
        return gram.new_ones(())
    largest = torch.linalg.eigvalsh(gram)[-1] * (1 + 1e-9)
    return torch.where(largest > 0, largest, 1)
