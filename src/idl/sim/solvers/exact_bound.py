"""The dual bound of exact matching: what the multipliers of the equations prove of the smallest penalty."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from idl.sim.problem import RowProblem

_BISECTIONS = 100
_EPS = torch.finfo(torch.float64).eps


def scalings(problem: RowProblem, y: Tensor) -> list[float]:
    """Return factors of the multipliers that may be best: 1, the largest that is feasible, where the ball joins."""
    inside = torch.arange(len(y)) < problem.ball
    kinks = torch.where(y > 0, problem.penalty / y, torch.inf)
    straight = _flat(problem)
    most = float(torch.where(straight & ~inside, kinks, torch.inf).amin()) * (1 - 4 * _EPS) if len(y) else math.inf
    first = float(torch.where(inside, kinks, torch.inf).amin()) if problem.ball else math.inf
    return [s for s in (min(1.0, most), most, min(first, most)) if math.isfinite(s)]


def lower_bound(problem: RowProblem, y: Float[Tensor, " d"], value: float, s: float) -> tuple[float, float]:
    r"""Return the dual function at :math:`s\theta`, at least 0, and the ball's price :math:`\mu` there.

    .. math:: s\,\theta^T z - \kappa \mu - \sum_j f_j^*((s|S^T\theta|_j - \mu_j)_+), \quad
              f_j(w) = p_j h(|w|) + \tfrac{r_j}{2} w^2

    with :math:`\mu_j = \mu` inside the ball and 0 outside. It is concave in :math:`\mu`, and best where the maximisers
    of the conjugates inside sum to :math:`\kappa`. Outside, columns whose conjugate is infinite limit ``s``.
    """
    y, ball, straight = s * y, problem.ball, _flat(problem)
    inside = y[:ball]
    mu = 0.0
    if ball:
        mu = float(torch.where(straight[:ball], inside - problem.penalty[:ball], 0).amax().clamp_min(0))
        high = max(mu, float(inside.amax()))
        for _ in range(_BISECTIONS):
            middle = (mu + high) / 2
            if float(_maximisers(problem, slice(None, ball), (inside - middle).clamp_min(0)).sum()) > problem.radius:
                mu = middle
            else:
                high = middle
            if high - mu <= _EPS * high:
                break
        if float(_maximisers(problem, slice(None, ball), (inside - mu).clamp_min(0)).sum()) > problem.radius:
            mu = high
    y[:ball] = (inside - mu).clamp_min(0)
    w = _maximisers(problem, slice(None), y)
    conjugate = float(y @ w - problem.cost(w[None])[0])
    return max(s * value - problem.radius * mu - conjugate, 0.0) if ball else max(s * value - conjugate, 0.0), mu


def _maximisers(problem: RowProblem, part: slice, y: Tensor) -> Tensor:
    """Return the sizes at which ``y w`` less the penalty is largest; 0 for columns where that is 0 or infinite."""
    p, knee = problem.penalty[part], problem.knee
    ridge = torch.zeros_like(p) if problem.ridge is None else problem.ridge[part]
    within = torch.where(ridge > 0, (y - p).clamp_min(0) / ridge, torch.where(y > p, torch.inf, 0))
    beyond = y / (p / knee + ridge) if knee < math.inf else within
    return torch.where(_flat(problem)[part], 0, torch.where(within > knee, beyond, within))


def _flat(problem: RowProblem) -> Tensor:
    """Return which columns have a penalty that grows like their size for ever."""
    straight = torch.full_like(problem.penalty, problem.knee == math.inf, dtype=torch.bool) | (problem.penalty == 0)
    return straight if problem.ridge is None else straight & (problem.ridge == 0)
