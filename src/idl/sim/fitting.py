"""From what a teacher showed to an implicit model: its rows, block after block, then those of its outputs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from idl.functions import ImplicitFunction, ImplicitFunctionInf, ImplicitFunctionTriu
from idl.nn import ImplicitModel, SparseImplicitModel
from idl.sim import low_rank, rescaling
from idl.sim.certificate import Certificate, WeightsKept
from idl.sim.moments import Moments, accumulate
from idl.sim.problem import RowProblem
from idl.sim.recording import Recorded, check_same_inputs, recordings
from idl.sim.solvers.base import AbstractRowSolver, RowSolution
from idl.sim.solvers.debias import debias
from idl.sim.solvers.exact import NotMatchedError

Rescaling = Literal["unit_variance", "layerwise", "closed_form"]
_ROUNDING = 1e-6  # by which stored row sums stay below kappa, so that float32 sums do too
_HEADROOM = 0.01  # by which row sums of a rescaled teacher stay below kappa where it is matched exactly


@dataclass(frozen=True)
class Settings:
    """What :class:`~idl.SIM` was built with, checked."""

    solver: AbstractRowSolver
    kappa: float
    lam: float
    l1_ratio: float
    rescale: bool | Rescaling
    debias: bool
    refit: bool | Literal["layers"]
    column_weights: tuple[float, ...] | None
    knee: float
    rank: int | None

    def check_sizes(self, states: int, inputs: int) -> None:
        """Check what must fit the numbers of states and inputs, which a teacher and a batch tell."""
        if self.rank is not None and self.rank > states:
            raise ValueError(f"`rank` must be at most {states}, the number of states; got {self.rank}.")
        if self.column_weights is None:
            return
        if len(self.column_weights) != states + inputs:
            raise ValueError(
                f"`column_weights` must have one factor for each of {states} states and {inputs} inputs, "
                f"{states + inputs} in all; got {len(self.column_weights)}."
            )
        of_states = self.column_weights[:states]
        if self.rank is not None and len(set(of_states)) > 1:
            raise ValueError(
                f"`column_weights` must have the same factor for all {states} states with a `rank`, whose directions "
                f"mix them; got factors from {min(of_states):g} to {max(of_states):g}."
            )


@dataclass(frozen=True)
class _Block:
    """Rows of ``[A B]`` that are fitted together, and the columns of ``[X U]`` that they read."""

    rows: slice
    reads: slice


def fit_model(
    recorded: Recorded, loader: Iterable[Any], settings: Settings, near: Certificate | None = None
) -> tuple[SparseImplicitModel, Certificate]:
    """Return the model and its certificate; the rows start from those of ``near``, if it is given."""
    fitting = _Fitting(recorded, loader, settings)
    states = fitting.state_rows(None if near is None else near.states.W)
    outputs, explained = fitting.output_rows(None if near is None else near.outputs.W)
    model = fitting.model
    certificate = Certificate(
        states,
        outputs,
        settings.solver.tol,
        fitting.row_sums(),
        settings.kappa,
        fitting.weights_kept(),
        explained,
        fitting.rescaling,
        recorded.moments.samples,
        settings.rank,
    )
    return SparseImplicitModel(model), certificate


class _Fitting:
    """A model that is being filled with rows."""

    def __init__(self, recorded: Recorded, loader: Iterable[Any], settings: Settings) -> None:
        self.recorded, self.loader, self.settings = recorded, loader, settings
        settings.check_sizes(recorded.states, recorded.inputs)
        self.scale, self.rescaling = _scale(recorded, settings)
        self.n, self.p = recorded.states, recorded.inputs
        self.penalty = self._penalty()
        # The bound on row sums: kappa, or less for an activation whose slope exceeds 1.
        self.radius = settings.kappa / max(1.0, recorded.teacher.activation.lipschitz or 1.0)
        self.blocks = self._blocks()
        self.model = empty_model(recorded, settings)
        self.known = recorded.moments.gram[self.n :, self.n :]  # of the last columns, which no pass need see again
        ones = self.scale.new_ones
        outputs = recorded.moments.mean_T.shape[0] - self.n
        self.taught = recorded.moments.scaled(
            torch.cat((self.scale, ones(self.p))), torch.cat((self.scale, ones(outputs)))
        )
        constants = outputs if recorded.biased else 0
        self.R: Tensor | None = None
        self.start: Tensor | None = None
        if settings.rank is not None:
            self.R, self.start = self._directions(settings.rank)
            constants += int(self.R.count_nonzero())
        problems = [self._problem(self._first_look(b), self._inside(b)) for b in self.blocks]
        problems.append(self._problem(self.taught.part(slice(None), slice(self.n, None)), 0))
        self.solvers = settings.solver.planned(problems, recorded.teacher.weights, constants)

    def state_rows(self, start: Tensor | None) -> RowSolution:
        """Solve for the rows of A and B and put them into the model."""
        model, energies = self.model, self.scale
        start = start if self.R is None else self.start  # rows of other directions are no start for these
        W = energies.new_zeros(self.n, (self.settings.rank or self.n) + self.p)
        objective, bound, support_gap = (torch.zeros_like(energies) for _ in range(3))
        unexplained = torch.zeros_like(energies)
        steps, proved = 0, True
        for i, block in enumerate(self.blocks):
            rows, inside = block.rows, self._inside(block)
            moments = self._first_look(block) if i == 0 else self._second_look(block)
            near = None if start is None else start[rows, block.reads]
            solution, best = self._solved(self.solvers[i], moments, inside, near, rows.start)
            with torch.no_grad():
                self._put_states(block, best[:, :inside])
                model.B[rows] = best[:, inside:].to(model.B)
                if model.bias is not None:
                    model.bias[rows] = (moments.mean_T - best @ moments.mean_S).to(model.bias)
            W[rows, block.reads] = solution.W
            objective[rows], bound[rows] = solution.objective, solution.bound
            steps += solution.steps
            if solution.support_gap is None:
                proved = False
            else:
                support_gap[rows] = solution.support_gap
            if solution.unexplained is not None:
                unexplained[rows] = solution.unexplained
        exact = self.settings.solver.exact
        return RowSolution(W, objective, bound, steps, support_gap if proved else None, unexplained if exact else None)

    def _put_states(self, block: _Block, a: Tensor) -> None:
        """Put the rows of A into the model, or those of L and what they read, just inside the ball as stored."""
        model, keeps_ball = self.model, self.settings.solver.keeps_ball
        if self.R is None:
            a = _within(a, a.abs().sum(1, keepdim=True), self.radius) if keeps_ball else a
            model.A[block.rows, block.reads.start : self.n] = a.to(model.A)
            return
        R = torch.where(a.any(0), self.R, 0)
        a = _within(a, a.abs() @ R.abs().sum(0)[:, None], self.radius) if keeps_ball else a
        model.L[: self.n], model.R[: self.n] = a.to(model.L), R.to(model.R)

    def output_rows(self, start: Tensor | None) -> tuple[RowSolution, Tensor]:
        """Solve for C and D; return the rows' solution and the part of the outputs that the model explains."""
        model, n = self.model, self.n
        equilibrium = self._second_look(None)
        # States that are matched exactly are the teacher's, which the equilibrium's differ from by its tolerance.
        exact, refit = self.settings.solver.exact, self.settings.refit
        own = refit == "layers" if exact else bool(refit)
        moments = equilibrium if own else self.taught.part(slice(None), slice(n, None))
        solution, W = self._solved(self.solvers[-1], moments, 0, start, n)
        D = model.get_parameter("D")
        constant = torch.zeros_like(moments.mean_T)
        with torch.no_grad():
            model.C[:, :n], D[:] = W[:, :n].to(model.C), W[:, n:].to(D)
            if self.recorded.biased:
                constant = moments.mean_T - W @ moments.mean_S
                model.C[:, n] = constant.to(model.C) / model.f.activation(torch.ones(()))
            W = torch.cat((model.C[:, :n], D), 1).double()
        return solution, _explained(equilibrium, W, constant)

    def weights_kept(self) -> WeightsKept:
        """Count the non-zeros, those that carry the biases of the outputs included."""
        model = self.model
        of_states = (model.A,) if model.rank is None else (model.L, model.R)
        A = sum(int(matrix.count_nonzero()) for matrix in of_states)
        B, C, D = (int(matrix.count_nonzero()) for matrix in (model.B, model.C, model.get_parameter("D")))
        return WeightsKept(A, B, C, D, self.recorded.teacher.weights)

    def row_sums(self) -> Tensor:
        r"""Return :math:`\sum_j |A_{ij}|` as stored, of low rank the bound on it by :math:`|L| |R|^T`, in float64."""
        with torch.no_grad():
            if self.model.rank is None:
                return self.model.A.double().abs().sum(1)
            return self.model.L.double().abs() @ self.model.R.double().abs().sum(0)

    def _penalty(self) -> Tensor:
        """Return ``lam`` times the factor of each column."""
        weights = self.settings.column_weights
        if weights is None:
            return self.scale.new_full((self.n + self.p,), self.settings.lam)
        return self.settings.lam * self.scale.new_tensor(weights)

    def _blocks(self) -> list[_Block]:
        """Return all rows as one block, or each layer as one that reads the layers before it."""
        everything = self.n + self.p
        if self.settings.refit != "layers":
            return [_Block(slice(0, self.n), slice(0, everything))]
        blocks, stop = [], self.n
        for layer in self.recorded.teacher.layers:  # the first layer is stored last
            blocks.append(_Block(slice(stop - layer.units, stop), slice(stop, everything)))
            stop -= layer.units
        return blocks

    def _inside(self, block: _Block) -> int:
        """Return how many of the regressors of a block are states or directions of them, and inside the ball."""
        return self.n - int(block.reads.start) if self.R is None else self.R.shape[1]

    def _directions(self, rank: int) -> tuple[Tensor, Tensor | None]:
        """Return ``R``, in numbers that the model stores exactly, and rows of ``[L B]`` to start from."""
        moments = self.taught.part(slice(None), slice(0, self.n))
        moments = moments.centred() if self.recorded.biased else moments
        if self.settings.solver.keeps_ball:
            found = low_rank.search(moments, self.n, rank, self._penalised)
            R, start = found.R, found.W
        else:  # without penalty and ball the best is known
            R, start = low_rank.regression_directions(moments, self.n, rank), None
        return R.to(self.model.B.dtype).double(), start

    def _first_look(self, block: _Block) -> Moments:
        """Return the moments of the teacher's states that the rows of a block are fitted to."""
        moments = self.taught.part(block.reads, block.rows)
        return moments if self.R is None else low_rank.reduced(moments, self.R)

    def _second_look(self, block: _Block | None) -> Moments:
        """Pass over the loader for the moments of the model's own states; ``None`` means the rows of the outputs."""
        n, recorded = self.n, self.recorded
        first = 0 if block is None else int(block.reads.start)

        def pairs() -> Iterable[tuple[Tensor, Tensor]]:
            for u, recording in recordings(recorded.teacher, self.loader):
                regressors = torch.cat((_states(self.model, u)[:, first:n], recording.U), 1)
                if block is None:
                    yield regressors, recording.Y
                else:
                    yield regressors, recording.Z[:, block.rows] * self.scale[block.rows].to(recording.Z)

        moments = accumulate(pairs(), last=self.known)
        check_same_inputs(moments, recorded)
        self.known = moments.gram
        return moments

    def _problem(self, moments: Moments, ball: int) -> RowProblem:
        """Return the problem of least squares with the penalty."""
        raw, moments = moments, moments.centred() if self.recorded.biased else moments
        penalty = self.settings.l1_ratio * self.penalty[-len(moments.mean_S) :]  # rows read the last columns
        # Of rows that are matched nothing is to be taken back when they are stored.
        radius = self.radius * (1 - _ROUNDING) if self.settings.solver.exact else self.radius
        # Directions of a basis that no sample has come out of rounding as 0 from either side.
        measured = {"column_energies": raw.gram.diagonal().clamp_min(0), "target_energies": raw.energies}
        return RowProblem(
            moments.gram,
            moments.cross,
            moments.energies,
            penalty,
            ball,
            radius,
            self.settings.knee,
            **(measured if self.recorded.biased else {}),
        )

    def _penalised(self, moments: Moments, ball: int) -> RowProblem:
        """Return the same with the ridge."""
        problem, ratio = self._problem(moments, ball), self.settings.l1_ratio
        return problem if ratio == 1 else replace(problem, ridge=(1 - ratio) / ratio * problem.penalty)

    def _without_shrinkage(self, moments: Moments, ball: int) -> RowProblem:
        """Return least squares with the ridge of the penalty: what holds large, nearly dependent supports together.

        A reverse Huber penalty with a knee ``k`` is what is convex of a number of weights with a ridge of ``p / k``.
        """
        problem = self._penalised(moments, ball)
        ridge = problem.penalty / self.settings.knee
        ridge = ridge if problem.ridge is None else ridge + problem.ridge
        return replace(problem, gram=problem.gram + ridge.diag(), ridge=None, knee=math.inf)

    def _solved(
        self, solver: AbstractRowSolver, moments: Moments, ball: int, start: Tensor | None, first: int
    ) -> tuple[RowSolution, Tensor]:
        """Return the rows' solution, and their weights after debiasing; ``first`` is the first target's index."""
        settings = self.settings
        try:
            solution = solver.solve(self._penalised(moments, ball), start)
        except NotMatchedError as error:
            raise NotMatchedError(error.row, error.reason, self._name(first + error.row)) from None
        if settings.debias and solver.keeps_ball and solver.shrinks:
            return solution, debias(self._without_shrinkage(moments, ball), solution.W).W
        return solution, solution.W

    def _name(self, target: int) -> str:
        """Return what a person calls the target of this index: a unit of a layer, or an output."""
        start = 0
        for layer in self.recorded.teacher.layers[::-1]:
            if target < start + layer.units:
                return f"state {target}, unit {target - start} of layer {layer.name!r},"
            start += layer.units
        return f"output {target - self.n}"


