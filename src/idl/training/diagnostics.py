"""What the equilibrium of a model looks like: steps, residuals, and how fast plain iteration reaches it.

Only public outputs of a model are measured here; nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from idl import checks
from idl.nn.implicit_model import ImplicitModel


class EquilibriumReport(NamedTuple):
    """Facts about the equilibria of a batch.

    ``norm`` is the largest row sum of ``|A|``, which bounds the contraction; ``residual_max`` is over the
    samples; ``converged`` is the share of samples that reached the model's tolerance, in [0, 1].

    Attributes:
        steps_median: Of the samples.
        steps_max: Of the samples.
        residual_max: Largest ``|f(x) - x|``.
        converged: Share of samples that reached the model's tolerance, in [0, 1].
        norm: Largest row sum of ``|A|``, which bounds the contraction.

    Example:
        See :func:`report_equilibrium`.
    """

    steps_median: float
    steps_max: int
    residual_max: float
    converged: float
    norm: float


def report_equilibrium(model: ImplicitModel, inputs: Float[Tensor, "batch p"]) -> EquilibriumReport:
    """Solve the equilibrium of each input, without gradients, and say how that went.

    Args:
        model: An implicit model.
        inputs: At least one input, on the device of ``model``.

    Returns:
        The report.

    Raises:
        TypeError, ValueError: If ``model`` is no implicit model, or the inputs do not fit it or are none.

    Example:
        >>> from idl import ImplicitModel
        >>> report_equilibrium(ImplicitModel(10, 4, 2), torch.rand(5, 4)).converged
        1.0
    """
    checks.instance("model", model, ImplicitModel, "Other models have no single equilibrium to report.")
    with torch.no_grad():
        _, solution = model(inputs, return_solution=True)
        if solution.steps.numel() == 0:
            raise ValueError(f"`inputs` must have at least one input; got shape {tuple(inputs.shape)}.")
        norm = model.state_matrix().abs().sum(1).max().item()
    return EquilibriumReport(
        steps_median=solution.steps.double().median().item(),
        steps_max=int(solution.steps.max()),
        residual_max=solution.residual.max().item(),
        converged=solution.converged.double().mean().item(),
        norm=norm,
    )


def picard_residuals(
    f: Callable[[Tensor], Tensor], x0: Float[Tensor, "batch n"], *, tol: float, max_steps: int
) -> Float[Tensor, "steps batch"]:
    r"""Iterate :math:`x \leftarrow f(x)` and return each residual :math:`\|f(x) - x\|_\infty`.

    Args:
        f: Map whose fixed point is iterated to.
        x0: Start, one sample per row.
        tol: The iteration ends when every residual is at most this.
        max_steps: The iteration ends after this many steps in any case; at least 1.

    Returns:
        One row per step, the first for ``x0``.

    Raises:
        TypeError, ValueError: If ``x0``, ``tol`` or ``max_steps`` is out of range.

    Example:
        >>> picard_residuals(lambda x: x / 2, torch.ones(1, 1), tol=0.2, max_steps=10)[:, 0]
        tensor([0.5000, 0.2500, 0.1250])
    """
    checks.positive_integer("max_steps", max_steps)
    checks.non_negative("tol", tol)
    if checks.floating_tensor("x0", x0).dim() != 2 or x0.numel() == 0:
        raise ValueError(f"`x0` must have shape (batch, n) with at least one sample; got {tuple(x0.shape)}.")
    residuals = []
    x = x0
    with torch.no_grad():
        for _ in range(max_steps):
            following = f(x)
            residuals.append((following - x).abs().amax(1))
            x = following
            if residuals[-1].max() <= tol:
                break
    return torch.stack(residuals)
