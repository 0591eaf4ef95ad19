"""What an adjoint is, and the one report of a failed solve."""

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from torch import Tensor

from idl import checks
from idl.errors import ConvergenceError, ConvergenceWarning
from idl.maps.base import Parameters, ParametricMap
from idl.solvers.base import AbstractFixedPointSolver, Problem
from idl.solvers.iterate import Iterate

OnFailure = Literal["raise", "warn", "ignore"]


@dataclass(frozen=True)
class FailureReport:
    """What happens when some sample did not converge.

    Args:
        on_failure: Raise :class:`~idl.errors.ConvergenceError`, warn once, or neither.
        advice: Returns what the caller knows of the cause and what to try; called only on failure.
    """

    on_failure: OnFailure = "warn"
    advice: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        checks.one_of("on_failure", self.on_failure, ("raise", "warn", "ignore"))

    def __call__(self, result: Iterate, solver: AbstractFixedPointSolver, problem: Problem, subject: str) -> None:
        """Report ``result`` if not all of its rows converged; ``subject`` says what was solved for."""
        if result.all_converged or self.on_failure == "ignore":
            return
        failed = ~result.converged
        residual = problem.distance(problem(result.x), result.x)[failed]
        finite = residual[residual.isfinite()]
        size = f"residual up to {float(finite.max()):.1e}" if len(finite) else "no finite value"
        # Small steps that do not shrink may have a long way to go.
        beside = ">" if not len(finite) or float(finite.max()) > solver.atol else "and a larger estimated error,"
        lost = int((~result.x.isfinite()).any(1).sum())
        message = (
            f"{type(solver).__name__} stopped after {int(result.steps.max())} steps: {self._counted(failed)} of the "
            f"{subject} have not converged; {size} {beside} atol={solver.atol:g}"
            + (f", rtol={solver.rtol:g}" if solver.rtol else "")
            + (f"; {lost} of them are NaN (is the input finite?)" if lost else "")
            + "."
            + (f"\n    {self.advice()}" if self.advice is not None and subject == "equilibrium" and len(finite) else "")
        )
        if self.on_failure == "raise":
            raise ConvergenceError(message)
        warnings.warn(message, ConvergenceWarning, stacklevel=_level_of_the_caller(sys._getframe()))

    def _counted(self, failed: Tensor) -> str:
        """Return how many of the rows failed, in words."""
        return f"{int(failed.sum())} of {len(failed)} samples"


_BETWEEN = ("idl", "torch", "jaxtyping", "beartype")  # the last two check annotations, if they are asked to


def _level_of_the_caller(frame: FrameType) -> int:
    """Return the ``stacklevel``, in ``frame``, of the line of the user's that asked for the solve."""
    level = 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    return level


class AbstractAdjoint(ABC):
    """A rule that gives gradients to the parameters of a fixed point.

    To add a rule, write a class with :meth:`fixed_point`.

    Example:
        >>> import torch
        >>> from idl import UnrolledAdjoint, fixed_point
        >>> class Stopped(AbstractAdjoint):
        ...     def fixed_point(self, parametric, solver, x0, parameters, report):
        ...         x, *rest = UnrolledAdjoint().fixed_point(parametric, solver, x0, parameters, report)
        ...         return x.detach(), *rest
        >>> w = torch.tensor(0.5, requires_grad=True)
        >>> fixed_point(lambda x: w * x + 1, torch.zeros(()), adjoint=Stopped()).x.requires_grad
        False
    """

    @abstractmethod
    def fixed_point(
        self,
        parametric: ParametricMap,
        solver: AbstractFixedPointSolver,
        x0: Tensor | None,
        parameters: Parameters,
        report: FailureReport,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fixed point ``(rows, n)`` with its gradient attached, and steps and convergence of each row.

        Args:
            parametric: The map.
            solver: Method of the forward solve.
            x0: Start, ``(rows, n)``, ``None`` for zeros; carries no gradient.
            parameters: Parameters of the map.
            report: What to do about rows that do not converge.
        """


def check_methods(solver: object, adjoint: object) -> None:
    """Check that a solver and an adjoint are such."""
    checks.instance("solver", solver, AbstractFixedPointSolver, "Try Adaptive().")
    checks.instance("adjoint", adjoint, AbstractAdjoint, "Try ImplicitAdjoint().")
