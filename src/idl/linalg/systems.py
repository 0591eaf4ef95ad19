"""Dense linear systems, many at once."""

import torch
from torch import Tensor

_SAFE = 150  # size up to which torch may factorise several matrices side by side


def solve(A: Tensor, B: Tensor) -> Tensor:
    """Solve ``A X = B`` for each matrix of a batch by LU; not finite where ``A`` is singular, and never an error.

    Args:
        A: ``(..., n, n)``.
        B: ``(..., n, k)`` of the same batch.
    """
    if A.dim() == 2 or A.shape[-1] <= _SAFE or A.device.type != "cpu" or torch.get_num_threads() == 1:
        return torch.linalg.solve_ex(A, B)[0]
    # On several threads torch factorises matrices of a batch at the same time, which MKL does not stand from this size
    # on: it prints errors and may never return (pytorch issue 142815). One takes longer than a loop costs.
    pairs = zip(A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]), strict=True)
    solved = [torch.linalg.solve_ex(matrix, columns)[0] for matrix, columns in pairs]
    return torch.stack(solved).reshape(B.shape) if solved else B.clone()
