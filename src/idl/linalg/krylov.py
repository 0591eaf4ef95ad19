"""Krylov solves of many small linear systems at once, one per row, matrix-free."""

from collections.abc import Callable

import torch
from torch import Tensor


def gcr(apply: Callable[[Tensor], Tensor], rhs: Tensor, *, rtol: float, max_steps: int) -> tuple[Tensor, Tensor, int]:
    """Solve ``apply(v) = rhs`` for each row by generalised conjugate residuals (Eisenstat, Elman, Schultz 1983).

    Each row minimises its own residual over its own Krylov space, as GMRES does, but needs no Hessenberg system:
    the directions are kept with their images orthonormal, and solution and residual are updated as they come.

    Args:
        apply: The linear map, on ``(rows, n)``; must act on each row by itself.
        rhs: Right-hand sides, ``(rows, n)``.
        rtol: Reduction of the residual's 2-norm at which a row is solved.
        max_steps: Most products, and most directions kept: memory is ``2 * max_steps * rows * n`` numbers.

    Returns:
        The solutions, the reduction reached by each row (1 where nothing was gained), and the number of products.
    """
    rows, n = rhs.shape
    directions = rhs.new_empty(rows, max_steps, n)
    images = rhs.new_empty(rows, max_steps, n)
    tiny = torch.finfo(rhs.dtype).tiny
    # Right-hand sides and directions are brought to a size of about 1: their squares must not underflow.
    size = rhs.abs().amax(1, keepdim=True).clamp_min(tiny)
    v, residual = torch.zeros_like(rhs), rhs / size
    start = torch.linalg.vector_norm(residual, dim=1).clamp_min(tiny)
    reduction = torch.ones_like(start)
    for k in range(max_steps):
        p = residual / residual.abs().amax(1, keepdim=True).clamp_min(tiny)
        q = apply(p)
        if k:
            overlap = torch.bmm(images[:, :k], q[:, :, None]).transpose(1, 2)
            q = q - torch.bmm(overlap, images[:, :k])[:, 0]
            p = p - torch.bmm(overlap, directions[:, :k])[:, 0]
        length = torch.linalg.vector_norm(q, dim=1, keepdim=True).clamp_min(tiny)
        images[:, k] = q / length
        directions[:, k] = p / length
        gain = (residual * images[:, k]).sum(1, keepdim=True)
        v = torch.addcmul(v, gain, directions[:, k])
        residual = torch.addcmul(residual, gain, images[:, k], value=-1)
        reduction = torch.linalg.vector_norm(residual, dim=1) / start
        if not bool((reduction > rtol).any()):  # a NaN row is no reason to go on
            break
    return v * size, reduction, k + 1
