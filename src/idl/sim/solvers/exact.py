"""Weights that reproduce each target exactly, with the smallest penalty: equations in the place of least squares."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from idl import checks
from idl.sim.problem import RowProblem
from idl.sim.solvers.base import AbstractRowSolver, RowSolution
from idl.sim.solvers.cvx import cvxpy_or_advice
from idl.sim.solvers.exact_bound import lower_bound, scalings

_TOLERANCES = (1e-11, 1e-9, 1e-7)  # of CLARABEL, the next where one was not reached
_CUT = 0.1  # part of what is rounding that may be cut; errors grow up to 1 / (1 - kappa) times in an equilibrium
_AT_THE_BALL = 1e-6  # part of the radius by which a sum at the bound may be below it
_NULL = 1e-12  # square of the singular value, of equations of size 1, that is none
_RANK = 1e-13
_INDEPENDENT = 1e-9  # part of a column that others must not explain for it to count as one more
_EPS = torch.finfo(torch.float64).eps


class NotMatchedError(ValueError):
    """No weights reproduce a row's target; ``row`` is its index and ``reason`` the message without its name."""

    def __init__(self, row: int, reason: str, name: str | None = None) -> None:
        super().__init__(f"{f'row {row}' if name is None else name} {reason}")
        self.row, self.reason = row, reason


@dataclass(frozen=True)
class ExactMatching(AbstractRowSolver):
    r"""Reproduce the targets and spend as little penalty as that takes, by cvxpy and CLARABEL, on the CPU.

    .. math::
        \min_w \sum_j p_j h(|w_j|) + \tfrac12 \sum_j r_j w_j^2 \quad \text{s.t.} \quad S w = z, \quad |a|_1 \le \kappa

    with the problem's penalty and ridge. From second moments :math:`Sw = z` is :math:`Gw = h` where nothing is left
    unexplained. With ``G = D^-1 Q diag(l) Q^T D^-1`` in units ``D`` of the columns' sizes it is :math:`Q^T D^{-1} w =
    \tau`, whose rows are orthonormal. One program a row, about a second at 900 columns. The start is not used.

    States are rounded: the equations hold but for that, and a weight that should be zero comes out as what makes up for
    it. Therefore directions of the columns that are rounding are no equations, and of the weights that the multipliers
    allow only so many of the largest are kept as, fitted again, reproduce the target up to rounding, if that is
    certified. Where the penalty has no curvature the solution is a vertex: no more weights than equations, and one.

    ``objective`` is the penalty of the weights, and ``bound`` follows from the multipliers, so that the gap is that of
    this program; ``unexplained`` is what is left of the targets. The solution does not depend on the penalty's scale.

    Args:
        tol, max_steps: See :class:`AbstractRowSolver`.
        rounding: Part of the energy, of a column or a target, that is rounding. The default suits float32.
        unexplained: Part of a target's energy that may be left unexplained; a row with more is refused.
            Energies are mean squares, of states with biases about zero too.

    Raises:
        ValueError: When it is run, if a target is no combination of the columns, or none within the ball.
        ImportError: When it is run without cvxpy; install ``implicit-deep-learning[cvx]``.

    Example:
        >>> from idl import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> u = torch.randn(50, 8)
        >>> sim = SIM(ExactMatching()).fit(teacher, [u])
        >>> torch.allclose(sim.predict(u), teacher(u), atol=1e-4)
        True
    """

    rounding: float = field(default=1e-12, kw_only=True)
    unexplained: float = field(default=1e-10, kw_only=True)

    exact: ClassVar[bool] = True
    shrinks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.non_negative("rounding", self.rounding)
        checks.non_negative("unexplained", self.unexplained)

    def _solve(self, problem: RowProblem, start: Tensor | None) -> RowSolution:
        device = problem.gram.device
        problem = _on_cpu(problem)
        energies, equations = problem.measured_targets, _Equations(problem, self.rounding)
        left = torch.where(energies > 0, (problem.energies - equations.energies).clamp_min(0) / energies, 0)
        self._check_range(left)
        W, bound, program = torch.zeros_like(problem.correlations), torch.zeros_like(energies), None
        unexplained = left + torch.where(energies > 0, equations.energies / energies, 0)
        for i in (equations.energies > self.rounding * energies).nonzero()[:, 0].tolist():
            program = program or _Program(problem, equations, self.max_steps)
            found = self._row(i, program, float(energies[i]), float(left[i]))
            W[i, equations.columns], bound[i] = found.w, found.bound
            unexplained[i] = left[i] + found.missed / energies[i]
        objective, steps = problem.cost(W), len(energies)
        W, objective, bound, unexplained = (t.to(device) for t in (W, objective, bound, unexplained))
        return RowSolution(W, objective, bound, steps, unexplained=unexplained)

    def _check_range(self, left: Tensor) -> None:
        refused = left > self.unexplained
        if bool(refused.any()):
            raise NotMatchedError(
                int(left.argmax()),
                f"is no combination of the columns it may read: {float(left.max()):.1e} of its energy is left "
                f"unexplained, more than {self.unexplained:g} ({int(refused.sum())} of {len(left)} rows like it).\n"
                "    Try exact=False, all layers of the teacher as states, a teacher in float64, or rescale=True.",
            )

    def _row(self, i: int, program: "_Program", energy: float, left: float) -> "_Found":
        """Return the best of what CLARABEL finds, finished: the sparsest way that is certified."""
        best, status = None, ""
        for tol in _TOLERANCES:
            point, status = program.solution(i, tol)
            if status == "infeasible":
                break
            if point is None:
                continue
            for found in program.finished(i, point, _CUT * self.rounding * energy):
                if found.missed / energy + left > self.unexplained:
                    continue
                if best is not None:  # every bound is true
                    found = found.bounded(best.bound)
                if best is None or found.gap < best.gap:
                    best = found
                if best.gap <= self.tol:
                    return best
        if best is not None:
            return best
        needed = program.smallest_sum(i)
        if needed > program.problem.radius:
            raise NotMatchedError(
                i,
                f"would need a row sum of |A| of {needed:.6g}, more than {program.problem.radius:.6g}.\n"
                "    Try a larger kappa, rescale=True, or exact=False.",
            )
        raise NotMatchedError(
            i, f"was given up by CLARABEL ({status}).\n    Try a larger max_steps, a larger rounding, or exact=False."
        )


