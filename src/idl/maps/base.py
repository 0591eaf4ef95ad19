"""What differentiation asks of a map with parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from idl.solvers.base import Problem

Parameters = tuple[Tensor, ...]


class Adjoint(NamedTuple):
    """What reverse mode solves and does at a fixed point."""

    map: "ParametricMap"
    parameters: Parameters
    pullback: Callable[[Tensor], Sequence[Tensor | None]]
    """From the fixed point of ``map`` to the cotangents of the parameters of the map that was solved before."""


class ParametricMap(ABC):
    r"""A map :math:`x \mapsto f(x; \theta)` on rows, closed under differentiation of its fixed point.

    With :math:`x^* = f(x^*; \theta)` and :math:`J = \partial f/\partial x` there, the implicit function theorem gives

    * reverse: :math:`\lambda = J^T \lambda + g`, then :math:`\bar\theta = (\partial f/\partial\theta)^T \lambda`;
    * forward: :math:`\dot x = J \dot x + (\partial f/\partial\theta)\, \dot\theta`.

    Both are fixed points of maps of this kind again, so that derivatives of any order and any mixture exist.
    """

    @abstractmethod
    def at(self, parameters: Parameters) -> Problem:
        """Return the map of these parameters, for a solver."""

    @abstractmethod
    def function(self, parameters: Parameters) -> Callable[[Tensor], Tensor]:
        """Return the map of these parameters as a function that autograd can record."""

    @abstractmethod
    def adjoint(self, x: Tensor, parameters: Parameters, g: Tensor, wanted: Sequence[bool]) -> Adjoint:
        r"""Return the map whose fixed point determines :math:`\lambda`.

        Cotangents of parameters that are not ``wanted`` may be ``None``.
        """

    @abstractmethod
    def tangent(
        self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]
    ) -> tuple["ParametricMap", Parameters]:
        """Return the map whose fixed point is the tangent of ``x``, with its parameters; ``None`` does not move."""

    @abstractmethod
    def fold(
        self, size: int, parameters: Parameters, dims: Sequence[int | None]
    ) -> tuple["ParametricMap", Parameters] | None:
        """Return the map on ``size`` times as many rows that :func:`torch.vmap` over ``dims`` means.

        The rows of one mapped index stay together. ``None`` where the map cannot do it at once.
        """

    def residual(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Return ``|f(x) - x|`` of each row, largest entry, as exact as the map can evaluate it."""
        x = x.detach()
        with torch.no_grad():
            value, _ = self.at(tuple(p.detach() for p in parameters)).linearise(x)
            residual: Tensor = torch.linalg.vector_norm(value - x, torch.inf, dim=1)
            return residual.to(x.dtype)


def add(*terms: Tensor | None) -> Tensor | None:
    """Return the sum of the terms that are there; ``None`` if none is."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total if term is None else total + term
    return total


def front(tensor: Tensor, dim: int | None) -> Tensor:
    """Return the tensor with its mapped dimension first, if it has one."""
    return tensor if dim is None else tensor.movedim(dim, 0)
