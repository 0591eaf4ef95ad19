"""IDLHead and IDLAttention: self-attention whose keys, queries and values depend on what they give."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from idl import checks
from idl.attention import forms
from idl.attention.equilibrium import Heads, Past, Tokens, attend
from idl.attention.forms import LipschitzAttention
from idl.differentiation.base import AbstractAdjoint, OnFailure
from idl.differentiation.implicit import ImplicitAdjoint
from idl.differentiation.phantom import PhantomAdjoint
from idl.differentiation.unrolled import UnrolledAdjoint
from idl.equilibrium import eagerly
from idl.linalg.operators import Dense, Factored, StateMatrix
from idl.solvers.adaptive import Adaptive
from idl.solvers.base import AbstractFixedPointSolver
from idl.wellposed.inf_norm import InfNorm

Version = Literal["softmax", "lipschitz"]
Gradient = Literal["implicit", "unrolled", "phantom"]


class _ImplicitAttention(nn.Module):
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
        solver = Adaptive(tol, 0.0, self.fixed_point_iter) if solver is None else solver
        self.solver = checks.instance("solver", solver, AbstractFixedPointSolver, "Try Adaptive().")
        self.gradient = checks.one_of("gradient", gradient, tuple(_ADJOINTS))
        self.adjoint = _ADJOINTS[self.gradient](grad_tol, self.fixed_point_iter)
        checks.one_of("on_failure", on_failure, ("raise", "warn", "ignore"))
        self.on_failure = on_failure
        rows, columns = 3 * self.head_size, 4 * self.head_size
        self.rank: int | None = None
        if checks.boolean("is_low_rank", is_low_rank):
            self.rank = checks.positive_integer("rank", rank)
            if self.rank > rows:
                raise ValueError(f"`rank` must be at most 3 * head_size={rows}; got {rank}.")
            self.L = nn.Parameter(torch.empty(*in_front, rows, self.rank))
            self.R = nn.Parameter(torch.empty(*in_front, columns, self.rank))
        else:
            self.A = nn.Parameter(torch.empty(*in_front, rows, columns))
        self.B = nn.Parameter(torch.empty(*in_front, rows, self.n_embd))
        self.register_parameter("bias", nn.Parameter(torch.empty(*in_front, rows)) if bias else None)
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
        :mod:`idl.attention.contraction` for the proof. ``None`` for softmax, which has no bound that holds for all
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

    def _start_at(self, maps: tuple[nn.Linear, nn.Linear, nn.Linear]) -> None:
        """Take the weights of explicit heads; no output adds to a key, query or value yet."""
        in_front, head = self.B.shape[:-2], self.head_size
        with torch.no_grad():
            (self.A if self.rank is None else self.L).zero_()
            self.B.copy_(torch.cat([m.weight.reshape(*in_front, head, self.n_embd) for m in maps], -2))
            if self.bias is not None:
                self.bias.copy_(torch.cat([_bias(linear).view(*in_front, head) for linear in maps], -1))

    def _attend(
        self, u: Tensor, key_padding_mask: Tensor | None, past: Past | None, return_past: bool, return_solution: bool
    ) -> tuple[Tensor, list[Any]]:
        """Return the outputs, ``(batch, time, heads, head_size)``, and what is asked for beside them."""
        tokens = self._tokens(u, key_padding_mask, past)

        def solved() -> tuple[Tensor, list[Any]]:
            found = attend(self._heads(), tokens, self.solver, self.adjoint, self.on_failure)
            extras: list[Any] = [found.past()] if return_past else []
            return found.o.transpose(1, 2).to(u.dtype), [*extras, found.solution()] if return_solution else extras

        return eagerly(solved)

    def _heads(self) -> Heads:
        contraction = (self.kappa, self.block_size) if self.contractive and self.block_size else None
        count, size = self.B.shape[:-2].numel(), 3 * self.head_size
        B = self.B.reshape(count, size, self.n_embd)
        bias = None if self.bias is None else self.bias.reshape(count, size)
        return Heads(self.form, self._admitted(), B, bias, self.causal, contraction)

    def _admitted(self) -> StateMatrix:
        """Return the admissible state matrix, in float32 for half precision, with a dimension of heads in front."""

        def wide(tensor: Tensor) -> Tensor:
            tensor = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
            return tensor.reshape(-1, *tensor.shape[-2:])

        if self.rank is not None:
            factors = self.constraint.admit_factors(wide(self.L), wide(self.R), 1.0)
            return Factored(*factors.tensors)
        return Dense(*self.constraint.admit(wide(self.A), 1.0).tensors)

    def _tokens(self, u: Tensor, key_padding_mask: Tensor | None, past: Past | None) -> Tokens:
        count = self.B.shape[:-2].numel()
        u = checks.floating_tensor("u", u)
        if u.dim() != 3 or u.shape[2] != self.n_embd or not u.shape[1]:
            raise ValueError(
                f"`u` must have shape (batch, time, {self.n_embd}) with at least one time; got {tuple(u.shape)}."
            )
        checks.same_device_and_dtype({"u": u, "B": self.B})
        tokens = Tokens(u, key_padding_mask, past)
        if past is not None:
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
        if key_padding_mask is not None:
            shape = (len(u), tokens.keys)
            if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != shape:
                raise ValueError(
                    f"`key_padding_mask` must be of bool and shape {shape}, true where a token is padding; got "
                    f"{key_padding_mask.dtype} {tuple(key_padding_mask.shape)}."
                )
        if not (self.training and self.dropout):
            return tokens
        keep = u.new_empty(len(u), count, u.shape[1], tokens.keys).bernoulli_(1 - self.dropout)
        return Tokens(u, key_padding_mask, past, keep.div_(1 - self.dropout) if self.dropout < 1 else keep)


class IDLHead(_ImplicitAttention):
    r"""One head of implicit self-attention: what a token gives decides what it asks, and what others read of it.

    .. math:: [k\; q\; v] = A\,[k\; q\; v\; o] + Bu + b, \quad o = \mathrm{attention}(q, k, v)

    for all tokens together, causal by default; the output is ``o``. With ``A = 0`` it is an explicit head. Keys,
    queries and values are eliminated exactly: an equation in ``o`` alone is solved, and a step costs about what an
    explicit head costs. The gradient is that of the equilibrium, and memory does not grow with the steps.

    ``||A||_inf <= kappa < 1`` makes the elimination possible, and proves nothing about attention itself: softmax is not
    Lipschitz, so that a solve is watched and not promised; a warning says when it failed. The Lipschitz form comes with
    a computed bound, :meth:`contraction_bound`, and with ``contractive=True`` it is held below 1.

    Args:
        head_size: Size of keys, queries, values and output of a token.
        n_embd: Size of an input token.
        block_size: Most tokens; ``None`` for any number.
        fixed_point_iter: Most steps of the solve; the tolerance ends it earlier.
        attention_version: ``"softmax"``, or ``"lipschitz"`` (see :class:`~idl.attention.forms.LipschitzAttention`).
        is_low_rank: Whether ``A`` is a product of two factors of ``rank`` columns.
        rank: Number of columns, from 1 to ``3 head_size``; without a meaning otherwise.
        tol: Absolute tolerance of an output, largest entry.
        grad_tol: Tolerance of the backward solve, relative to its source.
        kappa: Bound on the largest row sum of ``|A|``, in (0, 1).
        causal: Whether a token reads only itself and those before it.
        bias: Whether keys, queries and values have a constant ``b``.
        dropout: Probability of dropping a weight in training, in [0, 1]: one draw for all steps of a call, or the
            equilibrium would not be one. Forms the ``(time, time)`` matrices.
        solver: Method of the solve instead of :class:`~idl.solvers.Adaptive`; brings its own tolerance and steps.
        gradient: ``"implicit"``; ``"unrolled"``, which records all ``fixed_point_iter`` steps; or ``"phantom"``, which
            records the last five.
        contractive: Whether to scale what outputs add so that the proved bound on the contraction is at most ``kappa``.
        on_failure: What to do if a sequence does not converge: ``"raise"``, ``"warn"`` or ``"ignore"``.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> head = IDLHead(8, 32, 16, 30, "softmax")
        >>> head(torch.randn(2, 16, 32)).shape
        torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        head_size: int,
        n_embd: int,
        block_size: int | None,
        fixed_point_iter: int = 100,
        attention_version: Version = "softmax",
        is_low_rank: bool = False,
        rank: int = 1,
        *,
        tol: float = 3e-6,
        grad_tol: float = 3e-6,
        kappa: float = 0.95,
        causal: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        solver: AbstractFixedPointSolver | None = None,
        gradient: Gradient = "implicit",
        contractive: bool = False,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__(
            (),
            head_size,
            n_embd,
            block_size,
            fixed_point_iter,
            attention_version,
            is_low_rank,
            rank,
            tol=tol,
            grad_tol=grad_tol,
            kappa=kappa,
            causal=causal,
            bias=bias,
            dropout=dropout,
            solver=solver,
            gradient=gradient,
            contractive=contractive,
            on_failure=on_failure,
        )

    @classmethod
    def from_explicit(
        cls,
        key: nn.Linear,
        query: nn.Linear,
        value: nn.Linear,
        block_size: int | None = None,
        fixed_point_iter: int = 100,
        attention_version: Version = "softmax",
        **options: Any,
    ) -> "IDLHead":
        """Return a head that starts exactly at an explicit one: ``A = 0``, which training then moves.

        Args:
            key: Map from a token to its key.
            query: Map from a token to its query.
            value: Map from a token to its value.
            block_size: As in the constructor, and so what follows.
            fixed_point_iter: Most steps.
            attention_version: With ``"lipschitz"`` the start is Lipschitz attention of the same keys and queries.
            options: Other arguments of the constructor by name.

        Raises:
            TypeError, ValueError: If the three do not fit together, or an argument is out of range.
        """
        maps = _explicit({"key": key, "query": query, "value": value})
        options.setdefault("bias", any(linear.bias is not None for linear in maps))
        head = cls(key.out_features, key.in_features, block_size, fixed_point_iter, attention_version, **options)
        head = head.to(key.weight)
        head._start_at(maps)
        return head

    def forward(
        self,
        u: Float[Tensor, "batch time n_embd"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        *,
        past: Past | None = None,
        return_past: bool = False,
        return_solution: bool = False,
    ) -> Any:
        """Return the outputs of the head, ``(batch, time, head_size)``.

        Args:
            u: Tokens.
            key_padding_mask: True where a token is padding, and is not read by any; the tokens of ``past`` first.
            past: Keys and values of the tokens before ``u``, as ``return_past`` gives them: causal attention does not
                change an equilibrium that has been found. Carries a gradient if it has one.
            return_past: Whether to return keys and values of all tokens up to now as well.
            return_solution: Whether to return how exact the equilibrium is as well.

        Returns:
            The outputs; with ``return_past`` or ``return_solution`` a tuple of them, two tensors ``(batch, 1, tokens,
            head_size)``, and a :class:`~idl.solvers.Solution` with one residual and number of steps a sequence.

        Raises:
            TypeError, ValueError: If a shape, dtype or device does not fit, or there are too many tokens.
            ConvergenceError: If a sequence did not converge and ``on_failure="raise"``.
        """
        o, extras = self._attend(u, key_padding_mask, past, return_past, return_solution)
        output = o[:, :, 0]
        return (output, *extras) if extras else output


class IDLAttention(_ImplicitAttention):
    """Implicit self-attention of several heads in one computation, with the projection of their outputs.

    Each head is an :class:`IDLHead`; all are solved together.

    Args:
        n_embd: Size of a token.
        n_head: Number of heads.
        block_size: Most tokens; ``None`` for any number.
        head_size: Size of a head; ``n_embd / n_head`` if ``None``.
        fixed_point_iter: See :class:`IDLHead`, as for all that follow.
        attention_version: See there.
        is_low_rank: See there.
        rank: See there.
        tol: See there.
        grad_tol: See there.
        kappa: See there.
        causal: See there.
        bias: Whether keys, queries, values, and the projection have constants.
        dropout: See there.
        solver: See there.
        gradient: See there.
        contractive: See there.
        on_failure: See there.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> attention = IDLAttention(32, 4, block_size=16)
        >>> attention(torch.randn(2, 16, 32)).shape
        torch.Size([2, 16, 32])
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        block_size: int | None,
        fixed_point_iter: int = 100,
        attention_version: Version = "softmax",
        is_low_rank: bool = False,
        rank: int = 1,
        *,
        head_size: int | None = None,
        tol: float = 3e-6,
        grad_tol: float = 3e-6,
        kappa: float = 0.95,
        causal: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        solver: AbstractFixedPointSolver | None = None,
        gradient: Gradient = "implicit",
        contractive: bool = False,
        on_failure: OnFailure = "warn",
    ) -> None:
        n_embd, n_head = checks.positive_integer("n_embd", n_embd), checks.positive_integer("n_head", n_head)
        if head_size is None:
            if n_embd % n_head:
                raise ValueError(f"`n_head` must divide n_embd={n_embd} unless head_size is given; got {n_head}.")
            head_size = n_embd // n_head
        super().__init__(
            (n_head,),
            head_size,
            n_embd,
            block_size,
            fixed_point_iter,
            attention_version,
            is_low_rank,
            rank,
            tol=tol,
            grad_tol=grad_tol,
            kappa=kappa,
            causal=causal,
            bias=bias,
            dropout=dropout,
            solver=solver,
            gradient=gradient,
            contractive=contractive,
            on_failure=on_failure,
        )
        self.n_head = n_head
        self.projection = nn.Linear(self.n_head * self.head_size, self.n_embd, bias=bias)

    @classmethod
    def from_explicit(
        cls,
        key: nn.Linear,
        query: nn.Linear,
        value: nn.Linear,
        projection: nn.Linear,
        n_head: int,
        block_size: int | None = None,
        fixed_point_iter: int = 100,
        attention_version: Version = "softmax",
        **options: Any,
    ) -> "IDLAttention":
        """Return implicit attention that starts exactly at an explicit one: ``A = 0``, which training then moves.

        Args:
            key: Map from a token to the keys of all heads, one after another.
            query: Map to the queries.
            value: Map to the values.
            projection: Map of the outputs of all heads; copied.
            n_head: Number of heads.
            block_size: As in the constructor, and so what follows.
            fixed_point_iter: Most steps.
            attention_version: With ``"lipschitz"`` the start is Lipschitz attention of the same keys and queries.
            options: Other arguments of the constructor by name.

        Raises:
            TypeError, ValueError: If the maps do not fit together, or an argument is out of range.
        """
        maps = _explicit({"key": key, "query": query, "value": value})
        width, n_head = key.out_features, checks.positive_integer("n_head", n_head)
        checks.instance("projection", projection, nn.Linear, "Pass the module that projects the heads' outputs.")
        if width % n_head or projection.in_features != width or projection.out_features != key.in_features:
            raise ValueError(
                f"`projection` must map {width} to {key.in_features}, and n_head divide {width}; got "
                f"{projection.in_features} to {projection.out_features}, and {n_head} heads."
            )
        everything = (*maps, projection)
        options.setdefault("bias", any(linear.bias is not None for linear in everything))
        settings = (block_size, fixed_point_iter, attention_version)
        attention = cls(key.in_features, n_head, *settings, head_size=width // n_head, **options)
        attention = attention.to(key.weight)
        attention._start_at(maps)
        with torch.no_grad():
            attention.projection.weight.copy_(projection.weight)
            if attention.projection.bias is not None:
                attention.projection.bias.copy_(_bias(projection))
        return attention

    def forward(
        self,
        u: Float[Tensor, "batch time n_embd"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        *,
        past: Past | None = None,
        return_past: bool = False,
        return_solution: bool = False,
    ) -> Any:
        """Return the projected outputs of all heads, ``(batch, time, n_embd)``; see :meth:`IDLHead.forward`.

        Args:
            u: Tokens.
            key_padding_mask: True where a token is padding.
            past: Keys and values of the tokens before, ``(batch, heads, tokens, head_size)`` each.
            return_past: Whether to return those of all tokens up to now as well.
            return_solution: Whether to return how exact the equilibrium is as well.

        Returns:
            The outputs, or a tuple as :meth:`IDLHead.forward` gives it.

        Raises:
            TypeError, ValueError: If a shape, dtype or device does not fit, or there are too many tokens.
            ConvergenceError: If a sequence did not converge and ``on_failure="raise"``.
        """
        o, extras = self._attend(u, key_padding_mask, past, return_past, return_solution)
        output = self.projection(o.flatten(2))
        return (output, *extras) if extras else output


def _bias(linear: nn.Linear) -> Tensor:
    bias = cast(Tensor | None, linear.bias)
    return linear.weight.new_zeros(linear.out_features) if bias is None else bias


def _explicit(maps: dict[str, nn.Linear]) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Return the maps of an explicit head if they fit together."""
    key, query, value = (
        checks.instance(name, linear, nn.Linear, "Pass the modules that map a token to key, query and value.")
        for name, linear in maps.items()
    )
    if not key.weight.shape == query.weight.shape == value.weight.shape:
        shapes = ", ".join(str(tuple(linear.weight.shape)) for linear in maps.values())
        raise ValueError(f"`key`, `query` and `value` must have weights of one shape; got {shapes}.")
    return key, query, value


def _implicit(grad_tol: float, steps: int) -> AbstractAdjoint:
    return ImplicitAdjoint(Adaptive(0.0, grad_tol, max(steps, 300)))  # a forward cut short needs an exact backward


_ADJOINTS: dict[str, Callable[[float, int], AbstractAdjoint]] = {
    "implicit": _implicit,
    "unrolled": lambda grad_tol, steps: UnrolledAdjoint(steps),
    "phantom": lambda grad_tol, steps: PhantomAdjoint(),
}
