"""What one implicit head and several have in common: parameters, admissible matrices, checks, and the solve."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from idl import checks
from idl.attention import forms
from idl.attention.equilibrium import Heads, Past, Tokens, attend
from idl.attention.forms import LipschitzAttention
from idl.differentiation.base import AbstractAdjoint, OnFailure
from idl.differentiation.implicit import ImplicitAdjoint
from idl.differentiation.phantom import PhantomAdjoint
from idl.differentiation.unrolled import UnrolledAdjoint
from idl.functions import check_used
from idl.linalg.operators import Dense, Factored, StateMatrix
from idl.solvers.adaptive import Adaptive
from idl.solvers.base import AbstractFixedPointSolver
from idl.transforms import eagerly
from idl.wellposed.inf_norm import InfNorm

Version = Literal["softmax", "lipschitz"]
Gradient = Literal["implicit", "unrolled", "phantom"]


class ImplicitHeads(nn.Module):
    """What one head and several have in common; their matrices differ by a dimension in front."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_front: tuple[int, ...],
        head_size: int,
        n_embd: int,
        block_size: int | None,
        fixed_point_iter: int,
        attention_version: Version,
        is_low_rank: bool,
        rank: int,
        *,
        tol: float,
        grad_tol: float,
        kappa: float,
        causal: bool,
        bias: bool,
        dropout: float,
        solver: AbstractFixedPointSolver | None,
        gradient: Gradient,
        contractive: bool,
        on_failure: OnFailure,
    ) -> None:
        super().__init__()
        self.head_size = checks.positive_integer("head_size", head_size)
        self.n_embd = checks.positive_integer("n_embd", n_embd)
        self.block_size = None if block_size is None else checks.positive_integer("block_size", block_size)
        self.fixed_point_iter = checks.positive_integer("fixed_point_iter", fixed_point_iter)
        self.attention_version = checks.one_of("attention_version", attention_version, tuple(forms.BY_NAME))
        self.form = forms.BY_NAME[attention_version]
        self.causal = checks.boolean("causal", causal)
        self.contractive = checks.boolean("contractive", contractive)
        if self.contractive and not (isinstance(self.form, LipschitzAttention) and self.block_size):
            raise ValueError(
                "`contractive` must be False unless attention_version='lipschitz' and block_size is known: softmax "
                f"attention has no bound; got attention_version={attention_version!r}, block_size={block_size}."
            )
        self.dropout = checks.in_unit("dropout", dropout)
        self.constraint = InfNorm(kappa)
        tol, grad_tol = checks.non_negative("tol", tol), checks.non_negative("grad_tol", grad_tol)
        forward = Adaptive(tol, 0.0, self.fixed_point_iter) if solver is None else solver
        self.solver = checks.instance("solver", forward, AbstractFixedPointSolver, "Try Adaptive().")
        check_used("solver", solver, tol=tol)
        self.gradient = checks.one_of("gradient", gradient, tuple(_ADJOINTS))
        self.adjoint = _ADJOINTS[self.gradient](grad_tol, self.fixed_point_iter)
        checks.one_of("on_failure", on_failure, ("raise", "warn", "ignore"))
        self.on_failure = on_failure
        rows, columns = 3 * self.head_size, 4 * self.head_size
        self.rank: int | None = None
        rank = checks.positive_integer("rank", rank)
        if checks.boolean("is_low_rank", is_low_rank):
            self.rank = rank
            if self.rank > rows:
                raise ValueError(f"`rank` must be at most 3 * head_size={rows}; got {rank}.")
            self.L = nn.Parameter(torch.empty(*in_front, rows, self.rank))
            self.R = nn.Parameter(torch.empty(*in_front, columns, self.rank))
        else:
            self.A = nn.Parameter(torch.empty(*in_front, rows, columns))
        self.B = nn.Parameter(torch.empty(*in_front, rows, self.n_embd))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(*in_front, rows)) if checks.boolean("bias", bias) else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters.

        ``A`` as :class:`~idl.ImplicitModel` does, ``B`` as :class:`torch.nn.Linear` does. Keys and queries of the
        Lipschitz form are smaller by the root of twice their size: at distances beyond 3 tokens do not see each other.
        """
        with torch.no_grad():
            if self.rank is None:
                self.A.normal_(std=self.A.shape[-1] ** -0.5)
            else:
                for factor in (self.L, self.R):
                    factor.normal_(std=(factor.shape[-2] * self.rank) ** -0.25)
            self.B.uniform_(-(self.n_embd**-0.5), self.n_embd**-0.5)
            if isinstance(self.form, LipschitzAttention):
                self.B[..., : 2 * self.head_size, :] *= (2 * self.head_size / 3) ** -0.5
            if self.bias is not None:
                self.bias.zero_()

    @property
    def kappa(self) -> float:
        r"""Bound on :math:`\|A\|_\infty`."""
        return self.constraint.kappa

    def state_matrix(self) -> Tensor:
        """Return the admissible ``A``, ``(..., 3 head_size, 4 head_size)``, after the constraint."""
        return self._admitted().dense().view(*self.B.shape[:-1], 4 * self.head_size)

    def contraction_bound(self, time: int | None = None) -> float | None:
        r"""Return a proved bound on the contraction of the whole map, all tokens together, in the max norm.

        Below 1 the equilibrium is unique for every input, and every start leads to it; see
        :mod:`idl.attention.contraction` for the proof. In training with dropout it is larger by ``1 / (1 - dropout)``,
        for which ``contractive`` leaves room. ``None`` for softmax, which has no bound that holds for all
        inputs, whatever :math:`\|A\|_\infty` is.

        Args:
            time: Number of tokens; ``block_size`` if ``None``.

        Raises:
            TypeError, ValueError: If ``time`` is not a positive integer, or no ``block_size`` is known instead.
        """
        time = self.block_size if time is None else time
        if time is None:
            raise ValueError("`time` must be given where block_size is None.")
        return self._heads().contraction_bound(checks.positive_integer("time", time))

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        rank = "" if self.rank is None else f", rank={self.rank}"
        return (
            f"{self.head_size}, {self.n_embd}, block_size={self.block_size}, {self.attention_version}{rank}, "
            f"kappa={self.kappa}, causal={self.causal}, gradient={self.gradient}, {self.solver!r}"
        )

    def start_at(self, key: nn.Linear, query: nn.Linear, value: nn.Linear) -> None:
        """Take the weights of explicit heads, frozen if all of these are; no output adds to a key, query or value yet.

        Raises:
            ValueError: If they have biases and these have none.
        """
        if self.bias is None and any(linear.bias is not None for linear in (key, query, value)):
            raise ValueError(
                "`bias` must be True for explicit heads with biases; got False. Leave it out: it is found."
            )
        in_front, head = self.B.shape[:-2], self.head_size
        with torch.no_grad():
            (self.A if self.rank is None else self.L).zero_()
            self.B.copy_(torch.cat([m.weight.reshape(*in_front, head, self.n_embd) for m in (key, query, value)], -2))
            if self.bias is not None:
                self.bias.copy_(
                    torch.cat([constants(linear).view(*in_front, head) for linear in (key, query, value)], -1)
                )
        explicit = [parameter for linear in (key, query, value) for parameter in linear.parameters()]
        trained = any(parameter.requires_grad for parameter in explicit)
        for taken in (self.B, self.bias):
            if taken is not None:
                taken.requires_grad_(trained)

    def outputs(
        self,
        u: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        allowed: Tensor | None = None,
        past: Past | None = None,
        return_past: bool = False,
        return_solution: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        """Return the outputs, ``(batch, time, heads, head_size)``, and what is asked for beside them.

        ``allowed`` says which keys each query reads beside what causality and padding say, to be broadcast to
        ``(batch, heads, time, keys)``; see :meth:`idl.IDLHead.forward` for the rest.
        """
        checks.boolean("return_past", return_past)
        checks.boolean("return_solution", return_solution)
        tokens = self._tokens(Tokens(u, key_padding_mask, allowed, past))

        def solved() -> tuple[Tensor, list[Any]]:
            found = attend(self._heads(), tokens, self.solver, self.adjoint, self.on_failure)
            extras: list[Any] = [found.past()] if return_past else []
            return found.o.transpose(1, 2).to(u.dtype), [*extras, found.solution()] if return_solution else extras

        return eagerly(solved)

    def _heads(self) -> Heads:
        kept = 1 / (1 - self.dropout) if self.dropout < 1 else 1.0  # the factor of weights that dropout keeps
        # The same matrices in training and in evaluation, which is what the factor of training leaves room for.
        contraction = (self.kappa / kept, self.block_size) if self.contractive and self.block_size else None
        count, size = self.B.shape[:-2].numel(), 3 * self.head_size
        B = self.B.reshape(count, size, self.n_embd)
        bias = None if self.bias is None else self.bias.reshape(count, size)
        return Heads(self.form, self._admitted(), B, bias, self.causal, contraction, kept if self.training else 1.0)

    def _admitted(self) -> StateMatrix:
        """Return the admissible state matrix, in float32 for half precision, with a dimension of heads in front."""

        def wide(tensor: Tensor) -> Tensor:
            tensor = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
            return tensor.reshape(-1, *tensor.shape[-2:])

        if self.rank is not None:
            factors = self.constraint.admit_factors(wide(self.L), wide(self.R), 1.0)
            return Factored(*factors.tensors)
        return Dense(*self.constraint.admit(wide(self.A), 1.0).tensors)

    def _tokens(self, tokens: Tokens) -> Tokens:
        """Return the tokens if they fit, with a draw of what dropout keeps."""
        u, past, count = checks.dense_tensor("u", tokens.u), tokens.past, self.B.shape[:-2].numel()
        if u.dim() != 3 or u.shape[2] != self.n_embd or not u.shape[1]:
            raise ValueError(
                f"`u` must have shape (batch, time, {self.n_embd}) with at least one time; got {tuple(u.shape)}."
            )
        checks.same_device_and_dtype({"u": u, "B": self.B})
        if past is not None:
            _check_pair(past)
            past = (checks.floating_tensor("past", past[0]), checks.floating_tensor("past", past[1]))
            wanted = (len(u), count, past[0].shape[2] if past[0].dim() == 4 else "time", self.head_size)
            for tensor in past:
                if tuple(tensor.shape) != wanted:
                    raise ValueError(f"`past` must be two tensors of shape {wanted}; got {tuple(tensor.shape)}.")
            if not self.causal:
                raise ValueError("`past` must be None with causal=False: earlier tokens depend on later ones.")
        if self.block_size is not None and tokens.keys > self.block_size:
            raise ValueError(
                f"`u` must have at most block_size={self.block_size} tokens, those of `past` included; "
                f"got {tokens.keys}. Cut the sequence: u[:, -{self.block_size}:]."
            )
        padding, shape = tokens.padding, (len(u), tokens.keys)
        if padding is not None:
            checks.instance("key_padding_mask", padding, Tensor, "Try torch.as_tensor(key_padding_mask).")
        if padding is not None and (padding.dtype != torch.bool or padding.shape != shape):
            raise ValueError(
                f"`key_padding_mask` must be of bool and shape {shape}, true where a token is padding; got "
                f"{padding.dtype} {tuple(padding.shape)}."
            )
        if not (self.training and self.dropout):
            return tokens
        keep = u.new_empty(len(u), count, u.shape[1], tokens.keys).bernoulli_(1 - self.dropout)
        return replace(tokens, keep=keep.div_(1 - self.dropout) if self.dropout < 1 else keep)


def _check_pair(past: object) -> None:
    if not isinstance(past, Sequence) or len(past) != 2:
        got = f"{len(past)} of them" if isinstance(past, Sequence) else type(past).__name__
        raise TypeError(f"`past` must be two tensors, keys and values, as return_past gives them; got {got}.")


def constants(linear: nn.Linear) -> Tensor:
    """Return the bias of a linear map, zeros if it has none."""
    bias = cast(Tensor | None, linear.bias)
    return linear.weight.new_zeros(linear.out_features) if bias is None else bias


def _implicit(grad_tol: float, steps: int) -> AbstractAdjoint:
    return ImplicitAdjoint(Adaptive(0.0, grad_tol, max(steps, 300)))  # a forward cut short needs an exact backward


_ADJOINTS: dict[str, Callable[[float, int], AbstractAdjoint]] = {
    "implicit": _implicit,
    "unrolled": lambda grad_tol, steps: UnrolledAdjoint(steps),
    "phantom": lambda grad_tol, steps: PhantomAdjoint(),
}
