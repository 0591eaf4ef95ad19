"""A general convex solver in the same place, slow and independent: cvxpy with CLARABEL."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.base import AbstractRowSolver, Incumbent, RowSolution


@dataclass(frozen=True)
class CVX(AbstractRowSolver):
    """Solve one row after the other by cvxpy and its interior-point solver CLARABEL, on the CPU.

    Nearly a second a row of 900 columns. The interior point is finished by one proximal step, which makes its zeros
    exact. The start is not used.

    Args:
        tol: See :class:`AbstractRowSolver`.
        max_steps: Most iterations of the interior point for a row.

    Raises:
        ImportError: When it is run without cvxpy; install ``implicit-deep-learning[cvx]``.

    Example:
        >>> from idl import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> sim = SIM(CVX(tol=1e-6), lam=1e-2).fit(teacher, [torch.randn(200, 8)])
        >>> bool((sim.certificate_.states.gap <= 1e-6).all())
        True
    """

    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        incumbent = Incumbent(problem, self.tol)
        if not len(incumbent.open):
            return incumbent.solution(0)
        eigenvalues, basis = torch.linalg.eigh(problem.gram)
        # |F w|^2 = w^T G w; rows of F that are rounding are left out.
        kept = eigenvalues > len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.amax()
        root = (basis[:, kept] * eigenvalues[kept].sqrt()).T
        program = _Program(problem, root, self.max_steps)
        step = 1 / eigenvalues.amax().clamp_min(torch.finfo(torch.float64).tiny)
        for i in incumbent.open.tolist():
            row = torch.tensor([i], device=problem.gram.device)
            part = problem.take(row)
            w = program.solution(problem.correlations[i]).to(problem.gram)[None]
            w = part.prox(w + step * part.residual_correlations(w), step.reshape(1, 1))
            incumbent.offer(row, w, part.residual_correlations(w))
        return incumbent.solution(len(problem.energies))


class _Program:
    """The convex program of one row, compiled once: only the correlations change."""

    def __init__(self, problem: RowProblem, root: Tensor, max_steps: int) -> None:
        self.cp = cvxpy_or_advice("CVX")
        cp, d = self.cp, len(problem.penalty)
        self.w, self.h = cp.Variable(d), cp.Parameter(d)
        fit = 0.5 * cp.sum_squares(root.cpu().numpy() @ self.w) - self.h @ self.w
        cost = fit + _penalty(problem, self.w)
        ball = [cp.norm1(self.w[: problem.ball]) <= problem.radius] if problem.ball else []
        self.program = cp.Problem(cp.Minimize(cost), ball)
        # Far below the gap that is asked: what remains is small beside the objective, not beside the data.
        self.options = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-10, "tol_feas": 1e-12, "max_iter": max_steps}

    def solution(self, correlations: Tensor) -> Tensor:
        self.h.value = correlations.cpu().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it may be inaccurate, which the certificate says
            self.program.solve(solver=self.cp.CLARABEL, **self.options)
        return torch.as_tensor(self.w.value)


def _penalty(problem: RowProblem, w: Any) -> Any:
    cp, weights = cvxpy_or_advice("CVX"), problem.penalty.cpu().numpy()
    cost = cp.norm1(cp.multiply(weights, w))
    if problem.knee < math.inf:
        cost += weights @ cp.square(cp.pos(cp.abs(w) - problem.knee)) / (2 * problem.knee)
    return cost


def cvxpy_or_advice(solver: str) -> Any:
    """Return the module cvxpy, which is an extra, or say how ``solver`` gets it."""
    try:
        import cvxpy
    except ImportError as error:
        raise ImportError(f"the solver {solver} needs cvxpy; pip install 'implicit-deep-learning[cvx]'.") from error
    return cvxpy
