"""Norms of matrices."""

import torch
from torch import Tensor

from idl.linalg.operators import Dense, StateMatrix


def row_sums(A: Tensor) -> Tensor:
    r"""Return :math:`\sum_j |A_{ij}|` for each row, with the summed dimension kept."""
    return A.abs().sum(-1, keepdim=True)


def inf_norm(matrix: StateMatrix) -> Tensor:
    r"""Return :math:`\|A\|_\infty`, the largest row sum of ``|A|``; a low-rank ``A`` is multiplied out in chunks."""
    if isinstance(matrix, Dense):
        return row_sums(matrix.dense()).amax()  # compressed rows have no sums
    chunks = torch.split(matrix.left, 1024)  # rows at a time, so that n^2 numbers are never held
    return torch.stack([row_sums(rows @ matrix.right.T).amax() for rows in chunks]).amax()


def row_sum_bounds(left: Tensor, right: Tensor) -> Tensor:
    r"""Return bounds on the row sums of :math:`|L R^T|`, those of :math:`|L| |R|^T`, with the summed dimension kept.

    They are the row sums where no entries of the factors cancel, and cost ``O(n r)``.
    """
    return left.abs() @ right.abs().sum(-2)[..., None]


def inf_norm_bound(matrix: StateMatrix) -> Tensor:
    r"""Return :math:`\|A\|_\infty`, or for a low-rank ``A`` the bound on it that takes ``O(n r)``."""
    return inf_norm(matrix) if isinstance(matrix, Dense) else row_sum_bounds(matrix.left, matrix.right).amax()
