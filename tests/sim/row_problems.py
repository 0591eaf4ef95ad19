"""Row problems of all kinds, with the data they come from, and cvxpy's answer to them."""

import math
import warnings
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch

from idl.sim.problem import RowProblem


@dataclass(frozen=True)
class Rows:
    """Samples ``S`` and targets ``T``, and the penalised regression of the one on the other."""

    S: torch.Tensor
    T: torch.Tensor
    lam: float
    ball: int
    kappa: float
    weights: torch.Tensor | None = None
    knee: float = math.inf

    @property
    def problem(self):
        m = len(self.S)
        weights = torch.ones(self.S.shape[1], dtype=torch.float64) if self.weights is None else self.weights
        gram, cross = self.S.T @ self.S / m, self.T.T @ self.S / m
        return RowProblem(gram, cross, self.T.square().mean(0), self.lam * weights, self.ball, self.kappa, self.knee)

    def objective(self, W):
        """The objective from the samples themselves, not from their moments."""
        weights = 1.0 if self.weights is None else self.weights
        sizes = torch.where(W.abs() <= self.knee, W.abs(), (W.square() + self.knee**2) / (2 * self.knee))
        return 0.5 * (self.T - self.S @ W.T).square().mean(0) + self.lam * (sizes * weights).sum(1)

    def optimum(self):
        """The smallest objective of each row, by cvxpy with CLARABEL."""
        weights = np.ones(self.S.shape[1]) if self.weights is None else self.weights.numpy()
        S, values = self.S.numpy() / len(self.S) ** 0.5, []
        for z in self.T.T.numpy() / len(self.S) ** 0.5:
            w = cp.Variable(S.shape[1])
            cost = 0.5 * cp.sum_squares(z - S @ w) + self.lam * penalty(w, weights, self.knee)
            ball = [cp.norm1(w[: self.ball]) <= self.kappa] if self.ball else []
            values.append(minimum(cp.Problem(cp.Minimize(cost), ball)))
        return torch.tensor(values, dtype=torch.float64)


def penalty(w, weights, knee):
    """The weighted sizes of a cvxpy vector, with a knee by the perspective of the squares: see ``reverse_huber``."""
    if knee == math.inf:
        return cp.norm1(cp.multiply(weights, w))
    # min a w^2 / t + b t over 0 <= t <= 1, with 2 root(ab) = 1 and root(b / a) the knee.
    a, b, t = 1 / (2 * knee), knee / 2, cp.Variable(len(weights))
    squares = cp.hstack([cp.quad_over_lin(w[j], t[j]) for j in range(len(weights))])
    bounded = cp.sum(cp.multiply(weights, a * squares + b * t))
    return bounded + cp.transforms.indicator([t >= 0, t <= 1])


