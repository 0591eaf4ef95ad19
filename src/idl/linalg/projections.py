"""Euclidean projections, for all rows of a matrix at once."""

import torch
from torch import Tensor

from idl.linalg.operators import to_precise


def l1_ball_threshold(magnitudes: Tensor, radius: float) -> Tensor:
    r"""Return for each row the :math:`\tau \ge 0` with :math:`\sum_j \max(m_j - \tau, 0) = \mathrm{radius}`.

    Rows whose sum is at most ``radius`` get 0. Newton's method on this piecewise linear, convex function of
    :math:`\tau` started at 0 rises monotonically and ends after finitely many passes (Michelot's algorithm), for all
    rows together and without a sort.

    Args:
        magnitudes: Non-negative numbers, ``(rows, n)``.
        radius: Radius of the ball, positive.
    """
    tau = torch.zeros_like(magnitudes[:, :1])
    while True:  # ends: each pass removes an entry from some row's support or changes nothing
        support = magnitudes > tau
        excess = torch.where(support, magnitudes, 0).sum(1, keepdim=True) - radius
        raised = torch.maximum(tau, excess / support.sum(1, keepdim=True).clamp_min(1))
        if not bool((raised > tau).any()):
            return tau
        tau = raised


def project_rows_l1(A: Tensor, radius: float) -> Tensor:
    r"""Project each row of ``A`` onto the :math:`\ell_1` ball of the radius: the nearest row inside.

    Differentiable: with the support held, the projection is an affine function of the row, which is what
    autograd sees here.

    Args:
        A: Matrix, ``(rows, n)``.
        radius: Radius of the ball, positive.

    Returns:
        The projected matrix; rows inside the ball are returned as they are, bit by bit.
    """
    # In float64, since A - tau sign(A) cancels where the magnitudes are far above the radius.
    precise = to_precise(A)
    magnitudes = precise.abs()
    tau = l1_ball_threshold(magnitudes.detach(), radius)
    outside = tau > 0
    support = magnitudes > tau
    # tau again, now as a differentiable function of the row: (sum over the support - radius) / size of the support.
    sums = torch.where(support, magnitudes, 0).sum(1, keepdim=True)
    tau = torch.where(outside, (sums - radius) / support.sum(1, keepdim=True).clamp_min(1), 0)
    projected = torch.where(support, precise - tau * torch.sign(precise), 0).to(A.dtype)
    # What rounding left outside the ball is taken back; a row that is not finite becomes NaN here.
    reached = projected.detach().abs().sum(1, keepdim=True)
    return torch.where(outside, projected * (radius / reached.clamp_min(radius * reached.gt(0))), A)
