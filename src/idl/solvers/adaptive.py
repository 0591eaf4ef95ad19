"""The default: Picard while it is fast, another method once it is seen not to be."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from idl.solvers.anderson import Anderson, AndersonState
from idl.solvers.base import AbstractFixedPointSolver, Problem, is_precise
from idl.solvers.newton import Newton, NewtonState
from idl.solvers.picard import Picard, PicardState

_PATIENCE = 200  # Picard steps that cost about what a Newton solve costs, measured at n = 100; at n = 400 it is 70


@dataclass(frozen=True)
class Adaptive(AbstractFixedPointSolver):
    """Start with Picard, measure its contraction, and change method when it would not arrive soon.

    Well-conditioned equilibria, the rule in training, cost a few Picard steps and nothing else. Once the measured
    rate predicts more than 200 further steps, or more than ``max_steps`` allow, the iteration goes on from where it
    is: by :class:`Newton` where the map offers cheap products with its Jacobian, else by :class:`Anderson`. So it does
    where Picard has arrived by its own estimate, and in float32 no step of it could prove that.

    Args:
        atol, rtol, max_steps: See :class:`AbstractFixedPointSolver`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from idl import fixed_point
        >>> solution = fixed_point(torch.cos, torch.tensor(1.0), solver=Adaptive(atol=1e-6))
        >>> bool(solution.converged)
        True
    """

    refines: ClassVar[bool] = True

    def init(self, problem: Problem, x: Tensor | None) -> tuple[PicardState, int]:
        """Begin as Picard does."""
        state, spent = self._picard.init(problem, x)
        return (state if is_precise(state.x) else state._replace(amplification=0.0)), spent  # a proof is for float64

    def step(
        self, problem: Problem, state: PicardState | NewtonState | AndersonState, budget: int
    ) -> tuple[PicardState | NewtonState | AndersonState, int]:
        """Go on with the present method, or change it."""
        if isinstance(state, NewtonState):
            return self._newton.step(problem, state, budget)
        if isinstance(state, AndersonState):
            return self._anderson.step(problem, state, budget)
        slow = state.spent >= 7 and state.remaining > min(_PATIENCE, budget)
        doubted = problem.amplification and state.remaining == 0  # what the loop does not believe Newton may prove
        if doubted or (slow and state.suspect):
            method = self._newton if problem.newton_is_cheap else self._anderson
            return method.begin(problem, state.x, state.tolerance), 1
        state, spent = self._picard.step(problem, state, budget)
        # One slow test may have seen a transient, which can even grow; two in a row have not.
        return state._replace(suspect=slow), spent

    @cached_property
    def _picard(self) -> Picard:
        return Picard(self.atol, self.rtol, self.max_steps)

    @cached_property
    def _newton(self) -> Newton:
        return Newton(self.atol, self.rtol, self.max_steps)

    @cached_property
    def _anderson(self) -> Anderson:
        return Anderson(self.atol, self.rtol, self.max_steps)
