"""Columns that cost nothing are least squares given the others: the problem without them, and the way back."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from idl.sim.problem import RowProblem


class Elimination:
    r"""The problem that remains when its free columns, outside the ball and without a penalty, take their best values.

    .. math::
        w_0 = G_{00}^+ (h_0 - G_{01} w_1), \qquad
        G' = G_{11} - G_{10} G_{00}^+ G_{01}, \quad h' = h_1 - G_{10} G_{00}^+ h_0, \quad
        e' = e - h_0^T G_{00}^+ h_0

    Objectives and bounds of what remains are those of the whole. Free columns may be constant or depend on each other:
    :math:`w_0` is then the smallest of the best, in units of the columns' sizes. ``O(d^3)``, once for all rows.

    Attributes:
        problem: What remains.
    """

    def __init__(self, whole: RowProblem) -> None:
        self.whole, free = whole, whole.free
        self._free, self._kept = free.nonzero()[:, 0], (~free).nonzero()[:, 0]
        rows, h = whole.gram[self._free], whole.correlations
        # Columns Q of the basis: Q^T G_00 Q = 1 and Q Q^T is the pseudo-inverse.
        self._basis = whitening(rows[:, self._free])
        self._shared = rows[:, self._kept].T @ self._basis
        self._targets = h[:, self._free] @ self._basis
        gram = whole.gram[self._kept][:, self._kept]
        rest = gram - self._shared @ self._shared.T
        # A column that the free ones contain is left with rounding errors alone.
        contained = rest.diagonal() <= len(whole.penalty) * torch.finfo(gram.dtype).eps * gram.diagonal()
        correlations = h[:, self._kept] - self._targets @ self._shared.T
        self.problem = replace(
            whole,
            gram=torch.where(contained[:, None] | contained, 0, rest),
            correlations=torch.where(contained, 0, correlations),
            energies=(whole.energies - self._targets.square().sum(1)).clamp_min(0),
            penalty=whole.penalty[self._kept],
            ridge=None if whole.ridge is None else whole.ridge[self._kept],
            # Of columns and targets that the free ones explain rounding is left, of what they were.
            column_energies=whole.measured_columns[self._kept],
            target_energies=whole.measured_targets,
        )

    def restricted(self, W: Float[Tensor, "rows d"]) -> Float[Tensor, "rows k"]:
        """Return the columns of ``W`` that remain."""
        return W[:, self._kept]

    def recovered(self, W: Float[Tensor, "rows k"]) -> Float[Tensor, "rows d"]:
        """Return points of the whole: ``W``, and the best values of the free columns beside it."""
        whole = torch.empty_like(self.whole.correlations)
        whole[:, self._kept] = W
        whole[:, self._free] = (self._targets - W @ self._shared) @ self._basis.T
        return whole


def whitening(gram: Tensor) -> Tensor:
    """Return ``Q`` with ``Q^T gram Q = 1`` and as many columns as ``gram`` has rank."""
    unit = gram.diagonal().clamp_min(0).rsqrt().nan_to_num(posinf=0)  # so that what is rounding has one meaning
    eigenvalues, vectors = torch.linalg.eigh(unit[:, None] * gram * unit)
    kept = eigenvalues > len(gram) * torch.finfo(gram.dtype).eps * eigenvalues.amax()
    return unit[:, None] * vectors[:, kept] * eigenvalues[kept].rsqrt()
