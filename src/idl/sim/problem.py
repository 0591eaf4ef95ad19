"""The convex problem of each row of a state-driven model, from second moments alone, and its certificate."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from idl.linalg.projections import l1_ball_threshold


@dataclass(frozen=True)
class RowProblem:
    r"""Independent rows that share a Gram matrix, with the first columns in a ball.

    .. math:: \min_w \tfrac12 w^T G w - h^T w + \tfrac12 e + \sum_j p_j |w_j|

    With :math:`G = S^T S / m`, :math:`h = S^T z / m` and :math:`e = |z|^2 / m` the smooth part is
    :math:`|z - S w|^2 / (2m)`, the scaling of scikit-learn. The first ``ball`` columns must satisfy
    :math:`\sum_j |w_j| \le \kappa`. All rows share ``G``, whose number of samples nobody sees any more.

    Attributes:
        gram: ``G``, symmetric and positive semidefinite, float64.
        correlations: ``h``, one row a row.
        energies: ``e``.
        penalty: ``p >= 0``; a column outside the ball must have ``p > 0``.
        ball: Number of leading columns inside the ball; 0 for no ball.
        radius: ``kappa``.
    """

    gram: Float[Tensor, "d d"]
    correlations: Float[Tensor, "rows d"]
    energies: Float[Tensor, " rows"]
    penalty: Float[Tensor, " d"]
    ball: int
    radius: float

    def take(self, rows: Tensor) -> "RowProblem":
        """Return the problem of these rows."""
        return replace(self, correlations=self.correlations[rows], energies=self.energies[rows])

    def residual_correlations(self, W: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Return ``h - G w``: the correlation of each column with what is not yet explained, minus the gradient."""
        return torch.addmm(self.correlations, W, self.gram, alpha=-1)

    def objective(self, W: Float[Tensor, "rows d"], q: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """Return the objective of each row; ``q`` is ``residual_correlations(W)``."""
        return 0.5 * self._unexplained(W, q) + W.abs() @ self.penalty

    def prox(self, V: Float[Tensor, "rows d"], step: Float[Tensor, "#rows 1"]) -> Float[Tensor, "rows d"]:
        r"""Return :math:`\arg\min_w \tfrac12 |w - v|^2 + t \sum_j p_j |w_j|` under the ball.

        A soft threshold, then the projection onto the ball: together exact, since the multiplier of the ball only
        raises the threshold further.
        """
        magnitudes = (V.abs() - step * self.penalty.to(V.dtype)).clamp_min_(0)
        self._shrink_into_ball(magnitudes)
        return torch.copysign(magnitudes, V)

    def project(self, W: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Return the nearest point of the ball for each row."""
        magnitudes = W.abs()
        self._shrink_into_ball(magnitudes)
        return torch.copysign(magnitudes, W)

    def dual(self, W: Float[Tensor, "rows d"], q: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        r"""Return a lower bound of the optimum of each row, tight at the optimum.

        The dual function at :math:`\theta = s (z - Sw)`, for several ``s``. The conjugate of the ball is exact; of the
        other columns it is known that :math:`\sum_j p_j |w_j| \le P`, with ``P`` the objective reached, which holds at
        the optimum too. Then with :math:`v = S^T(z - Sw)/m = q`

        .. math:: D(s) = s\, r^T z - \tfrac{s^2}{2} r^T r - \kappa \max_j (s|v_j| - p_j)_+ - P \max_j (s|v_j|/p_j - 1)_+

        is concave in ``s``, and its pieces end or peak at the candidates.
        """
        primal = self.objective(W, q)
        rr, rz = self._unexplained(W, q), self.energies - (W * self.correlations).sum(1)
        inside, outside = q[:, : self.ball].abs(), q[:, self.ball :].abs()
        p_inside = self.penalty[: self.ball]
        relative = (outside / self.penalty[self.ball :]).amax(1) if outside.shape[1] else torch.zeros_like(primal)
        if self.ball:
            steepest = inside.gather(1, (inside - p_inside).argmax(1, keepdim=True))[:, 0]
            first_kink = (p_inside / inside).amin(1)
        else:
            steepest, first_kink = torch.zeros_like(primal), torch.ones_like(primal)
        best = torch.zeros_like(primal)
        slopes = (0.0, self.radius * steepest, primal * relative, self.radius * steepest + primal * relative)
        for s in (torch.ones_like(primal), first_kink, 1 / relative, *((rz - slope) / rr for slope in slopes)):
            s = torch.where(s.isfinite() & (s > 0), s, 0)
            value = s * rz - 0.5 * s * s * rr - primal * (s * relative - 1).clamp_min(0)
            if self.ball:
                value -= self.radius * (s[:, None] * inside - p_inside).amax(1).clamp_min(0)
            best = torch.maximum(best, value)
        return best

    def _unexplained(self, W: Tensor, q: Tensor) -> Tensor:
        # |z - S w|^2 / m; rounding may take a perfect fit below zero.
        return (self.energies - (W * (self.correlations + q)).sum(1)).clamp_min_(0)

    def _shrink_into_ball(self, magnitudes: Tensor) -> None:
        if not self.ball:
            return
        inside = magnitudes[:, : self.ball]
        outside = (inside.sum(1) > self.radius).nonzero()[:, 0]
        if len(outside):
            rows = inside[outside]
            shrunk = (rows - l1_ball_threshold(rows, self.radius)).clamp_min_(0)
            # Rounding must not leave the ball: what is a few units too much is taken back.
            shrunk *= (self.radius / shrunk.sum(1, keepdim=True)).clamp_max_(1) * (1 - 4 * torch.finfo(rows.dtype).eps)
            magnitudes[outside, : self.ball] = shrunk
