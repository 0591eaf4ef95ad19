"""Plain least squares: no penalty, no ball, and nothing guaranteed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.base import AbstractRowSolver, RowSolution


@dataclass(frozen=True)
class LeastSquares(AbstractRowSolver):
    """Minimise the smooth part alone, by the smallest ``w`` that does; free columns come after the others.

    The rows are dense and may leave the ball, so that the model may have no equilibrium: its function is then
    :class:`~idl.ImplicitFunction`, which reports what does not converge. Nothing is proved, and the certificate names
    every row. It shows what ball and penalty cost. The start is not used.

    Args:
        tol, max_steps: Not used; see :class:`AbstractRowSolver`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> sim = SIM(LeastSquares(), debias=False).fit(teacher, [torch.randn(200, 8)])
        >>> sim.model_.f.contraction is None  # nothing is proved
        True
    """

    keeps_ball = False
    shrinks = False

    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        W = problem.correlations @ torch.linalg.pinv(problem.gram, hermitian=True)
        objective = problem.objective(W, problem.residual_correlations(W))
        return RowSolution(W, objective, torch.zeros_like(objective), 1)
