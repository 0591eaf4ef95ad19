"""Anderson acceleration, each sample by itself."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from idl import checks
from idl.solvers.base import AbstractFixedPointSolver, Problem, largest_ratio


class AndersonState(NamedTuple):
    """State of :class:`Anderson`: ``x`` is the image ``f(point)``; histories are ``(rows, memory, n)``."""

    x: Tensor
    residual: Tensor
    error: Tensor
    tolerance: Tensor
    worst: float
    settled: bool
    rate: float | None
    point: Tensor
    images: Tensor
    defects: Tensor
    valid: Tensor
    """Which entries of the history a row may use, ``(rows, memory)``."""
    slot: int = 0


@dataclass(frozen=True)
class Anderson(AbstractFixedPointSolver):
    """Mix the last images so that the mixed defect is smallest (Anderson 1965; Walker and Ni 2011, type II).

    Each row has weights of its own, from a ridge-regularised system of at most ``memory`` unknowns that is solved
    without raising. Safeguard: a row whose residual doubles over its best forgets its history and goes on from a
    plain Picard step. Uses no derivative, so it serves maps of which only values are known, and large ones.

    Args:
        atol, rtol, max_steps: See :class:`AbstractFixedPointSolver`.
        memory: Number of images that are kept.
        ridge: Size of the regularisation, relative to the mean squared defect of the history.

    Raises:
        TypeError, ValueError: If an argument is out of range.
    """

    memory: int = 6
    ridge: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive_integer("memory", self.memory)
        checks.non_negative("ridge", self.ridge)

    def init(self, problem: Problem, x: Tensor | None) -> tuple[AndersonState, int]:
        """Apply the map twice, to have a point that is an image."""
        x = problem.start(x)
        return self.begin(problem, x, self.tolerance(problem, x)), 2

    def begin(self, problem: Problem, x: Tensor, tolerance: Tensor) -> AndersonState:
        """Return the state at ``x``; one application."""
        image = problem(x)
        residual = problem.distance(image, x)
        rows, n = x.shape
        history = x.new_zeros(rows, self.memory, n)
        valid = torch.zeros(rows, self.memory, dtype=torch.bool, device=x.device)
        unknown, worst = torch.full_like(residual, torch.inf), largest_ratio(residual, tolerance)
        seen = (image, residual, unknown, tolerance, worst, worst == 0, None)
        return self._remember(AndersonState(*seen, x, history, history.clone(), valid))

    def step(self, problem: Problem, state: AndersonState, budget: int) -> tuple[AndersonState, int]:
        """Mix, apply the map, remember."""
        point = torch.bmm(self._weights(state)[:, None, :], state.images)[:, 0]
        image = problem(point)
        residual = problem.distance(image, point)
        spent = 1
        worse = ~(residual <= 2 * state.residual)
        valid = state.valid & ~worse[:, None]
        if budget > 1 and bool(worse.any()):
            point = torch.where(worse[:, None], state.x, point)
            image = problem(point)
            residual = problem.distance(image, point)
            spent = 2
        step = problem.distance(image, state.x)
        rate = residual / state.residual
        # A mixed step shrinks unevenly; what it moved, times how much it gained, stands for what is left.
        error = torch.where(rate < 1, torch.maximum(step * rate, residual), torch.inf)
        state = state._replace(
            x=image,
            residual=residual,
            error=error,
            worst=largest_ratio(residual, state.tolerance),
            settled=largest_ratio(error, state.tolerance) <= 1,
            point=point,
            valid=valid,
        )
        return self._remember(state), spent

    def _remember(self, state: AndersonState) -> AndersonState:
        state.images[:, state.slot] = state.x
        state.defects[:, state.slot] = state.x - state.point
        state.valid[:, state.slot] = True
        return state._replace(slot=(state.slot + 1) % self.memory)

    def _weights(self, state: AndersonState) -> Tensor:
        usable = state.valid.to(torch.float64)
        defects = state.defects.to(torch.float64)
        gram = torch.bmm(defects, defects.transpose(1, 2)) * usable[:, :, None] * usable[:, None, :]
        size = gram.diagonal(dim1=1, dim2=2).sum(1) / usable.sum(1)
        size = torch.where(size > 0, size, 1)[:, None]
        gram = gram / size[:, :, None] + torch.diag_embed(self.ridge + (1 - usable))
        weights, _ = torch.linalg.solve_ex(gram, usable[:, :, None])
        weights = weights[:, :, 0] * usable
        weights = weights / weights.sum(1, keepdim=True)
        newest = torch.zeros_like(weights)
        newest[:, state.slot - 1] = 1  # a plain Picard step where no mixture can be had
        sound = weights.isfinite().all(1, keepdim=True)
        return torch.where(sound, weights, newest).to(state.x.dtype)
