"""Cyclic coordinate descent on working sets, for all rows at once."""

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

    with :math:`S` the soft threshold and :math:`\mu` the multiplier, for the columns in the ball. Passes go over the
    columns that are on, or violate optimality, in some row. After a few of them Newton steps on the supports set the
    multiplier and finish what is nearly there. Fast where few columns are on; a pass costs ``O(k d)`` a row for ``k``
    columns, and a Python loop over them, since each column needs the one before it.
    """

    def solve(self, problem: RowProblem, start: Tensor | None = None) -> RowSolution:
        """Return the best point found for each row; see :class:`AbstractRowSolver`."""
        incumbent = Incumbent(problem, self.tol, start)
        spent = 0
        mu, current = torch.zeros_like(problem.energies), incumbent.W.clone()
        while len(rows := incumbent.open) and spent < self.max_steps:
            part, W = problem.take(rows), current[rows]
            q = part.residual_correlations(W)
            penalty = problem.penalty.expand_as(W).clone()
            penalty[:, : problem.ball] += mu[rows, None]
            on = ((W != 0) | (q.abs() > penalty)).any(0) & (problem.gram.diagonal() > 0)
            _descend(problem.gram, W, q, penalty, on.nonzero()[:, 0].tolist())
            W = part.project(W)
            incumbent.offer(rows, W, part.residual_correlations(W))
            spent += _EPOCHS + newton(incumbent, incumbent.open, _NEWTON_STEPS)
            # Newton's point where it is better; else the passes go on, though what they gain may be below rounding.
            better = incumbent.objective[rows] < part.objective(W, part.residual_correlations(W)) * (1 - 1e-12)
            W = torch.where(better[:, None], incumbent.W[rows], W)
            current[rows] = W
            mu[rows] = multiplier(part, W, part.residual_correlations(W))
        return incumbent.solution(spent)


def _descend(gram: Tensor, W: Tensor, q: Tensor, penalty: Tensor, columns: list[int]) -> None:
    """Make passes over ``columns``; ``W`` and ``q`` are changed."""
    sizes = gram.diagonal().tolist()
    for _ in range(_EPOCHS):
        for j in columns:
            old = W[:, j].clone()
            reach = q[:, j] + sizes[j] * old
            new = torch.copysign((reach.abs() - penalty[:, j]).clamp_min_(0) / sizes[j], reach)
            W[:, j] = new
            q.addr_(new - old, gram[j], alpha=-1)
