"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from idl import checks


@dataclass(frozen=True)
class OneCycle:
    r"""Rise to the maximal learning rate and fall to nearly zero, each along half a cosine.

    The same values as :class:`torch.optim.lr_scheduler.OneCycleLR` with its defaults: the learning rate
    starts at ``max_learning_rate / 25``, peaks after 30 % of the steps and ends at ``max_learning_rate /
    250000``, while the momentum (Adam's first beta) falls from .95 to .85 and rises again.

    Args:
        total_steps: Number of optimizer steps of the whole run, at least 1.
        max_learning_rate: The peak, positive.

    Raises:
        TypeError, ValueError: If ``total_steps`` or ``max_learning_rate`` is out of range.

    Example:
        >>> OneCycle(total_steps=100, max_learning_rate=1.0).learning_rate(29)
        1.0
    """

    total_steps: int
    max_learning_rate: float

    def __post_init__(self) -> None:
        checks.positive_integer("total_steps", self.total_steps)
        checks.positive("max_learning_rate", self.max_learning_rate)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 0."""
        initial = self.max_learning_rate / 25
        return self._between(step, initial, self.max_learning_rate, initial / 1e4)

    def momentum(self, step: int) -> float:
        """Return the momentum, or Adam's first beta, of optimizer step ``step``, counted from 0."""
        return self._between(step, 0.95, 0.85, 0.95)

    def _between(self, step: int, first: float, middle: float, last: float) -> float:
        """Return the value at ``step`` of the curve from ``first`` over ``middle`` to ``last``."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"`step` must be in 0..{self.total_steps - 1}, the steps of this schedule; got {step}.")
        peak = 0.3 * self.total_steps - 1
        end = self.total_steps - 1
        if step <= peak:
            return _half_cosine(first, middle, step / peak if peak > 0 else 1.0)
        return _half_cosine(middle, last, (step - peak) / (end - peak))


def _half_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))
