"""Newton steps on the support of each row, together with the multiplier of its ball."""

import math

import torch
from torch import Tensor

from idl.sim.problem import RowProblem
from idl.sim.solvers.base import Incumbent

_TRIALS = 10  # steps of the line search, each .35 of the one before
_FEWEST_ENTERING = 10
_RIDGE = 1e-12  # relative; columns that depend on each other need a thousand times that


def newton(incumbent: Incumbent, rows: Tensor, max_steps: int) -> int:
    r"""Improve the incumbent points of ``rows`` by an active-set Newton method; return the steps that took.

    A step lets the columns that violate optimality most enter the support ``S``, with the sign ``s`` of their
    correlation, and minimises the objective on the face of these signs. Where the ball is active its multiplier
    :math:`\mu` is an unknown of the same system,

    .. math:: G_{SS} w = h_S - p_S s - \mu s_a, \qquad s_a^T w = \kappa,

    so that one factorisation with two right-hand sides gives both. For entries beyond a knee ``k`` the penalty is
    quadratic: :math:`p_j / k` joins the diagonal in place of a constant slope. A line search then shortens the step
    until the true objective falls; columns that change sign on the way leave the support. A row whose step had to be
    shortened lets fewer columns in: with a single one the direction descends. A row that stands still is given up.

    From a support that is nearly right one or two steps are enough. ``O(|S|^3)`` a row and step.
    """
    problem = incumbent.problem
    scale = problem.gram.diagonal().clamp_min(torch.finfo(problem.gram.dtype).tiny).sqrt()
    in_ball = (torch.arange(len(problem.penalty), device=rows.device) < problem.ball).to(problem.gram.dtype)
    W = incumbent.W[rows]
    part = problem.take(rows)
    q = part.residual_correlations(W)
    mu = multiplier(part, W, q)
    entering = torch.full_like(rows, problem.gram.shape[0])
    for spent in range(max_steps):
        gap = incumbent.offer(rows, W, q)
        going = (gap > incumbent.tol) & (entering >= 0)
        if not bool(going.any()):
            return spent
        if not bool(going.all()):
            rows, W, q, mu, entering = rows[going], W[going], q[going], mu[going], entering[going]
            part = problem.take(rows)
        on, most = _support(part, W, q, mu, entering, scale, incumbent.tol)
        signs = torch.where(W != 0, W.sign(), q.sign()) * on
        target, mu = _face_minimiser(part, W, q, on, signs, in_ball)
        W, q, length = _line_search(part, W, q, target, signs)
        # Down to one, then to none, which minimises on the face there is; standing still on that is the end.
        fewer = torch.where(most > 1, (most // 4).clamp_min(1), most - 1)
        entering = torch.where(length >= 0.2, 4 * most + 4, torch.where(length > 0, fewer.clamp_min(0), fewer))
    incumbent.offer(rows, W, q)
    return max_steps


def multiplier(problem: RowProblem, W: Tensor, q: Tensor) -> Tensor:
    """Estimate the multiplier of the ball at ``W``: by how much correlations exceed the penalty, if it is reached."""
    inside, slopes = W[:, : problem.ball], problem.slopes(W)[:, : problem.ball]
    count = (inside != 0).sum(1)
    excess = (q[:, : problem.ball] * inside.sign() - slopes * (inside != 0)).sum(1) / count.clamp_min(1)
    reached = inside.abs().sum(1) > problem.radius * (1 - 1e-6)
    return torch.where(reached & (count > 0), excess.clamp_min(0), 0)


def _support(
    problem: RowProblem, W: Tensor, q: Tensor, mu: Tensor, entering: Tensor, scale: Tensor, tol: float
) -> tuple[Tensor, Tensor]:
    """Return the columns of each row that are on or enter, and how many were let in."""
    penalty = problem.penalty.expand_as(W).clone()
    penalty[:, : problem.ball] += mu[:, None]
    violation = (q.abs() - penalty) / scale
    violation = torch.where((W == 0) & (violation * scale > 1e-3 * tol * problem.penalty), violation, 0)
    count = (violation > 0).sum(1)
    most = torch.minimum(entering, ((W != 0).sum(1) // 2).clamp_min(_FEWEST_ENTERING))
    most = torch.minimum(most, count)
    ranks = violation.argsort(1, descending=True).argsort(1)
    return (W != 0) | ((violation > 0) & (ranks < most[:, None])), most


def _face_minimiser(
    problem: RowProblem, W: Tensor, q: Tensor, on: Tensor, signs: Tensor, in_ball: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the minimiser of each row on the face of its signs, and the multiplier of the ball there.

    Written for the step from ``W``, so that it descends also where columns depend on each other and a ridge is needed.
    """
    free, along = torch.zeros_like(signs), torch.zeros_like(signs)
    descent = q - problem.slopes(W) * signs
    curvatures = None if problem.knee == math.inf else problem.curvatures(W)
    for i in range(len(signs)):  # supports differ in size, and LAPACK factors one matrix at a time in any case
        columns = on[i].nonzero()[:, 0]
        if not len(columns):
            continue
        system = problem.gram.index_select(0, columns).index_select(1, columns)
        if curvatures is not None:
            system.diagonal().add_(curvatures[i, columns])
        system.diagonal().mul_(1 + _RIDGE)
        s = signs[i, columns]
        rhs = torch.stack((descent[i, columns], s * in_ball[columns]), 1)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info):
            system.diagonal().add_(1e3 * _RIDGE * float(system.diagonal().amax()) or 1.0)
            factor = torch.linalg.cholesky(system)
        solved = torch.cholesky_solve(rhs, factor)
        free[i, columns], along[i, columns] = solved[:, 0], solved[:, 1]
    inside = signs * in_ball
    size, slope = (inside * (W + free)).sum(1), (inside * along).sum(1)
    active = (size > problem.radius) & (slope > 0)
    mu = torch.where(active, (size - problem.radius) / slope, 0) if problem.ball else torch.zeros_like(size)
    return W + free - mu[:, None] * along, mu


def _line_search(
    problem: RowProblem, W: Tensor, q: Tensor, target: Tensor, signs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Go towards ``target`` as far as the objective falls; return point, correlations and the part of the way.

    If all else fails up to where the first column changes sign: so far the direction descends.
    """
    direction = target - W
    # Close to the solution what is gained is below the rounding of the objective, and still worth having for the bound.
    objective = problem.objective(W, q) + 4 * torch.finfo(W.dtype).eps * problem.energies
    crossing = torch.where(target * signs <= 0, W / (W - target), torch.inf).nan_to_num(torch.inf)
    first = torch.where(signs != 0, crossing, torch.inf).amin(1).clamp_max(1)
    length = torch.ones_like(objective)
    W, q = W.clone(), q.clone()
    waiting = torch.arange(len(W), device=W.device)
    for trial in range(_TRIALS):
        part = problem.take(waiting)
        if trial == _TRIALS - 1:
            length[waiting] = torch.minimum(length, first)[waiting]
        candidate = W[waiting] + length[waiting, None] * direction[waiting]
        leaves = candidate * signs[waiting] <= 1e-12 * W[waiting].abs()
        candidate = part.project(torch.where(leaves, 0, candidate))
        correlations = part.residual_correlations(candidate)
        falls = part.objective(candidate, correlations) < objective[waiting]
        W[waiting[falls]], q[waiting[falls]] = candidate[falls], correlations[falls]
        waiting = waiting[~falls]
        if not len(waiting):
            break
        length[waiting] *= 0.35
    length[waiting] = 0
    return W, q, length
