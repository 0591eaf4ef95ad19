"""SIM: a pretrained network's states turn training into a convex problem."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idl import checks
from idl.nn import SparseImplicitModel
from idl.sim.certificate import Certificate
from idl.sim.fitting import Rescaling, Settings, fit_model
from idl.sim.recording import Recorded, record
from idl.sim.solvers.base import AbstractRowSolver
from idl.sim.solvers.cardinality import Cardinality
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
        debias: Whether to fit the weights once more on the support found, without the penalty and inside the ball.
        refit: Whether to fit ``C`` and ``D`` on the equilibrium's own states instead of the teacher's. ``"layers"``
            does so for every layer: they are fitted one after the other, each on what those before it really give, so
            that errors do not add up. ``A`` is then strictly block triangular and its equilibrium a substitution. The
            loader is passed over once more for each layer but the first.
        layers: Names of the activations that become states; all if ``None``.

    Attributes:
        model_: The implicit model, after :meth:`fit`; its zeros stay zero while it is trained further.
        certificate_: Objective and duality gap of each row, feasibility, weights kept.

    Raises:
        TypeError, ValueError: If an argument is out of range.

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
        if not isinstance(refit, bool):
            checks.one_of("refit", refit, ("layers",))
        self.rescale, self.debias, self.refit, self.layers = rescale, debias, refit, layers

    def fit(self, teacher: nn.Module, loader: Iterable[Any], *, target_sparsity: float | None = None) -> "SIM":
        """Fit :attr:`model_` to a teacher on the inputs of a loader, which is passed over twice, or see ``refit``.

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
        if target_sparsity is not None and isinstance(self.solver, Cardinality):
            raise ValueError(
                "`target_sparsity` searches lam, on which the weights that Cardinality keeps do not depend; "
                f"give it Cardinality(keep={1 - target_sparsity:g})."
            )
        recorded = record(teacher, loader, self.layers)
        if target_sparsity is None:
            return self._fit(recorded, loader)
        return self._search(recorded, loader, 1 - checks.in_open_unit("target_sparsity", target_sparsity))

    def _fit(self, recorded: Recorded, loader: Iterable[Any], near: "SIM | None" = None) -> "SIM":
        """Fit to moments that are there; ``near`` is a fit with another ``lam``."""
        settings = Settings(self.solver, self.kappa, self.lam, self.l1_ratio, self.rescale, self.debias, self.refit)
        start = None if near is None else near.certificate_
        self.model_, self.certificate_ = fit_model(recorded, loader, settings, start)
        return self

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

    def _fitted(self) -> SparseImplicitModel:
        if not hasattr(self, "model_"):
            raise ValueError("this SIM has no model yet; call fit(teacher, loader) first.")
        return self.model_


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
