r"""Matrices with :math:`\|A\|_\infty \le \kappa < 1`, for which the map contracts by ``kappa`` in the max norm.

The condition is row by row (El Ghaoui et al. 2021), so that both forms here act on each row by itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from idl import checks
from idl.linalg.norms import row_sum_bounds, row_sums
from idl.linalg.operators import Dense, Factored, StateMatrix
from idl.linalg.projections import project_rows_l1
from idl.transforms import transforms_are_active
from idl.wellposed.base import AbstractConstraint


@dataclass(frozen=True)
class _Ball(AbstractConstraint):
    """The bound itself, whatever brings a matrix below it."""

    kappa: float = 0.99

    def __post_init__(self) -> None:
        checks.in_open_unit("kappa", self.kappa, "A map contracts for certain only if ||A||_inf <= kappa < 1.")

    @property
    def contraction(self) -> float:
        """The factor ``kappa``."""
        return self.kappa


@dataclass(frozen=True)
class InfNorm(_Ball):
    r"""Rescale each row whose sum of magnitudes is above the radius down to it; leave the others.

    The radius is ``kappa``, or ``kappa / L`` for an activation of slope up to ``L > 1``. A low-rank
    :math:`A = LR^T` is held by the row bound :math:`\sum_j |A_{ij}| \le \sum_k |L_{ik}| \sum_j |R_{jk}|`, in
    ``O(n r)`` and without forming ``A``: only ``L`` is rescaled.

    Args:
        kappa: Bound on the largest row sum, in (0, 1).

    Raises:
        TypeError, ValueError: If ``kappa`` is not in (0, 1).

    Example:
        >>> InfNorm(kappa=0.5).admit(torch.tensor([[0.8, 0.2], [0.1, 0.3]]), lipschitz=1.0).dense()
        tensor([[0.4000, 0.1000],
                [0.1000, 0.3000]])
    """

    def admit(self, A: Tensor, lipschitz: float) -> StateMatrix:
        """Return ``A`` with its rows rescaled; bit by bit ``A`` itself where no row is above the radius."""
        radius = self.kappa / max(1.0, lipschitz)
        if _all_within(row_sums(A.detach()), radius):
            return Dense(A)
        sums = (A * A.detach().sign()).sum(-1, keepdim=True)  # autograd's derivative of abs takes twice as long
        return Dense(_rescaled(A, sums, radius))

    def admit_factors(self, left: Tensor, right: Tensor, lipschitz: float) -> StateMatrix:
        """Return the factors with the rows of ``left`` rescaled."""
        radius = self.kappa / max(1.0, lipschitz)
        bound = row_sum_bounds(left, right)
        return Factored(left if _all_within(bound.detach(), radius) else _rescaled(left, bound, radius), right)


@dataclass(frozen=True)
class InfNormProjection(_Ball):
    r"""Project each row onto the :math:`\ell_1` ball of the radius: the nearest admissible matrix, often sparse.

    An entry that the projection sets to zero gets no gradient until its row's threshold falls below it. There is no
    low-rank form: of a product of factors no projection is known that does not multiply them out.

    Args:
        kappa: Bound on the largest row sum, in (0, 1).

    Raises:
        TypeError, ValueError: If ``kappa`` is not in (0, 1).

    Example:
        >>> InfNormProjection(kappa=0.5).admit(torch.tensor([[0.8, 0.2], [0.1, 0.3]]), lipschitz=1.0).dense()
        tensor([[0.5000, 0.0000],
                [0.1000, 0.3000]])
    """

    def admit(self, A: Tensor, lipschitz: float) -> StateMatrix:
        """Return the projection of ``A``."""
        return Dense(project_rows_l1(A, _below(self.kappa / max(1.0, lipschitz), A.dtype)))


def _below(radius: float, dtype: torch.dtype) -> float:
    """Return the radius less what rounding may add to a row's sum."""
    return radius * (1 - 4 * torch.finfo(dtype).eps)


def _all_within(sums: Tensor, radius: float) -> bool:
    """Return whether no row is above the radius: the parameter is the answer, without a node of autograd."""
    return not transforms_are_active() and float(sums.max()) <= radius


def _rescaled(A: Tensor, sums: Tensor, radius: float) -> Tensor:
    below = _below(radius, A.dtype)
    return A * (below / sums.clamp_min(below))
