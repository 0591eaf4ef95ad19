"""Row problems of all kinds, with the data they come from, and cvxpy's answer to them."""

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

    @property
    def problem(self):
        m = len(self.S)
        weights = torch.ones(self.S.shape[1], dtype=torch.float64) if self.weights is None else self.weights
        gram, cross = self.S.T @ self.S / m, self.T.T @ self.S / m
        return RowProblem(gram, cross, self.T.square().mean(0), self.lam * weights, self.ball, self.kappa)

    def objective(self, W):
        """The objective from the samples themselves, not from their moments."""
        weights = 1.0 if self.weights is None else self.weights
        return 0.5 * (self.T - self.S @ W.T).square().mean(0) + self.lam * (W.abs() * weights).sum(1)

    def optimum(self):
        """The smallest objective of each row, by cvxpy with CLARABEL."""
        weights = np.ones(self.S.shape[1]) if self.weights is None else self.weights.numpy()
        S, values = self.S.numpy() / len(self.S) ** 0.5, []
        for z in self.T.T.numpy() / len(self.S) ** 0.5:
            w = cp.Variable(S.shape[1])
            cost = 0.5 * cp.sum_squares(z - S @ w) + self.lam * cp.norm1(cp.multiply(weights, w))
            ball = [cp.norm1(w[: self.ball]) <= self.kappa] if self.ball else []
            program = cp.Problem(cp.Minimize(cost), ball)
            values.append(program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-10, tol_feas=1e-12))
        return torch.tensor(values, dtype=torch.float64)


def drawn(samples=60, columns=12, rows=5, *, lam=1e-2, ball=5, kappa=0.9, condition=1.0, noise=0.1, seed=0):
    """Rows whose targets are noisy combinations of columns; ``condition`` spreads the columns' singular values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    S = normal(samples, columns)
    if condition > 1:
        left, values, right = torch.linalg.svd(S, full_matrices=False)
        S = left * (values * torch.logspace(0, -np.log10(condition), len(values), dtype=torch.float64)) @ right
    T = S @ normal(columns, rows) + noise * normal(samples, rows)
    return Rows(S, T, lam, ball, kappa)


def _with(rows, **changes):
    return Rows(**{**rows.__dict__, **changes})


def _duplicates():
    rows = drawn(seed=1)
    return _with(rows, S=torch.cat((rows.S, rows.S[:, :4]), 1))


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
