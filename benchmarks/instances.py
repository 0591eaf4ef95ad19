"""The matrices that are solved with, and the equilibrium in float64 that solutions are compared with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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


def read(n: int, *others: Tensor, gains: Sequence[float] = ()) -> Tensor:
    """Return the matrix of units that each read one unit of every tensor in ``others``, with equal gains or these."""
    A, unit = torch.zeros(n, n), torch.arange(n)
    for other, gain in zip(others, gains or [1.0] * len(others), strict=True):
        A.index_put_((unit, other), torch.full((n,), gain), accumulate=True)
    return A


def behind(n: int, distance: int) -> Tensor:
    """Return for each unit of a ring the one that lies so far behind it."""
    return (torch.arange(n) - distance) % n


FEW_NEIGHBOURS: dict[str, Callable[[int], Tensor]] = {
    "ring": lambda n: read(n, behind(n, 1)),
    "ring, own state": lambda n: read(n, behind(n, 0), behind(n, 1)),
    "ring, both neighbours": lambda n: read(n, behind(n, 1), behind(n, -1)),
    "ring, shortcut": lambda n: read(n, behind(n, 1), behind(n, n // 2), gains=(1.0, 0.1)),
    "ring, both signs": lambda n: read(n, behind(n, 1), behind(n, 2), gains=(1.0, -0.5)),
    "chain": lambda n: read(n, behind(n, -1)).tril(n - 2),  # the last unit reads none
    "chain, own state": lambda n: read(n, behind(n, 0), behind(n, -1)).triu(),  # the last unit reads itself
    "tree": lambda n: read(n, torch.arange(-1, n - 1).div(2, rounding_mode="floor").clamp_min(0)),
    "one other": lambda n: read(n, torch.randint(n, (n,))),
    "three others": lambda n: read(n, *torch.randint(n, (3, n))),
}


def impulses(batch: int, n: int, count: int, below: float) -> Tensor:
    """Return inputs that drive ``count`` units of each sample; others are active beside active ones only."""
    u = -below * torch.rand(batch, n)
    return u.scatter(1, torch.rand(batch, n).argsort(1)[:, :count], 5 * torch.rand(batch, count))


def waves(batch: int, n: int) -> Tensor:
    """Return inputs that change slowly along the units."""
    phase = 2 * torch.pi * torch.arange(n) / n
    return torch.stack([torch.sin((1 + k % 4) * phase + k) - 0.3 for k in range(batch)])


INPUTS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": torch.randn,
    "normal, of rank 8": lambda batch, n: torch.randn(batch, 8) @ torch.randn(8, n) / 2,
    "slow along the units": waves,
    "one unit driven": lambda batch, n: impulses(batch, n, 1, 0.02),
    "four units driven": lambda batch, n: impulses(batch, n, 4, 0.02),
    "four driven, decay .001": lambda batch, n: impulses(batch, n, 4, 0.001),
}


def with_row_sums(total: float) -> Callable[[Tensor], Tensor]:
    """Return the scaling of rows to this sum of magnitudes."""
    return lambda A: scaled_rows(A, total)


def with_radius(radius: float) -> Callable[[Tensor], Tensor]:
    """Return the scaling of even rows to this spectral radius."""

    def scaled(A: Tensor) -> Tensor:
        even = scaled_rows(A, 1.0)
        return even * (radius / float(torch.linalg.eigvals(even.double()).abs().max()))

    return scaled


def exact_state(A: Tensor, B: Tensor, u: Tensor, plain_steps: int = 0) -> tuple[Tensor, float]:
    """Solve ``x = relu(x A^T + u B^T)`` by semismooth Newton with dense solves, all in float64.

    Args:
        A: State matrix.
        B: Input matrix.
        u: Inputs.
        plain_steps: Applications of the map before: where signs settle one after another, as many as there are units.

    Returns:
        The equilibrium and its residual relative to the largest entry: what rounding leaves, if Newton arrived.
    """
    A, Z = A.double(), u.double() @ B.double().T
    eye = torch.eye(len(A), dtype=A.dtype)
    x = torch.relu(Z)
    for _ in range(plain_steps):
        x = torch.relu(x @ A.T + Z)
    for _ in range(_NEWTON_STEPS):
        z = x @ A.T + Z
        defect, active = x - torch.relu(z), (z > 0).double()
        residual = float(defect.abs().max() / x.abs().max())
        if residual < 1e-14:
            break
        for row in range(len(x)):  # on several threads MKL fails on batches of this size (pytorch issue 142815)
            x[row] -= torch.linalg.solve(eye - active[row, :, None] * A, defect[row])
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
