"""Series, windows and tasks: what their recipes say, from a seed, and nothing of the test part in the training part."""

import math
import sys

import numpy as np
import pytest
import torch

from idl.data import rolling_argmax, rolling_average, sliding_windows, spiky, sunspots


def regions(series):
    """Return where the spiky formula holds, from the series alone."""
    x = np.linspace(0, 100, len(series))
    formula = 5 * sum(np.sin(factor * x) for factor in (2, 23, 78, 100))
    return np.isclose(series.numpy(), formula, rtol=0, atol=1e-4)


def test_the_spiky_series_has_its_regions_and_is_a_noisy_sine_elsewhere():
    series = spiky()
    inside = regions(series)
    assert series.shape == (10_000,) and abs(int(inside.sum()) - 2900) < 5  # by chance a point elsewhere
    assert float(series.abs().max()) <= 20
    rest = series.numpy()[~inside] - np.sin(np.linspace(0, 100, 10_000))[~inside]
    assert abs(rest.std() - 0.25) < 0.01 and abs(rest.mean()) < 0.02


@pytest.mark.parametrize("seed", range(20))
def test_spiky_regions_do_not_overlap_and_fit(seed):
    assert int(regions(spiky(3000, 30, 0.0, seed)).sum()) == 3000  # nothing but regions
    assert abs(int(regions(spiky(3000, 12, seed=seed)).sum()) - 1200) < 5


def test_a_seed_decides_the_series():
    assert torch.equal(spiky(seed=3), spiky(seed=3)) and not torch.equal(spiky(seed=3), spiky(seed=4))
    before = torch.random.get_rng_state()
    spiky()
    rolling_argmax(3)
    rolling_average(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_regions_and_noise_it_is_a_sine():
    expected = torch.linspace(0, 100, 50, dtype=torch.float64).sin().float()
    torch.testing.assert_close(spiky(50, 0, 0.0), expected)


def test_sunspots_are_those_of_statsmodels():
    series = sunspots()
    assert series.shape == (309,) and series.dtype == torch.float32
    assert series[:3].tolist() == [5.0, 11.0, 16.0] and float(series.max()) == pytest.approx(190.2)


def test_windows_are_followed_by_their_targets():
    series = torch.arange(20, dtype=torch.float64)
    windows = sliding_windows(series, 3, 0.6)
    assert (windows.low, windows.high) == (0, 11)
    assert windows.train_inputs.shape == (9, 3, 1) and windows.test_inputs.shape == (5, 3, 1)
    restored = windows.restored(windows.train_inputs[:, :, 0])
    torch.testing.assert_close(restored, torch.arange(9.0).double()[:, None] + torch.arange(3))
    torch.testing.assert_close(windows.restored(windows.train_targets)[:, 0], torch.arange(3.0, 12).double())
    torch.testing.assert_close(windows.restored(windows.test_inputs[0, :, 0]), torch.arange(12.0, 15).double())
    torch.testing.assert_close(windows.restored(windows.test_targets)[:, 0], torch.arange(15.0, 20).double())


def test_the_training_part_knows_nothing_of_the_test_part():
    series = torch.randn(100, generator=torch.Generator().manual_seed(0))
    changed = series.clone()
    changed[70:] = 1000 * torch.randn(30, generator=torch.Generator().manual_seed(1))
    first, second = sliding_windows(series, 5), sliding_windows(changed, 5)
    assert torch.equal(first.train_inputs, second.train_inputs)
    assert torch.equal(first.train_targets, second.train_targets)
    assert (first.low, first.high) == (second.low, second.high)
    assert float(first.train_inputs.min()) == 0 and float(first.train_inputs.max()) == 1


def test_the_rolling_argmax_is_that_of_every_prefix():
    numbers, places = rolling_argmax(50, 7, seed=1)
    assert numbers.shape == (50, 7, 1) and places.shape == (50, 7)
    for row, found in zip(numbers[:, :, 0], places, strict=True):
        assert [int(row[: t + 1].argmax()) for t in range(7)] == found.tolist()
    assert 0 <= float(numbers.min()) and float(numbers.max()) <= 1
    far, same = rolling_argmax(50, 7, 0.0, 1e5, seed=1)
    assert torch.equal(places, same) and float(far.max()) > 1e4


def test_the_rolling_average_is_that_of_every_prefix():
    numbers, means = rolling_average(200, 6, 10.0, 2.0, seed=1)
    for t in range(6):
        torch.testing.assert_close(means[:, t], numbers[:, : t + 1].mean(1))
    assert abs(float(numbers.mean()) - 10) < 0.2 and abs(float(numbers.std()) - 2) < 0.2


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: spiky(0), ValueError, "points"),
        (lambda: spiky(1000, 11), ValueError, "regions"),
        (lambda: spiky(1000, -1), ValueError, "regions"),
        (lambda: spiky(1000, 1.5), TypeError, "regions"),
        (lambda: spiky(noise=-1), ValueError, "noise"),
        (lambda: sliding_windows(torch.rand(10), 3), ValueError, "length"),
        (lambda: sliding_windows(torch.rand(10), 0), ValueError, "length"),
        (lambda: sliding_windows(torch.rand(10), 2, 1.0), ValueError, "train"),
        (lambda: sliding_windows(torch.rand(10, 1), 2), ValueError, "series"),
        (lambda: sliding_windows(torch.arange(10), 2), TypeError, "series"),
        (lambda: sliding_windows(torch.ones(10), 2), ValueError, "series"),
        (lambda: sliding_windows(torch.tensor([1.0, math.nan, *range(10)]), 2), ValueError, "series"),
        (lambda: sliding_windows(torch.tensor([*map(float, range(20)), math.nan]), 2), ValueError, "series"),
        (lambda: sliding_windows(torch.ones(0), 2), ValueError, "series"),
        (lambda: spiky(seed=1.0), TypeError, "seed"),
        (lambda: rolling_argmax(3, seed=None), TypeError, "seed"),
        (lambda: rolling_argmax(3, high=math.inf), ValueError, "high"),
        (lambda: rolling_argmax(3, low="0"), TypeError, "low"),
        (lambda: rolling_average(3, mean=math.nan), ValueError, "mean"),
        (lambda: rolling_argmax(0), ValueError, "samples"),
        (lambda: rolling_argmax(3, 0), ValueError, "length"),
        (lambda: rolling_argmax(3, low=1.0), ValueError, "low"),
        (lambda: rolling_average(3, deviation=-1.0), ValueError, "deviation"),
        (lambda: rolling_average(True), TypeError, "samples"),
    ],
)
def test_an_argument_out_of_range_is_refused_and_named(call, error, name, as_users_run_it):
    with pytest.raises(error, match=f"`{name}` must"):
        call()


def test_without_statsmodels_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(ImportError, match=r"implicit-deep-learning\[series\]"):
        sunspots()
