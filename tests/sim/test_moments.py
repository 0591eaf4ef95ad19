"""Moments that stream by are the plain products in float64, whatever the batches."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from idl.sim.moments import Moments, accumulate
from idl.sim.recording import record
from problems import random

ROUNDING = {"rtol": 1e-12, "atol": 1e-13}
"""Sums of a few thousand float64 products of size one, in another order."""

BATCHES = {
    "single samples": [1],
    "sevens": [7],
    "the size that is multiplied at once": [2048],
    "more than that": [5000],
    "mixed": [1, 2047, 1, 7, 2048, 3, 2500],
    "small, then large": [100, 5000, 1],
}


def drawn(samples, d, targets=3, seed=0):
    """Regressors and targets with means and variances of their own, so that no moment is trivial."""
    S = random(samples, d, seed=seed) * torch.linspace(0.5, 2, d) + torch.linspace(-1, 1, d)
    return S, random(samples, targets, seed=seed + 1) + S[:, :1] - 0.5


def cut(tensors, sizes):
    """Cut samples into batches, going round the sizes."""
    start, batches = 0, []
    while start < len(tensors[0]):
        stop = start + sizes[len(batches) % len(sizes)]
        batches.append(tuple(t[start:stop] for t in tensors))
        start = stop
    return batches


def assert_moments(moments, S, T, **tolerance):
    S, T = S.double(), T.double()
    m = len(S)
    truth = Moments(S.T @ S / m, T.T @ S / m, T.square().mean(0), S.mean(0), T.mean(0), m)
    assert moments.samples == m
    for name in ("gram", "cross", "energies", "mean_S", "mean_T"):
        value, true = getattr(moments, name), getattr(truth, name)
        torch.testing.assert_close(value, true, **{**ROUNDING, **tolerance}, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("d", [1, 128, 131, 300])
@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
def test_moments_are_the_direct_products_for_any_batches(sizes, d):
    S, T = drawn(400 if sizes == [1] else 5003, d)
    assert_moments(accumulate(cut((S, T), sizes)), S, T)


@pytest.mark.parametrize("k", [1, 40, 128, 131, 200, 300])
def test_a_part_of_the_gram_matrix_that_is_known_beforehand_changes_nothing(k):
    S, T = drawn(2500, 300)
    known = S[:, -k:].T @ S[:, -k:] / len(S)
    assert_moments(accumulate(cut((S, T), [700]), last=known), S, T)


@given(
    samples=st.integers(1, 50),
    d=st.integers(1, 9),
    targets=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_small_problems_of_any_shape_have_the_direct_products(samples, d, targets, sizes, data):
    S, T = drawn(samples, d, targets)
    k = data.draw(st.integers(1, d))
    assert_moments(accumulate(cut((S, T), sizes)), S, T)
    assert_moments(accumulate(cut((S, T), sizes), last=S[:, -k:].T @ S[:, -k:] / samples), S, T)


def test_a_gram_matrix_is_symmetric_to_the_last_bit():
    S, T = drawn(1000, 200)
    gram = accumulate([(S, T)]).gram
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_less_precise_numbers_are_taken_in_float64(dtype):
    S, T = (t.to(dtype) for t in drawn(3000, 20))
    moments = accumulate(cut((S, T), [64]))
    assert {t.dtype for t in vars(moments).values() if isinstance(t, torch.Tensor)} == {torch.float64}
    assert_moments(moments, S, T)


def test_empty_batches_between_others_change_nothing():
    S, T = drawn(100, 5)
    batches = cut((S, T), [30])
    batches[2:2] = batches[0:0] = [(S[:0], T[:0])]
    assert_moments(accumulate(batches), S, T)


def test_centred_moments_are_those_of_centred_data():
    S, T = drawn(3000, 20)
    assert_moments(accumulate([(S, T)]).centred(), S - S.mean(0), T - T.mean(0))


def test_scaled_moments_are_those_of_scaled_data():
    S, T = drawn(3000, 20)
    columns, targets = torch.linspace(0.1, 3, 20).double(), torch.tensor([2.0, 0.5, 1e-3]).double()
    moments = accumulate([(S, T)])
    assert_moments(moments.scaled(columns, targets), columns * S, targets * T)
    assert_moments(moments.scaled(columns, targets).centred(), columns * (S - S.mean(0)), targets * (T - T.mean(0)))


def test_the_energy_of_a_constant_target_about_its_mean_is_not_negative():
    T = torch.full((1000, 1), 0.1, dtype=torch.float64)
    assert float(accumulate([(T, T)]).centred().energies) >= 0


# --- memory ---------------------------------------------------------------------------------------------------------


class Watched:
    """Batches in memory that torch frees as soon as nobody has a view of it; counts those that are still there."""

    def __init__(self, batches, size, columns):
        self.batches, self.size, self.columns = batches, size, columns
        self.most = 0

    def __iter__(self):
        alive = []
        for i in range(self.batches):
            array = np.full((self.size, self.columns), i + 1.0, dtype=np.float32)
            alive = [a for a in alive if a() is not None] + [weakref.ref(array)]
            self.most = max(self.most, len(alive))
            batch = torch.from_numpy(array)
            del array
            yield batch
            del batch


@pytest.mark.parametrize("size", [100, 1000, 3000])
def test_no_more_batches_are_kept_than_are_multiplied_at_once(size):
    most = []
    for number in (30, 90):
        watched = Watched(number, size, 4)
        accumulate((batch, batch[:, :1]) for batch in watched)
        most.append(watched.most)
    assert most[0] == most[1] <= 2048 // size + 3


def test_recording_a_teacher_keeps_no_more_batches_with_more_samples():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    most = []
    for number in (30, 60):
        watched = Watched(number, 1000, 4)
        assert record(net, watched).moments.samples == 1000 * number
        most.append(watched.most)
    assert most[0] == most[1] <= 5


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 3), torch.zeros(0, 1))]], ids=["no batch", "empty batch"])
def test_no_sample_is_refused(batches):
    with pytest.raises(ValueError, match="at least one sample; got none"):
        accumulate(batches)


@pytest.mark.parametrize("before", [1, 2048, 3000])
@pytest.mark.parametrize("which", ["regressors", "targets"])
def test_batches_that_change_their_shape_are_refused(before, which):
    wider = (4, 2) if which == "regressors" else (3, 3)
    with pytest.raises(ValueError, match="batches of one shape"):
        accumulate([(torch.zeros(before, 3), torch.zeros(before, 2)), tuple(torch.zeros(5, w) for w in wider)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["first regressor", "last regressor", "target"])
@pytest.mark.parametrize("known", [False, True])
def test_a_value_that_is_not_finite_is_refused(value, where, known):
    S, T = drawn(300, 140)
    last = S[:, -20:].T @ S[:, -20:] / 300 if known else None
    target, column = {"first regressor": (S, 0), "last regressor": (S, -1), "target": (T, 1)}[where]
    target[77, column] = value
    with pytest.raises(ValueError, match="NaN or inf"):
        accumulate(cut((S, T), [50]), last)
