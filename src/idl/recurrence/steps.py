"""What a sweep over the times solves: an equation a time, given what the time before has left."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor

from idl import activations
from idl.activations import Activation
from idl.linalg.operators import Factored, StateMatrix
from idl.maps.problems import MatrixProblem, affine_problem, easier_relu, easier_sloped, sloped_problem
from idl.recurrence.timeline import Timeline


@dataclass(frozen=True)
class Steps(ABC):
    """The equations of all times; see :class:`~idl.recurrence.recurrences.Parts` for the tensors."""

    timeline: Timeline
    state_matrix: StateMatrix
    source: Tensor | None
    carry: Tensor
    B: Tensor
    M: Tensor

    @cached_property
    def quick(self) -> StateMatrix:
        """The state matrix as it is fastest to multiply with."""
        return self.state_matrix.quickest()

    @property
    def can_solve(self) -> bool:
        """Whether :meth:`solve` exists and costs about what a few products cost."""
        return False

    def solve(self, rows: slice, rhs: Tensor, out: Tensor | None = None) -> Tensor:
        """Solve ``v - J v = rhs`` for these rows directly, ``J`` the Jacobian; only if :attr:`can_solve`."""
        raise TypeError(f"{type(self).__name__} has no direct solve")

    def driven_by(self, before: Tensor) -> MatrixProblem:
        """Return the equations of all rows as one problem, given the output before each row, ``(rows, h)``."""
        z = before @ self.B.T
        if self.source is not None:
            z += self.source[:, : len(self.B)]
        return self.problem(self.state_matrix, slice(None), z, torch.empty_like(z))

    def outputs(self, pairs: Tensor, each: Callable[[Tensor], Tensor] = lambda term: term) -> Tensor:
        """Return ``h_t`` of each row from its ``[x_t h_{t-1}]``; ``each`` is applied to all terms of the sum."""
        out = each(pairs) @ each(self.M).T
        return out if self.source is None else out + each(self.source[:, len(self.B) :])

    def transitions(self, slope: Tensor) -> Tensor:
        """Return the derivative of each row's output by the output before, ``(rows, h, h)``, in pieces."""
        n, h = self.B.shape
        C, D = self.M[:, :n], self.M[:, n:]
        chunk = max(1, 2**20 // (n * max(n, h)))
        pieces = [
            C @ self.state_matrix.solve_columns(slopes, slopes[:, :, None] * self.B)
            for slopes in torch.split(slope, chunk)
        ]
        return torch.cat(pieces).add_(D)

    def of(self, sequences: Tensor) -> tuple["Steps", Tensor]:
        """Return the equations of these sequences, a mask ``(batch,)``, and a mask of the rows that are theirs."""
        timeline, rows = self.timeline.of(sequences)
        source = None if self.source is None else self.source[rows]
        return replace(self, timeline=timeline, source=source, carry=self.carry[sequences]), rows

    linear: ClassVar[bool]
    """Whether the slope does not depend on the solution."""

    @abstractmethod
    def problem(self, state_matrix: StateMatrix, rows: slice, z: Tensor, room: Tensor) -> MatrixProblem:
        """Return the equation of some rows whose driven part is ``z``; ``room`` is for what it has to write down."""

    @abstractmethod
    def judge(self, rows: slice, room: Tensor) -> MatrixProblem:
        """Return what knows norms and tolerances of these rows; ``room`` holds what their problems wrote."""

    @abstractmethod
    def eased(self) -> "Steps":
        """Return equations with the same solutions in which each unit is solved for its own part, if that pays.

        It does not where errors are amplified: of the eased equations less is proved, and their rounding counts more.
        """

    @property
    def amplification(self) -> float:
        """That of all equations together; see :class:`~idl.solvers.base.Problem`."""
        return self.judge(slice(None), self.carry).amplification  # which does not depend on what drives them

    @property
    @abstractmethod
    def finite(self) -> bool:
        """Whether every number that drives the sequence is known to be finite."""


@dataclass(frozen=True)
class AffineSteps(Steps):
    r""":math:`x = \phi(xA^T + z)`."""

    activation: Activation
    linear = False

    def problem(self, state_matrix: StateMatrix, rows: slice, z: Tensor, room: Tensor) -> MatrixProblem:
        """Return the equation of some rows."""
        return affine_problem(state_matrix, z, self.activation)

    def judge(self, rows: slice, room: Tensor) -> MatrixProblem:
        """Return what knows norms and tolerances."""
        return affine_problem(self.state_matrix, room, self.activation)

    def eased(self) -> "AffineSteps":
        """Return equations that have the same solutions."""
        eased = easier_relu(self.state_matrix) if self.activation == activations.relu else None
        if eased is None or self.amplification:
            return self
        state_matrix, gain = eased
        gains = torch.nn.functional.pad(gain, (0, len(self.M)), value=1.0)
        source = None if self.source is None else self.source * gains
        return replace(self, state_matrix=state_matrix, source=source, B=self.B * gain[:, None])

    @property
    def finite(self) -> bool:
        """Whether every number that drives the sequence is finite: a saturating activation would hide one."""
        total = self.carry.sum() if self.source is None else self.source.sum() + self.carry.sum()
        return bool(total.isfinite())


@dataclass(frozen=True)
class SlopedSteps(Steps):
    r""":math:`x = d \circ (xA^T + z) + e`."""

    slope: Tensor
    offset: Tensor | None
    order: float
    linear = True

    def of(self, sequences: Tensor) -> tuple["SlopedSteps", Tensor]:
        """Return the equations of these sequences; see :class:`Steps`."""
        rest, rows = super().of(sequences)
        offset = None if self.offset is None else self.offset[rows]
        return replace(cast(SlopedSteps, rest), slope=self.slope[rows], offset=offset), rows

    def problem(self, state_matrix: StateMatrix, rows: slice, z: Tensor, room: Tensor) -> MatrixProblem:
        """Return the equation of some rows."""
        slope = self.slope[rows]
        if self.offset is None:
            torch.mul(z, slope, out=room)
        else:
            torch.addcmul(self.offset[rows], z, slope, out=room)
        return sloped_problem(state_matrix, slope, room, self.order)

    def judge(self, rows: slice, room: Tensor) -> MatrixProblem:
        """Return what knows norms and tolerances."""
        return sloped_problem(self.quick, self.slope[rows], room, self.order)

    def eased(self) -> "SlopedSteps":
        """Return equations that have the same solutions."""
        eased = easier_sloped(self.state_matrix, self.slope)
        if eased is None or self.amplification:
            return self
        state_matrix, gain = eased
        offset = None if self.offset is None else self.offset * gain
        return replace(self, state_matrix=state_matrix, slope=self.slope * gain, offset=offset)

    @property
    def can_solve(self) -> bool:
        """Whether the rank is so low that all systems are inverted beforehand."""
        return self._inverses is not None

    def solve(self, rows: slice, rhs: Tensor, out: Tensor | None = None) -> Tensor:
        """Solve by the Woodbury identity."""
        assert self._inverses is not None
        assert isinstance(self.state_matrix, Factored)
        return self.state_matrix.solve_by(self._inverses[rows], self.slope[rows], rhs, out)

    @cached_property
    def _inverses(self) -> Tensor | None:
        """The systems of all rows, inverted together."""
        A = self.state_matrix
        return A.inverses(self.slope) if isinstance(A, Factored) and A.inverses_are_cheap else None

    finite = True  # an infinite number stays one, and is seen in the steps
