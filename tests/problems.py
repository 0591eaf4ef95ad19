"""Named problems with known answers, all seeded and in float64.

The table of the gradient contract has four axes, and a fifth that says what vmap maps over. A :class:`Case` is one
choice of each and everything that a test needs: its tensors, the library's function of them, and the plain map whose
fixed point is the answer.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.func import functional_call

import oracles
from idl import (
    Adaptive,
    Anderson,
    BackSubstitution,
    Free,
    ImplicitAdjoint,
    ImplicitFunction,
    InfNorm,
    InfNormProjection,
    Newton,
    PhantomAdjoint,
    Picard,
    StrictlyTriangular,
    UnrolledAdjoint,
    fixed_point,
)
from tolerances import SOLVE

KAPPA, N, P, BATCH, RANK = 0.4, 4, 3, 2, 2
MARGIN = 1e-2  # distance of every pre-activation, entry and row sum to the nearest kink, where no derivative exists


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the axes -------------------------------------------------------------------------------------------------------

_SOLVERS = {
    "Picard": Picard,
    "damped Picard": lambda **options: Picard(damping=0.7, **options),
    "Anderson": Anderson,
    "Newton": Newton,
    "Adaptive": Adaptive,
    "BackSubstitution": BackSubstitution,
}
SOLVERS = {name: make(atol=SOLVE, max_steps=1000) for name, make in _SOLVERS.items()}
ADJOINTS = {
    **{
        f"implicit {name}": ImplicitAdjoint(make(atol=0.0, rtol=SOLVE, max_steps=1000))
        for name, make in _SOLVERS.items()
    },
    "unrolled": UnrolledAdjoint(35),
    "phantom": PhantomAdjoint(steps=3, damping=0.8),
}


class Constraint(NamedTuple):
    value: Any
    row_sum: float | None
    """Row sums of the free parameter, or of the bound on low-rank factors; ``None`` leaves them as they are drawn."""
    low_rank: bool
    plain: Callable[..., torch.Tensor]
    """The admissible matrix from the free parameter and the radius, in plain torch."""


CONSTRAINTS = {
    "free": Constraint(Free(), 0.9 * KAPPA, False, lambda A, radius: A),
    "free low-rank": Constraint(Free(), 0.9 * KAPPA, True, lambda L, R, radius: L @ R.T),
    "inactive InfNorm": Constraint(InfNorm(KAPPA), 0.8 * KAPPA, False, lambda A, radius: A),
    "active InfNorm": Constraint(InfNorm(KAPPA), 8.0, False, oracles.rescaled_rows),
    "inactive low-rank InfNorm": Constraint(InfNorm(KAPPA), 0.8 * KAPPA, True, lambda L, R, radius: L @ R.T),
    "active low-rank InfNorm": Constraint(InfNorm(KAPPA), 8.0, True, oracles.rescaled_factors),
    "active projection": Constraint(InfNormProjection(KAPPA), 8.0, False, oracles.projected_rows),
    "triangular": Constraint(StrictlyTriangular(), None, False, lambda A, radius: A.triu(1)),
}


class Atan(ImplicitFunction):
    def phi(self, z):
        return torch.atan(z)


class AtanWithSlope(Atan):
    def dphi(self, z):
        return 1 / (1 + z.square())


def affine(make):
    """The library's function of an implicit function ``make(*weights, **options)``; low-rank factors are a pair."""

    def solve(case, state, B, u, bias, *weights):
        f = make(*weights, constraint=case.constraint.value, solver=case.solver, adjoint=case.adjoint)
        return f(state if len(state) == 2 else state[0], B, u, bias=bias)

    return solve


def named(name):
    return affine(lambda **options: ImplicitFunction(activation=name, **options))


