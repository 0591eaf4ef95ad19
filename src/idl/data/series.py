"""Time series, windows over them, and two tasks on sequences whose range can be shifted; all offline."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from idl import checks

_SPIKY_POINTS = 100  # in a region


def spiky(points: int = 10_000, regions: int = 29, noise: float = 0.25, seed: int = 0) -> Float[Tensor, " points"]:
    r"""Return the spiky series: a noisy sine with regions of fast oscillations of ten times its size.

    .. math:: y = 5 (\sin 2x + \sin 23x + \sin 78x + \sin 100x) \ \text{in a region}, \qquad y = \sin x + \varepsilon

    elsewhere, on ``points`` equidistant points of [0, 100] (Decugis et al., On the Extrapolation Power of Implicit
    Models, section 4). Regions have 100 points each and do not overlap; 29 in 10,000 points are the paper's 20 in the
    7,000 for training, and as many in proportion after them.

    Args:
        points: Length of the series.
        regions: Number of spiky regions.
        noise: Standard deviation of the noise outside them.
        seed: Decides where the regions are, and the noise.

    Raises:
        TypeError, ValueError: If an argument is out of range, or the regions do not fit.

    Example:
        >>> spiky(points=500, regions=2).shape
        torch.Size([500])
    """
    points = checks.positive_integer("points", points)
    regions = checks.non_negative_integer("regions", regions)
    noise = checks.non_negative("noise", noise)
    free = points - regions * _SPIKY_POINTS
    if free < 0:
        raise ValueError(f"`regions` must be at most {points // _SPIKY_POINTS} in {points} points; got {regions}.")
    generator = torch.Generator().manual_seed(checks.non_negative_integer("seed", seed))
    x = torch.linspace(0, 100, points, dtype=torch.float64)
    y = x.sin() + noise * torch.randn(points, generator=generator, dtype=torch.float64)
    # Gaps before the regions: sorted uniform numbers are a uniform choice of places that do not overlap.
    gaps = torch.randint(free + 1, (regions,), generator=generator).sort().values
    for start in (gaps + _SPIKY_POINTS * torch.arange(regions)).tolist():
        inside = x[start : start + _SPIKY_POINTS]
        y[start : start + _SPIKY_POINTS] = 5 * sum((inside * factor).sin() for factor in (2, 23, 78, 100))
    return y.float()


def sunspots() -> Float[Tensor, " years"]:
    """Return the yearly number of sunspots from 1700 to 2008, 309 numbers, which statsmodels ships.

    Raises:
        ImportError: If statsmodels is missing.

    Example:
        >>> sunspots().shape
        torch.Size([309])
    """
    try:
        from statsmodels.datasets import sunspots as source
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the sunspots come with statsmodels, and {error.name} is missing.\n"
            "    Install the extra: pip install 'implicit-deep-learning[series]'"
        ) from None
    return torch.tensor(source.load_pandas().data["SUNACTIVITY"].to_numpy(), dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows over a series and the value that follows each, in units in which the training part lies in [0, 1].

    Attributes:
        train_inputs, test_inputs: Windows.
        train_targets, test_targets: The value after each.
        low, high: What became 0 and 1: the smallest and largest value of the training part.

    Example:
        >>> windows = sliding_windows(torch.arange(20.0), length=3)
        >>> windows.restored(windows.test_targets[0])
        tensor([17.])
    """

    train_inputs: Float[Tensor, "train length 1"]
    train_targets: Float[Tensor, "train 1"]
    test_inputs: Float[Tensor, "test length 1"]
    test_targets: Float[Tensor, "test 1"]
    low: float
    high: float

    def restored(self, values: Tensor) -> Tensor:
        """Return values in the units of the series."""
        return self.low + (self.high - self.low) * values


