r"""The reverse Huber function of a size: itself up to a knee ``k``, and :math:`(w^2 + k^2) / (2k)` beyond.

The convex relaxation of a number of weights with a ridge: :math:`2\sqrt{ab}\,h(w)` with ``k`` the root of ``b / a`` is
the smallest convex function between :math:`a w^2 + b\,[w \ne 0]` and 0. The sums over entries that a problem needs
are here, with penalties ``p`` and knees that broadcast against sizes ``(rows, n)``.
"""

import torch
from torch import Tensor


def value(sizes: Tensor, knee: float) -> Tensor:
    """Return ``h`` of each size."""
    return sizes + (sizes - knee).clamp_min(0).square() / (2 * knee)


def shrunk(sizes: Tensor, penalty: Tensor, knee: float) -> Tensor:
    r"""Return :math:`\arg\min_w \tfrac12 (w - v)^2 + p\,h(w)`: soft threshold, or a quotient beyond the knee."""
    return torch.minimum((sizes - penalty).clamp_min(0), sizes / (1 + penalty / knee))


def ball_threshold(sizes: Tensor, penalty: Tensor, knee: float, radius: float) -> Tensor:
    r"""Return for each row the :math:`\tau` by which sizes must fall for ``shrunk`` of them to sum to ``radius``.

    The sum is :math:`\sum_j (v_j - p_j - \tau)_+ - \tfrac{p_j}{p_j + k} (v_j - p_j - k - \tau)_+`, piecewise linear:
    with its kinks sorted it is known on each piece. ``O(n log n)``; rows must sum to more than ``radius`` before.
    """
    kinks, order = torch.cat((sizes - penalty, sizes - penalty - knee), 1).sort(1, descending=True)
    weights = torch.cat((torch.ones_like(sizes), -penalty / (penalty + knee)), 1).gather(1, order)
    slopes, levels = weights.cumsum(1), (weights * kinks).cumsum(1)
    last = (levels - slopes * kinks < radius).sum(1, keepdim=True).clamp_min(1) - 1
    return (levels.gather(1, last) - radius) / slopes.gather(1, last)


def conjugate(y: Tensor, penalty: Tensor, knee: Tensor) -> Tensor:
    r"""Return :math:`\sup_w y w - p\,h(w) = k (y^2 - p^2)_+ / (2p)` for each ``y >= 0``; the best ``w`` is ``ky/p``."""
    return torch.where(y > penalty, knee * (y - penalty) * (y + penalty) / (2 * penalty), 0)


def best_price(y: Tensor, penalty: Tensor, knee: Tensor, radius: float) -> Tensor:
    r"""Return for each row the :math:`\mu \ge 0` that minimises :math:`\mu r + \sum_j (p_j h)^*(y_j - \mu)`.

    There the best :math:`w` sum to the radius ``r``. Their sum falls in :math:`\mu`, with a jump where an entry joins.
    """
    free = penalty == 0
    kinks, order = (y - penalty).sort(1, descending=True)
    weights = torch.where(free, 0, knee / penalty).gather(1, order)
    slopes, levels = weights.cumsum(1), (weights * y.gather(1, order)).cumsum(1)
    joined = (levels - slopes * kinks < radius).sum(1, keepdim=True)
    last = (joined - 1).clamp_min(0)
    inner = torch.where(joined > 0, (levels.gather(1, last) - radius) / slopes.gather(1, last), -torch.inf)
    following = kinks.gather(1, joined.clamp_max(kinks.shape[1] - 1))
    price = torch.maximum(inner, torch.where(joined < kinks.shape[1], following, -torch.inf))
    return torch.maximum(price, torch.where(free, y, 0).amax(1, keepdim=True)).clamp_min(0)


def best_scale(y: Tensor, penalty: Tensor, knee: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
    r"""Return for each row the :math:`s` that maximises :math:`a s - \tfrac{b}{2} s^2 - \sum_j (p_j h)^*(s y_j)`."""
    kinks, order = torch.where(y > 0, penalty / y, torch.inf).sort(1)
    weights = torch.where(y > 0, knee * y.square() / penalty, 0).gather(1, order)
    curvatures = quadratic[:, None] + torch.nn.functional.pad(weights.cumsum(1), (1, 0))
    joined = (linear[:, None] > kinks * curvatures[:, 1:]).sum(1, keepdim=True)
    kinks = torch.nn.functional.pad(kinks, (0, 1), value=torch.inf)
    return torch.minimum(linear / curvatures.gather(1, joined)[:, 0], kinks.gather(1, joined)[:, 0])
