"""The map ``x -> phi(x A^T + Z)`` of an implicit model, and the sloped linear maps that its derivatives are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idl.activations import Activation
from idl.linalg.operators import StateMatrix
from idl.maps.base import Adjoint, Parameters, ParametricMap, add, front
from idl.maps.problems import MatrixProblem, affine_problem, sloped_problem
from idl.solvers.base import raises_doubts


@dataclass(frozen=True)
class AffineMap(ParametricMap):
    r""":math:`x \mapsto \phi(xA^T + Z)`, componentwise :math:`\phi` with a known derivative; parameters ``(Z, *A)``.

    Args:
        kind: Class of the state matrix, which the tensors after ``Z`` build.
        activation: The activation.
        contraction: Factor by which the map is known to contract in the max norm, if it is; worked out where it is not,
            and where the bound of the matrix itself may be the difference between an estimate and a proof.
    """

    kind: type[StateMatrix]
    activation: Activation
    contraction: float | None = None

    def at(self, parameters: Parameters) -> MatrixProblem:
        """Return the map of these parameters, for a solver."""
        Z, *tensors = parameters
        problem = affine_problem(self.kind(*tensors), Z, self.activation)
        problem.known = None if self.contraction is None or raises_doubts(self.contraction) else self.contraction
        return problem

    def function(self, parameters: Parameters) -> Callable[[Tensor], Tensor]:
        """Return the map as a function that autograd can record."""
        Z, *tensors = parameters
        state_matrix = self.kind(*tensors)
        return lambda x: self.activation(state_matrix.apply(x) + Z)

    def adjoint(self, x: Tensor, parameters: Parameters, g: Tensor, wanted: Sequence[bool]) -> Adjoint:
        r"""Return :math:`v \mapsto \phi' \circ (vA + g)`: ``v`` is the cotangent of the pre-activation."""
        slope = self._slope(x, parameters)
        state_matrix = self.kind(*parameters[1:])
        transposed = state_matrix.transpose()

        def pullback(v: Tensor) -> Sequence[Tensor | None]:
            return [v, *(state_matrix.pullback(x, v) if any(wanted[1:]) else [None] * len(parameters[1:]))]

        return Adjoint(SlopedMap(type(transposed), order=1.0), (slope, slope * g, *transposed.tensors), pullback)

    def tangent(
        self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]
    ) -> tuple[ParametricMap, Parameters]:
        r"""Return :math:`\dot x \mapsto \phi' \circ (\dot x A^T + x \dot A^T + \dot Z)`."""
        slope = self._slope(x, parameters)
        moved = add(tangents[0], self.kind(*parameters[1:]).pushforward(x, tangents[1:]))
        source = torch.zeros_like(x) if moved is None else slope * moved
        return SlopedMap(self.kind, order=torch.inf), (slope, source, *parameters[1:])

    def fold(
        self, size: int, parameters: Parameters, dims: Sequence[int | None]
    ) -> tuple[ParametricMap, Parameters] | None:
        """Return the same map on all rows together, where only ``Z`` is mapped over."""
        return _fold_rows(self, 1, size, parameters, dims)

    def _slope(self, x: Tensor, parameters: Parameters) -> Tensor:
        if self.activation.derivative_of_output is not None:
            return self.activation.derivative_of_output(x)
        Z, *tensors = parameters
        return self.activation.slope(self.kind(*tensors).apply(x) + Z)


@dataclass(frozen=True)
class SlopedMap(ParametricMap):
    r""":math:`v \mapsto d \circ (vA^T) + c`, with a slope ``d`` and a source ``c`` a row; parameters ``(d, c, *A)``.

    Args:
        kind: Class of the state matrix, which the tensors after ``c`` build.
        order: Norm in which it contracts if ``d`` is within the slope bound: ``inf`` for an admissible matrix,
            1 for the transpose of one.
    """

    kind: type[StateMatrix]
    order: float

    def at(self, parameters: Parameters) -> MatrixProblem:
        """Return the map of these parameters, for a solver."""
        slope, source, *tensors = parameters
        return sloped_problem(self.kind(*tensors), slope, source, self.order)

    def function(self, parameters: Parameters) -> Callable[[Tensor], Tensor]:
        """Return the map as a function that autograd can record."""
        slope, source, *tensors = parameters
        state_matrix = self.kind(*tensors)
        return lambda v: slope * state_matrix.apply(v) + source

    def adjoint(self, x: Tensor, parameters: Parameters, g: Tensor, wanted: Sequence[bool]) -> Adjoint:
        r"""Return the map of :math:`v = d \circ \lambda` where :math:`\lambda = (d \circ \lambda) A + g`."""
        slope, _, *tensors = parameters
        state_matrix = self.kind(*tensors)
        transposed = state_matrix.transpose()
        order = torch.inf if self.order == 1 else 1.0

        def pullback(v: Tensor) -> Sequence[Tensor | None]:
            costate = transposed.apply(v) + g
            by_slope = costate * state_matrix.apply(x) if wanted[0] else None
            by_matrix = state_matrix.pullback(x, v) if any(wanted[2:]) else [None] * len(tensors)
            return [by_slope, costate, *by_matrix]

        return Adjoint(SlopedMap(type(transposed), order), (slope, slope * g, *transposed.tensors), pullback)

    def tangent(
        self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]
    ) -> tuple[ParametricMap, Parameters]:
        r"""Return :math:`\dot v \mapsto d \circ (\dot v A^T + v \dot A^T) + \dot d \circ (vA^T) + \dot c`."""
        slope, _, *tensors = parameters
        state_matrix = self.kind(*tensors)
        moved = state_matrix.pushforward(x, tangents[2:])
        source = add(
            tangents[1],
            None if tangents[0] is None else tangents[0] * state_matrix.apply(x),
            None if moved is None else slope * moved,
        )
        return self, (slope, torch.zeros_like(x) if source is None else source, *tensors)

    def fold(
        self, size: int, parameters: Parameters, dims: Sequence[int | None]
    ) -> tuple[ParametricMap, Parameters] | None:
        """Return the same map on all rows together, where only ``d`` and ``c`` are mapped over."""
        return _fold_rows(self, 2, size, parameters, dims)


def _fold_rows(
    parametric: ParametricMap, row_parameters: int, size: int, parameters: Parameters, dims: Sequence[int | None]
) -> tuple[ParametricMap, Parameters] | None:
    if any(dim is not None for dim in dims[row_parameters:]):
        return None
    rows = [
        (parameter.expand(size, *parameter.shape) if dim is None else front(parameter, dim)).flatten(0, 1)
        for parameter, dim in zip(parameters[:row_parameters], dims, strict=False)
    ]
    return parametric, (*rows, *parameters[row_parameters:])