def sliding_windows(series: Float[Tensor, " points"], length: int, train: float = 0.7) -> Windows:
    """Cut a series into a training part and a test part, scale both by the first, and slide a window over each.

    Nothing leaks: the scale is that of the training part, and no window reaches from one part into the other.

    Args:
        series: The values.
        length: Number of values in a window.
        train: Part of the series that is for training, in (0, 1); it comes first.

    Raises:
        TypeError, ValueError: If an argument is out of range, a part has no window, or the training part is constant.

    Example:
        >>> windows = sliding_windows(torch.arange(20.0), length=3)
        >>> windows.train_inputs.shape, windows.test_inputs.shape
        (torch.Size([11, 3, 1]), torch.Size([3, 3, 1]))
    """
    series, length = checks.floating_tensor("series", series), checks.positive_integer("length", length)
    if series.dim() != 1:
        raise ValueError(f"`series` must have one dimension; got shape {tuple(series.shape)}.")
    if not len(series):
        raise ValueError("`series` must have values; got none.")
    cut = round(checks.in_open_unit("train", train) * len(series))
    shorter = min(cut, len(series) - cut)
    if shorter <= length:
        raise ValueError(f"`length` must be below {shorter}, the length of the shorter part; got {length}.")
    if not bool(series.isfinite().all()):
        place = int((~series.isfinite()).nonzero()[0])
        raise ValueError(f"`series` must be finite; got {float(series[place])} at place {place}.")
    low, high = float(series[:cut].min()), float(series[:cut].max())
    if not low < high or not math.isfinite(high - low):
        raise ValueError(f"`series` must vary in its training part; got values from {low} to {high}.")
    scaled = (series - low) / (high - low)
    parts = [part.unfold(0, length + 1, 1) for part in (scaled[:cut], scaled[cut:])]
    (train_inputs, train_targets), (test_inputs, test_targets) = ((p[:, :-1, None], p[:, -1:]) for p in parts)
    return Windows(train_inputs, train_targets, test_inputs, test_targets, low, high)


def rolling_argmax(
    samples: int, length: int = 10, low: float = 0.0, high: float = 1.0, seed: int = 0
) -> tuple[Float[Tensor, "samples length 1"], Int64[Tensor, "samples length"]]:
    """Return sequences of uniform numbers, and for each step the place of the largest number until then.

    A task of Decugis et al. (On the Extrapolation Power of Implicit Models, Table 3): trained on [0, 1], tested on
    [0, k]. Which place it is does not depend on the unit.

    Args:
        samples: Number of sequences.
        length: Numbers in each.
        low: Least number.
        high: Bound above, not reached.
        seed: Decides the numbers.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> numbers, places = rolling_argmax(samples=2, length=5)
        >>> numbers.shape, places.shape
        (torch.Size([2, 5, 1]), torch.Size([2, 5]))
    """
    low, high = checks.finite("low", low), checks.finite("high", high)
    if not low < high:
        raise ValueError(f"`low` must be below `high`; got {low} and {high}.")
    drawn = torch.rand(
        _shape(samples, length),
        generator=torch.Generator().manual_seed(checks.non_negative_integer("seed", seed)),
        dtype=torch.float64,
    )
    numbers = (low + (high - low) * drawn).float()
    return numbers[:, :, None], numbers.cummax(1).indices


def rolling_average(
    samples: int, length: int = 10, mean: float = 3.0, deviation: float = 1.0, seed: int = 0
) -> tuple[Float[Tensor, "samples length 1"], Float[Tensor, "samples length 1"]]:
    """Return sequences of normal numbers, and for each step the mean of the numbers until then.

    A task of Decugis et al. (On the Extrapolation Power of Implicit Models, Table 3): trained on N(3, 1), tested on
    N(3 + k, 1). It is linear in the input.

    Args:
        samples: Number of sequences.
        length: Numbers in each.
        mean: Of the numbers.
        deviation: Standard deviation of the numbers.
        seed: Decides the numbers.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> numbers, means = rolling_average(samples=2, length=5)
        >>> torch.allclose(means[:, -1], numbers.mean(1))
        True
    """
    mean, deviation = checks.finite("mean", mean), checks.non_negative("deviation", deviation)
    drawn = torch.randn(
        _shape(samples, length),
        generator=torch.Generator().manual_seed(checks.non_negative_integer("seed", seed)),
        dtype=torch.float64,
    )
    numbers = mean + deviation * drawn
    means = numbers.cumsum(1) / torch.arange(1, length + 1, dtype=torch.float64)
    return numbers.float()[:, :, None], means.float()[:, :, None]


def _shape(samples: int, length: int) -> tuple[int, int]:
    return checks.positive_integer("samples", samples), checks.positive_integer("length", length)
