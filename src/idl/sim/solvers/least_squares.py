"""Plain least squares: no penalty, no ball, and nothing guaranteed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.base import AbstractRowSolver, RowSolution


@dataclass(frozen=True)
class LeastSquares(AbstractRowSolver):
    """Minimise the smooth part alone, by the smallest ``w`` that does.

    The rows are dense and may leave the ball, so that the model may have no equilibrium: its function is then
    :class:`~idl.ImplicitFunction`, which reports what does not converge. Nothing is proved, and the certificate names
    every row. It shows what ball and penalty cost.
    """

    keeps_ball = False

    def solve(self, problem: RowProblem, start: Tensor | None = None) -> RowSolution:
        """Return the least-squares solution of each row; the start is not used."""
        eigenvalues, basis = torch.linalg.eigh(problem.gram)
        smallest = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().amax(dim=0)
        inverse = torch.where(eigenvalues > smallest, 1 / eigenvalues, 0)
        W = ((problem.correlations @ basis) * inverse) @ basis.T
        objective = problem.objective(W, problem.residual_correlations(W))
        return RowSolution(W, objective, torch.zeros_like(objective), 1)
