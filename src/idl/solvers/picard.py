"""Picard iteration, plain or damped."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from idl import checks
from idl.solvers.base import AbstractFixedPointSolver, Problem, largest_ratio


class PicardState(NamedTuple):
    """State of :class:`Picard`."""

    x: Tensor
    residual: Tensor
    tolerance: Tensor
    worst: float
    excess: float
    left: float
    """Error over last step, by the geometric series of the measured rate; ``inf`` before that is known."""
    remaining: float | None
    """Applications that the measured rate still needs; ``None`` before it is known, ``inf`` if the steps grow."""
    spent: int
    spare: Tensor | None
    """A buffer for the next burst."""

    @property
    def error(self) -> Tensor:
        """The estimated error of each row."""
        return self.residual * self.left


@dataclass(frozen=True)
class Picard(AbstractFixedPointSolver):
    r"""Iterate :math:`x \leftarrow (1-\alpha)\,x + \alpha f(x)`.

    The distance between two tests is chosen from the contraction rate measured so far, since a test costs about a
    third of a step on a CPU and a synchronisation on a GPU.

    Args:
        atol, rtol, max_steps: See :class:`AbstractFixedPointSolver`.
        damping: :math:`\alpha` in (0, 1]; below 1 it averages, which converges on some maps that do not contract.

    Raises:
        TypeError, ValueError: If an argument is out of range.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.in_half_open_unit("damping", self.damping)

    def init(self, problem: Problem, start: Tensor | None) -> tuple[PicardState, int]:
        """Apply the map once."""
        x = problem.start(start)
        tolerance = self.tolerance(problem, x)
        unknown = torch.full_like(tolerance, math.inf)
        # From zero a linear map's first step is its source, to which the tolerance is relative: known without a look.
        worst = 1 / self.rtol if problem.linear and start is None and self.rtol else math.inf
        return PicardState(x, unknown, tolerance, worst, math.inf, math.inf, None, 1, None), 1

    def step(self, problem: Problem, state: PicardState, budget: int) -> tuple[PicardState, int]:
        """Apply the map as often as is expected to be needed, at most as often as until now, then test."""
        if state.remaining is None:
            steps = 3 if state.spent == 1 else 2  # a rate is seen after the second test
        else:
            steps = int(min(max(state.remaining, 1), max(state.spent, 4), 64))
        steps = min(steps, budget)
        x, residual, spare = self._apply(problem, state, steps)
        worst = largest_ratio(residual, state.tolerance)
        rate = _rate(state, residual, worst, steps)
        left = math.inf if rate is None or rate >= 1 else rate / (1 - rate)
        # The steps of a linear map tell its error; those of another may hide a slow part, so they have to pass as well.
        excess = worst * (left if problem.linear else max(1.0, left)) if worst else 0.0
        remaining = None if rate is None else _steps_until_done(excess, rate)
        spent = state.spent + steps
        return PicardState(x, residual, state.tolerance, worst, excess, left, remaining, spent, spare), steps

    def _apply(self, problem: Problem, state: PicardState, steps: int) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.damping == 1:
            x, previous = problem.iterate(state.x, steps, state.spare)
            if steps == 1:  # then the previous iterate is still somebody's
                return x, problem.distance(x, previous), None
            return x, problem.distance_over(x, previous), previous
        x = state.x
        for _ in range(steps):
            image = problem(x)
            residual = problem.distance(image, x)
            x = torch.lerp(x, image, self.damping)
        return x, residual, None


def _rate(state: PicardState, residual: Tensor, worst: float, steps: int) -> float | None:
    """Return the contraction a step over the last ``steps`` steps, of the slowest row; ``None`` before it is known."""
    before = state.worst
    if worst == 0:
        return 0.0
    if before == math.inf and math.isfinite(worst):
        return None
    if not (math.isfinite(worst) and math.isfinite(before)):
        finite = residual.isfinite() & state.residual.isfinite()  # a lost sample must not slow the others down
        if not bool(finite.any()):
            return None
        worst = largest_ratio(residual[finite], state.tolerance[finite])
        before = largest_ratio(state.residual[finite], state.tolerance[finite])
    return float((worst / before) ** (1 / steps)) if before > 0 else 0.0


def _steps_until_done(excess: float, rate: float) -> float:
    """Return the steps after which the residual and the estimated error are within the tolerance."""
    if rate >= 1 or not math.isfinite(excess):
        return math.inf
    return float(max(1, math.ceil(math.log(excess) / -math.log(rate)))) if excess > 1 and rate > 0 else 1.0
