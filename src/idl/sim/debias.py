"""Least squares on a given support, with the ball kept: what the penalty took from the weights is given back."""

from dataclasses import replace

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.active_set import newton
from idl.sim.solvers.base import Incumbent
from idl.sim.solvers.hybrid import Hybrid

_TOL = 1e-6  # relative gap of the rows on which the ball is active
_RIDGE = 1e-12


def debias(problem: RowProblem, W: Tensor) -> Tensor:
    """Return for each row the minimiser of the smooth part over the support of ``W``, inside the ball.

    Where the unconstrained minimiser is inside it is the answer. Elsewhere the columns outside the ball are eliminated
    by their Schur complement, and what is left is a problem of the ball alone. A row never gets worse.
    """
    unpenalised = replace(problem, penalty=torch.zeros_like(problem.penalty))
    result = W.clone()
    for i in range(len(W)):  # each row has a Gram matrix of its own, that of its support
        columns = W[i].nonzero()[:, 0]
        if len(columns):
            gram = problem.gram.index_select(0, columns).index_select(1, columns)
            h = problem.correlations[i, columns]
            inside = int((columns < problem.ball).sum())
            result[i, columns] = _minimiser(gram, h, problem.energies[i], inside, problem.radius, W[i, columns])
    before = unpenalised.objective(W, problem.residual_correlations(W))
    after = unpenalised.objective(result, problem.residual_correlations(result))
    return torch.where((after < before)[:, None], result, W)


def _minimiser(gram: Tensor, h: Tensor, energy: Tensor, inside: int, radius: float, start: Tensor) -> Tensor:
    """Return ``argmin w^T G w / 2 - h^T w`` with the first ``inside`` entries in the ball."""
    w = _solved(gram, h[:, None])[:, 0]
    if float(w[:inside].abs().sum()) <= radius:
        return w
    a, b = slice(None, inside), slice(inside, None)
    eliminated = _solved(gram[b, b], torch.cat((gram[b, a], h[b, None]), 1)) if len(h) > inside else gram[b]
    reduced_gram, reduced_h, reduced_energy = gram[a, a], h[a], energy
    if len(h) > inside:
        reduced_gram = gram[a, a] - gram[a, b] @ eliminated[:, :-1]
        reduced_h = h[a] - gram[a, b] @ eliminated[:, -1]
        reduced_energy = (energy - h[b] @ eliminated[:, -1]).clamp_min(0)
    ball = RowProblem(
        (reduced_gram + reduced_gram.T) / 2,
        reduced_h[None],
        reduced_energy[None],
        torch.zeros_like(reduced_h),
        inside,
        radius,
    )
    incumbent = Incumbent(ball, _TOL, start[None, a])
    newton(incumbent, incumbent.open, max_steps=50)
    # Where nothing is left to explain a gap relative to the objective is a quotient of rounding errors.
    explained = float(incumbent.objective) <= _TOL * float(energy)
    found = incumbent.W if explained or not len(incumbent.open) else Hybrid(_TOL).solve(ball, incumbent.W).W
    w[a] = found[0]
    if len(h) > inside:
        w[b] = eliminated[:, -1] - eliminated[:, :-1] @ found[0]
    return w


def _solved(gram: Tensor, rhs: Tensor) -> Tensor:
    gram = gram.clone()
    gram.diagonal().mul_(1 + _RIDGE)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):  # columns that depend on each other: any minimiser will do
        return torch.linalg.lstsq(gram, rhs, driver="gelsd").solution
    return torch.cholesky_solve(rhs, factor)
