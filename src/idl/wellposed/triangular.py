"""Strictly triangular matrices: feed-forward networks as implicit models."""

from dataclasses import dataclass

from torch import Tensor

from idl.linalg.operators import StateMatrix, StrictlyUpper
from idl.wellposed.base import AbstractConstraint


@dataclass(frozen=True)
class StrictlyTriangular(AbstractConstraint):
    """Keep what lies strictly above the diagonal: well posed at any size, for any componentwise activation.

    Example:
        >>> import torch
        >>> StrictlyTriangular().admit(torch.ones(2, 2), lipschitz=1.0).dense()
        tensor([[0., 1.],
                [0., 0.]])
    """

    contraction = None

    def admit(self, A: Tensor, lipschitz: float) -> StateMatrix:
        """Return ``A`` without its diagonal and what lies below."""
        return StrictlyUpper(A.triu(1))
