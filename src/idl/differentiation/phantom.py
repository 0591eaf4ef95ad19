"""Truncated gradients: a few recorded steps at the fixed point."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idl import checks
from idl.differentiation.base import AbstractAdjoint, FailureReport
from idl.differentiation.implicit import solve
from idl.maps.base import Parameters, ParametricMap
from idl.solvers.base import AbstractFixedPointSolver


@dataclass(frozen=True)
class PhantomAdjoint(AbstractAdjoint):
    r"""Solve without a gradient, then record ``steps`` damped applications of the map (Geng et al. 2021).

    The gradient is the Neumann series of the implicit one cut after ``steps`` terms:
    :math:`\alpha \sum_{k<\mathrm{steps}} (\alpha J + (1-\alpha) I)^k\, \partial f/\partial\theta`. It is not exact;
    its error shrinks like the contraction to the power ``steps``. Memory grows with ``steps``.

    Args:
        steps: Number of recorded applications.
        damping: :math:`\alpha` in (0, 1].

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import fixed_point
        >>> w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> solution = fixed_point(lambda x: w * x + 1, torch.zeros_like(w), adjoint=PhantomAdjoint(steps=2))
        >>> solution.x.backward()  # 2 * (1 + .5), where the exact gradient is 4
        >>> w.grad
        tensor(3.0000, dtype=torch.float64)
    """

    steps: int = 5
    damping: float = 1.0

    def __post_init__(self) -> None:
        checks.positive_integer("steps", self.steps)
        checks.in_half_open_unit("damping", self.damping)

    def fixed_point(
        self,
        parametric: ParametricMap,
        solver: AbstractFixedPointSolver,
        x0: Tensor | None,
        parameters: Parameters,
        report: FailureReport,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fixed point with its truncated gradient; see :class:`AbstractAdjoint`."""
        x, steps, converged = solve(parametric, solver, x0, parameters, report)
        function = parametric.function(parameters)
        for _ in range(self.steps):
            x = torch.lerp(x, function(x), self.damping)
        return x, steps, converged
