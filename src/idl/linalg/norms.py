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