class _Found(NamedTuple):
    """Finished weights of one row, their objective, a bound of it, and the energy that they miss."""

    w: Tensor
    objective: float
    bound: float
    missed: float

    def bounded(self, bound: float) -> "_Found":
        """Return the same with another bound, if that is better; weights that use rounding may cost less than it."""
        return self._replace(bound=min(max(self.bound, bound), self.objective))

    @property
    def gap(self) -> float:
        return (self.objective - self.bound) / self.objective if self.objective > 0 else 0.0


class _Point(NamedTuple):
    """Where CLARABEL stopped: ``x`` and multipliers of its equations."""

    x: Tensor
    theta: Tensor


class _Equations:
    r"""The equations :math:`Q^T x = \tau` of all rows, with :math:`w = D x`; columns of zeros are left out.

    Attributes:
        columns: Indices of the columns that are not zero.
        unit: ``D``, one over their sizes.
        Q: Orthonormal columns.
        eigenvalues: ``l``: ``l * (Q^T x - tau)^2`` is the energy that an equation misses.
        tau: Right-hand sides, one row a row.
        energies: What of each target's energy the columns explain.
    """

    def __init__(self, problem: RowProblem, rounding: float) -> None:
        self.columns = (problem.gram.diagonal() > 0).nonzero()[:, 0]
        self.unit = problem.measured_columns[self.columns].rsqrt()
        gram = self.unit[:, None] * problem.gram[self.columns][:, self.columns] * self.unit
        eigenvalues, vectors = torch.linalg.eigh(gram)
        kept = eigenvalues > max(rounding, 16 * _EPS * float(eigenvalues.max()) if len(gram) else 0.0)  # or float64's
        self.Q, self.eigenvalues = vectors[:, kept], eigenvalues[kept]
        self.tau = (problem.correlations[:, self.columns] * self.unit) @ self.Q / self.eigenvalues
        self.energies = (self.eigenvalues * self.tau.square()).sum(1)