def general(find):
    """The same equilibrium found by ``fixed_point``, which ``find`` calls with the admissible matrix."""

    def solve(case, state, B, u, bias):
        f = ImplicitFunction(activation="tanh", constraint=case.constraint.value)
        A = f.state_matrix(state if len(state) == 2 else state[0]).dense()
        return find(A, B, u, bias, {"solver": case.solver, "adjoint": case.adjoint})

    return solve


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.state, self.input = torch.nn.Linear(N, N, bias=False), torch.nn.Linear(P, N)

    def forward(self, x, u):
        return torch.tanh(self.state(x) + self.input(u))


_LAYER = Layer()


def _closure(A, B, u, bias, options):
    weights = {"state.weight": A, "input.weight": B, "input.bias": bias}
    return fixed_point(
        lambda x: functional_call(_LAYER, weights, (x, u)), torch.zeros(BATCH, N, dtype=A.dtype), **options
    ).x


def _parameters(A, B, u, bias, options):
    def f(state, matrices, u, bias):
        z = torch.cat([state["first"], *state["rest"]], 1) @ matrices["A"].T + u @ matrices["B"].T + bias
        return {"first": torch.tanh(z[:, :1]), "rest": (torch.tanh(z[:, 1:]),)}

    x0 = {"first": torch.zeros(BATCH, 1, dtype=A.dtype), "rest": (torch.zeros(BATCH, N - 1, dtype=A.dtype),)}
    x = fixed_point(f, x0, {"A": A, "B": B}, u, bias, **options).x
    return torch.cat([x["first"], *x["rest"]], 1)


class Map(NamedTuple):
    phi: str
    solve: Callable[..., torch.Tensor]
    componentwise: bool = True
    """Whether the library knows a derivative, as substitution needs it."""
    weights: tuple[float, ...] = ()
    slope: float = 1.0


MAPS = {
    **{name: Map(name, named(name)) for name in ("relu", "tanh", "softplus")},
    "silu": Map("silu", named("silu"), slope=1.0998395),
    "softmax of a row": Map(
        "softmax", affine(lambda **options: ImplicitFunction(activation=PlainSoftmax(), **options)), False
    ),
    "PReLU with its weight": Map(
        "prelu",
        affine(lambda weight, **options: ImplicitFunction(activation=lambda z: torch.prelu(z, weight), **options)),
        False,
        (0.3,),
    ),
    "own phi": Map("atan", affine(Atan), False),
    "own phi and dphi": Map("atan", affine(AtanWithSlope)),
    "closure of a module and an input": Map("tanh", general(_closure), False),
    "parameters and state in nests": Map("tanh", general(_parameters), False),
}


class PlainSoftmax(torch.nn.Module):
    def forward(self, z):
        return torch.softmax(z, -1)


