"""Euclidean projections, for all rows of a matrix at once."""

import torch
from torch import Tensor

from idl.linalg.operators import to_precise


def l1_ball_threshold(magnitudes: Tensor, radius: float) -> Tensor:
    r"""Return for each row the :math:`\tau \ge 0` with :math:`\sum_j \max(m_j - \tau, 0) = \mathrm{radius}`.

    Rows whose sum is at most ``radius`` get 0. With the magnitudes sorted downwards, :math:`\tau` is the largest of
    the values :math:`(\sum_{i \le k} m_i - \mathrm{radius}) / k` (Held, Wolfe, Crowder 1974): ``O(n log n)`` a row.

    Args:
        magnitudes: Non-negative numbers, ``(rows, n)``.
        radius: Radius of the ball, positive.
    """
    descending = magnitudes.sort(1, descending=True).values
    counts = torch.arange(1, magnitudes.shape[1] + 1, dtype=magnitudes.dtype, device=magnitudes.device)
    return ((descending.cumsum(1) - radius) / counts).amax(1, keepdim=True).clamp_min(0)


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
    outside = ~(magnitudes.detach().sum(1, keepdim=True) <= radius)
    # Entries more than the radius below the largest end at zero. Without what the others have in common no magnitude,
    # however large, makes the radius vanish in a sum.
    largest = magnitudes.detach().amax(1, keepdim=True)
    magnitudes = torch.where(largest > radius, (magnitudes - largest + radius).clamp_min(0), magnitudes)
    tau = l1_ball_threshold(magnitudes.detach(), radius)
    support = magnitudes > tau
    # tau again, now as a differentiable function of the row: (sum over the support - radius) / size of the support.
    sums = torch.where(support, magnitudes, 0).sum(1, keepdim=True)
    tau = torch.where(outside, (sums - radius) / support.sum(1, keepdim=True).clamp_min(1), 0)
    projected = torch.where(support, (magnitudes - tau) * torch.sign(precise), 0).to(A.dtype)
    # What rounding left outside the ball is taken back, so that projecting again changes nothing. A row that is not
    # finite has no support and becomes 0 / 0 here, which is NaN.
    reached = to_precise(projected.detach()).abs().sum(1, keepdim=True)
    inside = radius * (1 - 8 * torch.finfo(A.dtype).eps)
    factor = torch.where((reached > radius) | (reached == 0), inside / reached, 1).to(A.dtype)
    return torch.where(outside, projected * factor, A)
