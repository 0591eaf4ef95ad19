"""Anderson acceleration, each sample by itself."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from idl import checks
from idl.solvers.base import AbstractFixedPointSolver, Problem, largest_ratio

_GROWTH = 10.0  # of a residual in a step, at which a history is no help; on the way to a fixed point 2 is usual


class AndersonState(NamedTuple):
    """State of :class:`Anderson`; histories are ``(rows, memory, n)``.

    The candidate is the mixed point, whose residual is known, and not its image: of a map that expands that is farther
    from the fixed point.
    """

    x: Tensor
    residual: Tensor
    error: Tensor
    tolerance: Tensor
    worst: float
    settled: bool
    rate: float | None
    image: Tensor
    """``f(x)``."""
    images: Tensor
    unit: Tensor
    """Size of the first defect of each row, ``(rows, 1)``: in this unit squares of defects do not underflow."""
    defects: Tensor
    gram: Tensor
    """Inner products of the defects in float64, ``(rows, memory, memory)``."""
    valid: Tensor
    """Which entries of the history a row may use, ``(rows, memory)``."""
    slot: int = 0


@dataclass(frozen=True)
class Anderson(AbstractFixedPointSolver):
    """Mix the last images so that the mixed defect is smallest (Anderson 1965; Walker and Ni 2011, type II).

    Each row has weights of its own, from a ridge-regularised system of at most ``memory`` unknowns that is solved
    without raising. Safeguard: a row whose residual grows tenfold in a step forgets its history and goes on from
    a damped Picard step. Uses no derivative, so it serves maps of which only values are known, and large ones. A step
    costs an application and ``O(memory * n)`` a row.

    Args:
        atol, rtol, max_steps: See :class:`AbstractFixedPointSolver`.
        memory: Number of images that are kept.
        ridge: Size of the regularisation, relative to the mean squared defect of the history.
        mixing: How far to go from the mixed points to their mixed images, in (0, 1]. At 1 a map that contracts takes
            the fewest steps, by little, and one that overshoots, as a trained attention does, takes more.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from idl import fixed_point
        >>> fixed_point(torch.cos, torch.tensor(1.0), solver=Anderson(memory=3)).x
        tensor(0.7391)
    """

    memory: int = 6
    ridge: float = 1e-8
    mixing: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive_integer("memory", self.memory)
        checks.non_negative("ridge", self.ridge)
        checks.in_half_open_unit("mixing", self.mixing)

    def init(self, problem: Problem, x: Tensor | None) -> tuple[AndersonState, int]:
        """Apply the map twice, to have a point that is an image."""
        x = problem.start(x)
        return self.begin(problem, x, self.tolerance(problem, x)), 2

    def begin(self, problem: Problem, x: Tensor, tolerance: Tensor) -> AndersonState:
        """Return the state of ``problem`` at ``x``, for a ``tolerance`` of each row; one application."""
        image = problem(x)
        residual = problem.distance(image, x)
        rows, n = x.shape
        history = x.new_zeros(rows, self.memory, n)
        gram = torch.zeros(rows, self.memory, self.memory, dtype=torch.float64, device=x.device)
        valid = torch.zeros(rows, self.memory, dtype=torch.bool, device=x.device)
        unknown, worst = torch.full_like(residual, torch.inf), largest_ratio(residual, tolerance)
        seen = (x, residual, unknown, tolerance, worst, worst == 0, None)
        unit = (image - x).abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return self._remember(AndersonState(*seen, image, history, unit, history.clone(), gram, valid))

    def step(self, problem: Problem, state: AndersonState, budget: int) -> tuple[AndersonState, int]:
        """Mix, apply the map, remember."""
        point = self._mixed(state)
        image = problem(point)
        residual = problem.distance(image, point)
        spent = 1
        worse = ~(residual <= _GROWTH * state.residual)
        valid = state.valid & ~worse[:, None]
        if budget > 1 and bool(worse.any()):
            point = torch.where(worse[:, None], torch.lerp(state.x, state.image, self.mixing), point)
            image = problem(point)
            residual = problem.distance(image, point)
            spent = 2
        step = problem.distance(point, state.x)
        rate = residual / state.residual
        # A mixed step shrinks unevenly; what it moved, times how much it gained, stands for what is left. A row down at
        # rounding gains nothing, but is no farther than it was and has moved.
        error = torch.where(rate < 1, torch.maximum(step * rate, residual), torch.inf)
        error = torch.minimum(error, state.error + step)
        state = state._replace(
            x=point,
            residual=residual,
            error=error,
            worst=largest_ratio(residual, state.tolerance),
            settled=largest_ratio(error, state.tolerance) <= 1,
            image=image,
            valid=valid,
        )
        return self._remember(state), spent

    def _remember(self, state: AndersonState) -> AndersonState:
        slot, defect = state.slot, (state.image - state.x) / state.unit
        state.images[:, slot] = state.image
        state.defects[:, slot] = defect
        state.valid[:, slot] = True
        products = torch.bmm(state.defects, defect[:, :, None])[:, :, 0].to(torch.float64)
        state.gram[:, slot], state.gram[:, :, slot] = products, products
        return state._replace(slot=(slot + 1) % self.memory)

    def _mixed(self, state: AndersonState) -> Tensor:
        weights = self._weights(state)[:, None, :]
        image = torch.bmm(weights, state.images)[:, 0]
        if self.mixing == 1:
            return image
        defect = torch.bmm(weights, state.defects)[:, 0]
        return torch.addcmul(image, defect, state.unit, value=self.mixing - 1)

    def _weights(self, state: AndersonState) -> Tensor:
        usable = state.valid.to(torch.float64)
        gram = state.gram * usable[:, :, None] * usable[:, None, :]
        size = gram.diagonal(dim1=1, dim2=2).sum(1) / usable.sum(1)
        size = torch.where(size > 0, size, 1)[:, None]
        gram = gram / size[:, :, None] + torch.diag_embed(self.ridge + (1 - usable))
        weights, _ = torch.linalg.solve_ex(gram, usable[:, :, None])
        weights = weights[:, :, 0] * usable
        weights = weights / weights.sum(1, keepdim=True)
        newest = torch.zeros_like(weights)
        newest[:, state.slot - 1] = 1  # the newest alone where no mixture can be had
        sound = weights.isfinite().all(1, keepdim=True)
        return torch.where(sound, weights, newest).to(state.x.dtype)
