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
    before: Tensor
    """Size of the last step of each row but one."""
    residual: Tensor
    tolerance: Tensor
    worst: float
    settled: bool
    rate: float | None
    remaining: float
    """Applications that the rate still needs; ``inf`` if the steps grow."""
    spent: int
    slowest: float | None
    """That of the problem: a smaller contraction is not believed."""
    amplification: float
    """That of the problem: how much smaller than the tolerance a step must be."""
    suspect: bool = False
    """Whether the test before this one already found it slow; for a solver that may change the method."""

    @property
    def error(self) -> Tensor:
        """Error of each row by the geometric series; in effect infinite where a step is no smaller than the last."""
        tiny = torch.finfo(self.residual.dtype).tiny
        return self.residual * (self.residual / (self.before - self.residual).clamp_min_(tiny))


_ROUNDING = 4  # steps of so many tolerances that do not shrink are rounding, or nearly
_LONGEST_PLAN = 16  # a rate that needs more calls for an early test: another method may be due


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

    Example:
        >>> from idl import fixed_point
        >>> def f(x):  # overshoots: plain steps double their distance to the fixed point 1
        ...     return 3 - 2 * x
        >>> fixed_point(f, torch.tensor(0.0), solver=Picard(damping=0.25)).x
        tensor(1.0000)
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
        seen = (x, unknown, unknown, tolerance, math.inf, False, None)
        return PicardState(*seen, self._first_burst(problem), 1, problem.slowest, problem.amplification), 1

    def step(self, problem: Problem, state: PicardState, budget: int) -> tuple[PicardState, int]:
        """Apply the map as often as is expected to be needed, at most as often as until now, then test."""
        longest = _LONGEST_PLAN if state.spent == 1 else min(max(state.spent, 4), 64)
        if state.remaining == math.inf and state.worst < _ROUNDING:  # another method may need what is left
            longest = min(longest, max(budget // 4, 1))
        steps = min(int(min(max(state.remaining, 1), longest)), budget)
        x, sizes = self._burst(problem, state, steps)
        ratios = sizes / state.tolerance
        before, worst = _largest(ratios)
        rate = contraction(before, worst)
        if state.slowest is not None:
            sizes, ratios = (at_least_as_slow(pair, state.slowest) for pair in (sizes, ratios))
            before, worst = _largest(ratios)
        remaining = _steps_until_done(before, worst, state.amplification)
        # Seen together the rows are done no later than the last of them: only then is it worth a look at each.
        settled = remaining == 0 and _all_settled(ratios)
        if not math.isfinite(worst):  # a lost sample must not slow the others down
            before, last = _largest(ratios[:, ratios[1].isfinite()])
            remaining = _steps_until_done(before, last, state.amplification)
        seen = (x, sizes[0], sizes[1], state.tolerance, worst, settled, rate)
        return PicardState(*seen, remaining, state.spent + steps, state.slowest, state.amplification), steps

    def _first_burst(self, problem: Problem) -> float:
        """Return how many steps to take before the first test: two tell a rate, a known rate tells more."""
        if problem.rate is None or not self.rtol or self.atol:
            return 2.0
        # From a start at zero the first step has the size that the tolerance refers to.
        planned = _steps_until_done(1 / (self.rtol * problem.rate), 1 / self.rtol, problem.amplification)
        return planned if 2 <= planned <= _LONGEST_PLAN else 2.0

    def _burst(self, problem: Problem, state: PicardState, steps: int) -> tuple[Tensor, Tensor]:
        """Return the new iterate and the sizes of the last two steps, ``(2, rows)``."""
        if self.damping == 1 and steps > 1:
            return problem.burst(state.x, steps)
        x, residual = state.x, state.residual
        for _ in range(steps):
            image = problem(x)
            before, residual = residual, problem.distance(image, x)
            x = torch.lerp(x, image, self.damping) if self.damping < 1 else image
        # A first step has none before it, and says nothing of the contraction.
        return x, torch.stack((before.where(before.isfinite(), residual), residual))


def contraction(before: float, last: float) -> float | None:
    """Return the ratio of two steps if it is one of steps that shrink, to the last digit; else ``None``."""
    rate = last / before if before > 0 else math.inf
    return rate if 0 < rate < 1 else None


def at_least_as_slow(sizes: Tensor, rate: float) -> Tensor:
    """Return the sizes of two steps, ``(2, rows)``, with the first as if they shrank by no less than ``rate``."""
    first, last = sizes
    return torch.stack((torch.minimum(first, last / rate), last))


def _largest(ratios: Tensor) -> list[float]:
    return ratios.amax(1).tolist() if ratios.shape[1] else [0.0, 0.0]


def _all_settled(ratios: Tensor) -> bool:
    """Return whether ``r^2 / (q - r) <= 1`` in every row, for ``q, r`` the last two steps in units of the tolerance."""
    before, last = ratios
    return not ratios.shape[1] or float(torch.addcmul(last, last, last).sub_(before).amax()) <= 0


def _steps_until_done(before: float, worst: float, amplification: float) -> float:
    """Return the steps after which the estimated error is within the tolerance, if all rows were like the worst one."""
    if worst >= before > 0 or not math.isfinite(before + worst):
        return math.inf
    if worst * worst <= before - worst and worst * amplification <= 1:
        return 0.0
    rate = contraction(before, worst)
    if rate is None or not math.isfinite(remaining := worst * max(rate / (1 - rate), amplification)):
        return math.inf
    # A fifth of a step of margin: a burst that just misses costs a test and a step, one that is too long a step.
    return float(math.ceil(math.log(remaining) / -math.log(rate) + 0.2))
