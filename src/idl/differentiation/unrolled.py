"""Gradients through the iterations themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idl import checks
from idl.differentiation.base import AbstractAdjoint, FailureReport
from idl.differentiation.implicit import solve
from idl.maps.base import Parameters, ParametricMap
from idl.solvers.base import AbstractFixedPointSolver, Problem, State, largest_ratio


@dataclass(frozen=True)
class UnrolledAdjoint(AbstractAdjoint):
    """Apply the map ``steps`` times from the start and let autograd record it: the oracle of the tests.

    Memory grows with ``steps``. Of the forward solver only the tolerance is used, which decides what is reported as
    converged: a recorded iteration has a fixed length, so that it means the same under every transformation.

    Args:
        steps: Number of applications.

    Raises:
        TypeError, ValueError: If ``steps < 1``.

    Example:
        >>> from idl import fixed_point
        >>> w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> solution = fixed_point(lambda x: w * x + 1, torch.zeros_like(w), adjoint=UnrolledAdjoint(steps=40))
        >>> solution.x.backward()
        >>> w.grad
        tensor(4.0000, dtype=torch.float64)
    """

    steps: int = 100

    def __post_init__(self) -> None:
        checks.positive_integer("steps", self.steps)

    def fixed_point(
        self,
        parametric: ParametricMap,
        solver: AbstractFixedPointSolver,
        x0: Tensor | None,
        parameters: Parameters,
        report: FailureReport,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last iterate with its recorded gradient; see :class:`AbstractAdjoint`."""
        function = parametric.function(parameters)
        x = torch.zeros_like(parameters[0]) if x0 is None else x0.detach()
        for _ in range(self.steps):
            x = function(x)
        look = UnrolledIteration(solver.atol, solver.rtol, self.steps)
        _, steps, converged = solve(parametric, look, x, parameters, report)
        return x, steps, converged


@dataclass(frozen=True)
class UnrolledIteration(AbstractFixedPointSolver):
    """Stands for the recorded steps: leaves ``x`` where they led and measures its residual."""

    def init(self, problem: Problem, x: Tensor | None) -> tuple[State, int]:
        """Measure the residual at ``x``."""
        if x is None:
            raise TypeError("UnrolledIteration measures where recorded steps led; got no such point.")
        residual = problem.distance(problem(x), x)
        tolerance = self.tolerance(problem, x)
        worst = largest_ratio(residual, tolerance)
        return State(x, residual, residual, tolerance, worst, worst <= 1), self.max_steps

    def step(self, problem: Problem, state: State, budget: int) -> tuple[State, int]:
        """Return the state as it is."""
        return state, budget
