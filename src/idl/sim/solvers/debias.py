"""Least squares on a given support, with the ball kept: what a penalty took from the weights is given back."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.active_set import newton
from idl.sim.solvers.base import Incumbent
from idl.sim.solvers.hybrid import Hybrid

_TOL = 1e-6  # relative gap of the rows on which the ball is active
_RIDGE = 1e-12


class Debiased(NamedTuple):
    """The best weights on a support."""

    W: Float[Tensor, "rows d"]
    objective: Float[Tensor, " rows"]
    """Smooth part of the objective at ``W``."""
    gap: Float[Tensor, " rows"]
    """Relative gap of each row to the optimum on its support; what is below 1e-6 of the energy counts as that."""


def debias(problem: RowProblem, W: Tensor) -> Debiased:
    """Return for each row the minimiser of the smooth part over the support of ``W``, inside the ball.

    Where the unconstrained minimiser is inside it is the answer. Elsewhere the columns outside the ball are eliminated
    by their Schur complement, and what is left is a problem of the ball alone. A row never gets worse.
    """
    unpenalised = replace(problem, penalty=torch.zeros_like(problem.penalty))
    result, above = W.clone(), torch.zeros_like(problem.energies)
    for i in range(len(W)):  # each row has a Gram matrix of its own, that of its support
        columns = W[i].nonzero()[:, 0]
        if len(columns):
            gram = problem.gram.index_select(0, columns).index_select(1, columns)
            h = problem.correlations[i, columns]
            inside = int((columns < problem.ball).sum())
            start = W[i, columns]
            result[i, columns], above[i] = _minimiser(gram, h, problem.energies[i], inside, problem.radius, start)
    before = unpenalised.objective(W, problem.residual_correlations(W))
    after = unpenalised.objective(result, problem.residual_correlations(result))
    better = after < before
    objective = torch.where(better, after, before)
    gap = (objective - after + above) / torch.maximum(objective, _TOL * problem.energies)
    gap = torch.where(problem.energies > 0, gap.clamp_min(torch.finfo(gap.dtype).eps), 0)
    return Debiased(torch.where(better[:, None], result, W), objective, gap)


def _minimiser(
    gram: Tensor, h: Tensor, energy: Tensor, inside: int, radius: float, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``argmin w^T G w / 2 - h^T w`` with the first ``inside`` entries in the ball, and its absolute gap."""
    w = _solved(gram, h[:, None])[:, 0]
    if float(w[:inside].abs().sum()) <= radius:
        rest = h - gram @ w
        return w, 0.5 * (rest @ _solved(gram, rest[:, None])[:, 0]).abs()
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
    done = explained or not len(incumbent.open)
    found = incumbent.solution(0) if done else Hybrid(_TOL).solve(ball, incumbent.W)
    w[a] = found.W[0]
    if len(h) > inside:
        w[b] = eliminated[:, -1] - eliminated[:, :-1] @ found.W[0]
    return w, (found.objective - found.bound)[0].clamp_min(0)


def _solved(gram: Tensor, rhs: Tensor) -> Tensor:
    gram = gram.clone()
    gram.diagonal().mul_(1 + _RIDGE)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):  # columns that depend on each other: any minimiser will do
        return torch.linalg.lstsq(gram, rhs, driver="gelsd").solution
    return torch.cholesky_solve(rhs, factor)
