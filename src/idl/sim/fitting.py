"""From what a teacher showed to an implicit model: its rows, block after block, then those of its outputs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from idl.functions import ImplicitFunction, ImplicitFunctionInf, ImplicitFunctionTriu
from idl.nn import ImplicitModel, SparseImplicitModel
from idl.sim import rescaling
from idl.sim.certificate import Certificate, WeightsKept
from idl.sim.moments import Moments, accumulate
from idl.sim.problem import RowProblem
from idl.sim.recording import Recorded, check_same_inputs, recordings
from idl.sim.solvers.base import AbstractRowSolver, RowSolution
from idl.sim.solvers.debias import debias

Rescaling = Literal["unit_variance", "layerwise", "closed_form"]
_ROUNDING = 1e-6  # by which stored row sums stay below kappa, so that float32 sums do too


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
        model.A.detach().double().abs().sum(1),
        settings.kappa,
        fitting.weights_kept(),
        explained,
        fitting.rescaling,
        recorded.moments.samples,
    )
    return SparseImplicitModel(model), certificate


class _Fitting:
    """A model that is being filled with rows."""

    def __init__(self, recorded: Recorded, loader: Iterable[Any], settings: Settings) -> None:
        self.recorded, self.loader, self.settings = recorded, loader, settings
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
        problems = [self._problem(self.taught.part(b.reads, b.rows), self._inside(b)) for b in self.blocks]
        problems.append(self._problem(self.taught.part(slice(None), slice(self.n, None)), 0))
        constants = outputs if recorded.biased else 0
        self.solvers = settings.solver.planned(problems, recorded.teacher.weights, constants)

    def state_rows(self, start: Tensor | None) -> RowSolution:
        """Solve for the rows of A and B and put them into the model."""
        model, energies = self.model, self.scale
        W = energies.new_zeros(self.n, self.n + self.p)
        objective, bound, support_gap = (torch.zeros_like(energies) for _ in range(3))
        steps, proved = 0, True
        for i, block in enumerate(self.blocks):
            rows, inside = block.rows, self._inside(block)
            moments = self.taught.part(block.reads, rows) if i == 0 else self._second_look(block)
            near = None if start is None else start[rows, block.reads]
            solution, best = self._solved(self.solvers[i], moments, inside, near)
            with torch.no_grad():
                a = _within(best[:, :inside], self.radius) if self.settings.solver.keeps_ball else best[:, :inside]
                model.A[rows, block.reads.start : self.n], model.B[rows] = a.to(model.A), best[:, inside:].to(model.B)
                if model.bias is not None:
                    model.bias[rows] = (moments.mean_T - best @ moments.mean_S).to(model.bias)
            W[rows, block.reads] = solution.W
            objective[rows], bound[rows] = solution.objective, solution.bound
            steps += solution.steps
            if solution.support_gap is None:
                proved = False
            else:
                support_gap[rows] = solution.support_gap
        return RowSolution(W, objective, bound, steps, support_gap if proved else None)

    def output_rows(self, start: Tensor | None) -> tuple[RowSolution, Tensor]:
        """Solve for C and D; return the rows' solution and the part of the outputs that the model explains."""
        model, n = self.model, self.n
        equilibrium = self._second_look(None)
        moments = equilibrium if self.settings.refit else self.taught.part(slice(None), slice(n, None))
        solution, W = self._solved(self.solvers[-1], moments, 0, start)
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
        matrices = (model.A, model.B, model.C, model.get_parameter("D"))
        A, B, C, D = (int(matrix.count_nonzero()) for matrix in matrices)
        return WeightsKept(A, B, C, D, self.recorded.teacher.weights)

    def _penalty(self) -> Tensor:
        """Return ``lam`` times the factor of each column."""
        columns, weights = self.n + self.p, self.settings.column_weights
        if weights is None:
            return self.scale.new_full((columns,), self.settings.lam)
        if len(weights) != columns:
            raise ValueError(
                f"`column_weights` must have one factor for each of {self.n} states and {self.p} inputs, {columns} in "
                f"all; got {len(weights)}."
            )
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
        """Return how many of the columns that a block reads are states, and inside the ball."""
        return self.n - int(block.reads.start)

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
        moments = moments.centred() if self.recorded.biased else moments
        penalty = self.settings.l1_ratio * self.penalty[-len(moments.mean_S) :]  # rows read the last columns
        return RowProblem(moments.gram, moments.cross, moments.energies, penalty, ball, self.radius, self.settings.knee)

    def _solved(
        self, solver: AbstractRowSolver, moments: Moments, ball: int, start: Tensor | None
    ) -> tuple[RowSolution, Tensor]:
        """Return the rows' solution, and their weights after debiasing."""
        settings, least_squares = self.settings, self._problem(moments, ball)
        problem = least_squares
        if settings.l1_ratio < 1:
            ridge = (1 - settings.l1_ratio) / settings.l1_ratio * problem.penalty
            problem = replace(problem, gram=problem.gram + ridge.diag())
        solution = solver.solve(problem, start)
        if settings.debias and solver.keeps_ball and (solver.shrinks or settings.l1_ratio < 1):
            return solution, debias(least_squares, solution.W).W
        return solution, solution.W


def _scale(recorded: Recorded, settings: Settings) -> tuple[Tensor, str]:
    """Return the factor of each state, and how it was chosen."""
    A, energies = recorded.matrices.A, recorded.state_moments.energies
    sizes = [layer.units for layer in recorded.teacher.layers[::-1]]
    subset = len(recorded.teacher.layers) < len(recorded.teacher.all_layers)
    if not settings.rescale or recorded.teacher.activation.name not in rescaling.HOMOGENEOUS:
        return torch.ones_like(energies), "none"
    if subset:  # what lies between the layers kept is not linear: there is no matrix to bring below kappa
        A = torch.zeros(len(energies), len(energies), dtype=A.dtype)
    A = A.to(energies)
    if settings.rescale == "layerwise":
        return rescaling.layerwise(A, sizes, settings.kappa), "layerwise"
    if settings.rescale == "closed_form":
        return rescaling.closed_form(A, settings.kappa), "closed_form"
    return rescaling.unit_variance(A, sizes, energies, settings.kappa), "unit_variance"


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
        model = ImplicitModel(n + int(recorded.biased), recorded.inputs, outputs, f=f, bias=recorded.biased)
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
        x: Tensor = model.f(model.A, model.B, u.flatten(1).to(model.A), bias=model.bias)
    return x


def _within(A: Tensor, kappa: float) -> Tensor:
    """Return ``A`` with rows that rounding to float32 might take over ``kappa`` shrunk by a few units."""
    sums, most = A.abs().sum(1, keepdim=True), kappa * (1 - _ROUNDING)
    return torch.where(sums > most, A * (most / sums), A)


def _explained(moments: Moments, W: Tensor, constant: Tensor) -> Tensor:
    """Return 1 minus the mean square of ``T - S W^T - constant`` over the variance of each target."""
    offset = moments.mean_T - W @ moments.mean_S - constant
    centred = moments.centred()
    spread = centred.energies - 2 * (W * centred.cross).sum(1) + ((W @ centred.gram) * W).sum(1)
    tiny = torch.finfo(torch.float64).tiny
    return 1 - (spread.clamp_min(0) + offset.square()) / centred.energies.clamp_min(tiny)
