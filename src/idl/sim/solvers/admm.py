"""The alternating direction method of multipliers, for all rows at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.base import AbstractRowSolver, Incumbent, RowSolution

_INTERVAL = 20  # steps between two tests; a test costs about as much as a step
_RELAXATION = 1.7  # over-relaxation between 1.5 and 1.8 is what Boyd et al. (2011, section 3.4.3) advise
_ADAPT_UNTIL = 2000  # steps after which the step sizes stay, so that convergence is proved


@dataclass(frozen=True)
class ADMM(AbstractRowSolver):
    r"""Split each row into a smooth copy and a sparse, feasible one (Boyd et al. 2011, section 6.4, with a ball).

    .. math::
        w &\leftarrow (G + \rho I)^{-1} (h + \rho (v - u)) \\
        v &\leftarrow \mathrm{prox}_{1/\rho}(\alpha w + (1 - \alpha) v + u) \\
        u &\leftarrow u + \alpha w + (1 - \alpha) v_{old} - v

    ``v`` is what is returned: exactly sparse and inside the ball. One eigendecomposition of ``G``, ``O(d^3)``, serves
    every row and each row's own ``rho``; a step costs ``O(d^2)`` a row. Solved rows are left out.

    Args:
        tol, max_steps: See :class:`AbstractRowSolver`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> sim = SIM(ADMM(tol=1e-3), lam=1e-2).fit(teacher, [torch.randn(200, 8)])
        >>> bool((sim.certificate_.states.gap <= 1e-3).all())
        True
    """

    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        incumbent = Incumbent(problem, self.tol, start)
        splitting = Splitting(problem, incumbent.W)
        steps = splitting.run(incumbent, incumbent.open, self.tol, self.max_steps)
        return incumbent.solution(steps)


class Splitting:
    """The iteration of :class:`ADMM`, which can be halted and continued.

    In float32 a step takes half the time and leads as far as supports; what is offered is tested in float64 always.
    """

    def __init__(self, problem: RowProblem, start: Tensor) -> None:
        self.problem = problem
        eigenvalues, self.basis = torch.linalg.eigh(problem.gram)
        self.eigenvalues = eigenvalues.clamp_min_(0)
        self.rotated = problem.correlations @ self.basis
        d = len(eigenvalues)
        typical = float(eigenvalues[d // 2 :].mean()) if d else 1.0
        self.rho = torch.full_like(problem.energies, 0.1 * typical or 1.0)[:, None]
        self.v = start.clone()
        # At the optimum rho u is the correlation of the columns with the residual.
        self.u = problem.residual_correlations(start) / self.rho if bool(start.any()) else torch.zeros_like(start)
        self.steps = 0

    def run(
        self, incumbent: Incumbent, rows: Tensor, until: float, max_steps: int, dtype: torch.dtype = torch.float64
    ) -> int:
        """Step until the relative gap of each of ``rows`` is at most ``until``; return the steps that took."""
        problem = self.problem.take(rows)
        basis, eigenvalues = self.basis.to(dtype), self.eigenvalues.to(dtype)
        rotated, v, u, rho = (part[rows].to(dtype) for part in (self.rotated, self.v, self.u, self.rho))
        spent = 0
        while len(rows) and spent < max_steps:
            for _ in range(min(_INTERVAL, max_steps - spent)):
                w = ((rotated + rho * ((v - u) @ basis)) / (eigenvalues + rho)) @ basis.T
                mixed = torch.lerp(v, w, _RELAXATION) + u
                before, v = v, problem.prox(mixed, 1 / rho)
                u = mixed - v
                spent += 1
            W = v.double() if dtype == torch.float64 else problem.project(v.double())
            gap = incumbent.offer(rows, W, problem.residual_correlations(W))
            if self.steps + spent <= _ADAPT_UNTIL:
                size = torch.maximum(_length(w), _length(v))
                factor = balance(_length(w - v), size, _length(rho * (v - before)), _length(rho * u))
                rho, u = rho * factor, u / factor
            self.v[rows], self.u[rows], self.rho[rows] = v.double(), u.double(), rho.double()
            going = gap > until
            if not bool(going.all()):
                rows, v, u, rho, rotated = rows[going], v[going], u[going], rho[going], rotated[going]
                problem = self.problem.take(rows)
        self.steps += spent
        return spent


def balance(primal: Tensor, primal_size: Tensor, dual: Tensor, dual_size: Tensor) -> Tensor:
    """Return the factor for ``rho`` that brings relative residuals together (Boyd et al. 2011, section 3.4.1)."""
    tiny = torch.finfo(primal.dtype).tiny
    ratio = primal / primal_size.clamp_min(tiny) / (dual / dual_size.clamp_min(tiny)).clamp_min(tiny)
    factor = ratio.sqrt().clamp(0.2, 5)
    return torch.where((factor > 1.5) | (factor < 0.67), factor, 1)


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)
