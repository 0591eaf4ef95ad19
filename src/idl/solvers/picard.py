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
    error: Tensor
    tolerance: Tensor
    worst: float
    excess: float
    remaining: float | None
    """Applications that the measured contraction still needs; ``None`` before it was measured, ``inf`` if it grows."""
    spent: int


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

    def init(self, problem: Problem, x: Tensor | None) -> tuple[PicardState, int]:
        """Apply the map once."""
        x = problem.start(x)
        tolerance = self.tolerance(problem, x)
        unknown = torch.full_like(tolerance, math.inf)
        return PicardState(x, unknown, unknown, tolerance, math.inf, math.inf, None, 1), 1

    def step(self, problem: Problem, state: PicardState, budget: int) -> tuple[PicardState, int]:
        """Apply the map as often as is expected to be needed, at most as often as until now, then test."""
        if state.remaining is None:
            steps = 3 if state.spent == 1 else 2  # a rate is seen after the second test
        else:
            steps = int(min(max(state.remaining, 1), max(state.spent, 4), 64))
        steps = min(steps, budget)
        x, residual = self._apply(problem, state.x, steps)
        worst = largest_ratio(residual, state.tolerance)
        spent = state.spent + steps
        if state.worst == math.inf and worst > 0:
            unknown = torch.full_like(residual, math.inf)
            return PicardState(x, residual, unknown, state.tolerance, worst, math.inf, None, spent), steps
        rate = _rate(state, residual, worst, steps)
        left = rate / (1 - rate) if rate < 1 else math.inf  # error over last step, by the geometric series
        remaining = _steps_until_done(worst, rate)
        excess = worst * max(1.0, left)
        return PicardState(x, residual, residual * left, state.tolerance, worst, excess, remaining, spent), steps

    def _apply(self, problem: Problem, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        if self.damping == 1:
            x, previous = problem.iterate(x, steps)
            return x, problem.distance(x, previous)
        for _ in range(steps):
            image = problem(x)
            residual = problem.distance(image, x)
            x = torch.lerp(x, image, self.damping)
        return x, residual


def _rate(state: PicardState, residual: Tensor, worst: float, steps: int) -> float:
    """Return the contraction a step over the last ``steps`` steps, of the slowest row."""
    before = state.worst
    if not (math.isfinite(worst) and math.isfinite(before)):
        finite = residual.isfinite() & state.residual.isfinite()  # a lost sample must not slow the others down
        if not bool(finite.any()):
            return 0.0
        worst = largest_ratio(residual[finite], state.tolerance[finite])
        before = largest_ratio(state.residual[finite], state.tolerance[finite])
    return (worst / before) ** (1 / steps) if before > 0 else 0.0


def _steps_until_done(worst: float, rate: float) -> float:
    """Steps after which both the residual and the estimated error are within the tolerance."""
    if rate >= 1 or not math.isfinite(worst):
        return math.inf
    wanted = worst * max(1.0, rate / (1 - rate))
    return max(1.0, math.ceil(math.log(wanted) / -math.log(rate))) if wanted > 1 and rate > 0 else 1.0
