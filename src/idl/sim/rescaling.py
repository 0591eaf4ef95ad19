r"""Diagonal changes of the states' units that leave every prediction as it is.

For a positively homogeneous activation and ``s > 0`` the model :math:`(SAS^{-1}, SB, CS^{-1}, D)` with the states
``s * x`` predicts what :math:`(A, B, C, D)` does, so that a teacher can be brought to :math:`\|A\|_\infty \le \kappa`
before its states are taken. A feed-forward teacher always can: its ``A`` is nilpotent.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

HOMOGENEOUS = ("relu", "leaky_relu")
"""Activations with ``phi(s z) = s phi(z)`` for ``s > 0``."""


def unit_variance(
    A: Float[Tensor, "n n"], sizes: Sequence[int], energies: Float[Tensor, " n"], kappa: float
) -> Float[Tensor, " n"]:
    """Return factors that bring each unit's pre-activation to mean square 1, as far as its row sum permits.

    Args:
        A: State matrix of the teacher, last layer first.
        sizes: Units of each layer, in this order.
        energies: Mean square of each pre-activation.
        kappa: Bound on the row sums of the rescaled ``A``.
    """

    def wanted(layer: Tensor, sums: Tensor) -> Tensor:
        size = energies[layer].sqrt()
        size = torch.where(size > 1e-12 * energies.max().sqrt(), size, 1)  # a unit that is always 0 stays as it is
        return torch.minimum(1 / size, kappa / sums)

    return _from_first_to_last(A, sizes, wanted)


def layerwise(A: Float[Tensor, "n n"], sizes: Sequence[int], kappa: float) -> Float[Tensor, " n"]:
    """Return one factor a layer, at most 1, that brings its largest row sum to ``kappa``."""
    return _from_first_to_last(A, sizes, lambda layer, sums: (kappa / sums.max()).clamp_max(1).expand_as(sums))


def closed_form(A: Float[Tensor, "n n"], kappa: float) -> Float[Tensor, " n"]:
    r"""Return :math:`1 / t`, :math:`t = (I - |A| / \kappa)^{-1} 1`, for row sums of :math:`\kappa (1 - 1 / t_i)`."""
    n = len(A)
    ones = torch.ones(n, 1, dtype=A.dtype, device=A.device)
    return 1 / torch.linalg.solve(torch.eye(n, dtype=A.dtype, device=A.device) - A.abs() / kappa, ones)[:, 0]


def _from_first_to_last(A: Tensor, sizes: Sequence[int], wanted: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Choose the factors of each layer from its indices and its row sums over the layers chosen before."""
    s = torch.ones(len(A), dtype=A.dtype, device=A.device)
    stop = len(A)
    for size in reversed(sizes):  # the first layer is stored last
        layer = torch.arange(stop - size, stop, device=A.device)
        sums = (A[layer].abs() / s).sum(1)
        s[layer] = wanted(layer, sums)
        stop -= size
    return s
