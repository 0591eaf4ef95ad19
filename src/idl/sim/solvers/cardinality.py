"""A bound on the number of weights instead of a penalty on their size."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from idl import checks
from idl.sim.elimination import Elimination
from idl.sim.problem import RowProblem
from idl.sim.solvers.base import AbstractRowSolver, RowSolution
from idl.sim.solvers.debias import debias
from idl.sim.solvers.hybrid import Hybrid

_STEPS, _GROWTH = 200, 1.03  # slower growth finds little more, faster growth loses a tenth of a point of accuracy
_FIRST_RHO = 0.003  # part of the mean eigenvalue: nearly least squares, so that columns compete before any is cut


@dataclass(frozen=True)
class Cardinality(AbstractRowSolver):
    r"""Keep so many weights, whatever their size.

    .. math:: \min_w \tfrac12 w^T G w - h^T w \quad \text{s.t.} \quad |w|_0 \le k, \quad |a|_1 \le \kappa

    ADMM whose proximal step keeps the ``k`` largest entries and whose ``rho`` grows (Boyd et al. 2011, section 9.1.1),
    so that the support settles, then least squares on it. No weight is shrunk, which is what costs the l1 penalty its
    accuracy where few weights are kept. Rows are compared in units of their own energy.

    The problem is not convex, and the support that is found is not proved to be the best. What the solution proves is
    stated as such: ``support_gap`` is the gap to the optimum on this support; ``objective`` and ``bound`` are those of
    the l1 relaxation with the problem's penalty, whose optimum no point of at most this l1 norm can beat.

    Weights compete by their size: columns should have comparable units. Of columns that are the same all are kept or
    none. Columns without a penalty outside the ball are kept and not counted.

    Args:
        tol, max_steps: See :class:`AbstractRowSolver`.
        keep: Most weights to keep; with ``per="all"`` also the part of the teacher's number of weights, in (0, 1).
            What carries the constants of a teacher with biases counts, and is kept even where that is more.
        per: Whether ``keep`` counts the weights of each row, of each matrix (``[A B]`` and ``[C D]``, or each layer's
            if these are fitted one after the other), or of all together. These are then shared out by what a weight
            explains, with each matrix counting as much as another.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import SIM
        >>> layers = torch.nn.Linear(8, 6, bias=False), torch.nn.ReLU(), torch.nn.Linear(6, 3, bias=False)
        >>> teacher = torch.nn.Sequential(*layers)
        >>> SIM(Cardinality(keep=20)).fit(teacher, [torch.randn(200, 8)]).certificate_.weights_kept.total
        20
    """

    keep: int | float = field(kw_only=True)
    per: Literal["row", "matrix", "all"] = field(default="all", kw_only=True)

    shrinks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("per", self.per, ("row", "matrix", "all"))
        if isinstance(self.keep, float) and self.per == "all":
            checks.in_open_unit("keep", self.keep)
        else:
            checks.non_negative_integer("keep", self.keep)

    def planned(self, problems: Sequence[RowProblem], teacher_weights: int, spent: int) -> Sequence[AbstractRowSolver]:
        """Return a solver for each problem, with the weights shared out between them."""
        if self.per != "all":
            return [self] * len(problems)
        problems = [Elimination(problem).problem if bool(problem.free.any()) else problem for problem in problems]
        budget = int(self.keep * teacher_weights if isinstance(self.keep, float) else self.keep)
        budget = min(max(budget - spent, 0), sum(problem.correlations.numel() for problem in problems))
        kept = [int(part.count_nonzero()) for part in _sparse(problems, budget, per_row=False)]
        return [replace(self, keep=count, per="matrix") for count in kept]

    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        if isinstance(self.keep, float):
            raise ValueError(f"`keep` must be a number of weights to solve a single problem; got {self.keep!r}.")
        (W,) = _sparse([problem], self.keep, per_row=self.per == "row")
        best = debias(problem, W)
        relaxation = Hybrid(self.tol, self.max_steps).solve(problem, best.W)
        objective = problem.objective(best.W, problem.residual_correlations(best.W))
        return RowSolution(best.W, objective, relaxation.bound, _STEPS + relaxation.steps, best.gap)


def _sparse(problems: Sequence[RowProblem], keep: int, per_row: bool) -> list[Tensor]:
    """Return feasible points with at most ``keep`` weights a row, or in all problems together."""
    searches = [_Search(problem) for problem in problems]
    for _ in range(_STEPS):
        sizes = [search.step() for search in searches]
        if per_row:
            cuts = [_cut(part, keep) for part in sizes]
        else:
            cuts = [_cut(torch.cat([part.flatten() for part in sizes]), keep)] * len(sizes)
        for search, part, cut in zip(searches, sizes, cuts, strict=True):
            search.keep(part > cut)
    return [search.problem.project(search.v.double()) for search in searches]


def _cut(sizes: Tensor, keep: int) -> Tensor:
    """Return the largest size that is not among the ``keep`` first, along the last dimension; at least 0."""
    width = sizes.shape[-1]
    if keep >= width:
        return sizes.new_zeros(())
    return sizes.kthvalue(width - keep, dim=-1, keepdim=sizes.dim() > 1).values


class _Search:
    """ADMM between least squares and what is kept, in float32: only a support is looked for."""

    def __init__(self, problem: RowProblem) -> None:
        eigenvalues, basis = torch.linalg.eigh(problem.gram)
        eigenvalues = eigenvalues.clamp_min(0)
        self.problem = problem
        self.rho = _FIRST_RHO * float(eigenvalues.mean()) or 1.0
        self.eigenvalues, self.basis = eigenvalues.float(), basis.float()
        self.rotated = (problem.correlations @ basis).float()
        # Of each row the part of its energy that a weight moves, and of each problem the mean of its rows. Of a row
        # without energy the correlations are rounding.
        unit = torch.where(problem.energies > 0, (len(problem.energies) * problem.energies).rsqrt(), 0)
        self.unit = unit.float()[:, None]
        self.v = torch.zeros_like(self.rotated)
        self.u, self.mixed = torch.zeros_like(self.v), self.v

    def step(self) -> Tensor:
        """Take the smooth half of a step; return the sizes by which entries are to be compared."""
        rho = self.rho
        w = ((self.rotated + rho * ((self.v - self.u) @ self.basis)) / (self.eigenvalues + rho)) @ self.basis.T
        self.mixed = w + self.u
        return self.mixed.abs() * self.unit

    def keep(self, kept: Tensor) -> None:
        """Take the other half: entries that are not kept become zero, and rows are brought into the ball."""
        self.v = self.problem.project(torch.where(kept, self.mixed, 0))
        self.u = (self.mixed - self.v) / _GROWTH
        self.rho *= _GROWTH
