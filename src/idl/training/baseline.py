"""The explicit network that implicit models are compared with: same matrices, no equilibrium."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idl import checks


class ExplicitMLP(nn.Module):
    r"""Compute :math:`y = C\,\mathrm{relu}(A\,\mathrm{relu}(Bu)) + Du`: two layers and a skip connection.

    It has the matrices of an :class:`idl.ImplicitModel` without biases, in the same shapes, and so the same
    number of parameters; it is the implicit model stopped after two steps from zero, with no constraint on
    ``A``. With a ``rank``, ``A`` is the product :math:`LR^\top` of the same factors as in the low-rank
    implicit model.

    Args:
        input_dim: Number of features ``p`` of one input.
        hidden_dim: Width ``n`` of both hidden layers.
        output_dim: Number of outputs ``q``.
        rank: Rank of ``A``, in 1..hidden_dim; a full matrix if ``None``.

    Raises:
        TypeError, ValueError: If a dimension or the rank is no integer or out of range.

    Example:
        >>> ExplicitMLP(64, 100, 10)(torch.rand(32, 64)).shape
        torch.Size([32, 10])
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, rank: int | None = None) -> None:
        super().__init__()
        for name, size in (("input_dim", input_dim), ("hidden_dim", hidden_dim), ("output_dim", output_dim)):
            checks.positive_integer(name, size)
        if rank is not None and checks.positive_integer("rank", rank) > hidden_dim:
            raise ValueError(f"`rank` must be in 1..{hidden_dim}, the hidden_dim, or None for a full A; got {rank}.")
        if rank is None:
            self.A = _uniform(hidden_dim, hidden_dim)
        else:
            self.L = _uniform(hidden_dim, rank)
            self.R = nn.Parameter(_uniform(rank, hidden_dim).detach().T.contiguous())
        self.B = _uniform(hidden_dim, input_dim)
        self.C = _uniform(output_dim, hidden_dim)
        self.D = _uniform(output_dim, input_dim)
        self.rank = rank

    def forward(self, u: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch q"]:
        """Return the outputs for the inputs ``u``, one per row."""
        x = torch.relu(u @ self.B.T)
        x = x @ self.A.T if self.rank is None else x @ self.R @ self.L.T
        return torch.relu(x) @ self.C.T + u @ self.D.T


def _uniform(rows: int, columns: int) -> nn.Parameter:
    """Return a matrix initialised like that of :class:`torch.nn.Linear`."""
    return nn.Parameter(torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5))
