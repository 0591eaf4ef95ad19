"""SIM: a pretrained network's states turn training into a convex problem."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idl import checks
from idl.nn import SparseImplicitModel
from idl.sim.certificate import Certificate
from idl.sim.fitting import Rescaling, Settings, fit_model
from idl.sim.recording import Recorded, check_loader, inputs_of, record
from idl.sim.solvers.base import AbstractRowSolver
from idl.sim.solvers.cardinality import Cardinality
from idl.sim.solvers.exact import ExactMatching
from idl.sim.solvers.hybrid import Hybrid

_TRIALS, _CLOSE, _SAME = 20, 0.9, 1.05  # of a search for lam: most fits, when it is close, when two lam are one


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
        debias: Whether to fit the weights once more on the support found, inside the ball and without the l1 penalty;
            the ridge that ``l1_ratio`` or ``knee`` asks for stays.
        refit: Whether to fit ``C`` and ``D`` on the equilibrium's own states instead of the teacher's. ``"layers"``
            does so for every layer: they are fitted one after the other, each on what those before it really give, so
            that errors do not add up. ``A`` is then strictly block triangular and its equilibrium a substitution. The
            loader is passed over once more for each layer but the first.
        exact: Whether to reproduce the teacher instead, and spend as little penalty as that takes:

            .. math:: \min_{a, b} |a|_1 + |b|_1 \quad \text{s.t.} \quad z = Xa + Ub, \quad |a|_1 \le \kappa

            or with the penalty that is chosen; ``lam`` does not change it. Many solutions exist, and sparse ones, where
            there are fewer samples than states and inputs or these depend on each other; elsewhere the one solution is
            the teacher. Nothing is left to ``debias`` or, but for ``"layers"``, to ``refit``. Needs the extra ``cvx``.
        column_weights: Factors of the penalty, one for each column of ``[X U]``: the states, those of the last layer
            first, then the inputs. 0 leaves a weight unpenalised. ``None`` means 1 for all.
        knee: Size of a weight from which on its penalty is quadratic, :math:`(w^2 + k^2) / (2k)`: the reverse Huber
            penalty, which shrinks large weights less evenly and is the convex relaxation of a number of weights.
        layers: Names of the activations that become states; all if ``None``.
        rank: Number of columns of ``L`` and ``R`` in :math:`A = LR^T`, from 1 to the number of states; ``None`` for a
            full ``A``. The bound is then on the row sums of :math:`|L| |R|^T`. Given ``R`` the rows of ``[L B]`` are
            convex, penalised and certified as ever; ``R`` is a local optimum of the same penalised objective, whatever
            the solver, and not certified. It is found from the second moments by alternation, ``O(d^3)`` once and at
            most 40 times the rows of ``rank`` and the inputs' columns; with ``solver=LeastSquares()`` the whole is
            reduced-rank regression, and ``R`` the best. ``column_weights`` must then be the same for all states.

    Attributes:
        model_: The implicit model, after :meth:`fit`; its zeros stay zero while it is trained further.
        certificate_: Objective and duality gap of each row, feasibility, weights kept.

    Raises:
        TypeError, ValueError: If an argument is out of range, ``exact`` meets another solver than
            :class:`~idl.sim.solvers.ExactMatching`, or ``rank`` meets ``exact`` or ``refit="layers"``.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> sim = SIM(lam=1e-4).fit(teacher, [torch.randn(200, 8)])
        >>> sim.certificate_.feasible
        True
    """

    model_: SparseImplicitModel
    certificate_: Certificate

    def __init__(
        self,
        solver: AbstractRowSolver | None = None,
        kappa: float = 0.99,
        lam: float = 1e-3,
        l1_ratio: float = 1.0,
        rescale: bool | Rescaling = True,
        debias: bool = True,
        refit: bool | Literal["layers"] = True,
        exact: bool = False,
        *,
        column_weights: Sequence[float] | Tensor | None = None,
        knee: float = math.inf,
        layers: Sequence[str] | None = None,
        rank: int | None = None,
    ) -> None:
        if solver is None:
            solver = ExactMatching() if checks.boolean("exact", exact) else Hybrid()
        self.solver = checks.instance("solver", solver, AbstractRowSolver, "Try idl.sim.solvers.Hybrid().")
        if exact and not self.solver.exact:
            raise ValueError(
                f"`exact` needs a solver that matches exactly; got {solver!r}. Leave `solver` out, or try "
                "idl.sim.solvers.ExactMatching()."
            )
        self.exact = self.solver.exact
        self.kappa = checks.in_open_unit("kappa", kappa)
        self.lam = checks.positive("lam", lam)
        self.l1_ratio = checks.in_half_open_unit("l1_ratio", l1_ratio)
        _one_of_or_a_boolean("rescale", rescale, "unit_variance", "layerwise", "closed_form")
        _one_of_or_a_boolean("refit", refit, "layers")
        if layers is not None and (isinstance(layers, str) or not isinstance(layers, Sequence)):
            raise TypeError(f"`layers` must be None or a list of names; got {layers!r}.")
        self.rescale, self.debias, self.refit, self.layers = rescale, checks.boolean("debias", debias), refit, layers
        self.column_weights = None if column_weights is None else _checked_weights(column_weights)
        self.knee = knee if knee == math.inf else checks.positive("knee", knee)
        self.rank = None if rank is None else checks.positive_integer("rank", rank)
        if rank is not None and refit == "layers":
            raise ValueError(
                f"`rank` must be None with refit='layers', whose triangular A has no low-rank form; got {rank}. Try "
                "refit=True."
            )
        if rank is not None and self.exact:
            raise ValueError(
                f"`rank` must be None where the teacher is matched exactly, for which few directions are not enough; "
                f"got {rank}. Try exact=False."
            )

    def fit(self, teacher: nn.Module, loader: Iterable[Any], *, target_sparsity: float | None = None) -> "SIM":
        """Fit :attr:`model_` to a teacher on the inputs of a loader, which is passed over twice, or see ``refit``.

        Args:
            teacher: A feed-forward network: one kind of activation, and between activations what is affine. It is left
                as it was.
            loader: Yields batches of inputs, or of pairs ``(inputs, labels)``; labels are not used.
            target_sparsity: Part of the teacher's number of weights that must not be kept, in (0, 1). A ``lam`` that
                leaves no more than the rest, and at least nine tenths of it where there is one, is searched from the
                present one on, and stays in :attr:`lam`; each trial is a fit, warm-started from the one before.

        Returns:
            ``self``.

        Raises:
            CaptureError: If an operation of the teacher has no place in an implicit model.
            TypeError: If the teacher is no module, or the loader does not yield batches of floating tensors.
            ValueError: If the loader is empty, changes shapes, or yields what the teacher fails on; if a state is not
                finite; if ``target_sparsity``, ``column_weights`` or ``rank`` is out of range; if a state or an output
                cannot be matched although :attr:`exact` asks for it.
            ImportError: If ``exact`` misses the extra ``cvx``.
        """
        if target_sparsity is not None:
            advice = "It is a part: 0.8 leaves a fifth of the weights."
            target_sparsity = checks.in_open_unit("target_sparsity", target_sparsity, advice)
        if target_sparsity is not None and isinstance(self.solver, Cardinality):
            raise ValueError(
                "`target_sparsity` searches lam, on which the weights that Cardinality keeps do not depend; "
                f"give it Cardinality(keep={1 - target_sparsity:g})."
            )
        if target_sparsity is not None and self.exact:
            raise ValueError(
                "`target_sparsity` searches lam, on which weights that match exactly do not depend; "
                "leave it out, or try exact=False."
            )
        if target_sparsity is not None and not self.solver.shrinks:
            raise ValueError(
                f"`target_sparsity` searches lam, on which the weights of {self.solver!r} do not depend; leave it "
                "out, or use another solver."
            )
        with torch.inference_mode(False):  # the model is to be trained further, wherever it was fitted
            recorded = record(teacher, loader, self.layers, self.settings.check_sizes)
            if target_sparsity is None:
                return self.fit_recorded(recorded, loader)
            return self._search(recorded, loader, 1 - target_sparsity)

    def fit_recorded(self, recorded: Recorded, loader: Iterable[Any], near: "SIM | None" = None) -> "SIM":
        """Fit to what was recorded before, as :func:`~idl.sim.lambda_path` does for each ``lam``.

        Args:
            recorded: The teacher's moments.
            loader: See :meth:`fit`.
            near: A fit with another ``lam``, from which the rows start.

        Raises:
            TypeError: If ``recorded`` or ``near`` is something else.
            ValueError: As :meth:`fit` does, or if ``near`` was not fitted, or to a teacher of other sizes.
        """
        checks.instance("recorded", recorded, Recorded, "Try idl.sim.recording.record(teacher, loader).")
        check_loader(loader)
        start = None if near is None else _start(near, recorded, self.rank)
        self.model_, self.certificate_ = fit_model(recorded, loader, self.settings, start)
        return self

    @property
    def settings(self) -> Settings:
        """All that decides the numbers of a fit, beside teacher, inputs and :attr:`layers`."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    def _search(self, recorded: Recorded, loader: Iterable[Any], most: float) -> "SIM":
        """Fit with the smallest ``lam`` that keeps at most this part of the teacher's weights, nearly."""
        enough: SIM | None = None
        low, high = 0.0, math.inf  # lam that keeps too many, and lam that keeps few enough
        near, lam = None, self.lam
        for _ in range(_TRIALS):
            near = self._with(lam).fit_recorded(recorded, loader, near)
            kept = near.certificate_.weights_kept.fraction
            if kept <= most:
                enough, high = near, lam
            else:
                low = lam
                if not bool(near.certificate_.states.W.any() or near.certificate_.outputs.W.any()):
                    kept_anyway = near.certificate_.weights_kept.total
                    raise ValueError(
                        f"`target_sparsity` of {1 - most:g} cannot be reached: {kept_anyway} weights of C carry the "
                        "constants of the outputs, and stay."
                    )
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
        """Return a SIM with these settings and another ``lam``."""
        other = copy.copy(self)
        other.lam = lam
        return other

    def predict(self, u: Tensor) -> Float[Tensor, "*batch q"]:
        """Return the outputs of :attr:`model_` for inputs ``u``, ``(..., p)`` or samples of any shape; no gradient.

        Raises:
            TypeError: If ``u`` is no floating tensor.
            ValueError: If there is no model yet, or ``u`` does not fit it.
        """
        model = self._fitted()
        with torch.no_grad():
            u = checks.floating_tensor("u", u).to(model.B)
            batch = u.dim() > 1 and u.shape[1:].numel() == model.input_dim  # of samples of any shape, as in a loader
            prediction: Tensor = model(u.flatten(1) if batch else u)
        return prediction

    def score(self, loader: Iterable[Any]) -> float:
        """Return the part of the labels that :attr:`model_` predicts.

        Args:
            loader: Yields pairs of inputs and integer labels.

        Raises:
            TypeError: If the loader yields no pairs, or inputs that are no floating tensors.
            ValueError: If there is no model yet, the inputs do not fit it, there is not one label a sample, or no
                sample at all.
        """
        right, total, inputs = 0, 0, self._fitted().input_dim
        check_loader(loader)
        for batch in loader:
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                got = "inputs alone" if isinstance(batch, (tuple, list, Tensor)) else f"a {type(batch).__name__}"
                raise TypeError(f"`loader` must yield pairs (inputs, labels) to be scored; got {got}.")
            u = inputs_of(batch)
            if u.shape[1:].numel() != inputs:
                raise ValueError(
                    f"`loader` must yield batches of inputs with {inputs} numbers a sample, as the model was fitted "
                    f"to; got shape {tuple(u.shape)}."
                )
            guess = self.predict(u).argmax(1)
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

    def _fitted(self) -> SparseImplicitModel:
        if not hasattr(self, "model_"):
            raise ValueError("this SIM has no model yet; call fit(teacher, loader) first.")
        return self.model_


