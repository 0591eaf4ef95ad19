"""SIM: a pretrained network's states turn training into a convex problem."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idl import checks
from idl.functions import ImplicitFunction, ImplicitFunctionInf
from idl.nn import ImplicitModel
from idl.sim import rescaling
from idl.sim.certificate import Certificate, WeightsKept
from idl.sim.debias import debias
from idl.sim.moments import Moments, accumulate
from idl.sim.problem import RowProblem
from idl.sim.recording import Recorded, check_same_inputs, record, recordings
from idl.sim.solvers.base import AbstractRowSolver, RowSolution
from idl.sim.solvers.hybrid import Hybrid

Rescaling = Literal["unit_variance", "layerwise", "closed_form"]
_TRIALS, _CLOSE, _SAME = 20, 0.9, 1.05  # of a search for lam: most fits, when it is close, when two lam are one
_ROUNDING = 1e-6  # by which stored row sums stay below kappa, so that float32 sums do too


class SIM:
    r"""Turn a pretrained feed-forward network into a sparse, well-posed implicit model, by convex optimisation.

    State-driven implicit modelling (Tsai et al., arXiv 2209.09389). The teacher's pre-activations ``Z``, activations
    ``X``, inputs ``U`` and outputs ``Y`` on training inputs are recorded, and each row of the model is fitted alone:

    .. math::
        \min_{a, b} \tfrac{1}{2m} |z - Xa - Ub|^2 + \lambda (|a|_1 + |b|_1) \quad \text{s.t.} \quad |a|_1 \le \kappa

    with samples as rows, and the rows of ``C, D`` likewise without the ball. No label and no backpropagation is used.

    Args:
        solver: Method of the rows.
        kappa: Bound on the row sums of ``|A|``, in (0, 1).
        lam: Weight of the penalty, above 0; its meaning does not change with the number of samples.
        l1_ratio: Part of the penalty that is :math:`|w|_1`, in (0, 1]; the rest is :math:`|w|_2^2 / 2`.
        rescale: How the states' units are changed first, which no prediction sees: ``True`` means
            ``"unit_variance"``. Only for ReLU and leaky ReLU; other teachers keep theirs.
        debias: Whether to fit the weights once more on the support found, without the penalty and inside the ball.
        refit: Whether to fit ``C`` and ``D`` on the equilibrium's own states instead of the teacher's.
        layers: Names of the activations that become states; all if ``None``.

    Attributes:
        model_: The implicit model, after :meth:`fit`.
        certificate_: Objective and duality gap of each row, feasibility, weights kept.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> sim = SIM(lam=1e-4).fit(teacher, [torch.randn(200, 8)])
        >>> sim.certificate_.feasible
        True
    """

    model_: ImplicitModel
    certificate_: Certificate

    def __init__(
        self,
        solver: AbstractRowSolver | None = None,
        kappa: float = 0.99,
        lam: float = 1e-3,
        l1_ratio: float = 1.0,
        rescale: bool | Rescaling = True,
        debias: bool = True,
        refit: bool = True,
        *,
        layers: Sequence[str] | None = None,
    ) -> None:
        solver = Hybrid() if solver is None else solver
        self.solver = checks.instance("solver", solver, AbstractRowSolver, "Try idl.sim.solvers.Hybrid().")
        self.kappa = checks.in_open_unit("kappa", kappa)
        self.lam = checks.positive("lam", lam)
        self.l1_ratio = checks.in_half_open_unit("l1_ratio", l1_ratio)
        if not isinstance(rescale, bool):
            checks.one_of("rescale", rescale, ("unit_variance", "layerwise", "closed_form"))
        self.rescale, self.debias, self.refit, self.layers = rescale, debias, refit, layers

    def fit(self, teacher: nn.Module, loader: Iterable[Any], *, target_sparsity: float | None = None) -> "SIM":
        """Fit :attr:`model_` to a teacher on the inputs of a loader, which is passed over twice.

        Args:
            teacher: A feed-forward network: one kind of activation, and between activations what is affine. It is left
                as it was.
            loader: Yields batches of inputs, or of pairs ``(inputs, labels)``; labels are not used.
            target_sparsity: Part of the teacher's number of weights that must not be kept, in (0, 1). The smallest
                ``lam`` that leaves so few is searched, starting from the present one, and stays in :attr:`lam`; each
                trial is a fit, warm-started from the one before.

        Returns:
            ``self``.

        Raises:
            CaptureError: If an operation of the teacher has no place in an implicit model.
            ValueError: If the loader is empty, changes shapes, or a state is not finite.
        """
        recorded = record(teacher, loader, self.layers)
        if target_sparsity is None:
            return self._fit(recorded, loader)
        return self._search(recorded, loader, 1 - checks.in_open_unit("target_sparsity", target_sparsity))

    def _fit(self, recorded: Recorded, loader: Iterable[Any], near: "SIM | None" = None) -> "SIM":
        """Fit to moments that are there; ``near`` is a fit with another ``lam``."""
        start = None if near is None else near.certificate_
        states = self._state_rows(recorded, None if start is None else start.states.W)
        outputs, explained = self._output_rows(recorded, states, loader, None if start is None else start.outputs.W)
        self.certificate_ = Certificate(
            states.solution,
            outputs,
            self.solver.tol,
            states.model.A.detach().double().abs().sum(1),
            self.kappa,
            _kept(states.model, recorded.teacher.weights),
            explained,
            states.rescaling,
            recorded.moments.samples,
        )
        self.model_ = states.model  # last, so that a fit that fails leaves none
        return self

    def _radius(self, recorded: Recorded) -> float:
        """Return the bound on row sums: ``kappa``, or less for an activation whose slope exceeds 1."""
        return self.kappa / max(1.0, recorded.teacher.activation.lipschitz or 1.0)

    def _search(self, recorded: Recorded, loader: Iterable[Any], most: float) -> "SIM":
        """Fit with the smallest ``lam`` that keeps at most this part of the teacher's weights, nearly."""
        enough: SIM | None = None
        low, high = 0.0, math.inf  # lam that keeps too many, and lam that keeps few enough
        near, lam = None, self.lam
        for _ in range(_TRIALS):
            near = self._with(lam)._fit(recorded, loader, near)
            kept = near.certificate_.weights_kept.fraction
            if kept <= most:
                enough, high = near, lam
            else:
                low = lam
            if enough is not None and (_CLOSE * most <= kept <= most or high < _SAME * low):
                break
            # Weights kept fall about like the root of lam; never further than ten times at once.
            guess = lam * min(max((kept / (0.97 * most)) ** 2, 0.1), 10)
            inside = low < guess < high
            lam = guess if inside else math.sqrt(low * high) if low and high < math.inf else (low or high) * 3
        if enough is None:
            raise ValueError(
                f"`target_sparsity` of {1 - most:g} was not reached within {_TRIALS} trials up to lam={lam:.3g}; "
                "start from a larger lam."
            )
        self.__dict__.update(enough.__dict__)
        return self

    def _with(self, lam: float) -> "SIM":
        """Return an unfitted SIM with these settings and another ``lam``."""
        settings = (self.kappa, lam, self.l1_ratio, self.rescale, self.debias, self.refit)
        return SIM(self.solver, *settings, layers=self.layers)

    def predict(self, u: Tensor) -> Float[Tensor, "*batch q"]:
        """Return the outputs of :attr:`model_` for inputs, without a gradient."""
        model = self._fitted()
        with torch.no_grad():
            flat = checks.floating_tensor("u", u).to(model.A)
            prediction: Tensor = model(flat.flatten(1) if flat.dim() > 1 else flat)
        return prediction

    def score(self, loader: Iterable[Any]) -> float:
        """Return the part of the labels that :attr:`model_` predicts.

        Args:
            loader: Yields pairs of inputs and integer labels.
        """
        right = total = 0
        for batch in loader:
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                raise TypeError("`loader` must yield pairs (inputs, labels) to be scored; got inputs alone.")
            guess = self.predict(batch[0]).argmax(1)
            labels = torch.as_tensor(batch[1]).to(guess.device)
            if labels.shape != guess.shape:
                raise ValueError(
                    f"`loader` must yield one integer label a sample, {tuple(guess.shape)}; got {tuple(labels.shape)}."
                )
            right += int((guess == labels).sum())
            total += len(guess)
        if not total:
            raise ValueError("`loader` must yield at least one sample; got none.")
        return right / total

    def _fitted(self) -> ImplicitModel:
        if not hasattr(self, "model_"):
            raise ValueError("this SIM has no model yet; call fit(teacher, loader) first.")
        return self.model_

    def _state_rows(self, recorded: Recorded, start: Tensor | None) -> "_States":
        """Solve for A and B and put them into a model whose C and D are still missing."""
        scale, name = self._scale(recorded)
        n = len(scale)
        moments = recorded.state_moments.scaled(torch.cat((scale, scale.new_ones(recorded.inputs))), scale)
        centred = moments.centred() if recorded.biased else moments
        radius = self._radius(recorded)
        solution, W = self._solved(centred, n, radius, start)
        model = self._empty_model(recorded, n)
        with torch.no_grad():
            stored = _inside(W[:, :n], radius) if self.solver.keeps_ball else W[:, :n]
            model.A[:n, :n], model.B[:n] = stored.to(model.A), W[:, n:].to(model.B)
            if model.bias is not None:
                model.bias[:n] = (moments.mean_T - W @ moments.mean_S).to(model.bias)
                model.bias[n:] = 1  # the unit that carries the bias of the outputs
        return _States(model, solution, name, scale)

    def _output_rows(
        self, recorded: Recorded, states: "_States", loader: Iterable[Any], start: Tensor | None
    ) -> tuple[RowSolution, Tensor]:
        """Solve for C and D; return the rows' solution and the part of the outputs that the model explains."""
        model, teacher, scale = states.model, recorded.teacher, states.scale
        n = model.hidden_dim - (1 if recorded.biased else 0)
        pairs = (
            (torch.cat((_states(model, u)[:, :n], recording.U), 1), recording.Y)
            for u, recording in recordings(teacher, loader)
        )
        equilibrium = accumulate(pairs, last=recorded.moments.gram[recorded.states :, recorded.states :])
        check_same_inputs(equilibrium, recorded)
        moments = equilibrium
        if not self.refit:
            outputs = recorded.output_moments
            columns = torch.cat((scale, scale.new_ones(recorded.inputs)))
            moments = outputs.scaled(columns, torch.ones_like(outputs.energies))
        centred = moments.centred() if recorded.biased else moments
        solution, W = self._solved(centred, 0, self.kappa, start)
        D = model.get_parameter("D")
        with torch.no_grad():
            model.C[:, :n], D[:] = W[:, :n].to(model.C), W[:, n:].to(D)
            if recorded.biased:
                constant = model.f.activation(torch.ones(()))
                model.C[:, n] = (moments.mean_T - W @ moments.mean_S).to(model.C) / constant
            W = torch.cat((model.C[:, :n], D), 1).double()
        test = equilibrium.centred()
        unexplained = test.energies - 2 * (W * test.cross).sum(1) + ((W @ test.gram) * W).sum(1)
        tiny = torch.finfo(torch.float64).tiny
        return solution, 1 - unexplained.clamp_min(0) / test.energies.clamp_min(tiny)

    def _solved(self, moments: Moments, ball: int, radius: float, start: Tensor | None) -> tuple[RowSolution, Tensor]:
        """Return the rows' solution, and their weights after debiasing."""
        penalty = torch.full_like(moments.mean_S, self.lam * self.l1_ratio)
        least_squares = RowProblem(moments.gram, moments.cross, moments.energies, penalty, ball, radius)
        ridge = self.lam * (1 - self.l1_ratio) * torch.eye(len(penalty), dtype=penalty.dtype, device=penalty.device)
        problem = replace(least_squares, gram=moments.gram + ridge) if self.l1_ratio < 1 else least_squares
        solution = self.solver.solve(problem, start)
        if self.debias and self.solver.keeps_ball:
            return solution, debias(least_squares, solution.W)
        return solution, solution.W

    def _scale(self, recorded: Recorded) -> tuple[Tensor, str]:
        """Return the factor of each state, and how it was chosen."""
        A, energies = recorded.matrices.A, recorded.state_moments.energies
        sizes = [layer.units for layer in recorded.teacher.layers[::-1]]
        subset = len(recorded.teacher.layers) < len(recorded.teacher.all_layers)
        if not self.rescale or recorded.teacher.activation.name not in rescaling.HOMOGENEOUS:
            return torch.ones_like(energies), "none"
        if subset:  # what lies between the layers kept is not linear: there is no matrix to bring below kappa
            A = torch.zeros(len(energies), len(energies), dtype=A.dtype)
        A = A.to(energies)
        if self.rescale == "layerwise":
            return rescaling.layerwise(A, sizes, self.kappa), "layerwise"
        if self.rescale == "closed_form":
            return rescaling.closed_form(A, self.kappa), "closed_form"
        return rescaling.unit_variance(A, sizes, energies, self.kappa), "unit_variance"

    def _empty_model(self, recorded: Recorded, n: int) -> ImplicitModel:
        inside = ImplicitFunctionInf(kappa=self.kappa, activation=recorded.teacher.activation)
        free = ImplicitFunction(activation=recorded.teacher.activation)
        with torch.random.fork_rng(devices=[]):  # its initial parameters are not used, nor is what they draw
            model = ImplicitModel(
                n + (1 if recorded.biased else 0),
                recorded.inputs,
                len(recorded.output_moments.energies),
                f=inside if self.solver.keeps_ball else free,
                bias=recorded.biased,
            )
        dtype = torch.float64 if recorded.teacher.dtype == torch.float64 else torch.float32
        model.to(device=recorded.moments.gram.device, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model


def lambda_path(teacher: nn.Module, loader: Iterable[Any], lams: Iterable[float], **settings: Any) -> Iterator[SIM]:
    """Yield a fitted :class:`SIM` for each ``lam``, the largest first, each started from the one before.

    The teacher is run once for all of them, and the loader passed over once more for each.

    Args:
        teacher: See :meth:`SIM.fit`.
        loader: See :meth:`SIM.fit`.
        lams: Weights of the penalty, in any order.
        **settings: The other arguments of :class:`SIM`.

    Raises:
        CaptureError, TypeError, ValueError: As :class:`SIM` and :meth:`SIM.fit` do.
    """
    unfitted = [SIM(lam=lam, **settings) for lam in sorted(lams, reverse=True)]
    if not unfitted:
        return
    recorded, near = record(teacher, loader, settings.get("layers")), None
    for sim in unfitted:
        near = sim._fit(recorded, loader, near)
        yield near


@dataclass(frozen=True)
class _States:
    model: ImplicitModel
    solution: RowSolution
    rescaling: str
    scale: Tensor


def _states(model: ImplicitModel, u: Tensor) -> Tensor:
    with torch.no_grad():
        x: Tensor = model.f(model.A, model.B, u.flatten(1).to(model.A), bias=model.bias)
    return x


def _kept(model: ImplicitModel, teacher: int) -> WeightsKept:
    A, B, C, D = (int(model.get_parameter(name).count_nonzero()) for name in "ABCD")
    return WeightsKept(A, B, C, D, teacher)


def _inside(A: Tensor, kappa: float) -> Tensor:
    """Return ``A`` with rows that rounding to float32 might take over ``kappa`` shrunk by a few units."""
    sums, most = A.abs().sum(1, keepdim=True), kappa * (1 - _ROUNDING)
    return torch.where(sums > most, A * (most / sums), A)