class _Program:
    """The convex program of one row, compiled once, in units in which the solution is about 1."""

    def __init__(self, problem: RowProblem, equations: _Equations, max_steps: int) -> None:
        self.cp, self.max_steps, self.equations = cvxpy_or_advice("ExactMatching"), max_steps, equations
        columns = equations.columns
        self.problem = replace(
            problem,
            gram=problem.gram[columns][:, columns],
            correlations=problem.correlations[:, columns],
            penalty=problem.penalty[columns],
            ridge=None if problem.ridge is None else problem.ridge[columns],
            column_energies=None,
            ball=int((columns < problem.ball).sum()),
        )
        self.scales = equations.tau.norm(dim=1)
        prices = self.problem.penalty * equations.unit
        self.price = float(prices.max()) or 1.0
        self._compile(prices / self.price)

    def _compile(self, prices: Tensor) -> None:
        cp, problem, unit = self.cp, self.problem, self.equations.unit.numpy()
        self.x, self.tau = cp.Variable(len(unit)), cp.Parameter(len(self.equations.eigenvalues))
        self.scale, self.radius, self.knee = (cp.Parameter(nonneg=True) for _ in range(3))
        cost = cp.norm1(cp.multiply(prices.numpy(), self.x))
        self.equality = self.equations.Q.T.numpy() @ self.x == self.tau
        constraints = [self.equality]
        if problem.ridge is not None:
            root = (problem.ridge / (2 * self.price)).sqrt().numpy() * unit
            cost += self.scale * cp.sum_squares(cp.multiply(root, self.x))
        if problem.knee < math.inf:  # the excess over the knee, in units of it
            excess = cp.Variable(len(unit), nonneg=True)
            cost += self.knee * ((problem.penalty / (2 * self.price)).numpy() @ cp.square(excess))
            constraints.append(cp.multiply(unit, cp.abs(self.x)) <= self.knee + self.knee * excess)
        self.sum = cp.norm1(cp.multiply(unit, self.x)[: problem.ball]) if problem.ball else None
        ball = [] if self.sum is None else [self.sum <= self.radius]
        self.program = cp.Problem(cp.Minimize(cost), constraints + ball)

    def solution(self, i: int, tol: float) -> tuple[_Point | None, str]:
        """Return where CLARABEL stops, and its status."""
        scale = float(self.scales[i])
        self.scale.value, self.radius.value = scale, self.problem.radius / scale
        self.knee.value = self.problem.knee / scale if self.problem.knee < math.inf else 1.0
        status = self._run(self.program, i, tol)
        if self.x.value is None or self.equality.dual_value is None:
            return None, status
        point = _Point(torch.as_tensor(self.x.value), -torch.as_tensor(self.equality.dual_value))
        return (point if bool(torch.isfinite(torch.cat(point)).all()) else None), status

    def smallest_sum(self, i: int) -> float:
        """Return the smallest sum of the ball's columns at which the equations hold; 0 if that is not found."""
        if self.sum is None:
            return 0.0
        program = self.cp.Problem(self.cp.Minimize(self.sum), [self.equality])
        status = self._run(program, i, 1e-8)
        return float(program.value) * float(self.scales[i]) if "optimal" in status else 0.0

    def _run(self, program: Any, i: int, tol: float) -> str:
        self.tau.value = (self.equations.tau[i] / self.scales[i]).numpy()
        options = {"tol_gap_abs": tol, "tol_gap_rel": tol, "tol_feas": tol, "max_iter": self.max_steps}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it may be inaccurate, which the certificate says
                program.solve(solver=self.cp.CLARABEL, **options)
        except self.cp.SolverError:
            return "no progress"
        return program.status

    def support(self, i: int, point: _Point) -> tuple[Tensor, Tensor]:
        r"""Return a solution, and the columns whose weights need not be zero there.

        Where :math:`|S^T \theta|_j < p_j + \mu` a weight is zero. CLARABEL stops where slack times weight is small:
        the smaller of the two, each in its unit, is the one that vanishes.
        """
        y, _ = self._dual(i, point)
        _, mu = lower_bound(self.problem, y, 0.0, 1.0)
        problem = self.problem
        prices = problem.penalty.clone()
        prices[: problem.ball] += mu
        slack = torch.where(prices > 0, 1 - y / prices, 0)
        columns = (point.x.abs() > slack).nonzero()[:, 0]
        if problem.ridge is not None or problem.knee < math.inf:
            return point.x, columns
        if mu == 0:
            x, fewer = self._vertex(point.x, columns, 0)
            if float((self.equations.unit * x * self.scales[i])[: problem.ball].abs().sum()) <= problem.radius:
                return x, fewer
        return self._vertex(point.x, columns, problem.ball)

    def _vertex(self, x: Tensor, columns: Tensor, ball: int) -> tuple[Tensor, Tensor]:
        """Return a solution as good whose columns do not depend on each other, and these.

        Along a null vector of the equations, and of the sum of the first ``ball`` sizes, the penalty is constant as
        long as no sign changes. The weight that vanishes first is dropped, with what of the null space moves it.
        """
        values, signs = x[columns].clone(), x[columns].sign()
        rows = self.equations.Q[columns].T
        if ball:
            inside = torch.where(columns < ball, self.equations.unit[columns] * signs, 0)
            rows = torch.cat((rows, inside[None] / inside.norm().clamp_min(1)))
        eigenvalues, vectors = torch.linalg.eigh(rows.T @ rows)
        null = vectors[:, eigenvalues < _NULL]
        prices = (self.problem.penalty * self.equations.unit)[columns] * signs
        while null.shape[1]:
            direction = null[:, 0] * (-1.0 if float(prices @ null[:, 0]) > 0 else 1.0)
            steps = torch.where(direction * signs < -1e-9, -values / direction, torch.inf)
            if not bool(steps.isfinite().any()):  # the penalty falls forever, or stays: turn round
                direction = -direction
                steps = torch.where(direction * signs < -1e-9, -values / direction, torch.inf)
            first = int(steps.argmin())
            if not math.isfinite(float(steps[first])):
                break
            values += steps[first] * direction
            values[first] = 0
            # Null vectors that leave this entry alone: a reflection takes its row to a single entry, which goes.
            row = null[first].clone()
            row[0] += math.copysign(float(row.norm()), float(row[0]))
            null = (null - 2 * torch.outer(null @ row, row) / row.square().sum())[:, 1:]
        return x.index_put((columns,), values), columns[values != 0]

    def finished(self, i: int, point: _Point, rounding: float) -> Iterator[_Found]:
        """Yield what can be made of a point: first with few columns, at last with all of them."""
        x, columns = self.support(i, point)
        everything = torch.arange(len(x))
        y, value = self._dual(i, point)
        bound = max(lower_bound(self.problem, y, value, s)[0] for s in scalings(self.problem, y))
        for start, chosen in ((x, columns), (point.x, everything)):
            for cut in (True, False):
                w, missed = self._fitted(i, start, chosen, rounding if cut else None)
                yield _Found(w, float(self.problem.cost(w[None])[0]), 0.0, missed).bounded(bound)

    def _fitted(self, i: int, start: Tensor, columns: Tensor, rounding: float | None) -> tuple[Tensor, float]:
        """Return weights in these columns, nearest to where they start, and the energy that they miss.

        With ``rounding`` only so many of the largest are kept as together, fitted again, miss no more energy.
        """
        equations, scale = self.equations, float(self.scales[i])
        weigh = equations.eigenvalues.sqrt()
        order = columns[start[columns].abs().argsort(descending=True, stable=True)]
        F, target = (equations.Q[order] * weigh).T, weigh * equations.tau[i] / scale
        sums = torch.where(order < self.problem.ball, equations.unit[order] * start[order].sign(), 0) * scale
        if float(sums @ start[order]) >= self.problem.radius * (1 - _AT_THE_BALL):  # then that is an equation as well
            F = torch.cat((F, sums[None] / self.problem.radius))
            target = torch.cat((target, target.new_ones(1)))
        if rounding is not None and len(order):
            enough = _missed(F, target) * scale**2 <= rounding
            if bool(enough.any()):
                order = order[: int(enough.int().argmax()) + 1]
                F = F[:, : len(order)]
        x = torch.zeros_like(start)
        if len(order):
            rest = target - F @ start[order]
            x[order] = start[order] + torch.linalg.lstsq(F, rest[:, None], rcond=_RANK, driver="gelsy").solution[:, 0]
        w = self.problem.project((equations.unit * x * scale)[None])[0]
        missed = weigh * ((w / equations.unit) @ equations.Q - equations.tau[i])
        return w, float(missed.square().sum())

    def _dual(self, i: int, point: _Point) -> tuple[Tensor, float]:
        r"""Return :math:`|S^T \theta|` and :math:`\theta^T z` in the problem's own units."""
        y = (self.equations.Q @ point.theta).abs() / self.equations.unit * self.price
        return y, float(point.theta @ self.equations.tau[i]) * self.price


def _missed(F: Tensor, target: Tensor) -> Tensor:
    """Return the energy of a target that the first, the first two, ... columns miss, by QR decomposition."""
    upper = torch.linalg.qr(F, mode="r").R
    independent = torch.zeros(F.shape[1], dtype=torch.bool)
    independent[: len(upper)] = upper.diagonal().abs() > _INDEPENDENT * F.norm(dim=0)[: len(upper)]
    basis = torch.linalg.qr(F[:, independent]).Q
    parts = torch.zeros_like(F[0])  # a column that depends on those before it explains nothing more
    parts[independent] = basis.T @ target
    # What the columns from the next one on explain, and what none does: no difference of large numbers.
    following = torch.cat((parts.square().flip(0).cumsum(0).flip(0)[1:], parts.new_zeros(1)))
    return following + (target - basis @ parts[independent]).square().sum()


def _on_cpu(problem: RowProblem) -> RowProblem:
    names = ("gram", "correlations", "energies", "penalty", "ridge", "column_energies", "target_energies")
    tensors = {name: value.cpu() for name in names if (value := getattr(problem, name)) is not None}
    return replace(problem, **tensors)
