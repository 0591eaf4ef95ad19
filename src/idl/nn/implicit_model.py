"""ImplicitModel: a layer whose hidden state is an equilibrium."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idl import checks
from idl.activations import Activation
from idl.functions import DEFAULTS, ImplicitFunction, ImplicitFunctionInf, StateParameters
from idl.linalg.sparse import linear
from idl.solvers.base import Solution
from idl.wellposed.base import AbstractConstraint


class ImplicitModel(nn.Module):
    r"""Predict :math:`\hat y = Cx + Du` from the equilibrium :math:`x = \phi(Ax + Bu + b)`.

    The implicit model of El Ghaoui et al. (Implicit Deep Learning, SIAM J. Math. Data Sci. 3(3), 2021), with samples
    as rows. With the default ``f`` the equilibrium exists and is unique for every value of the parameters.

    Args:
        hidden_dim: Size ``n`` of the state ``x``.
        input_dim: Size ``p`` of an input; images are flattened.
        output_dim: Size ``q`` of a prediction.
        low_rank: Whether :math:`A = LR^T`, with factors of shape ``(n, rank)``.
        rank: Number of columns of ``L`` and ``R``, from 1 to ``hidden_dim``; only with ``low_rank=True``.
        mitr: Most steps of the forward solve.
        grad_mitr: Most steps of the backward solve.
        tol: Absolute tolerance of the equilibrium, largest entry.
        grad_tol: Tolerance of the backward solve, relative to the incoming gradient.
        f: Implicit function: a class, built with the settings above and below, or an instance that has its own.
        activation: Name, :class:`~idl.activations.Activation` or callable; ``None`` means ReLU, or what ``f`` defines.
        kappa: Bound on :math:`\|A\|_\infty`, in (0, 1); ``None`` means 0.99, that of ``ImplicitFunctionInf``.
        bias: Whether to add a constant ``b`` to the pre-activation.
        direct: Whether the term ``Du`` is there.

    Raises:
        TypeError, ValueError: If an argument is out of range, or a setting is given beside an instance ``f``.

    Example:
        >>> model = ImplicitModel(hidden_dim=100, input_dim=784, output_dim=10)
        >>> model(torch.rand(32, 1, 28, 28)).shape
        torch.Size([32, 10])
    """

    def __init__(
        self,
        hidden_dim: int,
        input_dim: int,
        output_dim: int,
        low_rank: bool = False,
        rank: int | None = None,
        mitr: int = 300,
        grad_mitr: int = 300,
        tol: float = 3e-6,
        grad_tol: float = 3e-6,
        f: type[ImplicitFunction] | ImplicitFunction = ImplicitFunctionInf,
        *,
        activation: str | Activation | Callable[[Tensor], Tensor] | None = None,
        kappa: float | None = None,
        bias: bool = False,
        direct: bool = True,
    ) -> None:
        super().__init__()
        self.hidden_dim = checks.positive_integer("hidden_dim", hidden_dim)
        self.input_dim = checks.positive_integer("input_dim", input_dim)
        self.output_dim = checks.positive_integer("output_dim", output_dim)
        self.rank = _checked_rank(low_rank, rank, self.hidden_dim)
        settings = {"mitr": mitr, "grad_mitr": grad_mitr, "tol": tol, "grad_tol": grad_tol}
        self.f = _built_function(f, settings, {"activation": activation, "kappa": kappa})
        # A learnable activation is a part of the model: its parameters move, train and are saved with it.
        self.phi = self.f.activation.phi if isinstance(self.f.activation.phi, nn.Module) else None
        n, p, q = self.hidden_dim, self.input_dim, self.output_dim
        if self.rank is None:
            self.A = nn.Parameter(torch.empty(n, n))
        else:
            self.L = nn.Parameter(torch.empty(n, self.rank))
            self.R = nn.Parameter(torch.empty(n, self.rank))
        self.B = nn.Parameter(torch.empty(n, p))
        self.C = nn.Parameter(torch.empty(q, n))
        self.D = nn.Parameter(torch.empty(q, p)) if checks.boolean("direct", direct) else None
        self.bias = nn.Parameter(torch.empty(n)) if checks.boolean("bias", bias) else None
        self._check_factors()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters.

        ``A`` has entries of standard deviation ``1 / sqrt(n)``, so that with the default ``f`` its rows start at the
        bound; ``B`` is drawn as He et al. (2015) do before a ReLU, ``C`` and ``D`` as :class:`torch.nn.Linear` does.
        """
        n, p = self.hidden_dim, self.input_dim
        with torch.no_grad():
            if self.rank is None:
                self.A.normal_(std=n**-0.5)
            else:  # entries of L R^T as large as those of a full A
                for factor in (self.L, self.R):
                    factor.normal_(std=(n * self.rank) ** -0.25)
            for matrix, bound in ((self.B, math.sqrt(6 / p)), (self.C, n**-0.5), (self.D, p**-0.5)):
                if matrix is not None:
                    matrix.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.zero_()

    @overload
    def forward(self, u: Tensor, x0: Tensor | None = None, return_solution: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(
        self, u: Tensor, x0: Tensor | None = None, *, return_solution: Literal[True]
    ) -> tuple[Tensor, Solution]: ...

    def forward(
        self, u: Float[Tensor, "..."], x0: Float[Tensor, "..."] | None = None, return_solution: bool = False
    ) -> Any:
        """Predict from inputs ``(..., input_dim)``, or from images of ``input_dim`` numbers each, a batch or one.

        Args:
            u: Inputs.
            x0: Start of the iteration, ``(..., hidden_dim)``, zeros if ``None``; changes the steps, not the result.
            return_solution: Whether to return the equilibrium as well, and how exact it is.

        Returns:
            Predictions ``(..., output_dim)``; with ``return_solution`` a pair of them and a
            :class:`~idl.solvers.Solution`.

        Raises:
            TypeError, ValueError: If the shape, dtype or device does not fit the parameters.
            ConvergenceError: If a sample did not converge and ``f`` has ``on_failure="raise"``.
        """
        u = self._flattened(checks.dense_tensor("u", u))
        A, B, C, D = self._matrices()
        if not checks.boolean("return_solution", return_solution):
            return self._output(self.f(A, B, u, bias=self.bias, x0=x0), u, C, D)
        solution = self.f.solution(A, B, u, bias=self.bias, x0=x0)
        return self._output(solution.x, u, C, D), solution

    def state_matrix(self) -> Float[Tensor, "n n"]:
        """Return the admissible ``A``, after the constraint and with low-rank factors multiplied out."""
        return self.f.state_matrix(self._state_parameters).dense()

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        rank = "" if self.rank is None else f", rank={self.rank}"
        flags = f"bias={self.bias is not None}, direct={self.D is not None}"
        return f"{self.hidden_dim}, {self.input_dim}, {self.output_dim}{rank}, {flags}, f={self.f!r}"

    @property
    def _state_parameters(self) -> StateParameters:
        return self.A if self.rank is None else (self.L, self.R)

    def _check_factors(self) -> None:
        constraint = self.f.constraint
        if self.rank is not None and type(constraint).admit_factors is AbstractConstraint.admit_factors:
            constraint.admit_factors(self.L, self.R, 1.0)  # has no low-rank form: raises now what the first solve would

    def _matrices(self) -> tuple[StateParameters, Tensor, Tensor, Tensor | None]:
        """Return ``A, B, C, D`` as the forward pass multiplies with them."""
        return self._state_parameters, self.B, self.C, self.D

    def _output(self, x: Tensor, u: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
        if D is None:
            return linear(x, C)
        if D.layout == torch.sparse_csr:
            return linear(x, C) + linear(u, D)
        rows = u.reshape(-1, self.input_dim)
        # A product with few columns takes half the time as the transpose of one with few rows.
        direct = (D @ rows.T).T.reshape(*u.shape[:-1], self.output_dim) if u.dim() != 2 else (D @ u.T).T
        return linear(x, C) + direct

    def _flattened(self, u: Tensor) -> Tensor:
        p = self.input_dim
        if u.dim() > 0 and u.shape[-1] == p:
            return u
        for first in (*range(1, u.dim() - 1), 0):  # a batch of images before a single one
            if u.shape[first:].numel() == p:
                return u.flatten(first)
        raise ValueError(
            f"`u` must have shape (..., {p}), or trailing dimensions whose product is input_dim={p}; "
            f"got {tuple(u.shape)}."
        )


def _checked_rank(low_rank: bool, rank: int | None, hidden_dim: int) -> int | None:
    if low_rank not in (True, False):
        raise TypeError(f"`low_rank` must be True or False; got {low_rank!r}.")
    if not low_rank:
        if rank is not None:
            raise ValueError(f"`rank` must be None with low_rank=False; got {rank!r}. Set low_rank=True.")
        return None
    if rank is None:
        raise ValueError("`rank` must be an integer from 1 to hidden_dim with low_rank=True; got None.")
    if checks.positive_integer("rank", rank) > hidden_dim:
        raise ValueError(f"`rank` must be at most hidden_dim={hidden_dim}; got {rank}.")
    return int(rank)


def _built_function(f: object, settings: dict[str, Any], optional: dict[str, Any]) -> ImplicitFunction:
    given = {name: value for name, value in optional.items() if value is not None}
    changed = {name: value for name, value in settings.items() if value != DEFAULTS[name]}
    if isinstance(f, ImplicitFunction):
        if changed or given:
            names = ", ".join(f"`{name}`" for name in {**changed, **given})
            raise ValueError(f"{names} must not be given beside an instance f={f!r}; give it to {type(f).__name__}.")
        return f
    if not (isinstance(f, type) and issubclass(f, ImplicitFunction)):
        raise TypeError(f"`f` must be a subclass or an instance of ImplicitFunction; got {f!r}.")
    accepted = inspect.signature(f).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    refused = [name for name in {**changed, **given} if name not in accepted and not takes_all]
    if refused:
        names = ", ".join(f"`{name}`" for name in refused)
        raise ValueError(f"{names} has no meaning for f={f.__name__}; leave it out, or use ImplicitFunctionInf.")
    everything = {**settings, **given}
    return f(**{name: value for name, value in everything.items() if name in accepted or takes_all})