def _one_of_or_a_boolean(name: str, value: object, *choices: str) -> None:
    if not isinstance(value, bool) and value not in choices:
        named = ", ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be True, False or one of {named}; got {value!r}.")


def _start(near: SIM, recorded: Recorded, rank: int | None) -> Certificate:
    """Return what rows can start from, if it is of the same sizes."""
    checks.instance("near", near, SIM, "Try the SIM of another lam.")
    if not hasattr(near, "certificate_"):
        raise ValueError("`near` must be fitted; call its fit(teacher, loader) first, or leave it out.")
    certificate, sizes = near.certificate_, recorded.output_moments.cross.shape
    if certificate.outputs.W.shape != sizes or certificate.rank != rank:
        raise ValueError(
            f"`near` must be fitted to the same layers of the teacher with rank={rank}; got "
            f"{tuple(certificate.outputs.W.shape)} instead of {tuple(sizes)} weights of the outputs, and "
            f"rank={certificate.rank}. Leave it out."
        )
    return certificate


def _checked_weights(column_weights: Sequence[float] | Tensor) -> tuple[float, ...]:
    if not isinstance(column_weights, (Sequence, Tensor)):
        raise TypeError(f"`column_weights` must be one factor for each column; got {column_weights!r}.")
    weights = column_weights.tolist() if isinstance(column_weights, Tensor) else list(column_weights)
    return tuple(checks.non_negative("column_weights", weight) for weight in weights)
