"""What a solver sees of an affine map and of the sloped maps that its derivatives are, and their eased forms."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from idl import activations
from idl.activations import Activation
from idl.linalg.operators import Dense, StateMatrix, StrictlyLower, StrictlyUpper, to_precise
from idl.solvers.base import Problem

_SELF_FED = 0.5  # a unit that feeds itself less converges soon enough as it is
_BLOCK = 16  # units that substitution settles together: small products, and few of them


@dataclass(eq=False)
class MatrixProblem(Problem):
    """What affine and sloped maps have in common for a solver: a state matrix acts on each row."""

    state_matrix: StateMatrix
    separable = True
    newton_is_cheap = True

    def burst(self, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Apply ``f`` ``steps`` times; see :class:`Problem`, also for what follows."""
        differences, last = x.new_empty((2, *x.shape)), torch.empty_like(x)
        older, previous = differences.unbind()
        start = x
        self.run_into(x, steps, (older, previous, last))
        torch.sub(previous, start if steps == 2 else older, out=older)
        torch.sub(last, previous, out=previous)
        return last, self.reduced(differences.abs_())

    def run_into(self, x: Tensor, steps: int, slots: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Apply ``f`` ``steps`` times, writing into ``slots`` in turn so that the last iterate ends in the last one."""
        for place in range(-steps, 0):
            x = self.apply_into(x, slots[place % 3])
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``f(x)``."""
        return self.apply_into(x, torch.empty_like(x))

    def norm(self, x: Tensor) -> Tensor:
        """Return the norm of each row."""
        return self.reduced(x.abs())

    def eased_error_factor(self, eased_factor: float, own: Tensor) -> float:
        """Return the error factor of an eased form of this problem, in which ``own`` is the part it is solved for.

        A residual is at most ``max(1, 1 - own)`` times that of the eased form at the same point, and its image lies
        a residual farther from the fixed point than that.
        """
        largest = max(1.0, 1 - float(own.min()))
        return min(eased_factor, (1 + self.error_factor) * largest + 1)

    @abstractmethod
    def reduced(self, sizes: Tensor) -> Tensor:
        """Return the norm over the last dimension of what has these absolute values."""

    @abstractmethod
    def start_into(self, out: Tensor) -> Tensor:
        """Write ``f(0)`` into ``out``."""

    @abstractmethod
    def apply_into(self, x: Tensor, out: Tensor) -> Tensor:
        """Write ``f(x)`` into ``out``."""

    def product(self, slope: Tensor, v: Tensor) -> Tensor:
        """Return ``J v``."""
        return slope * self.state_matrix.apply(v)

    @property
    def can_solve(self) -> bool:
        """Whether the matrix can solve."""
        return self.state_matrix.can_solve

    @property
    def solve_is_cheap(self) -> bool:
        """Whether the matrix solves cheaply."""
        return self.state_matrix.solve_is_cheap

    def solve(self, slope: Tensor, rhs: Tensor) -> Tensor:
        """Solve ``v - J v = rhs``."""
        return self.state_matrix.solve(slope, rhs)


@dataclass(eq=False)
class _AffineProblem(MatrixProblem):
    """:class:`~idl.maps.affine.AffineMap` at its parameters."""

    Z: Tensor
    activation: Activation

    def apply_into(self, x: Tensor, out: Tensor) -> Tensor:
        return self.activation.apply_(self.state_matrix.apply_into(x, out, plus=self.Z))

    def start_into(self, out: Tensor) -> Tensor:
        return self.activation.apply_(out.copy_(self.Z))

    def start(self, x: Tensor | None) -> Tensor:
        image = self.activation(self.Z) if x is None else self(x)
        if math.isfinite(float(self.Z.sum())):
            return image
        # A saturating activation would hide an infinite input; its sample has no equilibrium.
        return torch.where(self.Z.isfinite().all(1, keepdim=True), image, torch.nan)

    def reduced(self, sizes: Tensor) -> Tensor:
        return sizes.amax(-1)  # with abs three times as fast as vector_norm

    def scale(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def restrict(self, rows: Tensor) -> "_AffineProblem":
        return replace(self, Z=self.Z[rows])

    def eased(self) -> "_AffineProblem":
        """Solve each unit for its own part: ``x = relu(a x + r)`` with ``a < 1`` is ``x = relu(r / (1 - a))``.

        Row sums of ``kappa`` become at most ``(kappa - a) / (1 - a) <= kappa``.
        """
        eased = easier_relu(self.state_matrix) if self.activation == activations.relu else None
        if eased is None:
            return self
        return _EasedAffineProblem(eased[0], self.Z * eased[1], self.activation, self)

    def contraction_bound(self) -> float:
        lipschitz = self.activation.lipschitz
        return math.inf if lipschitz is None else lipschitz * self.state_matrix.row_sum_bound

    def linearise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.preactivation(to_precise(x))
        return self.activation(z), self.activation.slope(z).to(self.Z.dtype)

    def preactivation(self, x: Tensor) -> Tensor:
        return self.state_matrix.precise.apply(x) + self.Z

    def substitute(self, x: Tensor | None) -> Tensor | None:
        return _substitute(self.state_matrix, self.Z, lambda units, z: self.activation(z))


@dataclass(eq=False)
class _EasedAffineProblem(_AffineProblem):
    """The eased form of a problem, whose residuals in float64 know nothing of how it was rounded to less."""

    original: _AffineProblem

    @cached_property
    def error_factor(self) -> float:
        return self.original.eased_error_factor(super().error_factor, self.original.state_matrix.diagonal())

    def linearise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = to_precise(x)
        if self.Z.dtype == x.dtype:  # the form below cancels digits that only a higher precision has to spare
            return super().linearise(x)
        own = to_precise(self.original.state_matrix.diagonal())
        z = self.original.preactivation(x).sub_(own * x).div_(1 - own)
        return self.activation(z), self.activation.slope(z).to(self.Z.dtype)

    def restrict(self, rows: Tensor) -> "_EasedAffineProblem":
        return replace(self, Z=self.Z[rows], original=self.original.restrict(rows))


@dataclass(eq=False)
class _SlopedProblem(MatrixProblem):
    """:class:`~idl.maps.affine.SlopedMap` at its parameters."""

    slope: Tensor
    source: Tensor
    order: float

    def apply_into(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.addcmul(self.source, self.state_matrix.apply_into(x, out), self.slope, out=out)

    def start_into(self, out: Tensor) -> Tensor:
        return out.copy_(self.source)

    def start(self, x: Tensor | None) -> Tensor:
        return self.source if x is None else self(x)

    def reduced(self, sizes: Tensor) -> Tensor:
        return sizes.sum(-1) if self.order == 1 else sizes.amax(-1)

    def scale(self, x: Tensor) -> Tensor:
        return self.norm(self.source)

    def restrict(self, rows: Tensor) -> "_SlopedProblem":
        return replace(self, slope=self.slope[rows], source=self.source[rows])

    def eased(self) -> "_SlopedProblem":
        """Solve each unit for its own part: ``v = d (a v + r)`` is ``v = d / (1 - d a) r``."""
        eased = easier_sloped(self.state_matrix, self.slope)
        if eased is None:
            return self
        state_matrix, gain = eased
        return _EasedSlopedProblem(state_matrix, self.slope * gain, self.source * gain, self.order, self)

    def contraction_bound(self) -> float:
        slope = self.slope.abs().nan_to_num(nan=0.0, posinf=math.inf)  # what is lost proves nothing of the other rows
        steepest = float(slope.max()) if slope.numel() else 0.0
        matrix = self.state_matrix
        return steepest * (matrix.column_sum_bound if self.order == 1 else matrix.row_sum_bound)

    def linearise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.state_matrix.precise.apply(to_precise(x)) * self.slope + self.source, self.slope

    def substitute(self, x: Tensor | None) -> Tensor | None:
        return _substitute(
            self.state_matrix,
            torch.zeros_like(self.source),
            lambda units, z: torch.addcmul(self.source[:, units], self.slope[:, units], z),
        )


@dataclass(eq=False)
class _EasedSlopedProblem(_SlopedProblem):
    """The eased form of a problem, whose residuals in float64 know nothing of how it was rounded to less."""

    original: _SlopedProblem

    def scale(self, x: Tensor) -> Tensor:
        return self.original.scale(x)

    @cached_property
    def error_factor(self) -> float:
        own = self.original.slope * self.original.state_matrix.diagonal()
        return self.original.eased_error_factor(super().error_factor, own)

    def linearise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = to_precise(x)
        if self.source.dtype == x.dtype:
            return super().linearise(x)
        value, slope = self.original.linearise(x)
        own = slope * to_precise(self.original.state_matrix.diagonal())
        return value.sub_(own * x).div_(1 - own), self.slope

    def restrict(self, rows: Tensor) -> "_EasedSlopedProblem":
        return replace(self, slope=self.slope[rows], source=self.source[rows], original=self.original.restrict(rows))


def affine_problem(state_matrix: StateMatrix, Z: Tensor, activation: Activation) -> MatrixProblem:
    """Return :class:`~idl.maps.affine.AffineMap` for a solver, with a state matrix that is there already."""
    return _AffineProblem(state_matrix, Z, activation)


def sloped_problem(state_matrix: StateMatrix, slope: Tensor, source: Tensor, order: float) -> MatrixProblem:
    """Return :class:`~idl.maps.affine.SlopedMap` for a solver, with a state matrix that is there already."""
    return _SlopedProblem(state_matrix, slope, source, order)


def easier_relu(state_matrix: StateMatrix) -> tuple[StateMatrix, Tensor] | None:
    """Return a matrix and a gain of each unit's ``Z`` with which a ReLU has the same fixed point, if that pays."""
    if (fed := _self_fed(state_matrix)) is None:
        return None
    A, own = fed
    gain = 1 / (1 - own)
    return A.off_diagonal(gain), gain


def easier_sloped(state_matrix: StateMatrix, slope: Tensor) -> tuple[StateMatrix, Tensor] | None:
    """Return a matrix, and a gain of slope and source with which a sloped map has the same fixed point, if it pays."""
    if not len(slope) or (fed := _self_fed(state_matrix)) is None or not float((slope * fed[1]).max()) < 1:
        return None
    A, own = fed
    return A.off_diagonal(), 1 / (1 - slope * own)


def _self_fed(state_matrix: StateMatrix) -> tuple[Dense, Tensor] | None:
    """Return ``A`` and its diagonal if some unit feeds itself so much that it is worth being solved for."""
    if not isinstance(state_matrix, Dense) or not state_matrix.dim:
        return None
    own = state_matrix.diagonal()
    return (state_matrix, own) if _SELF_FED < float(own.max()) < 1 else None


def _substitute(state_matrix: StateMatrix, z: Tensor, finish: Callable[[slice, Tensor], Tensor]) -> Tensor | None:
    """Solve ``x_i = finish(i, z_i + sum_j A_ij x_j)`` for a strictly triangular ``A``, block by block.

    Inside a block the iteration ends after at most as many passes as it has units, since the block is nilpotent, and
    earlier when a pass changes nothing: exact either way. ``O(n^2)`` a row in all; the loop over blocks cannot be
    avoided, since each needs those before it.
    """
    if isinstance(state_matrix, StrictlyUpper):
        starts = range((z.shape[1] - 1) // _BLOCK * _BLOCK, -1, -_BLOCK)
    elif isinstance(state_matrix, StrictlyLower):
        starts = range(0, z.shape[1], _BLOCK)
    else:
        return None
    A = state_matrix.matrix
    z, x = z.clone(), torch.empty_like(z)
    upper = isinstance(state_matrix, StrictlyUpper)
    for start in starts:
        units = slice(start, min(start + _BLOCK, z.shape[1]))
        block, within = z[:, units], A[units, units].T
        settled = finish(units, block)
        for _ in range(units.stop - units.start - 1):
            again = finish(units, torch.addmm(block, settled, within))
            if torch.equal(again, settled):
                break
            settled = again
        x[:, units] = settled
        rest = slice(0, start) if upper else slice(units.stop, None)
        z[:, rest] += settled @ A[rest, units].T
    return x
