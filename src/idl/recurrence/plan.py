"""What a sweep expects of the next times, from those before: it plans, and decides nothing."""

import math
from dataclasses import dataclass

from idl.solvers.picard import contraction

_FEWEST = 3  # applications that tell two differences, and so a rate
_FIRST = 8  # applications where nothing is known yet
_MOST = 32  # a time that takes more is better looked at while it is solved; measured, small states gain most
_MARGIN = 0.3  # of an application, by which the next times may be harder than the last ones


@dataclass
class Plan:
    """How many applications a time takes, from where, and how many times to take before the next test.

    Args:
        max_steps: Most applications that a time may take.
        longest: Most times between two tests.
        rate: Contraction to expect.
    """

    max_steps: int
    longest: int
    rate: float | None
    count: int = _FIRST
    """Applications of a time."""
    ahead: int = 1
    """Times before the next test."""
    warm: bool = False
    """Whether to start from the time before; else from zero, which saves the product of the first application."""
    slowness: float = 0.0
    """``rate / (1 - rate)`` of the slowest times; halved with each test that shows a faster one."""

    @property
    def slowest(self) -> float | None:
        """Contraction that an error which the time before has left may have."""
        return self.slowness / (1 + self.slowness) if self.slowness else None

    @property
    def foresees(self) -> bool:
        """Whether the next time is expected to take few applications, and no more than it may."""
        return _FEWEST <= self.count <= min(_MOST, self.max_steps)

    def solved(self, count: int, rate: float | None) -> None:
        """Take note of a time that took ``count`` applications by the solver."""
        self.count = max(_FEWEST, count)
        if rate is not None:
            self._measured(rate)

    def succeeded(self, before: float, last: float, error: float) -> None:
        """Take note of times that are done, by their largest last two differences and error, in tolerances."""
        self.ahead = min(4 * self.ahead, self.longest)
        rate = self.rate
        if (measured := contraction(before, last)) is not None and error > 0:
            rate = measured
            self._measured(rate)
        elif rate is not None:  # down at rounding, where nothing is measured: the steps before were too many
            error = before * rate
        if rate is not None and error > 0:
            self.count += math.ceil(math.log(error) / -math.log(rate) + _MARGIN)
        else:
            self.count -= 1
        self.count = max(_FEWEST, self.count)

    def failed(self, before: float, last: float, error: float) -> None:
        """Take note of times one of which was not done; the numbers are those of :meth:`succeeded`."""
        self.ahead = max(1, self.ahead // 4)
        more = _MOST
        if (rate := contraction(before, last)) is not None and 1 < error < math.inf:
            more = math.ceil(min(math.log(error) / -math.log(rate) + 1, _MOST))
        self.count += more

    def drifted(self, change: float, size: float) -> None:
        """Take note of how much the state changes from time to time, beside its size."""
        warm = change < (self.rate or 0.0) * size
        if self.warm and not warm:
            self.count += 1
        self.warm = warm

    def _measured(self, rate: float) -> None:
        self.rate = rate
        self.slowness = max(rate / (1 - rate), self.slowness / 2)
