"""What a table says of runs that differ in their seed alone."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], mean: str = ".2f", deviation: str | None = None) -> str:
    """Return mean and standard deviation, that of a sample, with ``n - 1``; 0 for a single run.

    Args:
        values: A number of each run.
        mean: Format of the mean.
        deviation: Format of the deviation; that of the mean if ``None``.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        '2.00 ± 1.00'
    """
    found = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{mean}} ± {found:{mean if deviation is None else deviation}}"