# --- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    solver_name: str
    adjoint_name: str
    constraint_name: str
    map_name: str
    mapped: str

    def __str__(self):
        return f"{self.solver_name} | {self.adjoint_name} | {self.constraint_name} | {self.map_name}"

    solver = property(lambda self: SOLVERS[self.solver_name])
    adjoint = property(lambda self: ADJOINTS[self.adjoint_name])
    constraint = property(lambda self: CONSTRAINTS[self.constraint_name])
    map = property(lambda self: MAPS[self.map_name])
    exact = property(lambda self: self.adjoint_name != "phantom")

    @property
    def possible(self):
        substitutes = "BackSubstitution" in self.solver_name or "BackSubstitution" in self.adjoint_name
        if self.constraint_name == "triangular":  # general maps see a full matrix that happens to be triangular
            return self.map.componentwise or not substitutes
        return not substitutes

    def solve(self, *tensors):
        """Return the library's equilibrium."""
        *state, B, u, bias = tensors[: len(tensors) - len(self.map.weights)]
        return self.map.solve(self, tuple(state), B, u, bias, *tensors[len(state) + 3 :])

    def pre_activation(self, x, *tensors):
        *state, B, u, bias = tensors[: len(tensors) - len(self.map.weights)]
        return x @ self.constraint.plain(*state, KAPPA / self.map.slope).T + u @ B.T + bias

    def plain(self, x, *tensors):
        """Return the map at ``x``, in plain torch."""
        weights = tensors[len(tensors) - len(self.map.weights) :]
        return oracles.PHI[self.map.phi](self.pre_activation(x, *tensors), *weights)

    @cached_property
    def tensors(self):
        """``A`` or ``L, R``, then ``B, u, bias`` and weights of the activation: away from every kink."""
        for seed in range(0, 1000, 10):
            tensors = self._drawn(seed)
            x = oracles.unrolled(self.plain, torch.zeros(BATCH, N), *tensors)
            clear = [self.pre_activation(x, *tensors).abs().min() > MARGIN]
            if self.constraint_name == "active projection":
                A, threshold = tensors[0].abs(), tensors[0].abs() - self.constraint.plain(tensors[0], KAPPA).abs()
                clear += [(A - threshold.amax(1, keepdim=True)).abs().min() > MARGIN]
            if all(clear):
                return tensors
        raise AssertionError("no seed gives a problem away from kinks")

    @property
    def flat(self):
        """All tensors as one vector: one direction moves them all."""
        return torch.cat([t.flatten() for t in self.tensors]).requires_grad_()

    def solve_flat(self, flat):
        parts = flat.split([t.numel() for t in self.tensors])
        return self.solve(*(part.reshape(t.shape) for part, t in zip(parts, self.tensors, strict=True)))

    @property
    def leaves(self):
        """The tensors, asking for gradients."""
        return [t.clone().requires_grad_() for t in self.tensors]

    @cached_property
    def x(self):
        """The answer."""
        return oracles.unrolled(self.plain, torch.zeros(BATCH, N), *self.tensors)

    @cached_property
    def cotangent(self):
        return random(BATCH, N, seed=5)

    def gradient(self, tensors=None, cotangent=None):
        """Return the gradients of ``sum(cotangent * x)`` that the adjoint promises."""
        tensors = self.tensors if tensors is None else tensors
        cotangent = self.cotangent if cotangent is None else cotangent
        x = oracles.unrolled(self.plain, torch.zeros(BATCH, N), *tensors)
        if self.exact:
            return oracles.implicit_gradient(self.plain, x, tensors, cotangent)
        return oracles.neumann_gradient(self.plain, x, tensors, cotangent, self.adjoint.steps, self.adjoint.damping)

    def _drawn(self, seed):
        if self.constraint.low_rank:
            L, R = random(N, RANK, seed=seed), random(N, RANK, seed=seed + 1)
            bound = (L.abs() @ R.abs().T).sum(1, keepdim=True)
            state = [L * self.constraint.row_sum / bound, R]
        else:
            A = random(N, N, seed=seed)
            scale = 1 if self.constraint.row_sum is None else self.constraint.row_sum / A.abs().sum(1, keepdim=True)
            state = [A * scale]
        others = [random(N, P, seed=seed + 2), random(BATCH, P, seed=seed + 3), 0.3 * random(N, seed=seed + 4)]
        return [*state, *others, *(torch.tensor(w) for w in self.map.weights)]

    @property
    def mapped_tensors(self):
        """Positions of the tensors that vmap maps over."""
        states = 2 if self.constraint.low_rank else 1
        return {"inputs": [states + 1], "state matrix": range(states), "everything": range(len(self.tensors))}[
            self.mapped
        ]


MAPPED = ["inputs", "state matrix", "everything"]


def every_pair(*axes, possible):
    """Return few combinations among which any two choices of two axes meet, if a possible combination has both."""

    def pairs(combination):
        return set(itertools.combinations(enumerate(combination), 2))

    candidates = [c for c in itertools.product(*axes) if possible(c)]
    missing = set().union(*map(pairs, candidates))
    chosen = []
    for gain in range(len(axes) * (len(axes) - 1) // 2, 0, -1):
        for candidate in candidates:
            if len(pairs(candidate) & missing) >= gain:
                chosen.append(candidate)
                missing -= pairs(candidate)
    return chosen


CASES = [
    Case(*c) for c in every_pair(SOLVERS, ADJOINTS, CONSTRAINTS, MAPS, MAPPED, possible=lambda c: Case(*c).possible)
]
