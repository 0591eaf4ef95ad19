"""The recurrence of an implicit model, and the linear ones that its derivatives are, with their parameters."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from idl.activations import Activation
from idl.linalg.operators import StateMatrix
from idl.maps.base import add, front
from idl.recurrence.steps import AffineSteps, SlopedSteps, Steps
from idl.recurrence.timeline import Timeline

Flat = tuple[Tensor | None, ...]
"""The tensors of :class:`Parts` one after another."""

_Self = TypeVar("_Self", bound="Recurrence")
_ROWWISE = 4  # slope, offset, source and carry have a row for each row, the others belong to all rows


class Parts(NamedTuple):
    """The parameters of a recurrence, by name; ``None`` stands for what is not there, or zero."""

    slope: Tensor | None
    """``(rows, n)``; only of a linear recurrence."""
    offset: Tensor | None
    """``(rows, n)``; only of a linear recurrence."""
    source: Tensor | None
    """What drives state and output from outside, ``(rows, n + h)``."""
    carry: Tensor
    """Output before the first time, ``(batch, h)``."""
    B: Tensor
    """From the output before to the pre-activation, ``(n, h)``."""
    M: Tensor
    """``[C D]``, from state and output before to the output, ``(h, n + h)``."""
    A: tuple[Tensor, ...]
    """Tensors of the state matrix."""

    @property
    def flat(self) -> Flat:
        """The parts one after another."""
        return (self.slope, self.offset, self.source, self.carry, self.B, self.M, *self.A)


class Moved(NamedTuple):
    """Tangents of :class:`Parts`; ``None`` for a part that does not move."""

    slope: Tensor | None
    offset: Tensor | None
    source: Tensor | None
    carry: Tensor | None
    B: Tensor | None
    M: Tensor | None
    A: tuple[Tensor | None, ...]


def parts(flat: Sequence[Tensor | None]) -> Parts:
    """Return the parameters by name."""
    slope, offset, source, carry, B, M, *A = flat
    return Parts(slope, offset, source, carry, B, M, tuple(A))  # type: ignore[arg-type]


def moved_parts(flat: Sequence[Tensor | None]) -> Moved:
    """Return the tangents by name."""
    slope, offset, source, carry, B, M, *A = flat
    return Moved(slope, offset, source, carry, B, M, tuple(A))


@dataclass(frozen=True)
class Recurrence(ABC):
    r"""Equilibria one after another.

    :math:`x_t` solves an equation with :math:`x_tA^T + z_t`, and

    .. math:: z_t = h_{t-1}B^T + s_t, \quad h_t = [x_t\; h_{t-1}]M^T + s'_t.

    It returns the trajectory :math:`[x_t\; h_{t-1}]`, one row a row, and the last :math:`h` of each sequence. Its
    derivatives are recurrences of the same form. The cotangent of a trajectory is the source of the adjoint one, which
    runs the other way through time, and whose own trajectory :math:`[v_t\; k_t]` is the cotangent of the source.

    Args:
        kind: Class of the state matrix.
        timeline: Which rows belong to which time.
    """

    kind: type[StateMatrix]
    timeline: Timeline

    @abstractmethod
    def steps(self, p: Parts) -> Steps:
        """Return the equations of these parameters, for a sweep."""

    @abstractmethod
    def slope(self, trajectory: Tensor, p: Parts) -> Tensor:
        """Return the derivative of ``x`` with respect to the pre-activation, ``(rows, n)``."""

    def kept(self, p: Parts) -> Parts:
        """Return the parts that derivatives read."""
        return p

    def adjoint(
        self, trajectory: Tensor, p: Parts, g: Tensor | None, g_last: Tensor | None
    ) -> tuple["SlopedRecurrence", Parts]:
        r"""Return the recurrence of the cotangents :math:`v_t` of :math:`z_t` and :math:`k_t` of :math:`h_t`.

        :math:`v_t = \phi' \circ (v_tA + k_tC + g_t)` and :math:`k_{t-1} = v_tB + k_tD + g'_t`.
        """
        n = len(p.B)
        transposed = self.kind(*p.A).transpose()
        carry = torch.zeros_like(p.carry) if g_last is None else g_last
        B, M = p.M[:, :n].T, torch.cat((p.B, p.M[:, n:])).T
        adjoint = Parts(self.slope(trajectory, p), None, g, carry, B, M, transposed.tensors)
        return SlopedRecurrence(type(transposed), self.timeline.reversed(), order=1.0), adjoint

    def pullback(
        self,
        trajectory: Tensor,
        p: Parts,
        g: Tensor | None,
        costates: Tensor,
        first: Tensor,
        wanted: Sequence[bool],
    ) -> Flat:
        """Return the cotangents of the parameters from what the adjoint recurrence returned; ``None`` if not wanted."""
        n = len(p.B)
        by_slope, by_offset, by_source, _, by_B, by_M, *by_A = wanted
        A, x, before = self.kind(*p.A), trajectory[:, :n], trajectory[:, n:]
        v, k = costates[:, :n], costates[:, n:]
        slope = costate = None
        if by_slope or by_offset:
            costate = A.transpose().apply(v) + k @ p.M[:, :n]
            costate = costate if g is None else costate + g[:, :n]
            slope = costate * self._preactivation(trajectory, p) if by_slope else None
        return (
            slope,
            costate if by_offset else None,
            costates if by_source else None,
            first,
            v.T @ before if by_B else None,
            k.T @ trajectory if by_M else None,
            *(A.pullback(x, v) if any(by_A) else (None for _ in by_A)),
        )

    def tangent(self, trajectory: Tensor, p: Parts, moved: Moved) -> tuple["SlopedRecurrence", Parts]:
        """Return the recurrence of the tangents."""
        n = len(p.B)
        by_state = add(
            self.kind(*p.A).pushforward(trajectory[:, :n], moved.A),
            None if moved.B is None else trajectory[:, n:] @ moved.B.T,
        )
        source = add(
            moved.source,
            None if by_state is None else F.pad(by_state, (0, len(p.M))),
            None if moved.M is None else F.pad(trajectory @ moved.M.T, (n, 0)),
        )
        by_slope = None if moved.slope is None else moved.slope * self._preactivation(trajectory, p)
        carry = torch.zeros_like(p.carry) if moved.carry is None else moved.carry
        tangent = Parts(self.slope(trajectory, p), add(moved.offset, by_slope), source, carry, p.B, p.M, p.A)
        return SlopedRecurrence(self.kind, self.timeline, order=torch.inf), tangent

    def fold(self: _Self, size: int, flat: Flat, dims: Sequence[int | None]) -> tuple[_Self, Flat] | None:
        """Return the recurrence on ``size`` times as many sequences, where only rows are mapped over, else ``None``."""
        if any(dim is not None for dim in dims[_ROWWISE:]):
            return None
        rows = (
            None if tensor is None else _widened(size, tensor, dim)
            for tensor, dim in zip(flat[:_ROWWISE], dims, strict=False)
        )
        return replace(self, timeline=self.timeline.widened(size)), (*rows, *flat[_ROWWISE:])

    def _preactivation(self, trajectory: Tensor, p: Parts) -> Tensor:
        n = len(p.B)
        z = self.kind(*p.A).apply(trajectory[:, :n]) + trajectory[:, n:] @ p.B.T
        return z if p.source is None else z + p.source[:, :n]


def _widened(size: int, rows: Tensor, dim: int | None) -> Tensor:
    """Return ``size`` copies, or the mapped ones, of each row side by side, as a widened timeline has them."""
    fronted = rows.expand(size, *rows.shape) if dim is None else front(rows, dim)
    return fronted.transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class AffineRecurrence(Recurrence):
    r""":math:`x_t = \phi(x_tA^T + z_t)`, componentwise :math:`\phi` with a known derivative.

    Args:
        kind: Class of the state matrix.
        timeline: Which rows belong to which time.
        activation: The activation.
    """

    activation: Activation

    def steps(self, p: Parts) -> AffineSteps:
        """Return the equations of these parameters, for a sweep."""
        return AffineSteps(self.timeline, self.kind(*p.A), p.source, p.carry, p.B, p.M, self.activation)

    def slope(self, trajectory: Tensor, p: Parts) -> Tensor:
        """Return the slope of the activation."""
        if self.activation.derivative_of_output is not None:
            return self.activation.derivative_of_output(trajectory[:, : len(p.B)])
        return self.activation.slope(self._preactivation(trajectory, p))

    def kept(self, p: Parts) -> Parts:
        """Return the parts that derivatives read: without the source where the slope follows from ``x``."""
        return p if self.activation.derivative_of_output is None else p._replace(source=None)


@dataclass(frozen=True)
class SlopedRecurrence(Recurrence):
    r""":math:`x_t = d_t \circ (x_tA^T + z_t) + e_t`, with a slope ``d`` and an offset ``e`` for each row.

    Args:
        kind: Class of the state matrix.
        timeline: Which rows belong to which time.
        order: Norm in which each step contracts, as in :class:`~idl.maps.affine.SlopedMap`.
    """

    order: float

    def steps(self, p: Parts) -> SlopedSteps:
        """Return the equations of these parameters, for a sweep."""
        assert p.slope is not None
        A = self.kind(*p.A)
        return SlopedSteps(self.timeline, A, p.source, p.carry, p.B, p.M, p.slope, p.offset, self.order)

    def slope(self, trajectory: Tensor, p: Parts) -> Tensor:
        """Return the slope."""
        assert p.slope is not None
        return p.slope

    def adjoint(
        self, trajectory: Tensor, p: Parts, g: Tensor | None, g_last: Tensor | None
    ) -> tuple["SlopedRecurrence", Parts]:
        """Return the recurrence of the cotangents; see :class:`Recurrence`."""
        recurrence, adjoint = super().adjoint(trajectory, p, g, g_last)
        return replace(recurrence, order=torch.inf if self.order == 1 else 1.0), adjoint

    def tangent(self, trajectory: Tensor, p: Parts, moved: Moved) -> tuple["SlopedRecurrence", Parts]:
        """Return the recurrence of the tangents; see :class:`Recurrence`."""
        recurrence, tangent = super().tangent(trajectory, p, moved)
        return replace(recurrence, order=self.order), tangent
