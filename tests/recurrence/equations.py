"""Recurrences with answers by hand, seeded and in float64."""

import torch

from idl import activations
from idl.linalg.operators import Dense
from idl.recurrence.steps import AffineSteps, SlopedSteps
from idl.recurrence.timeline import Timeline
from problems import random

N, H = 6, 3
EVEN, RAGGED = Timeline((4,) * 30), Timeline((4,) * 9 + (3,) * 2 + (2,) * 8 + (1,) * 11)
TIMELINES = [EVEN, EVEN.reversed(), RAGGED, RAGGED.reversed()]


def contraction(rate, n=N):
    """Return a matrix whose eigenvalues all have this modulus."""
    return rate * torch.linalg.qr(random(n, n, seed=0))[0]


def affine(timeline, A=None, scale=1.0, **changes):
    rows = timeline.rows
    parts = {
        "state_matrix": Dense(contraction(0.3)) if A is None else A,
        "source": scale * random(rows, N + H, seed=1),
        "carry": random(timeline.batch, H, seed=2),
        "B": 0.3 * random(N, H, seed=3),
        "M": 0.2 * random(H, N + H, seed=4),
        "activation": activations.tanh,
    }
    return AffineSteps(timeline, **{**parts, **changes})


def sloped(timeline, A=None, order=torch.inf, **changes):
    common = affine(timeline, A)
    parts = {
        **{name: getattr(common, name) for name in ("timeline", "state_matrix", "source", "carry", "B", "M")},
        "slope": torch.sigmoid(random(timeline.rows, N, seed=5)),
        "offset": random(timeline.rows, N, seed=6),
        "order": order,
    }
    return SlopedSteps(**{**parts, **changes})


def by_hand(steps):
    """Return trajectory and last outputs, each state iterated until it does not change."""
    timeline, A = steps.timeline, steps.state_matrix.dense()
    pairs = torch.empty(timeline.rows, N + H, dtype=torch.float64)
    h, last = steps.carry.clone(), torch.empty_like(steps.carry)
    for time in timeline.order:
        start, size = timeline.starts[time], timeline.sizes[time]
        for row, i in enumerate(range(start, start + size)):
            source = steps.source[i] if steps.source is not None else torch.zeros(N + H, dtype=torch.float64)
            x, z = torch.zeros(N, dtype=torch.float64), source[:N] + steps.B @ h[row]
            for _ in range(100):
                x = torch.tanh(A @ x + z) if isinstance(steps, AffineSteps) else linear(steps, i, A @ x + z)
            pairs[i] = torch.cat((x, h[row]))
            h[row] = last[row] = source[N:] + steps.M @ pairs[i]
    return pairs, last


def linear(steps, i, z):
    return steps.slope[i] * z + (0 if steps.offset is None else steps.offset[i])


NAMES = ["even", "even, back", "ragged", "ragged, back"]
