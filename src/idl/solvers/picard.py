"""Picard iteration, plain or damped."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from idl import checks
from idl.solvers.base import AbstractFixedPointSolver, Problem


class PicardState(NamedTuple):
    """State of :class:`Picard`."""

    x: Tensor
    residual: Tensor
    error: Tensor
    tolerance: Tensor
    worst: float
    excess: float
    remaining: float | None
    """Applications that the measured rate still needs; ``None`` before it is known, ``inf`` if the steps grow."""
    spent: int
    spare: Tensor | None
    """A buffer for the next burst."""
    suspect: bool = False
    """Whether the test before this one already found it slow; for a solver that may change the method."""


@dataclass(frozen=True)
class Picard(AbstractFixedPointSolver):
    r"""Iterate :math:`x \leftarrow (1-\alpha)\,x + \alpha f(x)`.

    Steps come in bursts, and a test looks at the last two steps of one. Their ratio is the contraction of each row,
    from which follow its error, by the geometric series (Aitken), and the length of the next burst. A test costs as
    much as a step of a small problem on a CPU, and a synchronisation on a GPU.

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
        return PicardState(x, unknown, unknown, tolerance, math.inf, math.inf, None, 1, None), 1

    def step(self, problem: Problem, state: PicardState, budget: int) -> tuple[PicardState, int]:
        """Apply the map as often as is expected to be needed, at most as often as until now, then test."""
        steps = 2 if state.remaining is None else int(min(max(state.remaining, 1), max(state.spent, 4), 64))
        steps = min(steps, budget)
        x, before, residual, spare = self._burst(problem, state, steps)
        # Where a step is no smaller than the one before it the error is unknown: infinite, in effect.
        tiny = torch.finfo(residual.dtype).tiny
        error = residual * (residual / (before - residual).clamp_min_(tiny))
        ratios = torch.stack((before, residual, error)).div_(state.tolerance)
        worst_before, worst, excess = _largest(ratios)
        remaining = _steps_until_done(worst_before, worst)
        if not math.isfinite(worst):  # a lost sample must not slow the others down
            others_before, others_worst, _ = _largest(ratios[:, ratios[1].isfinite()])
            remaining = _steps_until_done(others_before, others_worst)
        spent = state.spent + steps
        return PicardState(x, residual, error, state.tolerance, worst, excess, remaining, spent, spare), steps

    def _burst(self, problem: Problem, state: PicardState, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the new iterate, the sizes of the last two steps of each row, and a buffer that is free now."""
        if self.damping < 1:
            x, residual = state.x, state.residual
            for _ in range(steps):
                image = problem(x)
                before, residual = residual, problem.distance(image, x)
                x = torch.lerp(x, image, self.damping)
            return x, before, residual, None
        if steps == 1:  # the iterate before is still somebody's
            x, _ = problem.iterate(state.x, 1, state.spare)
            return x, state.residual, problem.distance(x, state.x), None
        previous, older = problem.iterate(state.x, steps - 1, state.spare)
        if older is state.x:
            before, free = problem.distance(previous, older), None
        else:
            before, free = problem.distance_over(previous, older), older
        x, _ = problem.iterate(previous, 1, free)
        return x, before, problem.distance_over(x, previous), previous


def _largest(ratios: Tensor) -> list[float]:
    return ratios.amax(1).tolist() if ratios.shape[1] else [0.0] * ratios.shape[0]


def _steps_until_done(before: float, worst: float) -> float:
    """Return the steps after which the estimated error is within the tolerance, if all rows were like the worst one."""
    if worst >= before or not math.isfinite(before):
        return math.inf
    rate = worst / before
    excess = worst * rate / (1 - rate)
    if excess <= 1:
        return 1.0
    # A fifth of a step of margin: a burst that just misses costs a test and a step, one that is too long a step.
    return float(math.ceil(math.log(excess) / -math.log(rate) + 0.2))
