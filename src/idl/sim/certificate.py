"""What a state-driven model can prove of itself."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from idl.sim.solvers.base import RowSolution


@dataclass(frozen=True)
class WeightsKept:
    """Non-zero weights of the model, those of L and R as A's, and the number of weights of its teacher.

    Attributes:
        A, B, C, D: Non-zeros of each matrix.
        teacher: Number of weights of the teacher.

    Example:
        >>> WeightsKept(A=10, B=20, C=15, D=5, teacher=200).fraction
        0.25
    """

    A: int
    B: int
    C: int
    D: int
    teacher: int

    @property
    def total(self) -> int:
        """Non-zeros of A, B, C and D."""
        return self.A + self.B + self.C + self.D

    @property
    def fraction(self) -> float:
        """Non-zeros of A, B, C and D over the weights of the teacher."""
        return self.total / self.teacher if self.teacher else float("inf")


@dataclass(frozen=True)
class Certificate:
    """How close each row is to the optimum of its convex problem, and what the whole is worth.

    Attributes:
        states: Rows of ``[A B]``: objective, proved lower bound and relative gap of the penalised problem.
        outputs: The same for the rows of ``[C D]``.
        tol: Relative gap that was asked.
        row_sums: ``sum_j |A_ij|`` of each row as stored, in float64.
        kappa: Bound on them.
        weights_kept: How sparse it is.
        explained: Part of the variation of each of the teacher's outputs that the model reproduces, in float64 from the
            second moments on the training inputs; 1 is agreement.
        rescaling: How the teacher's states were rescaled before.
        samples: Number of samples seen.
        rank: Number of columns of ``L`` and ``R`` if ``A = L R^T``, whose row sums are then bounded by those of
            ``|L| |R|^T``. Rows are of ``[L B]`` and optima given ``R``; that ``R`` is the best is not proved.

    Example:
        >>> from idl import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> certificate = SIM(lam=1e-2).fit(teacher, [torch.randn(200, 8)]).certificate_
        >>> bool((certificate.states.gap <= certificate.tol).all())
        True
    """

    states: RowSolution
    outputs: RowSolution
    tol: float
    row_sums: Float[Tensor, " n"]
    kappa: float
    weights_kept: WeightsKept
    explained: Float[Tensor, " q"]
    rescaling: str
    samples: int
    rank: int | None = None

    @property
    def feasible(self) -> bool:
        """Whether no row sum is above ``kappa``, exactly."""
        return bool((self.row_sums <= self.kappa).all())

    @property
    def uncertified(self) -> tuple[list[int], list[int]]:
        """Rows of ``[A B]`` and of ``[C D]`` whose gap is above ``tol``; on their supports if :attr:`relaxed`."""
        first, second = (~(_proved(part) <= self.tol) for part in (self.states, self.outputs))
        return first.nonzero()[:, 0].tolist(), second.nonzero()[:, 0].tolist()

    @property
    def relaxed(self) -> bool:
        """Whether the rows are optima on their supports only, and the objective that of a convex relaxation."""
        return self.states.support_gap is not None

    def __str__(self) -> str:
        """Return a few lines for people."""
        kept, missing = self.weights_kept, self.uncertified
        gaps = torch.cat((_proved(self.states), _proved(self.outputs)))
        open_rows = "".join(
            f"\n  not certified: {len(rows)} rows of {name}, gap up to {float(_proved(part)[rows].max()):.1e}"
            for name, rows, part in (("[A B]", missing[0], self.states), ("[C D]", missing[1], self.outputs))
            if rows
        )
        bound = f"<= {self.kappa:g}" if self.feasible else f"> {self.kappa:g}: no equilibrium is guaranteed"
        which = ""
        if self.relaxed:
            penalised, bound_on_it = (
                sum(float(getattr(part, name).sum()) for part in (self.states, self.outputs))
                for name in ("objective", "bound")
            )
            which = (
                " on its support\nthe supports are not proved to be the best: the l1 relaxation goes "
                f"{100 * (1 - bound_on_it / penalised) if penalised else 0:.0f} % lower"
            )
        if self.states.unexplained is not None and self.outputs.unexplained is not None:
            left = torch.cat((self.states.unexplained, self.outputs.unexplained))
            which = f"\nmatched exactly: rounding leaves {float(left.max()):.0e} of a row's energy"
        A = "|A|"
        if self.rank is not None:
            A = "|L| |R|^T"
            which += f"\ngiven R of rank {self.rank}, which is not proved to be the best"
        return (
            f"{len(gaps)} rows, relative gap at most {float(gaps.max()):.1e} (asked {self.tol:g}){which}{open_rows}\n"
            f"max row sum of {A} {float(self.row_sums.max()):.6f} {bound}\n"
            f"weights kept: A {kept.A}, B {kept.B}, C {kept.C}, D {kept.D}: {kept.total} of the teacher's "
            f"{kept.teacher} ({100 * kept.fraction:.1f} %)\n"
            f"outputs explained: {100 * float(self.explained.mean()):.2f} % on {self.samples} samples"
        )


def _proved(part: RowSolution) -> Tensor:
    return part.gap if part.support_gap is None else part.support_gap
