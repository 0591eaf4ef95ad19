"""What a row solver is, what it returns, and the best point of each row that every solver keeps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from idl import checks
from idl.sim.elimination import Elimination
from idl.sim.problem import RowProblem, check_problem


@dataclass(frozen=True)
class RowSolution:
    """The best feasible point of each row, and how far it can be from the optimum.

    Attributes:
        W: Weights.
        objective: Objective at ``W``.
        bound: Proved lower bound of the optimum.
        steps: Passes over the rows that were spent.
        support_gap: Where the problem is not convex, the relative gap of each row to the optimum on its support;
            ``objective`` and ``bound`` are then those of the convex relaxation.
        unexplained: Where targets are matched exactly, the part of each one's energy that rounding leaves;
            ``objective`` and ``bound`` are then those of the penalty alone.

    Example:
        >>> RowSolution(torch.ones(1, 2), objective=torch.tensor([2.0]), bound=torch.tensor([1.5]), steps=10).gap
        tensor([0.2500])
    """

    W: Float[Tensor, "rows d"]
    objective: Float[Tensor, " rows"]
    bound: Float[Tensor, " rows"]
    steps: int
    support_gap: Float[Tensor, " rows"] | None = None
    unexplained: Float[Tensor, " rows"] | None = None

    @property
    def gap(self) -> Float[Tensor, " rows"]:
        """Relative gap of each row: the objective is at most this part of itself above the optimum."""
        return relative_gap(self.objective, self.bound)


def relative_gap(objective: Tensor, bound: Tensor) -> Tensor:
    """Return ``(objective - bound) / objective``, 0 where nothing is left to explain."""
    return torch.where(objective > 0, (objective - bound).clamp_min(0) / objective, 0)


@dataclass(frozen=True)
class AbstractRowSolver(ABC):
    """A method for the rows: an immutable value, equal to another with equal fields.

    To add a solver, write a frozen dataclass with ``_solve``, which offers what it finds to an :class:`Incumbent`.

    Args:
        tol: Relative duality gap at which a row is solved; the only test.
        max_steps: Most passes over the rows.

    Raises:
        TypeError, ValueError: If ``tol`` is negative or ``max_steps < 1``.

    Example:
        >>> from idl import SIM
        >>> @dataclass(frozen=True)
        ... class Gradient(AbstractRowSolver):
        ...     def _solve(self, problem, start):
        ...         incumbent = Incumbent(problem, self.tol, start)
        ...         rows, W, step = incumbent.open, incumbent.W, 1 / torch.linalg.eigvalsh(problem.gram)[-1]
        ...         for steps in range(self.max_steps):
        ...             W = problem.prox(W + step * problem.residual_correlations(W), step.reshape(1, 1))
        ...             gaps = incumbent.offer(torch.arange(len(W)), W, problem.residual_correlations(W))
        ...             if bool((gaps <= self.tol).all()):
        ...                 break
        ...         return incumbent.solution(steps)
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> SIM(Gradient(), lam=1e-2).fit(teacher, [torch.randn(200, 8)]).certificate_.feasible
        True
    """

    tol: float = 1e-4
    max_steps: int = 20_000

    keeps_ball: ClassVar[bool] = True
    """Whether every point that is returned is feasible."""

    shrinks: ClassVar[bool] = True
    """Whether its weights are smaller than those of least squares on their support."""

    exact: ClassVar[bool] = False
    """Whether its weights reproduce the targets, for as little penalty as that takes; others trade them for it."""

    def __post_init__(self) -> None:
        checks.non_negative("tol", self.tol)
        checks.positive_integer("max_steps", self.max_steps)

    def planned(
        self, problems: Sequence[RowProblem], teacher_weights: int, spent: int
    ) -> Sequence["AbstractRowSolver"]:
        """Return a solver for each of the problems that make up a model, before any of them is solved.

        Args:
            problems: The problems, in order.
            teacher_weights: Number of weights of the teacher.
            spent: Number of weights that the model has whatever is solved.
        """
        return [self] * len(problems)

    def solve(self, problem: RowProblem, start: Tensor | None = None) -> RowSolution:
        """Return the best point found for each row, always feasible.

        Args:
            problem: The rows.
            start: A point from which to begin, ``(rows, d)``: the solution of a problem like this one.

        Raises:
            TypeError, ValueError: If a number of the problem is out of range or not finite, its tensors do not fit
                each other or are not float64, or ``start`` has another shape.
        """
        check_problem(problem)
        if start is not None and checks.floating_tensor("start", start).shape != problem.correlations.shape:
            raise ValueError(
                f"`start` must have shape {tuple(problem.correlations.shape)}, as `correlations` has; got "
                f"{tuple(start.shape)}."
            )
        if problem.ridge is not None and not self.exact:
            problem = replace(problem, gram=problem.gram + problem.ridge.diag(), ridge=None)
        if not bool(problem.free.any()):
            return self._solve(problem, start)
        elimination = Elimination(problem)
        solution = self._solve(elimination.problem, None if start is None else elimination.restricted(start))
        return replace(solution, W=elimination.recovered(solution.W))

    @abstractmethod
    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        """Do so for a problem whose columns outside the ball all have a penalty."""


class Incumbent:
    """The best feasible point and the best bound of each row so far."""

    def __init__(self, problem: RowProblem, tol: float, start: Tensor | None = None) -> None:
        rows = len(problem.energies)
        self.problem, self.tol = problem, tol
        self.W = torch.zeros_like(problem.correlations)
        self.objective = torch.full_like(problem.energies, torch.inf)
        self.bound = torch.zeros_like(problem.energies)
        everyone = torch.arange(rows, device=problem.gram.device)
        self.offer(everyone, self.W, problem.correlations)
        if start is not None:
            start = problem.project(start.to(self.W))
            self.offer(everyone, start, problem.residual_correlations(start))

    def offer(self, rows: Tensor, W: Tensor, q: Tensor) -> Tensor:
        """Compare feasible points of ``rows`` with what there is; return their relative gaps after that."""
        problem = self.problem.take(rows)
        objective = problem.objective(W, q)
        better = objective < self.objective[rows]
        self.W[rows[better]] = W[better]
        self.objective[rows[better]] = objective[better]
        self.bound[rows] = torch.maximum(self.bound[rows], problem.dual(W, q))
        return relative_gap(self.objective[rows], self.bound[rows])

    @property
    def open(self) -> Tensor:
        """Indices of the rows that are not solved."""
        return (~(relative_gap(self.objective, self.bound) <= self.tol)).nonzero()[:, 0]

    def solution(self, steps: int) -> RowSolution:
        """Return what was found."""
        return RowSolution(self.W, self.objective, self.bound, steps)