def minimum(program):
    """Solve a cvxpy program by CLARABEL as exactly as that can."""
    for tol in (1e-12, 1e-11, 1e-10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this was not reached, which the next tolerance answers
            value = program.solve(solver=cp.CLARABEL, tol_gap_abs=tol, tol_gap_rel=max(tol, 1e-11), tol_feas=tol)
        if program.status == cp.OPTIMAL:
            return value
    raise RuntimeError(f"CLARABEL found no optimum: {program.status}.")


def drawn(
    samples=60, columns=12, rows=5, *, lam=1e-2, ball=5, kappa=0.9, condition=1.0, noise=0.1, knee=math.inf, seed=0
):
    """Rows whose targets are noisy combinations of columns; ``condition`` spreads the columns' singular values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    S = normal(samples, columns)
    if condition > 1:
        left, values, right = torch.linalg.svd(S, full_matrices=False)
        S = left * (values * torch.logspace(0, -np.log10(condition), len(values), dtype=torch.float64)) @ right
    T = S @ normal(columns, rows) + noise * normal(samples, rows)
    return Rows(S, T, lam, ball, kappa, knee=knee)


def _with(rows, **changes):
    return Rows(**{**rows.__dict__, **changes})


def _duplicates():
    rows = drawn(seed=1)
    return _with(rows, S=torch.cat((rows.S, rows.S[:, :4]), 1))


def _free_twice():
    rows = drawn(seed=16)
    S = torch.cat((rows.S, 1e-6 * rows.S[:, 8:], torch.zeros_like(rows.S[:, :1])), 1)
    return _with(rows, S=S, weights=_ones_then_zeros(8, 9))


def _constant():
    rows = drawn(seed=2)
    S = rows.S.clone()
    S[:, 2], S[:, 7] = 0.0, 1.0
    return _with(rows, S=S)


def _dead_targets():
    rows = drawn(seed=3)
    T = rows.T.clone()
    T[:, 1] = 0
    return _with(rows, T=T)


def _relu_states():
    generator = torch.Generator().manual_seed(4)
    U = torch.rand(200, 20, generator=generator, dtype=torch.float64)
    Z = U @ torch.randn(20, 6, generator=generator, dtype=torch.float64)
    return Rows(torch.cat((Z.relu(), U), 1), Z, 1e-3, 6, 0.99)


def _ones_then_zeros(ones, zeros):
    return torch.cat((torch.ones(ones, dtype=torch.float64), torch.zeros(zeros, dtype=torch.float64)))


def _bent(kind, knee):
    """Give the penalty a knee."""
    return lambda: _with(KINDS[kind](), knee=knee)


def _free(kind, *columns):
    """Leave these columns without a penalty."""

    def changed():
        rows = KINDS[kind]()
        weights = torch.ones(rows.S.shape[1], dtype=torch.float64) if rows.weights is None else rows.weights.clone()
        weights[list(columns)] = 0
        return _with(rows, weights=weights)

    return changed


KINDS = {
    "well conditioned": lambda: drawn(),
    "no ball": lambda: drawn(ball=0, seed=5),
    "everything in the ball": lambda: drawn(ball=12, seed=6),
    "tight ball": lambda: drawn(kappa=0.05, seed=7),
    "loose ball": lambda: drawn(kappa=1e3, seed=8),
    "large penalty": lambda: drawn(lam=100.0, seed=9),
    "tiny penalty": lambda: drawn(lam=1e-6, seed=10),
    "condition 1e6": lambda: drawn(condition=1e6, lam=1e-4, seed=11),
    "fewer samples than columns": lambda: drawn(samples=8, lam=1e-3, seed=12),
    "duplicate columns": _duplicates,
    "constant columns": _constant,
    "targets that are zero": _dead_targets,
    "exact fit": lambda: drawn(noise=0.0, lam=1e-5, kappa=50.0, seed=13),
    "states of a layer": _relu_states,
    "weights a column": lambda: _with(drawn(seed=14), weights=torch.linspace(0.2, 3, 12, dtype=torch.float64)),
    "one column": lambda: drawn(columns=1, ball=1, seed=15),
}
KINDS |= {
    "free columns": _free("weights a column", 5, 7, 11),
    "free columns inside the ball": _free("well conditioned", 0, 3),
    "free columns inside and outside": _free("tight ball", 1, 6, 8),
    "nothing but the ball has a penalty": _free("well conditioned", *range(5, 12)),
    "nothing has a penalty": _free("tight ball", *range(12)),
    "nothing has a penalty, no ball": _free("no ball", *range(12)),
    # Columns 12 to 15 are those of the ball again: free outside of it, they explain all that those inside can.
    "free duplicates": _free("duplicate columns", 12, 13, 14, 15),
    "free duplicates of each other": _free_twice,
    "free columns that are constant": _free("constant columns", 6, 7),
    "free columns of condition 1e6": _free("condition 1e6", *range(6, 12)),
    "nearly as many free columns as samples": _free("fewer samples than columns", *range(5, 12)),
    "more free columns than samples": lambda: _with(drawn(samples=6, seed=17), weights=_ones_then_zeros(5, 7)),
}
"""Problems with columns that have no penalty; these outside the ball are eliminated."""
KINDS |= {
    "knee": _bent("well conditioned", 0.3),
    "tiny knee": _bent("well conditioned", 1e-3),  # a ridge and hardly a zero
    "large knee": _bent("well conditioned", 10.0),  # above every weight
    "knee, no ball": _bent("no ball", 0.5),
    "knee, everything in the ball": _bent("everything in the ball", 0.1),
    "knee, tight ball": _bent("tight ball", 0.01),
    "knee, loose ball": _bent("loose ball", 0.5),
    "knee, penalty that counts": lambda: drawn(lam=0.3, ball=5, kappa=0.9, knee=0.2, seed=18),
    "knee, penalty that counts, no ball": lambda: drawn(lam=0.3, ball=0, knee=0.4, seed=19),
    "knee, large penalty": _bent("large penalty", 0.1),
    "knee, condition 1e6": _bent("condition 1e6", 0.3),
    "knee, fewer samples than columns": _bent("fewer samples than columns", 0.3),
    "knee, duplicate columns": _bent("duplicate columns", 0.3),
    "knee, constant columns": _bent("constant columns", 0.3),
    "knee, targets that are zero": _bent("targets that are zero", 0.3),
    "knee, exact fit": _bent("exact fit", 0.5),
    "knee, states of a layer": _bent("states of a layer", 0.05),
    "knee, weights a column": _bent("weights a column", 0.3),
    "knee, one column": _bent("one column", 0.1),
    "knee, free columns": _bent("free columns", 0.2),
    "knee, free columns inside and outside": _bent("free columns inside and outside", 0.02),
}
"""Problems whose penalty has a knee."""
