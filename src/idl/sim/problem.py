"""The convex problem of each row of a state-driven model, from second moments alone, and its certificate."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idl import checks
from idl.linalg.projections import l1_ball_threshold
from idl.sim import reverse_huber


@dataclass(frozen=True)
class RowProblem:
    r"""Independent rows that share a Gram matrix, with the first columns in a ball.

    .. math:: \min_w \tfrac12 w^T G w - h^T w + \tfrac12 e + \sum_j p_j |w_j|

    With :math:`G = S^T S / m`, :math:`h = S^T z / m` and :math:`e = |z|^2 / m` the smooth part is
    :math:`|z - S w|^2 / (2m)`, the scaling of scikit-learn. The first ``ball`` columns must satisfy
    :math:`\sum_j |w_j| \le \kappa`. All rows share ``G``, whose number of samples nobody sees any more.

    With a finite knee ``k`` the penalty of an entry beyond it is :math:`p_j (w_j^2 + k^2) / (2k)`, which joins
    smoothly: the reverse Huber penalty, the convex relaxation of a number of weights with a ridge.

    Attributes:
        gram: ``G``, symmetric and positive semidefinite, float64.
        correlations: ``h``, one row a row.
        energies: ``e``.
        penalty: ``p >= 0``. Solvers eliminate the columns outside the ball that have ``p = 0``; their bound is 0.
        ball: Number of leading columns inside the ball; 0 for no ball.
        radius: ``kappa >= 0``.
        knee: ``k > 0``; infinite for a penalty that is :math:`|w_j|` throughout.
        column_energies, target_energies: Mean squares that rounding is measured by, where columns and targets were
            larger before their means were taken off; those of ``G`` and ``e`` if ``None``.
        ridge: ``r >= 0`` of :math:`\tfrac12 \sum_j r_j w_j^2`, 0 if ``None``. Where targets need not be matched exactly
            solvers add it to ``G``.

    Example:
        >>> from idl.sim.solvers import Hybrid
        >>> gram, correlations = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.3]], dtype=torch.float64)
        >>> energies, penalty = torch.ones(1, dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64)
        >>> problem = RowProblem(gram, correlations, energies, penalty, ball=2, radius=0.8)
        >>> Hybrid(tol=1e-9).solve(problem).W  # without the ball (.9, .2), and with it .15 less of each
        tensor([[0.7500, 0.0500]], dtype=torch.float64)
    """

    gram: Float[Tensor, "d d"]
    correlations: Float[Tensor, "rows d"]
    energies: Float[Tensor, " rows"]
    penalty: Float[Tensor, " d"]
    ball: int
    radius: float
    knee: float = math.inf
    ridge: Float[Tensor, " d"] | None = None
    column_energies: Float[Tensor, " d"] | None = None
    target_energies: Float[Tensor, " rows"] | None = None

    @property
    def free(self) -> Bool[Tensor, " d"]:
        """Which columns are outside the ball and without a penalty."""
        free = self.penalty == 0 if self.ridge is None else (self.penalty == 0) & (self.ridge == 0)
        free[: self.ball] = False
        return free

    @property
    def measured_columns(self) -> Float[Tensor, " d"]:
        """The mean square of each column that rounding is measured by."""
        return self.gram.diagonal() if self.column_energies is None else self.column_energies

    @property
    def measured_targets(self) -> Float[Tensor, " rows"]:
        """The mean square of each target that rounding is measured by."""
        return self.energies if self.target_energies is None else self.target_energies

    def take(self, rows: Tensor) -> "RowProblem":
        """Return the problem of these rows."""
        targets = None if self.target_energies is None else self.target_energies[rows]
        correlations, energies = self.correlations[rows], self.energies[rows]
        return replace(self, correlations=correlations, energies=energies, target_energies=targets)

    def residual_correlations(self, W: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Return ``h - G w``: the correlation of each column with what is not yet explained, minus the gradient."""
        return torch.addmm(self.correlations, W, self.gram, alpha=-1)

    def objective(self, W: Float[Tensor, "rows d"], q: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """Return the objective of each row; ``q`` is ``residual_correlations(W)``."""
        return 0.5 * self._unexplained(W, q) + self.cost(W)

    def cost(self, W: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """Return the penalty of each row, with the ridge if there is one."""
        sizes = W.abs() if self.knee == math.inf else reverse_huber.value(W.abs(), self.knee)
        cost = sizes @ self.penalty
        return cost if self.ridge is None else cost + 0.5 * (W.square() @ self.ridge)

    def slopes(self, W: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Return the derivative of the penalty by the size of each entry; at 0 that to its right."""
        if self.knee == math.inf:
            return self.penalty.expand_as(W)
        return self.penalty * (W.abs() / self.knee).clamp_min(1)

    def curvatures(self, W: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Return the second derivative of the penalty by the size of each entry."""
        return torch.where(W.abs() > self.knee, self.penalty / self.knee, 0)

    def prox(self, V: Float[Tensor, "rows d"], step: Float[Tensor, "#rows 1"]) -> Float[Tensor, "rows d"]:
        r"""Return :math:`\arg\min_w \tfrac12 |w - v|^2 + t \sum_j p_j |w_j|` under the ball, or with the knee.

        The rows of ``V`` are :math:`v`, and ``step`` is :math:`t`.

        A soft threshold, then the projection onto the ball: together exact, since the multiplier of the ball only
        raises the threshold further. With a knee the multiplier lowers :math:`|v_j|` before the entry is shrunk.
        """
        sizes, penalty = V.abs(), step * self.penalty.to(V.dtype)
        if self.knee == math.inf:
            magnitudes = (sizes - penalty).clamp_min_(0)
            self._shrink_into_ball(magnitudes)
            return torch.copysign(magnitudes, V)
        magnitudes = reverse_huber.shrunk(sizes, penalty, self.knee)
        outside = self._outside(magnitudes)
        if len(outside):
            inside, penalty = sizes[outside, : self.ball], penalty.expand_as(V)[outside, : self.ball]
            threshold = reverse_huber.ball_threshold(inside, penalty, self.knee, self.radius)
            shrunk = reverse_huber.shrunk((inside - threshold).clamp_min(0), penalty, self.knee)
            magnitudes[outside, : self.ball] = self._within(shrunk)
        return torch.copysign(magnitudes, V)

    def project(self, W: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Return the nearest point of the ball for each row."""
        magnitudes = W.abs()
        self._shrink_into_ball(magnitudes)
        return torch.copysign(magnitudes, W)

    def dual(self, W: Float[Tensor, "rows d"], q: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        r"""Return a lower bound of the optimum of each row from a point ``W``, tight where ``W`` is optimal.

        The dual function at :math:`\theta = s (z - Sw)`, for several ``s``. The conjugate of the ball is exact; of the
        other columns it is known that :math:`\sum_j p_j |w_j| \le P`, with ``P`` the objective reached, which holds at
        the optimum too. Then with :math:`v = S^T(z - Sw)/m = q`

        .. math:: D(s) = s\, r^T z - \tfrac{s^2}{2} r^T r - \kappa \max_j (s|v_j| - p_j)_+ - P \max_j (s|v_j|/p_j - 1)_+

        is concave in ``s``, and its pieces end or peak at the candidates.
        """
        primal = self.objective(W, q)
        rr, rz = self._unexplained(W, q), self.energies - (W * self.correlations).sum(1)
        best = self._bound_of_sizes(q, rz, rr, primal)
        if self.knee == math.inf:
            return best
        bent = self._bound_with_knee(q, rz, rr, primal)
        return torch.where(bent > best, bent, best)

    def _bound_of_sizes(self, v: Tensor, rz: Tensor, rr: Tensor, primal: Tensor) -> Tensor:
        inside, outside = v[:, : self.ball].abs(), v[:, self.ball :].abs()
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
            best = torch.where(value > best, value, best)  # a free column makes it NaN
        return best

    def _bound_with_knee(self, v: Tensor, rz: Tensor, rr: Tensor, primal: Tensor) -> Tensor:
        # No entry of an optimum is larger than this, so that a knee beyond is as good as one here.
        largest = primal[:, None] / self.penalty
        largest[:, : self.ball].clamp_max_(self.radius)
        knee, y = largest.clamp_max(self.knee), v.abs()
        if self.ball:
            inside = y[:, : self.ball]
            price = reverse_huber.best_price(inside, self.penalty[: self.ball], knee[:, : self.ball], self.radius)
            y[:, : self.ball] = (inside - price).clamp_min(0)
            rz = rz - self.radius * price[:, 0]
        s = reverse_huber.best_scale(y, self.penalty, knee, rz, rr).clamp_min(0)
        cost = reverse_huber.conjugate(s[:, None] * y, self.penalty, knee).sum(1)
        return s * rz - 0.5 * s.square() * rr - cost

    def _unexplained(self, W: Tensor, q: Tensor) -> Tensor:
        # |z - S w|^2 / m; rounding may take a perfect fit below zero.
        return (self.energies - (W * (self.correlations + q)).sum(1)).clamp_min_(0)

    def _shrink_into_ball(self, magnitudes: Tensor) -> None:
        outside = self._outside(magnitudes)
        if len(outside):
            rows = magnitudes[outside, : self.ball]
            magnitudes[outside, : self.ball] = self._within((rows - l1_ball_threshold(rows, self.radius)).clamp_min_(0))

    def _outside(self, magnitudes: Tensor) -> Tensor:
        return (magnitudes[:, : self.ball].sum(1) > self.radius).nonzero()[:, 0]

    def _within(self, rows: Tensor) -> Tensor:
        # Rounding must not leave the ball: what is a few units too much is taken back.
        factor = (self.radius / rows.sum(1, keepdim=True)).clamp_max_(1) * (1 - 4 * torch.finfo(rows.dtype).eps)
        return rows * factor


def check_problem(problem: RowProblem) -> None:
    """Check a problem that was built by hand: everything but that ``gram`` is symmetric and semidefinite."""
    checks.instance("problem", problem, RowProblem, "Try idl.sim.solvers.RowProblem(gram, correlations, ...).")
    d = len(checks.square_matrix("gram", problem.gram))
    rows = len(checks.floating_tensor("correlations", problem.correlations))
    shapes = {
        "gram": (d, d),
        "correlations": (rows, d),
        "energies": (rows,),
        "penalty": (d,),
        "ridge": (d,),
        "column_energies": (d,),
        "target_energies": (rows,),
    }
    tensors = {name: value for name in shapes if (value := getattr(problem, name)) is not None}
    for name, tensor in tensors.items():
        if checks.floating_tensor(name, tensor).dtype != torch.float64:
            raise TypeError(f"`{name}` must be of torch.float64; got {tensor.dtype}. Try {name}.double().")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"`{name}` must have shape {shapes[name]}, for {rows} rows of {d} columns; got {tuple(tensor.shape)}."
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"`{name}` must be finite; got NaN or inf.")
        if name not in ("gram", "correlations") and bool((tensor < 0).any()):
            raise ValueError(f"`{name}` must not be negative; got {float(tensor.min()):g}.")
    checks.same_device_and_dtype(tensors)
    if checks.non_negative_integer("ball", problem.ball) > d:
        raise ValueError(f"`ball` must be at most {d}, the number of columns; got {problem.ball}.")
    checks.non_negative("radius", problem.radius)
    if problem.knee != math.inf:
        checks.positive("knee", problem.knee)
