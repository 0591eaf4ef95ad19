"""Exact solution of triangular maps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idl.solvers.base import AbstractFixedPointSolver, Problem, State


@dataclass(frozen=True)
class BackSubstitution(AbstractFixedPointSolver):
    """Solve a strictly triangular map unit by unit, in blocks: exact, in the cost of one application.

    A start is not needed.

    Args:
        atol, rtol, max_steps: Not used; see :class:`AbstractFixedPointSolver`.

    Raises:
        TypeError: When it is run on a map that is not triangular.

    Example:
        >>> from idl import ImplicitFunctionTriu
        >>> A = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> ImplicitFunctionTriu()(A, B=torch.eye(2), u=torch.ones(1, 2))
        tensor([[3., 1.]])
    """

    def init(self, problem: Problem, x: Tensor | None) -> tuple[State, int]:
        """Substitute."""
        x = problem.substitute(x)
        if x is None:
            raise TypeError(
                "BackSubstitution needs a strictly triangular state matrix; "
                "use ImplicitFunctionTriu, or another solver such as Adaptive()."
            )
        zero = torch.zeros_like(x[:, 0])
        residual = torch.where(x.isfinite().all(1), zero, torch.nan)
        lost = float(residual.sum())  # 0, or nan if some row is
        return State(x, residual, residual, zero, lost, lost == 0), 1

    def step(self, problem: Problem, state: State, budget: int) -> tuple[State, int]:
        """Return the solution as it is."""
        return state, 0
