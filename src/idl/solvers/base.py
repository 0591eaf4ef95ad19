"""What a solver may ask of a map, what a solver is, and what a user gets back."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from idl import checks
from idl.linalg.operators import to_precise


@dataclass(frozen=True)
class Solution:
    """A fixed point and how exact it is; all but ``x`` hold one number a sample and carry no gradient.

    Attributes:
        x: The fixed point, of the shape of the state.
        residual: ``|f(x) - x|`` at the returned ``x``, largest entry. Evaluated in float64, from ``u`` on, where the
            activation has a known derivative and the device has float64; else in the precision of the solve.
        steps: Applications of the map, or of its linearisation, that were spent.
        converged: Whether the estimated error reached the tolerance (or the rounding floor of the dtype), and the
            proved one too where the map contracts by so little that it may be more than 128 times the last step.
        error_bound: Proved bound on the largest entry of ``|x - x*|``, ``residual / (1 - kappa)``, where the map is
            known to contract by ``kappa`` in the max norm; ``None`` where nothing is proved or the residual is rounded.

    Example:
        >>> from idl import fixed_point
        >>> solution = fixed_point(torch.cos, torch.tensor(1.0))
        >>> solution.x, solution.converged
        (tensor(0.7391), tensor(True))
    """

    x: Any
    residual: Float[Tensor, "*batch"]
    steps: Int[Tensor, "*batch"]
    converged: Bool[Tensor, "*batch"]
    error_bound: Float[Tensor, "*batch"] | None = None


_BELIEVED = 128  # times its last step that an error may be if an estimate is to do; at the models' kappa it is 99


class Problem(ABC):
    """A map ``x -> f(x)`` on rows ``(rows, n)``, as a solver sees it.

    Only the value of the map and its linearisation have to be written; the rest are better ways that a map may know.
    """

    separable: bool = False
    """Whether each row is a problem of its own, so that finished rows can be left out."""
    rate: float | None = None
    """Contraction that a related problem has shown: what to expect, if one was solved before."""
    slowest: float | None = None
    """Contraction that what a related problem has left at the start may have: a smaller measured one is not believed.

    Its slow part can be hidden below steps of faster parts, or cancel with them, until these have died away.
    """
    known: float | None = None
    """Contraction that is proved already, of this problem or of one that contracts no faster."""
    newton_is_cheap: bool = False
    """Whether a product with the Jacobian costs about what an application of the map costs."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return ``f(x)``."""

    @abstractmethod
    def start(self, x: Tensor | None) -> Tensor:
        """Return ``f(x)``; ``None`` stands for zeros."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Return the norm over the last dimension in which the map is known, or hoped, to contract."""

    @abstractmethod
    def scale(self, x: Tensor) -> Tensor:
        """Return for each row the size to which a relative tolerance refers."""

    @abstractmethod
    def linearise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``f(x)``, in float64 if the map can, and what :meth:`product` needs, one row a row."""

    @abstractmethod
    def product(self, slope: Tensor, v: Tensor) -> Tensor:
        """Return ``J v`` for each row, ``J`` the Jacobian where ``slope`` was taken."""

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the norm of each row of ``x - y``."""
        return self.norm(x - y)

    def burst(self, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Apply ``f`` ``steps >= 2`` times; return the last iterate and the sizes of the last two steps, ``(2, rows)``.

        ``x`` is not changed.
        """
        older = previous = x
        for _ in range(steps):
            older, previous, x = previous, x, self(x)
        return x, torch.stack((self.distance(previous, older), self.distance(x, previous)))

    def restrict(self, rows: Tensor) -> "Problem":
        """Return the problem of the rows with these indices; only if :attr:`separable`."""
        raise TypeError(f"the rows of {type(self).__name__} may depend on each other")

    def eased(self) -> "Problem":
        """Return a problem with the same fixed point that contracts faster, or this one where none is known."""
        return self

    @property
    def contraction(self) -> float:
        """Factor by which the map is proved to contract in its norm if below 1; found once, by a product or two."""
        if self.known is None:
            self.known = self.contraction_bound()
        return self.known

    def contraction_bound(self) -> float:
        """Return a bound on the factor by which the map contracts in its norm; ``inf`` where none is known."""
        return math.inf

    @cached_property
    def error_factor(self) -> float:
        """Times the last step that the error of an image is at most, as is proved; ``inf`` where nothing is."""
        return self.contraction / (1 - self.contraction) if self.contraction < 1 else math.inf

    @property
    def amplification(self) -> float:
        """Times its residual that the error of a point may be, as is proved, where no estimate is believed; else 0.

        The few steps of an estimate tell how the fastest parts of an error shrink, and a slow part hides below them. If
        it may be a hundred times as large, tolerances allow for that; if ten thousand times, an estimate says nothing.
        """
        return 1 + self.error_factor if _BELIEVED < self.error_factor < math.inf else 0.0

    @property
    def can_solve(self) -> bool:
        """Whether :meth:`solve` exists and is affordable at this size."""
        return False

    @property
    def solve_is_cheap(self) -> bool:
        """Whether :meth:`solve` costs about what a few products cost."""
        return False

    def solve(self, slope: Tensor, rhs: Tensor) -> Tensor:
        """Solve ``v - J v = rhs`` for each row, directly; only if :attr:`can_solve`."""
        raise TypeError(f"{type(self).__name__} has no direct solve")

    def substitute(self, x: Tensor | None) -> Tensor | None:
        """Return the exact fixed point where the map is strictly triangular, else ``None``; ``x`` is a start."""
        return None


@dataclass(frozen=True)
class AbstractFixedPointSolver(ABC):
    """A method that finds fixed points: an immutable value, equal to another with equal fields.

    To add a solver, write a frozen dataclass with :meth:`init` and :meth:`step`; the loop, the stop test for each
    sample and the choice of the best iterate are those of :func:`idl.solvers.iterate.iterate`. So is the doubt about
    estimates: where :attr:`Problem.amplification` is not 0 a row goes on until its residual is as small as that asks.

    Args:
        atol: Absolute tolerance on the estimated error, in the problem's norm.
        rtol: Tolerance relative to the problem's scale: the size of ``x``, or of the cotangent in an adjoint.
        max_steps: Most applications of the map, or of its linearisation; a change of method may add one or two.

    Raises:
        TypeError, ValueError: If a tolerance is negative or ``max_steps < 1``.

    Example:
        >>> from idl import fixed_point
        >>> @dataclass(frozen=True)
        ... class Plain(AbstractFixedPointSolver):
        ...     def init(self, problem, x):
        ...         return self._state(problem, problem.start(x)), 1
        ...     def step(self, problem, state, budget):
        ...         return self._state(problem, state.x), 1
        ...     def _state(self, problem, x):
        ...         image, tolerance = problem(x), self.tolerance(problem, x)
        ...         residual = problem.distance(image, x)  # taken as the error too, which a slow map makes larger
        ...         worst = largest_ratio(residual, tolerance)
        ...         return State(image, residual, residual, tolerance, worst, settled=worst <= 1)
        >>> fixed_point(torch.cos, torch.tensor(1.0), solver=Plain()).x
        tensor(0.7391)
    """

    refines: ClassVar[bool] = False
    """Whether it goes on in float64 where float32 ends: if errors are amplified, rounding is then no end for a row."""

    atol: float = 3e-6
    rtol: float = 0.0
    max_steps: int = 300

    def __post_init__(self) -> None:
        checks.non_negative("atol", self.atol)
        checks.non_negative("rtol", self.rtol)
        checks.positive_integer("max_steps", self.max_steps)

    @abstractmethod
    def init(self, problem: Problem, x: Tensor | None) -> tuple[Any, int]:
        """Return the first state and the applications it cost.

        Args:
            problem: The map.
            x: Start, ``(rows, n)``; ``None`` for zeros.
        """

    @abstractmethod
    def step(self, problem: Problem, state: Any, budget: int) -> tuple[Any, int]:
        """Advance by at most about ``budget >= 1`` applications; return the new state and what was spent.

        A state is a ``NamedTuple`` with at least the fields of :class:`State`. The loop takes the rows that go on out
        of every tensor in it.

        Args:
            problem: The map, of the rows that are in ``state``.
            state: What :meth:`init` or this method returned.
            budget: Applications that are left.
        """

    def tolerance(self, problem: Problem, x: Tensor) -> Tensor:
        """Return the tolerance of each row of ``x``, positive, for the scale of ``problem``."""
        smallest = torch.finfo(x.dtype).tiny  # where nothing is tolerated a zero residual still is
        if not self.rtol:
            return x.new_full((x.shape[0],), max(self.atol, smallest))
        tolerance = problem.scale(x).mul(self.rtol)
        return (tolerance.add_(self.atol) if self.atol else tolerance).clamp_min_(smallest)


class State(NamedTuple):
    """What the loop reads of every solver's state."""

    x: Tensor
    """The candidate that would be returned now, one row a sample."""
    residual: Tensor
    """Size of the last step of each row, in the problem's norm."""
    error: Tensor
    """Estimate, for each row, of the distance from ``x`` to the fixed point; ``inf`` where there is none yet."""
    tolerance: Tensor
    """What each row's residual and error must reach."""
    worst: float
    """Largest ratio of a row's residual to its tolerance; not finite if some row is not."""
    settled: bool
    """Whether the error of every row is within its tolerance."""
    rate: float | None = None
    """Contraction from step to step, where it was measured."""


def largest_ratio(sizes: Tensor, tolerance: Tensor) -> float:
    """Return the largest ratio of ``sizes`` to ``tolerance``, ``nan`` if a row is ``nan``, 0 without rows.

    This is where a solver waits for a GPU; everything else it decides follows from the number.
    """
    return float((sizes / tolerance).max()) if sizes.shape[0] else 0.0


def rounding_floor(problem: Problem, x: Tensor, first: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the accuracy that rounding permits for each row: a few units in the last place of ``x``.

    A row that has grown ten thousand times over its first image is not close to a fixed point because its steps are
    small beside it. ``None`` stands for a first image that is too few applications away for that.
    """
    size = problem.norm(x)
    if first is not None:
        size = torch.minimum(size, 1e4 * (1 + problem.norm(first).to(x.dtype)))
    return 4.0 * torch.finfo(dtype).eps * size


def raises_doubts(contraction: float) -> bool:
    """Return whether a map that contracts by this may have errors far larger than estimates of them."""
    return contraction / (1 - contraction) > _BELIEVED


def rounding_is_an_end(solver: AbstractFixedPointSolver, problem: Problem, x: Tensor) -> bool:
    """Return whether nothing more is to be had for a row of ``x`` that is down at rounding."""
    return not (solver.refines and problem.amplification) or is_precise(x)


def is_precise(x: Tensor) -> bool:
    """Return whether ``x`` is in the highest precision of its device."""
    return to_precise(x[:0]).dtype == x.dtype


def has_run_away(problem: Problem, x: Tensor, first: Tensor) -> Tensor:
    """Return which rows are so large beside their first image that ``f(x) = x`` can only be rounding."""
    return problem.norm(x) > 1e6 * (1 + problem.norm(first).to(x.dtype))
