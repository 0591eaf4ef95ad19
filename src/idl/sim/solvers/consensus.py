"""The three-block consensus form of ADMM that the literature on state-driven models uses."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.admm import balance
from idl.sim.solvers.base import AbstractRowSolver, Incumbent, RowSolution

_INTERVAL = 10  # steps between two tests
_ADAPT_UNTIL = 2000  # steps after which rho stays, so that convergence is proved


@dataclass(frozen=True)
class ConsensusADMM(AbstractRowSolver):
    r"""Split each row into a smooth, a sparse and a feasible copy that must agree (Boyd et al. 2011, section 7.1).

    .. math::
        w_1 &\leftarrow (G + \rho I)^{-1} (h + \rho (\bar w - u_1)), \quad
        w_2 \leftarrow S_{p/\rho}(\bar w - u_2), \quad
        w_3 \leftarrow \Pi_{ball}(\bar w - u_3) \\
        \bar w &\leftarrow (w_1 + w_2 + w_3) / 3, \qquad u_i \leftarrow u_i + w_i - \bar w

    Returned is the sparse copy, projected: exactly sparse and feasible, where the mean is neither. It needs more steps
    than the two-block :class:`~idl.sim.solvers.ADMM` and is here to be compared with.

    Args:
        tol, max_steps: See :class:`AbstractRowSolver`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> sim = SIM(ConsensusADMM(tol=1e-3), lam=1e-2).fit(teacher, [torch.randn(200, 8)])
        >>> bool((sim.certificate_.states.gap <= 1e-3).all())
        True
    """

    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        incumbent = Incumbent(problem, self.tol, start)
        rows = incumbent.open
        eigenvalues, basis = torch.linalg.eigh(problem.gram)
        eigenvalues = eigenvalues.clamp_min(0)
        rotated = problem.correlations[rows] @ basis
        typical = float(eigenvalues.mean()) if len(eigenvalues) else 1.0
        rho = torch.full_like(problem.energies[rows], typical or 1.0)[:, None]
        threshold, ball = replace(problem, ball=0), replace(problem, penalty=torch.zeros_like(problem.penalty))
        part, mean = problem.take(rows), incumbent.W[rows]
        duals = torch.zeros(3, *mean.shape, dtype=mean.dtype, device=mean.device)
        spent = 0
        while len(rows) and spent < self.max_steps:
            smooth = ((rotated + rho * ((mean - duals[0]) @ basis)) / (eigenvalues + rho)) @ basis.T
            sparse = threshold.prox(mean - duals[1], 1 / rho)
            feasible = ball.project(mean - duals[2])
            copies = torch.stack((smooth, sparse, feasible))
            before, mean = mean, copies.mean(0)
            duals += copies - mean
            spent += 1
            if spent % _INTERVAL == 0 or spent == self.max_steps:
                W = part.project(sparse)
                going = incumbent.offer(rows, W, part.residual_correlations(W)) > self.tol
                if spent <= _ADAPT_UNTIL:
                    apart, moved = _length(copies - mean), 3**0.5 * rho * _length((mean - before)[None])
                    factor = balance(apart, _length(copies), moved, rho * _length(duals))
                    rho, duals = rho * factor, duals / factor
                if not bool(going.all()):
                    rows, mean, duals, rho, rotated = (
                        rows[going],
                        mean[going],
                        duals[:, going],
                        rho[going],
                        rotated[going],
                    )
                    part = problem.take(rows)
        return incumbent.solution(spent)


def _length(copies: Tensor) -> Tensor:
    """Return the length of each row over all copies."""
    return copies.square().sum((0, 2))[:, None].sqrt()
