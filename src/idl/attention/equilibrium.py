"""Where attention, solver and adjoint meet: the equilibrium of all tokens and heads of a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from idl.attention.contraction import contraction_bound
from idl.attention.elimination import dense, eliminate, with_outputs
from idl.attention.forms import AbstractAttention, LipschitzAttention, Reach
from idl.differentiation.base import AbstractAdjoint, FailureReport, OnFailure
from idl.differentiation.implicit import without_autocast
from idl.linalg.operators import StateMatrix, to_precise
from idl.maps.general import GeneralMap, RowFunction
from idl.solvers.base import AbstractFixedPointSolver, Solution

Past = tuple[Tensor, Tensor]
"""Keys and values of the tokens before, ``(batch, heads, time, head)`` each."""

_Cast = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Heads:
    """Implicit heads: matrices, and how tokens attend.

    Args:
        form: How tokens attend.
        A: Admissible state matrices, ``(heads, 3 head, 4 head)``, or their factors.
        B: Input matrices, ``(heads, 3 head, n_embd)``.
        bias: ``(heads, 3 head)``.
        causal: Whether a token reads only itself and those before it.
        contraction: Bound to which what outputs add is scaled down, and the most keys that it is for; ``None`` leaves
            it as it is.
    """

    form: AbstractAttention
    A: StateMatrix
    B: Tensor
    bias: Tensor | None
    causal: bool
    contraction: tuple[float, int] | None = None
    amplification: float = 1.0
    """Largest factor that dropout puts on a weight."""

    def eliminated(self, cast: _Cast) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Return :math:`W_o` or its factors, :math:`B'` and :math:`b'`; see :mod:`idl.attention.elimination`."""
        A = type(self.A)(*map(cast, self.A.tensors))
        from_output, B, bias = eliminate(A, cast(self.B), None if self.bias is None else cast(self.bias))
        if self.contraction is not None:  # scaling A_o scales W_o
            radius, keys = self.contraction
            W = dense(from_output)
            # The second derivative of a 2-norm does not exist at zero, where a head that starts as an explicit one is:
            # the bound of heads that need no scaling gets no gradient at all.
            exceeds = contraction_bound(W.detach(), keys) > radius
            bound = contraction_bound(W.where(exceeds[:, None, None], W.detach()), keys)
            factor = radius / bound.clamp_min(radius)
            from_output = (*from_output[:-1], from_output[-1] * factor[:, None, None])
        return from_output, B, bias

    def contraction_bound(self, keys: int) -> float | None:
        """Return a proved bound on the contraction for at most so many keys; ``None`` if none is known."""
        if not isinstance(self.form, LipschitzAttention):
            return None
        with torch.no_grad():
            return self.amplification * float(contraction_bound(dense(self.eliminated(to_precise)[0]), keys).max())


@dataclass(frozen=True)
class Tokens:
    """What the heads read.

    Args:
        u: New tokens, ``(batch, time, n_embd)``.
        padding: Which keys are padding, those of the past first, ``(batch, keys)``.
        allowed: Which keys each query reads besides, to be broadcast to ``(batch, heads, time, keys)``.
        past: Keys and values of the tokens before.
        keep: Factor of each weight, for dropout, ``(batch, heads, time, keys)``.
    """

    u: Tensor
    padding: Tensor | None = None
    allowed: Tensor | None = None
    past: Past | None = None
    keep: Tensor | None = None

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.u.shape[1] + (0 if self.past is None else self.past[0].shape[2])

    @property
    def reached(self) -> Tensor | None:
        """Which keys each query reads, beside what causality says."""
        if self.padding is None:
            return self.allowed
        present = ~self.padding[:, None, None, :]
        return present if self.allowed is None else present & self.allowed


