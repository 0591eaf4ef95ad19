"""Cyclic coordinate descent on working sets, for all rows at once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.active_set import multiplier, newton
from idl.sim.solvers.base import AbstractRowSolver, Incumbent, RowSolution

_EPOCHS = 5  # passes over a working set between two looks at all columns
_NEWTON_STEPS = 30  # what the passes have found they finish, and they set the multiplier of the ball


@dataclass(frozen=True)
class CoordinateDescent(AbstractRowSolver):
    r"""Minimise over one column after the other (Friedman et al. 2010), with the ball by its multiplier.

    .. math:: w_j \leftarrow S_{p_j + \mu}(q_j + G_{jj} w_j) / G_{jj}, \qquad q \leftarrow q - \Delta w_j\, G_j

    with :math:`S` the soft threshold and :math:`\mu` the multiplier, for the columns in the ball; beyond a knee ``k``
    it is :math:`S_\mu(q_j + G_{jj} w_j) / (G_{jj} + p_j / k)`. Passes go over the columns that are on, or violate
    optimality, in some row. After a few of them Newton steps on the supports set the multiplier and finish what is
    nearly there. Fast where few columns are on; a pass costs ``O(c d)`` a row for ``c`` columns, and a Python loop over
    them, since each column needs the one before it.

    Args:
        tol, max_steps: See :class:`AbstractRowSolver`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> sim = SIM(CoordinateDescent(tol=1e-3), lam=1e-2).fit(teacher, [torch.randn(200, 8)])
        >>> bool((sim.certificate_.states.gap <= 1e-3).all())
        True
    """

    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        incumbent = Incumbent(problem, self.tol, start)
        spent = 0
        mu, current = torch.zeros_like(problem.energies), incumbent.W.clone()
        while len(rows := incumbent.open) and spent < self.max_steps:
            part, W = problem.take(rows), current[rows]
            q = part.residual_correlations(W)
            price = torch.zeros_like(W)
            price[:, : problem.ball] = mu[rows, None]
            on = ((W != 0) | (q.abs() > problem.penalty + price)).any(0) & (problem.gram.diagonal() > 0)
            _descend(part, W, q, price, on.nonzero()[:, 0].tolist())
            W = part.project(W)
            incumbent.offer(rows, W, part.residual_correlations(W))
            spent += _EPOCHS + newton(incumbent, incumbent.open, _NEWTON_STEPS)
            # Newton's point where it is better; else the passes go on, though what they gain may be below rounding.
            better = incumbent.objective[rows] < part.objective(W, part.residual_correlations(W)) * (1 - 1e-12)
            W = torch.where(better[:, None], incumbent.W[rows], W)
            current[rows] = W
            mu[rows] = multiplier(part, W, part.residual_correlations(W))
        return incumbent.solution(spent)


def _descend(problem: RowProblem, W: Tensor, q: Tensor, price: Tensor, columns: list[int]) -> None:
    """Make passes over ``columns``; ``W`` and ``q`` are changed."""
    gram, penalty = problem.gram, problem.penalty + price
    sizes, bent = gram.diagonal().tolist(), (gram.diagonal() + problem.penalty / problem.knee).tolist()
    for _ in range(_EPOCHS):
        for j in columns:
            old = W[:, j].clone()
            reach = q[:, j] + sizes[j] * old
            new = (reach.abs() - penalty[:, j]).clamp_min_(0) / sizes[j]
            if problem.knee < math.inf:
                new = torch.minimum(new, (reach.abs() - price[:, j]).clamp_min_(0) / bent[j])
            new = torch.copysign(new, reach)
            W[:, j] = new
            q.addr_(new - old, gram[j], alpha=-1)
