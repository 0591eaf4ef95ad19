"""The matrices that are solved with, and the equilibrium in float64 that solutions are compared with."""

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK = 2**23  # entries of the dense systems that are held at once
_NEWTON_STEPS = 60


def scaled_rows(A: Tensor, total: float) -> Tensor:
    """Return ``A`` with each row scaled so that its magnitudes sum to ``total``."""
    return A * (total / A.abs().sum(1, keepdim=True))


def random_model(hidden: int, inputs: int, outputs: int, row_sum: float) -> dict[str, Tensor]:
    """Return normal matrices ``A, B, C, D``; the rows of ``|A|`` sum to ``row_sum``."""
    return {"A": scaled_rows(torch.randn(hidden, hidden), row_sum), **_outer_matrices(hidden, inputs, outputs)}


def random_low_rank_model(hidden: int, inputs: int, outputs: int, rank: int, row_sum: float) -> dict[str, Tensor]:
    """Return normal ``L, R, B, C, D``; the rows of ``|L|`` and the columns of ``|R|`` sum to ``row_sum``."""
    L, R = scaled_rows(torch.randn(hidden, rank), row_sum), scaled_rows(torch.randn(rank, hidden), row_sum).T
    return {"L": L, "R": R, **_outer_matrices(hidden, inputs, outputs)}


def positive(n: int) -> Tensor:
    """Return a positive matrix: one slow direction, its row sum the contraction."""
    return torch.rand(n, n)


def blocks(n: int) -> Tensor:
    """Return five positive blocks, each coupled to the others by a thousandth: five slow directions."""
    return torch.block_diag(*[torch.rand(n // 5, n // 5) for _ in range(5)]) + 1e-3 * torch.rand(n, n)


def mixed_signs(n: int) -> Tensor:
    """Return a matrix of which a tenth is small and negative: of spectral radius .98 it has row sums below 1."""
    return torch.rand(n, n) * torch.where(torch.rand(n, n) < 0.1, -0.07, 1.0)


def random_signs(n: int) -> Tensor:
    """Return a normal matrix: of spectral radius .98 it has row sums far above 1, and no constraint admits it."""
    return torch.randn(n, n)


def with_row_sums(total: float) -> Callable[[Tensor], Tensor]:
    """Return the scaling of rows to this sum of magnitudes."""
    return lambda A: scaled_rows(A, total)


def with_radius(radius: float) -> Callable[[Tensor], Tensor]:
    """Return the scaling of even rows to this spectral radius."""

    def scaled(A: Tensor) -> Tensor:
        even = scaled_rows(A, 1.0)
        return even * (radius / float(torch.linalg.eigvals(even.double()).abs().max()))

    return scaled


def exact_state(A: Tensor, B: Tensor, u: Tensor) -> tuple[Tensor, float]:
    """Solve ``x = relu(x A^T + u B^T)`` by semismooth Newton with dense solves, all in float64.

    Returns:
        The equilibrium and its residual relative to the largest entry: what rounding leaves, if Newton arrived.
    """
    A, Z = A.double(), u.double() @ B.double().T
    eye = torch.eye(len(A), dtype=A.dtype)
    chunk = max(1, _CHUNK // len(A) ** 2)
    x = torch.relu(Z)
    for _ in range(_NEWTON_STEPS):
        z = x @ A.T + Z
        defect, active = x - torch.relu(z), (z > 0).double()
        residual = float(defect.abs().max() / x.abs().max())
        if residual < 1e-14:
            break
        for rows in torch.arange(len(x)).split(chunk):
            x[rows] -= torch.linalg.solve(eye - active[rows, :, None] * A, defect[rows])
    return x, residual


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Return ``|x - truth| / |truth|`` in the Frobenius norm."""
    return float((x.double() - truth).norm() / truth.norm())


def _outer_matrices(hidden: int, inputs: int, outputs: int) -> dict[str, Tensor]:
    shapes = {"B": (hidden, inputs), "C": (outputs, hidden), "D": (outputs, inputs)}
    return {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}


def random_batch(inputs: int, batch: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Return inputs in [0, 1] and labels."""
    return torch.rand(batch, inputs), torch.randint(outputs, (batch,))