def _scale(recorded: Recorded, settings: Settings) -> tuple[Tensor, str]:
    """Return the factor of each state, and how it was chosen."""
    A, energies = recorded.matrices.A, recorded.state_moments.energies
    # Rounding of the states changes the weights that match them, where these are nearly not determined.
    kappa = settings.kappa * (1 - _HEADROOM) if settings.solver.exact else settings.kappa
    sizes = [layer.units for layer in recorded.teacher.layers[::-1]]
    subset = len(recorded.teacher.layers) < len(recorded.teacher.all_layers)
    if not settings.rescale or recorded.teacher.activation.name not in rescaling.HOMOGENEOUS:
        return torch.ones_like(energies), "none"
    if subset:  # what lies between the layers kept is not linear: there is no matrix to bring below kappa
        A = torch.zeros(len(energies), len(energies), dtype=A.dtype)
    A = A.to(energies)
    if settings.rescale == "layerwise":
        return rescaling.layerwise(A, sizes, kappa), "layerwise"
    if settings.rescale == "closed_form":
        return rescaling.closed_form(A, kappa), "closed_form"
    return rescaling.unit_variance(A, sizes, energies, kappa), "unit_variance"


def empty_model(recorded: Recorded, settings: Settings) -> ImplicitModel:
    """Return a model of zeros; a bias of the outputs is carried by one unit more, which is constant."""
    activation, n = recorded.teacher.activation, recorded.states
    f: ImplicitFunction
    if settings.refit == "layers":
        f = ImplicitFunctionTriu(activation=activation)
    elif settings.solver.keeps_ball:
        f = ImplicitFunctionInf(kappa=settings.kappa, activation=activation)
    else:
        f = ImplicitFunction(activation=activation)
    with torch.random.fork_rng(devices=[]):  # its initial parameters are not used, nor is what they draw
        outputs = len(recorded.output_moments.energies)
        sizes, rank = (n + int(recorded.biased), recorded.inputs, outputs), settings.rank
        model = ImplicitModel(*sizes, low_rank=rank is not None, rank=rank, f=f, bias=recorded.biased)
    dtype = torch.float64 if recorded.teacher.dtype == torch.float64 else torch.float32
    model.to(device=recorded.moments.gram.device, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        if model.bias is not None:
            model.bias[n:] = 1
    return model


def _states(model: ImplicitModel, u: Tensor) -> Tensor:
    with torch.no_grad():
        A = model.A if model.rank is None else (model.L, model.R)
        x: Tensor = model.f(A, model.B, u.flatten(1).to(model.B), bias=model.bias)
    return x


def _within(A: Tensor, sums: Tensor, kappa: float) -> Tensor:
    """Return ``A`` with rows that rounding to float32 might take over ``kappa`` shrunk by a few units."""
    most = kappa * (1 - _ROUNDING)
    return torch.where(sums > most, A * (most / sums), A)


def _explained(moments: Moments, W: Tensor, constant: Tensor) -> Tensor:
    """Return 1 minus the mean square of ``T - S W^T - constant`` over the variance of each target."""
    offset = moments.mean_T - W @ moments.mean_S - constant
    centred = moments.centred()
    spread = centred.energies - 2 * (W * centred.cross).sum(1) + ((W @ centred.gram) * W).sum(1)
    tiny = torch.finfo(torch.float64).tiny
    return 1 - (spread.clamp_min(0) + offset.square()) / centred.energies.clamp_min(tiny)
