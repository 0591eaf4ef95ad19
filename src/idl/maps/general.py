"""Maps known only as functions, whose derivatives torch computes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from idl.maps.base import Adjoint, Parameters, ParametricMap, front
from idl.solvers.base import Problem
from idl.transforms import pushforward, transforms_are_active

RowFunction = Callable[..., Tensor]
"""``f(x, *parameters)`` on ``x`` of shape ``(rows, n)``; depends on nothing else that has a gradient."""


@dataclass(frozen=True)
class GeneralMap(ParametricMap):
    """Any function of a state and of parameters; rows may depend on each other.

    Args:
        row_function: The function.
        nilpotent: Number of applications after which it has reached its fixed point from anywhere, if there is one:
            the size of the state where each unit reads only units before it.
        formula: The same function where ``row_function`` has no more than a first reverse derivative, and no vmap.
    """

    row_function: RowFunction
    nilpotent: int | None = None
    formula: RowFunction | None = None

    def at(self, parameters: Parameters) -> "_GeneralProblem":
        """Return the map of these parameters, for a solver."""
        differentiable = None if self.formula is None else self.function(parameters)
        return _GeneralProblem(
            lambda x: self.row_function(x, *parameters), nilpotent=self.nilpotent, differentiable=differentiable
        )

    def function(self, parameters: Parameters) -> Callable[[Tensor], Tensor]:
        """Return the map as a function that autograd can record."""
        return lambda x: self.differentiable(x, *parameters)

    @property
    def differentiable(self) -> RowFunction:
        """The function with derivatives of any order and mode."""
        return self.row_function if self.formula is None else self.formula

    def adjoint(self, x: Tensor, parameters: Parameters, g: Tensor, wanted: Sequence[bool]) -> Adjoint:
        r"""Return :math:`\lambda \mapsto J^T\lambda + g`."""
        recorded = None
        if _is_first_order():
            recorded = _Recorded(self.row_function, x, parameters, wanted)
        pullback = partial(self._pullback, x, parameters, wanted) if recorded is None else recorded.cotangents
        return Adjoint(LinearisedMap(self, transposed=True, recorded=recorded), (x, g, *parameters), pullback)

    def _pullback(
        self, x: Tensor, parameters: Parameters, wanted: Sequence[bool], v: Tensor
    ) -> Sequence[Tensor | None]:
        """Return the cotangents of the parameters that are wanted, to be differentiated or transformed on."""
        chosen = [i for i, w in enumerate(wanted) if w]
        # torch 2.13 fails on an internal assertion where vmap maps over some of several primals of a vjp in a backward.
        groups = [[i] for i in chosen] if transforms_are_active() else [chosen]
        cotangents: list[Tensor | None] = [None] * len(parameters)
        for group in groups if chosen else []:

            def of_group(*values: Tensor, group: list[int] = group) -> Tensor:
                arguments = list(parameters)
                for i, value in zip(group, values, strict=True):
                    arguments[i] = value
                return self.differentiable(x, *arguments)

            _, pull, *_ = torch.func.vjp(of_group, *(parameters[i] for i in group))
            for i, cotangent in zip(group, pull(v), strict=True):
                cotangents[i] = cotangent
        return cotangents

    def tangent(
        self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]
    ) -> tuple[ParametricMap, Parameters]:
        r"""Return :math:`\dot x \mapsto J\dot x + (\partial f/\partial\theta)\,\dot\theta`."""
        moving = [(p, t) for p, t in zip(parameters, tangents, strict=True) if t is not None]
        source = torch.zeros_like(x)
        if moving:

            def of_moving(*values: Tensor) -> Tensor:
                supply = iter(values)
                pairs = zip(parameters, tangents, strict=True)
                return self.differentiable(x, *(p if t is None else next(supply) for p, t in pairs))

            source = pushforward(of_moving, tuple(p for p, _ in moving), tuple(t for _, t in moving))
        return LinearisedMap(self, transposed=False), (x, source, *parameters)

    def fold(self, size: int, parameters: Parameters, dims: Sequence[int | None]) -> tuple["GeneralMap", Parameters]:
        """Return the map that applies the function to each mapped index by :func:`torch.vmap`."""
        fronted = tuple(front(p, d) for p, d in zip(parameters, dims, strict=True))
        in_dims = (0, *(None if d is None else 0 for d in dims))

        mapped = torch.vmap(self.differentiable, in_dims=in_dims)

        def function(x: Tensor, *values: Tensor) -> Tensor:
            return mapped(torch.unflatten(x, 0, (size, -1)), *values).flatten(0, 1)

        return GeneralMap(function, self.nilpotent), fronted


@dataclass(frozen=True)
class LinearisedMap(ParametricMap):
    r""":math:`v \mapsto Jv + c` or :math:`J^T v + c`, ``J`` the Jacobian of a map; parameters ``(x, c, *theta)``.

    A :class:`GeneralMap` in all but this: it linearises once a solve, and it is known to be linear.
    """

    of: GeneralMap
    transposed: bool
    recorded: "_Recorded | None" = None
    """The application at ``x``, if autograd has a record of it."""

    def at(self, parameters: Parameters) -> "_GeneralProblem":
        """Return the map of these parameters, for a solver."""
        x, source, *rest = parameters
        product = self._pull(x, rest) if self.transposed else self._push(x, rest)
        order = 1.0 if self.transposed else torch.inf
        return _GeneralProblem(lambda v: product(v) + source, order, source, product, self.of.nilpotent)

    def _pull(self, x: Tensor, rest: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        if self.recorded is not None:
            return self.recorded.pulled
        _, pull, *_ = torch.func.vjp(lambda point: self.of.differentiable(point, *rest), x)
        return lambda v: pull(v)[0].detach()

    def _push(self, x: Tensor, rest: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda v: pushforward(lambda point: self.of.differentiable(point, *rest), (x,), (v,))

    def function(self, parameters: Parameters) -> Callable[[Tensor], Tensor]:
        """Return the map as a function that autograd can record."""
        return self._general.function(parameters)

    def adjoint(self, x: Tensor, parameters: Parameters, g: Tensor, wanted: Sequence[bool]) -> Adjoint:
        """Return the map of the adjoint state."""
        return self._general.adjoint(x, parameters, g, wanted)

    def tangent(
        self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]
    ) -> tuple[ParametricMap, Parameters]:
        """Return the map of the tangent."""
        return self._general.tangent(x, parameters, tangents)

    def fold(
        self, size: int, parameters: Parameters, dims: Sequence[int | None]
    ) -> tuple[ParametricMap, Parameters] | None:
        """Return the linearisation of the folded function, on all rows."""
        (x, source, *rest), (x_dim, source_dim, *rest_dims) = parameters, dims
        general, rest_parameters = self.of.fold(size, tuple(rest), rest_dims)
        rows = [
            # Of a single row the copies would be one place in memory, which torch does not let a tangent move.
            (p.expand(size, *p.shape) if d is None else front(p, d)).flatten(0, 1).contiguous()
            for p, d in ((x, x_dim), (source, source_dim))
        ]
        return LinearisedMap(general, self.transposed), (*rows, *rest_parameters)

    @property
    def _general(self) -> GeneralMap:
        def function(v: Tensor, x: Tensor, source: Tensor, *rest: Tensor) -> Tensor:
            if self.transposed:
                _, pull, *_ = torch.func.vjp(lambda point: self.of.differentiable(point, *rest), x)
                return pull(v)[0] + source
            return pushforward(lambda point: self.of.differentiable(point, *rest), (x,), (v,)) + source

        return GeneralMap(function, self.of.nilpotent)


def _is_first_order() -> bool:
    """Return whether nothing differentiates, or transforms, what is computed now."""
    return not (torch.is_grad_enabled() or transforms_are_active())


class _Recorded:
    """One application that autograd has recorded, for any number of first derivatives."""

    def __init__(self, function: RowFunction, x: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        with torch.enable_grad():
            self._x = x.detach().requires_grad_()
            self._parameters = [p.detach().requires_grad_(w) for p, w in zip(parameters, wanted, strict=True)]
            self._image = function(self._x, *self._parameters)

    def pulled(self, v: Tensor) -> Tensor:
        r"""Return :math:`J^T v`."""
        return self._derivatives([self._x], v)[0]

    def cotangents(self, v: Tensor) -> list[Tensor | None]:
        """Return the cotangents of the parameters, of those that are wanted."""
        found = iter(self._derivatives([p for p in self._parameters if p.requires_grad], v))
        return [next(found) if p.requires_grad else None for p in self._parameters]

    def _derivatives(self, leaves: Sequence[Tensor], v: Tensor) -> Sequence[Tensor]:
        if not leaves or not self._image.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        return torch.autograd.grad(self._image, leaves, v, retain_graph=True, materialize_grads=True)


class _GeneralProblem(Problem):
    """A map for a solver, known by its values; a linear one also by its source and its products."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        order: float = torch.inf,
        source: Tensor | None = None,
        linear_product: Callable[[Tensor], Tensor] | None = None,
        nilpotent: int | None = None,
        differentiable: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.function = function
        self.differentiable = function if differentiable is None else differentiable
        self.order = order
        self.source = source
        self.linear_product = linear_product
        self.nilpotent = nilpotent
        self.newton_is_cheap = linear_product is not None

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def start(self, x: Tensor | None) -> Tensor:
        if x is not None:
            return self.function(x)
        if self.source is None:
            raise TypeError("a map that is known by its values alone needs a start; got None.")
        return self.source

    def norm(self, x: Tensor) -> Tensor:
        if self.order == torch.inf and x.shape[-1]:
            return x.abs().amax(-1)  # three times as fast as vector_norm
        return torch.linalg.vector_norm(x, self.order, dim=-1)

    def scale(self, x: Tensor) -> Tensor:
        return self.norm(x if self.source is None else self.source)

    def linearise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(x), x

    def product(self, slope: Tensor, v: Tensor) -> Tensor:
        if self.linear_product is not None:
            return self.linear_product(v)
        return pushforward(self.differentiable, (slope,), (v,))

    def substitute(self, x: Tensor | None) -> Tensor | None:
        if self.nilpotent is None:
            return None
        x = self.start(x)
        for _ in range(self.nilpotent):
            image = self.function(x)
            if torch.equal(image, x):
                break
            x = image
        return x
