r"""The low-rank form :math:`A = LR^T`: where to look for the directions ``R``, from second moments alone.

With the columns of ``R`` of l1 norm 1 every row of ``A`` is inside the ball if the same row of ``L`` is, so that given
``R`` the rows of ``[L B]`` are an ordinary problem on the regressors ``[XR U]``. Only ``R`` itself is not convex.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from idl.linalg.projections import project_rows_l1
from idl.sim.elimination import Elimination, whitening
from idl.sim.moments import Moments
from idl.sim.problem import RowProblem
from idl.sim.solvers.hybrid import Hybrid

_ROUNDS, _GAIN = 40, 1e-3  # most rounds, and the relative gain of one at which they end
_ROWS = Hybrid(tol=1e-3, max_steps=300)  # of a round: the next one moves R anyway
_STEPS = 50  # of R in a round
_DEPENDENT = 1e-10  # part of a state's variance below which those selected before contain it


@dataclass(frozen=True)
class Directions:
    r"""The directions that states are read in, and the rows that were found for them.

    Attributes:
        R: Columns of l1 norm 1, or of zeros where nothing reads them.
        W: Rows of ``[L B]``: feasible, and close to the best for this ``R``.
        objectives: Sum of the rows' objectives after each round, which never rises.
    """

    R: Float[Tensor, "n rank"]
    W: Float[Tensor, "rows d"]
    objectives: tuple[float, ...]


def reduced(moments: Moments, R: Float[Tensor, "n rank"]) -> Moments:
    """Return the moments of the regressors ``[XR U]`` from those of ``[X U]``."""
    n = len(R)

    def columns(M: Tensor) -> Tensor:
        return torch.cat((M[..., :n] @ R, M[..., n:]), -1)

    gram = columns(columns(moments.gram).T)
    gram = (gram + gram.T) / 2  # symmetric to the last bit
    return replace(moments, gram=gram, cross=columns(moments.cross), mean_S=columns(moments.mean_S))


def regression_directions(moments: Moments, n: int, rank: int) -> Float[Tensor, "n rank"]:
    r"""Return the directions of reduced-rank regression (Izenman 1975) of the targets on ``X``, given ``U``.

    With ``U`` partialled out of both, a basis ``Q`` with :math:`Q^T G Q = I` and
    :math:`HQ = V \Sigma P^T`, the best ``A`` of this rank is :math:`V_r V_r^T H G^+`, so that ``R`` is :math:`Q P_r`.
    It is the optimum without penalty and ball. ``O(d^3)``.

    Args:
        moments: Of regressors ``[X U]``, about their means if there is an intercept.
        n: Number of columns of ``X``.
        rank: Number of directions; those that nothing is explained by are zero.
    """
    outside = torch.ones_like(moments.mean_S)
    outside[n:] = 0
    whole = RowProblem(moments.gram, moments.cross, moments.energies, outside, n, 1.0)
    given_inputs = Elimination(whole).problem if bool(whole.free.any()) else whole
    basis = whitening(given_inputs.gram)
    right = torch.linalg.svd(given_inputs.correlations @ basis, full_matrices=False).Vh[:rank]
    R = moments.gram.new_zeros(n, rank)
    R[:, : len(right)] = basis @ right.T
    return _normalised(R)[0]


def selected_states(A: Float[Tensor, "rows n"], gram: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n rank"]:
    """Return unit vectors: the states that explain most of ``X A^T`` together, by forward selection.

    With as many of them as states ``R`` is a permutation and loses nothing. ``O(n^2)`` for each.

    Args:
        A: A state matrix of full rank.
        gram: Gram matrix of the states.
        rank: Number of states.
    """
    rest, cross = gram.clone(), A @ gram
    least = _DEPENDENT * gram.diagonal()
    R = torch.zeros(len(gram), rank, dtype=gram.dtype, device=gram.device)
    waiting = torch.ones_like(least, dtype=torch.bool)
    for k in range(rank):
        sizes = rest.diagonal()
        explained = torch.where(sizes > least, cross.square().sum(0) / sizes, 0)
        best = int(torch.where(waiting, explained, -1).argmax())
        waiting[best] = False
        R[best, k] = 1
        if float(sizes[best]) > float(least[best]):
            column, shared = (M[:, best] / sizes[best].sqrt() for M in (rest, cross))
            rest = rest - torch.outer(column, column)
            cross = cross - torch.outer(shared, column)
    return R


def search(moments: Moments, n: int, rank: int, problem: Callable[[Moments, int], RowProblem]) -> Directions:
    r"""Look for directions with a small sum of the rows' objectives, by alternating minimisation.

    Of two starts the one with the better rows is taken: :func:`regression_directions`, which a small penalty hardly
    moves, and :func:`selected_states` of the ``A`` of full rank, whose ball and penalty are the same as with ``R``.
    Then the rows given ``R`` and ``R`` given the rows are improved in turn. A local optimum at best: nothing is proved
    of ``R``. The data are not needed again.

    ``O(d^3)`` once and the rows of a full ``A`` once; a round takes the rows of ``rank`` and the inputs' columns, and
    ``O(n^2 rank)`` for each of 50 steps.

    Args:
        moments: Of regressors ``[X U]`` and targets, about their means if there is an intercept.
        n: Number of columns of ``X``.
        rank: Number of directions.
        problem: Makes the rows' problem from moments and the number of columns inside the ball.
    """
    gram = moments.gram[:n, :n]
    largest = torch.linalg.eigvalsh(gram)[-1] * (1 + 1e-9)
    full = _ROWS.solve(problem(moments, n))
    starts = [regression_directions(moments, n, rank), selected_states(full.W[:, :n], gram, rank)]
    solutions = [_ROWS.solve(problem(reduced(moments, R), rank)) for R in starts]
    R, solution = min(zip(starts, solutions, strict=True), key=lambda pair: float(pair[1].objective.sum()))
    W, objectives = solution.W, [float(solution.objective.sum())]
    while len(objectives) < _ROUNDS:
        L, B = W[:, :rank], W[:, rank:]
        R = improved_directions(R, gram, L, moments.cross[:, :n] - B @ moments.gram[n:, :n], largest)
        R, sizes = _normalised(R)
        # The same A with smaller L: neither penalty nor bound grows.
        solution = _ROWS.solve(problem(reduced(moments, R), rank), torch.cat((L * sizes, B), 1))
        W = solution.W
        objectives.append(float(solution.objective.sum()))
        if objectives[-2] - objectives[-1] <= _GAIN * objectives[-1]:
            break
    return Directions(torch.where(W[:, :rank].any(0), R, 0), W, tuple(objectives))


def improved_directions(
    R: Float[Tensor, "n rank"],
    gram: Float[Tensor, "n n"],
    L: Float[Tensor, "rows rank"],
    cross: Float[Tensor, "rows n"],
    largest: Float[Tensor, ""],
) -> Float[Tensor, "n rank"]:
    r"""Return directions that explain no less with the same ``L`` and ``B``, by projected FISTA with restart.

    .. math:: \min_R \tfrac12 \langle R M, G R \rangle - \langle R, K^T L \rangle \quad \text{s.t.} \quad |R_k|_1 \le 1

    with :math:`M = L^T L`. As :math:`M \preceq \mathrm{diag}(\sum_j |M_{kj}|)`, each column has a step size of its own.

    Args:
        R: Where to start, inside.
        gram: ``G``, of the states.
        L: Rows.
        cross: ``K``: the targets' products with the states, less what ``B`` explains.
        largest: Bound on the eigenvalues of ``G``.
    """
    M, wanted = L.T @ L, cross.T @ L
    curvature = (largest * M.abs().sum(1)).clamp_min(torch.finfo(R.dtype).tiny)

    def objective(R: Tensor) -> float:
        return float(((0.5 * gram @ R @ M - wanted) * R).sum())

    y, new, momentum = R, R, 1.0
    for _ in range(_STEPS):
        old = new
        new = project_rows_l1((y - (gram @ y @ M - wanted) / curvature).T.contiguous(), 1.0).T
        if float(((y - new) * (new - old) * curvature).sum()) > 0:  # uphill
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        y = new + (momentum - 1) / following * (new - old)
        momentum = following
    return new if objective(new) < objective(R) else R


def _normalised(R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns with l1 norm 1, and the norms that they had; columns of zeros stay."""
    sizes = R.abs().sum(0)
    return torch.where(sizes > 0, R / sizes, 0), sizes
