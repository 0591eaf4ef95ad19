"""Sums of the magnitudes in the rows of matrices."""

from torch import Tensor


def row_sums(A: Tensor) -> Tensor:
    r"""Return :math:`\sum_j |A_{ij}|` for each row, with the summed dimension kept."""
    return A.abs().sum(-1, keepdim=True)


def row_sum_bounds(left: Tensor, right: Tensor) -> Tensor:
    r"""Return bounds on the row sums of :math:`|L R^T|`, those of :math:`|L| |R|^T`, with the summed dimension kept.

    They are the row sums where no entries of the factors cancel, and cost ``O(n r)``.
    """
    return left.abs() @ right.abs().sum(-2)[..., None]