class Equation(NamedTuple):
    """``o = attention(source + W o)``: the tensors that it reads."""

    source: Tensor
    """What the input gives to ``[k q v]``, ``(batch, heads, time, 3 head)``."""
    from_output: tuple[Tensor, ...]
    """:math:`W_o` or its factors."""
    allowed: Tensor | None
    keep: Tensor | None
    past: Past | None

    @staticmethod
    def of(heads: Heads, tokens: Tokens, cast: _Cast) -> "Equation":
        """Return the equation, all that is in it ``cast`` before anything is computed."""
        from_output, B, bias = heads.eliminated(cast)
        count, size, _ = B.shape
        time = tokens.u.shape[1]
        u = cast(tokens.u)
        if tokens.padding is not None:  # what stands there is not looked at, not even by a gradient
            u = u.masked_fill(tokens.padding[:, -time:, None], 0)
        flat = F.linear(u, B.flatten(0, 1), None if bias is None else bias.flatten())
        source = flat.view(*flat.shape[:-1], count, size).transpose(1, 2).contiguous()
        if tokens.padding is not None:
            source = source.masked_fill(tokens.padding[:, None, -time:, None], 0)
        keep = None if tokens.keep is None else cast(tokens.keep)
        past = None if tokens.past is None else (cast(tokens.past[0]), cast(tokens.past[1]))
        return Equation(source, from_output, tokens.reached, keep, past)

    def kqv(self, o: Tensor) -> Tensor:
        """Return keys, queries and values of the new tokens."""
        return with_outputs(self.source, self.from_output, o)

    def attending(self, o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of the new tokens, and keys and values of all."""
        k, q, v = self.kqv(o).chunk(3, -1)
        if self.past is not None:
            k, v = torch.cat((self.past[0], k), -2), torch.cat((self.past[1], v), -2)
        return q, k, v

    def fused(self, heads: Heads, o: Tensor) -> Tensor:
        """Return the outputs that follow from these, with one derivative."""
        return heads.form.fused(*self.attending(o), Reach(heads.causal, self.allowed))

    def formula(self, heads: Heads, o: Tensor) -> Tensor:
        """Return the outputs that follow from these, with derivatives of any order and mode."""
        return heads.form.formula(*self.attending(o), Reach(heads.causal, self.allowed), self.keep)


@dataclass(frozen=True)
class Attended:
    """The equilibrium, ``(batch, heads, time, head)``, with its gradient; steps and convergence of each sample."""

    o: Tensor
    steps: Tensor
    converged: Tensor
    heads: Heads
    tokens: Tokens
    equation: Equation

    def past(self) -> Past:
        """Return keys and values of all tokens up to now."""
        _, k, v = self.equation.attending(self.o)
        return k, v

    def solution(self) -> Solution:
        """Return the equilibrium with its residual, in float64 from ``u`` on, and its error bound if any."""
        with torch.no_grad(), without_autocast(self.o.device):
            exact, o = Equation.of(self.heads, self.tokens, to_precise), to_precise(self.o)
            image = exact.formula(self.heads, o)
            residual = (image - o).abs().flatten(1).amax(1).to(self.o.dtype)
        contraction = self.heads.contraction_bound(self.tokens.keys)
        bound = None if contraction is None or contraction >= 1 else residual / (1 - contraction)
        return Solution(self.o, residual, self.steps, self.converged, bound)


def attend(
    heads: Heads, tokens: Tokens, solver: AbstractFixedPointSolver, adjoint: AbstractAdjoint, on_failure: OnFailure
) -> Attended:
    """Solve for the outputs of all heads and tokens, each sample by itself.

    A step costs what an explicit attention costs, with a projection from one head instead of one from the embedding.
    Half precision is solved in float32.

    Args:
        heads: The heads.
        tokens: What they read.
        solver: Method of the solve.
        adjoint: Rule of the gradient.
        on_failure: What to do about samples that do not converge.

    Raises:
        ConvergenceError: If a sample did not converge and ``on_failure="raise"``.
    """
    precision = torch.float64 if tokens.u.dtype == torch.float64 else torch.float32
    with without_autocast(tokens.u.device):
        equation = Equation.of(heads, tokens, lambda tensor: tensor.to(precision))
        batch, count, time, size = equation.source.shape
        shape = (count, time, size // 3)
        leaves, structure = pytree.tree_flatten(equation)
        places = [i for i, leaf in enumerate(leaves) if leaf is not None]

        def rows_of(attention: Callable[[Equation, Heads, Tensor], Tensor]) -> RowFunction:
            def function(x: Tensor, *values: Tensor) -> Tensor:
                given = list(leaves)
                for i, value in zip(places, values, strict=True):
                    given[i] = value
                return attention(pytree.tree_unflatten(given, structure), heads, x.view(-1, *shape)).flatten(1)

            return function

        exact = rows_of(Equation.formula)
        # The fused kernel draws its own dropout, another one each time.
        parametric = GeneralMap(exact if tokens.keep is not None else rows_of(Equation.fused), formula=exact)
        report = FailureReport(on_failure, lambda: _ADVICE)
        start = equation.source.new_zeros(batch, count * time * (size // 3))
        parameters = tuple(leaves[i] for i in places)
        x, steps, converged = adjoint.fixed_point(parametric, solver, start, parameters, report)
    return Attended(x.view(-1, *shape), steps, converged, heads, tokens, equation)


_ADVICE = (
    "||A||_inf < 1 does not make attention contract. Raise fixed_point_iter, lower kappa, or take "
    'attention_version="lipschitz" with contractive=True, which does.'
)
